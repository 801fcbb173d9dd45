"The command: what goes to stdout, which exit code each failure has, and what is left on disk."
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize.models.checkpoint import sample_path
from llm_quantize.cli.main import main
from llm_quantize.cli.console import hoist_globals
from llm_quantize.display import parse_size
from llm_quantize.errors import ArgumentError


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "sample-4m"
    shutil.copytree(sample_path(), folder)
    return folder


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def edit_config(model, **changes):
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def poison(model, value):
    "Put one bad number into a weight."
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, model / "model.safetensors")


def test_quantize_prints_one_json_object_and_nothing_else(capsys, model, tmp_path):
    code, out, err = run(capsys, "quantize", model, "gguf", "-q", "q8_0", "-o", tmp_path, "--format", "json")
    result = json.loads(out)
    assert code == 0 and result["status"] == "success" and result["validation_status"] == "passed"
    wanted = {"output_path", "format", "quantization_level", "profile", "layer_summary", "tensors", "effective_bpw", "compression_ratio", "file_size", "quality_report",
              "duration_seconds", "peak_memory_bytes", "validation_status", "metadata"}
    assert wanted <= set(result) and {"original_dtype", "original_size", "layers_processed"} <= set(result["metadata"])
    assert {"layer_name", "bit_width", "parameter_count", "is_protected"} == set(result["layer_summary"][0])
    assert {"name", "type", "bpw", "bytes", "error"} <= set(result["tensors"][0])
    file = tmp_path / "sample-4m-Q8_0.gguf"
    assert result["output_path"] == str(file) and file.stat().st_size == result["file_size"]
    assert result["effective_bpw"] == pytest.approx(8 * result["file_size"] / sum(t.numel() for t in load_file(model / "model.safetensors").values()))
    assert "\r" not in err and "%" not in err, "no progress bar where stderr is no terminal"


def test_quantize_names_the_file_as_asked(capsys, model, tmp_path):
    code, out, _ = run(capsys, "quantize", model, "gguf", "-q", "q4_0", "-o", tmp_path / "new" / "folder", "-n", "mine")
    assert code == 0 and (tmp_path / "new" / "folder" / "mine.gguf").exists() and "mine.gguf" in out


