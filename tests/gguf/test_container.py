"GGUF files: our bytes against gguf.GGUFWriter's, our reader against gguf.GGUFReader, llama.cpp on whole and split files, and everything that can be wrong with a file or a disk."
import errno
import os
import random
import resource
import shutil
import signal
import struct
import tempfile
import tracemalloc
from collections import namedtuple
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from llm_quantize.models.architectures import architecture
from llm_quantize.models.checkpoint import open_checkpoint
from llm_quantize.errors import ArgumentError, ConversionError, LLMQuantizeError, ModelNotFoundError, ValidationError
from llm_quantize.gguf.container import gguf_bytes, write_gguf
from llm_quantize.gguf.reader import open_gguf
from llm_quantize.quality.llama_cpp_model import open_llama
from llm_quantize.quants.qtypes import QTYPES, qtype
from llm_quantize.models.tokenizers import tokenizer_metadata

METADATA = {"general.architecture": "llama", "general.name": "tëst ✓", "llama.block_count": 3, "llama.rope.freq_base": 1e6, "general.flag": True, "general.off": False,
            "tokenizer.ggml.tokens": ["a", "", "日本", "x" * 300], "tokenizer.ggml.scores": np.array([0.5, -1, 3e38], np.float32),
            "tokenizer.ggml.token_type": np.array([1, 2, -7], np.int32), "a.u8": np.uint8(255), "a.i8": np.int8(-5), "a.u16": np.uint16(65535), "a.i16": np.int16(-5), "a.i32": np.int32(-5),
            "a.u64": np.uint64(2**63), "a.i64": np.int64(-2**60), "a.f64": np.float64(0.1), "a.empty": "", "a.bools": np.array([True, False, True]), "a.large": 2**32 - 1}
INFOS = [("token_embd.weight", (100, 256), "Q8_0"), ("blk.0.attn_q.weight", (256, 256), "Q4_K"), ("blk.0.attn_norm.weight", (3,), "F32"),
         ("blk.0.ffn_up_exps.weight", (2, 5, 32), "Q4_0"), ("blk.0.ffn_down.weight", (7, 512), "Q6_K"), ("output.weight", (10, 5), "BF16"), ("extra", (2, 2, 2, 2), "F16")]


def size_of(shape, kind): return int(np.prod(shape[:-1])) * qtype(kind).row_bytes(shape[-1])


def produce(i): # bytes of a tensor, the same at each call
    return torch.randint(0, 256, (size_of(*INFOS[i][1:]),), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)


@pytest.fixture
def written(tmp_path): return write_gguf(tmp_path / "model.gguf", METADATA, INFOS, produce)[0]


def same(a, b): # metadata, value for value and type for type
    return list(a) == list(b) and all(type(a[k]) is type(b[k]) and (np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype if isinstance(a[k], np.ndarray) else a[k] == b[k] or
                                      np.float32(a[k]) == np.float32(b[k])) for k in a)


# ---- against the gguf package ------------------------------------------------------------------------------

KINDS = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}
NUMPY = {"uint8": "UINT8", "int8": "INT8", "uint16": "UINT16", "int16": "INT16", "uint32": "UINT32", "int32": "INT32", "float32": "FLOAT32", "bool": "BOOL", "uint64": "UINT64", "int64": "INT64",
         "float64": "FLOAT64"}


