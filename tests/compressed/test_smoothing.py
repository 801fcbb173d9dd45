"""Smoothing keeps the function: random factors, folded into random models of every family, do not move the logits.

A wrong table does not, and is caught.
"""
from dataclasses import replace

import pytest
import torch

from llm_quantize.compressed.families import ModelMappings, ResolvedMapping, family
from llm_quantize.compressed.smoothing import ALPHAS, InputStatistics, choose_factors, fold_tensor, output_error, smoothing_factors, storable_factors
from llm_quantize.errors import ConversionError
from llm_quantize.models.reference import reference_module, load_float
from tests.compressed.models import CASES, logits, tiny

def folded_logits(checkpoint, row=None):
    "Logits with random factors folded in everywhere, and the number of tensors that changed."
    plan, generator, changed = ModelMappings(checkpoint, row), torch.Generator().manual_seed(5), 0
    weights = {name: checkpoint.tensor(name) for name in plan.rest}
    for i, names in plan.names.items():
        mappings = plan.layers[i].mappings
        folded = [(m, 0.2 + 3 * torch.rand(m.stop - m.start, generator=generator)) for m in mappings]
        for within, name in names.items():
            weights[name] = fold_tensor(within, checkpoint.tensor(name), folded)
            changed += not torch.equal(weights[name], checkpoint.tensor(name))
    return logits(reference_module(checkpoint, torch.float32, "cpu", weights)), changed


def moved(checkpoint, row=None):
    "By how much folding moves the logits."
    return (logits(load_float(checkpoint)) - folded_logits(checkpoint, row)[0]).abs().max()


# ---- folding -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", CASES)
def test_folding_keeps_the_function(name, tmp_path):
    checkpoint = tiny(name, tmp_path)
    before = logits(load_float(checkpoint))
    after, changed = folded_logits(checkpoint)
    assert changed >= 2 * 2
    assert before.std() > 0.1
    assert (before - after).abs().max() < 1e-4


def test_gemma_with_the_norm_behind_attention_is_caught(tmp_path):
    checkpoint = tiny("gemma2", tmp_path)
    def behind(m):
        return replace(m, smooth_layer=m.smooth_layer.replace("pre_feedforward_layernorm", "post_attention_layernorm"))
    row = family(checkpoint.config)
    assert moved(checkpoint, replace(row, mappings=tuple(map(behind, row.mappings)))) > 0.1


def test_gemma_without_its_offset_is_caught(tmp_path):
    checkpoint = tiny("gemma3", tmp_path)
    assert moved(checkpoint, replace(family({"architectures": ["Gemma3ForCausalLM"]}), offset=0.0)) > 0.1


@pytest.mark.parametrize("name, spoil", [
    ("mixtral", lambda m: replace(m, float_layers=())),  # a router that does not follow
    ("llama", lambda m: replace(m, balance_layers=m.balance_layers[:2])),  # v forgotten
    ("phi3", lambda m: replace(m, part="all") if m.kind == "values" else m),
], ids=["router", "reader", "part"])
def test_other_wrong_tables_are_caught(name, spoil, tmp_path):
    checkpoint = tiny(name, tmp_path)
    row = family(checkpoint.config)
    try: distance = moved(checkpoint, replace(row, mappings=tuple(map(spoil, row.mappings))))
    except ConversionError: return  # shapes or names speak
    assert distance > 0.01


# ---- factors -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("alpha, factors", [(0.5, [2, 6, 1, 1]), (1.0, [4, 9, 1, 1]), (0.0, [1, 4, 1, 1])])
def test_factors_are_the_papers_and_dead_channels_stay(alpha, factors):
    x, w = torch.tensor([4.0, 9.0, 0.0, 1.0]), torch.tensor([1.0, 0.25, 2.0, 0.0])
    assert torch.allclose(smoothing_factors(x, w, alpha), torch.tensor(factors).float())


