"The house rules that a machine can check: floors, notebooks, README, site, weight of imports."
import ast
import base64
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MODULES = sorted(p for p in (ROOT / "llm_quantize").glob("*.py") if not p.name.startswith("_"))
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:work|tmp|root|home|Users|farm)/[\w.-]")
EXPORT = re.compile(r"^#\| *exports? *$", re.M)
# Modules that must not bring torch or transformers with them: they are imported before the command line knows what it is asked to do.
LIGHT = ("errors", "qtypes", "console", "profile_verbs", "quantize_verb", "cli")
COMMAND = ("console", "profile_verbs", "quantize_verb", "cli")
WIDTH, LENGTH = 200, 500  # what no line and no module may exceed; 160 columns and 350 lines are the aim


def name(path): return path.stem


def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell): return "".join(cell["source"])


def module_of(path):
    "The module a notebook exports, or None."
    found = re.search(r"^#\| *default_exp +(\w+)", "\n".join(map(source, cells(path))), re.M)
    return found[1] if found else None


def numbers():
    "Module -> number of its notebook."
    return {module_of(p): int(p.name[:2]) for p in NOTEBOOKS if p.name[:2].isdigit() and module_of(p)}


def imports_of(text):
    "The modules of this package that a source text imports, at the top or inside functions."
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.level == 1 or (node.module or "").split(".")[0] == "llm_quantize"):
            rest = (node.module or "").removeprefix("llm_quantize").lstrip(".")
            found |= {rest.split(".")[0]} if rest else {alias.name for alias in node.names if not alias.name.startswith("__")}
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("llm_quantize.")}
    return found


def upward(module, text, number):
    "Imports that climb: from a room of the same or a higher number, or from none."
    return sorted(other for other in imports_of(text) if number.get(other, 1000) >= number[module])


def site_tool():
    spec = importlib.util.spec_from_file_location("site_builder", ROOT / "tools" / "site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- floors ------------------------------------------------------------------------------------------------

def test_every_module_has_its_notebook():
    assert sorted(map(name, MODULES)) == sorted(numbers())


def test_numbers_are_unique():
    assert len({p.name[:2] for p in NOTEBOOKS if p.name[:2].isdigit()}) == len([p for p in NOTEBOOKS if p.name[:2].isdigit()])


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_a_room_imports_only_from_below(path):
    assert upward(path.stem, path.read_text(encoding="utf-8"), numbers()) == []


def test_a_climbing_import_is_caught():
    number = {"errors": 0, "qtypes": 1, "cli": 50}
    assert upward("qtypes", "from .errors import X", number) == []
    for text in ("from .cli import main", "from llm_quantize.cli import main", "from . import cli", "import llm_quantize.cli",
                 "def f():\n    from .cli import main", "from .qtypes import QType", "from .nowhere import x"):
        assert upward("qtypes", text, number), text


# ---- modules -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", MODULES, ids=name)
def test_module_is_small_and_plain(path):
    text = path.read_text(encoding="utf-8")
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= 40}
    wide = [i for i, line in enumerate(text.splitlines(), 1) if len(line) > WIDTH and i > 1]
    assert not long and not wide
    assert "import *" not in text and "@patch" not in text
    assert len(text.splitlines()) <= LENGTH


@pytest.mark.parametrize("path", [p for p in MODULES if p.stem not in COMMAND], ids=name)
def test_library_never_prints(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"]


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_public_names_have_docstrings(path):
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    assert not [n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_") and not ast.get_docstring(n)]


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_leave_torch_alone(module):
    code = f"import sys, llm_quantize.{module}; print(*[m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


# ---- notebooks ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_opens_with_title_and_answer(path):
    first = source(cells(path)[0])
    assert re.match(r"# \S.*\n+> \S", first), "the first cell is `# name`, then `> one sentence`"
    if path.name[:2].isdigit():
        assert module_of(path) == path.stem[3:]
        assert first.splitlines()[0] == f"# {module_of(path)}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_cell_ids_are_readable_and_stable(path):
    ids = [cell["id"] for cell in cells(path)]
    stem = re.sub(r"^\d+_", "", path.stem)
    assert len(set(ids)) == len(ids)
    assert not [i for i in ids if not re.fullmatch(rf"{re.escape(stem)}-[a-z0-9-]+", i)], "write notebooks with tools/nb.py, or name new cells by hand"
    assert len(ids) <= 100


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_imports_have_cells_of_their_own(path):
    mixed = []
    for cell in cells(path):
        text = source(cell)
        if cell["cell_type"] != "code" or re.search(r"^#\| *eval: *false|^[%!]|nbdev_export\(\)", text, re.M): continue
        body = ast.parse(text).body
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in body}
        if len(kinds) == 2: mixed.append(cell["id"])
    assert not mixed


def output_faults(outputs):
    "What must not be stored: errors, paths of a machine, widget state, large pictures, escape codes."
    text = json.dumps(outputs)
    faults = [kind for kind, found in {
        "error": any(o["output_type"] == "error" for o in outputs), "machine path": MACHINE_PATH.search(text), "escape code": "\\u001b[" in text,
        "widget": "widget-view+json" in text, "object address": re.search(r"object at 0x[0-9a-f]+", text)}.items() if found]
    pictures = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    return faults + [f"picture of {len(base64.b64decode(p)) // 1024} KB" for p in pictures if len(base64.b64decode(p)) > 60 * 1024]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_stored_outputs_are_small_and_the_same_everywhere(path):
    found = {cell["id"]: output_faults(cell["outputs"]) for cell in cells(path) if cell["cell_type"] == "code"}
    assert not {k: v for k, v in found.items() if v}
    assert "widgets" not in json.loads(path.read_text(encoding="utf-8"))["metadata"]


@pytest.mark.parametrize("fault, output", {
    "error": {"output_type": "error", "traceback": []},
    "machine path": {"output_type": "stream", "text": ["wrote /" + "tmp/x.gguf"]},
    "picture of 64 KB": {"output_type": "display_data", "data": {"image/png": base64.b64encode(bytes(1 << 16)).decode()}},
}.items())
def test_a_bad_output_is_caught(fault, output):
    assert output_faults([output]) == [fault]
    assert output_faults([{"output_type": "stream", "text": ["4.5 bits, see llm_quantize/data/text\n"]}]) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_prose_uses_only_what_both_renderers_know(path):
    prose = [source(cell) for cell in cells(path) if cell["cell_type"] == "markdown"]
    opened = [line for text in prose for line in text.splitlines() if line.startswith(":::") and line.strip(": ")]
    assert not [line for line in opened if not re.fullmatch(r":{3,} *\{\.callout-(note|tip|warning|important|caution)[^}]*\}", line)]


# ---- README and site ---------------------------------------------------------------------------------------

def test_readme_is_made_from_the_index():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == site_tool().readme_text(), "run: python tools/site.py --readme"


def test_readme_prints_two_commands():
    blocks = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert [line for block in blocks for line in block.splitlines() if line.startswith("make ")] == ["make first", "make test"]


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("https://") and not (ROOT / link).exists()]


