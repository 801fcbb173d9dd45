"The search over grid points: against trying everything, on legal codes, at the edges of what weights can be."
import pytest
import torch

from llm_quantize.quants import iquants  # registers the encoders
from llm_quantize.quants.blocks import ENCODERS, THOROUGH, decode_blocks, encode_blocks, inverse
from llm_quantize.quants.compile import compiling
from llm_quantize.quants.iq_grids import Grid, grid_points, lay, near_points

NAMES = list(iquants.LAYOUTS)
CPU = torch.device("cpu")


def vectors(grid, blocks=64, seed=0, spread=1.0):
    "Weights of one group of 32 side by side, and what their errors count."
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(32, blocks, generator=generator) * spread, torch.randn(32, blocks, generator=generator).exp()


def legal(grid, codes):
    "Whether every vector of codes (elements, blocks) can be stored."
    parts = codes.unflatten(0, (-1, grid.dim)).transpose(1, 2).flatten(0, 1) # (vectors, dim)
    if grid.shift: parts = parts.round()
    elif grid.signs == "parity" and not (codes < 0).float().unflatten(0, (-1, 8)).sum(1).remainder(2).eq(0).all(): return False
    magnitudes = parts if grid.signs == "none" else parts.abs()
    return bool((magnitudes.unsqueeze(1) == grid_points(grid.name)).all(-1).any(-1).all())


def squared_error(x, w, step, codes): return (w * (x - step * codes).square()).sum(0)


@pytest.mark.parametrize("name", NAMES)
def test_near_points_are_the_nearest(name):
    points, count = grid_points(name), 8
    values, dim = points.unique(), points.shape[1]
    bits, near = 2 if len(values) == 3 else 3, near_points(name, count, CPU).view(-1, count)
    cells = torch.cartesian_prod(*[values] * dim)
    assert len(near) == len(cells)
    some = torch.randperm(len(cells), generator=torch.Generator().manual_seed(0))[:200]
    found = values[(near[some].unsqueeze(-1) >> bits * torch.arange(dim) & 2 ** bits - 1).long()]
    distance = (found - cells[some].unsqueeze(1)).square().sum(-1)
    least = (points - cells[some].unsqueeze(1)).square().sum(-1).sort(-1).values[:, :count]
    assert torch.equal(distance, least)
    assert all(len(set(line)) == count for line in near[some].tolist())


