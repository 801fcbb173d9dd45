"The K-quants: layouts against the gguf package, and searches against brute force."
import gguf
import numpy as np
import pytest
import torch

from llm_quantize.quants import kquants
from llm_quantize.quants.blocks import ENCODERS, Levels, decode_blocks, encode_blocks, error_weights, fit_errors, inverse
from llm_quantize.errors import ArgumentError, ValidationError
from llm_quantize.quants.qtypes import QTYPES
from llm_quantize.quants.scale_search import affine_scale, local_search, pick, refit, super_scale, super_steps, symmetric_scale

K_TYPES = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
SCALES_AT = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # where the f16 fields begin


def random_bytes(name, blocks=200, seed=0):
    "Blocks of random bytes whose f16 scales are finite."
    data = np.random.default_rng(seed).integers(0, 256, (blocks, QTYPES[name].block_bytes), dtype=np.uint8)
    for at in SCALES_AT[name]: data[:, at + 1] &= 0xBB  # clears the top exponent bit
    return data


def read(name, data):
    "What the gguf package makes of the bytes."
    return torch.from_numpy(gguf.quants.dequantize(np.ascontiguousarray(data), gguf.GGMLQuantizationType[name]).copy())


@pytest.mark.parametrize("name", K_TYPES)
def test_decodes_random_bytes_as_gguf_does(name):
    data = random_bytes(name)
    ours, theirs = decode_blocks(name, torch.from_numpy(data)), read(name, data)
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
    data[3, 40] ^= 0xFF
    assert not torch.equal(decode_blocks(name, torch.from_numpy(data)), theirs)


@pytest.mark.parametrize("name", K_TYPES)
def test_packs_what_it_unpacked(name):
    data = torch.from_numpy(random_bytes(name)).T.contiguous()
    fields, codes = ENCODERS[name].unpack(data)
    assert torch.equal(ENCODERS[name].pack(fields, codes), data)


@pytest.mark.parametrize("name", K_TYPES)
def test_our_bytes_are_read_alike(name):
    x = torch.randn(20, 768, generator=torch.Generator().manual_seed(1))
    data = encode_blocks(name, x, torch.rand(768))
    assert torch.equal(decode_blocks(name, data), read(name, data.numpy()))
    assert ((decode_blocks(name, data) - x).square().sum() / x.square().sum()) < {"Q2_K": 0.09, "Q3_K": 0.025, "Q4_K": 0.006, "Q5_K": 0.0015, "Q6_K": 0.0004}[name]


@pytest.mark.parametrize("name", K_TYPES)
def test_neighbouring_scales_are_no_better(name):
    "Of the integers next to the ones written, none gives its group a smaller error."
    encoder, limits = ENCODERS[name], kquants._SEARCHES[name].limits
    x = torch.randn(encoder.groups, encoder.elements, 50, generator=torch.Generator().manual_seed(2))
    w = torch.ones_like(x)
    fields = encoder.search(x, w)
    def error(fields):
        step, offset = (v if v is None else v.unsqueeze(-2) for v in super_steps(fields))
        return fit_errors(x, w, step, inverse(step), offset, encoder.levels).squeeze(-2)
    written = error(fields)
    for change in (-1, 1):
        moved = {**fields, "scales": (fields["scales"] + change).clamp(*limits)}
        assert (written <= error(moved) * (1 + 1e-5) + 1e-9).float().mean() > 0.999


@pytest.mark.parametrize("name", K_TYPES)
@pytest.mark.parametrize("case", ["zero", "one", "constant", "negative", "tiny", "huge", "spike", "zero group"])
def test_odd_blocks(name, case):
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(3))
    if case == "zero": x = torch.zeros(4, 512)
    elif case == "one": x = torch.zeros(4, 512); x[2, 300] = 1.5
    elif case == "constant": x = torch.full((4, 512), 0.123)
    elif case == "negative": x = torch.full((4, 512), -0.123)
    elif case == "tiny": x = x * 1e-30
    elif case == "huge": x = x * 1e30
    elif case == "spike": x[:, 7] = 1e4
    elif case == "zero group": x[:, 32:64] = 0
    y = decode_blocks(name, encode_blocks(name, x))
    assert torch.isfinite(y).all()
    if case == "zero": assert (y == 0).all()
    if case in ("constant", "negative", "one"): assert ((y - x).square().sum() / x.square().sum()) < 1e-5
    if case == "zero group": assert (y[:, 32:64].square().sum() / y.square().sum()) < 0.02


@pytest.mark.parametrize("name", K_TYPES)
def test_no_importance_counts_all_alike(name):
    x = torch.randn(6, 512, generator=torch.Generator().manual_seed(4))
    alike = encode_blocks(name, x)
    for importance in (torch.ones(512), torch.zeros(512), torch.full((512,), 1e30), torch.full((512,), 1e-30)):
        assert torch.equal(error_weights(importance, 256), error_weights(torch.ones(512), 256)) # the same numbers, so the same bytes on any processor
        assert torch.equal(encode_blocks(name, x, importance), alike)
    half = torch.ones(512); half[256:] = 0                      # a block without importance is encoded like any other
    assert torch.equal(encode_blocks(name, x, half), alike)


