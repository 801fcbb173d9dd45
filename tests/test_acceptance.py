"After quantize: thresholds, exit codes, suggestions that are measured; and validation."
import json
import re
from pathlib import Path

import numpy as np
import pytest

from llm_quantize.gguf import container as gguf_model
from llm_quantize.models.checkpoint import open_checkpoint
from llm_quantize.cli.main import main
from llm_quantize.errors import ArgumentError, CoherenceError, QualityDegradationError, ValidationError
from llm_quantize.gguf.reader import open_gguf
from llm_quantize.acceptance import judge, prepare
from llm_quantize.quality.validation import validate
from llm_quantize.quality.evaluate import quality_report
from llm_quantize.gguf.verify import check_tensors
from llm_quantize.api import quantize

QUICK = {"calibration_samples": 8}


@pytest.fixture(scope="module")
def checkpoint(sample_model): return open_checkpoint(sample_model)


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_thresholds_come_from_the_environment(monkeypatch):
    assert (prepare(True, True).growth, prepare(True, True).coherence) == (20, 0.5) and prepare(False, False) is None
    monkeypatch.setenv("LLM_QUANTIZE_QUALITY_THRESHOLD", "3.5")
    assert prepare(True, False).growth == 3.5 and prepare(True, False).coherence is None
    for bad in ("x", "nan", "-1"):
        monkeypatch.setenv("LLM_QUANTIZE_QUALITY_THRESHOLD", bad)
        with pytest.raises(ArgumentError, match="LLM_QUANTIZE_QUALITY_THRESHOLD"): prepare(True, False)
    with pytest.raises(ArgumentError, match="coherence"): prepare(False, False, "prompts.txt")


def test_a_good_file_gets_its_report(checkpoint, tmp_path):
    result = judge(quantize(checkpoint, "gguf", "Q8_0", output_dir=tmp_path), checkpoint, prepare(True, True), make=quantize, device="cpu")
    report = json.loads(json.dumps(result.to_dict()))["quality_report"]
    assert report["coherence_score"] > 0.95 and abs(report["metrics"]["perplexity_delta_pct"]) < 1 and report["coherence"]["texts"]


def test_a_missed_threshold_names_what_was_measured(checkpoint, tmp_path, monkeypatch):
    "The suggested type is made again and measured here: it meets the threshold, at the size that was said."
    result = quantize(checkpoint, "gguf", "Q2_K", output_dir=tmp_path)
    with pytest.raises(QualityDegradationError) as caught: judge(result, checkpoint, prepare(True, False), options=QUICK, make=quantize, device="cpu")
    error = caught.value
    assert "complete and stays" in error.message and Path(result.output_path).exists() and [p.name for p in tmp_path.iterdir()] == ["sample-4m-Q2_K.gguf"]
    level, size = re.search(r"-q (\S+) meets the threshold: \+[\d.]+ % at ([\d.]+MB)", error.suggestion).groups()
    again = quantize(checkpoint, "gguf", level, output_dir=tmp_path, **QUICK)
    assert f"{again.file_size / 1e6:.1f}MB" == size and quality_report(checkpoint, again.output_path, calibration_samples=32).metrics.perplexity_delta_pct <= 20
    named = re.findall(r"(blk\.\d+\.\w+\.weight) \((\w+); with", error.suggestion)
    assert named and all(open_gguf(result.output_path).tensors[name][0] == type for name, type in named)
    falls = [(float(a), float(b)) for a, b in re.findall(r"falls from ([\d.]+) to ([\d.]+)", error.suggestion)]
    assert all(b < a for a, b in falls) and [b for _, b in falls] == sorted(b for _, b in falls)
    assert error.to_dict()["quality_report"]["metrics"]["perplexity_delta_pct"] > 20 and error.to_dict()["error_code"] == 11
    monkeypatch.setenv("LLM_QUANTIZE_QUALITY_THRESHOLD", "3000")
    assert judge(result, checkpoint, prepare(True, False), make=quantize, device="cpu").quality_report["metrics"]["kld_mean"] > 0.1


