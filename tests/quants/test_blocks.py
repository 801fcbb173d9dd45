"What encoders share: levels, passes, stages, chunks; and the types with one scale for 32 weights."
import gguf
import numpy as np
import pytest
import torch

from llm_quantize.quants import blocks, legacy
from llm_quantize.quants.blocks import ENCODERS, Levels, decode_blocks, digits, encode_blocks, error_weighting, error_weights
from llm_quantize.quants.blocks import fit_errors, fit_sums, half_bytes, inverse, read_half, to_half
from llm_quantize.errors import ArgumentError, ValidationError
from llm_quantize.quants.qtypes import QTYPES

ROUND_TYPES = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL"]


def random_bytes(name, blocks_=300, seed=0):
    "Blocks of random bytes whose f16 scales are finite."
    data = np.random.default_rng(seed).integers(0, 256, (blocks_, QTYPES[name].block_bytes), dtype=np.uint8)
    for at in range(0, 4 if name.endswith("_1") else 2, 2): data[:, at + 1] &= 0xBB  # clears the top exponent bit
    return data


def read(name, data):
    "What the gguf package makes of the bytes."
    return torch.from_numpy(gguf.quants.dequantize(np.ascontiguousarray(data), gguf.GGMLQuantizationType[name]).copy())


@pytest.mark.parametrize("name", ROUND_TYPES)
def test_decodes_random_bytes_as_gguf_does(name):
    data = random_bytes(name)
    ours, theirs = decode_blocks(name, torch.from_numpy(data)), read(name, data)
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
    data[7, -1] ^= 0x11
    assert not torch.equal(decode_blocks(name, torch.from_numpy(data)), theirs)


@pytest.mark.parametrize("name", ROUND_TYPES)
def test_packs_what_it_unpacked(name):
    data = torch.from_numpy(random_bytes(name)).T.contiguous()
    if name == "Q8_0": data[2:][data[2:] == 128] = 1  # -128 is read but never written
    fields, codes = ENCODERS[name].unpack(data)
    assert torch.equal(ENCODERS[name].pack(fields, codes), data)


@pytest.mark.parametrize("name", ROUND_TYPES)
def test_codes_are_the_nearest_levels(name):
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    encoder = ENCODERS[name]
    fields, codes = encoder.unpack(encode_blocks(name, x).view(-1, QTYPES[name].block_bytes).T.contiguous())
    target = x.view(-1, 32).T.unsqueeze(0)
    best = (encoder.weights(fields, codes) - target).abs()
    for other in (codes - 1, codes + 1):
        inside = (other >= encoder.levels.lo) & (other <= encoder.levels.hi)
        shifted = (encoder.weights(fields, other.clamp(encoder.levels.lo, encoder.levels.hi)) - target).abs()
        assert (best[inside] <= shifted[inside] + 1e-6).all()


def test_the_iq4_table_is_the_package_s():
    assert legacy.IQ4_TABLE == tuple(gguf.quants.IQ4_NL.kvalues)


@pytest.mark.parametrize("levels", [Levels(-8, 7), Levels(0, 31), Levels(0, 15, legacy.IQ4_TABLE)], ids=["signed", "unsigned", "table"])
def test_rounding_takes_the_nearest_value(levels):
    v = torch.linspace(-150, 150, 6007)
    values = torch.tensor(levels.table or range(levels.lo, levels.hi + 1), dtype=torch.float32)
    best = (v.unsqueeze(-1) - values).abs().amin(-1)
    for rounded in (levels.round(v), levels.value(levels.nearest_code(v))):
        assert torch.isin(rounded, values).all()
        assert torch.allclose((v - rounded).abs(), best)


def test_passes_agree_with_a_plain_loop():
    seed = torch.Generator().manual_seed(2)
    x, w = torch.randn(32, 5, generator=seed), torch.rand(32, 5, generator=seed)
    step, offset = torch.rand(3, 5, generator=seed) + 0.1, torch.rand(3, 5, generator=seed)
    levels = Levels(0, 15)
    sums, errors = fit_sums(x, w, step, inverse(step), offset, levels), fit_errors(x, w, step, inverse(step), offset, levels)
    for k in range(3):
        q = ((x + offset[k]) / step[k]).round().clamp(0, 15)
        for ours, by_hand in zip((*(s[k] for s in sums), errors[k]), ((w * q).sum(0), (w * q * q).sum(0), (w * q * x).sum(0), (w * (x - step[k] * q + offset[k]) ** 2).sum(0))):
            assert torch.allclose(ours, by_hand, rtol=1e-4, atol=1e-5)


