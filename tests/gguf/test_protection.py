"Protection of super weights: exact where it says so, no larger, and no other file where there is nothing to protect."
import json
import logging
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from llm_quantize.calibration.analysis import cached_imatrix
from llm_quantize.models.checkpoint import open_checkpoint, sample_path
from llm_quantize.cli.main import main
from llm_quantize.quality.llama_cpp_model import open_llama
from llm_quantize.quants.codec import decode, encode
from llm_quantize.gguf.feedback_pass import EncodedAhead
from llm_quantize.errors import ArgumentError
from llm_quantize.gguf.plan import plan_gguf
from llm_quantize.gguf.profiles import Target
from llm_quantize.gguf.resolution import sensitivity_path
from llm_quantize.gguf.protection import Protection, exchange, finish, rescaled, up_of
from llm_quantize.gguf.pinning import half_ulp, pin, raise_weights
from llm_quantize.quality.evaluate import compare
from llm_quantize.api import quantize
from llm_quantize.calibration.probe import Probe, texts
from llm_quantize.calibration.effort import find_effort
from llm_quantize.calibration.sensitivity import measure_sensitivity
from llm_quantize.calibration.ranked_weights import rank_weights

DOWN, PLACES = "blk.0.ffn_down.weight", [(12, 210), (3, 210), (156, 210), (174, 210)]


@pytest.fixture(scope="module")
def imatrix():
    return cached_imatrix(sample_path(), calibration_samples=16)


@pytest.fixture(scope="module")
def down(imatrix):
    "Weights of the tensor with the super weights, and the importance of its columns."
    spec = next(s for s in plan_gguf(sample_path(), "Q2_K").specs if s.name == DOWN)
    return spec.load(open_checkpoint(sample_path())).float(), imatrix.importance(DOWN)


@pytest.fixture(scope="module", params=["IQ1_S", "IQ2_XXS"])
def pair(request, imatrix, tmp_path_factory):
    "The same mix without and with protection."
    folder = tmp_path_factory.mktemp("pair")
    return [quantize(sample_path(), "gguf", request.param, imatrix=imatrix, output_dir=folder, output_name=name, protect_super_weights=name == "with") for name in ("without", "with")]


def read(path):
    "Name -> (type, weights), by gguf's own reader and dequantizer."
    return {t.name: (t.tensor_type.name, gguf.quants.dequantize(t.data, t.tensor_type)) for t in gguf.GGUFReader(path).tensors}

# ---- pins ----------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("type", ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_1", "Q8_0"])
def test_a_pinned_weight_decodes_to_one_place_of_f16(type, down):
    weights, importance = down
    data = encode(weights, type, importance)
    before, decoded = data.clone(), decode(data, type)
    assert all(pin(data, type, weights, *place, importance) for place in PLACES)
    theirs = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[type])
    for place in PLACES: assert abs(theirs[place] - weights[place].item()) <= half_ulp(weights[place].item())
    other = (data != before).any(1)
    other[[row for row, _ in PLACES]] = False
    assert not other.any()
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]][0]
    moved = (decode(data, type) != decoded).view(len(weights), -1, size).any(-1)
    assert not moved[:, torch.arange(moved.shape[1]) != 210 // size].any()


def test_f16_places():
    for value in (1.0, 0.59, -0.3105, 3e-5, 65000.0, -2e-7):
        near = np.float16(value)
        assert half_ulp(float(near)) == pytest.approx(float(np.spacing(np.abs(near))))


def test_a_scale_that_would_move_far_is_left_alone(down):
    weights, importance = down
    data = encode(weights, "IQ2_XXS", importance)
    other, before = weights.clone(), data.clone()
    other[12, 210] *= 1.2
    assert not pin(data, "IQ2_XXS", other, 12, 210, importance) and torch.equal(data, before)
    flat = weights.clone()
    flat[12, 210] *= 1.025    # within reach, but the block pays: its other weights count too
    even = torch.ones_like(importance)
    sharp = encode(weights, "Q8_0", even)
    before = sharp.clone()
    assert not pin(sharp, "Q8_0", flat, 12, 210, even * 1e-9 + torch.nn.functional.one_hot(torch.tensor(211), 768)) and torch.equal(sharp, before)


def test_raised_weights_come_out_better(down):
    weights, importance = down
    mask = torch.zeros_like(weights, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    mask.view(-1)[torch.randperm(weights.numel(), generator=generator)[:200]] = True
    for type in ("IQ1_S", "Q2_K", "Q4_0"):
        data = encode(weights, type, importance)
        new = data.clone()
        assert raise_weights(new, type, weights, mask, importance, 30.0) == 200
        error = lambda d: ((decode(d, type) - weights)[mask].square()).sum().item()
        assert error(new) < 0.97 * error(data)
        size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]][0]
        untouched = ~mask.view(-1, size).any(1)
        assert torch.equal(new.view(len(untouched), -1)[untouched], data.view(len(untouched), -1)[untouched])

