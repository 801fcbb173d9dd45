"Protection of super weights: no larger, far better, and no other file where there is nothing to protect."
import json
import logging
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch

from llm_quantize.api import quantize
from llm_quantize.calibration.effort import find_effort
from llm_quantize.calibration.probe import Probe, texts
from llm_quantize.calibration.sensitivity import measure_sensitivity
from llm_quantize.cli.main import main
from llm_quantize.errors import ArgumentError
from llm_quantize.gguf.pinning import half_ulp
from llm_quantize.gguf.plan import plan_gguf
from llm_quantize.gguf.protection import exchange, rescaled, up_of
from llm_quantize.gguf.resolution import sensitivity_path
from llm_quantize.models.checkpoint import open_checkpoint, sample_path
from llm_quantize.models.job import Job
from llm_quantize.models.layer_stack import LayerStack
from llm_quantize.quality.evaluate import compare
from llm_quantize.quality.llama_cpp_model import open_llama

DOWN = "blk.0.ffn_down.weight"


def read(path):
    "Name -> (type, weights), by gguf's own reader and dequantizer."
    return {t.name: (t.tensor_type.name, gguf.quants.dequantize(t.data, t.tensor_type)) for t in gguf.GGUFReader(path).tensors}

# ---- rescaling and exchange ----------------------------------------------------------------------------------------------------------------------

def test_a_rescaled_model_says_the_same():
    checkpoint = open_checkpoint(sample_path())
    specs = plan_gguf(Job(checkpoint), "Q2_K").specs
    spec = next(s for s in specs if s.name == DOWN)
    other = rescaled(checkpoint, up_of(specs, spec), spec, 210, 0.125)
    ids = texts(Job(checkpoint), find_effort("quick"))[1][:1]
    a, b = (Probe(LayerStack(c, dtype=torch.float32, device="cpu"), ids).expected[0] for c in (checkpoint, other))
    assert spec.load(other)[12, 210] == 8 * spec.load(checkpoint)[12, 210]
    assert (a - b).abs().max() < 1e-3


@pytest.mark.parametrize("level", ["IQ1_S", "Q2_K", "Q4_K_M", "IQ3_XXS"])
def test_an_exchange_keeps_the_size(level, imatrix):
    job = Job(sample_path(), device="cpu")
    planned = plan_gguf(job, level, has_imatrix=True)
    costs = measure_sensitivity(job, imatrix, effort="quick", path=sensitivity_path(job.name, imatrix, "quick"))
    changed, sizes = exchange(planned, costs, (0,)), {}
    assert changed
    for t in planned.plan: sizes[t.name] = (t.bytes, replace(t, type=changed.get(t.name, t.type)).bytes)
    for name, (old, new) in sizes.items(): assert new >= old if name.startswith("blk.0.") else new <= old
    total = [sum(s[i] for s in sizes.values()) for i in (0, 1)]
    assert 0 <= total[0] - total[1] <= 0.002 * planned.file_bytes
    if level in ("Q2_K", "Q4_K_M"): assert all(type.startswith("Q") for type in changed.values())

# ---- the file ------------------------------------------------------------------------------------------------------------------------------------

def test_files_of_the_same_size_and_far_better(pair):
    without, guarded = pair
    assert 0 <= without.file_size - guarded.file_size <= 0.002 * without.file_size
    old, new = sorted(compare(sample_path(), [without.output_path, guarded.output_path], calibration_samples=8, device="cpu").reports, key=lambda r: r.quantized_model == "with.gguf")
    assert new.metrics.perplexity_quantized < 0.8 * old.metrics.perplexity_quantized
    assert guarded.protection["kld_with"] < 0.8 * guarded.protection["kld_without"] and guarded.protection["kld_difference"] < -5 * guarded.protection["kld_difference_se"]


def test_where_nothing_can_be_exchanged_a_column_is_rescaled(imatrix, tmp_path, monkeypatch):
    monkeypatch.setattr("llm_quantize.gguf.protection.exchange", lambda *args: {})
    guarded = quantize(sample_path(), "gguf", "IQ2_XXS", imatrix=imatrix, output_dir=tmp_path, protect_super_weights=True)
    found, [scaled] = guarded.protection, guarded.protection["rescaled"]
    factor, spec = scaled["up_row_times"], next(s for s in plan_gguf(Job(sample_path()), "IQ2_XXS").specs if s.name == DOWN)
    assert (scaled["tensor"], scaled["column"]) == (DOWN, 210) and factor in (0.5, 0.25, 0.125) and found["exchanged"] == []
    decoded = read(guarded.output_path)[DOWN][1]
    for w in found["weights"]:
        assert w["after"] == pytest.approx(float(decoded[w["row"], 210]) * factor, rel=1e-6) and w["pinned"]
        assert abs(float(decoded[w["row"], 210]) - w["original"] / factor) <= half_ulp(w["original"] / factor) and 0.98 <= w["activation_ratio"] <= 1.02
    assert spec.shape[-1] == 768 and guarded.file_size == found["size_unprotected"] and found["kld_difference"] < -2 * found["kld_difference_se"]


