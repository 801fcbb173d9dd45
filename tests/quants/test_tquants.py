"The ternary types: layouts against the gguf package, the search against every possible split."
import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llm_quantize.quants.blocks import ENCODERS, decode_blocks, encode_blocks, to_half
from llm_quantize.errors import ValidationError
from llm_quantize.quants.qtypes import QTYPES
from llm_quantize.quants.tquants import ternary_share, threshold_scale

T_TYPES = ["TQ1_0", "TQ2_0"]


def read(name, data):
    "What the gguf package makes of the bytes."
    return torch.from_numpy(gguf.quants.dequantize(np.ascontiguousarray(data), gguf.GGMLQuantizationType[name]).copy())


def trained(rows=20, columns=768, seed=0):
    "Weights that are ternary, each block with a scale of its own."
    generator = torch.Generator().manual_seed(seed)
    scale = (torch.rand(rows, columns // 256, generator=generator) * 0.1 + 1e-3).half().float().repeat_interleave(256, 1)
    return torch.randint(-1, 2, (rows, columns), generator=generator) * scale


@pytest.mark.parametrize("name", T_TYPES)
def test_decodes_random_bytes_as_gguf_does(name):
    data = np.random.default_rng(0).integers(0, 256, (200, QTYPES[name].block_bytes), dtype=np.uint8)
    data[:, -1] &= 0xBB                                     # a finite f16
    ours, theirs = decode_blocks(name, torch.from_numpy(data)), read(name, data)
    assert torch.equal(ours, theirs)
    data[3, 40] ^= 0x3C
    assert not torch.equal(decode_blocks(name, torch.from_numpy(data)), theirs)


@pytest.mark.parametrize("name", T_TYPES)
def test_packs_what_it_unpacked_and_what_gguf_packs(name):
    x = trained()
    theirs = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType[name])
    data = torch.from_numpy(theirs.reshape(-1, QTYPES[name].block_bytes)).T.contiguous()
    assert torch.equal(ENCODERS[name].pack(*ENCODERS[name].unpack(data)), data)
    assert torch.equal(encode_blocks(name, x), torch.from_numpy(theirs))


@pytest.mark.parametrize("name", T_TYPES)
def test_ternary_weights_lose_nothing(name):
    x = trained()
    for importance in (None, torch.rand(768), torch.zeros(768)):
        assert torch.equal(decode_blocks(name, encode_blocks(name, x, importance)), x)
    x[0, 0] = 0.5 * x[0, :256].abs().max()                 # one block that is not ternary leaves the others alone
    y = decode_blocks(name, encode_blocks(name, x, torch.rand(768)))
    assert torch.equal(y[1:], x[1:]) and torch.equal(y[0, 256:], x[0, 256:]) and not torch.equal(y, x)


def test_no_split_is_better():
    seed = torch.Generator().manual_seed(1)
    x, w = torch.randn(1, 256, 40, generator=seed), torch.randn(1, 256, 40, generator=seed).exp()
    d = threshold_scale(x, w)["d"]
    def error(d): return (w * (x - d * (x / d).round().clamp(-1, 1)).square()).sum((0, 1))
    fine = torch.linspace(0.1, 4.0, 1500)
    best = torch.stack([error(v) for v in fine]).amin(0)
    assert (error(d) <= best * 1.0001).all()
    assert (error(d * 1.1) > error(d)).all()


@pytest.mark.parametrize("name", T_TYPES)
@pytest.mark.parametrize("case", ["zero", "one", "constant", "tiny", "huge", "spike"])
def test_odd_blocks(name, case):
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(3))
    if case == "zero": x = torch.zeros(4, 512)
    elif case == "one": x = torch.zeros(4, 512); x[2, 300] = 1.5
    elif case == "constant": x = torch.full((4, 512), -0.125)
    elif case == "tiny": x = x * 1e-30
    elif case == "huge": x = x * 1e30
    elif case == "spike": x[:, 7] = 1e4
    y = decode_blocks(name, encode_blocks(name, x))
    assert torch.isfinite(y).all()
    if case in ("zero", "one", "constant"): assert torch.equal(y, x)
    if case == "spike": assert (y[:, 7] == 1e4).all()


@pytest.mark.parametrize("name", T_TYPES)
def test_nothing_that_is_no_number_is_written(name):
    x = torch.zeros(3, 256); x[1, 17] = float("nan")
    with pytest.raises(ValidationError): encode_blocks(name, x)


def test_share_of_ternary_blocks():
    x = trained(4, 1024)
    assert ternary_share(x) == 1.0
    x[0, 5] = 0.5; x[0, 6] = 0.25
    assert ternary_share(x) == 15 / 16
    assert ternary_share(torch.zeros(1, 256)) == 1.0


@pytest.mark.shared
def test_a_model_trained_in_ternary_comes_back(shared_model):
    "Every weight of the linear layers, to the rounding of its scale to f16."
    tensors = load_file(next(shared_model("trilm-27m").glob("*.safetensors")))
    checked = 0
    for name, x in tensors.items():
        if "proj" not in name: continue
        x = x.float()
        assert ternary_share(x) == 1.0, name
        for kind in T_TYPES: assert torch.equal(decode_blocks(kind, encode_blocks(kind, x)), to_half(x)), name
        checked += x.numel()
    assert checked > 1_000_000
