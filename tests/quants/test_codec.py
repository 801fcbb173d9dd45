"The public pair, and the encoders beside llama.cpp's own."
import ctypes
import importlib.util
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file

from llm_quantize.quants import blocks, codec
from llm_quantize.quants import compile as compiles
from llm_quantize.quants.blocks import ENCODERS
from llm_quantize.quants.iquants import LAYOUTS
from llm_quantize.quants.codec import FLOATS, decode, encode, encode_tensor
from llm_quantize.errors import ArgumentError, ImatrixError, ValidationError
from llm_quantize.quants.qtypes import QTYPES, qtype

# llama.cpp's encoders weigh importance by sqrt(factor * mean square of some extent + x x); `None`: by importance alone
REFERENCE_WEIGHTS = {"Q2_K": (256, 1), "Q3_K": (256, 2), "Q4_K": (256, 2), "Q5_K": (256, 2), "Q6_K": None, "Q8_0": None,
                     "Q4_0": ("row", 1), "Q4_1": ("row", 1), "Q5_0": ("row", 1), "Q5_1": ("row", 1), "IQ4_NL": (32, 2), "IQ4_XS": (256, 2),
                     "TQ1_0": None, "TQ2_0": None, "IQ2_XXS": (256, 1), "IQ2_XS": (256, 1), "IQ2_S": (256, 2), "IQ3_XXS": (256, 2), "IQ3_S": (256, 2),
                     "IQ1_S": (256, 2), "IQ1_M": (256, 2)}


@pytest.fixture(scope="module")
def reference():
    "A function that encodes with llama.cpp's library."
    found = importlib.util.find_spec("llama_cpp")
    path = Path(found.origin).parent / "lib" / "libggml-base.so" if found else None
    if path is None or not path.exists(): pytest.skip("needs libggml-base of llama-cpp-python: pip install llama-cpp-python")
    library = ctypes.CDLL(str(path))
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    def encode(x, name, importance):
        out = torch.empty(x.shape[0], qtype(name).row_bytes(x.shape[1]), dtype=torch.uint8)
        library.ggml_quantize_chunk(qtype(name).ggml_id, x.data_ptr(), out.data_ptr(), 0, *x.shape, importance.data_ptr())
        return out
    return encode


def made(kind, rows=48, columns=1024):
    "Rows of weights of one kind."
    seed = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=seed) * 0.02
    if kind == "student": x = x / (torch.randn(rows, columns, 5, generator=seed).square().mean(-1)).sqrt()
    if kind == "outlier": x[torch.arange(rows), torch.randint(0, columns, (rows,), generator=seed)] = 1.0
    if kind == "constant": x = x[:, :1].expand(rows, columns).contiguous()
    if kind == "zero": x = torch.zeros(rows, columns)
    return x


def drawn_importance(columns, sigma, seed=1): return torch.exp(sigma * torch.randn(columns, generator=torch.Generator().manual_seed(seed)))


def reference_weighting(x, rule):
    "The factor that llama.cpp puts on importance."
    if rule is None: return torch.ones_like(x)
    extent, factor = (x.shape[1] if rule[0] == "row" else rule[0]), rule[1]
    return (factor * x.view(-1, extent).square().mean(-1, keepdim=True) + x.view(-1, extent).square()).sqrt().view_as(x)


def own(x, name):
    "The factor that our encoder puts on importance."
    size, damping = QTYPES[name].block_size, ENCODERS[name].damping
    return torch.ones_like(x) if damping is None else reference_weighting(x, (size, damping))


def error(x, data, name, weight): return (weight * (decode(data, name) - x).square()).sum(dtype=torch.float64).item()


@pytest.mark.parametrize("name", list(ENCODERS))
@pytest.mark.parametrize("kind", ["normal", "student", "outlier", "constant", "zero"])
@pytest.mark.parametrize("sigma", [0.0, 1.0, 2.0], ids=["alike", "drawn", "skewed"])
def test_error_is_at_most_the_reference_s(reference, name, kind, sigma):
    "Under importance alone and under the weighting that our encoder minimises. Groups of equal weights lie on one low level, where of the grids only `best` begins."
    x = made(kind)
    importance = drawn_importance(x.shape[1], sigma)
    ours, theirs = encode(x, name, importance, search="best" if kind == "constant" and name in LAYOUTS else "fast"), reference(x, name, importance)
    for weight in (importance.expand_as(x), importance * own(x, name)):
        assert error(x, ours, name, weight) <= 1.001 * error(x, theirs, name, weight)


@pytest.mark.parametrize("name", list(ENCODERS))
def test_error_under_the_reference_s_own_weighting(reference, name):
    "Where llama.cpp's encoder weighs errors in its own way, we stay within 1 % of it, by its own measure."
    for kind in ("normal", "student"):
        for sigma in (0.0, 1.0):
            x = made(kind)
            importance = drawn_importance(x.shape[1], sigma)
            weight = importance * reference_weighting(x, REFERENCE_WEIGHTS[name])
            assert error(x, encode(x, name, importance), name, weight) <= 1.01 * error(x, reference(x, name, importance), name, weight)