def reference(path, metadata, infos):
    "The same file, by the gguf package."
    writer = GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture": continue
        if isinstance(value, list): writer.add_key_value(key, value, GGUFValueType.ARRAY, GGUFValueType.STRING)
        elif isinstance(value, np.ndarray): writer.add_key_value(key, value.tolist(), GGUFValueType.ARRAY, GGUFValueType[NUMPY[value.dtype.name]])
        elif isinstance(value, np.generic): writer.add_key_value(key, value.item(), GGUFValueType[NUMPY[value.dtype.name]])
        else: writer.add_key_value(key, value, KINDS[type(value)])
    for i, (name, shape, kind) in enumerate(infos):
        row = (*shape[:-1], qtype(kind).row_bytes(shape[-1]))
        writer.add_tensor(name, produce(i).numpy().reshape(row), raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_bytes_of_the_gguf_package(written, tmp_path):
    reference(tmp_path / "reference.gguf", METADATA, INFOS)
    expected = (tmp_path / "reference.gguf").read_bytes()
    assert written.read_bytes() == expected
    other = write_gguf(tmp_path / "other.gguf", {**METADATA, "llama.block_count": 4}, INFOS, produce)[0]
    assert other.read_bytes() != expected and len(other.read_bytes()) == len(expected)


def test_reader_of_the_gguf_package(written):
    reader = GGUFReader(written)
    for key, value in METADATA.items():
        found = reader.fields[key].contents()
        assert np.array_equal(np.asarray(found, getattr(value, "dtype", None)), value) if isinstance(value, np.ndarray) else found == value or np.float32(found) == np.float32(value), key
    for i, ((name, shape, kind), tensor) in enumerate(zip(INFOS, reader.tensors, strict=True)):
        assert (tensor.name, tuple(tensor.shape[::-1]), tensor.tensor_type.name) == (name, shape, kind)
        assert tensor.data.tobytes() == produce(i).numpy().tobytes()


def test_read_back(written):
    file = open_gguf(written)
    assert same(file.metadata, METADATA)
    assert file.tensors == {name: (kind, shape) for name, shape, kind in INFOS}
    for i, (name, shape, kind) in enumerate(INFOS):
        assert file.data(name).dtype == torch.uint8 and file.data(name).shape == (int(np.prod(shape[:-1])), qtype(kind).row_bytes(shape[-1]))
        assert torch.equal(file.data(name).flatten(), produce(i))
    assert file.bytes == written.stat().st_size and file.parameters == sum(int(np.prod(shape)) for _, shape, _ in INFOS)
    assert "7 tensors" in repr(file) and open_gguf(file) is file


@pytest.mark.parametrize("kind", QTYPES)
def test_decode(kind, tmp_path):
    "Decoding a file of each type equals the gguf package's reading of it."
    infos = [("w", (3, 512), kind)]
    weights = torch.randn(3, 512, generator=torch.Generator().manual_seed(1)).numpy()
    try: raw = gguf.quantize(weights, GGMLQuantizationType[kind])
    except NotImplementedError: # the package decodes this type but cannot encode it: bytes whose f16 scales are ordinary numbers
        raw = np.random.default_rng(0).integers(0, 60, (3, qtype(kind).row_bytes(512)), dtype=np.uint8)
    path, = write_gguf(tmp_path / "w.gguf", {"general.architecture": "llama"}, infos, lambda i: torch.from_numpy(np.ascontiguousarray(raw).view(np.uint8)))
    reader = GGUFReader(path).tensors[0]
    expected = gguf.dequantize(reader.data, reader.tensor_type)
    found = open_gguf(path).decode("w")
    assert found.dtype == torch.float32 and found.shape == (3, 512) and np.array_equal(found.numpy(), expected)


def test_reads_other_alignments(tmp_path):
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_custom_alignment(128)
    for name in "ab": writer.add_tensor(name, np.arange(5, dtype=np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    file = open_gguf(tmp_path / "a.gguf")
    assert file.decode("b").tolist() == [0, 1, 2, 3, 4] and file.metadata["general.alignment"] == 128


# ---- llama.cpp ---------------------------------------------------------------------------------------------

def write_sample(folder, sample_model, **options):
    "The bundled model as F32."
    checkpoint = open_checkpoint(sample_model)
    row = architecture(checkpoint.config)
    tensors = row.tensors(checkpoint)
    metadata = {**row.metadata(checkpoint.config, "sample"), **tokenizer_metadata(checkpoint.path, checkpoint.config)}
    infos = [(t.name, t.shape, "F32") for t in tensors]
    return write_gguf(folder / "sample.gguf", metadata, infos, lambda i: tensors[i].load(checkpoint).float().view(torch.uint8), **options), metadata, infos


def logits(path):
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: make test installs it")
    llama = open_llama(path, n_ctx=64, n_threads=2, logits_all=True)
    llama.eval(list(range(300, 348)))
    found = np.array(llama.scores[:48])
    llama.close()
    return found


def test_llama_cpp_runs_whole_and_split(sample_model, tmp_path):
    (tmp_path / "whole").mkdir()
    whole, metadata, infos = write_sample(tmp_path / "whole", sample_model)
    shards, *_ = write_sample(tmp_path, sample_model, max_shard_bytes=5_000_000)
    assert [p.name for p in shards] == [f"sample-{i + 1:05d}-of-{len(shards):05d}.gguf" for i in range(len(shards))] and len(shards) == 4
    assert sum(p.stat().st_size for p in shards) == gguf_bytes(metadata, infos, max_shard_bytes=5_000_000) and whole[0].stat().st_size == gguf_bytes(metadata, infos)
    expected = logits(whole[0])
    assert np.abs(expected).max() > 1 and np.array_equal(logits(shards[0]), expected)
    shutil.copy(shards[0], tmp_path / "keep")
    raw = bytearray(shards[-1].read_bytes())
    raw[-4 * 4096 * 128:] = bytes(4 * 4096 * 128) # deliberate corruption: half of the last shard's last matrix
    shards[-1].write_bytes(raw)
    assert not np.array_equal(logits(shards[0]), expected)


# ---- shards and sizes --------------------------------------------------------------------------------------

@pytest.mark.parametrize("limit", [None, 1, 3_000, 20_000, 40_000, 10**9])
def test_size_is_known_before(limit, tmp_path):
    paths = write_gguf(tmp_path / "m.gguf", METADATA, INFOS, produce, max_shard_bytes=limit)
    assert sum(p.stat().st_size for p in paths) == gguf_bytes(METADATA, INFOS, max_shard_bytes=limit)
    assert (len(paths) == 1) == (limit in (None, 10**9)) and (limit != 1 or len(paths) == len(INFOS))
    file = open_gguf(paths[-1])
    assert same(file.metadata, METADATA) and list(file.tensors) == [name for name, *_ in INFOS]
    assert all(torch.equal(file.data(name).flatten(), produce(i)) for i, (name, *_) in enumerate(INFOS))
    for path in paths:
        if limit and path.stat().st_size > limit: assert len(GGUFReader(path).tensors) == 1


def test_split_keys(tmp_path):
    "The three numbers have the widths that llama.cpp reads: u16, u16, i32; later shards repeat the architecture and nothing else."
    paths = write_gguf(tmp_path / "m.gguf", METADATA, INFOS, produce, max_shard_bytes=20_000)
    for no, path in enumerate(paths):
        fields = GGUFReader(path).fields
        assert [fields[f"split.{k}"].types[0].name for k in ("no", "count", "tensors.count")] == ["UINT16", "UINT16", "INT32"]
        assert [fields[f"split.{k}"].contents() for k in ("no", "count", "tensors.count")] == [no, len(paths), len(INFOS)]
        assert ("general.name" in fields) == (no == 0) and fields["general.architecture"].contents() == "llama"


def test_incomplete_splits(tmp_path):
    paths = write_gguf(tmp_path / "m.gguf", METADATA, INFOS, produce, max_shard_bytes=20_000)
    assert len(paths) == 3
    alone = tmp_path / "alone.gguf"
    shutil.copy(paths[1], alone)
    with pytest.raises(ModelNotFoundError, match="not named NAME-00001-of-00003.gguf"): open_gguf(alone)
    shutil.copy(paths[0], tmp_path / "saved")
    shutil.copy(paths[1], paths[0])
    with pytest.raises(ModelNotFoundError, match="tensors, not 7"): open_gguf(paths[2])
    shutil.copy(tmp_path / "saved", paths[0])
    paths[2].unlink()
    with pytest.raises(ModelNotFoundError, match="m-00003-of-00003.gguf missing"): open_gguf(paths[0])


# ---- producers ---------------------------------------------------------------------------------------------

def left(folder): return sorted(p.name for p in folder.iterdir())


def test_pieces_and_progress(written, tmp_path):
    "A tensor may come in pieces; progress counts every byte of the file."
    seen = []
    other, = write_gguf(tmp_path / "pieces.gguf", METADATA, INFOS, lambda i: iter(produce(i).split(1000)), progress=lambda done, total: seen.append((done, total)))
    assert other.read_bytes() == written.read_bytes()
    assert len(seen) == len(INFOS) and seen[-1] == (written.stat().st_size,) * 2 and seen == sorted(seen)


@pytest.mark.parametrize("stop", [ValidationError("NaN in blk.0"), RuntimeError("device lost"), KeyboardInterrupt(), MemoryError(), OSError(errno.EIO, "read failed")], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("limit", [None, 20_000], ids=["whole", "split"])
def test_producer_stops_midway(stop, limit, tmp_path):
    "Nothing is left, an older file of that name is untouched, and the error arrives as it was raised."
    (tmp_path / "m.gguf").write_text("older")
    def producer(i):
        if i == 5: raise stop
        return produce(i)
    with pytest.raises(type(stop)) as caught: write_gguf(tmp_path / "m.gguf", METADATA, INFOS, producer, max_shard_bytes=limit)
    assert caught.value is stop and left(tmp_path) == ["m.gguf"] and (tmp_path / "m.gguf").read_text() == "older"


@pytest.mark.parametrize("made, message", [
    (lambda i: produce(i)[:-1], "bytes where its shape"), (lambda i: torch.cat([produce(i), produce(i)[:1]]), "bytes where its shape"),
    (lambda i: produce(i).float(), "float32"), (lambda i: [], "0 bytes"), (lambda i: [produce(i), produce(i)], "bytes where its shape")], ids=["short", "long", "floats", "nothing", "twice"])
def test_producer_of_something_else(made, message, tmp_path):
    with pytest.raises(ValidationError, match=f"token_embd.weight.*{message}"): write_gguf(tmp_path / "m.gguf", METADATA, INFOS, made)
    assert left(tmp_path) == []


def test_older_file_is_replaced(tmp_path):
    (tmp_path / "m.gguf").write_text("older")
    path, = write_gguf(str(tmp_path / "m.gguf"), METADATA, INFOS, produce)
    assert len(open_gguf(path).tensors) == 7 and left(tmp_path) == ["m.gguf"]


def test_shards_are_placed_all_or_none(tmp_path):
    "A name that is refused, before writing or at the very end, leaves no incomplete set."
    count = len(write_gguf(tmp_path / "m.gguf", METADATA, INFOS, produce, max_shard_bytes=20_000))
    for path in tmp_path.iterdir(): path.unlink()
    last = tmp_path / f"m-{count:05d}-of-{count:05d}.gguf"
    last.mkdir()
    with pytest.raises(LLMQuantizeError, match="is a directory"): write_gguf(tmp_path / "m.gguf", METADATA, INFOS, produce, max_shard_bytes=20_000)
    last.rmdir()
    def late(i):
        if i == len(INFOS) - 1:
            last.mkdir()
            (last / "inside").touch()
        return produce(i)
    with pytest.raises(LLMQuantizeError, match="could not take its name"): write_gguf(tmp_path / "m.gguf", METADATA, INFOS, late, max_shard_bytes=20_000)
    assert left(tmp_path) == [last.name]


def test_memory_is_bounded(tmp_path):
    "Writing and reading 32 MB in tensors of 2 MB holds a few of them at most."
    infos = [(f"blk.{i}.w.weight", (1024, 512), "F32") for i in range(16)]
    tracemalloc.start()
    try:
        path, = write_gguf(tmp_path / "m.gguf", METADATA, infos, lambda i: torch.from_numpy(np.full(2 * 2**20, i, np.uint8)))
        file = open_gguf(path)
        for name in file.tensors: file.data(name)
        assert tracemalloc.get_traced_memory()[1] < 3 * 2 * 2**20
    finally: tracemalloc.stop()


# ---- metadata that cannot be written -----------------------------------------------------------------------

@pytest.mark.parametrize("value", [-1, 2**32, None, [], [1, 2], ["a", 1], {}, b"raw", np.zeros((2, 2)), np.zeros(0, np.float32), np.complex64(1), 1j, np.array(["a"]), torch.zeros(2)], ids=repr)
def test_value_without_a_type(value, tmp_path):
    with pytest.raises(ValidationError, match="a.key"): write_gguf(tmp_path / "m.gguf", {**METADATA, "a.key": value}, INFOS, produce)
    assert left(tmp_path) == []


@pytest.mark.parametrize("info, error", [(("w", (2, 100), "Q4_K"), ArgumentError), (("w", (2, 2), "Q9_K"), ArgumentError), (("w", (), "F32"), ValidationError), (("w", (0, 32), "F32"), ValidationError),
                                         (("w", (1,) * 5, "F32"), ValidationError), (("n" * 64, (2,), "F32"), ValidationError), (INFOS[0], ValidationError)],
                         ids=["rows", "type", "scalar", "empty", "five dimensions", "long name", "twice"])
def test_tensor_that_cannot_be_written(info, error, tmp_path):
    with pytest.raises(error): write_gguf(tmp_path / "m.gguf", METADATA, INFOS + [info], produce)
    assert left(tmp_path) == []


# ---- disks -------------------------------------------------------------------------------------------------

def test_no_space(tmp_path, monkeypatch):
    needed = gguf_bytes(METADATA, INFOS)
    free = needed - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(10**12, 0, free))
    called = []
    with pytest.raises(LLMQuantizeError, match=f"{needed:,} bytes needed, {free:,} available") as caught: write_gguf(tmp_path / "m.gguf", METADATA, INFOS, called.append)
    assert caught.value.exit_code == 1 and caught.value.suggestion and not called and left(tmp_path) == []
    free = needed
    write_gguf(tmp_path / "m.gguf", METADATA, INFOS, produce)


def test_disk_fills_up_on_the_way(tmp_path):
    "The system refuses a write (here by a limit on file size): one clear error, nothing left."
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
    try:
        with pytest.raises(LLMQuantizeError, match="writing m.gguf failed: File too large"): write_gguf(tmp_path / "m.gguf", METADATA, INFOS, produce)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert left(tmp_path) == []


def test_directories_that_cannot_be_written():
    "No such directory, a file in its place, a directory as the file, one without permission."
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / "file").write_text("")
        os.mkdir(folder / "m.gguf")
        for path, message in ((folder / "none" / "m.gguf", "no directory"), (folder / "file" / "m.gguf", "no directory"), (folder / "m.gguf", "is a directory")):
            with pytest.raises(LLMQuantizeError, match=message) as caught: write_gguf(path, METADATA, INFOS, produce)
            assert caught.value.exit_code == 1 and caught.value.suggestion
        closed = folder / "closed"
        closed.mkdir(mode=0o555)
        folder.chmod(0o755)
        root = os.geteuid() == 0
        if root: os.seteuid(65534) # permissions do not bind root
        try:
            with pytest.raises(LLMQuantizeError, match="cannot write in .*closed: Permission denied"): write_gguf(closed / "m.gguf", METADATA, INFOS, produce)
        finally:
            if root: os.seteuid(0)
        assert left(closed) == []
    finally: shutil.rmtree(folder)


# ---- files that are no GGUF, or no longer ------------------------------------------------------------------

def refused(path, content):
    path.write_bytes(content)
    with pytest.raises(LLMQuantizeError) as caught: open_gguf(path)
    assert caught.value.suggestion and str(path) in caught.value.message and "\n" not in caught.value.message
    return caught.value


def test_truncated_anywhere(written, tmp_path):
    "Cut at every byte of the front, and at many of the data: always refused, never opened."
    whole = written.read_bytes()
    for n in [*range(1500), *range(1500, len(whole) - 32, 997)]:
        assert isinstance(refused(tmp_path / "cut.gguf", whole[:n]), ModelNotFoundError)


@pytest.mark.parametrize("content, error, message", [
    (b"", ModelNotFoundError, "0 bytes"), (b"GG", ModelNotFoundError, "2 bytes"), (b"PK\3\4" + bytes(100), ConversionError, "not a GGUF file"), (b"garbage" * 100, ConversionError, "not a GGUF file"),
    (bytes(5000), ConversionError, "not a GGUF file"), (b"GGUF" + struct.pack("<I", 1) + bytes(100), ConversionError, "version 1"), (b"GGUF" + struct.pack(">I", 3) + bytes(100), ConversionError, "version 50331648"),
    (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 1) + bytes(100), ModelNotFoundError, "claims"), (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + b"\xff" * 100, ModelNotFoundError, "ends at byte")],
    ids=["empty", "two bytes", "zip", "text", "zeros", "version 1", "big endian", "many tensors", "long string"])
def test_not_a_gguf(content, error, message, tmp_path):
    found = refused(tmp_path / "bad.gguf", content)
    assert isinstance(found, error) and message in found.message


def test_random_damage(written, tmp_path):
    "A thousand files with damaged bytes in the front: each opens or is refused with one of our errors, at once."
    whole, rng, opened = written.read_bytes(), random.Random(0), 0
    for _ in range(1000):
        raw = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 8])): raw[rng.randrange(4, 1500)] = rng.choice([0, 1, 255, 127, rng.randrange(256)])
        path = tmp_path / "damaged.gguf"
        path.write_bytes(raw)
        try:
            file = open_gguf(path)
            for name in file.tensors: file.data(name)
            opened += 1
        except LLMQuantizeError: pass
    assert 50 < opened < 950


def test_missing_file_and_tensor(written, tmp_path):
    with pytest.raises(ModelNotFoundError, match="no file"): open_gguf(tmp_path / "none.gguf")
    with pytest.raises(ModelNotFoundError, match="no file"): open_gguf(tmp_path)
    with pytest.raises(ModelNotFoundError, match="no tensor blk.9"): open_gguf(written).data("blk.9.attn_q.weight")
