"The house rules that a machine can check: floors, notebooks, README, site, weight of imports."
import ast
import base64
import importlib.util
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "llm_quantize"
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if not p.name.startswith("_"))
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:work|tmp|root|home|Users|farm)/[\w.-]")
EXPORT = re.compile(r"^#\| *exports? *$", re.M)
# Packages and rooms of their own, lowest floor first: what stands further down the list may import what stands above it.
FLOORS = ("errors", "display", "files", "quants", "models", "calibration", ("compressed", "gguf"), "quality",
          "acceptance", "api", "explore", "cli")
# Modules that must not bring torch or transformers with them: they are imported before the command line knows what it is asked to do.
LIGHT = ("", ".errors", ".display", ".quants.qtypes", ".cli.console", ".cli.profile", ".cli.quantize", ".cli.main")
WIDTH, LENGTH, FUNCTION, CELL = 120, 400, 60, 45  # columns; lines of a module, a function, an exported cell
PARAMETERS = 8  # of a function, those that are keyword-only not counted
MARKER = "# %% "  # nbdev writes it, and the notebook's name, above each exported cell
# The one room that opens llama.cpp: it knows the option without which llama.cpp crashes on some processors.
LLAMA_ROOM = "quality.llama_cpp_model"


def dotted(path):
    "The name of a module within the package: quants.qtypes."
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def place(path):
    "A notebook by its path in nbs/."
    return str(path.relative_to(ROOT / "nbs").with_suffix(""))


@cache
def notebook(path): return json.loads(path.read_text(encoding="utf-8"))


def cells(path): return notebook(path)["cells"]


def source(cell): return "".join(cell["source"])


@cache
def text_of(path): return path.read_text(encoding="utf-8")


@cache
def tree_of(path): return ast.parse(text_of(path))


def module_of(path):
    "The module a notebook exports, or None."
    found = re.search(r"^#\| *default_exp +([\w.]+)", "\n".join(map(source, cells(path))), re.M)
    return found[1] if found else None


@cache
def numbers():
    "Module -> (floor, number of its notebook)."
    found = {}
    for path in NOTEBOOKS:
        module = module_of(path)
        if module is None: continue
        first = module.split(".")[0]
        floor = next(i for i, names in enumerate(FLOORS) if first in ((names,) if isinstance(names, str) else names))
        found[module] = (floor, int(path.name[:2]) if "." in module else 0)
    return found


def imports_of(text, module=""):
    "The modules of this package that a source text imports, at the top or inside functions, with the names it takes: (module, name)."
    known, found = {dotted(p) for p in MODULES}, set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {(alias.name.removeprefix("llm_quantize."), "") for alias in node.names if alias.name.startswith("llm_quantize.")}
        if not isinstance(node, ast.ImportFrom): continue
        if node.level: base = module.split(".")[:-node.level] if "." in module or node.level == 1 else []
        elif (node.module or "").split(".")[0] == "llm_quantize": base = []
        else: continue
        whole = [*base, *filter(None, (node.module or "").removeprefix("llm_quantize").strip(".").split("."))]
        for alias in node.names:
            own = ".".join([*whole, alias.name])
            if own in known: found.add((own, ""))
            elif whole: found.add((".".join(whole), alias.name))
    return found


def upward(module, text, number):
    "Imports that climb: from a higher floor, from a neighbour on the same one, or from a room of the same or a higher number."
    def allowed(other):
        if other not in number: return other in {m.rsplit(".", 1)[0] for m in number} and number[module][0] > 0
        if other.split(".")[0] == module.split(".")[0] and "." in other: return number[other] < number[module]
        return number[other][0] < number[module][0]
    return sorted({other for other, _ in imports_of(text, module) if not allowed(other)})


