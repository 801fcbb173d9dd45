"Importance matrices: llama.cpp uses what we wrote, files of both formats come back, damage is named."
import ctypes
import struct
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
import torch

from llm_quantize.errors import ImatrixError
from llm_quantize.calibration.imatrix import ImportanceMatrix, importance_of
from llm_quantize.models.transforms import GGUFTensor

Q, EXPERTS = "blk.0.attn_q.weight", "blk.1.ffn_up_exps.weight"

def random_matrix(names_shapes, seed=0, **more):
    g = torch.Generator().manual_seed(seed)
    sums = {name: (torch.randn(shape, generator=g).exp() * 1000).float().double() for name, shape in names_shapes.items()}
    counts = {name: torch.randint(1, 9000, shape[:1], generator=g).double() for name, shape in names_shapes.items()}
    return ImportanceMatrix(sums, counts, **more)

def same(a, b):
    return (a.names == b.names and all(torch.equal(a.sums[n], b.sums[n]) and torch.equal(a.counts[n], b.counts[n]) for n in a.names)
            and (a.datasets, a.chunk_count, a.chunk_size, a.notes) == (b.datasets, b.chunk_count, b.chunk_size, b.notes))

# ---- our file ------------------------------------------------------------------------------------------------------------------------------------

def test_round_trip_is_exact(tmp_path):
    matrix = random_matrix({Q: (1, 256), EXPERTS: (4, 64)}, datasets=("wiki", "code"), chunk_count=16, chunk_size=512,
                           notes={"llm_quantize.method": "activation", "llm_quantize.seed": 7, "llm_quantize.coverage": 0.25, "llm_quantize.list": ["a", "b"], "llm_quantize.flag": True})
    again = ImportanceMatrix.load(matrix.save(tmp_path / "m.imatrix"))
    assert same(matrix, again) and not list(tmp_path.glob("*.part"))
    assert same(again, ImportanceMatrix.load(again.save(tmp_path / "again.imatrix")))
    assert (tmp_path / "m.imatrix").read_bytes() == (tmp_path / "again.imatrix").read_bytes()
    again.sums[Q][0, 3] += 1
    assert not same(matrix, again)


def test_layout_of_the_file(tmp_path):
    "What llama.cpp's loader looks for: three keys, F32 pairs, sorted names, no architecture."
    random_matrix({"b.weight": (3, 8), "a.weight": (1, 4)}, chunk_count=2).save(tmp_path / "m.imatrix")
    reader = gguf.GGUFReader(tmp_path / "m.imatrix")
    assert [key for key in reader.fields if not key.startswith("GGUF.")] == ["general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"]
    assert reader.fields["general.type"].contents() == "imatrix" and reader.fields["imatrix.chunk_count"].types == [gguf.GGUFValueType.UINT32]
    assert reader.fields["imatrix.datasets"].types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING]
    assert [(t.name, t.tensor_type.name, t.shape.tolist()) for t in reader.tensors] == [
        ("a.weight.in_sum2", "F32", [4, 1]), ("a.weight.counts", "F32", [1, 1]), ("b.weight.in_sum2", "F32", [8, 3]), ("b.weight.counts", "F32", [1, 3])]

# ---- llama.cpp uses it ---------------------------------------------------------------------------------------------------------------------------

SHAPES = {"token_embd": (32, 256), "output": (32, 256), "blk.0.attn_q": (256, 256), "blk.0.attn_k": (256, 256), "blk.0.attn_v": (256, 256), "blk.0.attn_output": (256, 256),
          "blk.0.ffn_gate": (512, 256), "blk.0.ffn_up": (512, 256), "blk.0.ffn_down": (256, 512)}

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A one-layer F32 llama without a vocabulary."
    path, rng = tmp_path_factory.mktemp("tiny") / "f32.gguf", np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"context_length": 64, "embedding_length": 256, "block_count": 1, "feed_forward_length": 512, "attention.head_count": 4, "vocab_size": 32}.items(): writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    for name, shape in SHAPES.items(): writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"): writer.add_tensor(f"{name}.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

QUIET = llama_cpp.llama_log_callback(lambda *_: None)

