"llama.cpp opened in one place, and run in a process of its own, whose crash is an error message."
import json
import os
import signal

import numpy as np
import pytest

from llm_quantize.api import quantize
from llm_quantize.cli.main import main
from llm_quantize.errors import ArgumentError, LLMQuantizeError, ModelNotFoundError, ValidationError
from llm_quantize.quality.llama_cpp_model import LlamaCppModel, check_loads, open_llama
from llm_quantize.quality.validation import validate

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: make test installs it")

# A package of the same name before the real one. It dies as llama.cpp does on processors with AMX: when two tokens are decoded together.
DYING = """
import os, signal, sys
sys.path.remove(os.path.dirname(os.path.dirname(__file__)))
del sys.modules["llama_cpp"]
import llama_cpp
real = llama_cpp.llama_decode
def llama_decode(context, batch):
    if batch.n_tokens > 1: os.kill(os.getpid(), signal.SIGSEGV)
    return real(context, batch)
llama_cpp.llama_decode = llama_decode
"""


@pytest.fixture(scope="module")
def path(sample_model, tmp_path_factory):
    return quantize(sample_model, "gguf", "Q4_K_M", output_dir=tmp_path_factory.mktemp("gguf")).output_path


@pytest.fixture
def dying(tmp_path, monkeypatch):
    (tmp_path / "fake" / "llama_cpp").mkdir(parents=True)
    (tmp_path / "fake" / "llama_cpp" / "__init__.py").write_text(DYING)
    monkeypatch.syspath_prepend(tmp_path / "fake")


@pytest.fixture(scope="module")
def fatal(path, tmp_path_factory):
    "A file that says it has no blocks: an assertion of llama.cpp fails, which ends the process."
    before, after = (b"llama.block_count\4\0\0\0" + bytes([count]) for count in (4, 0))
    whole = open(path, "rb").read()
    assert before in whole
    file = tmp_path_factory.mktemp("fatal") / "fatal.gguf"
    file.write_bytes(whole.replace(before, after))
    return file


def test_weights_stay_as_they_lie_in_the_file(path):
    import llama_cpp
    llama = open_llama(path, n_ctx=32, n_batch=32, n_threads=1, logits_all=True)
    assert isinstance(llama, llama_cpp.Llama)
    assert not llama.model_params.use_extra_bufts
    assert llama_cpp.llama_model_default_params().use_extra_bufts, "the default of others is as it was"
    llama.eval([1, 2, 3])
    assert llama.n_tokens == 3
    llama.close()


def test_a_file_that_llama_cpp_refuses(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="bad.gguf"): open_llama(tmp_path / "bad.gguf")
    with pytest.raises(ValidationError, match="does not load bad.gguf: .*GGUF|gguf"): check_loads(tmp_path / "bad.gguf")
    with pytest.raises(ModelNotFoundError, match="no file"): check_loads(tmp_path / "nowhere.gguf")


def test_the_child_answers_what_llama_answers_here(path):
    "The same logits as in this process, window after window, and only of the places asked for."
    llama = open_llama(path, n_ctx=16, n_batch=16, n_threads=1, logits_all=True, type_k=0, type_v=0, flash_attn=True)
    with LlamaCppModel(path, size=16, threads=1) as model:
        for tokens in ([5, 6, 7, 8, 9, 10], [11, 12]):
            llama.reset()
            llama.eval(tokens)
            expected = np.array(llama.scores[:len(tokens)])
            found = model.logits(tokens, range(1, len(tokens)))
            assert found.shape == expected[1:].shape and np.abs(found).max() > 1
            assert np.abs(found - expected[1:]).max() < 1e-4
        ids = np.array([[5, 6, 7, 8, 9, 10, 11, 12], [9, 8, 7, 6, 5, 4, 3, 2]])
        scored = model.scored_logits(ids)
        assert scored.shape == (2 * 3, 4096)
        assert np.array_equal(scored[3:], model.logits(ids[1].tolist(), range(4, 7)))
    llama.close()


def test_the_child_ends_when_its_model_is_closed(path):
    model = LlamaCppModel(path, size=16, threads=1)
    process = model._child.process
    assert process.poll() is None
    model.close()
    assert process.returncode == 0
    model.close()


def test_too_long_a_window_is_refused(path):
    with LlamaCppModel(path, size=4, threads=1) as model:
        with pytest.raises(ArgumentError, match="5 tokens.*4"): model.logits([3, 4, 5, 6, 7], range(1))
        assert model.logits([3, 4, 5, 6], range(1)).shape == (1, 4096), "and the child goes on"


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_a_crash_is_one_line_and_exit_code_1(dying, path, sample_model, capsys):
    arguments = ["quality", "report", str(sample_model), path, "--backend", "llama.cpp", "--calibration-samples", "1"]
    assert main(arguments) == 1
    assert "llama.cpp crashed on sample-4m-Q4_K_M.gguf (signal 11)" in capsys.readouterr().err
    assert main(["--format", "json", *arguments]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["error_code"], told["error_type"]) == (1, "LLMQuantizeError")
    assert told["message"] == f"llama.cpp crashed on sample-4m-Q4_K_M.gguf (signal {int(signal.SIGSEGV)})"
    assert "llama-cpp-python" in told["suggestion"]


def test_validation_decodes_more_than_one_token(dying, path):
    "With one token the fake llama.cpp works."
    with LlamaCppModel(path, size=8, threads=1) as model: assert model.logits([3], range(1)).shape == (1, 4096)
    with pytest.raises(LLMQuantizeError, match="crashed on sample-4m-Q4_K_M.gguf"): validate(path, backend="llama.cpp")


def test_a_sound_file_loads(path):
    assert validate(path, backend="llama.cpp").loads


def test_llama_cpps_own_words_are_told(fatal):
    with pytest.raises(LLMQuantizeError, match=r"crashed on fatal.gguf \(signal 6\): GGML_ASSERT\(.*\) failed") as caught:
        check_loads(fatal)
    assert caught.value.exit_code == 1 and "\n" not in caught.value.message
