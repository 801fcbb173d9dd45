"""Every tensor of every mix against llama.cpp's own quantizer, on real and made-up models; then each rule is broken in turn and must be missed.

llama.cpp is asked twice: a dry run, whose log names each tensor's type, for all models with and without an importance matrix; and real files, read back with `gguf`.
Types depend on names, row lengths and metadata only, so the made-up models have rows as long as real ones and matrices of two rows.
"""
import ctypes
import json
import random
import re
from functools import lru_cache

import gguf
import llama_cpp
import numpy as np
import pytest
from llama_cpp import _logger

from llm_quantize.gguf import mixes as recipes
from llm_quantize.gguf import tensor_rules
from llm_quantize.models.architectures import architecture
from llm_quantize.models.checkpoint import Checkpoint
from llm_quantize.errors import ArgumentError, ConversionError
from llm_quantize.quants.qtypes import QTYPES
from llm_quantize.gguf.mixes import MIXES, ModelFacts, facts_from_metadata, find_mix, plan_mix

# --- models -----------------------------------------------------------------------------------------------------------------------------


def metadata(arch, layers, heads, kv, experts=0, **more):
    "The keys llama.cpp reads before it chooses types."
    eps = "attention.layer_norm_epsilon" if arch == "gpt2" else "attention.layer_norm_rms_epsilon"
    keys = {"block_count": layers, "context_length": 64, "embedding_length": heads * 8, "feed_forward_length": 512, "attention.head_count": heads,
            "attention.head_count_kv": kv, eps: 1e-5, "vocab_size": 64, **({"expert_count": experts, "expert_used_count": 2} if experts else {}), **more}
    return {"general.architecture": arch, **{f"{arch}.{key}": value for key, value in keys.items()}}


def tensors(layers, width=256, ffn=512, tied=False, fused=False, experts=0, shared=False, norms=(), biases=False, dense=(), attention=None, only=None):
    "Names and shapes of a decoder; `dense`: layers without experts, `attention`: layers that have it, `only`: kinds of tensors to keep, default all."
    made = {"token_embd.weight": (2, width), "output_norm.weight": (width,)}
    if not tied: made["output.weight"] = (2, width)
    for i in range(layers):
        block = {"attn_norm": (width,), "ffn_norm": (width,), **{norm: (64,) for norm in norms}}
        if attention is None or i in attention:
            block |= {"attn_qkv": (2, width)} if fused else {"attn_q": (2, width), "attn_k": (2, width), "attn_v": (2, width)}
            block["attn_output"] = (2, width)
        if experts and i not in dense:
            block |= {"ffn_gate_inp": (experts, width), "ffn_gate_exps": (experts, 2, width), "ffn_up_exps": (experts, 2, width), "ffn_down_exps": (experts, 2, ffn)}
            if shared: block |= {"ffn_gate_inp_shexp": (width,), "ffn_gate_shexp": (2, width), "ffn_up_shexp": (2, width), "ffn_down_shexp": (2, ffn)}
        else:
            block |= {"ffn_up": (2, width), "ffn_down": (2, ffn), **({} if fused else {"ffn_gate": (2, width)})}
        made |= {f"blk.{i}.{kind}.weight": shape for kind, shape in block.items() if only is None or kind in only}
        if biases: made |= {f"blk.{i}.attn_{x}.bias": (width,) for x in "qkv"}
    return list(made.items())


def odd_names():
    "A tensor for each name that is never quantized, in a model otherwise plain."
    odd = [f"blk.0.x{part}" if part.startswith(".") else f"blk.0.{part}" for part in tensor_rules.ALWAYS_F32]
    odd = [name if name.endswith("weight") else f"{name}.weight" for name in odd]
    return [*tensors(2), *((name, (2, 256)) for name in odd), ("position_embd.weight", (2, 256)), ("token_types.weight", (2, 256)),
            ("blk.1.attn_q.lora", (2, 256)), ("blk.1.ffn_gate_tid.weight", (1, 256)), ("rope_freqs.weight", (64,))]


