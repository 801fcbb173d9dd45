"Choosing types for a size: never above it, never worse than trying everything, and errors that say what is possible."
import itertools
import random

import pytest

from llm_quantize.gguf import allocation
from llm_quantize.gguf.allocation import TypeChoice, Rule, allocate, allocate_blocks, apply_rules, default_floors, fitting, reachable
from llm_quantize.errors import ArgumentError, ProfileError
from llm_quantize.gguf.container import gguf_bytes
from llm_quantize.quants.qtypes import QTYPES, qtype

TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "BF16")


def model(blocks=6, wide=512, inner=1536, vocabulary=16384, seed=0, types=TYPES):
    "Tensors like those of a small Llama, with costs that fall with bits and jump about a little."
    rng = random.Random(seed)
    shapes = {"attn_q": (wide, wide), "attn_k": (wide // 2, wide), "attn_v": (wide // 2, wide), "attn_output": (wide, wide),
              "ffn_gate": (inner, wide), "ffn_up": (inner, wide), "ffn_down": (wide, inner)}
    names = [("token_embd.weight", (vocabulary, wide))] + [(f"blk.{i}.{kind}.weight", shape) for i in range(blocks) for kind, shape in shapes.items()]
    def costs(): return (lambda s: {t: s * 4 ** -qtype(t).bpw * rng.uniform(0.8, 1.25) for t in types})(rng.lognormvariate(0, 1.3))
    return [TypeChoice(name, shape, costs()) for name, shape in names]


def exhaustive(choices, budget):
    tried = [(sum(c.size(t) for c, t in zip(choices, types)), sum(c.costs[t] for c, t in zip(choices, types))) for types in itertools.product(*(c.costs for c in choices))]
    fit = [(size, cost) for size, cost in tried if size <= budget]
    return min(cost for size, cost in [(s, c) for s, c in fit if s // 32 >= budget // 32 - int(allocation.SLACK * budget / 32)] or fit)


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_better_than_the_choice(seed):
    choices = model(blocks=1, wide=256, inner=256, vocabulary=256, seed=seed, types=("IQ1_S", "IQ2_S", "IQ4_XS", "Q6_K"))[:6]
    low, high = reachable(choices)
    for share in (0.02, 0.4, 0.77):
        target = int(low + share * (high - low))
        assert allocate(choices, target).cost == pytest.approx(exhaustive(choices, target), rel=1e-12)


@pytest.mark.parametrize("fixed", [0, 12_345, 700_001])
@pytest.mark.parametrize("seed", range(2))
def test_targets_are_met_and_never_exceeded(seed, fixed):
    choices = model(seed=seed)
    low, high = reachable(choices, fixed)
    for i in range(13):
        target = int(low + (high - low) * (i / 12))
        found = allocate(choices, target, fixed=fixed)
        assert 0.995 * target <= found.bytes <= target
        assert found.bytes == fixed + sum(c.size(found.types[c.name]) for c in choices)
        assert found.cost == pytest.approx(sum(c.costs[found.types[c.name]] for c in choices))


def test_bytes_are_those_of_the_file():
    choices, metadata = model(blocks=2), {"general.architecture": "llama", "general.name": "x" * 13}
    norms = [("output_norm.weight", (512,), "F32")]
    start = [(c.name, c.shape, "Q8_0") for c in choices]
    fixed = gguf_bytes(metadata, norms + start) - sum(c.size("Q8_0") for c in choices)
    found = allocate(choices, 7_000_000, fixed=fixed)
    assert found.bytes == gguf_bytes(metadata, norms + [(c.name, c.shape, found.types[c.name]) for c in choices])


def test_many_tensors_in_coarse_cells(monkeypatch):
    choices = model(blocks=40)
    target = sum(reachable(choices)) // 3
    fine = allocate(choices, target)
    monkeypatch.setattr(allocation, "CELLS", 15_000)
    coarse = allocate(choices, target)
    assert 0.995 * target <= coarse.bytes <= target and fine.cost <= coarse.cost <= 1.15 * fine.cost


def test_the_smallest_possible_file_is_reached_exactly(monkeypatch):
    for cells in (60_000, 500):
        monkeypatch.setattr(allocation, "CELLS", cells)
        choices = model()
        low, _ = reachable(choices)
        assert allocate(choices, low).bytes == low


def test_impossible_targets_say_what_is_possible():
    choices = model()
    low, high = reachable(choices, 1000)
    for target in (low - 1, 0, -5, int(1.01 * high)):
        with pytest.raises(ArgumentError) as caught: allocate(choices, target, fixed=1000)
        assert f"{low:,}" in str(caught.value) and f"{high:,}" in str(caught.value)
    with pytest.raises(ArgumentError, match="bits per weight"): allocate_blocks(choices, 0.9)
    assert allocate_blocks(choices, 0.9, clamp=True).bytes > 0


def test_rows_that_do_not_divide_have_types_that_do():
    choices = [TypeChoice("blk.0.ffn_down.weight", (96, 96), {"Q4_0": 0.3, "IQ4_NL": 0.2, "Q8_0": 0.01, "F16": 0.0})]
    assert allocate(choices, 96 * 54).types["blk.0.ffn_down.weight"] == "IQ4_NL"
    assert list(apply_rules(choices, (Rule("ffn", most="IQ2_XXS"),))[0].costs) in (["Q4_0"], ["IQ4_NL"])
    for name in QTYPES: assert 96 % qtype(fitting(name, 96)).block_size == 0 and 7 % qtype(fitting(name, 7)).block_size == 0


def test_all_rules_count_and_the_first_exact_type_wins():
    choices = model(blocks=2)
    rules = (Rule(r"\.attn_", least="IQ4_XS"), Rule(r"attn_v", least="Q6_K"), Rule(r"^blk\.1\.ffn_up", type="q5_k"), Rule("ffn_up", type="Q2_K"))
    left = {c.name: list(c.costs) for c in apply_rules(choices, rules)}
    assert left["blk.0.attn_v.weight"] == ["Q6_K", "Q8_0", "BF16"] and left["blk.0.attn_q.weight"][0] == "IQ4_XS"
    assert left["blk.1.ffn_up.weight"] == ["Q5_K"] and left["blk.0.ffn_up.weight"] == ["Q2_K"]


def test_floors_hold_the_ends_up():
    choices = model(blocks=4)
    floored = {c.name: c for c in apply_rules(choices, default_floors([c.name for c in choices]))}
    assert min(qtype(t).bpw for t in floored["token_embd.weight"].costs) == 2.5625
    for i in range(4): assert ("IQ1_S" in floored[f"blk.{i}.ffn_up.weight"].costs) == (i in (1, 2))


@pytest.mark.parametrize("bad", [{"pattern": "("}, {"pattern": None}, {"pattern": "x", "least": "Q9"}, {"pattern": "x", "type": 4}])
def test_rules_without_sense_are_refused(bad):
    with pytest.raises(ProfileError): Rule(**bad)


# ---- local search ------------------------------------------------------------------------------------------

def test_polish_finds_what_the_prediction_had_wrong():
    import numpy as np
    choices = model(blocks=4)
    wrong = lambda name: 4 if "ffn_down" in name else 1
    true = {c.name: {t: cost * wrong(c.name) for t, cost in c.costs.items()} for c in choices}
    noise = np.random.default_rng(0).normal(0, 1e-6, 200)
    measured = []
    def measure(types):
        measured.append(dict(types))
        return np.full(200, sum(true[n][t] for n, t in types.items())) + noise
    target = 6_000_000
    best, record = allocation.local_search(choices, lambda cs: allocate(cs, target), measure, 40)
    assert record[0].group == "as predicted" and len(record) == len(measured) <= 40
    assert sum(true[n][t] for n, t in best.types.items()) == pytest.approx(min(r.kld for r in record), rel=1e-4)
    assert min(r.kld for r in record) < 0.97 * record[0].kld
    assert len({tuple(m.values()) for m in measured}) == len(measured), "nothing is measured twice"


def test_polish_keeps_nothing_that_noise_could_explain():
    import numpy as np
    rng = np.random.default_rng(1)
    choices = model(blocks=2)
    best, record = allocation.local_search(choices, lambda cs: allocate(cs, 3_000_000), lambda types: rng.normal(1, 1, 50), 25)
    assert sum(r.kept for r in record[1:]) <= 8
    for r in record[1:]: assert r.kept == (r.gain > r.error)
    assert allocation.local_search(choices, lambda cs: allocate(cs, 3_000_000), lambda types: 1 / 0, 0)[1] == ()