def test_dry_run_tells_the_exact_size_and_writes_nothing(capsys, model, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = run(capsys, "--format", "json", "quantize", model, "gguf", "-q", "Q3_K_M", "-o", tmp_path, "--dry-run")
    assert code == 0 and sorted(tmp_path.rglob("*")) == before
    told = json.loads(out)["file_size"]
    run(capsys, "quantize", model, "gguf", "-q", "Q3_K_M", "-o", tmp_path)
    assert (tmp_path / "sample-4m-Q3_K_M.gguf").stat().st_size == told


@pytest.mark.parametrize("arguments", [("ggml",), ("awq",), ("gguf", "--profile", "balanced"), ("gguf", "--target-bpw", "4"), ("gguf", "--error-feedback", "--search", "reference"),
                                       ("gguf", "--resume", "nowhere"), ("gguf", "--effort", "much")], ids=" ".join)
def test_a_dry_run_refuses_what_the_run_refuses(capsys, model, tmp_path, arguments):
    meant = run(capsys, "quantize", model, *arguments, "-o", tmp_path)
    assert meant[0] != 0 and run(capsys, "quantize", model, *arguments, "-o", tmp_path, "--dry-run") == meant


def test_a_path_keeps_its_brackets(capsys, model, tmp_path):
    code, out, _ = run(capsys, "quantize", model, "gguf", "-q", "q4_0", "-o", tmp_path / "models[v2]")
    assert code == 0 and out.startswith(str(tmp_path / "models[v2]" / "sample-4m-Q4_0.gguf"))


def test_a_target_of_zero_is_not_a_target_left_out(capsys, model):
    code, _, err = run(capsys, "quantize", model, "smoothquant", "--target-bpw", "0")
    assert code == 2 and "--target-bpw is for the format gguf" in err


def test_without_smoothing_there_is_no_strength_to_show(capsys, model, tmp_path):
    code, out, _ = run(capsys, "quantize", model, "smoothquant", "--smoothquant", "--alpha", "none", "--calibration-samples", "1", "--no-checkpoints", "-o", tmp_path)
    assert code == 0 and "none" in out and "nan" not in out


BAD_INPUT = {
    # case: (damage, arguments after `quantize MODEL`, exit code, words of the message)
    "missing weights": (lambda m: (m / "model.safetensors").unlink(), ["gguf"], 3, "no .safetensors"),
    "truncated weights": (lambda m: (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:-1]), ["gguf"], 3, "damaged"),
    "unknown architecture": (lambda m: edit_config(m, architectures=["MambaForCausalLM"], model_type="mamba"), ["gguf"], 8, "amba"),
    "unknown type": (lambda m: None, ["gguf", "-q", "Q4_KM"], 2, "Q4_K_M"),
    "unknown format": (lambda m: None, ["ggml"], 2, "ggml"),
    "a file in the output's place": (lambda m: (m.parent / "out").write_text(""), ["gguf", "-o", "OUT"], 1, "out"),
    "a directory in the name": (lambda m: None, ["gguf", "-n", "a/b"], 2, "--output-dir"),
    "NaN": (lambda m: poison(m, float("nan")), ["gguf"], 6, "blk.1.ffn_up.weight"),
    "infinity": (lambda m: poison(m, float("-inf")), ["gguf"], 6, "blk.1.ffn_up.weight"),
    "no tokenizer": (lambda m: [f.unlink() for f in m.glob("tokenizer*")], ["gguf"], 8, "tokenizer"),
    "missing imatrix": (lambda m: None, ["gguf", "--imatrix", "nowhere.imatrix"], 10, "nowhere.imatrix"),
    "bad shard size": (lambda m: None, ["gguf", "--max-shard-size", "many"], 2, "many"),
    "already quantized": (lambda m: edit_config(m, quantization_config={"quant_method": "gptq"}), ["gguf"], 8, "quantized"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_has_its_code_and_leaves_nothing(capsys, model, case):
    damage, arguments, code, words = BAD_INPUT[case]
    damage(model)
    arguments = [str(model.parent / "out") if a == "OUT" else a for a in arguments]
    if "-o" not in arguments: arguments += ["-o", str(model.parent)]
    before = sorted(model.parent.rglob("*"))
    got, out, err = run(capsys, "quantize", model, *arguments)
    assert got == code and words in err and out == "", (got, err)
    assert err.count("\n") <= 2 and "Traceback" not in err
    assert sorted(model.parent.rglob("*")) == before, "nothing is left behind"
    got, out, _ = run(capsys, "--format", "json", "quantize", model, *arguments)
    told = json.loads(out)
    assert got == code == told["error_code"] and told["status"] == "error" and told["suggestion"]


def test_output_equal_to_input_is_refused(capsys, model, tmp_path):
    run(capsys, "quantize", model, "gguf", "-q", "q8_0", "-o", model, "-n", "x")
    code, _, err = run(capsys, "quantize", model / "x.gguf", "gguf", "-q", "q4_0", "-o", model, "-n", "x")
    assert code == 8 and "GGUF" in err


@pytest.mark.parametrize("arguments, words", [(["fly"], "fly"), (["quantize"], "MODEL"), (["quantize", "m", "gguf", "--speed", "9"], "--speed"), (["--format", "xml", "info", "m"], "xml"),
                                              (["--verbosity", "loud", "info", "m"], "loud"), (["info", "m", "--format", "csv"], "csv"), (["quality", "report", "m", "m.gguf", "--format", "csv"], "csv")],
                         ids=["verb", "argument", "option", "format", "verbosity", "csv", "csv of a report"])
def test_usage_errors(capsys, arguments, words):
    code, out, err = run(capsys, *arguments)
    assert code in (2, 3) and words in err and out == ""


def test_usage_error_as_json(capsys):
    code, out, _ = run(capsys, "quantize", "m", "gguf", "--speed", "9", "--format", "json")
    assert code == 2 and json.loads(out)["error_type"] == "ArgumentError"


def test_info_of_a_checkpoint_and_of_its_gguf(capsys, model, tmp_path):
    _, out, _ = run(capsys, "info", model, "--format", "json")
    float_facts = json.loads(out)
    run(capsys, "quantize", model, "gguf", "-q", "q8_0", "-o", tmp_path)
    code, out, _ = run(capsys, "info", tmp_path / "sample-4m-Q8_0.gguf", "--format", "json")
    facts = json.loads(out)
    same = ("architecture", "layers", "heads", "kv_heads", "hidden_size", "vocabulary", "context")
    assert code == 0 and {k: facts[k] for k in same} == {k: float_facts[k] for k in same}
    assert facts["types"]["Q8_0"] == 29 and float_facts["types"] == {"bfloat16": 38}


def test_csv_is_refused_before_the_work(capsys, model, tmp_path):
    code, out, err = run(capsys, "quantize", model, "gguf", "-o", tmp_path / "out", "--format", "csv")
    assert code == 2 and "quality compare" in err and out == "" and not (tmp_path / "out").exists()


def test_validate_tells_a_person_what_it_found(capsys, model, tmp_path):
    run(capsys, "quantize", model, "gguf", "-q", "q8_0", "-o", tmp_path / "a[b]")
    file = tmp_path / "a[b]" / "sample-4m-Q8_0.gguf"
    _, out, _ = run(capsys, "validate", file, "--original", model)
    assert "a[b]/sample" in re.sub(r"\s", "", out) and re.search(r"compared +yes", out) and re.search(r"largest error +name blk\S+, type Q8_0, relative error \d", out)
    _, out, _ = run(capsys, "validate", file)
    assert re.search(r"compared +no", out) and "None" not in out and "largest error" not in out


def test_quality_compare_and_report(capsys, model, tmp_path):
    for level in ("q8_0", "q2_k"): run(capsys, "quantize", model, "gguf", "-q", level, "-o", tmp_path)
    files = [tmp_path / "sample-4m-Q8_0.gguf", tmp_path / "sample-4m-Q2_K.gguf"]
    code, out, _ = run(capsys, "quality", "compare", model, *files, "--calibration-samples", "4")
    assert code == 0 and "sample-4m-Q8_0.gguf" in out and "Perplexity" in out and "BPW" in out
    _, out, _ = run(capsys, "quality", "compare", model, *files, "--calibration-samples", "4", "--format", "csv")
    assert len(out.strip().splitlines()) == 3 and "," in out
    _, out, _ = run(capsys, "quality", "report", model, files[1], "--calibration-samples", "4", "--format", "json")
    metrics = json.loads(out)["metrics"]
    assert metrics["kld_mean"] > 0.01 and metrics["file_size"] == files[1].stat().st_size


def test_a_gguf_as_the_original_is_refused_with_a_hint(capsys, model, tmp_path):
    run(capsys, "quantize", model, "gguf", "-q", "q8_0", "-o", tmp_path)
    file = tmp_path / "sample-4m-Q8_0.gguf"
    code, _, err = run(capsys, "quality", "report", file, file)
    assert code in (2, 8) and "Hugging Face directory" in err


def test_help_imports_no_torch():
    code = "import sys\nfrom llm_quantize.cli.main import main\nmain(['--help'])\nsys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'gguf', 'numpy')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "quantize" in done.stdout and "quality" in done.stdout


@pytest.mark.parametrize("module", ["llm_quantize", "llm_quantize.cli.main"])
def test_version_and_module_entry(module):
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("llm-quantize ")


@pytest.mark.parametrize("words", ["--version", "profile list"])
def test_a_reader_who_leaves_is_no_failure(words):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        command = [sys.executable, "-m", "llm_quantize", *words.split()]
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writing)
    assert done.returncode == 0
    assert done.stderr == ""


COMPUTING = {
    "analyze": "analyze MODEL --calibration-samples 1 -o OUT/x.imatrix --checkpoint-dir OUT/state",
    "quality report": "quality report MODEL MODEL --calibration-samples 1",
    "quality compare": "quality compare MODEL MODEL --calibration-samples 1",
    "profile show": "profile show balanced --model MODEL --effort quick",
    "profile create": "profile create --imatrix OUT/s.imatrix --name x --model MODEL --effort quick -o OUT/x.dqprofile",
}


@pytest.mark.parametrize("verb", COMPUTING)
def test_a_verb_that_computes_does_so_on_the_device_it_was_given(capsys, tmp_path, verb):
    from llm_quantize.api import analyze
    if verb == "profile create":
        analyze(sample_path(), output=tmp_path / "s.imatrix", calibration_samples=1, checkpoint_dir=tmp_path / "state")
    line = COMPUTING[verb].replace("MODEL", str(sample_path())).replace("OUT", str(tmp_path))
    code, _, err = run(capsys, *line.split(), "--device", "no_such_device")
    assert code != 0
    assert "no_such_device" in err


def test_threads_are_those_of_the_whole_run(capsys, model, monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"): monkeypatch.setenv(name, "2")
    before = torch.get_num_threads()
    try:
        assert run(capsys, "info", model, "--threads", "1")[0] == 0
        assert torch.get_num_threads() == 1
        assert os.environ["OMP_NUM_THREADS"] == "1"
    finally:
        torch.set_num_threads(before)
    assert run(capsys, "info", model, "--threads", "none")[0] == 2


def test_sample_is_not_written_over_another_model(capsys, tmp_path):
    assert run(capsys, "sample", tmp_path / "s")[0] == 0
    assert run(capsys, "sample", tmp_path / "s")[0] == 0, "a second call finds the same files"
    (tmp_path / "s" / "config.json").write_text("{}")
    assert run(capsys, "sample", tmp_path / "s")[0] == 2


def test_sizes():
    assert [parse_size(t) for t in ("500M", "2G", "1.5gb", "123")] == [500_000_000, 2_000_000_000, 1_500_000_000, 123]
    for bad in ("", "G", "0", "-1M", "2X"):
        with pytest.raises(ArgumentError): parse_size(bad)


def test_global_options_may_stand_anywhere():
    assert hoist_globals(["a", "--verbosity", "quiet", "b", "--format=json"]) == ["--verbosity", "quiet", "--format", "json", "a", "b"]


# ---- dynamic quantization and profiles ---------------------------------------------------------------------

@pytest.fixture(scope="module")
def dynamic_place(tmp_path_factory):
    "A directory with the sample's importance matrix; costs are measured beside it, once."
    from llm_quantize.api import analyze
    from llm_quantize.models.checkpoint import sample_path
    folder = tmp_path_factory.mktemp("dynamic")
    analyze(sample_path(), output=folder / "s.imatrix", calibration_samples=4, checkpoint_dir=folder / "state", device="cpu")
    return folder


def run_cli(capsys, *arguments):
    from llm_quantize.cli.main import main
    status = main([str(a) for a in arguments])
    found = capsys.readouterr()
    return status, found.out, found.err


def test_dynamic_files_hold_the_target_and_open_in_llama_cpp(dynamic_place, capsys):
    from llm_quantize.models.checkpoint import sample_path
    arguments = ("--format", "json", "quantize", sample_path(), "gguf", "-q", "dynamic", "--imatrix", dynamic_place / "s.imatrix", "--effort", "quick", "-o", dynamic_place)
    status, out, _ = run_cli(capsys, *arguments, "--target-size", "1.6M")
    result = json.loads(out)
    assert status == 0 and 0.995 * 1_600_000 <= result["file_size"] <= 1_600_000 == result["allocation"]["target_size"] and result["profile"] == "balanced"
    assert result["file_size"] == os.path.getsize(result["output_path"]) and result["quantization_level"] == "dynamic"
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: make test installs it")
    from llm_quantize.quality.llama_cpp_model import open_llama
    model = open_llama(result["output_path"], n_ctx=64)
    assert len(model.create_completion("The house", max_tokens=4)["choices"][0]["text"]) > 0
    _, out, _ = run_cli(capsys, *arguments, "--target-bpw", "3.5", "--dry-run")
    plan = json.loads(out)
    assert 3.48 < plan["effective_bpw"] <= 3.5 and plan["mix"] == "dynamic" and len(plan["tensors"]) == 38
    status, out, _ = run_cli(capsys, *arguments, "--target-size", "0.0005")
    assert status == 2 and "can have" in json.loads(out)["message"]


def test_profiles_are_made_shown_held_against_models_and_exported(dynamic_place, capsys, monkeypatch):
    from llm_quantize.models.checkpoint import sample_path
    monkeypatch.chdir(dynamic_place)
    status, out, _ = run_cli(capsys, "--format", "json", "profile", "list")
    assert status == 0 and [p["name"] for p in json.loads(out)["profiles"]][:3] == ["attention-high", "balanced", "compression-max"]
    assert run_cli(capsys, "profile", "create", "--imatrix", "s.imatrix", "--name", "mine", "--target-size", "0.0016", "--model", sample_path(), "--effort", "quick")[0] == 0
    status, out, _ = run_cli(capsys, "profile", "show", "mine.dqprofile")
    assert status == 0 and "1,600,000 bytes" in out and len([line for line in out.splitlines() if re.match(r"\d+ +I?Q", line)]) == 4
    status, out, _ = run_cli(capsys, "--format", "json", "profile", "validate", "mine.dqprofile", sample_path())
    fit = json.loads(out)
    assert status == 0 and fit["valid"] and 0.995 * 1_600_000 <= fit["predicted_size"] <= 1_600_000
    status, out, _ = run_cli(capsys, "--format", "json", "quantize", sample_path(), "gguf", "-q", "dynamic", "--profile", "mine.dqprofile", "--imatrix", "s.imatrix")
    assert status == 0 and json.loads(out)["file_size"] == fit["predicted_size"] and json.loads(out)["profile"] == "mine"
    assert len(run_cli(capsys, "profile", "export", "mine.dqprofile", "--llama-cpp")[1].splitlines()) == 29
    data = json.loads((dynamic_place / "mine.dqprofile").read_text())
    data["tensors"].pop("blk.0.attn_q.weight")
    (dynamic_place / "less.dqprofile").write_text(json.dumps(data))
    status, out, _ = run_cli(capsys, "profile", "validate", "less.dqprofile", sample_path())
    assert status == 13 and "no type for 1 tensors" in out
    assert run_cli(capsys, "quantize", sample_path(), "gguf", "-q", "dynamic", "--profile", "less.dqprofile", "--imatrix", "s.imatrix")[0] == 13


@pytest.mark.parametrize("arguments, code", [
    (("quantize", "SAMPLE", "gguf", "-q", "dynamic", "--profile", "nope"), 13), (("quantize", "SAMPLE", "gguf", "-q", "Q4_K", "--target-bpw", "3"), 2),
    (("quantize", "SAMPLE", "gguf", "-q", "dynamic", "--target-bpw", "3", "--target-size", "1"), 2), (("profile", "show", "nope"), 13), (("profile", "export", "balanced", "--llama-cpp"), 13),
    (("profile", "create", "--imatrix", "none.imatrix", "--name", "x"), 10)], ids=["no profile", "not dynamic", "two targets", "show nothing", "not resolved", "no imatrix"])
def test_what_dynamic_refuses(arguments, code, capsys):
    from llm_quantize.models.checkpoint import sample_path
    assert run_cli(capsys, *[str(sample_path()) if a == "SAMPLE" else a for a in arguments])[0] == code