THIN = ("attn_v", "attn_output", "ffn_down", "ffn_down_exps", "ffn_up")

MODELS = {
    "llama, 7 layers": (metadata("llama", 7, 4, 4), tensors(7)),
    "llama, 7 layers, tied": (metadata("llama", 7, 4, 4), tensors(7, tied=True)),
    "llama, 32 layers, GQA 3": (metadata("llama", 32, 24, 8), tensors(32)),
    "llama, 32 layers, GQA 4": (metadata("llama", 32, 32, 8), tensors(32)),
    "llama, 33 layers, GQA 8, tied": (metadata("llama", 33, 64, 8), tensors(33, tied=True)),
    "llama, 65B": (metadata("llama", 80, 64, 64), tensors(80, only=THIN)),
    "llama, 70B": (metadata("llama", 80, 64, 8), tensors(80, only=THIN)),
    "llama, 80 layers, GQA 2": (metadata("llama", 80, 64, 32), tensors(80, only=THIN)),
    "llama, 80 layers, 8 experts": (metadata("llama", 80, 64, 8, 8), tensors(80, experts=8, only=THIN)),
    "llama, 4 experts": (metadata("llama", 9, 8, 8, 4), tensors(9, experts=4)),
    "llama, 3 experts": (metadata("llama", 9, 8, 8, 3), tensors(9, experts=3)),
    "llama, 16 experts": (metadata("llama", 17, 8, 8, 16), tensors(17, experts=16)),
    "llama, one expert": (metadata("llama", 9, 8, 8, 1, expert_used_count=1), tensors(9)),
    "llama, attention in every third layer": (metadata("llama", 24, 8, 4), tensors(24, attention=range(0, 24, 3))),
    "mixtral, 32 layers": (metadata("llama", 32, 32, 8, 8), tensors(32, experts=8)),
    "mixtral, 56 layers": (metadata("llama", 56, 48, 8, 8), tensors(56, experts=8, only=THIN)),
    "mixtral, no GQA, tied": (metadata("llama", 16, 8, 8, 8), tensors(16, experts=8, tied=True)),
    "qwen2, 24 layers": (metadata("qwen2", 24, 14, 2), tensors(24, tied=True, biases=True)),
    "qwen2, 72B": (metadata("qwen2", 80, 64, 8), tensors(80, only=THIN)),
    "qwen2, 80 layers, no GQA": (metadata("qwen2", 80, 64, 64), tensors(80, only=THIN)),
    "qwen3, 28 layers": (metadata("qwen3", 28, 16, 8), tensors(28, tied=True, norms=("attn_q_norm", "attn_k_norm"))),
    "qwen2moe, 24 layers": (metadata("qwen2moe", 24, 16, 16, 60, **{"expert_feed_forward_length": 256}), tensors(24, experts=60, shared=True, biases=True)),
    "qwen3moe, 48 layers": (metadata("qwen3moe", 48, 32, 4, 128), tensors(48, experts=128, norms=("attn_q_norm", "attn_k_norm"), only=THIN)),
    "qwen3moe, 8 experts, shared": (metadata("qwen3moe", 24, 8, 8, 8), tensors(24, experts=8, shared=True)),
    "qwen3moe, some layers dense": (metadata("qwen3moe", 24, 8, 4, 16), tensors(24, experts=16, dense=range(0, 24, 2))),
    "gemma2, 26 layers": (metadata("gemma2", 26, 8, 4), tensors(26, tied=True, norms=("post_attention_norm", "post_ffw_norm"))),
    "gemma3, 34 layers": (metadata("gemma3", 34, 8, 4), tensors(34, tied=True, norms=("post_attention_norm", "post_ffw_norm", "attn_q_norm", "attn_k_norm"))),
    "phi3, 32 layers": (metadata("phi3", 32, 32, 32, **{"rope.dimension_count": 8}), tensors(32, fused=True)),
    "phi3, 40 layers, GQA 4": (metadata("phi3", 40, 40, 10, **{"rope.dimension_count": 8}), tensors(40, fused=True)),
    "gpt2": (metadata("gpt2", 12, 12, 12), [*tensors(12, fused=True, tied=True), ("position_embd.weight", (2, 256))]),
    "rows of 576 and 1536": (metadata("llama", 30, 9, 3), tensors(30, 576, 1536, tied=True)),
    "rows of 576 and 1504": (metadata("llama", 30, 12, 3), tensors(30, 576, 1504)),
    "rows of 256 and 100": (metadata("llama", 9, 12, 3), tensors(9, 256, 100)),
    "rows of 100 and 96": (metadata("llama", 9, 12, 3), tensors(9, 100, 96)),
    "rows of 100 and 96, tied": (metadata("llama", 9, 12, 3), tensors(9, 100, 96, tied=True)),
    "rows of 96, 8 experts": (metadata("llama", 9, 12, 3, 8), tensors(9, 96, 96, experts=8)),
    "per-layer embedding, tied": (metadata("llama", 8, 8, 4), [*tensors(8, tied=True), ("per_layer_token_embd.weight", (2, 256))]),
    "per-layer embedding": (metadata("llama", 8, 8, 4), [*tensors(8), ("per_layer_token_embd.weight", (2, 256))]),
    "odd names": (metadata("llama", 2, 8, 4), odd_names()),
    **{f"{n} layers": (metadata("llama", n, 8, 4), tensors(n, tied=n % 2 == 0, only=THIN)) for n in (1, 2, 3, 4, 5, 6, 8, 12, 15, 16, 22, 26, 28, 31, 40, 48, 62)},
}


