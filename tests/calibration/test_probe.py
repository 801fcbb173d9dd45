"The probe says what the evaluator of whole models says; its text and the text of the curvature have nothing in common."
from dataclasses import replace

import pytest
import torch

from llm_quantize.calibration.effort import find_effort
from llm_quantize.calibration.probe import Probe, probe_of, texts
from llm_quantize.calibration.sensitivity import decoded_as
from llm_quantize.calibration.text import bundled_text, load_tokenizer, windows
from llm_quantize.errors import CalibrationError
from llm_quantize.models.checkpoint import open_checkpoint, sample_path
from llm_quantize.models.job import Job
from llm_quantize.models.layer_stack import LayerStack
from llm_quantize.models.reference import load_float
from llm_quantize.quality.metrics import score_windows


@pytest.fixture(scope="module")
def sample(): return open_checkpoint(sample_path())


@pytest.fixture(scope="module")
def ids(sample): return windows(load_tokenizer(sample.path), bundled_text("calibration"), limit=2)


@pytest.fixture(scope="module")
def probe(sample, ids): return Probe(LayerStack(sample, dtype=torch.float32, device="cpu", keep=True), ids)


def test_the_probe_agrees_with_the_evaluator_of_whole_models(sample, ids, probe):
    names = ("token_embd.weight", "blk.0.attn_q.weight", "blk.3.ffn_up.weight")
    weights = {name: decoded_as(probe.specs[name].load(sample), "Q4_K", None, probe.specs[name]) for name in names}
    changed = load_float(sample)
    state = changed.state_dict()
    for name in names:
        for hf, value in probe.specs[name].to_hf(weights[name]).items(): state[hf].copy_(value)
    [scores] = score_windows(load_float(sample), [changed], ids)
    assert probe.kld(weights) == pytest.approx(scores.kld.mean().item(), rel=1e-3)
    assert probe.kld({}) == 0 and probe.kld({"blk.0.attn_q.weight": probe.specs["blk.0.attn_q.weight"].load(sample).float()}) < 1e-9


def test_the_two_texts_have_no_window_in_common(sample, tmp_path):
    effort = find_effort("default")
    ids, selection = texts(Job(sample), effort)
    assert (len(ids), len(selection)) == (effort.curvature, effort.selection)
    assert not {tuple(w[1:].tolist()) for w in ids} & {tuple(w[1:].tolist()) for w in selection}
    (tmp_path / "few.txt").write_text("word " * 700)
    with pytest.raises(CalibrationError, match="needs two"): texts(Job(sample), effort, tmp_path / "few.txt")


def test_a_job_has_one_probe_for_each_number_of_windows(sample):
    job, quick = Job(sample, device="cpu"), replace(find_effort("quick"), selection=1)
    one, two = probe_of(job, quick), probe_of(job, replace(quick, selection=2))
    assert probe_of(job, replace(quick, rows=7)) is one and two is not one and one.stack is two.stack
    assert torch.equal(one.ids, two.ids[1:]) and one.stack.dtype == torch.float32
