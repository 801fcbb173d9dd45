"""Ternary files: without loss for models trained so, refused for all others, and a good type for what is not ternary in a ternary model."""
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llm_quantize.models.job import Job
from llm_quantize.models.checkpoint import open_checkpoint, sample_path
from llm_quantize.cli.main import main
from llm_quantize.quality.llama_cpp_model import open_llama
from llm_quantize.quants.codec import encode
from llm_quantize.models.reference import load_float
from llm_quantize.quality.quantized_model import load_quantized
from llm_quantize.errors import ConversionError
from llm_quantize.gguf.reader import open_gguf
from llm_quantize.gguf.plan import plan_gguf
from llm_quantize.api import quantize
from llm_quantize.gguf.mixes import plan_mix
from llm_quantize.gguf.type_plan import Plan, PlannedTensor
from llm_quantize.gguf.ternary_plan import TernaryFindings, candidates, find_ternary, plan_ternary

TYPE = {"TERNARY": "TQ2_0", "TQ2_0": "TQ2_0", "TQ1_0": "TQ1_0"}


def tritted(w, per_block=False):
    "Weights made ternary with the scale of the tensor, or of each block of 256."
    blocks = w.float().reshape(-1, 256) if per_block else w.float().reshape(1, -1)
    scale = blocks.abs().mean(-1, keepdim=True).bfloat16().float()
    return ((blocks / scale).round().clamp(-1, 1) * scale).reshape(w.shape).to(w.dtype)


def llama(folder, kind="Llama", **settings):
    "A random model with the sample's tokenizer; its matrices are ternary, norms and embedding are not."
    base = dict(vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    torch.manual_seed(11)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**{**base, **settings})).bfloat16()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape)
            noise = noise * 0.3 + 1 if weight.dim() == 1 else noise / weight.shape[-1] ** 0.5
            weight.copy_(tritted(noise) if name.endswith("proj.weight") else noise)
    model.save_pretrained(folder)
    for file in sample_path().glob("token*"): shutil.copyfile(file, folder / file.name)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A small model that is ternary in every matrix."
    return llama(tmp_path_factory.mktemp("trained") / "tiny-ternary")


