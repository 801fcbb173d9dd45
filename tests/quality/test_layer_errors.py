"Errors of blocks, where one of a block's tensors is exact or nothing but zeros."
import pytest
import torch

from llm_quantize.quality.quantized_model import WeightPair
from llm_quantize.quality.layer_errors import _by_block, _weight_rows, weight_errors


class Model:
    def __init__(self, *pairs): self.given = pairs

    def pairs(self):
        for i, (original, decoded) in enumerate(self.given): yield WeightPair(f"blk.0.{i}.weight", "Q4_K", 4.5, original, decoded)


def block_error(*pairs):
    rows, energies = zip(*_weight_rows(Model(*pairs)))
    [block] = _by_block(rows, energies, {f"blk.0.{i}.weight": (0, str(i)) for i in range(len(pairs))}, {"output": None})
    return block["relative_error"]


def test_an_exact_tensor_counts_in_its_block():
    torch.manual_seed(0)
    originals = torch.randn(2, 4, 32)
    decoded = originals.clone()
    decoded[1] += 0.1
    assert block_error(*zip(originals, decoded)) == pytest.approx(((originals - decoded).square().sum() / originals.square().sum()).item(), rel=1e-5)


@pytest.mark.parametrize("decoded, expected", [(0.0, 0.0), (1.0, 1.0)], ids=["kept", "not kept"])
def test_a_tensor_of_zeros(decoded, expected):
    pair = torch.zeros(2, 32), torch.full((2, 32), decoded)
    assert weight_errors(Model(pair))[0]["relative_error"] == block_error(pair) == expected