@pytest.mark.parametrize("name", list(ENCODERS))
def test_the_comparison_can_fail(reference, name):
    x, importance = made("normal"), drawn_importance(1024, 1.0)
    spoiled = encode(x * (4.0 if name.startswith("TQ") else 1.5 if name in LAYOUTS else 1.1), name, importance) # the reference is far off for weights that are not ternary
    assert error(x, spoiled, name, importance) > 1.001 * error(x, reference(x, name, importance), name, importance)


@pytest.mark.parametrize("name", list(ENCODERS))
def test_error_on_the_sample_model(reference, name, sample_model):
    "Tensor by tensor. IQ1_S gives the most of its error away for scales that do not shrink."
    bar = 1.02 if name == "IQ1_S" else 1.001
    for k, (_, x) in enumerate(sorted(load_file(sample_model / "model.safetensors").items())):
        if x.dim() != 2 or k % 3: continue
        x = x[:128].float()
        for sigma in (0.0, 1.0):
            importance = drawn_importance(x.shape[1], sigma, k)
            ours, theirs = encode(x, name, importance), reference(x, name, importance)
            for weight in (importance, importance * own(x, name)): assert error(x, ours, name, weight) <= bar * error(x, theirs, name, weight)


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize("name", list(ENCODERS))
def test_error_on_every_tensor_of_a_larger_model(reference, name, shared_model):
    for k, (tensor, x) in enumerate(sorted(load_file(shared_model("prose-46m") / "model.safetensors").items())):
        if x.dim() != 2: continue
        x = x[:128].float().contiguous()
        importance = drawn_importance(x.shape[1], float(k % 2), k)
        ours, theirs = encode(x, name, importance), reference(x, name, importance)
        for weight in (importance, importance * own(x, name)):
            assert error(x, ours, name, weight) <= 1.001 * error(x, theirs, name, weight), tensor


@pytest.mark.parametrize("name", list(ENCODERS))
def test_the_vector_of_llama_cpp_s_own_test(name):
    "The bars of test-quantize-fns.cpp, which measures sqrt(sum of squares) / n."
    x = (0.1 + 2 * torch.arange(4096.0).cos()).view(1, -1)
    bar = {"Q2_K": 0.0075, "Q3_K": 0.004, "TQ1_0": 0.01, "TQ2_0": 0.01, "IQ3_S": 0.004, "IQ3_XXS": 0.005, "IQ2_S": 0.0075,
           "IQ2_XS": 0.0065, "IQ2_XXS": 0.0074, "IQ1_M": 0.0094, "IQ1_S": 0.0098}.get(name, 0.002) # the last four have none there: what llama.cpp's encoder reaches
    assert (decode(encode(x, name), name) - x).square().sum().sqrt() / 4096 < bar


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_floats_are_the_package_s(name):
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(2)) * 10
    data = encode(x, name)
    assert torch.equal(data, torch.from_numpy(gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType[name]).view("uint8")))
    assert torch.equal(decode(data, name), x.to(FLOATS[name]).float())
    assert torch.equal(encode(x.T.contiguous().T, name), data)


def test_reference_search_is_the_library_s(reference):
    x, importance = made("normal"), drawn_importance(1024, 1.0)
    for name in ("Q4_K", "IQ2_XS"): assert torch.equal(encode(x, name, importance, search="reference"), reference(x, name, importance))
    with pytest.raises(ImatrixError, match="without importance"): encode(x, "IQ2_XS", search="reference")
    with pytest.raises(ValidationError, match="NaN"): encode(x / 0, "Q4_K", search="reference")


def test_an_unknown_search_is_refused():
    with pytest.raises(ArgumentError, match="slow"): encode(torch.zeros(1, 256), "Q4_K", search="slow")


def test_reference_search_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(codec, "_reference_library", lambda: None)
    with pytest.raises(ArgumentError, match="not installed"): encode(torch.zeros(1, 256), "Q4_K", search="reference")