@pytest.mark.parametrize("name", K_TYPES)
def test_importance_lowers_its_own_error(name):
    seed = torch.Generator().manual_seed(5)
    x, importance = torch.randn(16, 512, generator=seed), torch.randn(512, generator=seed).exp()
    error = [(importance * (decode_blocks(name, encode_blocks(name, x, i)) - x).square()).sum() for i in (importance, None, importance.flip(0))]
    assert error[0] < 0.95 * error[1] < 0.95 * error[2]


def test_nothing_that_is_no_number_is_written():
    x = torch.zeros(3, 256); x[1, 17] = float("nan")
    for name in K_TYPES:
        with pytest.raises(ValidationError): encode_blocks(name, x)
        with pytest.raises(ArgumentError): encode_blocks(name, torch.zeros(3, 255))


def test_pick_takes_the_first_of_equals():
    score = torch.tensor([[1.0, 3.0, float("inf")], [1.0, 2.0, 5.0], [4.0, 2.0, 5.0]])
    least, value = pick(score, torch.tensor([[1.0] * 3, [2.0] * 3, [3.0] * 3]))
    assert least.tolist() == [1.0, 2.0, 5.0] and value.tolist() == [1.0, 2.0, 2.0]


def test_symmetric_scale_is_near_the_best_of_a_grid():
    seed = torch.Generator().manual_seed(6)
    x, w, levels = torch.randn(16, 200, generator=seed), torch.randn(16, 200, generator=seed).exp(), Levels(-4, 3)
    grid = torch.cat([torch.linspace(0.05, 1.5, 600), -torch.linspace(0.05, 1.5, 600)]).unsqueeze(-1).expand(-1, 200).contiguous()
    best = fit_errors(x, w, grid, inverse(grid), None, levels).amin(-2)
    search = kquants._SEARCHES["Q3_K"]
    s = symmetric_scale(x, w, levels, search.ends, search.heavy)[0].unsqueeze(-2)
    found = fit_errors(x, w, s, inverse(s), None, levels).squeeze(-2)
    assert found.sum() < 1.03 * best.sum()


def test_affine_scale_is_near_the_best_of_a_grid():
    seed = torch.Generator().manual_seed(7)
    x, w, levels = torch.randn(16, 100, generator=seed), torch.randn(16, 100, generator=seed).exp(), Levels(0, 3)
    pairs = torch.cartesian_prod(torch.linspace(0.3, 1.8, 60), torch.linspace(0, 3.5, 60))
    step, offset = (pairs[:, i:i + 1].expand(-1, 100).contiguous() for i in (0, 1))
    best = fit_errors(x, w, step, inverse(step), offset, levels).amin(-2)
    s, m, _, _ = affine_scale(x, w, levels, kquants._SEARCHES["Q2_K"].starts)
    found = fit_errors(x, w, s.unsqueeze(-2), inverse(s).unsqueeze(-2), m.unsqueeze(-2), levels).squeeze(-2)
    assert found.sum() < 1.03 * best.sum() and (m >= 0).all()


def test_super_scale_is_near_the_best_of_a_grid():
    s = torch.rand(8, 100, generator=torch.Generator().manual_seed(8))
    d, k = super_scale(s, torch.ones_like(s), (0, 63), (63, 62, 61, 60, 59, 58))
    grid = torch.linspace(0.9, 1.3, 4000).view(-1, 1, 1) * s.amax(0) / 63
    best = (s - grid * (s / grid).round().clamp(0, 63)).square().sum(1).amin(0)
    assert ((s - d * k).square().sum(0)).sum() < 3 * best.sum()
    assert (k >= 0).all() and (k <= 63).all() and torch.equal(d.half().float(), d)


def test_local_search_and_refitting_never_hurt():
    seed = torch.Generator().manual_seed(9)
    x, w, levels = torch.randn(8, 32, 40, generator=seed), torch.rand(8, 32, 40, generator=seed), Levels(0, 15)
    fields = {"d": torch.full((40,), 0.005), "scales": torch.full((8, 40), 60.0), "dmin": torch.full((40,), 0.05), "mins": torch.full((8, 40), 45.0)}
    def error(fields):
        step, offset = (v.unsqueeze(-2) for v in super_steps(fields))
        return fit_errors(x, w, step, inverse(step), offset, levels).sum((0, 1))
    once, thrice = (local_search(x, w, fields, levels, (0, 63), kquants._NEIGHBOURS, rounds) for rounds in (1, 3))
    assert (error(once) <= error(fields) * (1 + 1e-5)).all() and (error(thrice) <= error(once) * (1 + 1e-5)).all()
    assert error(thrice).sum() < 0.9 * error(fields).sum()
    step, offset = (v.unsqueeze(-2) for v in super_steps(fields))
    new = refit(x, w, step, inverse(step), offset, fields, levels)
    assert set(new) == {"d", "dmin"} and torch.isfinite(new["d"]).all()
