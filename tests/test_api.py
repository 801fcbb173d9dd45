"The front door: light, the same options as the command line, helpful about mistakes, results that show themselves."
import inspect
import os
import subprocess
import sys
from enum import Enum
from pathlib import Path

import pytest
import typer

import llm_quantize as lq
from llm_quantize.cli.main import app, main
from llm_quantize.errors import ArgumentError, ConversionError
from llm_quantize.models.checkpoint import sample_path

VERBS = ("quantize", "plan", "analyze", "quality_report", "compare", "validate", "info", "sample")
OTHERS = ("Profile", "ImportanceMatrix", "open_checkpoint", "open_gguf", "__version__")


def python(*words, folder=None):
    "What another interpreter says; it finds the package that this one has."
    environment = {**os.environ, "PYTHONPATH": str(Path(lq.__file__).parents[1])}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()

# ---- what the package offers -----------------------------------------------------------------------------------------


def test_importing_the_package_loads_no_torch():
    heavy = python("-c", "import sys, llm_quantize; print(*{'torch', 'transformers', 'numpy'} & set(sys.modules))")
    assert heavy == ""
    loaded = python("-c", "import sys, llm_quantize; llm_quantize.quantize; print('torch' in sys.modules)")
    assert loaded == "True", "a verb brings it"


def test_the_package_offers_the_front_door_and_nothing_else():
    from llm_quantize import errors
    known = {name for name, made in vars(errors).items() if isinstance(made, type) and issubclass(made, Exception)}
    assert set(lq.__all__) == {*VERBS, *OTHERS, *known}
    assert dir(lq) == sorted(lq.__all__) and len(set(lq.__all__)) == len(lq.__all__)
    for name in lq.__all__: assert getattr(lq, name) is not None
    with pytest.raises(AttributeError, match="quantise"): lq.quantise


def test_python_runs_the_package(tmp_path):
    assert python("-m", "llm_quantize", "--version", folder=tmp_path) == f"llm-quantize {lq.__version__}"

# ---- the same on both sides ------------------------------------------------------------------------------------------


def command_of(*words):
    "The verb of the command line."
    found = typer.main.get_command(app)
    for word in words: found = found.commands[word]
    return found


def written(default):
    "A default as both sides can write it."
    if isinstance(default, Enum): default = default.value
    return str(default) if isinstance(default, Path) else default


def of_command(*words):
    "Option of a verb -> default; arguments by their names."
    options = {}
    for p in command_of(*words).params:
        flags = [flag for flag in p.opts if flag.startswith("--")]
        name = flags[0].removeprefix("--").replace("-", "_") if flags else p.name
        if name != "help": options[name] = ... if p.required else written(p.default)
    return options


def of_python(verb):
    "Parameter of a verb -> default."
    parameters = inspect.signature(verb).parameters.values()
    return {p.name: ... if p.default is p.empty else written(p.default) for p in parameters}


# verb of Python: words of the command, and what only Python has. `threads` is an option of the command itself; a bar on
# the terminal stands for `progress`; nobody writes a `dtype`.
SAME = {
    "quantize": (("quantize",), {"threads", "progress"}),
    "analyze": (("analyze",), {"threads", "progress"}),
    "quality_report": (("quality", "report"), {"threads", "progress", "dtype"}),
    "compare": (("quality", "compare"), {"threads", "progress", "dtype"}),
    "validate": (("validate",), {"threads"}),
    "info": (("info",), set()),
    "sample": (("sample",), set()),
}


@pytest.mark.parametrize("verb", SAME)
def test_options_and_defaults_are_those_of_the_command(verb):
    words, only_python = SAME[verb]
    ours = of_python(getattr(lq, verb))
    theirs = of_command(*words)
    assert only_python <= set(ours)
    assert {name: default for name, default in ours.items() if name not in only_python} == theirs


def test_threads_are_an_option_of_the_command_itself():
    assert of_command()["threads"] is None
    have = {verb for verb in SAME if "threads" in of_python(getattr(lq, verb))}
    assert have == {verb for verb, (_, only_python) in SAME.items() if "threads" in only_python}


def test_plan_is_the_dry_run():
    ours, whole = of_python(lq.plan), of_python(lq.quantize)
    assert set(ours) < set(whole) and ours.pop("quant_level") == "Q4_K_M" and whole["quant_level"] is None
    assert ours == {name: whole[name] for name in ours}
    dry = lq.quantize(sample_path(), "gguf", "Q3_K_M", dry_run=True, device="cpu")
    planned = lq.plan(sample_path(), "Q3_K_M", device="cpu")
    assert (dry.level, dry.types, dry.file_bytes) == (planned.level, planned.types, planned.file_bytes)


def test_a_difference_would_show():
    ours = of_python(lq.quantize)
    assert ours != {**ours, "effort": "quick"} and of_command("quantize")["effort"] == ours["effort"] == "default"
    assert of_command("quantize")["model"] is ours["model"] is ...
    assert of_command("quality", "report")["output"] is None