def llama_quantize(source, target, vectors):
    "llama_model_quantize to Q4_K with these importance vectors; its result code."
    llama_cpp.llama_log_set(QUIET, None)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.pure = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_S, 1, True
    kept = {name: np.ascontiguousarray(v.numpy(), np.float32) for name, v in vectors.items()}
    entries = (llama_cpp.llama_model_imatrix_data * (len(kept) + 1))()
    for entry, (name, data) in zip(entries, kept.items()):
        entry.name, entry.data, entry.size = name.encode(), data.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), data.size
    if kept: params.imatrix = entries
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    return code, {t.name: np.array(t.data) for t in gguf.GGUFReader(target).tensors} if code == 0 else {}

def reference(x, importance):
    "ggml_quantize_chunk of one tensor to Q4_K, bytes."
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    out = np.zeros((x.shape[0], x.shape[1] // 256 * 144), np.uint8)
    pointer = lambda a: a.ctypes.data_as(ctypes.c_void_p)
    library.ggml_quantize_chunk.restype, library.ggml_quantize_chunk.argtypes = ctypes.c_size_t, [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
    library.ggml_quantize_chunk(int(gguf.GGMLQuantizationType.Q4_K), pointer(x), pointer(out), 0, *x.shape, pointer(np.ascontiguousarray(importance.numpy(), np.float32)))
    return out

def test_llama_quantize_uses_it(tiny, tmp_path):
    "A file saved, loaded and handed to llama_model_quantize gives the blocks that these very means give; another vector gives others."
    shapes = {f"{name}.weight": (1, shape[1]) for name, shape in SHAPES.items() if name.startswith("blk.")}
    matrix = ImportanceMatrix.load(random_matrix(shapes, datasets=("known",), chunk_count=3).save(tmp_path / "m.imatrix"))
    code, tensors = llama_quantize(tiny, tmp_path / "a.gguf", {name: matrix.importance(name) for name in matrix.names})
    assert code == 0
    weights = {t.name: np.array(t.data) for t in gguf.GGUFReader(tiny).tensors}
    for name in shapes:
        expected = (matrix.sums[name][0] / matrix.counts[name][0]).float()
        assert np.array_equal(tensors[name], reference(weights[name], expected)), name
        assert not np.array_equal(tensors[name], reference(weights[name], expected.flip(0))), name


def test_llama_quantize_refuses_another_models_matrix(tiny, tmp_path):
    matrix = random_matrix({Q: (1, 512)})
    assert llama_quantize(tiny, tmp_path / "a.gguf", {Q: matrix.importance(Q)})[0] != 0
    with pytest.raises(ImatrixError, match="rows of 200"): matrix.importance(Q, columns=200)
    with pytest.raises(ImatrixError, match="rows of 256"): random_matrix({EXPERTS: (2, 512)}).importance(EXPERTS, columns=256)

# ---- what it says --------------------------------------------------------------------------------------------------------------------------------

def test_importance():
    matrix = ImportanceMatrix({Q: torch.tensor([[2.0, 8.0]]).double(), EXPERTS: torch.tensor([[3.0, 6.0], [0.0, 0.0], [0.0, 0.0]]).double()},
                              {Q: torch.tensor([4.0]).double(), EXPERTS: torch.tensor([3.0, 0.0, 5.0]).double()})
    assert matrix.importance(Q).tolist() == [0.5, 2.0] and matrix.importance(Q).dtype == torch.float32
    assert matrix.importance(EXPERTS).tolist() == [[1.0, 2.0], [1.0, 1.0], [1.0, 1.0]]
    assert matrix.importance("output.weight") is None and matrix.names == [Q, EXPERTS]
    assert matrix.importance(Q, columns=1).tolist() == [[0.5], [2.0]]
    summary = matrix.to_dict()
    assert summary["entries"] == 2 and summary["tensors"][1] == {"name": EXPERTS, "shape": [3, 2], "tokens": 5, "unseen": 1}


def spec(name, *shape): return GGUFTensor(name, shape, ())


def test_of_gives_what_fits_a_tensor():
    matrix = random_matrix({Q: (1, 4), EXPERTS: (3, 4), "shared.weight": (1, 4), "parted.weight": (1, 12)})
    assert torch.equal(matrix.of(spec(Q, 5, 4)), matrix.importance(Q))
    assert torch.equal(matrix.of(spec(Q, 5, 4), 0), matrix.importance(Q))
    assert torch.equal(matrix.of(spec(EXPERTS, 3, 5, 4)), matrix.importance(EXPERTS))
    assert torch.equal(matrix.of(spec(EXPERTS, 3, 5, 4), 1), matrix.importance(EXPERTS)[1])
    assert torch.equal(matrix.of(spec("shared.weight", 3, 5, 4), 2), matrix.importance("shared.weight"))
    assert torch.equal(matrix.of(spec("parted.weight", 3, 5, 4), 2), matrix.importance("parted.weight")[8:])
    assert torch.equal(importance_of(matrix, spec(EXPERTS, 3, 5, 4), 2), matrix.importance(EXPERTS)[2])
    assert matrix.of(spec("absent.weight", 5, 4)) is None and importance_of(None, spec(Q, 5, 4)) is None


@pytest.mark.parametrize("name, shape", [(Q, (5, 3)), (Q, (5, 2)), (Q, (5, 8)), (EXPERTS, (5, 4)), (EXPERTS, (2, 5, 4)), (EXPERTS, (6, 5, 2))])
def test_of_refuses_another_shape(name, shape):
    matrix = random_matrix({Q: (1, 4), EXPERTS: (3, 4)})
    with pytest.raises(ImatrixError, match="values for .* whose shape is") as caught: matrix.of(spec(name, *shape))
    assert name in str(caught.value) and "this very model" in caught.value.suggestion
    with pytest.raises(ImatrixError): importance_of(matrix, spec(name, *shape), 0)


def test_merge_is_addition():
    a, b = random_matrix({Q: (1, 16), EXPERTS: (2, 8)}, 1, datasets=("x",), chunk_count=3), random_matrix({Q: (1, 16), "only.weight": (1, 4)}, 2, datasets=("y", "x"), chunk_count=5)
    both = a.merge(b)
    assert torch.equal(both.sums[Q], a.sums[Q] + b.sums[Q]) and torch.equal(both.counts[Q], a.counts[Q] + b.counts[Q])
    assert torch.equal(both.sums[EXPERTS], a.sums[EXPERTS]) and torch.equal(both.counts["only.weight"], b.counts["only.weight"])
    assert (both.datasets, both.chunk_count) == (("x", "y"), 8) and same(a.merge(b).merge(a), a.merge(a).merge(b))
    with pytest.raises(ImatrixError, match="shape"): a.merge(random_matrix({Q: (1, 17)}))

# ---- the older format ----------------------------------------------------------------------------------------------------------------------------

def legacy(entries, chunks=None, dataset=None):
    "Bytes of a .dat as llama.cpp wrote them: mean times calls."
    out = struct.pack("<i", len(entries))
    for name, (calls, means) in entries.items():
        out += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(means)) + np.asarray([m * max(calls, 1) for m in means], "<f4").tobytes()
    if chunks is not None: out += struct.pack("<i", chunks)
    if dataset is not None: out += struct.pack("<i", len(dataset)) + dataset.encode()
    return out

@pytest.mark.parametrize("chunks, dataset", [(None, None), (5, None), (5, "wiki.txt")])
def test_legacy(chunks, dataset, tmp_path):
    (tmp_path / "m.dat").write_bytes(legacy({Q: (5, [0.25, 3.0, 0.0]), "uncalled.weight": (0, [0.5, 2.0]), EXPERTS: (2, [1.0, 2.0, 3.0, 4.0])}, chunks, dataset))
    matrix = ImportanceMatrix.load(tmp_path / "m.dat")
    assert matrix.importance(Q).tolist() == [0.25, 3.0, 0.0] and matrix.importance("uncalled.weight").tolist() == [0.5, 2.0]
    assert matrix.importance(EXPERTS, columns=2).tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert (matrix.chunk_count, matrix.datasets) == (chunks or 0, (dataset,) if dataset else ())
    again = ImportanceMatrix.load(matrix.save(tmp_path / "m.imatrix"))
    assert torch.equal(again.importance(Q), matrix.importance(Q)) and again.counts[Q].item() == 5 * 512


def test_legacy_cut_anywhere(tmp_path):
    whole = legacy({Q: (5, [0.25, 3.0]), EXPERTS: (2, [1.0, 2.0])}, 5, "wiki")
    ends = {len(legacy({Q: (5, [0.25, 3.0]), EXPERTS: (2, [1.0, 2.0])})), len(whole) - 8, len(whole)}
    for cut in range(len(whole) + 1):
        (tmp_path / "m.dat").write_bytes(whole[:cut])
        if cut in ends: ImportanceMatrix.load(tmp_path / "m.dat")
        else:
            with pytest.raises(ImatrixError): ImportanceMatrix.load(tmp_path / "m.dat")

# ---- bad input -----------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sums, counts, message", [
    ([[1.0, float("nan")]], [1.0], "not finite"), ([[1.0, float("inf")]], [1.0], "not finite"), ([[1.0]], [float("nan")], "not finite"), ([[-1.0]], [1.0], "negative"), ([[1.0]], [-1.0], "negative"),
    ([1.0], [1.0], "shape"), ([[1.0]], [1.0, 2.0], "shape"), ([[]], [1.0], "shape")])
