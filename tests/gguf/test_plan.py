"Plans and sizes of models that the sample is not."
import shutil

import pytest
import torch
import transformers

from llm_quantize.models.job import Job
from llm_quantize.gguf.options import Calibration, Dynamic
from llm_quantize.calibration.effort import Effort
from llm_quantize.models.checkpoint import open_checkpoint, sample_path
from llm_quantize.gguf.plan import plan_dynamic, plan_gguf, validate_profile
from llm_quantize.gguf.profiles import Profile, Target


@pytest.fixture(scope="module")
def copied_head(tmp_path_factory):
    "A tied model of an architecture whose files have an output matrix all the same."
    folder = tmp_path_factory.mktemp("tied") / "model"
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(vocab_size=4096, hidden_size=256, intermediate_size=256, moe_intermediate_size=256, shared_expert_intermediate_size=256, num_hidden_layers=1,
                                         num_attention_heads=4, num_key_value_heads=4, num_experts=4, num_experts_per_tok=2, tie_word_embeddings=True, max_position_embeddings=512,
                                         bos_token_id=1, eos_token_id=2, pad_token_id=None)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"): shutil.copy(sample_path() / name, folder / name)
    return folder


def test_a_copied_output_matrix_is_counted_and_quantized(copied_head, tmp_path, monkeypatch):
    "Left out of the choice, it would be written in F32 and not counted: a file far larger than was asked for."
    monkeypatch.setenv("LLM_QUANTIZE_CACHE", str(tmp_path))
    effort = Effort(curvature=1, rows=4, selection=1, anchors=0, trials=0, moments=1, tuning=0, epochs=0)
    wanted = Profile("eight", Target(8.0, "file"), floors=False)
    expected, parameters = validate_profile(wanted, Job(copied_head)).file_size, open_checkpoint(copied_head).parameters
    job = Job(copied_head, device="cpu")
    planned, _ = plan_dynamic(job, Dynamic(wanted), Calibration(samples=1), effort=effort)
    assert planned.plan["output.weight"].type == plan_gguf(job, "Q4_K_M").plan["output.weight"].type == "Q6_K"
    assert 8 * planned.file_bytes / parameters <= 8.0 and planned.file_bytes == pytest.approx(expected, rel=0.02)
    saved = Profile("saved", wanted.target, tensors={t.name: t.type for t in planned.plan if t.type != "F32"})
    fit = validate_profile(saved, job)
    assert fit.fits and fit.file_size == planned.file_bytes == plan_dynamic(job, Dynamic(saved), Calibration(samples=1))[0].file_bytes


def test_a_target_below_the_copy_is_refused(copied_head):
    "Three bits per weight of the file cannot hold the copy and the rest."
    fit = validate_profile(Profile("three", Target(3.0, "file"), floors=False), Job(copied_head))
    assert not fit.fits and "cannot be met" in fit.problems[0]
