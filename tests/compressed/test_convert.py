"""The W8A8 directory: bytes and shapes, the same on the second reading, on resuming, in shards; transformers with compressed-tensors and, where it is installed, vLLM read it too."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from llm_quantize.compressed import convert as module
from llm_quantize.calibration.text import bundled_text, load_tokenizer, windows
from llm_quantize.models.checkpoint import open_checkpoint
from llm_quantize.cli.main import main
from llm_quantize.quality.quantized_model import load_quantized, open_quantized
from llm_quantize.errors import ArgumentError, CheckpointError, ConversionError, SmoothQuantError, ValidationError
from llm_quantize.models.reference import load_float
from llm_quantize.quality.model_info import info
from llm_quantize.api import quantize
from llm_quantize.compressed.directory import Int8Checkpoint, is_int8_directory
from llm_quantize.compressed.smoothing import Seen
from llm_quantize.compressed.directory import DirectoryWriter
from llm_quantize.compressed.convert import Recipe, check_alpha, encode_layer, not_helped, smoothquant

from tests.compressed.tiny import CASES, VOCABULARY, logits, tiny, tokens

TEXT = torch.randint(2, VOCABULARY, (3, 48), generator=torch.Generator().manual_seed(1))


def divergence(model, other, ids):
    p, q = (logits(m, ids).double().log_softmax(-1) for m in (model, other))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def files(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def sample(sample_model, tmp_path_factory):
    "The sample in int8, alpha one half."
    return Path(smoothquant(sample_model, output_dir=tmp_path_factory.mktemp("w8a8"), calibration_samples=4).output_path)


# ---- the directory -----------------------------------------------------------------------------------------

def test_tensors_have_the_shapes_that_clients_want(sample, sample_model):
    found, original = Int8Checkpoint(sample), open_checkpoint(sample_model)
    for name in original.names:
        if "proj" not in name:
            assert found.dtype(name) == original.dtype(name) and found.shape(name) == original.shape(name)
            continue
        assert found.dtype(name) == torch.int8 and found.shape(name) == original.shape(name)
        assert found.dtype(name + "_scale") == torch.float32 and found.shape(name + "_scale") == (original.shape(name)[0], 1)
        assert found.tensor(name).abs().amax(1).eq(127).all()
    assert len(found.names) == len(original.names) + 28
    with safe_open(sample / "model.safetensors", "pt") as file: assert file.metadata() == {"format": "pt"}
    assert torch.equal(found.tensor("model.embed_tokens.weight"), original.tensor("model.embed_tokens.weight"))


def test_config_says_what_clients_ask(sample, sample_model):
    config, original = (json.loads((d / "config.json").read_text()) for d in (sample, sample_model))
    found = config.pop("quantization_config")
    assert config == original
    assert found["quant_method"] == "compressed-tensors" and found["format"] == "int-quantized" and found["ignore"] == ["lm_head"]
    assert found["config_groups"]["group_0"]["weights"] == {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    assert found["config_groups"]["group_0"]["input_activations"] == {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def test_small_files_come_along(sample, sample_model):
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"): assert (sample / name).read_bytes() == (sample_model / name).read_bytes()
    assert json.loads((sample / "smoothquant.json").read_text())["alpha"] == 0.5 and not sample.with_name(sample.name + ".part").exists()


@pytest.mark.parametrize("name", [name for name in CASES if name != "qwen2moe-dense"]) # layers of two kinds fold, but `LayerStack` does not run them
def test_every_family_in_int8_is_near_its_original(name, tmp_path):
    checkpoint = tiny(name, tmp_path / "model")
    result = smoothquant(checkpoint, alpha="auto", output_dir=tmp_path, calibration_data=TEXT)
    original, ids = load_float(checkpoint), tokens(8)
    near = divergence(original, load_quantized(checkpoint, result.output_path), ids)
    assert 0 < near < 0.01, near
    assert not [p for p in result.pairs if p["error"] > p["error_unsmoothed"]]
    pairs = list(open_quantized(checkpoint, result.output_path).pairs())
    assert len(pairs) == sum(len(m) for m in module.ModelFolds(checkpoint).matrices.values())
    for matrix, _, _, w, decoded in pairs: assert ((w - decoded).square().sum() / w.square().sum()) < 2e-3, matrix
    layer = Int8Checkpoint(Path(result.output_path))
    assert all(layer.shape(n + "_scale") == (layer.shape(n)[0], 1) for n in layer.names if layer.dtype(n) == torch.int8)


def test_a_doubled_scale_is_seen(tmp_path):
    checkpoint = tiny("llama", tmp_path / "model")
    result = smoothquant(checkpoint, output_dir=tmp_path, calibration_data=TEXT)
    model = open_quantized(checkpoint, result.output_path).load()
    good = divergence(load_float(checkpoint), model, tokens(8))
    model.model.layers[1].mlp.down_proj.scale.mul_(2)
    assert divergence(load_float(checkpoint), model, tokens(8)) > 30 * good


def test_static_activations(tmp_path):
    checkpoint = tiny("qwen2", tmp_path / "model")
    result = smoothquant(checkpoint, alpha="auto", static_activations=True, output_dir=tmp_path, calibration_data=TEXT)
    found = Int8Checkpoint(Path(result.output_path))
    scales = {n: found.tensor(n) for n in found.names if n.endswith("input_scale")}
    assert len(scales) == 14 and all(s.shape == (1,) and s.dtype == torch.float32 for s in scales.values())
    assert len({scales[f"model.layers.0.self_attn.{x}_proj.input_scale"].item() for x in "qkv"}) == 1
    assert json.loads((Path(result.output_path) / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]["input_activations"]["strategy"] == "tensor"
    assert divergence(load_float(checkpoint), load_quantized(checkpoint, result.output_path), tokens(8)) < 0.05


def test_error_feedback_changes_weights_and_not_scales(tmp_path):
    checkpoint = tiny("llama", tmp_path / "model")
    plain, fed = (Int8Checkpoint(Path(smoothquant(checkpoint, output_dir=tmp_path, output_name=str(f), calibration_data=TEXT, error_feedback=f).output_path)) for f in (False, True))
    for name in plain.names: assert torch.equal(plain.tensor(name), fed.tensor(name)) != (plain.dtype(name) == torch.int8), name


def test_shards_hold_the_same_and_have_an_index(tmp_path):
    checkpoint = tiny("qwen3moe", tmp_path / "model")
    one, many = (smoothquant(checkpoint, output_dir=tmp_path, output_name=name, calibration_data=TEXT, max_shard_size=size) for name, size in (("one", 10 ** 9), ("many", 40_000)))
    a, b = (Int8Checkpoint(Path(r.output_path)) for r in (one, many))
    assert len(one.files) == 1 and len(many.files) > 3 and all(Path(f).exists() for f in many.files)
    assert set(a.names) == set(b.names) and all(torch.equal(a.tensor(n), b.tensor(n)) for n in a.names)
    index = json.loads((Path(many.output_path) / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(a.names) and set(index["weight_map"].values()) == {Path(f).name for f in many.files}
    assert "re:.*mlp\\.gate$" in json.loads((Path(many.output_path) / "config.json").read_text())["quantization_config"]["ignore"]


def test_the_writer_notices_what_is_missing_or_of_another_shape(tmp_path):
    writer = DirectoryWriter(tmp_path, {"a": (torch.int8, (2, 3)), "b": (torch.float32, (2, 1))})
    with pytest.raises(ValidationError, match="planned"): writer.put("a", torch.zeros(3, 2, dtype=torch.int8))
    writer.put("a", torch.zeros(2, 3, dtype=torch.int8))
    with pytest.raises(ValidationError, match="never written, first: b"): writer.finish()


# ---- stopping and going on ---------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_stopped_run_goes_on_to_the_same_bytes(name, tmp_path, monkeypatch):
    checkpoint, calls, encode = tiny(name, tmp_path / "model"), [], module.encode_layer
    whole = smoothquant(checkpoint, output_dir=tmp_path, output_name="whole", calibration_data=TEXT, error_feedback=True)

    def stop(*args):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        return encode(*args)

    options = dict(output_dir=tmp_path, output_name="again", calibration_data=TEXT, error_feedback=True)
    monkeypatch.setattr(module, "encode_layer", stop)
    with pytest.raises(KeyboardInterrupt): smoothquant(checkpoint, checkpoint_dir=tmp_path / "kept", **options)
    assert not (tmp_path / "again").exists() and not (tmp_path / "again.part").exists()
    with pytest.raises(CheckpointError): smoothquant(checkpoint, resume=tmp_path / "kept", alpha=0.7, **options)
    again = smoothquant(checkpoint, resume=tmp_path / "kept", **options)
    assert len(calls) == 3 # the first layer was not encoded twice
    assert files(again.output_path) == files(whole.output_path)
    assert not (tmp_path / "kept" / "smoothquant").exists()


def test_an_earlier_result_is_replaced_and_nothing_else(tmp_path):
    checkpoint = tiny("llama", tmp_path / "model")
    first = smoothquant(checkpoint, output_dir=tmp_path, calibration_data=TEXT)
    (Path(first.output_path) / "left.txt").write_text("x")
    second = smoothquant(checkpoint, output_dir=tmp_path, calibration_data=TEXT, alpha=0.7)
    assert not (Path(second.output_path) / "left.txt").exists() and not list(tmp_path.glob("*.old"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ArgumentError, match="not an earlier result"): smoothquant(checkpoint, output_dir=tmp_path, output_name="mine", calibration_data=TEXT)
    with pytest.raises(ArgumentError, match="model itself"): smoothquant(checkpoint, output_dir=tmp_path, output_name="model", calibration_data=TEXT)


# ---- report and refusals -----------------------------------------------------------------------------------

def test_report_names_what_was_not_helped():
    pairs = [{"layer": 0, "pair": "a -> b", "error": 2.0, "error_unsmoothed": 1.0}, {"layer": 1, "pair": "a -> b", "error": 0.5, "error_unsmoothed": 1.0}]
    assert [(p["layer"], p["suggestion"]) for p in not_helped(pairs, 0.5)] == [(0, "try --alpha auto")]
    assert not_helped(pairs, None) == []


def test_numbers_that_are_none_end_the_run(tmp_path):
    weights = {"up.weight": torch.full((2, 4), float("nan"))}
    with pytest.raises(ValidationError, match="NaN"): encode_layer(weights, (), ("up",), {}, Recipe())
    gather = module._Gather({}, 1, False)
    gather.add(0, ("up",), torch.full((2, 4), float("inf")))
    with pytest.raises(SmoothQuantError) as failure: gather.take(0)
    assert failure.value.exit_code == 14


@pytest.mark.parametrize("alpha", ["1.5", "-0.1", "nan", "much", ""])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ArgumentError, match="0 to 1"): check_alpha(alpha)
    assert [check_alpha(a) for a in ("0", 1, "AUTO", "none", None)] == [0.0, 1.0, "auto", None, None]


@pytest.mark.parametrize("words, code, said", [
    (["smoothquant", "--alpha", "0.6"], 2, "add --smoothquant"), (["gguf", "--alpha", "0.6"], 2, "add --smoothquant"), (["gguf", "--smoothquant"], 2, "smoothquant --smoothquant"),
    (["smoothquant", "--smoothquant", "--alpha", "1.1"], 2, "0 to 1"), (["smoothquant", "--smoothquant", "--dry-run"], 2, "--dry-run"), (["smoothquant", "-q", "Q8_0"], 2, "leave out -q"),
], ids=lambda v: " ".join(v) if isinstance(v, list) else None)
def test_command_line_refuses(words, code, said, sample_model, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["quantize", str(sample_model), *words]) == code
    assert said in capsys.readouterr().err and not list(tmp_path.glob("*w8a8*"))


def test_workflow_three_on_the_command_line(sample_model, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sample_model, tmp_path / "model")
    assert main(["--format", "json", "quantize", "./model", "smoothquant", "--smoothquant", "--alpha", "0.5", "--calibration-samples", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == "success" and found["quantization_level"] == "W8A8" and len(found["smoothquant"]["pairs"]) == 16 and found["peak_memory_bytes"] > 0
    assert main(["--format", "json", "quality", "report", "./model", "./model-smoothquant-w8a8", "--calibration-samples", "2"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert 0 < metrics["kld_mean"] < 0.01 and metrics["top1_agreement"] > 0.9
    assert main(["--format", "json", "info", "./model-smoothquant-w8a8"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "w8a8"
    assert main(["quantize", "./model-smoothquant-w8a8", "smoothquant", "--smoothquant"]) == 8
    assert "already quantized" in capsys.readouterr().err


def test_result_of_python_is_that_of_the_verb(sample_model, tmp_path):
    result = quantize(sample_model, "smoothquant", alpha="auto", output_dir=tmp_path, calibration_samples=2)
    assert result.to_dict()["format"] == "smoothquant" and "| pair |" in result._repr_markdown_() and result.peak_memory_bytes > 0
    assert info(result.output_path).parameters == info(sample_model).parameters and is_int8_directory(result.output_path)
    with pytest.raises(ConversionError): info(sample_model) and open_quantized(tiny("llama", tmp_path / "other"), result.output_path)


# ---- other readers -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["sample", "qwen2", "gemma2", "phi3", "opt"])
def test_transformers_with_compressed_tensors_agrees(name, sample, sample_model, tmp_path):
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors, a development requirement")
    from transformers import AutoModelForCausalLM
    if name == "sample":
        checkpoint, folder = open_checkpoint(sample_model), sample
        ids = windows(load_tokenizer(sample_model), bundled_text("heldout"), size=128, limit=2)
    else:
        checkpoint, ids = tiny(name, tmp_path / "model"), tokens(8)
        folder = Path(smoothquant(checkpoint, output_dir=tmp_path, calibration_data=TEXT).output_path)
    theirs, ours, original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), load_quantized(checkpoint, folder), load_float(checkpoint)
    assert getattr(theirs.base_model.get_submodule(next(n for n, m in theirs.base_model.named_modules() if n.endswith(("down_proj", "fc2")))), "quantization_scheme", None) is not None
    cost, between = divergence(original, ours, ids), divergence(ours, theirs, ids)
    assert between < cost and abs(divergence(original, theirs, ids) - cost) < 0.5 * cost # they round inputs by 127.5, kernels and we by 127


VLLM = os.environ.get("VLLM_PYTHON")


@pytest.mark.slow
@pytest.mark.skipif(not VLLM, reason="needs vLLM in an environment of its own: set VLLM_PYTHON to its python")
def test_vllm_runs_it_in_int8(sample, sample_model, root, tmp_path):
    client = root.parent / "shared" / "clients" / "client_vllm.py"
    if not client.exists(): pytest.skip("needs the script ../shared/clients/client_vllm.py beside the repository")
    (tmp_path / "text.txt").write_text(bundled_text("heldout")[:20000])
    said = [json.loads(subprocess.run([VLLM, str(client), str(d), str(tmp_path / "text.txt"), "--dtype", "float32", "--windows", "4"], capture_output=True, text=True, timeout=300,
                                      env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}).stdout) for d in (sample, sample_model)]
    assert any("Int8ScaledMMLinearKernel" in line for line in said[0]["kernel_log"]) and said[0]["quantization"] == "compressed-tensors"
    assert abs(said[0]["mean_nll"] - said[1]["mean_nll"]) < 0.01