# ---- rescaling and exchange ----------------------------------------------------------------------------------------------------------------------

def test_a_rescaled_model_says_the_same():
    checkpoint = open_checkpoint(sample_path())
    specs = plan_gguf(checkpoint, "Q2_K").specs
    spec = next(s for s in specs if s.name == DOWN)
    other = rescaled(checkpoint, up_of(specs, spec), spec, 210, 0.125)
    ids = texts(checkpoint, find_effort("quick"))[1][:1]
    a, b = (Probe(c, ids, device="cpu").expected[0] for c in (checkpoint, other))
    assert spec.load(other)[12, 210] == 8 * spec.load(checkpoint)[12, 210]
    assert (a - b).abs().max() < 1e-3


@pytest.mark.parametrize("level", ["IQ1_S", "Q2_K", "Q4_K_M", "IQ3_XXS"])
def test_an_exchange_keeps_the_size(level, imatrix):
    job = plan_gguf(sample_path(), level, imatrix=imatrix)
    costs = measure_sensitivity(job.checkpoint, imatrix, effort="quick", path=sensitivity_path(job.checkpoint, imatrix, "quick"), device="cpu")
    changed, sizes = exchange(job, costs, (0,)), {}
    assert changed
    for t in job.plan: sizes[t.name] = (t.bytes, replace(t, type=changed.get(t.name, t.type)).bytes)
    for name, (old, new) in sizes.items(): assert new >= old if name.startswith("blk.0.") else new <= old
    total = [sum(s[i] for s in sizes.values()) for i in (0, 1)]
    assert 0 <= total[0] - total[1] <= 0.002 * job.file_bytes
    if level in ("Q2_K", "Q4_K_M"): assert all(type.startswith("Q") for type in changed.values())

# ---- the file ------------------------------------------------------------------------------------------------------------------------------------

def test_files_of_the_same_size_and_far_better(pair):
    without, guarded = pair
    assert 0 <= without.file_size - guarded.file_size <= 0.002 * without.file_size
    old, new = sorted(compare(sample_path(), [without.output_path, guarded.output_path], calibration_samples=8, device="cpu").reports, key=lambda r: r.quantized_model == "with.gguf")
    assert new.metrics.perplexity_quantized < 0.8 * old.metrics.perplexity_quantized
    assert guarded.protection["kld_with"] < 0.8 * guarded.protection["kld_without"] and guarded.protection["kld_difference"] < -5 * guarded.protection["kld_difference_se"]


def test_the_report_is_what_the_file_holds(pair):
    without, guarded = pair
    old, new = read(without.output_path), read(guarded.output_path)
    found = guarded.protection
    assert [(w["row"], w["column"]) for w in found["weights"]] == PLACES and found["identified"] == 4 and found["coverage"] == 1e-4
    scale = {(r["tensor"], r["column"]): r["up_row_times"] for r in found["rescaled"]}
    for w in found["weights"]:
        factor = scale.get((DOWN, w["column"]), 1.0)
        assert w["before"] == pytest.approx(float(old[DOWN][1][w["row"], w["column"]]), rel=1e-6)
        assert w["after"] == pytest.approx(float(new[DOWN][1][w["row"], w["column"]]) * factor, rel=1e-6)
        assert w["pinned"] and abs(w["after"] - w["original"]) <= half_ulp(w["original"]) * 1.0001
        assert 0.98 <= w["activation_ratio"] <= 1.02
    for change in found["exchanged"]: assert (old[change["tensor"]][0], new[change["tensor"]][0]) == (change["before"], change["after"])
    same = {name for name in old if old[name][0] == new[name][0]} - {name for name in old if name.startswith("blk.0.")}
    assert same and all(np.array_equal(old[name][1], new[name][1]) for name in same)
    json.dumps(guarded.to_dict())