def checkpoint_model(path, load=False):
    "Metadata, shapes and, if asked, the weights of a real Llama checkpoint under GGUF names; no permutation: types do not see it."
    checkpoint = Checkpoint(path)
    c = checkpoint.config
    assert c["model_type"] == "llama"
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c["num_hidden_layers"])
    found = {names.get_name(name, try_suffixes=(".weight",)): name for name in checkpoint.names}
    meta = metadata("llama", c["num_hidden_layers"], c["num_attention_heads"], c["num_key_value_heads"], embedding_length=c["hidden_size"],
                    feed_forward_length=c["intermediate_size"], vocab_size=c["vocab_size"])
    shapes = [(name, checkpoint.shape(source)) for name, source in found.items()]
    return meta, shapes, {name: checkpoint.tensor(source).float().numpy() for name, source in found.items()} if load else None


# --- llama.cpp --------------------------------------------------------------------------------------------------------------------------


def write_source(path, meta, shapes, weights=None):
    "An F32 GGUF, so that what llama.cpp leaves alone shows as F32; zeros unless weights are given."
    writer = gguf.GGUFWriter(path, meta["general.architecture"])
    for key, value in meta.items():
        if key != "general.architecture": (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    for name, shape in shapes:
        writer.add_tensor(name, np.zeros(shape, np.float32) if weights is None else weights[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def parameters(mix, imatrix=None):
    "Arguments of `llama_model_quantize`; `imatrix`: name -> float32 array. Keep the second value alive during the call."
    found = llama_cpp.llama_model_quantize_default_params()
    found.ftype, found.nthread = MIXES[mix].ftype, 2
    if imatrix is None: return found, None
    rows = [(name.encode(), values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size) for name, values in imatrix.items()]
    table = (llama_cpp.llama_cpp.llama_model_imatrix_data * (len(rows) + 1))(*rows, (None, None, 0))
    found.imatrix = ctypes.cast(table, type(found.imatrix))
    return found, (table, imatrix)


def dry_run(source, mix, has_imatrix):
    "Type of every tensor as the log of llama.cpp's dry run has it."
    log = []
    listener = llama_cpp.llama_log_callback(lambda level, text, data: log.append(text))
    params, alive = parameters(mix, {"some": np.ones(1, np.float32)} if has_imatrix else None)
    params.dry_run = True
    llama_cpp.llama_log_set(listener, ctypes.c_void_p(0))
    try: failed = llama_cpp.llama_model_quantize(str(source).encode(), str(source.with_suffix(".out")).encode(), ctypes.byref(params))
    finally: llama_cpp.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))
    text = b"".join(log).decode()
    assert not failed, text[-500:]
    lines = re.findall(r"\[ *\d+/ *\d+\] (\S+) +- \[.*?\], type = +(\w+), size = +[\d.]+ MiB(?: -> +[\d.]+ MiB \((\w+)\))?", text)
    return {name: (new or old).upper() for name, old, new in lines}


def real_run(source, out, mix, imatrix=None):
    "Type of every tensor in the file that llama.cpp writes."
    params, alive = parameters(mix, imatrix)
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)) == 0
    reader = gguf.GGUFReader(out)
    assert reader.fields["general.file_type"].contents() == MIXES[mix].ftype
    return {t.name: t.tensor_type.name for t in reader.tensors}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    "A function: (model, mix, has_imatrix) -> types by llama.cpp, each asked once."
    folder = tmp_path_factory.mktemp("recipes")
    source = lru_cache(None)(lambda model: write_source(folder / f"{list(MODELS).index(model)}.gguf", *MODELS[model]))
    return lru_cache(None)(lambda model, mix, has_imatrix: dry_run(source(model), mix, has_imatrix))


