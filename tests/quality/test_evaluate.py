"""Quality measured: formulas against a plain-Python oracle, whole files against llama.cpp's own logits, and refusals.

How the comparison with llama.cpp is made fair. On the CPU llama.cpp multiplies quantized weights with activations that it first rounds to 8 bits, and BF16 weights with activations rounded to bfloat16;
our decoder rounds weights only. So the same file is judged twice. `FAIR`: llama.cpp itself decodes the file to F32 (its own quantizer with `allow_requantize`) and runs that with an F32 cache. Then
nothing is rounded that the file does not round, and the two must agree to float precision. `DIRECT`: llama.cpp runs the file as it is. Its activations add a divergence of their own, some 0.0005 (Q8_0)
to 0.004 (Q2_K) on this very small model, whose noise is independent of the weights': the divergence of llama.cpp from the original is that of our decoder from the original plus that of llama.cpp from our decoder.
"""
import csv
import io
import json
import math
import os
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from llm_quantize.quality import quantized_model as decoded

from llm_quantize.quality import metrics as scores
from llm_quantize.calibration.text import bundled_text, load_tokenizer, windows
from llm_quantize.models.checkpoint import open_checkpoint
from llm_quantize.models.reference import load_float
from llm_quantize.quality.llama_cpp_model import open_llama
from llm_quantize.quality.quantized_model import load_quantized
from llm_quantize.errors import ArgumentError, CalibrationError, ConversionError, LLMQuantizeError, ModelNotFoundError, ValidationError
from llm_quantize.gguf.reader import open_gguf
from llm_quantize.quality.comparison import Comparison
from llm_quantize.quality.evaluate import compare, quality_report
from llm_quantize.display import human_size
from llm_quantize.quality.metrics import TokenScores, score_logits, score_windows, statistics
from llm_quantize.api import quantize

METRIC_KEYS = {"perplexity_original", "perplexity_quantized", "perplexity_delta_pct", "kld_mean", "kld_p99", "kld_max", "top1_agreement", "rms_delta_p",
               "effective_bpw", "compression_ratio", "file_size", "perplexity_original_se", "perplexity_quantized_se", "kld_mean_se"}


# ---- formulas ----------------------------------------------------------------------------------------------

def oracle_token(a, b, target):
    "One place, in Python floats: nll of both, KLD by its definition, change of p, same top."
    def log_softmax(x):
        top = max(x)
        norm = top + math.log(math.fsum(math.exp(v - top) for v in x))
        return [v - norm for v in x]
    p, q = log_softmax(a), log_softmax(b)
    kld = math.fsum(math.exp(u) * (u - v) for u, v in zip(p, q))
    return -p[target], -q[target], kld, math.exp(q[target]) - math.exp(p[target]), a.index(max(a)) == b.index(max(b))


def oracle_statistics(rows):
    "llama-perplexity's formulas, sums of squares and covariance included, in plain Python."
    n = len(rows)
    base, nll, kld, delta, same = zip(*rows)

    def mean_error(x):
        mean = math.fsum(x) / n
        return mean, math.sqrt(max(math.fsum(v * v for v in x) / n - mean * mean, 0) / (n - 1))

    def percentile(x, share):
        x, at = sorted(x), share * (n - 1)
        low = int(at)
        return x[low] if low + 1 == n else (1 - (at - low)) * x[low] + (at - low) * x[low + 1]

    (lb, eb), (lq, eq) = mean_error(base), mean_error(nll)
    covariance = (math.fsum(u * v for u, v in zip(base, nll)) / n - lb * lq) / (n - 1)
    ratio = math.exp(lq - lb)
    ratio_error = ratio * math.sqrt(max(eq * eq + eb * eb - 2 * covariance, 0))
    mse, mse_error = mean_error([d * d for d in delta])
    top = sum(same) / n
    return {"perplexity_original": math.exp(lb), "perplexity_original_se": math.exp(lb) * eb, "perplexity_quantized": math.exp(lq), "perplexity_quantized_se": math.exp(lq) * eq,
            "perplexity_ratio": ratio, "perplexity_ratio_se": ratio_error, "perplexity_delta_pct": 100 * ratio - 100, "perplexity_delta_pct_se": 100 * ratio_error,
            "kld_mean": mean_error(kld)[0], "kld_mean_se": mean_error(kld)[1], "kld_p1": percentile(kld, 0.01), "kld_p5": percentile(kld, 0.05), "kld_p10": percentile(kld, 0.1),
            "kld_p50": percentile(kld, 0.5), "kld_p90": percentile(kld, 0.9), "kld_p95": percentile(kld, 0.95), "kld_p99": percentile(kld, 0.99), "kld_p99_9": percentile(kld, 0.999),
            "kld_max": max(kld), "top1_agreement": top, "top1_agreement_se": math.sqrt(top * (1 - top) / (n - 1)),
            "rms_delta_p": math.sqrt(mse), "rms_delta_p_se": 0.5 / math.sqrt(mse) * mse_error, "tokens": n}


