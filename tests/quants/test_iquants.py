"The i-quants: layouts against the gguf package and llama.cpp's own reader, and pack against unpack."
import ctypes
import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from llm_quantize.quants import compile as compiles
from llm_quantize.quants.blocks import ENCODERS, decode_blocks, encode_blocks
from llm_quantize.quants.compile import compiling, stage
from llm_quantize.quants.iq_grids import grid_points
from llm_quantize.quants.iquants import LAYOUTS, point_indices, points_at
from llm_quantize.quants.qtypes import QTYPES

GRID_TYPES = list(LAYOUTS)
I_TYPES = [*GRID_TYPES, "IQ4_XS"]
PARITY = ("IQ2_XXS", "IQ2_XS", "IQ3_XXS")  # seven signs stored for eight weights
# f16 values of d: zero and minus zero, the smallest and largest numbers without a leading one, the smallest with one, one, the largest
HALVES = np.array([0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x83FF, 0x0400, 0x3C00, 0xBC00, 0x7BFF, 0xFBFF], dtype=np.uint16)


def set_half(name, data, bits):
    "Write f16 bit patterns as the d of blocks."
    if name != "IQ1_M": data[:, :2] = bits.astype("<u2").view(np.uint8).reshape(-1, 2); return
    for j in range(4): data[:, 49 + 2 * j] = data[:, 49 + 2 * j] & 0x0F | (bits >> 4 * j & 15).astype(np.uint8) << 4


def random_bytes(name, count=2000, seed=0):
    "Blocks of random bytes with a finite d, the first ones with each of HALVES."
    generator = np.random.default_rng(seed)
    data = generator.integers(0, 256, (count, QTYPES[name].block_bytes), dtype=np.uint8)
    bits = generator.integers(0, 1 << 16, count, dtype=np.uint16)
    bits[bits & 0x7C00 == 0x7C00] &= 0xBBFF
    bits[:len(HALVES)] = HALVES
    set_half(name, data, bits)
    return data


def by_gguf(name, data):
    "What the gguf package makes of the bytes."
    return torch.from_numpy(gguf.quants.dequantize(np.ascontiguousarray(data), gguf.GGMLQuantizationType[name]).copy())


def unpack(name, data): return (LAYOUTS[name].unpack if name in LAYOUTS else ENCODERS[name].unpack)(torch.from_numpy(data).T.contiguous())


def pack(name, fields, codes): return (LAYOUTS[name].pack if name in LAYOUTS else ENCODERS[name].pack)(fields, codes).T.numpy()


def ours(name, data):
    "What we make of the bytes, (blocks, 256)."
    if name not in LAYOUTS: return decode_blocks(name, torch.from_numpy(data))
    fields, codes = unpack(name, data)
    return ((fields["d"] * fields["scales"]).unsqueeze(-2) * codes).flatten(0, 1).T.contiguous()


def same_bits(a, b): return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


@pytest.fixture(scope="module")
def llama():
    "A function that reads blocks with llama.cpp's library."
    found = importlib.util.find_spec("llama_cpp")
    path = Path(found.origin).parent / "lib" / "libggml-base.so" if found else None
    if path is None or not path.exists(): pytest.skip("needs libggml-base of llama-cpp-python: pip install llama-cpp-python")
    library = ctypes.CDLL(str(path))
    def read(name, data):
        function = getattr(library, f"dequantize_row_{name.lower()}")
        function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
        out = torch.empty(len(data), 256)
        function(np.ascontiguousarray(data).ctypes.data, out.data_ptr(), out.numel())
        return out
    return read


@pytest.mark.parametrize("name", I_TYPES)
def test_decodes_random_bytes_as_gguf_does(name):
    data = random_bytes(name)
    theirs = by_gguf(name, data)
    assert torch.isfinite(theirs).all() and same_bits(ours(name, data), theirs)
    for at in range(QTYPES[name].block_bytes):             # no byte goes unread
        wrong = data[100:101].copy()
        wrong[0, at] ^= 0x11
        assert not same_bits(ours(name, wrong), theirs[100:101])


@pytest.mark.parametrize("name", I_TYPES)
def test_decodes_random_bytes_as_llama_cpp_does(name, llama):
    data = random_bytes(name, seed=1)
    theirs = llama(name, data)
    assert same_bits(ours(name, data), theirs)
    data[50, 40] ^= 0xFF
    assert not same_bits(ours(name, data), theirs)


@pytest.mark.parametrize("name", I_TYPES)
def test_packs_what_it_unpacked(name):
    "Every format has one spelling: no grid has a point twice, and a d of zero keeps its sign. (What is no number is not a d.)"
    data = random_bytes(name, seed=2)
    fields, codes = unpack(name, data)
    assert np.array_equal(pack(name, fields, codes), data)
    codes[0, 0, 500] = -codes[0, 0, 500] if "IQ1" not in name and name != "IQ4_XS" else codes[0, 0, 500] + 1 - 2 * (codes[0, 0, 500] > 0)
    assert (pack(name, fields, codes) != data).any(1).nonzero()[0].tolist() == [500]


