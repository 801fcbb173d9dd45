"The files of a directory: whole, in shards, and with what may be missing or damaged."
import json

import pytest
import torch
from safetensors import safe_open

from llm_quantize.compressed.directory import DirectoryWriter, PlannedTensor, W8A8Model, is_int8_directory
from llm_quantize.errors import ConversionError, ValidationError
from tests.compressed.models import tiny

PLANNED = {"a": PlannedTensor(torch.int8, (2, 3)), "b": PlannedTensor(torch.float32, (2, 1))}
TENSORS = {"a": torch.arange(6).to(torch.int8).view(2, 3), "b": torch.tensor([[0.5], [-1.0]])}


@pytest.mark.parametrize("order", ["ab", "ba"])
@pytest.mark.parametrize("shard, files", [(1000, 1), (7, 2)], ids=["one file", "shards"])
def test_tensors_may_come_in_any_order(order, shard, files, tmp_path):
    writer = DirectoryWriter(tmp_path, PLANNED, shard)
    for name in order: writer.put(name, TENSORS[name])
    writer.finish()
    assert len(writer.files) == files
    for name, file in writer.index["weight_map"].items():
        with safe_open(tmp_path / file, "pt") as read:
            assert read.metadata() == {"format": "pt"}
            assert torch.equal(read.get_tensor(name), TENSORS[name])
    assert (tmp_path / "model.safetensors.index.json").exists() == (files > 1)


def test_wide_tensors_are_aligned(tmp_path):
    writer = DirectoryWriter(tmp_path, PLANNED)
    assert writer.places["b"][1] % 8 == 0 # after three times two bytes of `a` it would not be


@pytest.mark.parametrize("tensor", [torch.zeros(3, 2, dtype=torch.int8), torch.zeros(2, 3)], ids=["shape", "dtype"])
def test_the_writer_notices_another_tensor(tensor, tmp_path):
    with pytest.raises(ValidationError, match="planned"): DirectoryWriter(tmp_path, PLANNED).put("a", tensor)


def test_the_writer_notices_what_is_missing(tmp_path):
    writer = DirectoryWriter(tmp_path, PLANNED)
    writer.put("a", TENSORS["a"])
    with pytest.raises(ValidationError, match="never written, first: b"): writer.finish()


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"quantization_config": {"quant_method": "gptq"}}'])
def test_other_directories_are_not_int8(text, tmp_path):
    assert not is_int8_directory(tmp_path)
    (tmp_path / "config.json").write_text(text)
    assert not is_int8_directory(tmp_path)


@pytest.mark.parametrize("settings", [
    {"format": "pack-quantized"},
    {"format": "int-quantized", "config_groups": {"a": {"weights": {"num_bits": 4, "type": "int", "symmetric": True}}}},
    {"format": "int-quantized", "config_groups": {"a": {}, "b": {}}},
], ids=["format", "bits", "groups"])
def test_another_scheme_is_refused(settings, tmp_path):
    checkpoint = tiny("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(ConversionError, match="a kind that is not read here"): W8A8Model(checkpoint, tmp_path).check()
