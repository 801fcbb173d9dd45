"Pages: self-contained, described, readable in the dark, and escaped; errors of outputs; the front; llama.cpp as judge."
import re
from html.parser import HTMLParser

import gguf
import pytest
import torch

from llm_quantize.calibration.text import bundled_text, load_tokenizer, windows
from llm_quantize.models.checkpoint import open_checkpoint
from llm_quantize.models.reference import load_float
from llm_quantize.quality.quantized_model import open_quantized
from llm_quantize.errors import ArgumentError, LLMQuantizeError, ValidationError
from llm_quantize.quality.layer_errors import layer_errors, output_errors
from llm_quantize.quality.evaluate import compare, quality_report
from llm_quantize.quality.comparison import pareto_front
from llm_quantize.api import quantize
from llm_quantize.quality.html import check_ending, html_page, html_table, save_report
from llm_quantize.files import write_aside
from llm_quantize.quality.llama_cpp_model import check_loads


class Page(HTMLParser):
    "What a page holds, and what it refers to."
    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.unclosed, self.references, self.described = [], [], [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        if tag not in ("meta", "link", "img", "br", "path", "use", "rect", "image", "stop"): self.open.append(tag)
        self.references += [v for k, v in attributes if k in ("src", "href", "xlink:href", "srcset", "action", "data") and not v.startswith(("#", "data:"))]
        if tag == "svg": self.described += bool(found.get("aria-label"))

    def handle_endtag(self, tag):
        if tag in self.open:
            while (last := self.open.pop()) != tag: self.unclosed.append(last)


def faults(text):
    "Why a page is not self-contained or not for everybody."
    page = Page(text)
    return [word for word, wrong in {"reference": page.references, "address": re.search(r"https?:|@import|url\((?!#|data:)", text), "script": "script" in page.tags,
                                     "no description": page.tags.count("svg") + page.tags.count("img") > page.described, "unclosed": page.open + page.unclosed,
                                     "dark": "prefers-color-scheme: dark" not in text, "black ink": "#000000" in text, "language": 'lang="en"' not in text}.items() if wrong]


@pytest.fixture(scope="module")
def checkpoint(sample_model): return open_checkpoint(sample_model)


@pytest.fixture(scope="module")
def files(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return {level: quantize(checkpoint, "gguf", level, output_dir=folder).output_path for level in ("Q8_0", "Q4_1", "Q4_K_M")}


def test_the_page_of_a_report_needs_nothing_else(checkpoint, files, tmp_path):
    quality_report(checkpoint, files["Q4_K_M"], calibration_samples=2, include_layers=True, output=tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert faults(text) == []
    assert Page(text).tags.count("svg") == 3 and "blk.3.ffn_down.weight" in text and "99.9" in text and [p.name for p in tmp_path.iterdir()] == ["r.html"]


@pytest.mark.parametrize("fault, text", {
    "reference": '<link href="style.css">', "address": "<style>@import 'x.css'</style>", "script": "<script></script>", "no description": "<svg></svg>", "unclosed": "<div>"}.items())
def test_a_bad_page_is_caught(fault, text): assert fault in faults(html_page("t", [text]))


def test_the_page_of_a_comparison_marks_the_front(checkpoint, files, tmp_path):
    found = compare(checkpoint, list(files.values()), calibration_samples=4, output=tmp_path / "c.html")
    text = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert faults(text) == [] and Page(text).tags.count("svg") == 1
    assert found.front == [True, False, True] and text.count("<tr class=m>") == 2
    lines = found.render().splitlines()
    assert [line.rstrip().endswith("*") for line in lines[2:]] == [True, False, True]
    assert [row["pareto"] for row in found.to_dict()] == [True, False, True]


@pytest.mark.parametrize("costs, front", [([(3, 1), (2, 2), (1, 3)], [1, 1, 1]), ([(3, 1), (3, 2), (1, 3)], [1, 0, 1]), ([(1, 1), (1, 1)], [1, 1]), ([(2, 1), (2, 1), (1, 1)], [0, 0, 1])],
                         ids=["all", "one beaten", "equals", "smaller"])
def test_pareto(costs, front): assert pareto_front(costs) == [bool(x) for x in front]


def test_names_are_escaped(): assert "<script>" not in html_page("<script>", [html_table(["<b>"], [["<script>"]], "<i>"), "a < b"])


def test_endings_are_checked_before_the_work(checkpoint, files, tmp_path):
    for path in (tmp_path / "r.pdf", tmp_path / "r"):
        with pytest.raises(ArgumentError, match="cannot be written as"): quality_report("./nowhere", files["Q8_0"], output=path)
    with pytest.raises(LLMQuantizeError, match="no directory"): check_ending(tmp_path / "no" / "r.md", (".json", ".md"))
    save_report(tmp_path / "R.MD", {".md": lambda: "x"})
    assert (tmp_path / "R.MD").read_text() == "x\n"


def test_a_name_that_is_no_text_can_be_reported(tmp_path):
    write_aside(tmp_path / "r.md", "mod\udce8le\n")
    assert (tmp_path / "r.md").read_text() == "mod?le\n" and [p.name for p in tmp_path.iterdir()] == ["r.md"]


def test_an_interrupted_report_leaves_nothing(tmp_path, monkeypatch):
    def stopped(*args): raise KeyboardInterrupt
    monkeypatch.setattr("os.replace", stopped)
    with pytest.raises(KeyboardInterrupt): write_aside(tmp_path / "r.md", "x\n")
    assert not list(tmp_path.iterdir())


# ---- errors of outputs -------------------------------------------------------------------------------------

def test_output_errors_by_hand(checkpoint, files):
    "One matrix, its inputs caught by a hook, the error computed from its definition."
    ids = windows(load_tokenizer(checkpoint.path), bundled_text("heldout"), limit=2)
    model, original = open_quantized(checkpoint, files["Q4_K_M"]), load_float(checkpoint)
    quantized, caught = model.load(), []
    hook = original.model.layers[1].mlp.down_proj.register_forward_hook(lambda module, args, out: caught.append(args[0][:, 256:]))
    with torch.inference_mode(): [original(input_ids=w[None], use_cache=False) for w in ids]
    hook.remove()
    x = torch.cat(caught).flatten(0, 1).double()
    meant, got = (x @ m.model.layers[1].mlp.down_proj.weight.double().T for m in (original, quantized))
    tensors, blocks = layer_errors(checkpoint, model, original, quantized, ids)
    row = next(r for r in tensors if r["layer_name"] == "blk.1.ffn_down.weight")
    assert row["output_error"] == pytest.approx(((meant - got).square().sum() / meant.square().sum()).item(), rel=1e-4)
    assert {"type", "bit_width", "relative_error", "mse", "max_error", "output_error"} <= set(row) and [b["layer_name"] for b in blocks] == ["token_embd", *(f"blk.{i}" for i in range(4)), "output"]
    other = load_float(checkpoint)
    other.model.layers[2].self_attn.v_proj.weight *= 1.1
    found = {k: v for k, v in output_errors(original, other, ids).items() if v > 1e-12}
    assert set(found) == {(2, "self_attn.v_proj"), (2, "")} and found[2, "self_attn.v_proj"] == pytest.approx(0.01, rel=1e-3)


# ---- llama.cpp ---------------------------------------------------------------------------------------------

def test_llama_cpp_judges_as_our_decoder_does(checkpoint, files):
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: make test installs it")
    ours, theirs = (quality_report(checkpoint, files["Q4_K_M"], calibration_samples=4, backend=backend) for backend in ("torch", "llama.cpp"))
    assert theirs.metrics.perplexity_quantized == pytest.approx(ours.metrics.perplexity_quantized, rel=0.01) and theirs.backend == "llama.cpp"
    assert 0 < theirs.metrics.kld_mean - ours.metrics.kld_mean < 0.004 and "by llama.cpp" in theirs.render()


def test_a_file_that_decodes_but_does_not_load(checkpoint, files, tmp_path):
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: make test installs it")
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(open(files["Q8_0"], "rb").read().replace(b"llama.feed_forward_length", b"llama.feed_forward_lenght"))
    assert quality_report(checkpoint, bad, calibration_samples=1).metrics.kld_mean > 0
    with pytest.raises(ValidationError, match="does not load bad.gguf.*wrong shape"): quality_report(checkpoint, bad, calibration_samples=1, backend="llama.cpp")
    with pytest.raises(ArgumentError, match="directory"): quality_report(checkpoint, checkpoint.path, backend="llama.cpp")
    check_loads(files["Q8_0"])
    assert gguf.GGUFReader(files["Q8_0"]).tensors
