"A profile meets a model: targets are met, rules hold, plans fit, and what does not fit is named."
from dataclasses import replace

import pytest

from llm_quantize.errors import ArgumentError
from llm_quantize.gguf.allocation import TypeChoice, Rule
from llm_quantize.gguf.profiles import PRESETS, Profile, Target, facts_of
from llm_quantize.gguf.resolution import check_fit, choose_types, make_plan
from llm_quantize.gguf.tensor_rules import why_f32
from llm_quantize.models.checkpoint import sample_path
from llm_quantize.models.job import Job
from llm_quantize.quants.qtypes import qtype

TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")


@pytest.fixture(scope="module")
def specs(): return [(t.name, t.shape) for t in Job(sample_path()).tensors.values()]


@pytest.fixture(scope="module")
def choices(specs): return [TypeChoice(n, s, {t: (1 + i % 5) * 4 ** -qtype(t).bpw for t in TYPES}) for i, (n, s) in enumerate(specs) if not why_f32(n, s)]


def block_bits(choices, types):
    blocks = [c for c in choices if c.in_block]
    return 8 * sum(c.size(types[c.name]) for c in blocks) / sum(c.weights for c in blocks)


@pytest.mark.parametrize("name, bits", [("attention-high", 3.0), ("balanced", 3.5), ("compression-max", 2.5)])
def test_presets_come_to_their_bits(choices, name, bits):
    types = choose_types(PRESETS[name], choices, 0, 4_200_000).types
    assert 0.99 * bits <= block_bits(choices, types) <= bits
    if name == "attention-high":
        assert min(qtype(t).bpw for n, t in types.items() if ".attn_" in n) >= 4.25 and max(qtype(t).bpw for n, t in types.items() if "ffn" in n) <= 3.1


def test_an_impossible_preset_goes_to_the_nearest_size_but_a_wish_is_refused(specs):
    small = [TypeChoice(n, s, {t: 4 ** -qtype(t).bpw for t in ("IQ4_NL", "Q8_0")}) for n, s in specs if not why_f32(n, s)]
    assert block_bits(small, choose_types(PRESETS["compression-max"], small, 0, 1).types) == 4.5
    with pytest.raises(ArgumentError, match="cannot be met"): choose_types(replace(PRESETS["compression-max"], name="mine"), small, 0, 1)


@pytest.mark.parametrize("target", [Target(3.3, "file"), Target(1_700_000, "bytes"), Target(6.0, "file")])
def test_targets_of_the_file(choices, target):
    found = choose_types(Profile("x", target), choices, 90_000, 4_200_000)
    wanted = target.value if target.of == "bytes" else target.value * 4_200_000 / 8
    assert 0.995 * wanted <= found.bytes <= wanted


def test_floors_can_be_taken_away(choices):
    low = Target(1_000_000, "bytes")
    assert qtype(choose_types(Profile("x", Target(1_250_000, "bytes")), choices, 0, 1).types["token_embd.weight"]).bpw >= 2.56
    with pytest.raises(ArgumentError): choose_types(Profile("x", low), choices, 0, 1)
    assert choose_types(Profile("x", low, floors=False), choices, 0, 1).bytes <= 1_000_000


def full(specs): return Profile("mine", Target(3.1, "file"), "ünï", (Rule("attn_v", least="Q6_K"),), False, facts_of("llama", specs), {n: "IQ3_XXS" for n, s in specs if not why_f32(n, s)})


def test_plans_fit_the_model(specs):
    plan = make_plan(full(specs).tensors, specs)
    assert {t.type for t in plan} == {"F32", "IQ3_XXS"} and plan.ftype == 23 and plan.mix == "dynamic"
    odd = make_plan({"blk.0.ffn_up.weight": "IQ2_XXS"}, [("blk.0.ffn_up.weight", (64, 96)), ("blk.0.ffn_norm.weight", (96,))])
    assert [t.type for t in odd] == ["IQ4_NL", "F32"] and "not IQ2_XXS" in odd["blk.0.ffn_up.weight"].why
    assert plan.needs_imatrix and "token_embd.weight" not in plan.needs_imatrix


def test_fit_says_what_is_wrong(specs):
    profile = full(specs)
    assert check_fit(profile, "m", "llama", specs).fits
    problems = lambda p, arch="llama", tensors=specs: " / ".join(check_fit(p, "m", arch, tensors).problems)
    assert "architecture" in problems(profile, "qwen3") and "other blocks" in problems(profile, tensors=specs[:20])
    less = {n: t for n, t in profile.tensors.items() if "attn_q" not in n}
    assert "no type for 4 tensors" in problems(replace(profile, tensors=less)) and "model has not" in problems(replace(profile, tensors={**profile.tensors, "blk.9.x": "Q4_K"}))
    assert "speaks of no tensor" in problems(replace(PRESETS["balanced"], rules=(Rule("mamba", type="Q8_0"),)))
    narrow = [("blk.0.ffn_up.weight", (64, 96))]
    assert check_fit(Profile("x", Target(3, "file"), tensors={"blk.0.ffn_up.weight": "IQ2_XXS"}), "m", "llama", narrow).fallbacks == (("blk.0.ffn_up.weight", "IQ2_XXS", "IQ4_NL"),)
