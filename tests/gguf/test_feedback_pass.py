"Error feedback the whole way: the file runs in llama.cpp and is closer to the original; kills and resumes give the same bytes; memory decides what is done."
import hashlib
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from llm_quantize.calibration import effort
from llm_quantize.models.layer_stack import LayerStack
from llm_quantize.calibration.text import bundled_text, load_tokenizer, windows
from llm_quantize.models.checkpoint import sample_path
from llm_quantize.models.reference import load_float
from llm_quantize.quality.llama_cpp_model import open_llama
from llm_quantize.quality.quantized_model import load_quantized
from llm_quantize.calibration.collect import collect
from llm_quantize.gguf.feedback_pass import feedback_pass
from llm_quantize.gguf.options import Feedback
from llm_quantize.gguf.plan import Draft, plan_gguf
from llm_quantize.models.job import Job
from llm_quantize.errors import CheckpointError
from llm_quantize.calibration.hessian import layer_groups, second_moments
from llm_quantize.quality.metrics import score_windows
from llm_quantize.api import quantize


@pytest.fixture(autouse=True)
def tiny(monkeypatch): monkeypatch.setitem(effort.EFFORTS, "tiny", replace(effort.EFFORTS["quick"], moments=12, tuning=8, epochs=1))


def test_the_file_runs_and_is_closer(tmp_path):
    plain = quantize(sample_path(), "gguf", "Q2_K", output_dir=tmp_path, search="reference")
    fed = quantize(sample_path(), "gguf", "Q2_K", output_dir=tmp_path, output_name="fed", error_feedback=True, effort="tiny")
    assert fed.file_size == plain.file_size and fed.error_feedback["kld_after_tuning"] < fed.error_feedback["kld_before_tuning"]
    ids = windows(load_tokenizer(sample_path()), bundled_text("heldout"), limit=6)
    a, b = score_windows(load_float(sample_path()), [load_quantized(sample_path(), r.output_path) for r in (plain, fed)], ids)
    assert b.kld.mean() < 0.85 * a.kld.mean()
    model = open_llama(fed.output_path, n_ctx=128, seed=0)
    assert model.create_completion("The history of", max_tokens=8, temperature=0)["choices"][0]["text"]


RUN = """
import sys
from dataclasses import replace
from llm_quantize.calibration.effort import EFFORTS
from llm_quantize.api import quantize
EFFORTS["tiny"] = replace(EFFORTS["quick"], moments=4, tuning=4, epochs=1)
folder, resume = sys.argv[1:3]
quantize(sys.argv[3], "gguf", "Q3_K_S", output_dir=folder, output_name="m", error_feedback=True, effort="tiny", checkpoint_dir=folder + "/state", resume=folder + "/state" if resume == "yes" else None, device="cpu")
"""


def digest(folder): return hashlib.sha256((folder / "m.gguf").read_bytes()).hexdigest()


def test_killed_and_resumed_gives_the_same_bytes(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = lambda folder, resume: [sys.executable, "-c", RUN, str(folder), resume, str(sample_path())]
    subprocess.run(command(whole, "no"), check=True)
    process = subprocess.Popen(command(broken, "no"))
    while not (broken / "state" / "feedback" / "layer-1.safetensors").exists() and process.poll() is None: time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / "m.gguf").exists() and (broken / "state" / "feedback" / "layer-0.safetensors").exists()
    subprocess.run(command(broken, "yes"), check=True)
    assert digest(broken) == digest(whole) and not (broken / "state" / "feedback").exists()


def test_checkpoints_of_another_run_or_damaged(tmp_path):
    job = Job(sample_path())
    draft = Draft(plan_gguf(job, "Q4_0"))
    prepared = feedback_pass(job, draft, Feedback(True, tmp_path), effort="tiny")
    assert set(prepared.encoded) == {s.name for s in draft.plan.specs if s.layer is not None and s.quantizable}
    again = Feedback(True, tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="another search"): feedback_pass(job, draft, again, effort="tiny", search="best")
    (tmp_path / "feedback" / "layer-2.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="damaged"): feedback_pass(job, draft, again, effort="tiny")


def test_layers_that_do_not_fit_get_plain_moments():
    stack, ids = LayerStack(sample_path(), device="cpu", dtype=torch.float32, keep=False), windows(load_tokenizer(sample_path()), bundled_text("calibration"), limit=2)
    kept = LayerStack(sample_path(), device="cpu", dtype=torch.float32, keep=True)
    [there], [here] = list(second_moments(stack, ids)), list(second_moments(kept, ids, end_loss=False))
    for name in here: assert torch.allclose(there[name], here[name], rtol=1e-3, atol=1e-6)
    x = there["blk.0.attn_q.weight"]
    assert torch.equal(x, there["blk.0.attn_v.weight"]) and not torch.equal(x, there["blk.0.attn_output.weight"])
    assert len(layer_groups(kept.inputs, 0)) == 4 and len(layer_groups(kept.inputs, float("inf"))) == 1


def test_the_diagonal_is_the_fisher_importance():
    ids = windows(load_tokenizer(sample_path()), bundled_text("calibration"), limit=2)
    [moments] = second_moments(LayerStack(sample_path(), device="cpu", dtype=torch.float32), ids)
    matrix = collect(LayerStack(sample_path(), device="cpu", dtype=torch.float32), ids, method="fisher")
    for name in ("blk.0.attn_k.weight", "blk.3.ffn_down.weight"):
        ours, theirs = moments[name][0].diagonal(), matrix.importance(name).flatten()
        assert torch.allclose(ours / ours.sum(), theirs / theirs.sum(), rtol=1e-3, atol=1e-9)
