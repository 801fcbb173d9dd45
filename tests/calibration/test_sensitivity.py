"Costs of types: predictions against measurements, the probe against the evaluator of whole models, files that are whole or refused."
import json

import pytest
import torch

from llm_quantize.models.job import Job
from llm_quantize.calibration import hessian
from llm_quantize.models.layer_stack import LayerStack
from llm_quantize.calibration.text import bundled_text, load_tokenizer, windows
from llm_quantize.models.checkpoint import open_checkpoint, sample_path
from llm_quantize.errors import ArgumentError, ProfileError
from llm_quantize.calibration.hessian import Curvature, loss_curvature
from llm_quantize.calibration.effort import Effort
from llm_quantize.calibration.probe import Probe
from llm_quantize.calibration.sensitivity import Sensitivity, TensorCosts, candidate_types, corrected, measure_sensitivity, plot_sensitivity, spearman


@pytest.fixture(scope="module")
def sample(): return open_checkpoint(sample_path())


@pytest.fixture(scope="module")
def ids(sample): return windows(load_tokenizer(sample.path), bundled_text("calibration"), limit=2)


@pytest.fixture(scope="module")
def probe(sample, ids): return Probe(LayerStack(sample, dtype=torch.float32, device="cpu", keep=True), ids)


def test_cost_is_the_mean_square_of_what_moves():
    torch.manual_seed(0)
    x, g, error = torch.randn(50, 8), torch.randn(50, 5), torch.randn(5, 8)
    s = g.square().mean(1)
    h = (x * s[:, None]).T @ x / 50
    rho = g.square().sum(0) / g.square().sum(0).mean()
    expected = 0.5 * sum((rho[o] * error[o] @ h @ error[o]).item() for o in range(5))
    assert Curvature(h[None, None], rho[None]).cost(error) == pytest.approx(expected, rel=1e-5)
    rows = torch.tensor([1, 3])
    part = 0.5 * sum((rho[o] * error[o] @ h @ error[o]).item() for o in (1, 3)) * (rho.sum() / rho[rows].sum()).item()
    assert Curvature(h[None, None], rho[None]).cost(error[rows], rows) == pytest.approx(part, rel=1e-5)


def test_wide_tensors_keep_blocks_of_their_curvature(sample, ids, monkeypatch):
    stack = LayerStack(sample, dtype=torch.float32, device="cpu", keep=True)
    whole = loss_curvature(stack, ids)
    monkeypatch.setattr(hessian, "WIDTH", 256)
    blocks = loss_curvature(stack, ids)
    name = "blk.1.ffn_down.weight"
    assert whole[name].h.shape == (1, 1, 768, 768) and blocks[name].h.shape == (1, 3, 256, 256)
    for i in range(3): assert torch.allclose(blocks[name].h[0, i], whole[name].h[0, 0, 256 * i:256 * i + 256, 256 * i:256 * i + 256], rtol=1e-3, atol=1e-7)
    torch.manual_seed(1)
    noise = torch.randn(256, 768) * 0.01
    assert blocks[name].cost(noise) == pytest.approx(whole[name].cost(noise), rel=0.2)


def test_the_curvature_is_that_of_the_loss(sample, ids, probe):
    "A small random error in any one tensor moves the predictions by what was predicted, within the noise of a few windows."
    curved = loss_curvature(probe.stack, ids)
    for name in ("blk.0.attn_q.weight", "blk.1.attn_v.weight", "blk.2.ffn_gate.weight", "blk.3.ffn_down.weight"):
        spec = probe.specs[name]
        weights = spec.load(sample).float()
        torch.manual_seed(2)
        error = torch.randn_like(weights) * weights.std() * 0.05
        unpermuted = next(iter(spec.to_hf(error).values()))
        assert 0.5 < probe.kld({name: weights + error}) / curved[name].cost(unpermuted) < 2, name


def test_corrections_pass_through_the_measurements():
    predicted = {"A": 1.0, "B": 0.1, "C": 0.01, "D": 0.001}
    assert corrected(predicted, {}) == predicted
    assert corrected(predicted, {"B": 0.2}) == pytest.approx({"A": 2.0, "B": 0.2, "C": 0.02, "D": 0.002})
    both = corrected(predicted, {"A": 4.0, "C": 0.01})
    assert both["A"] == pytest.approx(4) and both["C"] == pytest.approx(0.01) and both["B"] == pytest.approx(0.2) and both["D"] == pytest.approx(0.001)
    assert corrected({"A": 0.0, "B": 1.0}, {"A": 0.3, "B": 0.0})["A"] == 0


