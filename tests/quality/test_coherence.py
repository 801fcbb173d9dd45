"Does it still speak: loops, prompts, the scale, and what must not pass."
import json
import random

import pytest
import torch

from llm_quantize.calibration.text import load_tokenizer
from llm_quantize.models.checkpoint import open_checkpoint
from llm_quantize.quality.coherence import bundled_prompts, coherence, continuations, loop_share, read_prompts
from llm_quantize.quality.evaluate import check_coherence
from llm_quantize.models.reference import load_float
from llm_quantize.quality.quantized_model import load_quantized
from llm_quantize.errors import CalibrationError, ValidationError
from llm_quantize.api import quantize


@pytest.fixture(scope="module")
def checkpoint(sample_model): return open_checkpoint(sample_model)


@pytest.fixture(scope="module")
def stage(checkpoint):
    "Original, tokenizer and eight prompts."
    return load_float(checkpoint), load_tokenizer(checkpoint.path), bundled_prompts()[::4]


@pytest.mark.parametrize("text, share", [("a b c d e f", 0), ("a a", 0), ("a a a", 1), ("x a b a b a b y", 0.75), ("a b a b a c", 0), ("", 0)])
def test_loops(text, share): assert loop_share(text.split()) == pytest.approx(share)


def test_loops_against_a_slow_search():
    "Every stretch, every period, by definition."
    def slow(t, period=4):
        inside = set()
        for p in range(1, period + 1):
            for start in range(len(t)):
                for end in range(start + 3 * p, len(t) + 1):
                    if all(t[i] == t[i - p] for i in range(start + p, end)): inside |= set(range(start, end))
        return len(inside) / len(t)
    dice = random.Random(0)
    for _ in range(200):
        t = dice.choices("ab", k=dice.randint(3, 24))
        assert loop_share(t, period=4) == pytest.approx(slow(t)), t


def test_a_batch_says_what_each_prompt_says_alone(stage):
    "Padding on the left changes nothing, and neither does the model's own generation config."
    model, tokenizer, prompts = stage
    together = continuations(model, tokenizer, prompts[:3], False, 12)
    for prompt, said in zip(prompts, together): assert continuations(model, tokenizer, [prompt], False, 12)[0].tolist() == said.tolist()
    with torch.inference_mode(): plain = model(input_ids=torch.tensor([tokenizer(prompts[0]).input_ids])).logits[0, -1].argmax()
    assert plain == together[0, 0]


def test_the_dice_are_ours_alone(stage):
    model, tokenizer, prompts = stage
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = continuations(model, tokenizer, prompts[:2], True, 8)
    assert torch.rand(1) == expected and torch.equal(first, continuations(model, tokenizer, prompts[:2], True, 8))


def test_the_scale(checkpoint, stage, tmp_path):
    "Itself 1, Q8_0 nearly, Q2_K less, a shuffled one nothing."
    model, tokenizer, prompts = stage
    shuffled, dice = load_float(checkpoint), torch.Generator().manual_seed(0)
    for p in shuffled.model.layers.parameters():
        if p.dim() == 2: p.data = p.data.flatten()[torch.randperm(p.numel(), generator=dice)].view(p.shape)
    q8, q2 = (load_quantized(checkpoint, quantize(checkpoint, "gguf", level, output_dir=tmp_path).output_path) for level in ("Q8_0", "Q2_K"))
    same, high, low, none = (coherence(model, other, tokenizer, prompts) for other in (model, q8, q2, shuffled))
    assert same.score == pytest.approx(1, abs=1e-4) and same.score_se < 1e-4
    assert high.score > 0.95 > 0.85 > low.score > 0.4 and none.score < 0.05
    assert 0 < low.score_se < 0.1 and len(low.texts) == len(prompts) and low.worst(1)[0]["score"] == min(t["score"] for t in low.texts)
    assert json.loads(json.dumps(low.to_dict()))["texts"][0]["prompt"] == prompts[0]


def test_a_model_that_only_repeats_itself_does_not_pass(checkpoint, stage):
    "Its head prefers one word always."
    model, tokenizer, prompts = stage
    stuck = load_float(checkpoint)
    class Head(torch.nn.Module):
        weight = stuck.lm_head.weight
        def forward(self, x): return torch.nn.functional.one_hot(torch.full(x.shape[:-1], 300), 4096).float() * 50
    stuck.lm_head = Head()
    found = coherence(model, stuck, tokenizer, prompts)
    assert found.fluency < 0.1 and found.score < 0.1 and found.loops > 0.9


def test_nan_is_refused(checkpoint, stage):
    broken = load_float(checkpoint)
    broken.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValidationError, match="not numbers"): coherence(stage[0], broken, stage[1], stage[2][:2])


def test_prompts(tmp_path):
    assert len(bundled_prompts()) >= 20 and len(set(bundled_prompts())) == len(bundled_prompts())
    (tmp_path / "p.txt").write_text("one\n\n two \n")
    (tmp_path / "p.json").write_text('["a\\nb", {"text": "c"}]')
    assert read_prompts(tmp_path / "p.txt")[-2:] == ["one", " two"] and read_prompts(tmp_path / "p.json")[-2:] == ["a\nb", "c"] and read_prompts(None) == bundled_prompts()
    (tmp_path / "no.txt").write_text("\n")
    with pytest.raises(CalibrationError, match="no.txt holds no prompts") as caught: read_prompts(tmp_path / "no.txt")
    assert caught.value.suggestion == "write one a line"
    with pytest.raises(CalibrationError) as caught: read_prompts(tmp_path / "nowhere.txt")
    assert "no prompts" not in caught.value.message


def test_from_files(checkpoint, tmp_path):
    path = quantize(checkpoint, "gguf", "Q8_0", output_dir=tmp_path).output_path
    (tmp_path / "p.txt").write_text("The sea\n")
    found = check_coherence(checkpoint, path, prompts=tmp_path / "p.txt")
    assert found.score > 0.95 and found.texts[-1]["prompt"] == "The sea" and len(found.texts) == 1 + len(bundled_prompts())