@pytest.mark.parametrize("name", GRID_TYPES)
def test_shapes_and_values(name):
    groups, elements, _, _ = LAYOUTS[name]
    fields, codes = unpack(name, random_bytes(name, 30))
    assert codes.shape == (groups, elements, 30) and fields["d"].shape == (30,) and fields["scales"].shape == (groups, 30)
    assert all(v.dtype == torch.float32 for v in (codes, *fields.values()))
    steps = (fields["scales"] * {"IQ2": 8, "IQ3_XXS": 4}.get(name if name == "IQ3_XXS" else name[:3], 1) - 1) / 2
    assert torch.equal(steps, steps.round()) and steps.min() >= 0 and steps.max() <= (7 if "IQ1" in name else 15)
    known = {"IQ1": {g + d for g in (-1, 0, 1) for d in (0.125, -0.125)}, "IQ2": {8, 25, 43}, "IQ3_XXS": {4, 12, 20, 28, 36, 44, 52, 62}}
    values = known.get(name[:3]) or known.get(name) or set(range(1, 16, 2))
    assert set((codes if "IQ1" in name else codes.abs()).unique().tolist()) == values


@pytest.mark.parametrize("name", GRID_TYPES)
def test_every_index_and_every_sign_pattern(name):
    fields, codes = unpack(name, random_bytes(name, seed=3))
    index = point_indices(name, codes)
    assert torch.equal(index.unique(), torch.arange(len(grid_points(name))).int())
    eights = codes.flatten(0, 1).unflatten(0, (32, 8))
    if "IQ1" in name:
        eights = eights.unflatten(0, (8, 4)).flatten(1, 2) if name == "IQ1_S" else eights  # weights that share a shift
        shift = eights - eights.round()
        assert torch.equal(shift.amin(1), shift.amax(1)) and set(shift.unique().tolist()) == {-0.125, 0.125}
        return
    minus = (eights < 0).int()
    patterns = (minus << torch.arange(8).view(8, 1)).sum(1)
    assert len(patterns.unique()) == (128 if name in PARITY else 256)
    if name in PARITY: assert (minus.sum(1) % 2 == 0).all()


@pytest.mark.parametrize("name", GRID_TYPES)
def test_vectors_off_the_grid_have_no_index(name):
    points = grid_points(name)
    values, size = points.unique(), points.shape[1]
    every = torch.cartesian_prod(*[values] * size)
    assert len(points.unique(dim=0)) == len(points)        # no point twice
    padded = torch.cat([every, every[:-len(every) % (256 // size)]]) if len(every) % (256 // size) else every
    codes = padded.view(-1, 256).T.unflatten(0, LAYOUTS[name][:2])
    index = point_indices(name, codes).T.flatten()[:len(every)]
    assert (index < 0).sum() == len(every) - len(points)
    assert torch.equal(every[index >= 0], points[index[index >= 0].long()])


@pytest.mark.parametrize("name", GRID_TYPES)
def test_points_and_indices_are_inverses(name):
    points = grid_points(name)
    index = torch.randint(0, len(points), (3, 256 // points.shape[1], 5), generator=torch.Generator().manual_seed(4))
    values = points_at(name, index)
    assert values.shape == (3, 256, 5) and torch.equal(values[1, :points.shape[1], 2], points[index[1, 0, 2]])
    assert torch.equal(point_indices(name, values.unflatten(-2, LAYOUTS[name][:2])), index.int())


@pytest.mark.parametrize("name", GRID_TYPES)
def test_tiles_in_front_change_nothing(name):
    data = random_bytes(name, 24)
    tiled = torch.from_numpy(data).view(4, 6, -1).transpose(1, 2).contiguous()
    fields, codes = LAYOUTS[name].unpack(tiled)
    flat = unpack(name, data)[1]
    assert torch.equal(codes.movedim(0, -2).flatten(-2), flat)
    assert torch.equal(LAYOUTS[name].pack(fields, codes), tiled)


@pytest.mark.parametrize("name", ["IQ2_XXS", *(pytest.param(n, marks=pytest.mark.slow) for n in GRID_TYPES if n != "IQ2_XXS")])
def test_compiled_pack_writes_the_same_bytes(name, tmp_path, monkeypatch):
    if not compiles.wants_compile(name, torch.zeros(1), True): pytest.skip("needs a C++ compiler, such as g++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    data = random_bytes(name, 128)
    fields, codes = unpack(name, data)
    with compiling(True): packed = stage(LAYOUTS[name].pack)(fields, codes)
    assert not compiles.failures and np.array_equal(packed.T.numpy(), data)


@pytest.mark.parametrize("name", GRID_TYPES)
def test_a_gpu_reads_and_writes_the_same(name):
    if not torch.cuda.is_available(): pytest.skip("needs a CUDA GPU")
    data = torch.from_numpy(random_bytes(name)).T.contiguous()
    fields, codes = LAYOUTS[name].unpack(data.cuda())
    assert torch.equal(codes.cpu(), LAYOUTS[name].unpack(data)[1])
    for compiled in (False, True):
        with compiling(compiled): assert torch.equal(stage(LAYOUTS[name].pack)(fields, codes).cpu(), data)


def test_iq4_xs_is_near_iq4_nl():
    "Half of the scale's bits for a fifteenth of the error at most."
    seed = torch.Generator().manual_seed(0)
    x, importance = torch.randn(32, 512, generator=seed), torch.randn(512, generator=seed).exp()
    lost = {}
    for name in ("IQ4_NL", "IQ4_XS"):
        data = encode_blocks(name, x, importance)
        assert torch.equal(decode_blocks(name, data), by_gguf(name, data.numpy()))
        lost[name] = (importance * (decode_blocks(name, data) - x).square()).sum() / (importance * x.square()).sum()
    assert lost["IQ4_NL"] < lost["IQ4_XS"] < 1.07 * lost["IQ4_NL"]
