"""Quantized models as torch modules: every family comes back from its GGUF with the logits it had, and what is not a quantization of the model is refused."""
import json
import shutil

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llm_quantize.quality import quantized_model as decoded
from llm_quantize.models.architectures import architecture
from llm_quantize.models.checkpoint import open_checkpoint
from llm_quantize.quality.quantized_model import FloatModel, GGUFModel, load_quantized, open_quantized, placement
from llm_quantize.models.reference import load_float
from llm_quantize.errors import ArgumentError, ConversionError, ModelNotFoundError, OutOfMemoryError
from llm_quantize.gguf.container import write_gguf
from llm_quantize.gguf.reader import open_gguf
from llm_quantize.quality.metrics import logits_of, scored_states
from llm_quantize.api import quantize

SMALL = dict(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
             bos_token_id=None, eos_token_id=None, pad_token_id=None)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
GEMMA = dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=16)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "llama-tied-biases": ("LlamaConfig", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama3": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 24}),
    "qwen2moe": ("Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 96, "tie_word_embeddings": True}),
    "qwen3moe": ("Qwen3MoeConfig", {**EXPERTS, "head_dim": 16, "norm_topk_prob": True}),
    "gemma2": ("Gemma2Config", {**GEMMA, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3TextConfig", {**GEMMA, "final_logit_softcapping": 2.0}),
    "phi3": ("Phi3Config", {"sliding_window": None}),
}


def random_checkpoint(folder, kind, settings):
    "A random model of a family, norms and biases too, saved as transformers saves it."
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**SMALL, **json.loads(json.dumps(settings))})).eval()
    with torch.no_grad():
        for weight in model.parameters(): weight.copy_(torch.randn_like(weight) * (0.3 if weight.dim() == 1 else 2 / weight.shape[-1] ** 0.5))
    model.tie_weights()
    model.save_pretrained(folder)
    return open_checkpoint(folder)