def test_values_that_cannot_be(sums, counts, message):
    with pytest.raises(ImatrixError, match=message) as caught: ImportanceMatrix({Q: torch.tensor(sums).double()}, {Q: torch.tensor(counts).double()})
    assert Q in str(caught.value) and caught.value.suggestion and caught.value.exit_code == 10


def write(path, keys=("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"), tensors=()):
    writer = gguf.GGUFWriter(path, "llama")
    for key in keys: writer.add_array(key, ["t"]) if key.endswith("datasets") else writer.add_uint32(key, 1)
    for name, data in tensors: writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

SUMS, COUNTS = ("a.weight.in_sum2", np.ones((1, 4), np.float32)), ("a.weight.counts", np.ones((1, 1), np.float32))

@pytest.mark.parametrize("options, message", [
    ({"tensors": [("token_embd.weight", np.ones((2, 4), np.float32))]}, "no importance matrix"), ({"tensors": [SUMS]}, "lacks its counts"), ({"tensors": [COUNTS]}, "lacks its sums"),
    ({"tensors": [SUMS, COUNTS], "keys": ("imatrix.datasets", "imatrix.chunk_size")}, "lacks imatrix.chunk_count"), ({"tensors": [SUMS, (COUNTS[0], np.ones((3, 1), np.float32))]}, "4 sums for 3 counts"),
    ({"tensors": [(SUMS[0], SUMS[1].astype(np.float16)), COUNTS]}, "not in F32"), ({"tensors": [(SUMS[0], SUMS[1] * np.float32("inf")), COUNTS]}, "not finite")],
    ids=["model", "no counts", "no sums", "no key", "odd counts", "f16", "inf"])