def test_sidebar_lists_every_notebook_in_order():
    tool = site_tool()
    listed = tool.sidebar_notebooks(tool.site_settings()["sidebar"]["contents"])
    assert sorted(listed) == tool.site_notebooks()
    library = [n for n in listed if n[:2].isdigit()]
    assert library == sorted(library)


def test_quarto_reads_the_same_description():
    assert (ROOT / "nbs" / "_quarto.yml").read_text(encoding="utf-8") == (ROOT / "_quarto.yml").read_text(encoding="utf-8")
    assert yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["project"]["output-dir"] == "_docs"


@pytest.mark.parametrize("markdown, expected", [
    ("::: {.callout-note}\n## Title\nText.\n:::", '!!! note "Title"\n\n    Text.\n'),
    ("::: {.callout-tip}\nText.\n\nMore.\n:::", "!!! tip\n\n    Text.\n\n    More.\n"),
], ids=["titled", "plain"])
def test_callouts_become_admonitions(markdown, expected):
    tool = site_tool()
    assert tool.CALLOUT.sub(tool.site_callout, markdown) == expected


def test_mathematics_becomes_mathml_and_code_does_not():
    pytest.importorskip("latex2mathml", reason="needs latex2mathml: make test installs it")
    mathml = site_tool().mathml
    assert mathml("a $x^2$ b").startswith("a <math") and "display=\"block\"" in mathml("$$x$$")
    for text in ("costs $5 and $6", "`$x$`", "```bash\necho $A $B\n```", "no dollar"):
        assert mathml(text) == text


def test_a_link_to_a_page_that_is_not_there_stops_the_build(tmp_path):
    tool = site_tool()
    tool.PAGES = tmp_path
    nb = {"metadata": {}, "cells": [{"cell_type": "markdown", "source": "See [b](02_b.ipynb#part)."}]}
    tool.write_page("01_a.ipynb", nb, {"01_a.ipynb": "a", "02_b.ipynb": "b"}, "https://example.org")
    assert "[b](b.md#part)" in (tmp_path / "a.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="02_b.ipynb"): tool.write_page("01_a.ipynb", nb, {"01_a.ipynb": "a"}, "https://example.org")


def test_an_exported_cell_shows_its_source_under_the_names_it_defines():
    tool = site_tool()
    heading, code = tool.exported_markdown("def b(): pass\n\nclass C: pass", ["### C\n\nText.", "### b\n\nText."], folded=False)
    assert heading.startswith("### b, C { #b }") and "def b(): pass" in code
    *signatures, block = tool.exported_markdown("def b(): pass", ["### b\n\nText."], folded=True)
    assert signatures == ["### b\n\nText."] and block.startswith("??? source")


# ---- packaging ---------------------------------------------------------------------------------------------

def tracked_texts():
    "Every text file under version control, or in the tree where there is no git."
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    for file in filter(None, listed):
        path = ROOT / file
        if path.is_file() and path.suffix not in {".safetensors", ".model", ".png", ".gguf", ".xz", ".zst", ".gz"}:
            try: yield file, path.read_text(encoding="utf-8")
            except UnicodeDecodeError: continue


def test_no_machine_path_is_committed():
    assert not [f"{file}: {found[0]}" for file, text in tracked_texts() if file != "llm_quantize/data/sample-4m/tokenizer.json" and (found := MACHINE_PATH.search(text))]


def test_direct_dependencies_are_pinned():
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    wanted = {re.split(r"[<>=]", word)[0] for line in re.findall(r"requirements = (.*)", settings) for word in line.split()}
    pinned = {re.split(r"==", line)[0] for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line}
    assert wanted == pinned
