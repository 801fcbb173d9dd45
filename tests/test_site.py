"The documentation site as a reader gets it: every page is built and looked at, and what is wrong with a page is noticed."
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from check_site import problems

PAGE = '<html><head><link rel="stylesheet" href="a.css"></head><body><h1 id="top">T</h1>{}</body></html>'
WRONG = {
    "leads nowhere": '<a href="gone.html">x</a>',
    "has no such place": '<a href="other.html#nothing">x</a>',
    "comes from elsewhere": '<script src="https://cdn.example.org/x.js"></script>',
    "without a description": '<img src="p.png" alt="">',
    "a path of a machine": f"<pre>saved /{'home'}/someone/model.gguf</pre>",
    "dead without a kernel": "<pre>VBox(children=(Dropdown(options=()),))</pre>",
}


def site(folder, body):
    for name, text in (("a.css", ""), ("p.png", ""), ("other.html", PAGE.format("")), ("index.html", PAGE.format(body))): (folder / name).write_text(text)
    return problems(folder)


def test_a_sound_site_passes(tmp_path):
    assert site(tmp_path, '<a href="other.html#top">x</a><a href="#top">y</a><a href="https://example.org">z</a><img src="p.png" alt="a dot"><script>var x = "/' + 'tmp/x"</script>') == []


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_a_page_is_noticed(what, tmp_path):
    found = site(tmp_path, WRONG[what])
    assert len(found) == 1 and what in found[0] and found[0].startswith("index.html: ")


def test_an_empty_site_is_no_site(tmp_path): assert problems(tmp_path)


def test_the_site_is_built_without_a_flaw():
    done = subprocess.run([sys.executable, ROOT / "tools" / "site.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (ROOT / "_docs" / "index.html").exists() and problems(ROOT / "_docs") == []


def test_a_picture_has_a_description():
    "Every cell that draws says in words what is to be seen."
    silent = []
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            drawn = [o for o in cell.get("outputs", []) if {"image/png", "image/svg+xml"} & o.get("data", {}).keys()]
            if drawn and not any(line.startswith("#| fig-alt:") for line in cell["source"]): silent.append(f"{path.name} {cell['id']}")
    assert not silent


def test_the_reference_of_the_command_is_that_of_its_parser():
    from llm_quantize.cli.main import command_reference
    cells = json.loads((ROOT / "nbs" / "cli" / "04_main.ipynb").read_text(encoding="utf-8"))["cells"]
    [shown] = ["".join(o["data"]["text/markdown"]) for c in cells if "".join(c["source"]).endswith("Markdown(command_reference())") for o in c["outputs"]]
    assert shown == command_reference(), "run nbs/cli/04_main.ipynb again"
    assert "`--protect-super-weights`" in shown and "#### profile export" in shown


def test_live_pages_are_drawn_by_the_script_of_today():
    script = (ROOT / "llm_quantize" / "data" / "page" / "explorer.js").read_text(encoding="utf-8").strip()
    pages = sorted((ROOT / "nbs" / "pages").glob("*.html"))
    assert [p.stem for p in pages] == ["allocation", "importance", "quality"]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert script in text, f"make {page.name} again: the cell that writes pages in nbs/explore/04_views.ipynb"