def site_tool():
    spec = importlib.util.spec_from_file_location("site_builder", ROOT / "tools" / "site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- floors ------------------------------------------------------------------------------------------------

def test_every_module_has_its_notebook():
    assert sorted(map(dotted, MODULES)) == sorted(numbers())


def test_notebooks_stand_where_their_modules_do():
    wrong = {}
    for path in NOTEBOOKS:
        module = module_of(path)
        if module and module != re.sub(r"(^|/)\d\d_", r"\1", place(path)).replace("/", "."): wrong[place(path)] = module
    assert not wrong


@pytest.mark.parametrize("package", [p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()])
def test_numbers_of_a_package_start_at_one_and_have_no_hole(package):
    found = sorted(int(p.name[:2]) for p in (ROOT / "nbs" / package).glob("[0-9]*.ipynb"))
    assert found == list(range(1, len(found) + 1))


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_room_imports_only_from_below(path):
    assert upward(dotted(path), text_of(path), numbers()) == []


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_no_private_name_leaves_its_package(path):
    own = dotted(path).split(".")[0] if "." in dotted(path) else ""
    taken = imports_of(text_of(path), dotted(path))
    assert not [f"{module}.{name}" for module, name in taken if name.startswith("_") and not name.startswith("__") and module.split(".")[0] != own]


def test_a_climbing_import_is_caught():
    number = numbers()
    assert upward("quants.blocks", "from .qtypes import QTYPES\nfrom ..errors import X", number) == []
    for text in ("from ..cli.main import main", "from llm_quantize.cli.main import main", "from ..cli import main", "import llm_quantize.cli.main",
                 "def f():\n    from ..cli.main import main", "from .codec import encode", "from llm_quantize.models.rope import x"):
        assert upward("quants.blocks", text, number), text
    assert upward("gguf.mixes", "from ..compressed.int8 import LARGEST", number)


# ---- modules -----------------------------------------------------------------------------------------------

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def too_long(tree, limit=FUNCTION):
    "Functions of more lines than that: name -> lines of the body."
    functions = [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
    return {node.name: lines for node in functions if (lines := node.end_lineno - node.body[0].lineno + 1) > limit}


def too_many_parameters(tree, limit=PARAMETERS):
    "Functions of more parameters than that: name -> how many. Keyword-only ones do not count, nor a method's first."
    methods = {id(node) for cls in ast.walk(tree) if isinstance(cls, ast.ClassDef) for node in cls.body}
    counts = {}
    for node in ast.walk(tree):
        if not isinstance(node, FUNCTIONS): continue
        static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
        counts[node.name] = len(node.args.posonlyargs) + len(node.args.args) - (id(node) in methods and not static)
    return {name: count for name, count in counts.items() if count > limit}


def long_lines(text, limit=WIDTH):
    "Lines wider than that, by number. What nbdev writes above the first exported cell is its own affair."
    lines = text.splitlines()
    cells = [i for i, line in enumerate(lines) if line.startswith(MARKER) and "auto #0" not in line]
    first = cells[0] if cells else 0
    return {i: line[:60] for i, line in enumerate(lines, 1) if i > first and len(line) > limit}


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_functions_are_short(path):
    assert too_long(tree_of(path)) == {}


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent.name != "cli" and dotted(p) != "api"], ids=dotted)
def test_functions_take_few_parameters(path):
    assert too_many_parameters(tree_of(path)) == {}, "let a frozen dataclass carry what travels together"


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_lines_are_not_wide(path):
    assert long_lines(text_of(path)) == {}


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_module_fits_in_the_head(path):
    assert len(text_of(path).splitlines()) <= LENGTH


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_no_star_import_and_no_patch(path):
    assert "import *" not in text_of(path)
    assert "@patch" not in text_of(path)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_module_lists_its_public_names(path):
    listed = [node.value for node in tree_of(path).body
              if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"]
    assert len(listed) == 1, "nbdev writes __all__: was the notebook exported?"
    names = ast.literal_eval(listed[0])
    assert names, "a module without a public name is nobody's room"
    assert not [name for name in names if name.startswith("_")]


def test_an_unruly_module_is_caught():
    wide = "x = 1  # " + "a" * WIDTH
    header = f'"""{"a" * WIDTH}"""\n{MARKER}auto #0\n__all__ = []\n{MARKER}../nbs/x.ipynb #x-y\n'
    many = ", ".join(f"a{i}" for i in range(PARAMETERS + 1))
    assert too_long(ast.parse("def f():\n" + "    x = 1\n" * (FUNCTION + 1))) == {"f": FUNCTION + 1}
    assert too_long(ast.parse("def f():\n" + "    x = 1\n" * FUNCTION)) == {}
    assert too_many_parameters(ast.parse(f"def f({many}): pass")) == {"f": PARAMETERS + 1}
    assert too_many_parameters(ast.parse(f"def f(a, *, {many}): pass")) == {}
    assert too_many_parameters(ast.parse(f"class A:\n    def f({many}): pass")) == {}
    assert long_lines(header + wide) == {5: wide[:60]}
    assert long_lines(header + "x = 1") == {}


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent.name != "cli"], ids=dotted)
def test_library_never_prints(path):
    calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert not [node.lineno for node in calls if node.func.id == "print"]


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_public_names_have_docstrings(path):
    nodes = [node for node in tree_of(path).body if isinstance(node, (*FUNCTIONS, ast.ClassDef))]
    assert not [node.name for node in nodes if not node.name.startswith("_") and not ast.get_docstring(node)]


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_leave_torch_alone(module):
    code = f"import sys, llm_quantize{module}; print(*[m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