def write(checkpoint, path, change=lambda name, weights: weights, keys=(), leave=(), extra=(), **options):
    "The checkpoint as a GGUF of F32 weights; the arguments spoil it."
    family = architecture(checkpoint.config)
    specs = [spec for spec in family.tensors(checkpoint) if spec.name not in leave]
    weights = {spec.name: change(spec.name, spec.load(checkpoint).float()) for spec in specs} | dict(extra)
    infos = [(name, tuple(w.shape), "F32") for name, w in weights.items()]
    metadata = {**family.metadata(checkpoint.config, "tiny"), **dict(keys)}
    return write_gguf(path, metadata, infos, lambda i: weights[infos[i][0]].contiguous().view(torch.uint8).reshape(-1, 4 * infos[i][1][-1]), **options)[0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A random Llama with its own head."
    return random_checkpoint(tmp_path_factory.mktemp("tiny"), "LlamaConfig", {})


def logits(model, ids=torch.arange(1, 49)[None]):
    with torch.inference_mode(): return model(input_ids=ids).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_comes_back_from_its_gguf(name, tmp_path, capfd):
    checkpoint = random_checkpoint(tmp_path / "hf", *FAMILIES[name])
    path = write(checkpoint, tmp_path / "tiny.gguf")
    capfd.readouterr()
    original, copy = load_float(checkpoint), load_quantized(checkpoint, path)
    assert capfd.readouterr() == ("", ""), "loading is silent"
    assert type(original) is type(copy)
    # gemma's norms go through 1 + w, which rounds in float32
    assert torch.allclose(logits(original), logits(copy), atol=1e-4 if "gemma" in name else 0, rtol=0)
    assert not torch.equal(logits(load_quantized(checkpoint, write(checkpoint, tmp_path / "spoilt.gguf", lambda n, w: w * 1.01 if n.endswith("ffn_norm.weight") else w))), logits(copy))


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_and_head_give_the_models_own_logits(name, tmp_path):
    "Among them the soft caps of Gemma: a head without them would be caught."
    model = load_float(random_checkpoint(tmp_path, *FAMILIES[name]))
    ids = torch.randint(0, 320, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(): found = logits_of(model, scored_states(model, ids))
    assert torch.allclose(found, logits(model, ids)[:, 16:-1].flatten(0, 1), atol=1e-5, rtol=1e-5)


def test_weights_equal_what_the_gguf_package_decodes(sample_model, tmp_path):
    path = quantize(sample_model, "gguf", "Q3_K_M", output_dir=tmp_path).output_path
    model = load_quantized(sample_model, path)
    stored = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    layer = model.model.layers[2]
    assert np.array_equal(layer.mlp.down_proj.weight.numpy(), stored["blk.2.ffn_down.weight"])
    assert np.array_equal(model.model.embed_tokens.weight.numpy(), stored["token_embd.weight"])
    rows = stored["blk.2.attn_q.weight"].reshape(4, 32, 2, 256).swapaxes(1, 2).reshape(256, 256)  # llama.cpp's pairs of neighbours, back to two halves of a head
    assert np.array_equal(layer.self_attn.q_proj.weight.numpy(), rows)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_stored_beside_tied_embeddings_is_used(sample_model, tmp_path):
    checkpoint = open_checkpoint(sample_model)
    head = checkpoint.tensor("model.embed_tokens.weight").float()
    same = load_quantized(checkpoint, write(checkpoint, tmp_path / "same.gguf", extra=[("output.weight", head)]))
    half = load_quantized(checkpoint, write(checkpoint, tmp_path / "half.gguf", extra=[("output.weight", head / 2)]))
    assert torch.equal(logits(same), logits(load_float(checkpoint)))
    assert torch.allclose(logits(half), logits(same) / 2) and not torch.equal(half.lm_head.weight, half.model.embed_tokens.weight)


def test_a_split_file_loads_from_any_shard(tiny, tmp_path):
    write(tiny, tmp_path / "tiny.gguf", max_shard_bytes=100_000)
    shards = sorted(tmp_path.glob("*.gguf"))
    assert len(shards) > 2
    model = open_quantized(tiny, shards[1])
    assert torch.equal(logits(model.load()), logits(load_float(tiny))) and model.bytes == sum(s.stat().st_size for s in shards)


def test_pairs_hold_both_sides(tiny, tmp_path):
    pairs = list(open_quantized(tiny, write(tiny, tmp_path / "t.gguf", lambda n, w: w + 1 if n == "blk.1.ffn_up.weight" else w)).pairs())
    assert len(pairs) == 2 + 2 * 7 and all(p.type == "F32" and p.bits == 32 for p in pairs)
    assert {p.name for p in pairs if not torch.equal(p.original, p.decoded)} == {"blk.1.ffn_up.weight"}


def row(weights): return torch.cat([weights, weights[:1]])


REFUSED = {
    "architecture": (dict(keys={"general.architecture": "qwen2"}), "architecture qwen2, the model's is llama"),
    "layers": (dict(keys={"llama.block_count": 3}), "llama.block_count 3, the model's is 2"),
    "heads": (dict(keys={"llama.attention.head_count_kv": 4}), "head_count_kv 4, the model's is 2"),
    "rope": (dict(keys={"llama.rope.freq_base": 500000.0}), "rope.freq_base 500000, the model's is 10000"),
    "missing": (dict(leave={"blk.1.attn_k.weight"}), "no tensor blk.1.attn_k.weight"),
    "several": (dict(leave={"blk.1.attn_k.weight", "output.weight"}), "(and 1 more differences)"),
    "extra": (dict(extra=[("blk.2.attn_norm.weight", torch.ones(64))]), "a tensor blk.2.attn_norm.weight that the model has not"),
    "vocabulary": (dict(change=lambda n, w: row(w) if n == "token_embd.weight" else w), "token_embd.weight of shape (321, 64), the model's is (320, 64)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_models_file_is_refused(case, tiny, tmp_path):
    spoil, words = REFUSED[case]
    path = write(tiny, tmp_path / "other.gguf", **spoil)
    with pytest.raises(ConversionError) as caught: open_quantized(tiny, path)
    assert words in str(caught.value) and "other.gguf is not a quantization of" in str(caught.value) and "Hugging Face directory" in caught.value.suggestion


def test_missing_and_damaged_files(tiny, tmp_path):
    with pytest.raises(ModelNotFoundError, match="no quantized model at"): open_quantized(tiny, tmp_path / "none.gguf")
    path = write(tiny, tmp_path / "cut.gguf")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises((ModelNotFoundError, ConversionError)): open_quantized(tiny, path)
    (tmp_path / "text.gguf").write_text("not a model at all, only words")
    with pytest.raises(ConversionError, match="not a GGUF file"): open_quantized(tiny, tmp_path / "text.gguf")


def test_a_float_directory_is_judged_like_a_file(tiny, tmp_path):
    other = tmp_path / "rounded"
    shutil.copytree(tiny.path, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: w.bfloat16() for name, w in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    model = open_quantized(tiny, other)
    assert isinstance(model, FloatModel) and model.name == "rounded" and model.bytes < 0.6 * tiny.bytes
    assert 0 < (logits(model.load()) - logits(load_float(tiny))).abs().max() < 0.5
    assert {p.type for p in model.pairs()} == {"bfloat16"} and {p.bits for p in model.pairs()} == {16.0}
    save_file({name: w for name, w in weights.items() if "layers.1" not in name}, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match="is not a version of"): open_quantized(tiny, other)


def test_a_checkpoint_with_weights_missing_is_refused(tiny, tmp_path):
    shutil.copytree(tiny.path, tmp_path / "part")
    weights = load_file(tmp_path / "part" / "model.safetensors")
    save_file({name: w for name, w in weights.items() if "layers.1.mlp.up" not in name}, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match="up_proj"): load_float(tmp_path / "part")


def test_the_voice_of_transformers_comes_back(tiny):
    from transformers.utils import logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_float(tiny)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_placement():
    assert placement(10 ** 9, 6, "cpu", available=64e9) == ("cpu", torch.float32, 6)
    assert placement(10 ** 9, 6, "cpu", available=20e9) == ("cpu", torch.float32, 3)
    assert placement(10 ** 9, 6, "cpu", available=8e9) == ("cpu", torch.bfloat16, 2)
    assert placement(10 ** 9, 1, "cpu", torch.bfloat16, available=64e9) == ("cpu", torch.bfloat16, 1)
    assert placement(10 ** 9, 2, "cpu", available=float("inf")).together == 2
    with pytest.raises(OutOfMemoryError, match="two models in memory: 4.0 GB"): placement(10 ** 9, 1, "cpu", available=4e9)
    with pytest.raises(OutOfMemoryError): placement(10 ** 9, 1, "cpu", torch.float32, available=8e9)
    assert decoded.available_memory("cpu") > 1e8
    if not torch.cuda.is_available():
        with pytest.raises(ArgumentError, match="no device cuda"): placement(10 ** 9, 1, "cuda")
