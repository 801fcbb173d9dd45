"Checkpoint to GGUF, the whole way: llama.cpp runs the file, importance counts, and nothing is left half-written."
import hashlib
import json
import shutil
import subprocess
import sys

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize.models.job import Job
from llm_quantize.quality.llama_cpp_model import open_llama
from llm_quantize.quants.blocks import ENCODERS
from llm_quantize.models.checkpoint import Checkpoint, sample_path
from llm_quantize.quants.codec import FLOATS, decode, encode_tensor
from llm_quantize.errors import ArgumentError, ConversionError, ImatrixError, LLMQuantizeError, ValidationError
from llm_quantize.gguf.reader import open_gguf
from llm_quantize.calibration.analysis import cached_imatrix
from llm_quantize.gguf.plan import plan_gguf
from llm_quantize.gguf.pipeline import check_finite, relative_error
from llm_quantize.api import quantize
from llm_quantize.gguf.mixes import find_mix

PROMPT = "The history of the Roman empire begins with"


def greedy(path, tokens=24):
    "Ids that llama.cpp generates from PROMPT, and the ids of PROMPT itself."
    model = open_llama(path, n_ctx=256, seed=0)
    prompt = model.tokenize(PROMPT.encode(), add_bos=True)
    out = []
    for token in model.generate(prompt, temp=0.0, top_k=1):
        out.append(token)
        if len(out) == tokens: break
    return prompt, out


def test_llama_cpp_says_what_transformers_says(tmp_path):
    from transformers import AutoModelForCausalLM
    result = quantize(sample_path(), "gguf", "F32", output_dir=tmp_path)
    prompt, got = greedy(result.output_path)
    model = AutoModelForCausalLM.from_pretrained(sample_path(), dtype=torch.float32)
    meant = model.generate(torch.tensor([prompt]), max_new_tokens=len(got), do_sample=False, pad_token_id=0)[0, len(prompt):].tolist()
    assert got == meant


@pytest.mark.parametrize("level", ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q3_K_L", "Q2_K", "BF16", "F16",
                                   "IQ4_XS", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "TQ2_0", "TQ1_0", "TERNARY"])
def test_every_level_runs_in_llama_cpp(tmp_path_factory, tmp_path, monkeypatch, level):
    base = find_mix(level).base
    if base not in FLOATS and base not in ENCODERS: pytest.skip(f"{base} has no encoder in this version")
    monkeypatch.setenv("LLM_QUANTIZE_IMATRIX_CACHE", str(tmp_path_factory.getbasetemp() / "imatrix"))
    result = quantize(sample_path(), "gguf", level.lower(), output_dir=tmp_path, calibration_samples=4, force=level.startswith("T"))
    _, out = greedy(result.output_path, 8)
    assert len(out) == 8 and result.quantization_level == level
    read = gguf.GGUFReader(result.output_path)
    assert [(t.name, t.tensor_type.name) for t in read.tensors] == [(t["name"], t["type"]) for t in result.tensors]
    assert result.file_size == sum(t["bytes"] for t in result.tensors) + read.data_offset + sum(-t["bytes"] % 32 for t in result.tensors)


def test_what_is_decoded_is_near_what_was_meant(tmp_path):
    result = quantize(sample_path(), "gguf", "Q4_K_M", output_dir=tmp_path)
    file, job = open_gguf(result.output_path), plan_gguf(Job(sample_path()), "Q4_K_M")
    for spec, record in zip(job.specs, result.tensors):
        meant, got = spec.load(job.checkpoint).float(), file.decode(spec.name).reshape(spec.shape)
        error = ((meant - got).square().sum() / meant.square().sum()).item()
        assert error == pytest.approx(record["error"], rel=0.1, abs=1e-12) and error < {"F32": 1e-9, "Q6_K": 1e-3}.get(record["type"], 2e-2)


def test_two_runs_write_the_same_bytes(tmp_path):
    digests = set()
    for name in ("a", "b"):
        path = quantize(sample_path(), "gguf", "Q3_K_M", output_dir=tmp_path, output_name=name).output_path
        digests.add(hashlib.sha256(open(path, "rb").read()).hexdigest())
    assert len(digests) == 1