def test_an_int8_directory_is_told_what_else_was_tried(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_QUANTIZE_QUALITY_THRESHOLD", "0.05")
    result = quantize(checkpoint, "smoothquant", smoothquant=True, alpha=0.9, output_dir=tmp_path, **QUICK)
    with pytest.raises(QualityDegradationError) as caught: judge(result, checkpoint, prepare(True, False), options=QUICK, make=quantize, device="cpu")
    loudest = max(result.pairs, key=lambda p: p["error"])
    assert f"{loudest['pair'].split(' -> ')[-1]} of layer {loudest['layer']}" in caught.value.suggestion
    assert re.search(r"--smoothquant --alpha auto gives \+[\d.]+ % at 5.3MB", caught.value.suggestion) and [p.name for p in tmp_path.iterdir()] == [Path(result.output_path).name]
    monkeypatch.setenv("LLM_QUANTIZE_QUALITY_THRESHOLD", "5")
    assert judge(result, checkpoint, prepare(True, False), make=quantize, device="cpu").quality_report["metrics"]["kld_mean"] < 0.02


def test_exits_of_the_command(capsys, sample_model, tmp_path, monkeypatch):
    arguments = ("quantize", sample_model, "gguf", "-o", tmp_path, "--format", "json", "--calibration-samples", "8")
    monkeypatch.setenv("LLM_QUANTIZE_COHERENCE_THRESHOLD", "0.99999")
    monkeypatch.setenv("LLM_QUANTIZE_QUALITY_THRESHOLD", "0.01")
    code, out, _ = run(capsys, *arguments, "-q", "Q6_K", "--coherence-check")
    told = json.loads(out)
    assert code == 12 == told["error_code"] and told["error_type"] == "CoherenceError" and "-q Q8_0 gives a score of" in told["suggestion"] and Path(told["output_path"]).exists()
    code, out, _ = run(capsys, *arguments, "-q", "Q6_K", "--quality-report")
    assert code == 11 and json.loads(out)["error_type"] == "QualityDegradationError" and len(out.strip().splitlines()) == 1
    monkeypatch.setenv("LLM_QUANTIZE_QUALITY_THRESHOLD", "20")
    code, out, _ = run(capsys, *arguments, "-q", "Q6_K", "--quality-report")
    assert code == 0 and json.loads(out)["quality_report"]["metrics"]["perplexity_delta_pct"] < 5
    monkeypatch.setenv("LLM_QUANTIZE_QUALITY_THRESHOLD", "much")
    before = sorted(tmp_path.iterdir())
    assert run(capsys, *arguments, "-q", "Q5_0", "--quality-report")[0] == 2 and sorted(tmp_path.iterdir()) == before, "refused before the work"
    assert CoherenceError.exit_code == 12


# ---- validation --------------------------------------------------------------------------------------------

def damage(path, tensor, at, data, target):
    "A copy of a file with some bytes of a tensor overwritten."
    _, offset, size = open_gguf(path).places[tensor]
    content = bytearray(Path(path).read_bytes())
    start = offset + (at if at >= 0 else size + at)
    content[start:start + len(data)] = data
    target.write_bytes(content)
    return target


@pytest.mark.parametrize("value, needs_original, words", [(np.nan, False, "does not decode to numbers"), (np.inf, False, "does not decode to numbers"), (60000.0, True, "is not what it was made from")])
def test_a_damaged_scale_is_found(value, needs_original, words, checkpoint, tmp_path):
    path = quantize(checkpoint, "gguf", "Q8_0", output_dir=tmp_path).output_path
    bad = damage(path, "blk.3.attn_v.weight", -34, np.float16(value).tobytes(), tmp_path / "bad.gguf")
    with pytest.raises(ValidationError, match=f"blk.3.attn_v.weight.*{words}"): validate(bad, checkpoint if needs_original else None)
    assert validate(path).validation_status == "passed"


def test_a_file_that_holds_other_bytes_than_were_produced(checkpoint, tmp_path, monkeypatch):
    "One flipped bit between the encoder and the disk, which no decoder would notice."
    result = quantize(checkpoint, "gguf", "Q4_K_M", output_dir=tmp_path)
    meant = {t["name"]: t["checksum"] for t in result.tensors}
    check_tensors(open_gguf(result.output_path), meant)
    _, offset, _ = open_gguf(result.output_path).places["blk.0.ffn_up.weight"]
    flipped = bytes([Path(result.output_path).read_bytes()[offset + 50] ^ 1])
    bad = damage(result.output_path, "blk.0.ffn_up.weight", 50, flipped, tmp_path / "bad.gguf")
    check_tensors(open_gguf(bad))
    with pytest.raises(ValidationError, match="blk.0.ffn_up.weight of bad.gguf holds other bytes"): check_tensors(open_gguf(bad), meant)
    store = gguf_model._store
    monkeypatch.setattr(gguf_model, "_store", lambda file, data, path: store(file, bytes(len(data)) if len(data) == 110592 else data, path))
    with pytest.raises(ValidationError, match="holds other bytes"): quantize(checkpoint, "gguf", "Q4_K_M", output_dir=tmp_path, output_name="zeros")


def test_validate_from_the_command_line(capsys, sample_model, checkpoint, tmp_path):
    path = quantize(checkpoint, "gguf", "Q4_K_M", output_dir=tmp_path).output_path
    code, out, _ = run(capsys, "validate", path, "--original", sample_model, "--format", "json")
    told = json.loads(out)
    assert code == 0 and told["validation_status"] == "passed" and told["tensors"] == 38 and told["largest_error"]["relative_error"] < 0.01
    bad = damage(path, "blk.1.ffn_down.weight", 0, np.float16(np.nan).tobytes(), tmp_path / "bad.gguf")
    code, out, _ = run(capsys, "validate", bad, "--format", "json")
    assert code == 6 and "blk.1.ffn_down.weight" in json.loads(out)["message"]
    assert run(capsys, "validate", sample_model)[0] == 2
    code, out, _ = run(capsys, "validate", sample_model, "--original", sample_model, "--format", "json")
    assert code == 0 and json.loads(out)["compared"]
