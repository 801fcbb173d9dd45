"Super weights: those that trained models have, planted ones at known places, and none where there are none."
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from llm_quantize.models.layer_stack import LayerStack
from llm_quantize.models.architectures import architecture
from llm_quantize.models.transforms import permute
from llm_quantize.calibration.text import bundled_text, load_tokenizer, windows
from llm_quantize.models.checkpoint import open_checkpoint, sample_path
from llm_quantize.errors import ArgumentError
from llm_quantize.calibration.imatrix import ImportanceMatrix
from llm_quantize.calibration.super_weights import SuperWeights, Zeroed, find_spikes, find_super_weights, hf_place, saved_super_weights
from llm_quantize.models.views import Kept
from llm_quantize.calibration.ranked_weights import rank_weights, weight_scores

OF_SAMPLE = [(0, 12, 210), (0, 3, 210), (0, 156, 210), (0, 174, 210)]


@pytest.fixture(scope="module")
def ids():
    return windows(load_tokenizer(sample_path()), bundled_text("calibration"), limit=1)


def test_one_stack_serves_all(ids, monkeypatch):
    "A stack that is given is used; one more shows what is left without the weights, however many they are."
    stack, made = LayerStack(sample_path(), device="cpu", dtype=torch.float32), []
    init = LayerStack.__init__
    monkeypatch.setattr(LayerStack, "__init__", lambda self, model, **options: (made.append(type(model)), init(self, model, **options))[1])
    given = find_super_weights(stack, ids, effect_ids=ids)
    assert len(given.found) == 4 and made == [Zeroed]
    made.clear()
    assert given == find_super_weights(stack, ids, effect_ids=ids), "its layers are as they were"
    made.clear()
    assert given == find_super_weights(sample_path(), ids, effect_ids=ids, device="cpu")
    assert set(made) != {Zeroed}