def test_llama_cpp_runs_the_file(pair):
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: make test installs it")
    model = open_llama(pair[1].output_path, n_ctx=64, n_threads=1)
    found = model("The history of", max_tokens=8, temperature=0.0)
    assert len(found["choices"][0]["text"]) > 3


def test_with_error_feedback(imatrix, tmp_path):
    fed, both = (quantize(sample_path(), "gguf", "IQ2_XXS", imatrix=imatrix, output_dir=tmp_path, output_name=name, error_feedback=True, effort="quick", protect_super_weights=name == "both") for name in ("fed", "both"))
    assert 0 <= fed.file_size - both.file_size <= 0.002 * fed.file_size
    assert both.error_feedback["tensors"] > 20 and both.protection["kld_without"] is None
    decoded, scale = read(both.output_path)[DOWN][1], {(r["tensor"], r["column"]): r["up_row_times"] for r in both.protection["rescaled"]}
    for w in both.protection["weights"]: assert w["after"] == pytest.approx(float(decoded[w["row"], w["column"]]) * scale.get((DOWN, w["column"]), 1.0), rel=1e-6)
    pinned = [w for w in both.protection["weights"] if w["pinned"]]
    assert pinned and all(abs(w["activation_ratio"] - 1) < 0.02 for w in both.protection["weights"])
    for w in pinned: assert abs(w["after"] - w["original"]) <= half_ulp(w["original"]) * 1.0001
    reports = compare(sample_path(), [fed.output_path, both.output_path], calibration_samples=8, device="cpu").reports
    klds = {r.quantized_model: r.metrics.kld_mean for r in reports}
    assert klds["both.gguf"] < 0.9 * klds["fed.gguf"]


def test_dynamic_keeps_its_types(imatrix, tmp_path):
    plain, guarded = (quantize(sample_path(), "gguf", "dynamic", imatrix=imatrix, target_size=0.0016, effort="quick", output_dir=tmp_path, output_name=name, protect_super_weights=name == "with") for name in ("without", "with"))
    assert plain.file_size == guarded.file_size and [t["type"] for t in plain.tensors] == [t["type"] for t in guarded.tensors]
    assert guarded.protection["exchanged"] == [] and all(w["pinned"] for w in guarded.protection["weights"])
    assert guarded.protection["kld_with"] < guarded.protection["kld_without"] + 2 * guarded.protection["kld_difference_se"]

# ---- nothing to protect, and the command ---------------------------------------------------------------------------------------------------------

def test_none_found(imatrix, tmp_path, caplog):
    nothing = replace(imatrix, notes={**imatrix.notes, "llm_quantize.calibration.super_weights": []})
    with caplog.at_level(logging.INFO, "llm_quantize"):
        plain, guarded = (quantize(sample_path(), "gguf", "Q2_K", imatrix=nothing, output_dir=tmp_path, output_name=name, protect_super_weights=name == "with") for name in ("without", "with"))
    assert "none found in sample-4m, nothing to protect" in caplog.text
    assert Path(plain.output_path).read_bytes() == Path(guarded.output_path).read_bytes()
    assert guarded.protection["identified"] == 0 and not any(s["is_protected"] for s in guarded.layer_summary())


def test_the_command_computes_an_imatrix_and_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LLM_QUANTIZE_IMATRIX_CACHE", str(tmp_path / "cache"))
    assert main(["--format", "json", "quantize", str(sample_path()), "gguf", "-q", "iq2_xxs", "-o", str(tmp_path), "--calibration-samples", "16", "--protect-super-weights", "--protection-coverage", "0.001"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert "--protect-super-weights needs an importance matrix, and none was given" in err and "computing it from 16 windows" in err
    assert found["imatrix"] == "computed" and found["protection"]["coverage"] == 0.001 and found["protection"]["raised_weights"] > 0
    assert {s["layer_name"] for s in found["layer_summary"] if s["is_protected"]} == {"blk.0"}


def test_the_command_shows_each_super_weight(tmp_path, capsys, imatrix):
    matrix = tmp_path / "own.imatrix"
    imatrix.save(matrix)
    assert main(["quantize", str(sample_path()), "gguf", "-q", "Q4_K_M", "-o", str(tmp_path), "--imatrix", str(matrix), "--protect-super-weights"]) == 0
    out, err = capsys.readouterr()
    assert "4 super weights in blk.0" in out and out.count("pinned") == 4 and "none was given" not in err and "computing it" not in err


def test_a_coverage_that_is_no_share(imatrix, tmp_path):
    with pytest.raises(ArgumentError, match="protection-coverage"): quantize(sample_path(), "gguf", "Q2_K", imatrix=imatrix, output_dir=tmp_path, protect_super_weights=True, protection_coverage=2.0)
    assert not list(tmp_path.iterdir())
