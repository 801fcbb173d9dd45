"""Smoothing keeps the function: random factors folded into random models of every family leave the logits where they were, and a wrong table does not."""
from dataclasses import replace

import pytest
import torch

from llm_quantize.errors import ConversionError
from llm_quantize.models.reference import load_float
from llm_quantize.compressed import smoothing
from llm_quantize.compressed.families import FAMILIES, family
from llm_quantize.compressed.smoothing import GRID, Fold, ModelFolds, Seen, choose_factors, feedback_rows, fold_tensor, output_error, settle, smoothing_factors
from llm_quantize.compressed.int8 import Int8Linear, quantize_inputs, quantize_rows

from tests.compressed.tiny import CASES, logits, tiny

PAIRS = {"opt-post-norm": 2, "opt-gelu": 3, "mixtral": 3 + 4, "qwen2moe": 3 + 4 + 1, "qwen2moe-dense": 4, "qwen3moe": 3 + 4} # folds of layer 0, where not 4


def folded_logits(checkpoint, row=None, monkeypatch=None):
    "Logits with random factors folded in everywhere, and the number of tensors that changed."
    if row is not None: monkeypatch.setattr(smoothing, "family", lambda config: row)
    plan, generator, changed = ModelFolds(checkpoint), torch.Generator().manual_seed(5), 0
    weights = {name: checkpoint.tensor(name) for name in plan.rest}
    for i, layer in plan.layers.items():
        folded = [(fold, 0.2 + 3 * torch.rand(fold.stop - fold.start, generator=generator)) for fold in plan.folds[i]]
        for plain, name in layer.items():
            weights[name] = fold_tensor(plain, checkpoint.tensor(name), folded)
            changed += not torch.equal(weights[name], checkpoint.tensor(name))
    return logits(smoothing.float_module(checkpoint, torch.float32, "cpu", weights)), changed


@pytest.mark.parametrize("name", CASES)
def test_folding_keeps_the_function(name, tmp_path):
    checkpoint = tiny(name, tmp_path)
    plan, before = ModelFolds(checkpoint), logits(load_float(checkpoint))
    after, changed = folded_logits(checkpoint)
    assert len(plan.folds[0]) == PAIRS.get(name, 4)
    assert changed >= 2 * len(plan.layers) and before.std() > 0.1
    assert (before - after).abs().max() < 1e-4


def test_gemma_with_the_norm_behind_attention_is_caught(tmp_path, monkeypatch):
    checkpoint, row = tiny("gemma2", tmp_path), family({"architectures": ["Gemma2ForCausalLM"]})
    wrong = replace(row, pairs=tuple(replace(p, source="post_attention_layernorm") if p.source == "pre_feedforward_layernorm" else p for p in row.pairs))
    assert (logits(load_float(checkpoint)) - folded_logits(checkpoint, wrong, monkeypatch)[0]).abs().max() > 0.1


def test_gemma_without_its_offset_is_caught(tmp_path, monkeypatch):
    checkpoint, row = tiny("gemma3", tmp_path), family({"architectures": ["Gemma3ForCausalLM"]})
    assert (logits(load_float(checkpoint)) - folded_logits(checkpoint, replace(row, offset=0.0), monkeypatch)[0]).abs().max() > 0.1


@pytest.mark.parametrize("name, spoil", [
    ("mixtral", lambda p: replace(p, floats=())),                                        # a router that does not follow
    ("llama", lambda p: replace(p, readers=p.readers[:2]) if len(p.readers) == 3 else p), # v forgotten
    ("phi3", lambda p: replace(p, part="all") if p.kind == "values" else p),
], ids=["router", "reader", "part"])
def test_other_wrong_tables_are_caught(name, spoil, tmp_path, monkeypatch):
    checkpoint = tiny(name, tmp_path)
    row = family(checkpoint.config)
    wrong = replace(row, pairs=tuple(map(spoil, row.pairs)))
    try: after, _ = folded_logits(checkpoint, wrong, monkeypatch)
    except ConversionError: return # shapes or names speak
    assert (logits(load_float(checkpoint)) - after).abs().max() > 0.01


def test_every_architecture_has_one_row():
    names = [name for row in FAMILIES for name in row.hf]
    assert len(names) == len(set(names)) == 12


def test_what_cannot_be_folded_is_said(tmp_path):
    plan = ModelFolds(tiny("opt-post-norm", tmp_path))
    assert plan.unfit[0] == ("self_attn_layer_norm -> q, k, v", "final_layer_norm -> fc1") and len(plan.matrices[0]) == 6


def test_a_matrix_outside_the_table_stops_the_work(tmp_path):
    checkpoint = tiny("llama", tmp_path)
    checkpoint._info["model.layers.1.mlp.extra_proj.weight"] = ((4, 4), "F32")
    with pytest.raises(ConversionError, match="mlp.extra_proj.weight"): ModelFolds(checkpoint)