def edited(folder, change):
    "A copy of the sample model with its weights changed by `change(weights)`."
    folder.mkdir()
    for file in sample_path().iterdir():
        if file.suffix != ".safetensors": shutil.copyfile(file, folder / file.name)
    checkpoint = open_checkpoint(sample_path())
    weights = {name: checkpoint.tensor(name).float() for name in checkpoint.names}
    change(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


def down(layer): return f"model.layers.{layer}.mlp.down_proj.weight"


def random_model(folder, kind, **settings):
    "A small random model of some family."
    config = AutoConfig.for_model(kind, vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                                  max_position_embeddings=256, **{"tie_word_embeddings": False, **settings})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return folder

# ---- natural ones --------------------------------------------------------------------------------------------------------------------------------

def test_those_of_the_sample_model(ids):
    heldout = windows(load_tokenizer(sample_path()), bundled_text("heldout"), limit=8)
    result = find_super_weights(sample_path(), ids, effect_ids=heldout, device="cpu")
    first = result.found[0]
    assert [w.place for w in result.found] == OF_SAMPLE
    assert (first.tensor, first.hf_tensor, first.token, first.expert) == ("blk.0.ffn_down.weight", down(0), 0, None)
    assert first.value == open_checkpoint(sample_path()).tensor(down(0))[12, 210].item() and abs(first.input_spike) > 100 and abs(first.output_spike) > 60
    assert 1.04 < first.perplexity_ratio < 1.2 and first.perplexity_ratio_se < 0.02
    assert result.layers[0]["largest_output_zeroed"] < 0.25 * abs(first.output_spike) < 4 * result.layers[0]["largest_output_zeroed"] * 2
    again = find_super_weights(sample_path(), ids, device="cpu", keep=False)
    assert [w.place for w in again.found] == OF_SAMPLE and again.perplexity is None


def test_the_effect_is_that_of_plain_transformers(ids):
    "Perplexity with one weight set to zero, by transformers' own model."
    heldout = windows(load_tokenizer(sample_path()), bundled_text("heldout"), limit=2)
    result = find_super_weights(sample_path(), ids, effect_ids=heldout, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(sample_path(), dtype=torch.float32)
    def perplexity():
        with torch.inference_mode(): logits = model(input_ids=heldout).logits[:, 255:-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), heldout[:, 256:].flatten()).exp().item()
    untouched = perplexity()
    weight = model.model.layers[0].mlp.down_proj.weight.data
    weight[12, 210] = 0
    without = perplexity()
    for _, row, column in OF_SAMPLE: weight[row, column] = 0
    assert result.perplexity == pytest.approx(untouched, rel=1e-5) and result.found[0].perplexity_zeroed == pytest.approx(without, rel=1e-5)
    assert result.perplexity_all_zeroed == pytest.approx(perplexity(), rel=1e-4) and without != pytest.approx(untouched, rel=1e-2)


@pytest.mark.slow
@pytest.mark.shared
def test_those_of_prose_46m(shared_model):
    path = shared_model("prose-46m")
    result = find_super_weights(path, windows(load_tokenizer(path), bundled_text("calibration"), limit=1), effect_ids=windows(load_tokenizer(path), bundled_text("heldout"), limit=4), device="cpu")
    first = result.found[0]
    assert first.place == (1, 333, 1200) and first.token == 0
    assert abs(first.input_spike) == pytest.approx(1364, rel=0.01) and abs(first.output_spike) == pytest.approx(1798, rel=0.01)
    assert {w.layer for w in result.found} == {1} and {w.col for w in result.found} <= {1200, 1031} and len(result.found) <= 8
    assert result.perplexity_all_zeroed > 1.1 * result.perplexity
    assert result.layers[1]["largest_output_zeroed"] < 0.3 * result.layers[1]["largest_output"]


@pytest.mark.shared
def test_joint_spikes_of_a_ternary_model_are_no_super_weights(shared_model):
    path = shared_model("trilm-27m")
    result = find_super_weights(path, windows(load_tokenizer(path), bundled_text("calibration"), limit=1), device="cpu")
    assert result.found == () and result.layers[1]["largest_output"] > 10 * result.layers[1]["ordinary_output"]

# ---- planted ones --------------------------------------------------------------------------------------------------------------------------------

def first_token_direction(folder, layer, ids):
    "What the feed-forward block of a layer reads: a vector that answers to the first token with 1, to others with little."
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen = []
    model.model.layers[layer].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    with torch.inference_mode(): model(input_ids=ids)
    x = seen[0]
    covariance = x[1:].T @ x[1:] / (len(x) - 1) + 0.01 * torch.eye(x.shape[1])
    direction = torch.linalg.solve(covariance, x[0])
    return direction / (direction @ x[0])


PLANTED = [(1, 40, 17), (2, 200, 700), (3, 7, 333)]

def plant(weights, layer, row, column, direction, size=16.0, value=0.6):
    "A neuron that fires for the first token alone, and one weight that passes it on."
    name = f"model.layers.{layer}.mlp"
    weights[f"{name}.gate_proj.weight"][column] = weights[f"{name}.up_proj.weight"][column] = size * direction
    weights[f"{name}.down_proj.weight"][:, column] = 0
    weights[f"{name}.down_proj.weight"][row, column] = value


def test_planted_ones_come_back_exactly(tmp_path, ids):
    "Neuron 210 of block 0 moves to 5, which changes nothing but the place; three more are planted in three other blocks."
    def move(weights):
        for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            tensor = weights[f"model.layers.0.mlp.{name}.weight"]
            rows = tensor if axis == 0 else tensor.T
            rows[[5, 210]] = rows[[210, 5]].clone()
    folder = edited(tmp_path / "moved", move)
    moved = [(0, row, 5) for _, row, _ in OF_SAMPLE]
    assert [w.place for w in find_super_weights(folder, ids, device="cpu").found] == moved
    for number, (layer, row, column) in enumerate(PLANTED):
        direction = first_token_direction(folder, layer, ids)
        def both(weights, folder=folder):
            checkpoint = open_checkpoint(folder)
            weights.update({name: checkpoint.tensor(name).float() for name in checkpoint.names})
            plant(weights, layer, row, column, direction, value=0.6 if layer < 3 else 1.2)
        folder = edited(tmp_path / f"planted{number}", both)
    heldout = windows(load_tokenizer(sample_path()), bundled_text("heldout"), limit=2)
    result = find_super_weights(folder, ids, effect_ids=heldout, device="cpu")
    assert sorted(w.place for w in result.found) == sorted(moved + PLANTED)
    for weight in result.found: assert weight.value == open_checkpoint(folder).tensor(weight.hf_tensor)[weight.row, weight.col].item()
    assert all(abs(w.perplexity_ratio - 1) > 0.001 for w in result.found)


def spread_out(folder, ids):
    "The sample model with two blocks put in after block 0, which take over writing rows 12 and 3 at the first token: the same function, its super weights in three blocks."
    checkpoint = open_checkpoint(sample_path())
    x = next(w.input_spike for w in find_super_weights(sample_path(), ids, device="cpu").found)
    g, products = torch.Generator().manual_seed(0), {}
    def insert(weights):
        old = dict(weights)
        for name in [n for n in weights if ".layers." in n]: del weights[name]
        for name, tensor in old.items():
            if ".layers." not in name: continue
            layer = int(name.split(".")[2])
            weights[name if layer == 0 else name.replace(f".{layer}.", f".{layer + 2}.", 1)] = tensor
            if layer == 0:
                for new in (1, 2): weights[name.replace(".0.", f".{new}.", 1)] = tensor.clone()
        for layer, row in ((1, 12), (2, 3)):
            products[layer] = weights[down(0)][row, 210].item() * x
            weights[down(0)][row, 210] = 0
            weights[f"model.layers.{layer}.self_attn.o_proj.weight"].zero_()
            weights[f"model.layers.{layer}.post_attention_layernorm.weight"].fill_(1)
            for part, scale in (("gate", 0.03), ("up", 0.03), ("down", 0.002)):
                tensor = weights[f"model.layers.{layer}.mlp.{part}_proj.weight"]
                tensor.copy_(scale * torch.randn(tensor.shape, generator=g))
    def deeper(path):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 6}))
        return path
    made = deeper(edited(folder / "inserted", insert))
    for layer, row, column in ((1, 12, 100), (2, 3, 500)):
        direction = first_token_direction(made, layer, ids)
        def add(weights, made=made):
            source = open_checkpoint(made)
            weights.clear()
            weights.update({name: source.tensor(name).float() for name in source.names})
            plant(weights, layer, row, column, direction, size=10.5, value=products[layer] / (torch.nn.functional.silu(torch.tensor(10.5)) * 10.5).item())
        made = deeper(edited(folder / f"block{layer}", add))
    assert len(checkpoint.names) < len(open_checkpoint(made).names)
    return made


