"What a user may ask for: contradictions are refused before anything is read, close names are offered."
import json

import pytest

from llm_quantize.api import quantize
from llm_quantize.cli.main import main
from llm_quantize.errors import ArgumentError, LLMQuantizeError
from llm_quantize.gguf.options import Calibration, Dynamic, Feedback, Output, Protect, Request, find_search
from llm_quantize.gguf.profiles import Target
from llm_quantize.models.checkpoint import sample_path


# ---- where the file goes ---------------------------------------------------------------------------------------------

def test_names_of_files(tmp_path):
    def name(**options): return Output(tmp_path, **options).path("m", "Q4_K_M").name
    assert (name(), name(name="x"), name(name="x.gguf")) == ("m-Q4_K_M.gguf", "x.gguf", "x.gguf")
    with pytest.raises(ArgumentError, match="contains a directory"): name(name="../x")
    (tmp_path / "x.gguf").mkdir()
    with pytest.raises(ArgumentError, match="is a directory"): name(name="x")


def test_the_folder_is_made_when_there_is_something_to_put_there(tmp_path):
    output = Output(tmp_path / "a" / "b")
    output.path("m", "Q8_0")
    assert not (tmp_path / "a").exists()
    output.make_folder()
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(LLMQuantizeError, match="is a file"): Output(tmp_path / "file" / "out").path("m", "Q8_0")
    with pytest.raises(LLMQuantizeError, match="cannot make"): Output(tmp_path / "file" / "out").make_folder()


# ---- what goes together ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, message", [
    ({"feedback": Feedback(True), "search": "reference"}, "no error feedback"),
    ({"dynamic": Dynamic("balanced")}, "for dynamic quantization"),
    ({"dynamic": Dynamic(target=Target(3.0, "file"))}, "for dynamic quantization"),
    ({"feedback": Feedback(resume=True)}, "only a run with --error-feedback"),
    ({"search": "bset"}, "unknown search 'bset'"),
    ({"effort": "thoro"}, "unknown effort 'thoro'"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_contradictions(options, message):
    with pytest.raises(ArgumentError, match=message): Request("Q4_K_M", **options)


@pytest.mark.parametrize("options", [
    {"level": "Dynamic", "dynamic": Dynamic("balanced", Target(3.0, "file")), "feedback": Feedback(resume=True)},
    {"feedback": Feedback(True, resume=True), "search": "BEST", "effort": "Quick"},
    {"protect": Protect(True), "search": "reference"},
], ids=["dynamic", "error feedback", "protection"])
def test_what_goes_together(options):
    request = Request(**options)
    assert request.is_dynamic == (options.get("level") == "Dynamic")
    assert (request.search, request.effort) == (request.search.lower(), request.effort.lower())


def test_no_windows_are_refused():
    with pytest.raises(ArgumentError, match="--calibration-samples is 0"): Calibration(samples=0)


def test_the_front_door_refuses_before_it_reads(tmp_path):
    "Nothing is at that path: an option that cannot be is found first."
    nowhere, folder = tmp_path / "nowhere", {"output_dir": tmp_path / "out"}
    wrong = {"error_feedback": True, "search": "reference"}
    with pytest.raises(ArgumentError, match="no error feedback"): quantize(nowhere, "gguf", "Q4_0", **folder, **wrong)
    with pytest.raises(ArgumentError, match="resume"): quantize(nowhere, "gguf", "Q4_0", **folder, resume="somewhere")
    assert not (tmp_path / "out").exists()


# ---- presets of the search -------------------------------------------------------------------------------------------

SEARCHES = [("bset", "best"), ("refrence", "reference"), ("xyzzy", "fast, best, reference")]


@pytest.mark.parametrize("name, words", SEARCHES)
def test_an_unknown_search(tmp_path, capsys, name, words):
    with pytest.raises(ArgumentError) as caught: find_search(name)
    command = ["quantize", str(sample_path()), "gguf", "-q", "Q4_0", "-o", str(tmp_path / "out"), "--search", name]
    assert main(["--format", "json", *command]) == 2
    found = json.loads(capsys.readouterr().out)
    assert (found["error_code"], found["message"]) == (2, caught.value.message) and name in found["message"]
    assert words in found["suggestion"] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["fast", "Best", "reference"])
def test_searches_are_recorded(tmp_path, name):
    result = quantize(sample_path(), "gguf", "Q4_0", output_dir=tmp_path, search=name, device="cpu")
    assert result.to_dict()["search"] == name.lower() == find_search(name)