def random_logits(noise, tokens=300, vocabulary=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = 3 * torch.randn(tokens, vocabulary, generator=generator)
    return a, a + noise * torch.randn(tokens, vocabulary, generator=generator), torch.randint(0, vocabulary, (tokens,), generator=generator)


@pytest.mark.parametrize("noise", [0.01, 0.3, 3.0])
def test_scores_and_statistics_equal_the_oracle(noise):
    a, b, targets = random_logits(noise)
    rows = [oracle_token(x, y, t) for x, y, t in zip(a.tolist(), b.tolist(), targets.tolist())]
    scores = score_logits(a, b, targets)
    for name, values in zip(("nll_original", "nll", "kld", "delta_p", "same_top"), zip(*rows)):
        assert np.allclose(getattr(scores, name).double(), np.array(values, float), rtol=1e-4, atol=1e-6), name
    expected, found = oracle_statistics(rows), statistics(scores)
    assert set(expected) == set(found)
    for key, value in expected.items(): assert found[key] == pytest.approx(value, rel=2e-4, abs=1e-7), key
    wrong = statistics(score_logits(a, b, (targets + 1) % 50))
    assert wrong["perplexity_quantized"] != pytest.approx(found["perplexity_quantized"], rel=1e-3) and wrong["kld_mean"] == found["kld_mean"]


def test_by_hand():
    "Two words, p = (3/4, 1/4) and q = (1/2, 1/2): KLD = 3/4 ln(3/2) + 1/4 ln(1/2)."
    s = score_logits(torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[5.0, 5.0]]), torch.tensor([1]))
    assert s.kld.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    assert s.nll.exp().item() == pytest.approx(2) and s.nll_original.exp().item() == pytest.approx(4) and s.delta_p.item() == pytest.approx(0.25)


@pytest.mark.parametrize("scale", [1e-4, 1e-3])
def test_tiny_divergences_keep_their_digits(scale):
    "No floor of noise and no clamp: 5e-9 nats are measured to a thousandth."
    a, b, targets = random_logits(scale, vocabulary=32000, tokens=16)
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    true = (p.exp() * (p - q)).sum(-1)
    assert true.mean() < 1e-6
    assert torch.allclose(score_logits(a, b, targets).kld, true, rtol=3e-3, atol=0)


def test_identical_logits_give_exactly_zero():
    a, _, targets = random_logits(0)
    found = statistics(score_logits(a, a.clone(), targets))
    assert (found["kld_max"], found["kld_mean_se"], found["top1_agreement"], found["perplexity_ratio"], found["rms_delta_p"], found["rms_delta_p_se"]) == (0, 0, 1, 1, 0, 0)


def test_probabilities_that_float32_cannot_hold():
    "The original all but excludes what the quantized model is sure of; llama-perplexity would clamp at 16 nats."
    s = score_logits(torch.tensor([[0.0, -200.0, -300.0]]), torch.tensor([[-200.0, 0.0, -300.0]]), torch.tensor([0]))
    assert s.kld.item() == pytest.approx(200, rel=1e-6) and not s.same_top.item()
    s = score_logits(torch.tensor([[0.0, -95.0]]), torch.tensor([[0.0, 5.0]]), torch.tensor([0]))
    assert s.kld.item() == pytest.approx(math.log1p(math.exp(5)), rel=1e-5)


def test_half_precision_logits_are_scored_in_float32():
    a, b, targets = (x.bfloat16() if x.is_floating_point() else x for x in random_logits(0.3))
    assert torch.equal(score_logits(a, b, targets).kld, score_logits(a.float(), b.float(), targets).kld)


@pytest.mark.parametrize("tokens", [1, 2])
def test_few_tokens(tokens):
    found = statistics(score_logits(*random_logits(0.1, tokens=tokens)))
    assert all(math.isfinite(v) for v in found.values())