def test_real_ones_in_three_blocks(tmp_path, ids):
    "Each does in its new place what it did in the old one: the perplexity without it says so."
    folder = spread_out(tmp_path, ids)
    heldout = windows(load_tokenizer(sample_path()), bundled_text("heldout"), limit=4)
    before, after = (find_super_weights(path, ids, effect_ids=heldout, device="cpu") for path in (sample_path(), folder))
    assert [w.place for w in after.found] == [(0, 156, 210), (0, 174, 210), (1, 12, 100), (2, 3, 500)]
    assert after.perplexity == pytest.approx(before.perplexity, rel=0.02)
    moved = {(1, 12, 100): before.found[0], (2, 3, 500): before.found[1]}
    for weight in after.found[2:]:
        assert weight.perplexity_ratio == pytest.approx(moved[weight.place].perplexity_ratio, rel=0.03) and weight.perplexity_ratio > 1.05
    assert after.perplexity_all_zeroed > 5 * after.perplexity


def test_several_in_one_layer_and_one_row(tmp_path):
    "Two columns of one row share the work, as in Llama-13B; a third weight sits in another row."
    g = torch.Generator().manual_seed(1)
    x, weight = torch.randn(100, 64, generator=g), 0.05 * torch.randn(48, 64, generator=g)
    x[0, 10], x[0, 20] = 300.0, -250.0
    weight[30, 10], weight[30, 20], weight[31, 10] = 1.0, -1.0, 0.9
    assert [(s["row"], s["col"]) for s in find_spikes(x, x @ weight.T, weight)] == [(30, 10), (31, 10), (30, 20)]
    weight[30, 20] = 0
    assert [(s["row"], s["col"]) for s in find_spikes(x, x @ weight.T, weight)] == [(30, 10), (31, 10)]