# ---- llama.cpp ---------------------------------------------------------------------------------------------

OPENS_LLAMA = re.compile(r"\bllama\w*\.Llama\(|from llama_cpp import [^\n]*\bLlama\b")


def codes():
    "(place, code) of every module, notebook, test and benchmark."
    for folder in ("llm_quantize", "tests", "benchmarks", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")): yield str(path.relative_to(ROOT)), text_of(path)
    for path in NOTEBOOKS:
        yield place(path), "\n".join(source(cell) for cell in cells(path) if cell["cell_type"] == "code")


def test_llama_cpp_is_opened_in_one_room():
    room = LLAMA_ROOM.split(".")[-1]
    assert not [where for where, code in codes() if room not in where and OPENS_LLAMA.search(code)], (
        f"open files with {LLAMA_ROOM}.open_llama")


@pytest.mark.parametrize("code", ["import llama_cpp\nx = llama_cpp." + "Llama(path)", "from llama_cpp " + "import Llama"])
def test_another_door_to_llama_cpp_is_caught(code):
    assert OPENS_LLAMA.search(code)


# ---- notebooks ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", NOTEBOOKS, ids=place)
def test_notebook_opens_with_title_and_answer(path):
    first = source(cells(path)[0])
    assert re.match(r"# \S.*\n+> \S", first), "the first cell is `# name`, then `> one sentence`"
    if module_of(path): assert first.splitlines()[0] == f"# {module_of(path).split('.')[-1]}"


def docstring_lines(node):
    "How many lines the docstring of a function or class has beyond its first: that is prose, not code."
    if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or not ast.get_docstring(node): return 0
    return node.body[0].end_lineno - node.body[0].lineno


def cell_faults(found):
    "What is wrong with the exported cells of a notebook: too long, or without a word or an output between two of them."
    faults, before = [], False
    for cell in found:
        text = source(cell)
        exported = cell["cell_type"] == "code" and EXPORT.search(text) is not None
        imports = exported and all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(text).body)
        lines = text.splitlines()
        prose = sum(docstring_lines(node) for node in ast.walk(ast.parse(text))) if exported else 0
        if exported and not imports and len(lines) - prose > CELL + 1: faults.append(f"{cell['id']}: {len(lines)} lines")
        if exported and before and not imports: faults.append(f"{cell['id']}: follows another exported cell without a sentence between")
        before = exported and not imports
    return faults


@pytest.mark.parametrize("path", NOTEBOOKS, ids=place)
def test_exported_cells_are_short_and_explained(path):
    assert not cell_faults(cells(path))


def test_a_bad_cell_is_caught():
    def cell(kind, *lines): return {"cell_type": kind, "id": "x", "source": [line + "\n" for line in lines]}
    short = cell("code", "#| export", "x = 1")
    assert not cell_faults([cell("code", "#| export", "import re"), short, cell("markdown", "Then:"), short])
    assert cell_faults([short, short])
    assert cell_faults([cell("code", "#| export", *["x = 1"] * (CELL + 1))])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=place)