def test_sizes_for_people():
    assert [human_size(n) for n in (0, 999, 1000, 2_115_392, 999_949_999, 1_300_000_000)] == ["0B", "999B", "1.0kB", "2.1MB", "999.9MB", "1.3GB"]


# ---- models ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def checkpoint(root): return open_checkpoint(root / "llm_quantize" / "data" / "sample-4m")


@pytest.fixture(scope="module")
def files(checkpoint, tmp_path_factory):
    "The sample model as Q8_0, Q4_K_M and Q2_K."
    folder = tmp_path_factory.mktemp("gguf")
    return {level: quantize(checkpoint, "gguf", level, output_dir=folder).output_path for level in ("Q8_0", "Q4_K_M", "Q2_K")}


@pytest.fixture(scope="module")
def original(checkpoint): return load_float(checkpoint)


@pytest.fixture(scope="module")
def ids(checkpoint): return windows(load_tokenizer(checkpoint.path), bundled_text("heldout"), limit=6)


def all_logits(model, ids):
    "Plain transformers, every position; then llama-perplexity's choice: logits 256 to 510, which predict tokens 257 to 511."
    with torch.inference_mode(): return torch.cat([model(input_ids=w[None], use_cache=False).logits[0, 256:511] for w in ids])


def test_windows_are_scored_as_plain_transformers_would(original, checkpoint, files, ids):
    other = load_quantized(checkpoint, files["Q4_K_M"])
    expected = statistics(score_logits(all_logits(original, ids[:2]), all_logits(other, ids[:2]), ids[:2, 257:].flatten()))
    for batch in (1, 2):
        [found] = score_windows(original, [other], ids[:2], batch=batch)
        assert statistics(found) == pytest.approx(expected, rel=1e-4)
    shifted = statistics(score_logits(all_logits(original, ids[:2]), all_logits(other, ids[:2]), ids[:2, 256:-1].flatten()))
    assert shifted["perplexity_original"] > 2 * expected["perplexity_original"]


def test_one_pass_over_several_models_equals_several_passes(original, checkpoint, files, ids, monkeypatch):
    models = [load_quantized(checkpoint, files[level]) for level in ("Q8_0", "Q2_K")]
    together, alone = score_windows(original, models, ids[:2]), [score_windows(original, [m], ids[:2])[0] for m in models]
    for a, b in zip(together, alone): assert torch.equal(a.kld, b.kld)
    monkeypatch.setitem(scores._BLOCK, "cpu", 7 * 4096)  # blocks of seven places: 255 does not divide
    for a, b in zip(together, score_windows(original, models, ids[:2])):
        assert len(b.kld) == 2 * 255 and torch.allclose(a.kld, b.kld, rtol=1e-3, atol=1e-9)


def test_identical_models(original, checkpoint, ids, tmp_path):
    path = quantize(checkpoint, "gguf", "BF16", output_dir=tmp_path).output_path
    m = quality_report(checkpoint, path, calibration_samples=2).metrics
    assert (m.kld_mean, m.kld_max, m.top1_agreement, m.perplexity_delta_pct, m.rms_delta_p) == (0, 0, 1, 0, 0)


def test_one_damaged_tensor_raises_the_divergence(checkpoint, files, tmp_path):
    "The scales of one tensor's first rows are overwritten in the file."
    clean = open_gguf(files["Q8_0"])
    path, offset, _ = clean.places["blk.1.ffn_down.weight"]
    spoilt = tmp_path / "spoilt.gguf"
    data = bytearray(open(path, "rb").read())
    for block in range(200): data[offset + 34 * block:offset + 34 * block + 2] = np.float16(0.5).tobytes()
    spoilt.write_bytes(data)
    good, bad = (quality_report(checkpoint, p, calibration_samples=2, include_layers=True) for p in (files["Q8_0"], spoilt))
    assert bad.metrics.kld_mean > 10 * good.metrics.kld_mean
    changed = [a["layer_name"] for a, b in zip(good.layer_errors, bad.layer_errors) if a != b]
    assert changed == ["blk.1.ffn_down.weight"]
    assert [a["layer_name"] for a, b in zip(good.block_errors, bad.block_errors) if a != b] == ["blk.1"], "outputs are measured on the original's inputs: nothing after the damage is blamed"


def test_a_weight_that_is_not_a_number_is_named(original, checkpoint, files, ids):
    broken = load_quantized(checkpoint, files["Q8_0"])
    broken.model.layers[3].mlp.up_proj.weight[5, 7] = float("nan")
    with pytest.raises(ValidationError, match="the logits of broken are not numbers"): score_windows(original, [broken], ids[:1], names=["broken"])
    with pytest.raises(ValidationError, match="the original"): score_windows(broken, [original], ids[:1])