def ours(model, mix, has_imatrix):
    meta, shapes = MODELS[model]
    return {t.name: t.type for t in plan_mix(mix, shapes, facts_from_metadata(meta), has_imatrix)}


# --- the proof --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_types_equal_llama_cpp(oracle, model):
    for mix in MIXES:
        for has_imatrix in (False, True):
            theirs, found = oracle(model, mix, has_imatrix), ours(model, mix, has_imatrix)
            assert len(theirs) == len(MODELS[model][1])
            assert {n: (found[n], t) for n, t in theirs.items() if found[n] != t} == {}, f"{mix}, has_imatrix={has_imatrix}"


@pytest.mark.parametrize("name", ["sample-4m", "prose-46m", "trilm-27m"])
def test_types_of_real_models(shared_model, sample_model, tmp_path, name):
    meta, shapes, _ = checkpoint_model(sample_model if name == "sample-4m" else shared_model(name))
    source = write_source(tmp_path / "source.gguf", meta, shapes)
    for mix in MIXES:
        for has_imatrix in (False, True):
            plan = plan_mix(mix, shapes, facts_from_metadata(meta), has_imatrix)
            assert {t.name: t.type for t in plan} == dry_run(source, mix, has_imatrix), f"{mix}, has_imatrix={has_imatrix}"


def test_types_and_bytes_in_files_of_the_sample_model(sample_model, tmp_path):
    meta, shapes, weights = checkpoint_model(sample_model, load=True)
    source = write_source(tmp_path / "source.gguf", meta, shapes, weights)
    ones = {name: np.ones(shape[-1], np.float32) for name, shape in shapes}
    for mix in [m for m in MIXES if not m.startswith("IQ")] + ["IQ4_XS", "IQ3_XXS"]:  # llama.cpp needs minutes for the rest
        imatrix = ones if mix in ("IQ3_XXS", "Q2_K_S", "Q4_0") else None
        plan = plan_mix(mix, shapes, facts_from_metadata(meta), imatrix is not None)
        assert {t.name: t.type for t in plan} == real_run(source, tmp_path / "out.gguf", mix, imatrix), mix
        assert plan.bytes == sum(int(t.n_bytes) for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors)


@pytest.mark.parametrize("mix", ["Q4_K_M", "Q3_K_M"])
def test_types_in_files_of_prose_46m(shared_model, tmp_path, mix):
    meta, shapes, weights = checkpoint_model(shared_model("prose-46m"), load=True)
    source = write_source(tmp_path / "source.gguf", meta, shapes, weights)
    assert {t.name: t.type for t in plan_mix(mix, shapes, facts_from_metadata(meta))} == real_run(source, tmp_path / "out.gguf", mix)


