"llama.cpp opened in one place, and run in a process of its own."
import pytest

from llm_quantize.api import quantize
from llm_quantize.quality.llama_cpp_model import open_llama

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: make test installs it")


@pytest.fixture(scope="module")
def path(sample_model, tmp_path_factory):
    return quantize(sample_model, "gguf", "Q4_K_M", output_dir=tmp_path_factory.mktemp("gguf")).output_path


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