def test_memory_allows_fewer_models_at_a_time(checkpoint, files, monkeypatch):
    "In groups the original runs once for each group; the numbers do not change, and progress counts all of it."
    seen = []
    one_pass = compare(checkpoint, list(files.values()), calibration_samples=2)
    monkeypatch.setattr(decoded, "available_memory", lambda device: 2.1 * 4 * checkpoint.parameters / 0.8)
    three_passes = compare(checkpoint, list(files.values()), calibration_samples=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(1, 7)]
    for a, b in zip(one_pass.reports, three_passes.reports): assert a.metrics == b.metrics


# ---- llama.cpp ---------------------------------------------------------------------------------------------

llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, a development requirement")


def llama_logits(path, ids):
    "Logits of llama.cpp at the scored places, with an F32 cache."
    llama = open_llama(path, n_ctx=512, n_batch=512, n_ubatch=512, n_threads=1, n_threads_batch=1,
                       logits_all=True, type_k=0, type_v=0)
    rows = []
    for window in ids.tolist():
        llama.reset()
        llama.eval(window)
        rows.append(torch.from_numpy(np.array(llama.scores[256:511])))
    llama.close()
    return torch.cat(rows).float()


def decoded_by_llama_cpp(path, target):
    "llama.cpp's own decoding of a file, as F32."
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.allow_requantize = 0, True
    assert llama_cpp.llama_model_quantize(str(path).encode(), str(target).encode(), parameters) == 0
    return target


@pytest.fixture(scope="module")
def judged_by_both(original, checkpoint, files, ids):
    "A function: statistics of our decoder of a file, of llama.cpp running another, and of the difference between the two."
    base, targets = all_logits(original, ids), ids[:, 257:].flatten()
    ours = {level: all_logits(load_quantized(checkpoint, path), ids) for level, path in files.items()}

    def judge(level, runs):
        theirs = llama_logits(runs, ids)
        found = tuple(statistics(score_logits(a, b, targets)) for a, b in ((base, ours[level]), (base, theirs), (ours[level], theirs)))
        print(level, *(f"{name}: perplexity {s['perplexity_quantized']:.5f}, KLD {s['kld_mean']:.3e} ± {s['kld_mean_se']:.1e};" for name, s in zip(("ours", "llama.cpp", "between"), found)))
        return found
    return judge


@pytest.mark.parametrize("level", ["Q8_0", "Q4_K_M", "Q2_K"])
def test_agrees_with_llama_cpp_where_only_weights_are_rounded(level, files, judged_by_both, tmp_path):
    "FAIR. Bounds a hundred times tighter than the 0.1 % and 2 standard errors that would do."
    ours, theirs, between = judged_by_both(level, decoded_by_llama_cpp(files[level], tmp_path / "f32.gguf"))
    assert ours["perplexity_quantized"] == pytest.approx(theirs["perplexity_quantized"], rel=1e-5)
    assert ours["kld_mean"] == pytest.approx(theirs["kld_mean"], abs=0.02 * theirs["kld_mean_se"])
    assert between["kld_mean"] < 1e-9 and between["top1_agreement"] > 0.999


@pytest.mark.parametrize("level", ["Q8_0", "Q4_K_M", "Q2_K"])
def test_agrees_with_llama_cpp_running_the_file_itself(level, files, judged_by_both):
    "DIRECT"
    ours, theirs, between = judged_by_both(level, files[level])
    assert ours["perplexity_quantized"] == pytest.approx(theirs["perplexity_quantized"], rel=0.01)
    assert abs(theirs["kld_mean"] - ours["kld_mean"] - between["kld_mean"]) < 3 * theirs["kld_mean_se"]
    assert 1e-5 < between["kld_mean"] < 0.01, "what llama.cpp's rounding of activations does"


def test_the_comparison_with_llama_cpp_can_fail(files, judged_by_both, tmp_path):
    "Another file of the same model is told apart at once."
    ours, theirs, between = judged_by_both("Q8_0", decoded_by_llama_cpp(files["Q4_K_M"], tmp_path / "f32.gguf"))
    assert between["kld_mean"] > 1e-3 and abs(ours["kld_mean"] - theirs["kld_mean"]) > 5 * theirs["kld_mean_se"]


# ---- memory ------------------------------------------------------------------------------------------------