# ---- none ----------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, settings", [("llama", {}), ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True}), ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2})])
def test_a_random_model_has_none(tmp_path, kind, settings):
    ids = torch.randint(3, 512, (1, 128), generator=torch.Generator().manual_seed(0))
    result = find_super_weights(random_model(tmp_path / "m", kind, **settings), ids, effect_ids=ids, device="cpu")
    assert result.found == () and len(result.layers) == 3 and result.to_dict()["identified"] == 0
    assert "No super weights" in result.render() and result.notes() == {} and json.dumps(result.to_dict())


def test_without_its_own_the_sample_model_has_none(tmp_path, ids):
    def remove(weights):
        for layer, row, column in OF_SAMPLE: weights[down(layer)][row, column] = 0
    assert find_super_weights(edited(tmp_path / "m", remove), ids, device="cpu").found == ()

# ---- experts -------------------------------------------------------------------------------------------------------------------------------------

def test_an_expert(tmp_path):
    "The expert that sees the first token gets a neuron for it; the place names the expert."
    folder = random_model(tmp_path / "m", "mixtral", num_local_experts=4, num_experts_per_tok=2)
    ids = torch.randint(3, 512, (1, 128), generator=torch.Generator().manual_seed(0))
    model, seen = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), []
    model.model.layers[1].mlp.experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.inference_mode(): model(input_ids=ids)
    x, expert = seen[0][0], seen[0][1][0, 0].item()
    direction = torch.linalg.solve(x[1:].T @ x[1:] / len(x) + 0.01 * torch.eye(64), x[0])
    experts = model.model.layers[1].mlp.experts
    experts.gate_up_proj.data[expert, 9] = experts.gate_up_proj.data[expert, 128 + 9] = 14 * direction / (direction @ x[0])
    experts.down_proj.data[expert, :, 9] = 0
    experts.down_proj.data[expert, 33, 9] = 0.8
    model.save_pretrained(tmp_path / "planted")
    result = find_super_weights(tmp_path / "planted", ids, effect_ids=ids, device="cpu")
    [found] = result.found
    assert (found.tensor, found.expert, found.row, found.col) == ("blk.1.ffn_down_exps.weight", expert, 33, 9) and f".{expert}." in found.hf_tensor
    assert found.value == pytest.approx(0.8) and found.perplexity_ratio != 1
    assert open_checkpoint(tmp_path / "planted").tensor(found.hf_tensor)[33, 9].item() == found.value

# ---- places, notes, holes ------------------------------------------------------------------------------------------------------------------------

def test_every_place_of_every_way(tmp_path):
    for kind, settings in (("llama", {}), ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2})):
        checkpoint = open_checkpoint(random_model(tmp_path / kind, kind, **settings))
        for tensor in architecture(checkpoint.config).tensors(checkpoint):
            if not tensor.quantizable or tensor.layer not in (0, None): continue
            weights = tensor.load(checkpoint)
            for row in range(0, tensor.shape[-2], 5):
                for expert in range(tensor.shape[0]) if len(tensor.shape) == 3 else (None,):
                    name, index = hf_place(tensor, row, expert)
                    assert torch.equal(checkpoint.tensor(name)[index], weights[row] if expert is None else weights[expert, row]), (tensor.name, row)
    q = torch.arange(64.0)[:, None].expand(64, 4)
    assert not torch.equal(permute(q, 4), q)  # the comparison above can fail


def test_notes_survive_the_file(tmp_path, ids):
    result = find_super_weights(sample_path(), ids, device="cpu")
    matrix = ImportanceMatrix({"a.weight": torch.ones(1, 4).double()}, {"a.weight": torch.ones(1).double()}, notes=result.notes())
    assert saved_super_weights(ImportanceMatrix.load(matrix.save(tmp_path / "m.imatrix"))) == result.found
    assert saved_super_weights(ImportanceMatrix(matrix.sums, matrix.counts)) is None
    assert set(result.to_dict()["coordinates"][0]) >= {"tensor", "row", "col", "value"} and SuperWeights().notes() == {}


def test_zeroed_leaves_the_original_alone():
    "Also one that keeps what it has read, which all other readers share."
    checkpoint = Kept(open_checkpoint(sample_path()))
    holed = Zeroed(checkpoint, [(down(0), (12,), 210)])
    assert holed.tensor(down(0))[12, 210] == 0 and checkpoint.tensor(down(0))[12, 210] != 0
    assert ((holed.tensor(down(0)) != checkpoint.tensor(down(0))).sum(), torch.equal(holed.tensor(down(1)), checkpoint.tensor(down(1)))) == (1, True)
    assert LayerStack(holed, device="cpu", dtype=torch.float32)[0] is not None