@pytest.mark.parametrize("model", ["mixtral, 32 layers", "rows of 100 and 96", "llama, 70B", "phi3, 40 layers, GQA 4"])
def test_types_in_files_of_made_up_models(oracle, tmp_path, model):
    "The dry run tells the truth: files hold what its log said."
    meta, shapes = MODELS[model]
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes}
    source = write_source(tmp_path / "source.gguf", meta, shapes, weights)
    ones = {name: np.ones(shape[-1] * (shape[0] if len(shape) == 3 else 1), np.float32) for name, shape in shapes}
    for mix in ("Q4_K_M", "Q3_K_M", "IQ3_XXS", "IQ1_S", "TQ2_0", "IQ4_NL"):
        found = real_run(source, tmp_path / "out.gguf", mix, ones)
        assert found == oracle(model, mix, True) == ours(model, mix, True)


# --- broken on purpose: each rule, each threshold -----------------------------------------------------------------------------------------

MODELS_FOR_DAMAGE = sorted(MODELS, key=lambda m: len(MODELS[m][1]))  # small ones first: most damage shows there


def noticed(oracle, mix):
    "Whether some model shows a difference for this mix."
    return any(ours(model, mix, has) != oracle(model, mix, has) for model in MODELS_FOR_DAMAGE for has in (False, True))


@pytest.mark.parametrize("mix, index", [(mix, i) for mix, rules in recipes._RULES.items() for i in range(len(rules))],
                         ids=lambda v: v if isinstance(v, str) else None)
def test_a_missing_rule_is_noticed(oracle, monkeypatch, mix, index):
    rules = recipes._RULES[mix]
    monkeypatch.setitem(recipes._RULES, mix, rules[:index] + rules[index + 1:])
    assert noticed(oracle, mix), rules[index]


@pytest.mark.parametrize("mix", ["Q8_0", "Q4_K_M", "Q2_K", "IQ2_XS"])
def test_a_wrong_type_is_noticed(oracle, monkeypatch, mix):
    rules = [(role, "Q5_1", *when) for role, _, *when in recipes._RULES[mix]]
    monkeypatch.setitem(recipes._RULES, mix, rules)
    assert noticed(oracle, mix)