def test_types_fit_the_rows():
    assert "IQ2_XXS" in candidate_types(512) and "Q4_0" not in candidate_types(512)
    assert "IQ2_XXS" not in candidate_types(96) and "Q4_0" in candidate_types(96)
    assert candidate_types(7) == ("BF16",)


LITTLE = Effort(curvature=1, rows=8, selection=1, anchors=1, trials=0, moments=1, tuning=0, epochs=0)


def test_a_stopped_run_goes_on(sample, tmp_path):
    "What is in the file is neither predicted nor measured again."
    path, told = tmp_path / "x.sensitivity.json", []
    def costs(): return measure_sensitivity(Job(sample, device="cpu", progress=lambda done, total, what: told.append(what)), effort=LITTLE, path=path)
    def steps(word): return len({what for what in told if what.startswith(word)})
    whole = costs()
    assert Sensitivity.load(path) == whole and len(whole.tensors) == 29 and len(whole.measured) == 28
    half = Sensitivity(whole.model, whole.about, tuple(TensorCosts(t.name, t.shape, t.predicted, t.measured if i % 2 else {}) for i, t in enumerate(whole.tensors)))
    half.save(path)
    assert (steps("predicting"), steps("measuring")) == (29, 29)
    told.clear()
    assert costs() == whole and not steps("predicting") and 0 < steps("measuring") < 29
    told.clear()
    assert costs() == whole and not told


@pytest.mark.parametrize("damage", [lambda d: d.pop("tensors"), lambda d: d.update(version=2), lambda d: d["tensors"][0]["predicted"].update(Q99=1), lambda d: d.update(tensors=3),
                                    lambda d: d["tensors"][0].update(predicted=[1])], ids=["no tensors", "version", "type", "number", "list"])
def test_damaged_files_are_refused(tmp_path, damage):
    good = Sensitivity("m", {}, (TensorCosts("blk.0.a.weight", (8, 256), {"Q4_K": 0.1}, {"Q4_K": 0.2}),))
    path = good.save(tmp_path / "s.json")
    assert Sensitivity.load(path) == good
    data = json.loads(path.read_text())
    damage(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ProfileError): Sensitivity.load(path)
    with pytest.raises(ProfileError): Sensitivity.load(tmp_path / "none.json")


def test_ranks_and_map():
    assert spearman([1, 2, 3], [2, 5, 9]) == pytest.approx(1) and spearman([1, 2, 3], [9, 5, 2]) == pytest.approx(-1)
    found = Sensitivity("m", {}, tuple(TensorCosts(f"blk.{i}.{kind}.weight", (8, 256), {"Q4_K": 0.1}) for i in range(3) for kind in ("attn_q", "ffn_up")))
    assert len(plot_sensitivity(found, "Q4_K").axes) == 2
    with pytest.raises(ArgumentError): plot_sensitivity(found, "Q6_K")


def test_an_order_needs_two_tensors():
    "One tensor at a type has no rank: its correlation was NaN, which no JSON may hold."
    one = TensorCosts("blk.0.attn_q.weight", (8, 256), {"Q4_K": 0.1}, {"Q4_K": 0.2})
    odd = TensorCosts("blk.0.ffn_down.weight", (8, 96), {"Q4_0": 0.3}, {"Q4_0": 0.5})
    assert Sensitivity("m", {}, (one, odd)).correlation() is None
    other = TensorCosts("blk.1.attn_q.weight", (8, 256), {"Q4_K": 0.2}, {"Q4_K": 0.3})
    assert Sensitivity("m", {}, (one, odd, other)).correlation() == pytest.approx(1)


def test_a_tensor_that_is_not_in_the_table():
    "`StopIteration` would end a caller's loop in silence."
    found = Sensitivity("m", {}, (TensorCosts("blk.0.attn_q.weight", (8, 256), {"Q4_K": 0.1}),))
    assert found["blk.0.attn_q.weight"].predicted == {"Q4_K": 0.1}
    with pytest.raises(ArgumentError, match="blk.9"): found["blk.9.attn_q.weight"]