def test_the_spike_in_plain_transformers(pair):
    "The super activation, from the decoded block with the inputs that the original has."
    from transformers import AutoModelForCausalLM
    model, name = AutoModelForCausalLM.from_pretrained(sample_path(), dtype=torch.float32), "model.layers.0."
    ids = texts(open_checkpoint(sample_path()), replace(find_effort("quick"), selection=4))[1][:1]
    def spikes():
        kept = []
        handle = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, inputs, output: kept.append(output[0, :, [row for row, _ in PLACES]]))
        with torch.inference_mode(): model(ids)
        handle.remove()
        return kept[0]
    before = spikes()
    job, decoded = plan_gguf(sample_path(), "Q2_K"), read(pair[1].output_path)
    for spec in job.specs:
        if spec.layer == 0 and spec.quantizable:
            for key, w in spec.to_hf(torch.from_numpy(decoded[spec.name][1].copy())).items(): model.get_parameter(key).data.copy_(w)
    token = before.abs().sum(1).argmax()
    ratios = (spikes()[token] / before[token]).tolist()
    assert ratios == pytest.approx([w["activation_ratio"] for w in pair[1].protection["weights"]], rel=1e-3)


def test_where_nothing_can_be_exchanged_a_column_is_rescaled(imatrix, tmp_path, monkeypatch):
    monkeypatch.setattr("llm_quantize.gguf.protection._exchanged", lambda *args: {})
    guarded = quantize(sample_path(), "gguf", "IQ2_XXS", imatrix=imatrix, output_dir=tmp_path, protect_super_weights=True)
    found, [scaled] = guarded.protection, guarded.protection["rescaled"]
    factor, spec = scaled["up_row_times"], next(s for s in plan_gguf(sample_path(), "IQ2_XXS").specs if s.name == DOWN)
    assert (scaled["tensor"], scaled["column"]) == (DOWN, 210) and factor in (0.5, 0.25, 0.125) and found["exchanged"] == []
    decoded = read(guarded.output_path)[DOWN][1]
    for w in found["weights"]:
        assert w["after"] == pytest.approx(float(decoded[w["row"], 210]) * factor, rel=1e-6) and w["pinned"]
        assert abs(float(decoded[w["row"], 210]) - w["original"] / factor) <= half_ulp(w["original"] / factor) and 0.98 <= w["activation_ratio"] <= 1.02
    assert spec.shape[-1] == 768 and guarded.file_size == found["size_unprotected"] and found["kld_difference"] < -2 * found["kld_difference_se"]


def test_layers_say_that_they_are_protected(pair):
    assert {s["layer_name"] for s in pair[1].layer_summary() if s["is_protected"]} == {"blk.0"}
    assert not any(s["is_protected"] for s in pair[0].layer_summary()) and pair[0].protection is None


def test_llama_cpp_runs_the_file(pair):
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: make test installs it")
    model = open_llama(pair[1].output_path, n_ctx=64, n_threads=1)
    found = model("The history of", max_tokens=8, temperature=0.0)
    assert len(found["choices"][0]["text"]) > 3