_PEAK = """
import sys, torch, transformers
from llm_quantize.quality.metrics import score_windows
def memory(key): return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
config = transformers.LlamaConfig(vocab_size=152064, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)
models = [transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False) for _ in range(2)]
ids = torch.randint(0, 152064, (1, 512), generator=torch.Generator().manual_seed(0))
score_windows(models[0], models[1:], ids[:, :8])
before = memory("VmRSS")
if sys.argv[1] == "ours": score_windows(models[0], models[1:], ids)
else:
    with torch.inference_mode(): kept = [m(input_ids=ids, use_cache=False).logits.log_softmax(-1) for m in models]
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc/self/status to read the memory in use")
def test_a_large_vocabulary_needs_little_memory():
    "152,064 tokens: the logits of one window are 311 MB per model, and comparing them plainly takes copies of that."
    peak = {}
    for way in ("ours", "plain"):
        done = subprocess.run([sys.executable, "-c", _PEAK, way], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peak[way] = int(done.stdout)
    print({way: f"{n / 1e6:.0f} MB" for way, n in peak.items()})
    assert peak["ours"] < 0.5 * peak["plain"] and peak["plain"] > 600e6


# ---- results -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def comparison(checkpoint, files): return compare(checkpoint, [files["Q2_K"], files["Q8_0"], files["Q4_K_M"]], calibration_samples=2)


def test_the_report_has_the_keys_of_the_interface(checkpoint, files, tmp_path, capfd):
    capfd.readouterr()
    done = []
    report = quality_report(checkpoint.path, files["Q4_K_M"], calibration_samples=2, include_layers=True, output=tmp_path / "r.json", progress=lambda *a: done.append(a))
    assert capfd.readouterr() == ("", ""), "library code never prints"
    assert done == [(1, 2), (2, 2)]
    found = json.loads((tmp_path / "r.json").read_text())
    assert found == json.loads(report.render("json")) == json.loads(json.dumps(report.to_dict()))
    assert {"status", "original_model", "quantized_model", "metrics", "layer_errors", "coherence_score", "timestamp"} <= set(found) and found["status"] == "success"
    assert METRIC_KEYS <= set(found["metrics"]) and found["metrics"]["tokens"] == 510 and found["metrics"]["windows"] == 2
    assert all({"layer_name", "mse", "max_error", "bit_width"} <= set(e) for e in found["layer_errors"]) and len(found["layer_errors"]) == 1 + 7 * 4
    size = os.path.getsize(files["Q4_K_M"])
    assert found["metrics"]["file_size"] == size and found["metrics"]["effective_bpw"] == pytest.approx(8 * size / checkpoint.parameters)
    assert found["metrics"]["compression_ratio"] == pytest.approx(size / checkpoint.bytes)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["timestamp"])


def test_layer_errors_against_the_gguf_package(checkpoint, files):
    import gguf
    errors = {e["layer_name"]: e for e in quality_report(checkpoint, files["Q2_K"], calibration_samples=1, include_layers=True).layer_errors}
    tensor = next(t for t in gguf.GGUFReader(files["Q2_K"]).tensors if t.name == "blk.2.ffn_up.weight")
    meant, got = checkpoint.tensor("model.layers.2.mlp.up_proj.weight").double().numpy(), gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
    found = errors["blk.2.ffn_up.weight"]
    assert found["mse"] == pytest.approx(((meant - got) ** 2).mean(), rel=1e-5) and found["max_error"] == pytest.approx(abs(meant - got).max(), rel=1e-5)
    assert found["relative_error"] == pytest.approx(((meant - got) ** 2).sum() / (meant ** 2).sum(), rel=1e-5)
    assert (found["type"], found["bit_width"]) == (tensor.tensor_type.name, 8 * tensor.data.nbytes / meant.size)


@pytest.mark.parametrize("ending, words", [(".md", "| KL divergence, mean |"), (".json", '"kld_mean":')])
def test_reports_are_written_by_their_ending(ending, words, checkpoint, files, tmp_path):
    report = quality_report(checkpoint, files["Q8_0"], calibration_samples=1)
    report.save(tmp_path / f"report{ending}")
    assert words in (tmp_path / f"report{ending}").read_text()
    with pytest.raises(ArgumentError, match="cannot be written as '.txt'"): report.save(tmp_path / "report.txt")
    with pytest.raises(LLMQuantizeError, match="cannot be written"): report.save(tmp_path / "no" / f"report{ending}")
    with pytest.raises(ArgumentError): report.render("xml")


def test_the_human_table_has_the_columns_of_the_quickstart(comparison):
    lines = comparison.render().splitlines()
    assert [cell.strip() for cell in lines[0].split("|")] == ["Model", "Perplexity", "Delta", "KLD", "Size", "BPW", "Top-1", "Pareto"]
    assert re.fullmatch(r"-+(\|-+){7}", lines[1])
    assert [line.split(" ")[0] for line in lines[2:]] == ["sample-4m-Q8_0.gguf", "sample-4m-Q4_K_M.gguf", "sample-4m-Q2_K.gguf"], "largest first"
    bars = [[i for i, c in enumerate(line) if c == "|"] for line in lines]
    assert all(b == bars[0] for b in bars)
    assert re.fullmatch(r"sample-4m-Q2_K\.gguf +\| \d+\.\d\d +\| \+\d+\.\d% +\| 0\.\d{6} ± 0\.\d{6} \| 2\.1MB \| 4\.0 \| \d\d\.\d\d% \| \*", lines[-1])


def test_json_and_csv_hold_the_same_numbers(comparison):
    rows = json.loads(comparison.render("json"))
    assert rows == json.loads(json.dumps(comparison.to_dict())) and METRIC_KEYS | {"model"} <= set(rows[0])
    table = list(csv.DictReader(io.StringIO(comparison.render("csv"))))
    assert [r["model"] for r in table] == [r["model"] for r in rows] and float(table[2]["kld_mean"]) == rows[2]["kld_mean"]
    assert comparison._repr_markdown_().count("\n") == 4
    with pytest.raises(ArgumentError): comparison.render("yaml")


def test_metrics_choose_columns(comparison):
    some = Comparison(comparison.original_model, comparison.reports, ("kld", "size"))
    assert some.table()[0] == ["Model", "KLD", "Size", "Pareto"]
    keys = set(some.to_dict()[0])
    assert {"model", "kld_mean", "kld_p99", "file_size"} <= keys and not {"perplexity_quantized", "top1_agreement", "effective_bpw"} & keys


def test_the_users_own_text(checkpoint, files, tmp_path):
    text = tmp_path / "mine.jsonl"
    text.write_text("\n".join(json.dumps({"text": " ".join(random.Random(i).choices("the sea was calm and nobody spoke of home".split(), k=400))}) for i in range(4)))
    mine = quality_report(checkpoint, files["Q8_0"], calibration_data=text).metrics
    assert 1 <= mine.windows < 10 and mine.perplexity_original != quality_report(checkpoint, files["Q8_0"], calibration_samples=mine.windows).metrics.perplexity_original
    text.write_text(json.dumps("too short"))
    with pytest.raises(CalibrationError, match="a window needs 512"): quality_report(checkpoint, files["Q8_0"], calibration_data=text)


REFUSED = {
    "gguf as original": (lambda c, f: quality_report(f["Q8_0"], f["Q2_K"]), ArgumentError, "Hugging Face directory"),
    "gguf as original of compare": (lambda c, f: compare(f["Q8_0"], [f["Q2_K"]]), ArgumentError, "Hugging Face directory"),
    "unknown metric": (lambda c, f: compare(c, [f["Q8_0"]], ["speed"]), ArgumentError, "perplexity"),
    "nothing": (lambda c, f: compare(c, []), ArgumentError, "one or more"),
    "no file": (lambda c, f: compare(c, [f["Q8_0"], "nowhere.gguf"]), ModelNotFoundError, ".gguf"),
    "no text": (lambda c, f: quality_report(c, f["Q8_0"], calibration_data="nowhere.txt"), CalibrationError, "path"),
    "no original": (lambda c, f: quality_report("./nowhere", f["Q8_0"]), ModelNotFoundError, "path"),
    "not a model": (lambda c, f: quality_report(c, __file__), ConversionError, ".gguf"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_what_to_do(case, checkpoint, files):
    action, kind, hint = REFUSED[case]
    with pytest.raises(kind) as caught: action(checkpoint, files)
    assert hint in caught.value.suggestion and "\n" not in str(caught.value)


def test_scores_are_kept_per_token(original, checkpoint, files, ids):
    [scores] = score_windows(original, [load_quantized(checkpoint, files["Q8_0"])], ids[:1])
    assert isinstance(scores, TokenScores) and scores.kld.shape == (255,) and scores.kld.dtype == torch.float64 and scores.same_top.dtype == torch.bool
