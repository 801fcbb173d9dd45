"What the report says of protected files is what the files hold, and what plain transformers makes of their blocks."
import json
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from llm_quantize.calibration.effort import find_effort
from llm_quantize.calibration.probe import texts
from llm_quantize.calibration.ranked_weights import rank_weights
from llm_quantize.gguf.feedback_pass import Prepared
from llm_quantize.gguf.pinning import half_ulp
from llm_quantize.gguf.plan import Draft, plan_gguf
from llm_quantize.gguf.protection import Protection
from llm_quantize.gguf.spikes import encode_protected
from llm_quantize.models.checkpoint import open_checkpoint, sample_path
from llm_quantize.models.job import Job

DOWN, PLACES = "blk.0.ffn_down.weight", [(12, 210), (3, 210), (156, 210), (174, 210)]


def read(path):
    "Name -> (type, weights), by gguf's own reader and dequantizer."
    return {t.name: (t.tensor_type.name, gguf.quants.dequantize(t.data, t.tensor_type)) for t in gguf.GGUFReader(path).tensors}


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
    model = AutoModelForCausalLM.from_pretrained(sample_path(), dtype=torch.float32)
    ids = texts(Job(open_checkpoint(sample_path())), replace(find_effort("quick"), selection=4))[1][:1]
    def spikes():
        kept = []
        handle = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, inputs, output: kept.append(output[0, :, [row for row, _ in PLACES]]))
        with torch.inference_mode(): model(ids)
        handle.remove()
        return kept[0]
    before = spikes()
    job, decoded = plan_gguf(Job(sample_path()), "Q2_K"), read(pair[1].output_path)
    for spec in job.specs:
        if spec.layer == 0 and spec.quantizable:
            for key, w in spec.to_hf(torch.from_numpy(decoded[spec.name][1].copy())).items(): model.get_parameter(key).data.copy_(w)
    token = before.abs().sum(1).argmax()
    ratios = (spikes()[token] / before[token]).tolist()
    assert ratios == pytest.approx([w["activation_ratio"] for w in pair[1].protection["weights"]], rel=1e-3)


def test_layers_say_that_they_are_protected(pair):
    assert {s["layer_name"] for s in pair[1].layer_summary() if s["is_protected"]} == {"blk.0"}
    assert not any(s["is_protected"] for s in pair[0].layer_summary()) and pair[0].protection is None


def test_nothing_is_touched_without_super_weights(imatrix):
    job = Job(sample_path())
    draft, prepared = Draft(plan_gguf(job, "Q2_K", has_imatrix=True), imatrix), Prepared()
    plan = Protection(draft, draft, (), rank_weights(job.checkpoint, imatrix))
    done = encode_protected(plan, prepared)
    assert done.plan is plan and done.prepared is prepared and (done.raised, done.pinned, done.ratios) == (0, {}, [])