@pytest.mark.parametrize("name", ["Q8_0", *(pytest.param(n, marks=pytest.mark.slow) for n in ("Q3_K", "Q4_1", "IQ4_NL"))])
def test_compiled_and_eager_agree(name, tmp_path, monkeypatch):
    "Rounding differs in the last place, so a few codes do; the error does not, and chunks do not show."
    if not compiles.wants_compile("Q4_0", torch.zeros(1), True): pytest.skip("needs a C++ compiler, such as g++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(blocks.CHUNK, "cpu", 1 << 15)
    x, importance = made("student", 41, 1024), drawn_importance(1024, 1.0)
    eager, compiled = encode(x, name, importance, compiled=False), encode(x, name, importance, compiled=True)
    assert not compiles.failures
    weight = importance * own(x, name)
    assert error(x, compiled, name, weight) == pytest.approx(error(x, eager, name, weight), rel=1e-3)
    assert (compiled != eager).float().mean() < 0.05


def test_half_precision_input_and_importance_dtypes():
    x, importance = made("normal").bfloat16(), drawn_importance(1024, 1.0)
    data = encode(x, "Q4_K", importance)
    assert torch.equal(encode(x.float(), "q4_k", importance.double()), data)
    assert torch.equal(encode(x.half().float(), "Q4_K", importance), encode(x.half(), QTYPES["Q4_K"], importance))


def test_every_expert_is_encoded_under_its_own_importance():
    seed = torch.Generator().manual_seed(6)
    stack, importance = torch.randn(3, 5, 512, generator=seed), torch.randn(3, 512, generator=seed).exp()
    data = encode_tensor(stack, "Q3_K", importance)
    each = [encode(stack[i], "Q3_K", importance[i]) for i in range(3)]
    assert torch.equal(data, torch.cat(each))
    assert not torch.equal(data, encode_tensor(stack, "Q3_K", importance.flip(0)))


def test_one_importance_serves_all_experts():
    seed = torch.Generator().manual_seed(7)
    stack, importance = torch.randn(2, 5, 512, generator=seed), torch.randn(512, generator=seed).exp()
    expected = torch.cat([encode(part, "Q4_0", importance) for part in stack])
    assert torch.equal(encode_tensor(stack, "Q4_0", importance), expected)
    assert torch.equal(encode_tensor(stack, "Q4_0", importance[None]), expected)
    assert not torch.equal(encode_tensor(stack, "Q4_0"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["F16", "Q8_0"])
def test_tensors_of_every_shape_and_dtype_are_rows(name, dtype):
    rows = torch.randn(4, 64, generator=torch.Generator().manual_seed(8)).to(dtype)
    expected = encode(rows, name)
    assert torch.equal(encode_tensor(rows, name), expected)
    assert torch.equal(encode_tensor(rows[1], name), expected[1:2])
    assert torch.equal(encode_tensor(rows.view(2, 2, 64), name), expected)
    assert torch.equal(encode_tensor(rows, name, torch.ones(1, 64), device="cpu"), expected)


def test_bytes_of_a_tensor_are_not_a_view_of_its_weights():
    weights = torch.ones(2, 32)
    data = encode_tensor(weights, "F32")
    weights.zero_()
    assert (decode(data, "F32") == 1).all()


@pytest.mark.parametrize("call, error, words", [
    (lambda x: encode_tensor(x[None, None], "Q4_K"), ArgumentError, "one to three"),
    (lambda x: encode_tensor(x[0, 0], "Q4_K"), ArgumentError, "one to three"),
    (lambda x: encode_tensor(x, "Q4_K", torch.ones(2, 512)), ImatrixError, r"\(2, 512\)"),
    (lambda x: encode_tensor(x[None].expand(3, -1, -1), "Q4_K", torch.ones(2, 512)), ImatrixError, r"\(3, 2, 512\)"),
    (lambda x: encode(x, "Q4K"), ArgumentError, "unknown tensor type"),
    (lambda x: encode(x[:, :500], "Q4_K"), ArgumentError, "blocks of 256"),
    (lambda x: encode(x[0], "Q4_K"), ArgumentError, "2-D"),
    (lambda x: encode(x.int(), "Q4_K"), ArgumentError, "float"),
    (lambda x: encode(x, "Q4_K", torch.ones(5)), ImatrixError, "5"),
    (lambda x: encode(x, "Q4_K", -torch.ones(512)), ImatrixError, "negative"),
    (lambda x: encode(x, "Q4_K", torch.full((512,), float("nan"))), ImatrixError, "NaN"),
    (lambda x: encode(x / 0, "Q4_K"), ValidationError, "NaN"),
    (lambda x: encode(x / 0, "F32"), ValidationError, "NaN"),
    (lambda x: encode(x * 1e9, "F16"), ValidationError, "F16"),
    (lambda x: encode(torch.full((1, 256), 3.4e38), "BF16"), ValidationError, "BF16"),
    (lambda x: decode(x, "Q4_K"), ArgumentError, "uint8"),
    (lambda x: decode(torch.zeros(2, 143, dtype=torch.uint8), "Q4_K"), ArgumentError, "144-byte"),
])
def test_refusals(call, error, words):
    x = torch.randn(2, 512, generator=torch.Generator().manual_seed(4))
    with pytest.raises(error, match=words) as caught: call(x)
    assert caught.value.suggestion


@pytest.mark.parametrize("name, weight, instead", [("F16", 1e5, "use BF16 or F32"), ("BF16", 3.4e38, "use F32")], ids=["F16", "BF16"])
def test_a_weight_too_large_is_sent_to_a_type_that_holds_it(name, weight, instead):
    with pytest.raises(ValidationError) as caught: encode(torch.full((1, 256), weight), name)
    assert caught.value.suggestion.startswith(instead)
    assert torch.isfinite(decode(encode(torch.full((1, 256), weight), "F32"), "F32")).all()