def write_imatrix(path, width=256, scale=None):
    "An imatrix for the sample model in which one input channel in eight matters a hundred times more."
    job = plan_gguf(Job(sample_path()), "Q2_K")
    weights = {s.name: (torch.ones(s.shape[-1]) + 99 * (torch.arange(s.shape[-1]) % 8 == 0)) for s in job.specs if s.name.startswith("blk.") and s.quantizable}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["test"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name in sorted(weights):
        values = weights[name] if width == 256 else torch.ones(width)
        writer.add_tensor(name + ".in_sum2", (values * 512)[None].numpy())
        writer.add_tensor(name + ".counts", torch.tensor([[512.0]]).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_importance_moves_the_error_to_where_it_costs_least(tmp_path):
    weights = write_imatrix(tmp_path / "i.gguf")
    plain = open_gguf(quantize(sample_path(), "gguf", "Q2_K", output_dir=tmp_path, output_name="plain").output_path)
    guided = open_gguf(quantize(sample_path(), "gguf", "Q2_K", output_dir=tmp_path, output_name="guided", imatrix=tmp_path / "i.gguf").output_path)
    job = plan_gguf(Job(sample_path()), "Q2_K")
    for spec in job.specs:
        if spec.name not in weights or "ffn" not in spec.name: continue
        meant = spec.load(job.checkpoint).float()
        cost = lambda file: ((meant - file.decode(spec.name)).square() * weights[spec.name]).sum().item()
        assert cost(guided) < 0.9 * cost(plain), spec.name


def test_an_imatrix_of_another_model_is_refused(tmp_path):
    write_imatrix(tmp_path / "i.gguf", width=100)
    with pytest.raises(ImatrixError, match="blk.0"): quantize(sample_path(), "gguf", "Q2_K", output_dir=tmp_path, imatrix=tmp_path / "i.gguf")
    assert not list(tmp_path.glob("*Q2_K*"))


def test_shards_load_as_one_model(tmp_path):
    whole = quantize(sample_path(), "gguf", "Q8_0", output_dir=tmp_path, output_name="whole")
    split = quantize(sample_path(), "gguf", "Q8_0", output_dir=tmp_path, output_name="split", max_shard_size=1_500_000)
    assert len(split.files) > 2 and split.files[0].endswith(f"-00001-of-{len(split.files):05}.gguf")
    assert greedy(whole.output_path) == greedy(split.files[0])


def test_a_name_that_says_phi_3(tmp_path):
    "llama.cpp would look for tokens of Phi-3's vocabulary and fail to open the file."
    folder = shutil.copytree(sample_path(), tmp_path / "Phi-3-like")
    assert "<|endoftext|>" not in (folder / "tokenizer.json").read_text()
    path = quantize(folder, "gguf", "Q4_0", output_dir=tmp_path).output_path
    assert open_gguf(path).metadata["general.name"] == "phi 3-like" and greedy(path, 4)
    shutil.copyfile(path, tmp_path / "named.gguf")
    data = (tmp_path / "named.gguf").read_bytes()
    (tmp_path / "named.gguf").write_bytes(data.replace(b"phi 3-like", b"phi-3-like", 1))
    with pytest.raises((ValueError, IndexError, RuntimeError)): greedy(tmp_path / "named.gguf", 4)


def test_experts_are_encoded_with_their_own_importance():
    torch.manual_seed(0)
    weights, importance = torch.randn(3, 4, 256), torch.rand(3, 256) + 0.01
    data = encode_tensor(weights, "Q4_K", importance)
    for e in range(3): assert torch.equal(data[4 * e:4 * e + 4], encode_tensor(weights[e], "Q4_K", importance[e]))
    assert not torch.equal(data[4:8], encode_tensor(weights[1], "Q4_K", importance[0]))


def test_relative_error_by_hand():
    weights = torch.randn(1000, 64)
    data = encode_tensor(weights, "Q4_0", None)
    whole = ((weights - decode(data, "Q4_0")).square().sum() / weights.square().sum()).item()
    assert relative_error(weights, data, "Q4_0", rows=10_000) == pytest.approx(whole)
    assert relative_error(weights, data, "Q4_0", rows=100) == pytest.approx(whole, rel=0.1)
    assert relative_error(weights + 1, data, "Q4_0") > 10 * whole, "the wrong tensor shows"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers(bad):
    weights = torch.zeros(4, 8, dtype=torch.bfloat16)
    check_finite("w", weights)
    weights[2, 3] = bad
    with pytest.raises(ValidationError, match="tensor w "): check_finite("w", weights)


def test_a_failure_in_the_middle_leaves_nothing(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(sample_path(), model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors")
    out = tmp_path / "out"
    with pytest.raises(ValidationError, match="blk.3.ffn_down.weight"): quantize(model, "gguf", "Q8_0", output_dir=out)
    assert list(out.iterdir()) == []


def test_an_older_file_survives_a_failed_run(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"precious")
    model = tmp_path / "model"
    shutil.copytree(sample_path(), model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ValidationError): quantize(model, "gguf", "Q8_0", output_dir=tmp_path, output_name="x")
    assert (tmp_path / "x.gguf").read_bytes() == b"precious"


def test_a_killed_run_leaves_no_file_under_the_final_name(tmp_path):
    code = f"""
import os, signal
from llm_quantize.api import quantize
quantize({str(sample_path())!r}, "gguf", "Q8_0", output_dir={str(tmp_path)!r}, progress=lambda done, total, name: done > total / 2 and os.kill(os.getpid(), signal.SIGKILL))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert not list(tmp_path.glob("sample*.gguf"))


@pytest.mark.parametrize("format, level, error", [("awq", "4bit", ConversionError), ("exl3", "Q4_K_M", ArgumentError), ("gguf", "Q9_K", ArgumentError)])
def test_what_cannot_be_written(tmp_path, format, level, error):
    with pytest.raises(error): quantize(sample_path(), format, level, output_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_not_a_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LLMQuantizeError, match="file"): quantize(sample_path(), "gguf", "Q8_0", output_dir=tmp_path / "file" / "out")


def test_peak_memory_is_that_of_the_run_alone(tmp_path):
    "A parent that once held much memory does not show in the figure of its child."
    code = ("import subprocess, sys, numpy; held = numpy.ones(2 ** 27); del held; "
            f"subprocess.run([sys.executable, '-m', 'llm_quantize.cli.main', '--format', 'json', 'quantize', {str(sample_path())!r}, 'gguf', '-q', 'Q8_0', '-o', {str(tmp_path)!r}], check=True)")
    result = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 100e6 < result["peak_memory_bytes"] < 8 * 2 ** 27


def test_the_result_displays_and_serialises(tmp_path):
    result = quantize(sample_path(), "gguf", "Q4_K_S", output_dir=tmp_path)
    assert "Q4_K" in result._repr_markdown_() and json.loads(json.dumps(result.to_dict()))["effective_bpw"] == result.effective_bpw
    layers = result.layer_summary()
    assert [s["layer_name"] for s in layers if s["layer_name"].startswith("blk")] == [f"blk.{i}" for i in range(4)]
    assert sum(s["parameter_count"] for s in layers) == Checkpoint(sample_path()).parameters


def test_prose_runs_in_llama_cpp(tmp_path, shared_model):
    model = shared_model("prose-46m")
    result = quantize(model, "gguf", "Q4_K_M", output_dir=tmp_path)
    _, out = greedy(result.output_path, 16)
    assert len(out) == 16 and result.file_size == pytest.approx(30_156_960, rel=2e-3), "llama.cpp's own Q4_K_M of this model has 30,156,960 bytes"


@pytest.mark.parametrize("level", ["IQ2_XXS", "Q2_K_S", "Q4_K_M"])
def test_the_reference_search_writes_what_llama_quantize_writes(tmp_path, monkeypatch, level):
    "Plan, importance and encoder together: every tensor's bytes, against llama.cpp's own tool on the float file; another search shows."
    import ctypes

    import llama_cpp
    monkeypatch.setenv("LLM_QUANTIZE_IMATRIX_CACHE", str(tmp_path / "imatrix"))
    matrix = cached_imatrix(Job(sample_path(), device="cpu"), calibration_samples=2)
    values = {name: matrix.importance(name).numpy() for name in matrix.names}
    rows = [(name.encode(), v.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), v.size) for name, v in values.items()]
    table = (llama_cpp.llama_cpp.llama_model_imatrix_data * (len(rows) + 1))(*rows, (None, None, 0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.imatrix = find_mix(level).ftype, 1, ctypes.cast(table, type(params.imatrix))
    source, theirs = quantize(sample_path(), "gguf", "F32", output_dir=tmp_path).output_path, tmp_path / "theirs.gguf"
    assert llama_cpp.llama_model_quantize(source.encode(), str(theirs).encode(), ctypes.byref(params)) == 0
    def tensors(path): return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}
    ours = {search: tensors(quantize(sample_path(), "gguf", level, output_dir=tmp_path, output_name=search, imatrix=matrix, search=search, device="cpu").output_path)
            for search in ("reference", "fast")}
    assert ours["reference"] == tensors(theirs)
    assert {n: t for n, (t, _) in ours["fast"].items()} == {n: t for n, (t, _) in tensors(theirs).items()} and ours["fast"] != tensors(theirs)