def test_halves():
    x = torch.tensor([0.1, -3.7e9, 1e-9, -1e-30, 0.0, 65504.0, 6e-8])
    assert torch.isfinite(to_half(x)).all() and ((to_half(x) == 0) == (x == 0)).all()
    assert torch.equal(read_half(half_bytes(to_half(x))), to_half(x))
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[torch.isfinite(every)].float()
    assert torch.equal(read_half(half_bytes(every)), every)


def test_digits():
    codes = torch.randint(0, 4, (4, 8, 3)).float()
    assert torch.equal(digits(codes, 4), codes[0] + 4 * codes[1] + 16 * codes[2] + 64 * codes[3])


def test_error_weights_know_only_ratios_within_a_block():
    importance = torch.rand(64) + 0.1
    assert torch.allclose(error_weights(importance, 32), error_weights(importance * 1e20, 32))
    alike = error_weights(torch.ones(64), 32)
    assert torch.equal(error_weights(torch.zeros(64), 32), alike)
    half = torch.ones(64); half[32:] = 0
    assert torch.equal(error_weights(half, 32), alike)
    assert torch.isfinite(error_weights(torch.tensor([3e38] * 32), 32)).all()


def test_error_weighting_grows_with_the_weight():
    x = torch.linspace(-2, 2, 32).view(1, 32, 1)
    w = error_weighting(x, torch.ones_like(x), 4.0).flatten()
    assert w.argmax() in (0, 31) and w.min() >= 2.0
    assert torch.isfinite(error_weighting(torch.zeros_like(x), torch.ones_like(x), 4.0)).all()


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q8_0"])
def test_chunks_do_not_show(name, monkeypatch):
    "Rows that do not divide the chunk are encoded as in one large chunk, but for sums in another order, which may tip a code."
    x, importance = torch.randn(23, 160, generator=torch.Generator().manual_seed(3)), torch.rand(160, generator=torch.Generator().manual_seed(4))
    whole = encode_blocks(name, x, importance)
    monkeypatch.setitem(blocks.CHUNK, "cpu", 7 * 32)
    def differing(data): return (decode_blocks(name, data) != decode_blocks(name, whole)).float().mean()
    assert differing(encode_blocks(name, x, importance)) < 0.05
    assert torch.equal(decode_blocks(name, whole), read(name, whole.numpy()))
    assert differing(encode_blocks(name, x, importance.flip(0))) > (0.05 if name != "Q8_0" else 0.01)


def test_threads_do_not_show():
    "Two threads take larger chunks; the bytes are the same but for sums in another order."
    x, threads = torch.randn(1100, 512, generator=torch.Generator().manual_seed(6)), torch.get_num_threads()
    try:
        torch.set_num_threads(1); alone = encode_blocks("Q4_1", x)
        torch.set_num_threads(2); together = encode_blocks("Q4_1", x.T.contiguous().T)
    finally: torch.set_num_threads(threads)
    assert (alone != together).float().mean() < 0.01


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0"])
def test_the_input_is_left_alone(name):
    for x in (torch.full((1, 32), 1e30), torch.randn(3, 32)):
        before = x.clone()
        encode_blocks(name, x)
        assert torch.equal(x, before)


def test_layouts_and_dtypes():
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
    expected = encode_blocks("Q4_0", x.float())
    assert torch.equal(encode_blocks("Q4_0", x), expected)
    assert torch.equal(encode_blocks("Q4_0", x.T.contiguous().T), expected)
    assert torch.equal(encode_blocks("Q4_0", x.double()), expected)
    assert torch.equal(encode_blocks("Q4_0", x[::2]), expected[::2])
    assert encode_blocks("Q4_0", x[:0]).shape == (0, 36) and decode_blocks("Q4_0", expected[:0]).shape == (0, 64)


@pytest.mark.parametrize("name", ROUND_TYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_refused(name, bad):
    x = torch.ones(5, 64)
    x[4, 63] = bad
    with pytest.raises(ValidationError): encode_blocks(name, x)


@pytest.mark.parametrize("name", ROUND_TYPES)
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e-6, 1e5, 1e30], ids=str)
def test_scales_stay_finite(name, scale):
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(5)) * scale
    y = decode_blocks(name, encode_blocks(name, x))
    assert torch.isfinite(y).all()
    if scale in (1e-6, 1e5): assert (y - x).square().sum() < 0.25 * x.square().sum()


def test_a_row_must_divide_into_blocks():
    with pytest.raises(ArgumentError, match="blocks of 32"): encode_blocks("Q4_0", torch.zeros(2, 48))
