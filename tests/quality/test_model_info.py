"What a model is, of GGUF files that this package did not write."
import numpy as np
import pytest
import torch

from llm_quantize.errors import ConversionError, ModelNotFoundError
from llm_quantize.gguf.container import write_gguf
from llm_quantize.quality.model_info import info

METADATA = {"general.architecture": "llama", "llama.block_count": 2, "llama.embedding_length": 32, "llama.context_length": 64, "llama.attention.head_count": 4}


def written(path, metadata, name="token_embd.weight"):
    write_gguf(path, metadata, [(name, (8, 32), "F32")], lambda i: torch.zeros(1024, dtype=torch.uint8))
    return path


def test_layers_may_differ_in_their_heads(tmp_path):
    found = info(written(tmp_path / "a.gguf", METADATA | {"llama.attention.head_count": np.array([4, 8], np.int32), "llama.attention.head_count_kv": np.array([0, 2], np.int32)}))
    assert (found.heads, found.kv_heads, found.vocabulary) == (8, 2, 8) and type(found.heads) is type(found.kv_heads) is int


@pytest.mark.parametrize("metadata, name, missing", [
    ({"general.architecture": "clip"}, "v.patch_embd.weight", "token_embd.weight"),
    ({"general.architecture": "clip"}, "token_embd.weight", "clip.attention.head_count"),
    ({"general.name": "nothing"}, "token_embd.weight", "general.architecture"),
], ids=["no embedding", "no heads", "no architecture"])
def test_a_gguf_that_is_no_language_model_is_named_as_such(tmp_path, metadata, name, missing):
    with pytest.raises(ConversionError, match=f"a.gguf is no language model: it has no {missing}"): info(written(tmp_path / "a.gguf", metadata, name))


def test_a_missing_file_is_not_called_a_directory(tmp_path):
    with pytest.raises(ModelNotFoundError, match="there is no file .*none.gguf"): info(tmp_path / "none.gguf")