def test_bad_tokens():
    for ids in (torch.zeros(512, dtype=torch.int64), torch.zeros(0, 512, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64)):
        with pytest.raises(ArgumentError, match="no window"): find_super_weights(sample_path(), ids)

# ---- coverage ------------------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def matrix():
    g, checkpoint = torch.Generator().manual_seed(0), open_checkpoint(sample_path())
    names = {t.name: t.shape for t in architecture(checkpoint.config).tensors(checkpoint) if t.quantizable and t.layer is not None}
    return ImportanceMatrix({n: torch.randn(1, s[-1], generator=g).double().exp() for n, s in names.items()}, {n: torch.ones(1).double() for n in names})


@pytest.mark.parametrize("coverage", [0.0, 1e-6, 0.0001, 0.013, 0.5, 1.0])
def test_ranking_equals_sorting(matrix, coverage):
    checkpoint = open_checkpoint(sample_path())
    ranked = rank_weights(checkpoint, matrix, coverage)
    scores = {t.name: weight_scores(t.load(checkpoint), matrix.importance(t.name)) for t in architecture(checkpoint.config).tensors(checkpoint) if t.name in matrix.sums}
    every = torch.cat([s.flatten() for s in scores.values()])
    wanted = round(coverage * every.numel())
    assert (ranked.total_weights, ranked.total_protected) == (every.numel(), wanted) == (every.numel(), sum(taken for taken, _ in ranked.counts.values()))
    masks = {name: ranked.mask(name, s) for name, s in scores.items()}
    assert {name: int(m.sum()) for name, m in masks.items()} == {name: taken for name, (taken, _) in ranked.counts.items()}
    if wanted:
        chosen = torch.cat([m.flatten() for m in masks.values()])
        assert torch.equal(every[chosen].sort().values, every.sort().values[-wanted:]) and ranked.threshold == every[chosen].min()
        if wanted < every.numel(): assert every[~chosen].max() <= ranked.threshold


def test_ties_are_cut_to_the_exact_number(tmp_path):
    def flat(weights):
        for name in weights:
            if "proj" in name: weights[name] = torch.full_like(weights[name], 0.5)
    checkpoint = open_checkpoint(edited(tmp_path / "m", flat))
    names = {t.name: t for t in architecture(checkpoint.config).tensors(checkpoint) if t.quantizable and t.layer is not None}
    matrix = ImportanceMatrix({n: torch.ones(1, t.shape[-1]).double() for n, t in names.items()}, {n: torch.ones(1).double() for n in names})
    ranked = rank_weights(checkpoint, matrix, 0.1)
    taken = sum(int(ranked.mask(n, weight_scores(t.load(checkpoint), matrix.importance(n))).sum()) for n, t in names.items())
    assert taken == ranked.total_protected == round(0.1 * ranked.total_weights) and ranked.threshold == 0.25


def test_experts_are_weighed_each_by_its_own(tmp_path):
    checkpoint = open_checkpoint(random_model(tmp_path / "m", "mixtral", num_local_experts=3, num_experts_per_tok=2))
    name = "blk.0.ffn_up_exps.weight"
    sums = torch.ones(3, 64).double()
    sums[1] *= 1e6
    matrix = ImportanceMatrix({name: sums}, {name: torch.ones(3).double()})
    ranked = rank_weights(checkpoint, matrix, 0.001)
    tensor = next(t for t in architecture(checkpoint.config).tensors(checkpoint) if t.name == name)
    mask = ranked.mask(name, weight_scores(tensor.load(checkpoint), matrix.importance(name)))
    assert mask.sum() == ranked.total_protected == round(0.001 * 3 * 128 * 64) and mask[1].sum() == mask.sum()


@pytest.mark.parametrize("coverage", [-0.1, 1.5, float("nan")])
def test_bad_coverage(matrix, coverage):
    with pytest.raises(ArgumentError, match="share"): rank_weights(sample_path(), matrix, coverage)