@pytest.mark.parametrize("config, words", [({"architectures": ["FalconForCausalLM"]}, "FalconForCausalLM"), ({}, "none in config.json"),
                                           ({"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "gptq"}}, "already quantized")])
def test_unknown_and_quantized_models_are_refused(config, words):
    with pytest.raises(ConversionError, match=words) as failure: family(config)
    assert failure.value.suggestion


# ---- arithmetic --------------------------------------------------------------------------------------------

def test_int8_linear_is_what_its_whole_numbers_say():
    generator = torch.Generator().manual_seed(1)
    for rows, columns, count in ((7, 16, 1), (48, 1100, 5), (64, 32, 40)):
        w, x, bias = torch.randn(rows, columns, generator=generator), torch.randn(count, columns, generator=generator), torch.randn(rows, generator=generator)
        q, s = quantize_rows(w)
        a, t = quantize_inputs(x)
        assert q.abs().max() == 127 and a.abs().amax(1).eq(127).all()
        wanted = (a.double() @ q.double().T) * t.double() * s.double().T + bias.double()
        assert torch.allclose(Int8Linear(q, s, bias)(x[None])[0].double(), wanted, atol=1e-5, rtol=1e-5)


def test_zeros_have_scale_one():
    q, s = quantize_rows(torch.zeros(3, 8))
    assert not q.any() and s.eq(1).all()
    a, t = quantize_inputs(torch.zeros(2, 8))
    assert not a.any() and t.eq(1).all()


def test_factors_are_the_papers_and_dead_channels_stay():
    x, w = torch.tensor([4.0, 9.0, 0.0, 1.0]), torch.tensor([1.0, 0.25, 2.0, 0.0])
    assert torch.allclose(smoothing_factors(x, w, 0.5), torch.tensor([2.0, 6.0, 1.0, 1.0]))
    assert torch.allclose(smoothing_factors(x, w, 1.0), torch.tensor([4.0, 9.0, 1.0, 1.0]))
    assert torch.allclose(smoothing_factors(x, w, 0.0), torch.tensor([1.0, 4.0, 1.0, 1.0]))


def pair_with_outlier(dead=False):
    "A fold whose first channel is loud."
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(300, 32, generator=generator)
    rows[:, 0] *= 60
    if dead: rows[:, 5] = 0
    weights = {"norm.weight": torch.ones(32), "a.weight": torch.randn(48, 32, generator=generator), "b.weight": torch.randn(16, 32, generator=generator)}
    seen = Seen(rows.abs().amax(0), rows, rows.T @ rows)
    return Fold("norm -> a, b", "norm", "norm", ("a", "b"), (), 0, 32), weights, {"a": seen, "b": seen}


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_auto_is_never_worse_than_nothing_and_beats_the_grid(static):
    fold, weights, seen = pair_with_outlier(dead=True)
    auto = choose_factors(fold, weights, seen, "auto", static)
    numbers = [choose_factors(fold, weights, seen, a, static) for a in GRID]
    assert auto.error <= min(c.error for c in numbers) and auto.error < 0.5 * auto.unsmoothed
    assert all(c.factors[5] == 1 for c in (auto, *numbers))
    assert output_error(fold, auto.factors, weights, seen, static) == auto.error
    assert choose_factors(fold, weights, seen, None, static).factors.eq(1).all()


def test_auto_keeps_what_smoothing_would_spoil():
    fold, weights, seen = pair_with_outlier()
    rows = torch.zeros(32, 32).fill_diagonal_(1.0) # single channels: int8 loses nothing
    weights["a.weight"], weights["b.weight"] = (torch.randint(-127, 128, (n, 32)).float() for n in (48, 16))
    for w in (weights["a.weight"], weights["b.weight"]): w[:, 0] = 127
    seen = dict.fromkeys("ab", Seen(torch.linspace(1, 9, 32), rows))
    assert choose_factors(fold, weights, seen, "auto").alpha is None
    assert choose_factors(fold, weights, seen, 0.5).error > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_settled_factors_lose_nothing(dtype, offset):
    fold = Fold("", "norm", "norm", ("a",), (), 0, 64, offset=offset)
    weights = {"norm.weight": (torch.randn(64, generator=torch.Generator().manual_seed(4)) * 0.2 + 1 - offset).to(dtype)}
    wanted = torch.linspace(0.05, 20, 64)
    used = settle(fold, wanted, weights)
    stored = fold_tensor("norm.weight", weights["norm.weight"], [(fold, used)]).to(dtype).float() + offset
    assert torch.allclose(stored * used, weights["norm.weight"].float() + offset, rtol=1e-5) and (used / wanted - 1).abs().median() < 0.01
    assert not torch.allclose(fold_tensor("norm.weight", weights["norm.weight"], [(fold, wanted)]).to(dtype).float() * wanted + offset * wanted, weights["norm.weight"].float() + offset, rtol=1e-5)


def test_with_a_bias_factors_are_powers_of_two():
    fold = Fold("", "rows", "up", ("down",), (), 0, 8)
    weights = {"up.weight": torch.randn(8, 4).bfloat16(), "up.bias": torch.randn(8).bfloat16()}
    used = settle(fold, torch.linspace(0.3, 5, 8), weights)
    assert used.log2().eq(used.log2().round()).all()
    bias = fold_tensor("up.bias", weights["up.bias"], [(fold, used)])
    assert torch.equal(bias.bfloat16().float(), bias)


def test_feedback_has_less_error_on_other_text():
    generator = torch.Generator().manual_seed(6)
    mix = torch.randn(64, 64, generator=generator)
    x, other, w = torch.randn(2000, 64, generator=generator) @ mix, torch.randn(500, 64, generator=generator) @ mix, torch.randn(32, 64, generator=generator)
    lost = lambda found: (other @ (found[0].float() * found[1]).T - other @ w.T).square().sum().item()
    assert lost(feedback_rows(w, x.T @ x)) < 0.7 * lost(quantize_rows(w))
    assert torch.equal(feedback_rows(w, torch.eye(64))[0], quantize_rows(w)[0]) # inputs that do not go together: nothing to feed back
