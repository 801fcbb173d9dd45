"""Each model family, from a random transformers model to a GGUF that llama.cpp runs with the same logits.

The models are tiny and random everywhere, norms and biases included, and their weights are numbers that bfloat16 can hold. The tight comparison uses F32 files and an F32 cache: with BF16
weights llama.cpp rounds the activations of each matrix product to bfloat16, which is noise of its own and is held to a looser bound.
"""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf.constants import Keys
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llm_quantize.models.architectures import ARCHITECTURES, architecture
from llm_quantize.models.transforms import hf_tensors, permute, unpermute
from llm_quantize.models.checkpoint import open_checkpoint
from llm_quantize.errors import ConversionError
from llm_quantize.gguf.reader import open_gguf
from llm_quantize.gguf.container import write_gguf
from llm_quantize.models.family import family_settings
from llm_quantize.models.rope import rope_factors, rope_settings
from llm_quantize.models.tokenizers import tokenizer_metadata
from llm_quantize.quality.llama_cpp_model import open_llama

from tests.tiny import BASE, CASES, LLAMA3, VOCABULARY, YARN, longrope, random_model

llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, a development requirement")


def vocabulary(size):
    "The least llama.cpp accepts as a byte-level vocabulary."
    visible = [c for c in range(256) if 33 <= c <= 126 or 161 <= c <= 172 or c >= 174]
    rest = iter(range(256, 512))
    tokens = [chr(c) if c in visible else chr(next(rest)) for c in range(256)]
    tokens += [f"[PAD{i}]" for i in range(256, size)]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": np.array([1] * 256 + [5] * (size - 256), np.int32), "tokenizer.ggml.merges": ["a b"],
            "tokenizer.ggml.eos_token_id": 0}


def write(checkpoint, path, kind="F32", row=None, change=lambda t: t, keys=()):
    "The checkpoint as a GGUF of F32 or BF16 weights; `change` may spoil the tensors."
    row = row or architecture(checkpoint.config)
    tensors = [change(t) for t in row.tensors(checkpoint)]
    infos = [(t.name, t.shape, kind if t.quantizable else "F32") for t in tensors]
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16}
    metadata = {**row.metadata(checkpoint.config, "tiny"), **vocabulary(row.vocabulary(checkpoint.config)), **dict(keys)}
    write_gguf(path, metadata, infos, lambda i: tensors[i].load(checkpoint).to(dtypes[infos[i][2]]).contiguous().view(torch.uint8))
    return path


def llama_logits(path, tokens, context=None):
    "Logits of llama.cpp at every position."
    llama = open_llama(path, n_ctx=context or len(tokens), n_batch=len(tokens), n_ubatch=len(tokens), n_threads=1,
                       n_threads_batch=1, logits_all=True, type_k=0, type_v=0)
    llama.eval(tokens)
    logits = torch.from_numpy(np.array(llama.scores[:len(tokens)])).double()
    llama.close()
    return logits


def divergence(model, path, length):
    "Mean KLD of llama.cpp from transformers on random tokens, and the share of equal greedy tokens."
    tokens = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(): expected = model(tokens).logits[0].double()
    found = llama_logits(path, tokens[0].tolist())
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item(), (p.argmax(-1) == q.argmax(-1)).double().mean().item()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A function: a random model and the checkpoint of it, each made once."
    known = {}
    def make(name):
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            known[name] = random_model(name, folder), open_checkpoint(folder)
        return known[name]
    return make


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name, made, tmp_path):
    model, checkpoint = made(name)
    kld, agreement = divergence(model, write(checkpoint, tmp_path / "tiny.gguf"), CASES[name][2])
    print(f"{name}: KLD {kld:.2e}, greedy tokens equal {agreement:.1%}")
    assert kld < 1e-6 and agreement == 1


@pytest.mark.parametrize("name", ["llama3", "mixtral", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "gemma2", "gemma3", "phi3", "bitnet"])
def test_bf16_file(name, made, tmp_path, monkeypatch):
    "With BF16 weights llama.cpp rounds what it multiplies them with: transformers is made to do the same. A number on the edge may still fall the other way, so the bound is wider."
    linear = torch.nn.functional.linear
    routers = 4 # experts of a router, which stays F32
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w, b=None: linear(x.bfloat16().float() if w.shape[0] > routers else x, w, b))
    model, checkpoint = made(name)
    kld, agreement = divergence(model, write(checkpoint, tmp_path / "tiny.gguf", "BF16"), CASES[name][2])
    print(f"{name} BF16: KLD {kld:.2e}, greedy tokens equal {agreement:.1%}")
    assert kld < 1e-4 and agreement > 0.95