def test_cells_are_not_wide(path):
    wide = [(cell["id"], line[:60]) for cell in cells(path) if cell["cell_type"] == "code" for line in source(cell).splitlines()
            if len(line) > WIDTH and not line.startswith("#| fig-alt")]
    assert not wide


@pytest.mark.parametrize("path", NOTEBOOKS, ids=place)
def test_cell_ids_are_readable_and_stable(path):
    ids = [cell["id"] for cell in cells(path)]
    stem = re.sub(r"^\d+_", "", path.stem)
    assert len(set(ids)) == len(ids)
    assert not [i for i in ids if not re.fullmatch(rf"{re.escape(stem)}-[a-z0-9-]+", i)], "write notebooks with tools/nb.py, or name new cells by hand"
    assert len(ids) <= 100


@pytest.mark.parametrize("path", NOTEBOOKS, ids=place)
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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=place)
def test_stored_outputs_are_small_and_the_same_everywhere(path):
    found = {cell["id"]: output_faults(cell["outputs"]) for cell in cells(path) if cell["cell_type"] == "code"}
    assert not {k: v for k, v in found.items() if v}
    assert "widgets" not in notebook(path)["metadata"]


@pytest.mark.parametrize("fault, output", {
    "error": {"output_type": "error", "traceback": []},
    "machine path": {"output_type": "stream", "text": ["wrote /" + "tmp/x.gguf"]},
    "picture of 64 KB": {"output_type": "display_data", "data": {"image/png": base64.b64encode(bytes(1 << 16)).decode()}},
}.items())
def test_a_bad_output_is_caught(fault, output):
    assert output_faults([output]) == [fault]
    assert output_faults([{"output_type": "stream", "text": ["4.5 bits, see llm_quantize/data/text\n"]}]) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=place)
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
    for package in {n.split("/")[0] for n in listed if re.search(r"/\d\d_", n)}:
        own = [n for n in listed if n.startswith(f"{package}/")]
        assert own == sorted(own)


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


# ---- tests -------------------------------------------------------------------------------------------------

def test_what_is_listed_as_slow_is_there():
    listed = (ROOT / "tests" / "slow.txt").read_text(encoding="utf-8").split()
    assert listed == sorted(set(listed))
    there = {file: text_of(ROOT / file) for file in {name.split("::")[0] for name in listed} if (ROOT / file).exists()}
    assert not [name for name in listed if f"def {name.split('::')[1]}(" not in there.get(name.split("::")[0], "")], (
        "take these lines out of tests/slow.txt")


@cache
def top_names():
    "Module -> the names it binds at its top."
    found = {}
    for path in MODULES:
        nodes = [node for top in tree_of(path).body for node in ast.walk(top)]
        bound = {node.name for node in nodes if isinstance(node, (*FUNCTIONS, ast.ClassDef))}
        bound |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        bound |= {alias.asname or alias.name for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
        found[dotted(path)] = bound
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_imports_what_there_is(path):
    taken = imports_of(text_of(path))
    assert not [f"{module}.{name}" for module, name in taken if name and name not in top_names().get(module, set())]


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


# ---- names -------------------------------------------------------------------------------------------------

def refused_names():
    "The names in the last column of the tables of the glossary."
    rows = [line for cell in cells(ROOT / "nbs" / "glossary.ipynb") for line in source(cell).splitlines() if line.startswith("| ")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row.strip().removesuffix("|").rsplit("|", 1)[-1])}


def public_names():
    "Names of modules, and the public ones that they define at their top, as lower case -> where."
    found = {}
    for path in MODULES:
        found.setdefault(path.stem, dotted(path))
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = [node] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else getattr(node, "targets", [])
            for target in targets:
                name = getattr(target, "name", getattr(target, "id", "_"))
                if not name.startswith("_"): found.setdefault(name.lower(), f"{dotted(path)}.{name}")
    return found


def test_no_public_name_is_one_that_the_glossary_refuses():
    refused, public = refused_names(), public_names()
    assert {"way", "encode_ahead", "recipes", "judgement"} <= refused
    assert {"quantize", "qtypes", "encode_tensor", "architectures"} <= public.keys()
    assert not {name: public[name] for name in refused & public.keys()}