# ---- what is meant ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words, level", [(("Q4_0",), "Q4_0"), (("q4_k_m",), "Q4_K_M"), (("gguf", "Q4_0"), "Q4_0"),
                                          ((), "Q4_K_M"), (("gguf",), "Q4_K_M")])
def test_a_level_in_place_of_the_format_means_gguf(words, level):
    planned = lq.quantize(sample_path(), *words, dry_run=True)
    assert planned.level == level


def test_a_level_writes_a_gguf(tmp_path):
    result = lq.quantize(sample_path(), "Q4_K_M", output_dir=tmp_path, device="cpu", threads=1)
    assert (result.format, result.quantization_level) == ("gguf", "Q4_K_M")
    assert Path(result.output_path) == tmp_path / "sample-4m-Q4_K_M.gguf"
    assert result.file_size == lq.plan(sample_path()).file_bytes


@pytest.mark.parametrize("words, error, said", [
    (("ggfu",), ArgumentError, "did you mean gguf"), (("smoothqant",), ArgumentError, "did you mean smoothquant"),
    (("Q4_K_N",), ArgumentError, "did you mean Q4_K"), (("exl3", "Q4_K_M"), ArgumentError, "use gguf or smoothquant"),
    (("awq",), ConversionError, "use gguf or smoothquant"), (("smoothquant", "Q4_0"), ArgumentError, "leave out -q")])
def test_what_is_not_meant(words, error, said, tmp_path):
    with pytest.raises(error) as caught: lq.quantize(tmp_path / "nowhere", *words, output_dir=tmp_path / "out")
    assert said in caught.value.suggestion and not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb, option, near", [
    ("quantize", "ouput_dir", "output_dir"), ("quantize", "targetbpw", "target_bpw"), ("quantize", "thread", "threads"),
    ("plan", "profil", "profile"), ("analyze", "calibration_sample", "calibration_samples"),
    ("compare", "metric", "metrics"), ("info", "modle", "model"), ("sample", "foldr", "folder")])
def test_an_unknown_option_names_the_closest(verb, option, near):
    with pytest.raises(ArgumentError, match=f"{verb} has no option '{option}'") as caught:
        getattr(lq, verb)(**{option: 1})
    assert caught.value.suggestion == f"did you mean {near}?"


def test_an_option_like_no_other_gets_the_list():
    with pytest.raises(ArgumentError) as caught: lq.sample(zzzzzz=1)
    assert caught.value.suggestion == "options: folder"


def test_options_that_do_not_go_together(tmp_path):
    "Said in the words of the command line, before the model is looked for."
    for options, message in (
        ({"target_bpw": 3.0, "target_size": "500M", "quant_level": "dynamic"}, "--target-bpw and --target-size"),
        ({"alpha": 0.5}, "--alpha"), ({"smoothquant": True}, "--smoothquant does not go with the format gguf"),
        ({"format": "smoothquant", "imatrix": "x"}, "--imatrix is for the format gguf"),
        ({"profile": "balanced"}, "for dynamic quantization"), ({"threads": 0}, "--threads is 0")):
        with pytest.raises(ArgumentError, match=message): lq.quantize(tmp_path / "nowhere", **options)

# ---- what is said ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_the_docstring_says_it_all(verb):
    function = getattr(lq, verb)
    text = inspect.getdoc(function)
    for part in ("Args:", "Returns:", "Raises:", "Example:"): assert f"\n{part}\n" in text, part
    assert text.index("Args:") < text.index("Returns:") < text.index("Raises:") < text.index("Example:")
    for name in inspect.signature(function).parameters: assert name in text or name == "threads", name
    example = text.split("Example:")[1]
    assert ">>> " in example and f"lq.{verb}(" in example


def test_results_show_themselves(tmp_path):
    "In a notebook the last line of a cell is a table or a picture."
    made = lq.quantize(sample_path(), "Q4_0", output_dir=tmp_path, device="cpu")
    once = {"calibration_samples": 1, "device": "cpu"}
    analysis = lq.analyze(sample_path(), output=tmp_path / "x.imatrix", **once)
    results = {"quantize": made, "plan": lq.plan(sample_path()), "analyze": analysis, "info": lq.info(sample_path()),
               "quality_report": lq.quality_report(sample_path(), made.output_path, **once),
               "compare": lq.compare(sample_path(), [made.output_path], **once),
               "validate": lq.validate(made.output_path, sample_path()),
               "profile": lq.Profile.load("balanced"), "imatrix": lq.ImportanceMatrix.load(analysis.output_path)}
    def shown(result): return [form for form in ("html", "markdown") if getattr(result, f"_repr_{form}_", str)()]
    assert [name for name, result in results.items() if not shown(result)] == []


def test_the_command_calls_the_same_function(tmp_path, capsys):
    assert main(["quantize", str(sample_path()), "Q4_0", "-o", str(tmp_path), "-n", "theirs", "--threads", "1"]) == 0
    ours = lq.quantize(sample_path(), "Q4_0", output_dir=tmp_path, output_name="ours", threads=1)
    assert (tmp_path / "theirs.gguf").read_bytes() == Path(ours.output_path).read_bytes()
