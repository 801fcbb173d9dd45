"Pinned weights are exact where that is said, raised weights come out better, and no other block changes."
import gguf
import numpy as np
import pytest
import torch

from llm_quantize.gguf.pinning import half_ulp, pin, raise_weights
from llm_quantize.models.checkpoint import sample_path
from llm_quantize.models.job import Job
from llm_quantize.quants.codec import decode, encode

DOWN, PLACES = "blk.0.ffn_down.weight", [(12, 210), (3, 210), (156, 210), (174, 210)]


@pytest.fixture(scope="module")
def down(imatrix):
    "Weights of the tensor with the super weights, and the importance of its columns."
    job = Job(sample_path())
    return job.tensors[DOWN].load(job.checkpoint).float(), imatrix.importance(DOWN)


@pytest.mark.parametrize("type", ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_1", "Q8_0"])
def test_a_pinned_weight_decodes_to_one_place_of_f16(type, down):
    weights, importance = down
    data = encode(weights, type, importance)
    before, decoded = data.clone(), decode(data, type)
    assert all(pin(data, type, weights, *place, importance) for place in PLACES)
    theirs = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[type])
    for place in PLACES: assert abs(theirs[place] - weights[place].item()) <= half_ulp(weights[place].item())
    other = (data != before).any(1)
    other[[row for row, _ in PLACES]] = False
    assert not other.any()
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]][0]
    moved = (decode(data, type) != decoded).view(len(weights), -1, size).any(-1)
    assert not moved[:, torch.arange(moved.shape[1]) != 210 // size].any()


def test_f16_places():
    for value in (1.0, 0.59, -0.3105, 3e-5, 65000.0, -2e-7):
        near = np.float16(value)
        assert half_ulp(float(near)) == pytest.approx(float(np.spacing(np.abs(near))))


def test_a_scale_that_would_move_far_is_left_alone(down):
    weights, importance = down
    data = encode(weights, "IQ2_XXS", importance)
    other, before = weights.clone(), data.clone()
    other[12, 210] *= 1.2
    assert not pin(data, "IQ2_XXS", other, 12, 210, importance) and torch.equal(data, before)
    flat = weights.clone()
    flat[12, 210] *= 1.025    # within reach, but the block pays: its other weights count too
    even = torch.ones_like(importance)
    sharp = encode(weights, "Q8_0", even)
    before = sharp.clone()
    assert not pin(sharp, "Q8_0", flat, 12, 210, even * 1e-9 + torch.nn.functional.one_hot(torch.tensor(211), 768)) and torch.equal(sharp, before)


def test_raised_weights_come_out_better(down):
    weights, importance = down
    mask = torch.zeros_like(weights, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    mask.view(-1)[torch.randperm(weights.numel(), generator=generator)[:200]] = True
    for type in ("IQ1_S", "Q2_K", "Q4_0"):
        data = encode(weights, type, importance)
        new = data.clone()
        assert raise_weights(new, type, weights, mask, importance, 30.0) == 200
        error = lambda d: ((decode(d, type) - weights)[mask].square()).sum().item()
        assert error(new) < 0.97 * error(data)
        size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]][0]
        untouched = ~mask.view(-1, size).any(1)
        assert torch.equal(new.view(len(untouched), -1)[untouched], data.view(len(untouched), -1)[untouched])
