"The explorers without a screen: frames, pages, and the numbers under the coloured text."
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from llm_quantize.models.job import Job
from llm_quantize.calibration.text import bundled_text, load_tokenizer, windows  # noqa: E402
from llm_quantize.models.checkpoint import open_checkpoint  # noqa: E402
from llm_quantize.models.reference import load_float  # noqa: E402
from llm_quantize.quality.quantized_model import load_quantized  # noqa: E402
from llm_quantize.explore.widget import Control, Explorer, Panel  # noqa: E402
from llm_quantize.explore.chart_data import chart_frame, chart_series, draw_frame, heat_frame, heat_grid, html_frame, merge_frames  # noqa: E402
from llm_quantize.api import quantize  # noqa: E402
from llm_quantize.quality.metrics import score_windows  # noqa: E402
from llm_quantize.explore.token_view import view_tokens  # noqa: E402
from results import EXPLORERS  # noqa: E402


def data_of(page): return json.loads(re.search(r'id="explorer-data">(.*?)</script>', page, re.S)[1])


@pytest.mark.parametrize("name", EXPLORERS)
def test_the_page_holds_the_frames_that_python_shows(name):
    explorer = EXPLORERS[name]()
    data = data_of(explorer.page())
    values = {c["name"]: [explorer.controls[c["name"]].options[i] for i in ([c["value"]] if isinstance(c["value"], int) else c["value"])] for c in data["controls"]}
    for panel in data["panels"]:
        keys = [""]
        for control in panel["depends"]: keys = [f"{key},{explorer.controls[control].options.index(v)}" for key in keys for v in values[control]]
        found = [panel["pool"][panel["frames"][key[1:]]] for key in keys]
        shown = merge_frames(found) if len(found) > 1 else found[0]
        expected = explorer.frames()[panel["name"]]
        assert {**shown, "chosen": None} == json.loads(json.dumps({**expected, "chosen": None}))


@pytest.mark.parametrize("name", EXPLORERS)
def test_frames_and_figures_are_pure(name):
    explorer = EXPLORERS[name]()
    assert explorer.frames() == explorer.frames() == EXPLORERS[name]().frames()
    pictures = {panel: figure._repr_png_() for panel, figure in explorer.figures().items()}
    assert pictures == {panel: figure._repr_png_() for panel, figure in explorer.figures().items()} and len(pictures) >= 3


@pytest.mark.parametrize("grids", [1, 2, 3, 5])
def test_any_number_of_grids_is_drawn(grids):
    frame = heat_frame(["a", "b"], [heat_grid(str(k), [[k, None], [1, 2]]) for k in range(grids)], "bits")
    assert len(draw_frame(frame).axes) == grids + 1


def test_empty_and_constant_frames_are_drawn():
    for grid in ([[None, None]], [[3.0, 3.0]]): draw_frame(heat_frame(["a"], [heat_grid("", grid)], ""))._repr_png_()
    draw_frame(chart_frame([chart_series("", [], [])], "", "", log="xy"))._repr_png_()


def test_words_from_outside_cannot_leave_the_data_of_a_page():
    hostile = "</script><script>alert(1)</script>"
    explorer = Explorer(hostile, [Control("who", hostile, (hostile, "b"))], [Panel("text", hostile, ("who",), lambda who: chart_frame([chart_series(who, [1], [1])], who, who, alt=who))], hostile)
    page = explorer.page()
    assert page.count("<script") == 2 and page.count("</script>") == 2 and data_of(page)["panels"][0]["pool"][0]["xlabel"] == hostile


def test_a_page_needs_neither_matplotlib_nor_ipywidgets(tmp_path):
    code = ("import sys; sys.modules['matplotlib'] = sys.modules['ipywidgets'] = None\n"
            "sys.path.insert(0, sys.argv[2])\nfrom results import EXPLORERS\n"
            "for name, make in EXPLORERS.items(): make().to_html(f'{sys.argv[1]}/{name}.html')\n"
            "shown = make()._repr_mimebundle_()\nprint(sorted(shown), shown['text/html'][:7])\n"
            "try: make().widget\nexcept Exception as error: print(type(error).__name__, error, error.suggestion)\n")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*.html"))) == 3 and "['text/html', 'text/plain'] <iframe" in done.stdout
    assert "LLMQuantizeError" in done.stdout and "pip install 'llm_quantize[widgets]'" in done.stdout