def test_other_gguf_files(options, message, tmp_path):
    with pytest.raises(ImatrixError, match=message): ImportanceMatrix.load(write(tmp_path / "m.gguf", **options))


def test_a_file_with_an_architecture_is_read(tmp_path):
    assert ImportanceMatrix.load(write(tmp_path / "m.gguf", tensors=[SUMS, COUNTS])).importance("a.weight").tolist() == [1.0] * 4


def test_gguf_cut_anywhere(tmp_path):
    whole = random_matrix({Q: (1, 64)}).save(tmp_path / "m.imatrix").read_bytes()
    for cut in [*range(0, len(whole) - 40, 7), len(whole) - 40]:
        (tmp_path / "cut.imatrix").write_bytes(whole[:cut])
        with pytest.raises(ImatrixError): ImportanceMatrix.load(tmp_path / "cut.imatrix")


def test_missing_and_unwritable(tmp_path):
    with pytest.raises(ImatrixError, match="no importance matrix at"): ImportanceMatrix.load(tmp_path / "none.imatrix")
    with pytest.raises(ImatrixError, match="no importance matrix at"): ImportanceMatrix.load(tmp_path)
    with pytest.raises(ImatrixError, match="cannot write"): random_matrix({Q: (1, 4)}).save(tmp_path / "no" / "such" / "folder")
    with pytest.raises(ImatrixError, match="too long"): random_matrix({"x" * 60: (1, 4)}).save(tmp_path / "m.imatrix")
    with pytest.raises(ImatrixError, match="without entries"): ImportanceMatrix({}, {}).save(tmp_path / "m.imatrix")
    assert list(tmp_path.iterdir()) == []

# ---- statistics and display ----------------------------------------------------------------------------------------------------------------------