@pytest.mark.parametrize("name, mix, nearly", [
    ("gqa", "Q2_K", lambda p: p.facts.gqa > 4), ("gqa", "Q2_K", lambda p: p.facts.gqa >= 3),
    ("gqa or experts", "IQ2_XS", lambda p: p.facts.gqa >= 4 or p.facts.n_expert > 4), ("gqa or experts", "IQ2_XS", lambda p: p.facts.gqa >= 4 or p.facts.n_expert >= 3),
    ("8 experts", "Q4_K_M", lambda p: p.facts.n_expert >= 8), ("not 8 experts", "Q3_K_L", lambda p: True),
    ("imatrix", "Q4_0", lambda p: True), ("no imatrix", "IQ4_XS", lambda p: True),
    ("first two", "Q3_K_M", lambda p: p.i < 1), ("first two", "Q3_K_M", lambda p: p.i < 3),
    ("first four", "Q4_K_S", lambda p: p.i < 3), ("first four", "Q4_K_S", lambda p: p.i < 5),
    ("first sixteenth", "Q3_K_M", lambda p: p.i <= p.n // 16), ("first sixteenth", "Q3_K_M", lambda p: p.i < p.n / 16),
    ("first eighth", "Q4_K_S", lambda p: p.i <= p.n // 8), ("first eighth", "Q4_K_S", lambda p: p.i < p.n / 8),
    ("middle", "IQ3_XS", lambda p: p.n / 8 <= p.i < 7 * p.n // 8), ("middle", "IQ3_XS", lambda p: p.n // 8 <= p.i <= 7 * p.n // 8),
    ("middle", "IQ3_XS", lambda p: p.n // 8 <= p.i < 7 * (p.n // 8)),
    ("ends and thirds", "Q4_K_M", lambda p: p.i < p.n // 8 or p.i >= 7 * p.n // 8 or (p.i - p.n // 8) % 3 == 1),
    ("ends and thirds", "Q4_K_M", lambda p: p.i < p.n // 8 or p.i > 7 * p.n // 8 or (p.i - p.n // 8) % 3 == 2),
    ("ends and thirds", "Q4_K_M", lambda p: p.i < p.n // 8 or p.i >= 7 * p.n / 8 or (p.i - p.n // 8) % 3 == 2),
    ("ends and thirds", "Q4_K_M", lambda p: p.i <= p.n // 8 or p.i >= 7 * p.n // 8 or (p.i - p.n // 8) % 3 == 2),
    ("ends and thirds", "Q4_K_M", lambda p: p.i < p.n // 8 or p.i >= 7 * p.n // 8 or p.i % 3 == 2),
])
def test_a_threshold_off_by_a_little_is_noticed(oracle, monkeypatch, name, mix, nearly):
    monkeypatch.setitem(recipes._CONDITIONS, name, ("", nearly))
    assert noticed(oracle, mix)


@pytest.mark.parametrize("part", tensor_rules.ALWAYS_F32)
def test_a_forgotten_name_is_noticed(oracle, monkeypatch, part):
    monkeypatch.setattr(tensor_rules, "ALWAYS_F32", [p for p in tensor_rules.ALWAYS_F32 if p != part])
    assert ours("odd names", "Q4_K_M", False) != oracle("odd names", "Q4_K_M", False)


@pytest.mark.parametrize("role", ["attn_qkv.weight", "attn_v.weight", "attn_k.weight", "attn_q.weight", "attn_output.weight", "ffn_up", "ffn_gate", "ffn_down"])
def test_a_forgotten_role_is_noticed(oracle, monkeypatch, role):
    monkeypatch.setattr(tensor_rules, "_ROLES", [r for r in tensor_rules._ROLES if r[0] != role])
    assert any(noticed(oracle, mix) for mix in ("Q4_K_M", "IQ3_XS"))


@pytest.mark.parametrize("damage", [
    lambda patch: patch.setattr(recipes, "_LAYERS_OF_70B", {"llama": 80}),
    lambda patch: patch.setattr(recipes, "_LAYERS_OF_70B", {"qwen2": 80}),
    lambda patch: patch.setattr(ModelFacts, "is_70b", property(lambda f: f.n_layer == 80)),
    lambda patch: patch.setattr(ModelFacts, "gqa", property(lambda f: f.n_head_kv // f.n_head)),
    lambda patch: patch.setattr(recipes, "_TINY", set()),
    lambda patch: patch.setattr(recipes, "_fit", lambda type, columns: (type, "")),
    lambda patch: patch.setattr(recipes, "_numbers", lambda names: {n: (max(tensor_rules.layer_of(n), 0), 0) for n in names}),
], ids=["no qwen2 70B", "no llama 70B", "70B by layers alone", "gqa upside down", "no tiny mixes", "no fallback", "attention counted by layer"])
def test_other_damage_is_noticed(oracle, monkeypatch, damage):
    damage(monkeypatch)
    try: assert any(noticed(oracle, mix) for mix in ("Q3_K_S", "Q4_K_M", "Q2_K", "IQ2_M"))
    except ArgumentError: pass  # without the fallback the size cannot be computed


def test_the_order_of_tensors_does_not_matter(oracle):
    for model in ("llama, 32 layers, GQA 4", "qwen2moe, 24 layers", "llama, attention in every third layer"):
        meta, shapes = MODELS[model]
        mixed = random.Random(1).sample(shapes, len(shapes))
        for mix in ("Q4_K_M", "IQ2_XS"):
            plan = plan_mix(mix, mixed, facts_from_metadata(meta))
            assert [t.name for t in plan] == [name for name, _ in mixed]
            assert {t.name: t.type for t in plan} == oracle(model, mix, False)


# --- what llama.cpp refuses ---------------------------------------------------------------------------------------------------------------


def test_needs_imatrix_is_what_llama_cpp_refuses(tmp_path):
    meta, shapes = MODELS["llama, 7 layers"]
    source = write_source(tmp_path / "source.gguf", meta, shapes)
    for mix in MIXES:
        params, _ = parameters(mix)
        refused = llama_cpp.llama_model_quantize(str(source).encode(), str(tmp_path / "out.gguf").encode(), ctypes.byref(params)) != 0
        assert refused == bool(plan_mix(mix, shapes, facts_from_metadata(meta)).needs_imatrix), mix


def refused_tensor(source, out, mix, imatrix):
    "The tensor for which llama.cpp misses importance, or None where it writes the file."
    log = []
    listener = llama_cpp.llama_log_callback(lambda level, text, data: log.append(text))
    params, alive = parameters(mix, imatrix)
    llama_cpp.llama_log_set(listener, ctypes.c_void_p(0))
    try: failed = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params))
    finally: llama_cpp.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))
    found = re.search(rb"Missing importance matrix for tensor (\S+)", b"".join(log))
    assert bool(failed) == bool(found)
    return found[1].decode() if found else None


NEEDY = {"dense": (metadata("llama", 3, 8, 2), tensors(3)), "experts": (metadata("llama", 2, 8, 8, 4), tensors(2, experts=4))}


@pytest.mark.parametrize("model", NEEDY)
@pytest.mark.parametrize("mix", [mix for mix in MIXES if plan_mix(mix, NEEDY["dense"][1], facts_from_metadata(NEEDY["dense"][0])).needs_imatrix])
def test_every_tensor_that_needs_importance(tmp_path, mix, model):
    "An importance matrix with one entry is offered, and grows by what llama.cpp asks for; in the end it holds what our plan says."
    meta, shapes = NEEDY[model]
    rng, sizes = np.random.default_rng(0), {name: shape[-1] * (shape[0] if len(shape) == 3 else 1) for name, shape in shapes}
    source = write_source(tmp_path / "source.gguf", meta, shapes, {name: rng.standard_normal(shape, np.float32) for name, shape in shapes})
    plan, given = plan_mix(mix, shapes, facts_from_metadata(meta), has_imatrix=True), {"some": np.ones(1, np.float32)}
    while (name := refused_tensor(source, tmp_path / "out.gguf", mix, given)) is not None:
        assert name not in given
        given[name] = np.ones(sizes[name], np.float32)
    assert sorted(set(given) - {"some"}) == sorted(plan.needs_imatrix)
    assert {t.name: t.type for t in plan} == {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}


def test_a_mix_plans_importance_for_what_needs_it():
    "Which mixes need it at all; TQ1_0, TQ2_0, IQ3_S, IQ3_M, IQ4_XS and IQ4_NL do not."
    meta, shapes = NEEDY["dense"]
    needy = {mix for mix in MIXES for known in (False, True) if plan_mix(mix, shapes, facts_from_metadata(meta), known).needs_imatrix}
    assert needy == {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S"}


def test_needs_imatrix_spares_embedding_and_output():
    meta, shapes = MODELS["llama, 7 layers"]
    plan = plan_mix("Q2_K_S", shapes, facts_from_metadata(meta))
    assert plan["token_embd.weight"].type == "Q2_K" and "token_embd.weight" not in plan.needs_imatrix and "blk.0.attn_q.weight" in plan.needs_imatrix


# --- names, facts, the plan as data -------------------------------------------------------------------------------------------------------


def test_ftypes_and_base_types_are_llama_cpps(oracle):
    for mix in MIXES.values():
        assert mix.ftype == getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{mix.name}", getattr(llama_cpp, f"LLAMA_FTYPE_ALL_{mix.name}", None))
        assert oracle("odd names", mix.name, True)["blk.1.ffn_gate.weight"] in (mix.base, "IQ3_XXS") and mix.base in QTYPES


@pytest.mark.parametrize("name, full", [("q4_k_m", "Q4_K_M"), ("Q4_K", "Q4_K_M"), ("q3_k", "Q3_K_M"), ("Q5_K", "Q5_K_M"), ("bf16", "BF16"), ("iq2_xs", "IQ2_XS")])
def test_find_mix(name, full):
    assert find_mix(name).name == full and find_mix(find_mix(name)) is MIXES[full]


@pytest.mark.parametrize("name, close", [("Q4KM", "Q4_K_M"), ("Q4_K_X", "Q4_K"), ("iq3xxs", "IQ3_XXS"), ("Q6K", "Q6_K"), ("", ""), ("potato", "")])
def test_an_unknown_mix_is_refused_with_the_nearest(name, close):
    with pytest.raises(ArgumentError, match="unknown mix") as caught: plan_mix(name, [("output.weight", (2, 256))], ModelFacts("llama", 1, 1, 1))
    assert caught.value.exit_code == 2 and (close if close else "known mixes") in caught.value.suggestion


def test_facts_from_metadata():
    meta = {"general.architecture": "qwen3moe", "qwen3moe.block_count": np.uint32(48), "qwen3moe.attention.head_count": 32,
            "qwen3moe.attention.head_count_kv": np.array([4] * 48, np.int32), "qwen3moe.expert_count": 128}
    assert facts_from_metadata(meta) == ModelFacts("qwen3moe", 48, 32, 4, 128)
    del meta["qwen3moe.attention.head_count_kv"]
    assert facts_from_metadata(meta).gqa == 1
    assert ModelFacts("mamba", 4, 0, 0).gqa == 0


@pytest.mark.parametrize("gone", ["general.architecture", "llama.block_count", "llama.attention.head_count"])
def test_missing_metadata_is_named(gone):
    meta = metadata("llama", 4, 8, 4)
    del meta[gone]
    with pytest.raises(ConversionError, match=re.escape(gone)) as caught: facts_from_metadata(meta)
    assert caught.value.exit_code == 8


def test_plan_as_data():
    meta, shapes = MODELS["mixtral, 32 layers"]
    plan = plan_mix("q4_k", shapes, facts_from_metadata(meta), has_imatrix=True)
    found = json.loads(json.dumps(plan.to_dict()))
    assert found["mix"] == "Q4_K_M" and found["ftype"] == 15 and found["has_imatrix"] and len(found["tensors"]) == len(shapes) == len(plan)
    assert found["bytes"] == sum(t["bytes"] for t in found["tensors"]) and found["parameters"] == sum(int(np.prod(s)) for _, s in shapes)
    assert sum(found["counts"].values()) == len(shapes) and list(found["counts"].values()) == sorted(found["counts"].values(), reverse=True)
    assert all(t.why for t in plan) and max(len(t.why) for t in plan) < 100
    assert plan["blk.3.ffn_down_exps.weight"].bytes == 8 * 2 * QTYPES[plan["blk.3.ffn_down_exps.weight"].type].row_bytes(512)
    table = plan._repr_markdown_().splitlines()
    assert len(table) == 2 + len({t.kind for t in plan}) + 1 and "ffn_down_exps" in "".join(table)
    assert repr(plan).startswith("Plan(Q4_K_M: ") and len(repr(plan)) < 100


def test_the_plan_of_a_checkpoint(sample_model):
    "What the architecture tables call quantizable is what the plan quantizes; the facts come from their metadata."
    checkpoint = Checkpoint(sample_model)
    tables = architecture(checkpoint.config)
    found = tables.tensors(checkpoint)
    facts = facts_from_metadata(tables.metadata(checkpoint.config, "sample"))
    assert facts == ModelFacts("llama", 4, 4, 2)
    plan = plan_mix("Q4_0", [(t.name, t.shape) for t in found], facts)
    assert [t.name for t in plan if t.type != "F32"] == [t.name for t in found if t.quantizable]
