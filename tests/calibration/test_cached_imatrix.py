"""The importance matrix that is computed when a type needs one: announced, cached, made again when damaged, taken up after a kill."""
import json
import logging
import subprocess
import sys

import pytest
import torch

from llm_quantize.models.job import Job
from llm_quantize.calibration.analysis import cached_imatrix, imatrix_cache
from llm_quantize.models.checkpoint import sample_path, write_sample
from llm_quantize.cli.main import main
from llm_quantize.errors import CalibrationError, ImatrixError, LLMQuantizeError
from llm_quantize.calibration.imatrix import ImportanceMatrix
from llm_quantize.quants.qtypes import QTYPES
from llm_quantize.gguf.plan import plan_gguf
from llm_quantize.api import analyze, quantize


@pytest.fixture(autouse=True)
def listened_to():
    "The library's logger as a program finds it that has not called the command."
    logger = logging.getLogger("llm_quantize")
    kept = logger.handlers, logger.propagate, logger.level
    logger.handlers, logger.propagate = [], True
    yield
    logger.handlers, logger.propagate, _ = kept
    logger.setLevel(kept[2])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    "A cache of the test's own."
    monkeypatch.setenv("LLM_QUANTIZE_IMATRIX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files(cache): return sorted(p.name for p in cache.glob("*.imatrix"))


def equal(a, b): return a.names == b.names and all(torch.equal(a.importance(n), b.importance(n)) for n in a.names)


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert imatrix_cache() == tmp_path / "cache"
    monkeypatch.delenv("LLM_QUANTIZE_IMATRIX_CACHE")
    monkeypatch.setenv("LLM_QUANTIZE_CACHE", str(tmp_path / "all"))
    assert imatrix_cache() == tmp_path / "all" / "imatrix"
    monkeypatch.delenv("LLM_QUANTIZE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert imatrix_cache() == tmp_path / ".cache" / "llm-quantize" / "imatrix"


def test_it_is_what_analyze_computes_and_is_computed_once(cache, tmp_path, caplog):
    caplog.set_level("INFO", "llm_quantize")
    first = cached_imatrix(Job(sample_path(), device="cpu"), calibration_samples=3)
    assert "computing" in caplog.text and len(files(cache)) == 1
    analyze(sample_path(), output=tmp_path / "own.imatrix", calibration_samples=3, device="cpu", checkpoint_dir=tmp_path / "state")
    assert equal(first, ImportanceMatrix.load(tmp_path / "own.imatrix")) and (cache / files(cache)[0]).read_bytes() == (tmp_path / "own.imatrix").read_bytes()
    stamp = (cache / files(cache)[0]).stat().st_mtime_ns
    caplog.clear()
    again = cached_imatrix(Job(sample_path(), device="cpu"), calibration_samples=3)
    assert equal(first, again) and "taken from the cache" in caplog.text and "computing" not in caplog.text
    assert (cache / files(cache)[0]).stat().st_mtime_ns == stamp
    assert {p.suffix for p in cache.iterdir()} == {".imatrix", ".lock"}


def test_another_text_or_model_has_a_matrix_of_its_own(cache, tmp_path):
    text = tmp_path / "own.txt"
    text.write_text("The moon is a stone that shines. " * 500)
    own = write_sample(tmp_path / "sample-4m")
    cached_imatrix(Job(own, device="cpu"), calibration_samples=2)
    cached_imatrix(Job(own, device="cpu"), calibration_samples=3)
    cached_imatrix(Job(own, device="cpu"), calibration_samples=2, calibration_data=text)
    assert len(files(cache)) == 3
    weights = bytearray((own / "model.safetensors").read_bytes())
    weights[-1000] ^= 1
    (own / "model.safetensors").write_bytes(weights)
    cached_imatrix(Job(own, device="cpu"), calibration_samples=2)
    assert len(files(cache)) == 4
    text.write_text("The moon is a stone that shines, " * 500)
    cached_imatrix(Job(own, device="cpu"), calibration_samples=2, calibration_data=text)
    assert len(files(cache)) == 5


def damage_cut(path): path.write_bytes(path.read_bytes()[:2000])
def damage_empty(path): path.write_bytes(b"")
def damage_words(path): path.write_text("not a matrix")
def damage_other(path): ImportanceMatrix({"blk.0.attn_q.weight": torch.ones(1, 8).double()}, {"blk.0.attn_q.weight": torch.ones(1).double()}).save(path)


def test_a_damaged_file_is_made_again(cache, caplog):
    first = cached_imatrix(Job(sample_path(), device="cpu"), calibration_samples=2)
    path = cache / files(cache)[0]
    whole = path.read_bytes()
    caplog.set_level("INFO", "llm_quantize")
    for damage in (damage_cut, damage_empty, damage_words, damage_other):
        damage(path)
        caplog.clear()
        assert equal(first, cached_imatrix(Job(sample_path(), device="cpu"), calibration_samples=2))
        assert path.read_bytes() == whole and "again" in caplog.text, damage.__name__


def test_a_killed_run_is_taken_up(cache):
    "Killed in the middle; the next call goes on from the state and gives the same bytes."
    code = f"""
import os, signal
from llm_quantize.calibration.analysis import cached_imatrix
from llm_quantize.calibration.resume import RunState
from llm_quantize.models.job import Job
RunState.due = lambda self, place: True
def progress(done, total, speed): done >= 2 * 512 + 1 and os.kill(os.getpid(), signal.SIGKILL)
cached_imatrix(Job({str(sample_path())!r}, device="cpu", progress=progress), calibration_samples=4)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert not files(cache) and list(cache.glob("*.state/analyze.state"))
    seen = []
    cached_imatrix(Job(sample_path(), device="cpu", progress=lambda done, total, speed: seen.append(done)), calibration_samples=4)
    assert seen[0] > 512, "the first windows were not run again"
    resumed = (cache / files(cache)[0]).read_bytes()
    (cache / files(cache)[0]).unlink()
    cached_imatrix(Job(sample_path(), device="cpu"), calibration_samples=4)
    assert (cache / files(cache)[0]).read_bytes() == resumed and not list(cache.glob("*.state"))


def test_a_damaged_state_is_no_reason_to_fail(cache, caplog):
    first = cached_imatrix(Job(sample_path(), device="cpu"), calibration_samples=2)
    path = cache / files(cache)[0]
    path.unlink()
    path.with_suffix(".state").mkdir()
    (path.with_suffix(".state") / "analyze.state").write_bytes(b"no state")
    assert equal(first, cached_imatrix(Job(sample_path(), device="cpu"), calibration_samples=2)) and "from the beginning" in caplog.text


def test_two_at_once_compute_once(cache):
    code = f"""
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
from llm_quantize.calibration.analysis import cached_imatrix
from llm_quantize.models.job import Job
cached_imatrix(Job({str(sample_path())!r}, device="cpu"), calibration_samples=4)
"""
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate()[0] for p in both]
    assert sorted("computing it from" in text for text in said) == [False, True] and sum("waiting" in text for text in said) <= 1 and len(files(cache)) == 1


def test_without_a_place_for_the_cache(cache, caplog):
    cache.write_text("a file where the directory should be")
    matrix = cached_imatrix(Job(sample_path(), device="cpu"), calibration_samples=2)
    assert len(matrix.names) == 28 and "for this run only" in caplog.text


# --- in a quantization -----------------------------------------------------------------------------------------------------------------------

NEEDING = [name for name, t in QTYPES.items() if t.needs_imatrix] + ["Q2_K_S", "IQ2_M", "IQ3_XS"]


def test_what_needs_importance_is_planned_with_it():
    for level in NEEDING: assert plan_gguf(Job(sample_path()), level).lacks_imatrix, level
    for level in ("IQ3_S", "IQ3_M", "IQ4_XS", "IQ4_NL", "Q2_K", "Q3_K_S"): assert not plan_gguf(Job(sample_path()), level).lacks_imatrix, level


@pytest.mark.parametrize("level", ["IQ1_S", "IQ3_XXS", "Q2_K_S"])
def test_types_that_need_importance_get_it(cache, tmp_path, level, capsys):
    arguments = ["--format", "json", "quantize", str(sample_path()), "gguf", "-q", level, "-o", str(tmp_path), "--calibration-samples", "2"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["imatrix"] == "computed" and found["search"] == "fast" and "none was given" in printed.err and "computing it from 2 windows" in printed.err
    first = open(found["output_path"], "rb").read()
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "taken from the cache" in printed.err and open(found["output_path"], "rb").read() == first
    given = quantize(sample_path(), "gguf", level, output_dir=tmp_path, output_name="given", imatrix=cache / files(cache)[0], device="cpu")
    assert open(given.output_path, "rb").read() == first and given.imatrix == "given"


def test_the_text_is_the_users(cache, tmp_path):
    text = tmp_path / "own.txt"
    text.write_text("The moon is a stone that shines. " * 500)
    quantize(sample_path(), "gguf", "Q2_K_S", output_dir=tmp_path, calibration_data=text, calibration_samples=2, device="cpu")
    assert ImportanceMatrix.load(cache / files(cache)[0]).datasets == ("own.txt",)
    with pytest.raises(CalibrationError): quantize(sample_path(), "gguf", "Q2_K_S", output_dir=tmp_path / "no", calibration_data=tmp_path / "absent.txt")
    assert not (tmp_path / "no").exists()


def test_a_place_that_cannot_be_written_to_is_found_first(cache, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LLMQuantizeError, match="is a file"): quantize(sample_path(), "gguf", "Q2_K_S", output_dir=tmp_path / "file" / "out", device="cpu")
    assert not cache.exists()


def test_a_type_that_needs_none_computes_none(cache, tmp_path):
    result = quantize(sample_path(), "gguf", "Q4_K_M", output_dir=tmp_path, device="cpu")
    assert result.imatrix is None and not cache.exists() and not plan_gguf(Job(sample_path()), "Q4_K_M").lacks_imatrix


def test_the_dry_run_says_so_and_computes_nothing(cache, capsys):
    assert main(["quantize", str(sample_path()), "gguf", "-q", "Q2_K_S", "--dry-run"]) == 0
    assert "computed first" in capsys.readouterr().out and not cache.exists()
    assert main(["--format", "json", "quantize", str(sample_path()), "gguf", "-q", "Q2_K_S", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["lacks_imatrix"] is True


def test_a_matrix_without_an_entry_that_is_needed(tmp_path):
    whole = cached_imatrix(Job(sample_path(), device="cpu"), calibration_samples=2)
    gone = "blk.2.ffn_up.weight"
    part = ImportanceMatrix(*({k: v for k, v in d.items() if k != gone} for d in (whole.sums, whole.counts)))
    with pytest.raises(ImatrixError, match=gone) as caught: quantize(sample_path(), "gguf", "Q2_K_S", output_dir=tmp_path / "out", imatrix=part)
    assert caught.value.exit_code == 10 and not (tmp_path / "out").exists()
    assert quantize(sample_path(), "gguf", "Q4_0", output_dir=tmp_path, imatrix=part, device="cpu").validation_status == "passed", "where it is not needed it may be absent"