def every_point(x, w, step, grid):
    "Least squared error of each group of 32 weights over all points, legal signs and shifts, one block at a time."
    points, out = grid_points(grid.name), []
    for k in range(x.shape[1]):
        v, u, s = (t[:, k].view(-1, grid.dim) for t in (x, w, step.expand_as(x)))
        s, groups = s[0, 0], []
        if grid.shift:
            errors = torch.stack([(u.unsqueeze(1) * (v.unsqueeze(1) - s * (points + d)).square()).sum(-1).amin(-1) for d in (-grid.shift, grid.shift)])
            out.append(errors.sum(1).amin() if grid.shared else errors.amin(0).sum())
            continue
        plain = (u.unsqueeze(1) * (v.abs().unsqueeze(1) - s * points).square()).sum(-1)                               # (vectors, points)
        turned = plain + 4 * s * (u * v.abs()).unsqueeze(1).mul(points).amin(-1)
        plain, turned = (e.amin(-1).view(-1, 8 // grid.dim) for e in (plain, turned))
        odd = (v < 0).view(-1, 8).sum(-1) % 2 == 1
        one = plain.sum(-1) + (turned - plain).amin(-1)
        out.append((torch.where(odd, one, plain.sum(-1)) if grid.signs == "parity" else plain.sum(-1)).sum())
    return torch.stack(out)


@pytest.mark.parametrize("name", NAMES)
def test_with_all_points_the_best_is_found(name):
    base = ENCODERS[name].levels
    grid = Grid(base.name, base.values, base.dim, base.signs, base.shift, base.shared, count=min(1024, len(grid_points(name))))
    x, w = vectors(grid, blocks=12)
    step = x.abs().amax(0) / grid.values[-1] * (0.7 if grid.shift else 0.9)
    error = squared_error(x, w, step, grid.codes(x, w, step, None))
    least = every_point(x, w, step, grid)
    assert (error <= least * 1.002 + 1e-6).all() and (error >= least * 0.9999 - 1e-6).all() # the winner is known to one part in a thousand of the signal
    assert not (squared_error(x, w, 1.02 * step, grid.codes(x, w, step, None)) <= least * 1.002).all() # the comparison can fail


@pytest.mark.parametrize("table", [ENCODERS, THOROUGH], ids=["fast", "best"])
@pytest.mark.parametrize("name", NAMES)
def test_sums_belong_to_the_codes(name, table):
    grid = table[name].levels
    x, w = vectors(grid, seed=1)
    step = x.abs().amax(0) / grid.values[-1]
    *_, p, q = lay(x, w, step, inverse(step), grid)
    codes = grid.codes(x, w, step, None)
    assert legal(grid, codes)
    assert torch.allclose(p, (w * x * codes).sum(0), rtol=1e-4, atol=1e-4) and torch.allclose(q, (w * codes * codes).sum(0), rtol=1e-4)
    broken = codes.clone()
    broken[0] = -broken[0] if grid.signs != "none" else broken[0] + 2
    assert not torch.allclose(p, (w * x * broken).sum(0), rtol=1e-4, atol=1e-4)
    if grid.signs != "free": assert not legal(grid, broken)


@pytest.mark.parametrize("name", NAMES)
def test_more_points_are_better(name):
    fast = ENCODERS[name].levels
    x, w = vectors(fast, blocks=512, seed=2)
    step = x.abs().amax(0) / fast.values[-1] * 0.8
    errors = []
    for count in (1, 4, 8, 32):
        grid = Grid(fast.name, fast.values, fast.dim, fast.signs, fast.shift, fast.shared, count)
        errors.append(squared_error(x, w, step, grid.codes(x, w, step, None)).sum())
    assert errors == sorted(errors, reverse=True) and errors[2] < errors[0]


@pytest.mark.parametrize("search", ["fast", "best"])
@pytest.mark.parametrize("name", NAMES)
def test_edges(name, search):
    "Rows of zeros, of one weight, tiny, huge, with negative zero: bytes that decode to finite weights, zeros to nothing larger than rounding."
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(3))
    x[0] = 0
    x[1] = 0; x[1, 77] = -3.0
    x[2] *= 1e-6
    x[3] *= 1e4
    x[4] = -0.0; x[4, 128:] = 1.0
    x[5, :32] = 0
    y = decode_blocks(name, encode_blocks(name, x, search=search))
    assert torch.isfinite(y).all() and (y[0] == 0).all()
    for row in (1, 2, 3, 4): assert (y[row] - x[row]).square().sum() < x[row].square().sum() # better than writing zeros
    assert y[1].abs().argmax() == 77
    scaled = decode_blocks(name, encode_blocks(name, x[6:] * 2.0 ** -9, search=search)) * 2.0 ** 9
    assert abs((scaled - x[6:]).square().sum() / (y[6:] - x[6:]).square().sum() - 1) < 0.02 # d has fewer bits there, nothing else changes


def test_importance_moves_the_error():
    x = torch.randn(16, 512, generator=torch.Generator().manual_seed(4))
    importance = torch.full((512,), 0.01)
    importance[::16] = 1.0
    for name in NAMES:
        plain, told = ((decode_blocks(name, encode_blocks(name, x, i)) - x).square()[:, ::16].mean() for i in (None, importance))
        assert told < 0.7 * plain, name


@pytest.mark.parametrize("name", NAMES)
def test_a_finished_file_cannot_be_improved_by_one_scale(name):
    "Moves of `best`: no neighbour of a stored scale makes its group better, with points found anew as the moves find them; and rarely as the last pick does, which tries more."
    encoder = THOROUGH[name]
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(encoder.groups, encoder.elements, 32, generator=generator)
    w = torch.rand(x.shape, generator=generator) + 0.1
    fields = encoder.search(x, w)
    low, high, distance = encoder.search.limits
    def error(scales, grid):
        step = fields["d"].unsqueeze(-2) * scales
        return (w * (x - step.unsqueeze(-2) * grid.codes(x, w, step, None)).square()).sum(-2)
    def improved(scales, grid): # the largest share of groups that one of the two neighbours would serve better
        return max((error((scales + change * distance).clamp(low, high), grid) < 0.999 * error(scales, grid)).float().mean() for change in (-1, 1))
    moves = encoder.search.grid
    assert improved(fields["scales"], moves) < 0.02 and improved(fields["scales"], encoder.levels) < 0.04
    assert improved((fields["scales"] + distance).clamp(low, high), moves) > 0.5 # scales that are too large by one are found out


def test_compiled_and_plain_agree():
    "The same choice, to float rounding: near ties may fall the other way."
    grid = ENCODERS["IQ2_XXS"].levels
    x, w = (v.repeat(2, 1, 1) for v in vectors(grid))
    step = x.abs().amax(-2) / 43
    results = []
    for on in (False, True):
        with compiling(on): results.append(lay(x, w, step, inverse(step), grid)[2:])
    for plain, compiled in zip(*results): assert torch.allclose(plain, compiled, rtol=2e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_finds_as_good_points(name):
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(7))
    lost = [(decode_blocks(name, encode_blocks(name, v)).cpu() - x).square().sum() for v in (x, x.cuda())]
    assert abs(lost[0] / lost[1] - 1) < 2e-3
