"""BitNet checkpoints in every form transformers reads, against transformers: the same matrices, the same logits in llama.cpp, and lossless ternary files.

transformers also rounds the input of each matrix to 8 bits, and llama.cpp does it in its own way where weights are quantized; where logits are compared, the rounding of transformers is turned off.
"""
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llm_quantize.models.job import Job
from llm_quantize.models.architectures import architecture
from llm_quantize.models.bitnet import is_bitnet, plain_weights, round_masters, unpack_trits
from llm_quantize.models.checkpoint import open_checkpoint, sample_path
from llm_quantize.errors import ConversionError
from llm_quantize.gguf.reader import open_gguf
from llm_quantize.quality.llama_cpp_model import open_llama
from llm_quantize.quality.model_info import info
from llm_quantize.quality.evaluate import quality_report
from llm_quantize.gguf.plan import plan_gguf
from llm_quantize.api import quantize

integration = pytest.importorskip("transformers.integrations.bitnet", reason="needs transformers with BitNet")
pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: make test installs it")

SETTINGS = dict(vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, hidden_act="silu",
                tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=None)


@pytest.fixture(autouse=True)
def eager():
    "transformers compiles its quantizers; here they run as they are written."
    with torch.compiler.set_stance("force_eager"): yield


@pytest.fixture(scope="module")
def masters(tmp_path_factory):
    "A BitNet with master weights, random norms, and the sample model's tokenizer."
    folder = tmp_path_factory.mktemp("bitnet") / "bitnet-tiny"
    torch.manual_seed(5)
    model = transformers.BitNetForCausalLM(transformers.BitNetConfig(**SETTINGS))
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn_like(weight)
            weight.copy_((noise * 0.3 + 1 if weight.dim() == 1 else noise / weight.shape[-1] ** 0.5).bfloat16())
    model.tie_weights()
    model.save_pretrained(folder)
    for file in sample_path().glob("token*"): shutil.copyfile(file, folder / file.name)
    return folder


def variant(folder, target, settings=None, change=lambda tensors: tensors, **config):
    "A copy with another quantization config, other tensors, other settings."
    shutil.copytree(folder, target)
    found = json.loads((target / "config.json").read_text()) | config
    if settings is not None: found["quantization_config"] = {"quant_method": "bitnet", **settings}
    (target / "config.json").write_text(json.dumps(found))
    save_file({k: v.contiguous() for k, v in change(load_file(target / "model.safetensors")).items()}, target / "model.safetensors", {"format": "pt"})
    return target


def packer(divide):
    "Tensors packed by transformers' own function; the scale multiplies or divides."
    def pack(tensors):
        out = {}
        for name, w in tensors.items():
            if not name.endswith("proj.weight"): out[name] = w; continue
            scale = w.abs().mean()
            out[name] = integration.pack_weights((w / scale).round().clamp(-1, 1))
            out[f"{name}_scale"] = (1 / scale if divide else scale).reshape(1)
        return out
    return pack


ONLINE = {"linear_class": "autobitlinear", "quantization_mode": "online"}
OFFLINE = {"linear_class": "autobitlinear", "quantization_mode": "offline"}
BITLINEAR = {"linear_class": "bitlinear", "quantization_mode": "offline"}
FORMS = {"online": (ONLINE, lambda t: t), "offline": (OFFLINE, packer(False)), "bitlinear": (BITLINEAR, packer(True))}


def test_rounding_is_that_of_transformers():
    for dtype in (torch.float32, torch.bfloat16):
        w = (torch.randn(64, 256) * 0.02).to(dtype)
        assert torch.equal(round_masters(w), integration.WeightQuant.apply(w))
    assert round_masters(torch.zeros(4, 256)).abs().sum() == 0


def test_unpacking_is_that_of_transformers():
    trits = torch.randint(-1, 2, (16, 8)).float()
    packed = integration.pack_weights(trits.clone())
    assert torch.equal(unpack_trits(packed), trits) and torch.equal(unpack_trits(packed), integration.unpack_weights(packed, torch.float32))
    with pytest.raises(ConversionError, match="code 3"): unpack_trits(packed | 3)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_matrices_of_the_masters(masters, tmp_path, form):
    settings, change = FORMS[form]
    found, floats = plain_weights(open_checkpoint(variant(masters, tmp_path / "m", settings, change))), open_checkpoint(masters)
    assert found.names == floats.names and found.parameters == floats.parameters and "quantization_config" not in found.config
    for name in found.names:
        assert found.shape(name) == floats.shape(name) == tuple(found.tensor(name).shape)
        assert found.dtype(name) == found.tensor(name).dtype
        meant = round_masters(floats.tensor(name)) if name.endswith("proj.weight") else floats.tensor(name)
        assert torch.allclose(found.tensor(name).float(), meant.float(), rtol=1e-6, atol=0), name