def real_model(path, target, length=128):
    "KLD of llama.cpp from transformers for a trained model, with its own tokenizer in the file."
    checkpoint = open_checkpoint(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    return divergence(model, write(checkpoint, target, keys=tokenizer_metadata(checkpoint.path, checkpoint.config)), length)


def test_the_sample_model(sample_model, tmp_path):
    kld, agreement = real_model(sample_model, tmp_path / "sample.gguf")
    assert kld < 1e-6 and agreement == 1


@pytest.mark.shared
@pytest.mark.parametrize("name", ["prose-46m", "trilm-27m"])
def test_larger_models(name, shared_model, tmp_path):
    kld, agreement = real_model(shared_model(name), tmp_path / "model.gguf")
    assert kld < 1e-6 and agreement == 1


def spoil(tensor, role, **changes): return replace(tensor, **changes) if tensor.role == role and not tensor.layer else tensor


CORRUPTIONS = {
    "rows not paired": ("llama", lambda t: spoil(t, "attn_k", transform="copy"), {}),
    "rows paired in qwen2": ("qwen2", lambda t: spoil(t, "attn_q", transform="permute", number=4), {}),
    "bias not paired": ("llama-biases", lambda t: replace(t, transform="copy") if t.name == "blk.0.attn_q.bias" else t, {}),
    "heads of k taken for those of q": ("llama", lambda t: spoil(t, "attn_k", number=4), {}),
    "no one added": ("gemma3", lambda t: spoil(t, "norm", transform="copy"), {}),
    "experts exchanged": ("qwen3moe", lambda t: spoil(t, "ffn_up_exps", sources=t.sources[::-1]), {}),
    "gate and up exchanged": ("mixtral", lambda t: spoil(t, "ffn_gate_exps", sources=tuple(s.replace("w1", "w3").replace("gate_proj", "up_proj") for s in t.sources)), {}),
    "llama3 factors forgotten": ("llama3", lambda t: replace(t, values=(1.0,) * 32) if t.name.startswith("rope") else t, {}),
    "long factors for short": ("phi3-longrope-short", lambda t: replace(t, values=tuple(longrope(32)["long_factor"])) if "short" in t.name else t, {}),
    "longrope attention forgotten": ("phi3-longrope-long", lambda t: t, {"phi3.rope.scaling.attn_factor": 1.0}),
    "yarn attention forgotten": ("llama-yarn-attention", lambda t: t, {"llama.rope.scaling.attn_factor": 1.0}),
    "yarn taken for linear": ("qwen3-yarn", lambda t: t, {"qwen3.rope.scaling.type": "linear"}),
    "other base": ("qwen2", lambda t: t, {"qwen2.rope.freq_base": 1000.0}),
    "other base in the window": ("gemma3", lambda t: t, {"gemma3.rope.freq_base_swa": 1e6}),
    "no pattern": ("gemma3-pattern", lambda t: t, {"gemma3.attention.sliding_window_pattern": 6}),
    "other window": ("gemma2", lambda t: t, {"gemma2.attention.sliding_window": 20}),
    "no soft cap": ("gemma2", lambda t: t, {"gemma2.final_logit_softcapping": 1.5}),
    "attention's norm forgotten": ("bitnet", lambda t: replace(t, transform="offset", number=1.0) if t.name == "blk.0.attn_sub_norm.weight" else t, {}),
    "feed-forward's norm forgotten": ("bitnet", lambda t: replace(t, transform="offset", number=1.0) if t.name == "blk.0.ffn_sub_norm.weight" else t, {}),
    "whole head rotated": ("phi3-partial-tied", lambda t: t, {"phi3.rope.dimension_count": 64}),
}


@pytest.mark.parametrize("what", CORRUPTIONS)
def test_corruption_is_seen(what, made, tmp_path):
    "Each trap, walked into: the comparison above must notice."
    name, change, keys = CORRUPTIONS[what]
    model, checkpoint = made(name)
    kld, agreement = divergence(model, write(checkpoint, tmp_path / "tiny.gguf", change=change, keys=keys), CASES[name][2])
    print(f"{what}: KLD {kld:.2e}, greedy tokens equal {agreement:.1%}")
    assert kld > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_back_to_the_checkpoint(name, made, tmp_path):
    "to_hf undoes load, bit by bit: from the list of tensors alone, and through a BF16 file."
    _, checkpoint = made(name)
    tensors = architecture(checkpoint.config).tensors(checkpoint)
    back = {key: weights.clone() for key, weights in hf_tensors(tensors, lambda t: t.load(checkpoint))}
    assert sorted(back) == sorted(checkpoint.names)
    for key, weights in back.items(): assert torch.equal(weights, checkpoint.tensor(key)), key
    for tensor in tensors: assert tuple(tensor.load(checkpoint).shape) == tensor.shape
    file = open_gguf(write(checkpoint, tmp_path / "tiny.gguf", "BF16"))
    for key, weights in hf_tensors(tensors, lambda t: file.decode(t.name)): assert torch.equal(weights, checkpoint.tensor(key)), key


def test_permutation_is_llamas():
    "Row i and row i + half of a head become neighbours, heads stay where they are, and two permutations are not none."
    rows = torch.arange(24)
    assert permute(rows, 3).tolist()[:8] == [0, 4, 1, 5, 2, 6, 3, 7] and permute(rows, 3).tolist()[8] == 8
    assert torch.equal(unpermute(permute(rows, 3), 3), rows) and not torch.equal(permute(permute(rows, 3), 3), rows)
    weight = torch.randn(24, 5)
    assert torch.equal(permute(weight, 3)[:, 0], permute(weight[:, 0], 3))


def renamed(folder, target, change, config=lambda c: c):
    "A copy of a checkpoint with other names and config."
    target.mkdir()
    save_file(change(load_file(folder / "model.safetensors")), target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(config(json.loads((folder / "config.json").read_text()))))
    return open_checkpoint(target)


def fuse(tensors): # experts as transformers 5 holds them in memory
    for old, new in (("block_sparse_moe", "mlp"), (".w1.", ".gate_proj."), (".w2.", ".down_proj."), (".w3.", ".up_proj.")): # as Mixtral's names were
        tensors = {k.replace(old, new): v for k, v in tensors.items()}
    fused, parts = {k: v for k, v in tensors.items() if ".experts." not in k}, {k: v for k, v in tensors.items() if ".experts." in k}
    layers = sorted({k.split(".experts.")[0] for k in parts})
    for layer in layers:
        expert = lambda i, what: parts[f"{layer}.experts.{i}.{what}.weight"]
        fused[f"{layer}.experts.gate_up_proj"] = torch.stack([torch.cat([expert(i, "gate_proj"), expert(i, "up_proj")]) for i in range(4)])
        fused[f"{layer}.experts.down_proj"] = torch.stack([expert(i, "down_proj") for i in range(4)])
    return fused


@pytest.mark.parametrize("name", ["mixtral", "qwen2moe", "qwen3moe"])
def test_fused_experts(name, made, tmp_path):
    "The same file from experts one by one and from experts fused; and the fused checkpoint comes back whole."
    _, single = made(name)
    fused = renamed(single.path, tmp_path / "fused", fuse)
    assert len(fused.names) < len(single.names)
    first, second = (write(c, tmp_path / f"{i}.gguf").read_bytes() for i, c in enumerate((single, fused)))
    assert first == second
    tensors = architecture(fused.config).tensors(fused)
    back = dict(hf_tensors(tensors[::-1], lambda t: t.load(fused)))
    assert sorted(back) == sorted(fused.names) and all(torch.equal(back[k], fused.tensor(k)) for k in back)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_text_part_of_gemma3(prefix, made, tmp_path):
    "A Gemma3ForConditionalGeneration gives the same file as its text model alone, and says that it will not see."
    _, text = made("gemma3")
    def change(tensors):
        return {k.replace("model.", prefix, 1): v for k, v in tensors.items()} | {"vision_tower.head.probe": torch.zeros(1, 1, 8), "multi_modal_projector.mm_soft_emb_norm.weight": torch.zeros(8)}
    def config(c):
        return {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "vision_config": {"hidden_size": 8}, "text_config": {k: v for k, v in c.items() if k != "architectures"}}
    whole = renamed(text.path, tmp_path / "whole", change, config)
    assert write(text, tmp_path / "a.gguf").read_bytes() == write(whole, tmp_path / "b.gguf").read_bytes()
    assert "images" in " ".join(architecture(whole.config).limits(whole.config)) and not architecture(text.config).limits(text.config)


def test_gemma3_config_with_silent_defaults():
    "The 4B model's config.json leaves out what Gemma3TextConfig has as defaults: heads, head size, vocabulary, bases."
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
              "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}, "vision_config": {}}
    found = architecture(config).metadata(config, "gemma-3-4b")
    expected = {"attention.head_count": 8, "attention.head_count_kv": 4, "attention.key_length": 256, "context_length": 131072, "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4,
                "rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "attention.sliding_window": 1024, "attention.layer_norm_rms_epsilon": 1e-6}
    assert {k: found[f"gemma3.{k}"] for k in expected} == expected


def test_config_of_transformers_4(made):
    "rope_theta and rope_scaling, in either spelling, mean what rope_parameters means."
    for name in ("llama3", "llama-yarn", "llama-linear", "phi3-longrope-long", "gemma3-linear"):
        new = made(name)[1].config
        rope = new["rope_parameters"]
        whole = rope.get("full_attention", rope)
        scaling = {k: v for k, v in whole.items() if k not in ("rope_theta", "rope_type", "partial_rotary_factor")}
        for key in ("rope_type", "type"):
            old = {k: v for k, v in new.items() if k not in ("rope_parameters", "layer_types")}
            old |= {"rope_theta": whole["rope_theta"], "rope_scaling": {**scaling, key: "su" if name.startswith("phi3") else whole["rope_type"]}}
            if "sliding_attention" in rope: old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
            row = architecture(new)
            assert row.metadata(old, "x") == row.metadata(new, "x"), (name, key)
            c_old, c_new = family_settings(row, old), family_settings(row, new)
            assert rope_factors(rope_settings(c_old), c_old["head_dim"]) == rope_factors(rope_settings(c_new), c_new["head_dim"])


def test_keys_are_ggufs(made):
    "Every metadata key that any family writes is one that the gguf package knows, and every value is of a plain kind."
    known = {value for group in vars(Keys).values() if isinstance(group, type) for value in vars(group).values() if isinstance(value, str)}
    for name in CASES:
        config = made(name)[1].config
        found = architecture(config).metadata(config, name)
        assert next(iter(found)) == "general.architecture"
        for key, value in found.items():
            assert key in known or key.replace(found["general.architecture"], "{arch}", 1) in known, key
            assert isinstance(value, (bool, int, float, str, np.ndarray)), key


@pytest.mark.parametrize("name", ["llama3", "llama-biases", "mixtral", "qwen2moe", "qwen3moe", "gemma3", "phi3-longrope-long", "bitnet"])
def test_quantizable_as_in_llama_quantize(name, made, tmp_path):
    "What llama.cpp's quantizer leaves alone when it makes everything Q8_0 is what `quantizable` says."
    _, checkpoint = made(name)
    source, target = write(checkpoint, tmp_path / "f32.gguf"), tmp_path / "q8.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, 1
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params) == 0
    types = {key: kind for key, (kind, _) in open_gguf(target).tensors.items()}
    tensors = architecture(checkpoint.config).tensors(checkpoint)
    assert {t.name: t.quantizable for t in tensors} == {key: kind != "F32" for key, kind in types.items()}


def test_activation_that_llama_cpp_lacks(tmp_path, monkeypatch):
    "llama.cpp computes every BitNet with SiLU, whatever the file says, so a squared ReLU is refused; if this test fails, llama.cpp has learnt it."
    monkeypatch.setitem(CASES, "relu2", ("BitNetConfig", {**BASE, "hidden_act": "relu2", "tie_word_embeddings": True}, 64))
    model, checkpoint = random_model("relu2", tmp_path / "relu2"), open_checkpoint(tmp_path / "relu2")
    row = architecture(checkpoint.config)
    with pytest.raises(ConversionError, match="relu2"): row.metadata(checkpoint.config, "x")
    kld, _ = divergence(model, write(checkpoint, tmp_path / "tiny.gguf", row=replace(row, requires=()), keys={"bitnet.hidden_activation": "relu2"}), 64)
    assert kld > 1e-2


@pytest.mark.parametrize("name", ["mistral-window", "phi3-window"])
def test_window_that_llama_cpp_lacks(name, made, tmp_path):
    "Beyond the window these differ in this llama.cpp, and `limits` says so; if this test fails, llama.cpp has learnt it."
    model, checkpoint = made(name)
    kld, _ = divergence(model, write(checkpoint, tmp_path / "tiny.gguf"), 128)
    assert kld > 1e-2
    assert "no sliding window" in architecture(checkpoint.config).limits(checkpoint.config)[0]


def test_limits_of_others():
    base = {"max_position_embeddings": 1000, "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 64, "rms_norm_eps": 1e-6, "vocab_size": 9}
    qwen = {"architectures": ["Qwen2ForCausalLM"], **base, "sliding_window": 100}
    assert not architecture(qwen).limits(qwen) and architecture(qwen).limits({**qwen, "use_sliding_window": True})
    llama = {"architectures": ["LlamaForCausalLM"], **base, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    assert "dynamic" in architecture(llama).limits(llama)[0]


def test_output_matrix_of_a_tied_model(made, tmp_path):
    "A copy of the embedding is dropped; an lm_head of its own is kept, and llama.cpp uses it; Gemma 2 has no place for one."
    model = random_model("llama-tied", tmp_path)
    head = torch.randn(VOCABULARY, 256).bfloat16().float() / 16
    same = renamed(tmp_path, tmp_path / "same", lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    other = renamed(tmp_path, tmp_path / "other", lambda t: {**t, "lm_head.weight": head})
    names = lambda c: [t.name for t in architecture(c.config).tensors(c)]
    assert "output.weight" not in names(same) and names(other)[-1] == "output.weight"
    model.lm_head.weight = torch.nn.Parameter(head)
    assert divergence(model, write(other, tmp_path / "tiny.gguf"), 64)[0] < 1e-6
    _, gemma2 = made("gemma2")
    extra = renamed(gemma2.path, tmp_path / "head", lambda t: {**t, "lm_head.weight": torch.randn(VOCABULARY, 128)})
    with pytest.raises(ConversionError, match="lm_head.weight differs"): architecture(extra.config).tensors(extra)
    copy = renamed(gemma2.path, tmp_path / "copy", lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    assert names(copy) == names(gemma2)


BAD_CONFIGS = {
    "quantized": ("llama", {"quantization_config": {"quant_method": "awq"}}, "already quantized"),
    "activation": ("qwen2", {"hidden_act": "gelu"}, "activation"),
    "no layers": ("llama", {"num_hidden_layers": None}, "num_hidden_layers"),
    "not a number": ("llama", {"hidden_size": "256"}, "hidden_size"),
    "negative": ("llama", {"intermediate_size": -1}, "intermediate_size"),
    "truth value": ("llama", {"num_hidden_layers": True}, "num_hidden_layers"),
    "yarn betas": ("qwen3-yarn", {"rope_parameters": {**YARN, "beta_fast": 16}}, "beta_fast"),
    "yarn untruncated": ("qwen3-yarn", {"rope_parameters": {**YARN, "truncate": False}}, "truncate"),
    "llama3 rope in qwen": ("qwen3-yarn", {"rope_parameters": LLAMA3}, "llama3"),
    "rope without factor": ("llama-linear", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
    "part of a head": ("llama", {"partial_rotary_factor": 0.5, "rope_parameters": None}, "part"),
    "head size": ("qwen2", {"head_dim": 32}, "hidden size"),
    "query scale": ("gemma3", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar"),
    "soft cap": ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "no soft cap": ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping"),
    "experts not normalised": ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob"),
    "dense layers": ("qwen3moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
}


@pytest.mark.parametrize("what", BAD_CONFIGS)
def test_config_that_cannot_be_converted(what, made):
    name, change, word = BAD_CONFIGS[what]
    config = made(name)[1].config
    architecture(config).metadata(config, "x")
    with pytest.raises(ConversionError, match=word) as caught: architecture(config).metadata({**config, **change}, "x")
    assert caught.value.suggestion and caught.value.exit_code == 8


def test_27b_query_scale():
    "At 46 layers llama.cpp scales Gemma 2's queries by hidden size / heads, which is what that model's config says."
    config = {"architectures": ["Gemma2ForCausalLM"], "hidden_size": 4608, "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "num_hidden_layers": 46,
              "intermediate_size": 36864, "query_pre_attn_scalar": 144, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "vocab_size": 256000}
    architecture(config).metadata(config, "gemma-2-27b")
    with pytest.raises(ConversionError, match="144"): architecture(config).metadata({**config, "num_hidden_layers": 45}, "x")


def test_unknown_architecture_names_the_known():
    for config in ({"architectures": ["MambaForCausalLM"]}, {"model_type": "mamba"}, {}, {"architectures": None}, {"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"}):
        with pytest.raises(ConversionError, match="LlamaForCausalLM.*Phi3ForCausalLM") as caught: architecture(config)
        assert "row" in caught.value.suggestion
    for row in ARCHITECTURES:
        assert all(architecture({"architectures": [hf]}) is row for hf in row.hf) and all(architecture({"model_type": kind}) is row for kind in row.model_types)


BAD_TENSORS = {
    "missing": (lambda t: {k: v for k, v in t.items() if "1.mlp.up_proj" not in k}, "1 tensors are missing.*model.layers.1.mlp.up_proj.weight"),
    "missing head": (lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"}, "lm_head.weight is missing"),
    "missing embedding": (lambda t: {k: v for k, v in t.items() if "embed" not in k}, "1 tensors are missing.*model.embed_tokens.weight"),
    "one layer more": (lambda t: {**t, "model.layers.2.mlp.up_proj.weight": torch.zeros(512, 256)}, "model.layers.2.mlp.up_proj.weight"),
    "leftover scale": (lambda t: {**t, "model.layers.0.mlp.up_proj._scale": torch.zeros(1)}, "no place.*_scale"),
    "adapter": (lambda t: {**t, "model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(8, 256)}, "no place.*lora_A"),
    "foreign norm": (lambda t: {**t, "model.layers.0.self_attn.q_norm.weight": torch.zeros(64)}, "no place.*q_norm"),
    "larger vocabulary": (lambda t: {**t, "model.embed_tokens.weight": torch.zeros(VOCABULARY + 8, 256)}, "embed_tokens.weight has shape"),
    "other heads": (lambda t: {**t, "model.layers.0.self_attn.k_proj.weight": torch.zeros(256, 256)}, "k_proj.weight has shape"),
    "transposed": (lambda t: {**t, "model.layers.0.mlp.down_proj.weight": torch.zeros(512, 256)}, "down_proj.weight has shape"),
}


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_checkpoint_that_cannot_be_converted(what, made, tmp_path):
    change, message = BAD_TENSORS[what]
    checkpoint = renamed(made("llama")[1].path, tmp_path / "bad", change)
    with pytest.raises(ConversionError, match=message) as caught: architecture(checkpoint.config).tensors(checkpoint)
    assert caught.value.suggestion


def test_experts_that_do_not_add_up(made, tmp_path):
    for change, message in ((lambda t: {k: v for k, v in t.items() if "0.mlp.experts.3.up" not in k}, "3 experts, config.json says 4"),
                            (lambda t: {k: v for k, v in t.items() if "experts.2." not in k}, "3 experts, config.json says 4"),
                            (lambda t: {**t, "model.layers.0.mlp.experts.4.up_proj.weight": torch.zeros(96, 128)}, "5 experts")):
        checkpoint = renamed(made("qwen3moe")[1].path, tmp_path / message[:1].join(str(len(list(tmp_path.iterdir())))), change)
        with pytest.raises(ConversionError, match=message): architecture(checkpoint.config).tensors(checkpoint)


def test_old_buffers_are_ignored(made, tmp_path):
    "Llama 2 checkpoints carry inv_freq buffers; they change nothing."
    extra = renamed(made("llama")[1].path, tmp_path / "old", lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(32)})
    assert write(extra, tmp_path / "a.gguf").read_bytes() == write(made("llama")[1], tmp_path / "b.gguf").read_bytes()


def test_bias_without_place(made, tmp_path):
    "Qwen3 in llama.cpp adds no bias after attention: one in the checkpoint is refused, not lost."
    bad = renamed(made("qwen3")[1].path, tmp_path / "bad", lambda t: {**t, "model.layers.1.self_attn.o_proj.bias": torch.zeros(256)})
    with pytest.raises(ConversionError, match="o_proj.bias"): architecture(bad.config).tensors(bad)


def test_dtype_is_kept(made, tmp_path):
    "Weights are handed on in the checkpoint's dtype, except where something is added."
    half = renamed(made("gemma2")[1].path, tmp_path / "bf16", lambda t: {k: v.bfloat16() for k, v in t.items()})
    for tensor in architecture(half.config).tensors(half):
        assert tensor.load(half).dtype == (torch.float32 if tensor.transform == "offset" else torch.bfloat16)
    back = dict(hf_tensors(architecture(half.config).tensors(half), lambda t: t.load(half)))
    assert all(torch.equal(weights.bfloat16(), half.tensor(name)) for name, weights in back.items())
