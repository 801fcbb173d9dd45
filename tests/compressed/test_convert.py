"""A whole model into a W8A8 directory: bytes and shapes, the same on resuming and in shards, each thing read once.

transformers with compressed-tensors and, where it is installed, vLLM read it too.
"""
import json
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from llm_quantize.api import quantize
from llm_quantize.calibration.text import bundled_text, load_tokenizer, windows
from llm_quantize.cli.main import main
from llm_quantize.compressed import convert
from llm_quantize.compressed.convert import Destination, calibration_windows, convert_checkpoint, smoothquant
from llm_quantize.compressed.directory import Int8Checkpoint, is_int8_directory
from llm_quantize.compressed.families import ModelMappings
from llm_quantize.compressed.layer import SmoothQuantOptions
from llm_quantize.errors import ArgumentError, CheckpointError, ConversionError
from llm_quantize.models.checkpoint import Checkpoint, open_checkpoint
from llm_quantize.models.reference import load_float
from llm_quantize.quality.model_info import info
from llm_quantize.quality.quantized_model import load_quantized, open_quantized
from tests.compressed.models import CASES, MIXED, TEXT, divergence, tiny, tokens

def files(folder):
    "Name -> bytes of everything in a directory."
    folder = Path(folder)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def opened(result): return Int8Checkpoint(Path(result.output_path))


def settings_of(folder): return json.loads((Path(folder) / "config.json").read_text())


@pytest.fixture(scope="module")
def sample(sample_model, tmp_path_factory):
    "The sample in int8, alpha one half."
    folder = tmp_path_factory.mktemp("w8a8")
    return Path(smoothquant(sample_model, output_dir=folder, calibration_samples=4).output_path)


# ---- the directory -----------------------------------------------------------------------------------------

def test_tensors_have_the_shapes_that_clients_want(sample, sample_model):
    found, original = Int8Checkpoint(sample), open_checkpoint(sample_model)
    for name in original.names:
        assert found.shape(name) == original.shape(name)
        assert found.dtype(name) == (torch.int8 if "proj" in name else original.dtype(name))
    scales = [name for name in found.names if name.endswith("_scale")]
    assert len(found.names) == len(original.names) + len(scales)
    assert len(scales) == 28
    for name in scales:
        assert found.dtype(name) == torch.float32
        assert found.shape(name) == (original.shape(name.removesuffix("_scale"))[0], 1)
        assert found.tensor(name.removesuffix("_scale")).abs().amax(1).eq(127).all()
    embedding = "model.embed_tokens.weight"
    assert torch.equal(found.tensor(embedding), original.tensor(embedding))
    with safe_open(sample / "model.safetensors", "pt") as file: assert file.metadata() == {"format": "pt"}