def torch_model(folder):
    "The checkpoint in transformers' own modules, its tensors put there by hand: the loader would want the package accelerate."
    config = json.loads((folder / "config.json").read_text())
    settings = transformers.BitNetQuantConfig(**{k: v for k, v in config.pop("quantization_config").items() if k != "quant_method"})
    model = transformers.BitNetForCausalLM(transformers.BitNetConfig(**config))
    integration.replace_with_bitnet_linear(model, ["lm_head"], settings)
    weights = load_file(folder / "model.safetensors")
    if settings.linear_class == "autobitlinear":
        weights = {k: integration.unpack_weights(v, torch.float32) if v.dtype == torch.uint8 else v for k, v in weights.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    assert missing == ["lm_head.weight"] and not unexpected
    model.tie_weights()
    for module in model.modules():
        if isinstance(module, integration.BitLinear): module.dtype = torch.float32
    assert sum(isinstance(m, (integration.AutoBitLinear, integration.BitLinear)) for m in model.modules()) == 14
    return model.float().eval() if settings.linear_class == "autobitlinear" else model.eval()


def transformers_logits(folder, tokens, monkeypatch=None):
    "Logits of transformers; with `monkeypatch`, its rounding of inputs is turned off."
    if monkeypatch is not None:
        monkeypatch.setattr(integration.ActQuant, "apply", lambda x: x)
        monkeypatch.setattr(integration.BitLinear, "activation_quant", lambda self, x: (x, torch.ones(())))
    with torch.no_grad(): return torch_model(folder)(tokens).logits[0].double()


def llama_logits(path, tokens):
    llama = open_llama(path, n_ctx=tokens.shape[1], n_batch=64, n_ubatch=64, n_threads=1, logits_all=True, type_k=0, type_v=0)
    llama.eval(tokens[0].tolist())
    found = torch.from_numpy(llama.scores[:tokens.shape[1]].copy()).double()
    llama.close()
    return found


def kld(p, q): return (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean().item()


@pytest.mark.parametrize("form", FORMS)
def test_logits_equal_transformers(masters, tmp_path, form, monkeypatch):
    "An F32 file of the checkpoint against transformers' own modules: rounding and unpacking included."
    folder = variant(masters, tmp_path / "bitnet", *FORMS[form])
    tokens = torch.randint(3, 4096, (1, 48), generator=torch.Generator().manual_seed(2))
    found = llama_logits(quantize(folder, "gguf", "F32", output_dir=tmp_path, device="cpu").output_path, tokens)
    expected = transformers_logits(folder, tokens, monkeypatch)
    assert kld(expected, found) < 1e-6
    unrounded = llama_logits(quantize(masters, "gguf", "F32", output_dir=tmp_path, output_name="masters", device="cpu").output_path, tokens)
    assert kld(expected, unrounded) > 1e-2, "masters that are not rounded show"


def test_what_the_rounding_of_inputs_changes(masters, tmp_path, monkeypatch):
    "transformers with its 8-bit inputs, against llama.cpp with its own: the ternary file is as near to it as the float file."
    folder = variant(masters, tmp_path / "bitnet", *FORMS["offline"])
    tokens = torch.randint(3, 4096, (1, 48), generator=torch.Generator().manual_seed(2))
    rounded = transformers_logits(folder, tokens)
    exact = transformers_logits(folder, tokens, monkeypatch)
    result = quantize(folder, "gguf", "TERNARY", output_dir=tmp_path, device="cpu")
    ternary = llama_logits(result.output_path, tokens)
    figures = {"inputs rounded by transformers": kld(exact, rounded), "TERNARY in llama.cpp": kld(exact, ternary), "one against the other": kld(rounded, ternary)}
    print({key: f"{value:.1e}" for key, value in figures.items()})
    assert max(figures.values()) < 5e-3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("level", ["TERNARY", "TQ1_0"])
def test_ternary_files_lose_nothing(masters, tmp_path, form, level):
    folder = variant(masters, tmp_path / "bitnet", *FORMS[form])
    job = plan_gguf(Job(folder), level)
    assert is_bitnet(job.checkpoint)
    file = open_gguf(quantize(folder, "gguf", level, output_dir=tmp_path, device="cpu").output_path)
    kinds = [t.type for t in job.plan if t.name.startswith("blk.") and t.type != "F32"]
    assert kinds == ["TQ1_0" if level == "TQ1_0" else "TQ2_0"] * 14
    for spec, planned in zip(job.specs, job.plan):
        if planned.type.startswith("TQ"):
            meant, got = spec.load(job.checkpoint).float(), file.decode(spec.name).view(spec.shape)
            assert torch.equal(got, meant.half().float()), spec.name


@pytest.mark.parametrize("form", FORMS)
def test_quality_and_info_read_every_form(masters, tmp_path, form):
    "The original of a comparison may be packed; the ternary file differs from it by the rounding of the scales and of the embedding."
    folder = variant(masters, tmp_path / "bitnet", *FORMS[form])
    path = quantize(folder, "gguf", "TERNARY", output_dir=tmp_path, device="cpu").output_path
    metrics = quality_report(folder, path, calibration_samples=2).to_dict()["metrics"]
    assert metrics["kld_mean"] < 1e-3 and metrics["top1_agreement"] > 0.97
    assert info(folder).parameters == info(masters).parameters


def test_masters_without_rounding_are_not_ternary(masters):
    with pytest.raises(ConversionError, match="not ternary"): plan_gguf(Job(masters), "TERNARY")


def test_importance_of_a_bitnet(masters, tmp_path, monkeypatch):
    "One whose weights are plain floats is run like any other; a packed one has TERNARY."
    monkeypatch.setenv("LLM_QUANTIZE_IMATRIX_CACHE", str(tmp_path / "cache"))
    result = quantize(masters, "gguf", "Q2_K_S", output_dir=tmp_path, calibration_samples=2, device="cpu")
    assert result.imatrix == "computed" and result.validation_status == "passed"
    with pytest.raises(ConversionError, match="BitNet") as caught: quantize(variant(masters, tmp_path / "m", *FORMS["offline"]), "gguf", "Q2_K_S", output_dir=tmp_path / "out")
    assert "TERNARY" in caught.value.suggestion and not (tmp_path / "out").exists()


def test_names_of_1bitllm(masters, tmp_path):
    "The first BitNet models call their norms otherwise, and say nothing of quantization."
    rename = lambda tensors: {k.replace("attn_sub_norm", "inner_attn_ln").replace("ffn_sub_norm", "ffn_layernorm"): v for k, v in tensors.items()}
    old = variant(masters, tmp_path / "a" / "x", None, rename, architectures=["BitnetForCausalLM"], model_type="llama")
    new = variant(masters, tmp_path / "b" / "x", ONLINE)
    paths = [quantize(folder, "gguf", "TERNARY", output_dir=folder.parent, device="cpu").output_path for folder in (old, new)]
    first, second = (open(path, "rb").read() for path in paths)
    assert first == second


def test_packed_weights_of_another_family(tmp_path):
    "A Llama with packed matrices, as the Falcon-E models are: rows are paired after unpacking."
    folder = variant(sample_path(), tmp_path / "packed", BITLINEAR, lambda t: {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in packer(True)({k: v.float() for k, v in t.items()}).items()})
    job = plan_gguf(Job(folder), "TERNARY")
    q, k = (next(s for s in job.specs if s.name == f"blk.1.attn_{x}.weight") for x in "qk")
    assert q.transform == k.transform == "permute" and {t.type for t in job.plan if t.name.startswith("blk.")} == {"TQ2_0", "F32"}
    floats = open_checkpoint(sample_path())
    assert torch.allclose(q.load(job.checkpoint), q.load(floats).float().sign() * q.load(job.checkpoint).abs(), atol=0)


@pytest.mark.parametrize("config, words", [({"hidden_act": "relu2"}, "relu2"), ({"hidden_act": None}, "relu2")])
def test_what_llama_cpp_cannot_run(masters, tmp_path, config, words):
    with pytest.raises(ConversionError, match=words) as caught: plan_gguf(Job(variant(masters, tmp_path / "m", ONLINE, **config)), "TERNARY")
    assert caught.value.exit_code == 8


def test_an_output_matrix_of_its_own(masters, tmp_path):
    "llama.cpp's graph multiplies with the embedding."
    folder = variant(masters, tmp_path / "m", None, lambda t: t | {"lm_head.weight": torch.randn(4096, 256)}, tie_word_embeddings=False)
    with pytest.raises(ConversionError, match="lm_head"): architecture(open_checkpoint(folder).config).tensors(open_checkpoint(folder))


def test_other_quantized_checkpoints_are_still_refused(masters, tmp_path):
    folder = variant(masters, tmp_path / "m", {"quant_method": "gptq"})
    assert plain_weights(open_checkpoint(folder)).config["quantization_config"]["quant_method"] == "gptq"
    with pytest.raises(ConversionError, match="gptq"): plan_gguf(Job(folder), "Q8_0")