def loud_mapping(dead=False):
    "A mapping whose first channel is loud: itself, weights, inputs."
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(300, 32, generator=generator)
    rows[:, 0] *= 60
    if dead: rows[:, 5] = 0
    weights = {"norm.weight": torch.ones(32)}
    for name, count in (("a", 48), ("b", 16)): weights[f"{name}.weight"] = torch.randn(count, 32, generator=generator)
    inputs = InputStatistics(rows.abs().amax(0), rows)
    return ResolvedMapping("norm -> a, b", "norm", "norm", ("a", "b"), (), 0, 32), weights, {"a": inputs, "b": inputs}


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_auto_is_never_worse_than_nothing_and_beats_the_grid(static):
    mapping, weights, inputs = loud_mapping(dead=True)
    auto = choose_factors(mapping, weights, inputs, "auto", static)
    fixed = [choose_factors(mapping, weights, inputs, alpha, static) for alpha in ALPHAS]
    assert auto.error <= min(choice.error for choice in fixed)
    assert auto.error < 0.5 * auto.unsmoothed
    assert all(choice.factors[5] == 1 for choice in (auto, *fixed))
    assert output_error(mapping, auto.factors, weights, inputs, static) == auto.error


def test_no_smoothing_is_a_choice_too():
    choice = choose_factors(*loud_mapping(), None)
    assert choice.alpha is None
    assert choice.factors.eq(1).all()
    assert choice.error == choice.unsmoothed > 0


def test_auto_keeps_what_smoothing_would_spoil():
    mapping, weights, _ = loud_mapping()
    for name, count in (("a", 48), ("b", 16)): # whole numbers, and single channels: int8 loses nothing
        weights[f"{name}.weight"] = torch.randint(-127, 128, (count, 32)).float()
        weights[f"{name}.weight"][:, 0] = 127
    inputs = dict.fromkeys("ab", InputStatistics(torch.linspace(1, 9, 32), torch.eye(32)))
    assert choose_factors(mapping, weights, inputs, "auto").alpha is None
    assert choose_factors(mapping, weights, inputs, 0.5).error > 0


@pytest.mark.parametrize("spoil", [2.0, 0.5], ids=["doubled", "halved"])
def test_wrong_factors_cost_more(spoil):
    mapping, weights, inputs = loud_mapping()
    choice, wrong = choose_factors(mapping, weights, inputs, 0.5), torch.ones(32)
    wrong[1:9] = spoil ** 5
    assert output_error(mapping, choice.factors * wrong, weights, inputs) > 2 * choice.error


def test_every_token_and_matrix_counts_alike():
    "One token a thousand times as loud as the others has the share of one token."
    mapping, weights, inputs = loud_mapping()
    rows = inputs["a"].rows.clone()
    rows[0] *= 1000
    louder = dict.fromkeys("ab", InputStatistics(rows.abs().amax(0), rows))
    errors = [output_error(mapping, None, weights, given) for given in (inputs, louder)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
    alone = [output_error(mapping._replace(balance_layers=(name,)), None, weights, inputs) for name in "ab"]
    assert errors[0] == pytest.approx(sum(alone) / 2)


# ---- factors that can be stored ----------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_storable_factors_lose_nothing(dtype, offset):
    mapping = ResolvedMapping("", "norm", "norm", ("a",), (), 0, 64, offset=offset)
    norm = (torch.randn(64, generator=torch.Generator().manual_seed(4)) * 0.2 + 1 - offset).to(dtype)
    wanted, old = torch.linspace(0.05, 20, 64), norm.float() + offset
    used = storable_factors(mapping, wanted, {"norm.weight": norm})
    def again(factors):
        stored = fold_tensor("norm.weight", norm, [(mapping, factors)]).to(dtype)
        return (stored.float() + offset) * factors
    assert (used / wanted - 1).abs().median() < 0.01
    assert torch.allclose(again(used), old, rtol=1e-5)
    assert not torch.allclose(again(wanted), old, rtol=1e-5)


def test_with_a_bias_factors_are_powers_of_two():
    mapping = ResolvedMapping("", "rows", "up", ("down",), (), 0, 8)
    weights = {"up.weight": torch.randn(8, 4).bfloat16(), "up.bias": torch.randn(8).bfloat16()}
    used = storable_factors(mapping, torch.linspace(0.3, 5, 8), weights)
    assert used.log2().eq(used.log2().round()).all()
    bias = fold_tensor("up.bias", weights["up.bias"], [(mapping, used)])
    assert torch.equal(bias.bfloat16().float(), bias)
