"What is said of a run: who was not helped, and names that hold markup."
from dataclasses import replace

import pytest

from llm_quantize.compressed.layer import SmoothQuantOptions
from llm_quantize.compressed.result import SmoothQuantResult, not_helped

RECORD = {
    "layer": 0, "pair": "a -> b", "alpha": 0.5, "error": 0.5, "error_unsmoothed": 1.0, "factor_min": 1.0,
    "factor_max": 2.0, "inputs_before": 9.0, "inputs_after": 3.0, "weights_before": 1.0, "weights_after": 3.0,
}
TENSOR = {"name": "model.layers.0.b.weight", "type": "I8", "weights": 8, "bpw": 8.0, "bytes": 8, "error": None}


def result_of(pairs, **changes):
    made = SmoothQuantResult(
        output_path="out/model", tensors=(TENSOR,), files=("out/model/model.safetensors",), file_size=10, parameters=8,
        original_dtype="bfloat16", original_size=16, pairs=tuple(pairs), unfit=(), options=SmoothQuantOptions(),
        windows=4,
    )
    return replace(made, **changes)


def test_report_names_what_was_not_helped():
    pairs = [{**RECORD, "error": 2.0}, {**RECORD, "layer": 1}]
    assert [(p["layer"], p["suggestion"]) for p in not_helped(pairs, 0.5)] == [(0, "try --alpha auto")]
    assert "--error-feedback" in not_helped(pairs, "auto")[0]["suggestion"]
    assert not_helped(pairs, None) == []
    assert result_of(pairs).smoothing()["not_helped"] == not_helped(pairs, 0.5)


@pytest.mark.parametrize("name", ["<img src=x onerror=alert(1)>", "a | b", "[x](javascript:alert(1))", "**loud**"])
def test_names_are_no_markup(name):
    shown = result_of([{**RECORD, "pair": name}], output_path=f"out/{name}")._repr_markdown_()
    assert name not in shown
    assert "<" not in shown
    assert "](" not in shown
    assert {line.count("|") for line in shown.splitlines()[2:]} == {10} # no column more than the head has


def test_the_dictionary_holds_names_as_they_are():
    found = result_of([{**RECORD, "pair": "<b>"}], output_path="out/<b>").to_dict()
    assert found["output_path"] == "out/<b>"
    assert found["smoothquant"]["pairs"][0]["pair"] == "<b>"


def test_a_run_without_smoothing_says_none():
    plain = result_of([{**RECORD, "alpha": None}], options=SmoothQuantOptions(None))
    assert "| a -&gt; b | 1 | none |" in plain._repr_markdown_()


def test_the_keys_of_the_json_output():
    found = result_of([RECORD]).to_dict()
    assert list(found) == [
        "status", "output_path", "files", "format", "quantization_level", "profile", "layer_summary", "tensors",
        "effective_bpw", "compression_ratio", "file_size", "quality_report", "duration_seconds", "peak_memory_bytes",
        "validation_status", "smoothquant", "metadata",
    ]
    assert found["layer_summary"] == [
        {"layer_name": "layers.0", "bit_width": 8.0, "parameter_count": 8, "is_protected": False}
    ]
    assert found["metadata"]["layers_processed"] == 1
