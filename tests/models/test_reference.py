"Weights and module that do not fit each other are named, from a directory and from a dictionary."
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize.models.checkpoint import open_checkpoint, sample_path
from llm_quantize.errors import ConversionError
from llm_quantize.models.reference import float_module, load_float
from llm_quantize.models.views import Kept, Replaced

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def weights(): return load_file(sample_path() / "model.safetensors")


def test_a_tensor_of_another_shape_is_named_with_both_shapes(weights):
    "transformers would raise a RuntimeError that refers to a report above, which is silenced."
    weights[NAME] = weights[NAME][:100]
    with pytest.raises(ConversionError, match=r"up_proj.weight of shape \(100, 256\) instead of \(768, 256\)"): float_module(open_checkpoint(sample_path()), torch.float32, "cpu", weights)


def test_so_is_one_in_a_directory(weights, tmp_path):
    shutil.copytree(sample_path(), tmp_path / "m")
    save_file({**weights, NAME: weights[NAME][:, :128].contiguous()}, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConversionError, match=r"\(768, 128\) instead of \(768, 256\)"): load_float(tmp_path / "m")


def test_so_is_a_setting_that_does_not_fit(weights):
    with pytest.raises(ConversionError, match="instead of"): float_module(open_checkpoint(sample_path()), torch.float32, "cpu", weights, hidden_size=128, head_dim=64)


def test_directory_and_dictionary_are_one_model(weights):
    ours, theirs = float_module(open_checkpoint(sample_path()), torch.float32, "cpu", weights), load_float(sample_path())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert {p.dtype for p in ours.parameters()} == {torch.float32} and not ours.training


def test_a_view_of_a_checkpoint_is_not_read_from_its_directory(weights):
    checkpoint = open_checkpoint(sample_path())
    changed = load_float(Replaced(checkpoint, {NAME: torch.zeros(768, 256)}))
    assert not changed.get_parameter(NAME).any() and load_float(Kept(checkpoint)).get_parameter(NAME).any()