def plain_statistics(a):
    "llama-imatrix --show-statistics, written out with numpy on the mean squares of one tensor."
    p = a[a > 0] / a.sum()
    return {"total": a.sum(), "min": a.min(), "max": a.max(), "mean": a.sum() / a.size, "std": np.sqrt((a * a).sum() / a.size - (a.sum() / a.size) ** 2), "active": 1 - (a <= 1e-5).sum() / a.size,
            "entropy": -(p * np.log2(p)).sum(), "entropy_normalized": -(p * np.log2(p)).sum() / np.log2(a.size), "zd": ((a - a.mean()) / a.std() > 1).sum() / a.size}

def test_statistics_by_their_formulas():
    names = {f"blk.{i}.{kind}.weight": (1, 256) for i in (0, 1, 10) for kind in ("attn_q", "ffn_down")} | {"blk.1.ffn_up_exps.weight": (3, 64), "output.weight": (1, 256)}
    matrix = random_matrix(names)
    matrix.sums["blk.1.attn_q.weight"][0, :40] = 0
    found = {s.name: s for s in matrix.statistics()}
    assert list(found)[:2] == ["blk.0.attn_q.weight", "blk.0.ffn_down.weight"] and list(found)[-1] == "output.weight" and list(found)[-2].startswith("blk.10.")
    for name, s in found.items():
        a = (matrix.sums[name] / matrix.counts[name][:, None]).flatten().numpy()
        for key, value in plain_statistics(a).items(): assert getattr(s, key) == pytest.approx(value, rel=1e-9), (name, key)
        assert getattr(s, "std") != pytest.approx(plain_statistics(a[1:])["std"], rel=1e-9)
    a, b = (matrix.sums[f"blk.{i}.ffn_down.weight"][0].numpy() for i in (0, 1))
    assert found["blk.1.ffn_down.weight"].cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert found["blk.0.attn_q.weight"].cosine is found["blk.10.attn_q.weight"].cosine is found["output.weight"].cosine is None


def test_layers_and_whole():
    matrix = random_matrix({"blk.0.attn_q.weight": (1, 64), "blk.0.ffn_down.weight": (1, 192), "blk.1.attn_q.weight": (1, 64)})
    layers, every = matrix.layer_statistics(), np.concatenate([(matrix.sums[n] / matrix.counts[n][:, None]).flatten().numpy() for n in matrix.names])
    assert [row["layer_name"] for row in layers] == ["blk.0", "blk.1"]
    assert layers[0]["importance"] == pytest.approx(every[:256].mean()) and layers[0]["importance"] != pytest.approx(every[:64].mean())
    assert matrix.global_statistics() == pytest.approx({"min": every.min(), "max": every.max(), "mean": every.mean(), "std": every.std()})
    assert {"global_statistics", "layers", "tensors"} <= set(matrix.to_dict())


def test_unseen_experts_do_not_count():
    matrix = ImportanceMatrix({EXPERTS: torch.tensor([[2.0, 6.0], [0.0, 0.0]]).double()}, {EXPERTS: torch.tensor([2.0, 0.0]).double()})
    [s] = matrix.statistics()
    assert (s.channels, s.mean, s.max, s.active) == (2, 2.0, 3.0, 1.0)
    nothing = ImportanceMatrix({EXPERTS: torch.zeros(2, 4).double()}, {EXPERTS: torch.zeros(2).double()})
    assert nothing.statistics()[0].channels == 0 and nothing._repr_html_() and nothing.global_statistics()["mean"] == 0


def test_display():
    matrix = random_matrix({f"blk.{i}.{kind}.weight": (1, 32) for i in range(96) for kind in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}, datasets=("a<b&c",), chunk_count=9)
    html = matrix._repr_html_()
    assert "a&lt;b&amp;c" in html and html.count("<tr>") == 1 + 25 and len(html) < 25_000 and html.count("M") >= 96 * 7
    from xml.etree import ElementTree
    svg = ElementTree.fromstring(html[html.index("<svg"):html.index("</svg>") + 6])
    assert sum(path.get("d").count("z") for path in svg.iter("{http://www.w3.org/2000/svg}path")) == 96 * 7
    assert matrix._repr_markdown_().count("\n| ") == 1 + 25 and "blk.95" in matrix._repr_markdown_()
    assert "output" in random_matrix({"output.weight": (1, 8)})._repr_html_()