def test_a_quality_explorer_names_what_was_not_measured():
    from dataclasses import replace

    from results import report

    from llm_quantize.errors import ArgumentError
    from llm_quantize.explore.views import explore_quality
    bare = replace(report("Q6_K.gguf", 6.6), layer_errors=())
    assert "layers" not in explore_quality([bare]).frames()
    mixed = explore_quality([bare, report("Q4_K.gguf", 4.5)])
    assert "without its layers" in mixed.frames(models=("Q6_K",))["layers"]["html"] and len(mixed.frames()["layers"]["grids"]) == 1
    assert list(explore_quality([bare, bare]).controls["models"].options) == ["Q6_K (1)", "Q6_K (2)"]
    with pytest.raises(ArgumentError, match="different originals"): explore_quality([bare, replace(bare, original_model="another")])


def test_a_size_that_rules_forbid_becomes_the_nearest_one():
    explorer = EXPLORERS["allocation"]()
    low = explorer.controls["target"].options[0]
    assert "Nearest possible" in explorer.frames(rules="attention-high", target=low)["facts"]["html"]
    assert "Nearest possible" not in explorer.frames(rules="free", target=4.0)["facts"]["html"]


def test_coloured_text_has_the_divergences_of_scores(sample_model, tmp_path):
    path = quantize(sample_model, "gguf", "Q3_K_M", output_dir=tmp_path).output_path
    text, tokenizer = bundled_text("heldout")[:3000], load_tokenizer(sample_model)
    [view] = view_tokens(sample_model, path, text, top=2, device="cpu")
    ids = windows(tokenizer, text, size=256, limit=1)
    [scores] = score_windows(load_float(open_checkpoint(sample_model)), [load_quantized(sample_model, path)], ids)
    first = 256 // 2 # the first of the view's tokens is the second of the text
    own = view.tokens[first:first + len(scores.kld)]
    assert torch.allclose(torch.tensor([t.kld for t in own]), scores.kld.float(), atol=1e-4)
    assert [t.same for t in own] == scores.same_top.tolist()
    assert torch.allclose(torch.tensor([t.p for t in own]).log(), -scores.nll.float(), atol=1e-3)


def test_a_frame_of_html_is_kept_as_it_is():
    assert merge_frames([html_frame("<p>a</p>"), html_frame("<p>b</p>")])["html"] == "<p>a</p><p>b</p>"


# ---- results that show themselves ------------------------------------------------------------------------------

def results(sample_model, folder):
    from dataclasses import replace

    from results import report

    from llm_quantize.gguf.plan import plan_gguf
    from llm_quantize.gguf.profiles import PRESETS
    plan = plan_gguf(Job(sample_model), "Q4_K_M").plan
    written = quantize(sample_model, "gguf", "Q4_K_M", output_dir=folder)
    resolved = replace(PRESETS["balanced"], tensors={t.name: t.type for t in plan if t.type != "F32"})
    return {"plan": plan, "result": written, "profile": PRESETS["attention-high"], "resolved profile": resolved, "report": report("Q4_K_M.gguf", 4.8)}


def test_results_show_a_table_and_a_picture(sample_model, tmp_path):
    from xml.etree import ElementTree
    for name, result in results(sample_model, tmp_path).items():
        text = result._repr_html_()
        tree = ElementTree.fromstring(f"<all>{text}</all>")
        assert tree.find(".//table") is not None, name
        pictures = [element for element in tree.iter() if element.tag.endswith("svg")]
        assert pictures and all(p.get("role") == "img" and p.get("aria-label") for p in pictures), name
        assert len(text) < 8000 and "|" in result._repr_markdown_(), name
        assert not re.search(r"(?:src|href)=", text)
    assert "&lt;i&gt;" not in text


def test_a_displayed_result_escapes_its_words():
    from dataclasses import replace

    from results import report
    text = replace(report("<i>.gguf", 4.8), original_model="<b>")._repr_html_()
    assert "<i>" not in text and "<b>" not in text and "&lt;i&gt;" in text