def test_config_says_what_clients_ask(sample, sample_model):
    config = settings_of(sample)
    found = config.pop("quantization_config")
    assert config == settings_of(sample_model)
    assert found["quant_method"] == "compressed-tensors"
    assert found["format"] == "int-quantized"
    assert found["ignore"] == ["lm_head"]
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    scheme = found["config_groups"]["group_0"]
    assert scheme["weights"] == {**eight, "strategy": "channel", "dynamic": False}
    assert scheme["input_activations"] == {**eight, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
def test_small_files_come_along(name, sample, sample_model):
    assert (sample / name).read_bytes() == (sample_model / name).read_bytes()


def test_the_report_lies_in_the_directory_and_nothing_beside_it(sample):
    assert json.loads((sample / "smoothquant.json").read_text())["alpha"] == 0.5
    assert [path.name for path in sample.parent.iterdir()] == [sample.name]


@pytest.mark.parametrize("name", [name for name in CASES if name not in MIXED])
def test_every_family_in_int8_is_near_its_original(name, tmp_path):
    checkpoint = tiny(name, tmp_path / "model")
    result = smoothquant(checkpoint, alpha="auto", output_dir=tmp_path, ids=TEXT)
    near = divergence(load_float(checkpoint), load_quantized(checkpoint, result.output_path), tokens(8))
    assert 0 < near < 0.01, near
    assert not [p for p in result.pairs if p["error"] > p["error_unsmoothed"]]
    pairs = list(open_quantized(checkpoint, result.output_path).pairs())
    assert len(pairs) == sum(len(layer.matrices) for layer in ModelMappings(checkpoint).layers.values())
    for matrix, _, _, w, decoded in pairs: assert ((w - decoded).square().sum() / w.square().sum()) < 2e-3, matrix


def test_a_doubled_scale_is_seen(tmp_path):
    checkpoint = tiny("llama", tmp_path / "model")
    result = smoothquant(checkpoint, output_dir=tmp_path, ids=TEXT)
    original, model = load_float(checkpoint), open_quantized(checkpoint, result.output_path).load()
    good = divergence(original, model, tokens(8))
    model.model.layers[1].mlp.down_proj.scale.mul_(2)
    assert divergence(original, model, tokens(8)) > 30 * good


def test_static_activations(tmp_path):
    checkpoint = tiny("qwen2", tmp_path / "model")
    result = smoothquant(checkpoint, alpha="auto", static_activations=True, output_dir=tmp_path, ids=TEXT)
    found = opened(result)
    scales = {n: found.tensor(n) for n in found.names if n.endswith("input_scale")}
    assert len(scales) == 14
    assert all(s.shape == (1,) and s.dtype == torch.float32 for s in scales.values())
    assert len({scales[f"model.layers.0.self_attn.{x}_proj.input_scale"].item() for x in "qkv"}) == 1
    scheme = settings_of(result.output_path)["quantization_config"]["config_groups"]["group_0"]
    assert scheme["input_activations"]["strategy"] == "tensor"
    assert divergence(load_float(checkpoint), load_quantized(checkpoint, result.output_path), tokens(8)) < 0.05


def test_error_feedback_changes_weights_and_not_scales(tmp_path):
    checkpoint = tiny("llama", tmp_path / "model")
    def written(feedback):
        return opened(smoothquant(
            checkpoint, output_dir=tmp_path, output_name=str(feedback), ids=TEXT, error_feedback=feedback
        ))
    plain, fed = written(False), written(True)
    for name in plain.names:
        assert torch.equal(plain.tensor(name), fed.tensor(name)) != (plain.dtype(name) == torch.int8), name


def test_shards_hold_the_same_and_have_an_index(tmp_path):
    checkpoint = tiny("qwen3moe", tmp_path / "model")
    one = smoothquant(checkpoint, output_dir=tmp_path, output_name="one", ids=TEXT)
    many = smoothquant(checkpoint, output_dir=tmp_path, output_name="many", ids=TEXT, max_shard_size=40_000)
    a, b = opened(one), opened(many)
    assert len(one.files) == 1
    assert len(many.files) > 3
    assert set(a.names) == set(b.names)
    assert all(torch.equal(a.tensor(n), b.tensor(n)) for n in a.names)
    index = json.loads((Path(many.output_path) / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(a.names)
    assert set(index["weight_map"].values()) == {Path(file).name for file in many.files}


def test_routers_are_named_as_float(tmp_path):
    result = smoothquant(tiny("qwen3moe", tmp_path / "model"), output_dir=tmp_path, ids=TEXT)
    assert "re:.*mlp\\.gate$" in settings_of(result.output_path)["quantization_config"]["ignore"]


# ---- each thing once ---------------------------------------------------------------------------------------

class CountingCheckpoint(Checkpoint):
    "Counts how often each tensor is read."
    def __init__(self, *args):
        super().__init__(*args)
        self.reads = Counter()

    def tensor(self, name):
        self.reads[name] += 1
        return super().tensor(name)


@pytest.fixture
def counted(monkeypatch):
    "Counts opened checkpoints, by directory, and tokenised texts."
    seen, opening, tokenising = Counter(), Checkpoint.__init__, PreTrainedTokenizerBase.__call__
    def open_it(self, path, *args):
        seen[Path(path).name] += 1
        opening(self, path, *args)
    def tokenise(self, text, *args, **kwargs):
        seen["text"] += len(text) > 1 # one letter is how a tokenizer is asked whether it adds BOS
        return tokenising(self, text, *args, **kwargs)
    monkeypatch.setattr(Checkpoint, "__init__", open_it)
    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", tokenise)
    return seen


def test_header_and_text_are_read_once(sample_model, tmp_path, counted):
    smoothquant(sample_model, alpha="auto", output_dir=tmp_path, output_name="out", calibration_samples=2)
    assert counted == {"sample-4m": 1, "text": 1, "out.part": 1}


def test_an_opened_checkpoint_and_tokens_are_used_as_they_are(sample_model, tmp_path, counted):
    checkpoint = open_checkpoint(sample_model)
    ids = calibration_windows(checkpoint, count=2)
    counted.clear()
    convert_checkpoint(checkpoint, ids, SmoothQuantOptions(), Destination(tmp_path, "out"))
    assert counted == {"out.part": 1} # what was written is opened to compare it with the plan


def test_refusals_come_before_the_text_is_read(sample_model, tmp_path, counted):
    (tmp_path / "out").write_text("x")
    with pytest.raises(ArgumentError): smoothquant(sample_model, output_dir=tmp_path, output_name="out")
    assert counted == {"sample-4m": 1}


def test_tensors_are_read_once_for_the_text_and_once_to_encode(sample_model, tmp_path):
    checkpoint = CountingCheckpoint(sample_model)
    smoothquant(checkpoint, output_dir=tmp_path, calibration_samples=2)
    later = {n: c for n, c in checkpoint.reads.items() if ".layers." in n and ".layers.0." not in n}
    assert set(later.values()) == {2}
    first = {n: c for n, c in checkpoint.reads.items() if ".layers.0." in n}
    assert set(first.values()) <= {2, 3} # the stack loads the first layer once more, for the embedding
    assert checkpoint.reads["model.embed_tokens.weight"] <= 2


def test_tokens_given_are_the_tokens_made(sample_model, tmp_path):
    checkpoint = open_checkpoint(sample_model)
    ids = calibration_windows(checkpoint, count=2)
    made = smoothquant(checkpoint, output_dir=tmp_path, output_name="made", calibration_samples=2)
    given = smoothquant(checkpoint, output_dir=tmp_path, output_name="given", ids=ids)
    assert files(made.output_path) == files(given.output_path)


# ---- stopping and going on ---------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_stopped_run_goes_on_to_the_same_bytes(name, tmp_path, monkeypatch):
    checkpoint, calls, encode = tiny(name, tmp_path / "model"), [], convert.encode_layer
    options = dict(output_dir=tmp_path, ids=TEXT, error_feedback=True)
    whole = smoothquant(checkpoint, output_name="whole", **options)

    def stop(*args):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(convert, "encode_layer", stop)
    options["output_name"] = "again"
    with pytest.raises(KeyboardInterrupt): smoothquant(checkpoint, checkpoint_dir=tmp_path / "kept", **options)
    assert not list(tmp_path.glob("again*"))
    with pytest.raises(CheckpointError, match="another alpha"):
        smoothquant(checkpoint, resume=tmp_path / "kept", alpha=0.7, **options)
    again = smoothquant(checkpoint, resume=tmp_path / "kept", **options)
    assert len(calls) == 3 # the first layer was not encoded twice
    assert files(again.output_path) == files(whole.output_path)
    assert not (tmp_path / "kept" / "smoothquant").exists()


def test_an_earlier_result_is_replaced(tmp_path):
    checkpoint = tiny("llama", tmp_path / "model")
    first = smoothquant(checkpoint, output_dir=tmp_path, ids=TEXT)
    (Path(first.output_path) / "left.txt").write_text("x")
    second = smoothquant(checkpoint, output_dir=tmp_path, ids=TEXT, alpha=0.7)
    assert second.output_path == first.output_path
    assert not (Path(second.output_path) / "left.txt").exists()
    assert not list(tmp_path.glob("*.old"))


@pytest.mark.parametrize("name, words", [
    ("mine", "not an earlier result"), ("model", "model itself"), ("a/b", "contains a directory"),
])
def test_nothing_else_is_replaced(name, words, tmp_path):
    checkpoint = tiny("llama", tmp_path / "model")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    before = files(tmp_path)
    with pytest.raises(ArgumentError, match=words):
        smoothquant(checkpoint, output_dir=tmp_path, output_name=name, ids=TEXT)
    assert files(tmp_path) == before


# ---- front doors -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words, said", [
    ("smoothquant --alpha 0.6", "add --smoothquant"),
    ("gguf --alpha 0.6", "add --smoothquant"),
    ("gguf --smoothquant", "smoothquant --smoothquant"),
    ("smoothquant --smoothquant --alpha 1.1", "0 to 1"),
    ("smoothquant --smoothquant --dry-run", "--dry-run"),
    ("smoothquant -q Q8_0", "leave out -q"),
])
def test_command_line_refuses(words, said, sample_model, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["quantize", str(sample_model), *words.split()]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("*w8a8*"))


def test_workflow_three_on_the_command_line(sample_model, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sample_model, tmp_path / "model")
    def run(line):
        assert main(["--format", "json", *line.split()]) == 0
        return json.loads(capsys.readouterr().out)
    found = run("quantize ./model smoothquant --smoothquant --alpha 0.5 --calibration-samples 4")
    assert found["status"] == "success"
    assert found["quantization_level"] == "W8A8"
    assert len(found["smoothquant"]["pairs"]) == 16
    assert found["peak_memory_bytes"] > 0
    metrics = run("quality report ./model ./model-smoothquant-w8a8 --calibration-samples 2")["metrics"]
    assert 0 < metrics["kld_mean"] < 0.01
    assert metrics["top1_agreement"] > 0.9
    assert run("info ./model-smoothquant-w8a8")["kind"] == "w8a8"
    assert main(["quantize", "./model-smoothquant-w8a8", "smoothquant", "--smoothquant"]) == 8
    assert "already quantized" in capsys.readouterr().err


def test_result_of_python_is_that_of_the_verb(sample_model, tmp_path):
    result = quantize(sample_model, "smoothquant", smoothquant=True, alpha="auto", output_dir=tmp_path, calibration_samples=2)
    assert result.to_dict()["format"] == "smoothquant"
    assert "| pair |" in result._repr_markdown_()
    assert result.peak_memory_bytes > 0
    assert info(result.output_path).parameters == info(sample_model).parameters
    assert is_int8_directory(result.output_path)
    other = tiny("llama", tmp_path / "other")
    with pytest.raises(ConversionError): open_quantized(other, result.output_path)


# ---- other readers -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["sample", "qwen2", "gemma2", "phi3", "opt"])
def test_transformers_with_compressed_tensors_agrees(name, sample, sample_model, tmp_path):
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors, a development requirement")
    if name == "sample":
        checkpoint, folder = open_checkpoint(sample_model), sample
        ids = windows(load_tokenizer(sample_model), bundled_text("heldout"), size=128, limit=2)
    else:
        checkpoint, ids = tiny(name, tmp_path / "model"), tokens(8)
        folder = Path(smoothquant(checkpoint, output_dir=tmp_path, ids=TEXT).output_path)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    last = next(module for path, module in theirs.base_model.named_modules() if path.endswith(("down_proj", "fc2")))
    assert getattr(last, "quantization_scheme", None) is not None
    ours, original = load_quantized(checkpoint, folder), load_float(checkpoint)
    cost, between = divergence(original, ours, ids), divergence(ours, theirs, ids)
    assert between < cost
    # They round inputs by 127.5, kernels and we by 127.
    assert abs(divergence(original, theirs, ids) - cost) < 0.5 * cost


VLLM = os.environ.get("VLLM_PYTHON")


@pytest.mark.slow
@pytest.mark.skipif(not VLLM, reason="needs vLLM in an environment of its own: set VLLM_PYTHON to its python")
def test_vllm_runs_it_in_int8(sample, sample_model, root, tmp_path):
    client, text = root.parent / "shared" / "clients" / "client_vllm.py", tmp_path / "text.txt"
    if not client.exists(): pytest.skip("needs the script ../shared/clients/client_vllm.py beside the repository")
    text.write_text(bundled_text("heldout")[:20000])
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    def ask(folder):
        command = [VLLM, str(client), str(folder), str(text), "--dtype", "float32", "--windows", "4"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        return json.loads(done.stdout)
    ours, original = ask(sample), ask(sample_model)
    assert any("Int8ScaledMMLinearKernel" in line for line in ours["kernel_log"])
    assert ours["quantization"] == "compressed-tensors"
    assert abs(ours["mean_nll"] - original["mean_nll"]) < 0.01