def changed(folder, target, change):
    "A copy whose tensors went through `change(name, tensor)`."
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    save_file({k: change(k, v).contiguous() for k, v in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    return target


def lossless(job, path):
    "Whether every weight of a ternary type is the original's to f16 rounding of the scale; and how many there are."
    file, weights = open_gguf(path), 0
    for spec, planned in zip(job.specs, job.plan):
        if not planned.type.startswith("TQ"): continue
        meant, got = spec.load(job.checkpoint).float(), file.decode(spec.name).view(spec.shape)
        if not torch.equal(got, meant.half().float()): return False, spec.name
        weights += meant.numel()
    return True, weights


def kld(p, q): return (p.double().softmax(-1) * (p.double().log_softmax(-1) - q.double().log_softmax(-1))).sum(-1).mean().item()


def decoded_kld(folder, path, tokens):
    "KLD of the decoded file from the original: as it is, and with the original's embedding."
    original, found = load_float(folder), load_quantized(folder, path)
    with torch.no_grad():
        meant = original(tokens).logits
        whole = kld(meant, found(tokens).logits)
        found.get_input_embeddings().weight.copy_(original.get_input_embeddings().weight)
        return whole, kld(meant, found(tokens).logits)


@pytest.mark.parametrize("level", TYPE)
def test_a_ternary_model_loses_nothing(trained, tmp_path, level):
    result, job = quantize(trained, "gguf", level.lower(), output_dir=tmp_path, device="cpu"), plan_gguf(Job(trained), level)
    assert result.quantization_level == level and result.output_path.endswith(f"tiny-ternary-{level}.gguf")
    assert result.file_size == job.file_bytes and open_gguf(result.output_path).metadata["general.file_type"] == {"TQ2_0": 37, "TQ1_0": 36}[TYPE[level]]
    assert job.plan.counts == {TYPE[level]: 21, "F32": 7, "Q8_0": 1} and job.plan["token_embd.weight"].type == "Q8_0"
    assert lossless(job, result.output_path) == (True, sum(t.parameters for t in job.plan if t.type == TYPE[level]))
    assert all(t["error"] == 0 for t in result.tensors if t["type"] == TYPE[level])
    tokens = torch.randint(3, 4096, (1, 64), generator=torch.Generator().manual_seed(1))
    whole, apart = decoded_kld(trained, result.output_path, tokens)
    assert apart < 1e-9 < whole < 1e-2
    llama = open_llama(result.output_path, n_ctx=64, n_batch=64, n_ubatch=64, n_threads=1, logits_all=True)
    llama.eval(tokens[0].tolist())
    with torch.no_grad(): meant = load_float(trained)(tokens).logits[0]
    assert kld(meant, torch.from_numpy(llama.scores[:64].copy())) < 2e-2, "llama.cpp rounds what it multiplies these weights with to 8 bits"
    llama.close()


def test_a_scale_for_each_block(trained, tmp_path):
    folder = changed(trained, tmp_path / "m", lambda k, v: tritted(torch.randn(v.shape, generator=torch.Generator().manual_seed(2)).to(v.dtype), True) if "up_proj" in k else v)
    result = quantize(folder, "gguf", "TERNARY", output_dir=tmp_path, device="cpu")
    assert lossless(plan_gguf(Job(folder), "TERNARY"), result.output_path)[0]


def noise(v): return torch.randn(v.shape, generator=torch.Generator().manual_seed(3)).to(v.dtype) * 0.05


def one_weight(v):
    v = v.clone()
    v[-1, -1] = v.abs().max() * 0.5
    return v


@pytest.mark.parametrize("spoil, words", [(noise, "none of its blocks"), (one_weight, "99.9% of its blocks")], ids=["a float matrix", "one weight in the last row"])
def test_what_is_not_ternary_gets_a_good_type(trained, tmp_path, spoil, words):
    folder = changed(trained, tmp_path / "m", lambda k, v: spoil(v) if k == "model.layers.1.mlp.down_proj.weight" else v)
    job = plan_gguf(Job(folder), "TERNARY")
    assert job.plan["blk.1.ffn_down.weight"].type == "Q8_0" and words in job.plan["blk.1.ffn_down.weight"].why
    assert job.plan.counts == {"TQ2_0": 20, "F32": 7, "Q8_0": 2}
    result = quantize(folder, "gguf", "TERNARY", output_dir=tmp_path, device="cpu")
    assert lossless(job, result.output_path)[0] and max(t["error"] for t in result.tensors) < 1e-4


@pytest.mark.parametrize("share, words", [(0.0, "none of"), (0.25, "25.0% of"), (0.9987, "99.9% of"), (1 - 1e-5, "nearly all of")])
def test_a_matrix_that_is_not_ternary_is_never_said_to_be(share, words):
    "One block of a hundred thousand rounds to 100.0%."
    tensors = (PlannedTensor("blk.0.ffn_up.weight", (64, 512), "TQ2_0", ""), PlannedTensor("blk.0.ffn_down.weight", (64, 512), "TQ2_0", ""))
    findings = TernaryFindings({tensors[0].name: share, tensors[1].name: 1.0}, {tensors[0].name: 1, tensors[1].name: 2}, False)
    line = plan_ternary(Plan("TQ2_0", 37, tensors), "TQ2_0", findings)[tensors[0].name]
    assert line.type == "Q8_0" and words in line.why and "100.0%" not in line.why


def test_an_output_matrix_of_its_own_is_kept_precise(tmp_path):
    folder = llama(tmp_path / "m", tie_word_embeddings=False, num_hidden_layers=1)
    plan = plan_gguf(Job(folder), "TQ1_0").plan
    assert plan["output.weight"].type == plan["token_embd.weight"].type == "Q8_0" and "never ternary" in plan["output.weight"].why


def test_rows_that_do_not_divide(tmp_path):
    plan = plan_gguf(Job(llama(tmp_path / "m", hidden_size=384, num_attention_heads=6, num_key_value_heads=3, num_hidden_layers=1)), "TERNARY", force=True).plan
    assert plan["blk.0.ffn_down.weight"].type == "TQ2_0", "768 columns do"
    with pytest.raises(ConversionError): plan_gguf(Job(sample_path()), "TERNARY")
    folder = llama(tmp_path / "n", intermediate_size=640, num_hidden_layers=1)
    down = plan_gguf(Job(folder), "TERNARY").plan["blk.0.ffn_down.weight"]
    assert down.type == "Q8_0" and "640" in down.why
    assert lossless(plan_gguf(Job(folder), "TERNARY"), quantize(folder, "gguf", "TERNARY", output_dir=tmp_path, device="cpu").output_path)[0]


def test_experts(tmp_path):
    "Stacked experts: one of them in floats, and the stack is not ternary."
    folder = llama(tmp_path / "m", "Mixtral", num_local_experts=4, num_experts_per_tok=2, num_hidden_layers=2)
    made = lambda k, v: tritted(v) if "experts" in k else v
    whole = changed(folder, tmp_path / "whole", made)
    plan = plan_gguf(Job(whole), "TERNARY").plan
    assert plan["blk.0.ffn_up_exps.weight"].type == "TQ2_0" and plan["blk.0.ffn_gate_inp.weight"].type == "F32"
    result = quantize(whole, "gguf", "TERNARY", output_dir=tmp_path, device="cpu")
    assert lossless(plan_gguf(Job(whole), "TERNARY"), result.output_path)[0]
    part = changed(whole, tmp_path / "part", lambda k, v: noise(v) if ".1." in k and "experts.3.w2" in k else v)
    assert any("experts.3.w2" in name for name in open_checkpoint(part).names)
    assert plan_gguf(Job(part), "TERNARY").plan["blk.1.ffn_down_exps.weight"].type == "Q8_0"


@pytest.mark.parametrize("level, instead", [("TERNARY", "IQ2_XXS"), ("TQ2_0", "IQ2_XXS"), ("TQ1_0", "IQ1_M")])
def test_an_ordinary_model_is_refused(tmp_path, capsys, level, instead):
    out = tmp_path / "out"
    code = main(["--format", "json", "quantize", str(sample_path()), "gguf", "-q", level, "-o", str(out)])
    found = json.loads(capsys.readouterr().out)
    assert code == found["error_code"] == 8 and found["error_type"] == "ConversionError"
    assert "0.0% of the blocks" in found["message"] and instead in found["suggestion"] and "--force" in found["suggestion"]
    assert not out.exists()
    assert main(["quantize", str(sample_path()), "gguf", "-q", level, "--dry-run"]) == 8


class Counting(type(open_checkpoint(sample_path()))):
    "Counts the bytes of tensors that were looked at, by what is done with their rows."
    def tensor(self, name):
        self.asked = getattr(self, "asked", 0) + 1
        return super().tensor(name)


def test_an_ordinary_model_is_known_by_its_first_rows():
    model = Counting(sample_path())
    job = plan_gguf(Job(sample_path()), "TERNARY", force=True)
    found = find_ternary(model, candidates(job.plan, job.specs))
    assert found.glanced and not found.ternary and found.share == 0 and model.asked == 28


def test_half_of_the_weights_decide(trained, tmp_path):
    few = changed(trained, tmp_path / "few", lambda k, v: noise(v) if "mlp" in k else v)
    most = changed(trained, tmp_path / "most", lambda k, v: noise(v) if "self_attn" in k else v)
    with pytest.raises(ConversionError, match="25.0%"): plan_gguf(Job(few), "TERNARY")
    assert plan_gguf(Job(most), "TERNARY").plan.counts == {"Q8_0": 13, "TQ2_0": 9, "F32": 7}


@pytest.mark.parametrize("level", TYPE)
def test_force_writes_the_optimum_under_importance(tmp_path, level):
    from llm_quantize.calibration.imatrix import ImportanceMatrix
    job = plan_gguf(Job(sample_path()), level, force=True)
    theirs = plan_mix(TYPE[level], [(s.name, s.shape) for s in job.specs], facts(job))
    assert {t.name: t.type for t in job.plan} == {t.name: t.type for t in theirs}, "as llama.cpp's mix has them"
    importance = {s.name: torch.rand(1, s.shape[-1], generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.01 for s in job.specs if s.quantizable and s.layer is not None}
    matrix = ImportanceMatrix(importance, {name: torch.ones(1).double() for name in importance})
    file = open_gguf(quantize(sample_path(), "gguf", level, output_dir=tmp_path, force=True, imatrix=matrix, device="cpu").output_path)
    for spec in job.specs[3:8]:
        if not spec.quantizable: continue
        x, w = spec.load(job.checkpoint).float(), matrix.importance(spec.name)
        got = file.decode(spec.name).view(spec.shape)
        cost = lambda y: (w * (x - y).square()).sum().item()
        blocks = x.reshape(-1, 256)
        by_max = blocks.abs().amax(-1, keepdim=True)
        assert cost(got) < 0.6 * cost(((blocks / by_max).round() * by_max).reshape(x.shape)), "max-scaling, as llama.cpp does, is far worse"
        from llm_quantize.quants.codec import decode
        assert torch.equal(got, decode(encode(x, TYPE[level], w), TYPE[level]))


def facts(job):
    from llm_quantize.gguf.mixes import facts_from_metadata
    return facts_from_metadata(job.metadata)


def test_a_typing_error_finds_ternary():
    from llm_quantize.errors import ArgumentError
    with pytest.raises(ArgumentError) as caught: plan_gguf(Job(sample_path()), "ternery")
    assert "TERNARY" in caught.value.suggestion


@pytest.mark.shared
@pytest.mark.parametrize("level", ["TERNARY", "TQ1_0"])
def test_trilm(shared_model, tmp_path, level):
    "The proof on a real model trained ternary: weights, and what it says about text it has not seen."
    from llm_quantize.calibration.text import bundled_text, load_tokenizer, windows
    folder = shared_model("trilm-27m")
    result = quantize(folder, "gguf", level, output_dir=tmp_path, device="cpu")
    good, weights = lossless(plan_gguf(Job(folder), level), result.output_path)
    assert good and weights == 18_874_368
    tokens = windows(load_tokenizer(folder), bundled_text("heldout"), size=512, limit=2)
    whole, apart = decoded_kld(folder, result.output_path, tokens)
    print(f"{level}: {result.file_size:,} bytes, {weights:,} weights equal; KLD {whole:.2e}, with the original's embedding {apart:.2e}")
    assert apart < 1e-4 and whole < 1e-3