def test_with_error_feedback(imatrix, tmp_path):
    fed, both = (quantize(sample_path(), "gguf", "IQ2_XXS", imatrix=imatrix, output_dir=tmp_path, output_name=name, error_feedback=True, effort="quick", protect_super_weights=name == "both") for name in ("fed", "both"))
    assert 0 <= fed.file_size - both.file_size <= 0.002 * fed.file_size
    assert both.error_feedback["tensors"] > 20 and both.protection["kld_without"] is None
    decoded = read(both.output_path)[DOWN][1]
    pinned = [w for w in both.protection["weights"] if w["pinned"]]
    assert pinned and all(abs(w["activation_ratio"] - 1) < 0.02 for w in both.protection["weights"])
    for w in pinned: assert abs(w["after"] - w["original"]) <= half_ulp(w["original"]) * 1.0001
    reports = compare(sample_path(), [fed.output_path, both.output_path], calibration_samples=8, device="cpu").reports
    klds = {r.quantized_model: r.metrics.kld_mean for r in reports}
    assert klds["both.gguf"] < 0.9 * klds["fed.gguf"]


def test_dynamic_keeps_its_types(imatrix, tmp_path):
    target = Target(1_600_000, "bytes")
    plain, guarded = (quantize(sample_path(), "gguf", "dynamic", imatrix=imatrix, target=target, effort="quick", output_dir=tmp_path, output_name=name, protect_super_weights=name == "with") for name in ("without", "with"))
    assert plain.file_size == guarded.file_size and [t["type"] for t in plain.tensors] == [t["type"] for t in guarded.tensors]
    assert guarded.protection["exchanged"] == [] and all(w["pinned"] for w in guarded.protection["weights"])
    assert guarded.protection["kld_with"] < guarded.protection["kld_without"] + 2 * guarded.protection["kld_difference_se"]

# ---- nothing to protect, and the command ---------------------------------------------------------------------------------------------------------

def test_none_found(imatrix, tmp_path, caplog):
    nothing = replace(imatrix, notes={**imatrix.notes, "llm_quantize.calibration.super_weights": []})
    with caplog.at_level(logging.INFO, "llm_quantize"):
        plain, guarded = (quantize(sample_path(), "gguf", "Q2_K", imatrix=nothing, output_dir=tmp_path, output_name=name, protect_super_weights=name == "with") for name in ("without", "with"))
    assert "none found in sample-4m, nothing to protect" in caplog.text
    assert Path(plain.output_path).read_bytes() == Path(guarded.output_path).read_bytes()
    assert guarded.protection["identified"] == 0 and not any(s["is_protected"] for s in guarded.layer_summary())


def test_nothing_is_touched_without_super_weights(imatrix):
    job, ahead = plan_gguf(sample_path(), "Q2_K", imatrix=imatrix), EncodedAhead({}, {}, {})
    plan = Protection(job, imatrix, job, imatrix, (), rank_weights(job.checkpoint, imatrix))
    assert finish(plan, ahead) == (plan, ahead)


def test_the_command_computes_an_imatrix_and_says_so(tmp_path, capsys):
    assert main(["--format", "json", "quantize", str(sample_path()), "gguf", "-q", "iq2_xxs", "-o", str(tmp_path), "--calibration-samples", "16", "--protect-super-weights", "--protection-coverage", "0.001"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert "--protect-super-weights needs an importance matrix, and none was given: computing one first" in err
    assert found["imatrix"] == "computed" and found["protection"]["coverage"] == 0.001 and found["protection"]["raised_weights"] > 0
    assert {s["layer_name"] for s in found["layer_summary"] if s["is_protected"]} == {"blk.0"}


def test_the_command_shows_each_super_weight(tmp_path, capsys, imatrix):
    matrix = tmp_path / "own.imatrix"
    imatrix.save(matrix)
    assert main(["quantize", str(sample_path()), "gguf", "-q", "Q4_K_M", "-o", str(tmp_path), "--imatrix", str(matrix), "--protect-super-weights"]) == 0
    out, err = capsys.readouterr()
    assert "4 super weights in blk.0" in out and out.count("pinned") == 4 and "computing one first" not in err


def test_a_coverage_that_is_no_share(imatrix, tmp_path):
    with pytest.raises(ArgumentError, match="protection-coverage"): quantize(sample_path(), "gguf", "Q2_K", imatrix=imatrix, output_dir=tmp_path, protect_super_weights=True, protection_coverage=2.0)
    assert not list(tmp_path.iterdir())
