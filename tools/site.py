"""Build the documentation from the notebooks on a machine without Quarto and without a network.

    python tools/site.py             notebooks -> Markdown -> static site in _docs; a broken link is an error (check_site.py)
    python tools/site.py --readme    nbs/index.ipynb -> README.md, nothing else

`_quarto.yml` says what the site holds and in which order, here as for Quarto. Notebooks go through nbdev's own processing first, so that the page of
a module documents what the module exports; an exported cell shows its source where it stands, under a heading for each name it defines
(`#| code-fold: true` folds it away). Prose keeps to what both renderers know: common Markdown, pipe tables, `$math$`, `::: {.callout-note}`.
"""
import argparse
import ast
import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS, BUILD, SITE = ROOT / "nbs", ROOT / "_site_src", ROOT / "_docs"
PAGES = BUILD / "pages"

CODE = r"^(?:`{3,}|~{3,}).*?^(?:`{3,}|~{3,})[ ]*$|`[^`\n]+`"
CALLOUT = re.compile(r"^:{3,} *\{\.callout-(\w+)[^}]*\}\n(.*?)^:{3,}[ ]*$", re.M | re.S)
MATH = re.compile(rf"({CODE})|(\\\$)|\$\$(.+?)\$\$|(?<![\\$\w])\$(?=\S)([^$\n]+?)(?<=\S)\$(?![\d\w])", re.M | re.S)
LINK = re.compile(r"\]\(((?:[\w./-]*/)?[\w.-]+\.ipynb)(#[\w.-]*)?\)")
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


# ---- prose ---------------------------------------------------------------------------------------------------------------------------------

def callout_parts(match: re.Match) -> tuple[str, str, str]: # (kind, title or "", text)
    "What a Quarto callout says: its first heading is its title."
    body = match[2].strip("\n")
    title = re.match(r"#+ (.*)\n", body)
    return match[1], title[1] if title else "", body[title.end():].strip("\n") if title else body


def site_callout(match: re.Match) -> str:
    "A Quarto callout as an admonition of Python-Markdown."
    kind, title, body = callout_parts(match)
    lines = [f"    {line}" if line else "" for line in body.split("\n")]
    return "\n".join([f'!!! {kind} "{title}"' if title else f"!!! {kind}", "", *lines, ""])


def github_callout(match: re.Match) -> str:
    "A Quarto callout as GitHub shows it in a README."
    kind, title, body = callout_parts(match)
    lines = [f"**{title}**", "", *body.split("\n")] if title else body.split("\n")
    return "\n".join([f"> [!{kind.upper()}]", *(f"> {line}".rstrip() for line in lines)])


def mathml(text: str) -> str:
    "TeX becomes MathML while building, so that a page needs no script from elsewhere; code is left alone."
    from latex2mathml.converter import convert

    def one(match: re.Match) -> str:
        if match[1]: return match[1]
        if match[2]: return "$"
        return convert((match[3] or match[4]).strip(), display="block" if match[3] else "inline").replace("\n", " ")
    return MATH.sub(one, text)


def relink(text: str, target) -> str: # target: notebook path as written -> new address
    "The same text with its links to notebooks pointing elsewhere."
    return LINK.sub(lambda match: f"]({target(match[1])}{match[2] or ''})", text)


# ---- cells ---------------------------------------------------------------------------------------------------------------------------------

def fenced(text: str, language: str = "") -> str:
    "A fenced block, with a fence longer than any inside it."
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"^`{3,}", text, re.M)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def directives(source: str) -> tuple[dict[str, str], str]: # (name -> value, the source without them)
    "The `#| name: value` lines of a code cell."
    found = {name: value.strip().strip('"') for name, value in re.findall(r"^#\| *([\w-]+):? *(.*)$", source, re.M)}
    return found, re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip("\n")


def widget_picture(nb: dict, model_id: str) -> bytes | None:
    "The first picture inside a saved widget, so that a static page shows something."
    state = nb["metadata"].get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    waiting = [model_id]
    while waiting:
        model = state.get(waiting.pop(0), {})
        if model.get("model_name") == "ImageModel":
            for buffer in model.get("buffers", []): return base64.b64decode(buffer["data"])
        waiting += [child.removeprefix("IPY_MODEL_") for child in model.get("state", {}).get("children", [])]
    return None


def output_markdown(output: dict, picture, nb: dict) -> str: # picture: bytes -> Markdown
    "One output of a cell, in the richest form a static page can show."
    data = {kind: value if isinstance(value, dict) else "".join(value) for kind, value in output.get("data", {}).items()}
    widget = data.get("application/vnd.jupyter.widget-view+json")
    frame = widget_picture(nb, widget["model_id"]) if widget else None
    if frame: return picture(frame) + "\n*A live widget in Jupyter; one frame of it here.*\n"
    if "text/markdown" in data: return re.sub(r"\A---\n", "", data["text/markdown"])  # nbdev puts a rule before each signature
    if "image/svg+xml" in data: return picture(data["image/svg+xml"].encode(), "svg")
    if "image/png" in data: return picture(base64.b64decode(data["image/png"]))
    if "text/html" in data: return "\n".join(line for line in data["text/html"].splitlines() if line.strip())
    text = data.get("text/plain") or "".join(output.get("text", ""))
    return fenced(ANSI.sub("", text), "{.text .output}") if text.strip() else ""


def merged_streams(outputs: list[dict]) -> list[dict]:
    "Outputs with neighbouring pieces of printed text joined; what went to stderr is dropped."
    joined = []
    for output in outputs:
        if output["output_type"] == "stream":
            if output.get("name") == "stderr": continue
            if joined and joined[-1]["output_type"] == "stream":
                joined[-1]["text"] += "".join(output["text"])
                continue
            output = {"output_type": "stream", "text": "".join(output["text"])}
        joined.append(output)
    return joined


def is_signature(cell: dict) -> bool:
    "Did nbdev (or the author) put this cell there to document an exported name?"
    return cell["cell_type"] == "code" and re.search(r"^show_doc\(", "".join(cell["source"]), re.M) is not None


def defined_names(code: str, signatures: list[str]) -> list[str]:
    "The names that nbdev documents for a cell, in the order in which the cell defines them."
    names = [name for text in signatures for name in re.findall(r"^### +(\w+)", text, re.M)[:1]]
    return sorted(names, key=lambda name: code.find(f"def {name}(") if f"def {name}(" in code else code.find(f"class {name}"))


def exported_markdown(code: str, signatures: list[str], folded: bool) -> list[str]:
    "An exported cell: a heading with the names it defines, then its source; folded away, the source stands under the signatures."
    if folded:
        block = "\n".join(f"    {line}" if line else "" for line in fenced(code, "python").split("\n"))
        return [*signatures, f'??? source "Source"\n\n{block}']
    names = defined_names(code, signatures)
    if not names: return [fenced(code, "python")]
    anchors = "".join(f'<a id="{name.lower()}"></a>' for name in names[1:])
    return [f"### {', '.join(names)} {{ #{names[0].lower()} }}\n\n{anchors}", fenced(code, "python")]


def body_markdown(nb: dict, prose, save) -> str: # prose: Markdown -> Markdown; save: (bytes, suffix) -> address of the picture
    "All cells of a notebook as Markdown."
    parts, heading, cells = [], "", list(nb["cells"])
    while cells:
        cell = cells.pop(0)
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(prose(source))
            heading = (re.findall(r"^#+ (.+)$", source, re.M) or [heading])[-1]
        if cell["cell_type"] != "code": continue
        options, code = directives(source)
        if options.keys() & {"hide", "default_exp"} or options.get("include") == "false": continue
        alt, caption = options.get("fig-alt") or options.get("fig-cap") or heading, f"\n*{options['fig-cap']}*\n" if "fig-cap" in options else ""

        def picture(data: bytes, suffix: str = "png") -> str:
            return f"![{alt}]({save(data, suffix)})\n{caption}"

        def shown(cell: dict) -> list[str]:
            return [output_markdown(output, picture, nb) for output in merged_streams(cell.get("outputs", []))]
        if cell["metadata"].get("exported"):
            signatures = []
            while cells and is_signature(cells[0]): signatures += shown(cells.pop(0))
            parts += exported_markdown(code, signatures, cell["metadata"]["exported"] == "folded")
        elif code.strip() and options.get("echo") != "false": parts.append(fenced(code, "python"))
        if options.get("output") != "false": parts += shown(cell)
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"


def front_matter(nb: dict) -> dict:
    "Title, description and output file that nbdev wrote on top of a processed notebook."
    raw = next(("".join(cell["source"]) for cell in nb["cells"] if cell["cell_type"] == "raw"), "")
    return yaml.safe_load(raw.strip().strip("-")) or {} if raw else {}


# ---- the site ------------------------------------------------------------------------------------------------------------------------------

def only_imports(source: str) -> bool:
    "Does a cell hold import statements and nothing else?"
    return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(source).body)


def processed(path: Path) -> dict:
    "A notebook after nbdev's processing, with the source of what it exports kept."
    from nbdev.process import read_nb
    from nbdev.processors import FilterDefaults, add_fold, mv_exports

    class KeepSource(FilterDefaults):
        def base_procs(self): return [proc for proc in super().base_procs() if proc not in (add_fold, mv_exports)]  # body_markdown does both
    nb = read_nb(path)
    for cell in nb.cells:
        if cell.cell_type != "code" or not re.search(r"^#\| *exports? *$", cell.source, re.M) or only_imports(cell.source): continue
        cell.source = re.sub(r"^#\| *export *$", "#| exports", cell.source, flags=re.M)
        cell.metadata["exported"] = "folded" if re.search(r"^#\| *code-fold: *true", cell.source, re.M) else "open"
    KeepSource()(nb)
    return nb


def site_settings() -> dict:
    "The `website` part of _quarto.yml."
    return yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]


def sidebar_notebooks(contents: list) -> list[str]:
    "Every notebook of the sidebar, in its order."
    return [name for item in contents for name in ([item] if isinstance(item, str) else [item["href"]] if "href" in item else sidebar_notebooks(item["contents"]))]


def site_notebooks() -> list[str]:
    "Every notebook of the project, relative to nbs/; those that start with an underscore are drafts."
    return sorted(str(path.relative_to(NOTEBOOKS)) for path in NOTEBOOKS.rglob("*.ipynb")
                  if not any(part.startswith((".", "_")) for part in path.relative_to(NOTEBOOKS).parts))


def page_address(notebook: str, nb: dict) -> str:
    "Where a notebook's page lies in the site, without its ending."
    return str(Path(notebook).with_name(front_matter(nb).get("output-file", Path(notebook).name)).with_suffix(""))


def write_page(notebook: str, nb: dict, addresses: dict[str, str], base: str) -> None:
    "Write the Markdown page of one notebook, and its pictures beside it."
    address, facts = addresses[notebook], front_matter(nb)
    page, folder = PAGES / f"{address}.md", PAGES / f"{address}_files"
    page.parent.mkdir(parents=True, exist_ok=True)

    def save(data: bytes, suffix: str) -> str:
        folder.mkdir(exist_ok=True)
        path = folder / f"{1 + len(list(folder.iterdir()))}.{suffix}"
        path.write_bytes(data)
        return f"{folder.name}/{path.name}"

    def target(link: str) -> str:
        there = os.path.normpath(Path(notebook).parent / link)
        if there not in addresses: raise SystemExit(f"nbs/{notebook} links to {link}, which is not in the sidebar of _quarto.yml")
        return os.path.relpath(PAGES / f"{addresses[there]}.md", page.parent)

    def prose(text: str) -> str:
        return relink(mathml(CALLOUT.sub(site_callout, text)), target)

    body = body_markdown(nb, prose, save)
    page_of = re.compile(rf"{re.escape(base)}/?([\w./-]+)\.html(#\w+)?[\w.]*")  # nbdev's links to a name; that of a method goes to its class
    body = page_of.sub(lambda match: os.path.relpath(PAGES / f"{match[1]}.md", page.parent) + (match[2] or ""), body)
    title, lead = facts.get("title", Path(address).name), facts.get("description", "")
    head = f"---\ntitle: {json.dumps(title)}\n---\n\n# {title}\n\n"
    page.write_text(head + (f"{prose(lead.strip())}\n{{ .lead }}\n\n" if lead else "") + body, encoding="utf-8")


def navigation(contents: list, addresses: dict[str, str], titles: dict[str, str]) -> list:
    "The sidebar as mkdocs wants it."
    def entry(item: str | dict) -> dict:
        if isinstance(item, str): return {titles[item]: f"{addresses[item]}.md"}
        if "href" in item: return {item["text"]: f"{addresses[item['href']]}.md"}
        return {item["section"]: navigation(item["contents"], addresses, titles)}
    return [entry(item) for item in contents]


def mkdocs_settings(website: dict, nav: list) -> dict:
    "Settings of the site: no fonts, scripts or pictures from elsewhere, and no link that leads nowhere."
    def palette(scheme: str, preference: str, icon: str, name: str) -> dict:
        return {"media": f"(prefers-color-scheme: {preference})", "scheme": scheme, "primary": "indigo", "accent": "indigo", "toggle": {"icon": f"material/{icon}", "name": name}}
    return {
        "site_name": website["title"], "site_description": website["description"],
        "docs_dir": PAGES.name, "site_dir": f"../{SITE.name}", "use_directory_urls": False, "nav": nav,
        "theme": {"name": "material", "font": False, "features": ["navigation.sections", "navigation.footer", "navigation.top", "content.code.copy", "toc.follow"],
                  "palette": [palette("default", "light", "weather-night", "Dark"), palette("slate", "dark", "weather-sunny", "Light")]},
        "extra_css": ["styles.css"], "plugins": ["material/search"],
        "validation": {"omitted_files": "warn", "absolute_links": "warn", "unrecognized_links": "warn", "anchors": "warn"},
        "markdown_extensions": ["admonition", "attr_list", "tables", "md_in_html", "sane_lists", "pymdownx.details", {"toc": {"permalink": True}}, "pymdownx.superfences",
                                {"pymdownx.highlight": {"use_pygments": True}}],
    }


def build_site() -> int: # exit status
    "Process the notebooks, write the pages, let mkdocs make the site."
    os.chdir(ROOT)
    website = site_settings()
    listed = sidebar_notebooks(website["sidebar"]["contents"])
    forgotten = sorted(set(site_notebooks()) - set(listed))
    if forgotten: raise SystemExit(f"not in the sidebar of _quarto.yml: {', '.join(forgotten)}")
    absent = [name for name in listed if not (NOTEBOOKS / name).exists()]
    if absent: raise SystemExit(f"in the sidebar of _quarto.yml but not in nbs/: {', '.join(absent)}")
    shutil.rmtree(BUILD, ignore_errors=True)
    PAGES.mkdir(parents=True)
    shutil.copy(NOTEBOOKS / "styles.css", PAGES)
    for folder in ("images", "pages"): shutil.copytree(NOTEBOOKS / folder, PAGES / folder)
    notebooks = {name: processed(NOTEBOOKS / name) for name in listed}
    addresses = {name: page_address(name, nb) for name, nb in notebooks.items()}
    titles = {name: front_matter(nb).get("title", Path(name).stem) for name, nb in notebooks.items()}
    for name, nb in notebooks.items(): write_page(name, nb, addresses, website["site-url"].rstrip("/"))
    settings = mkdocs_settings(website, navigation(website["sidebar"]["contents"], addresses, titles))
    (BUILD / "mkdocs.yml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    failed = subprocess.call([sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", str(BUILD / "mkdocs.yml")],
                             env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    return failed or subprocess.call([sys.executable, str(ROOT / "tools" / "check_site.py"), str(SITE)])


# ---- the README ----------------------------------------------------------------------------------------------------------------------------

def readme_text() -> str:
    "README.md, made from nbs/index.ipynb as it is stored."
    nb = json.loads((NOTEBOOKS / "index.ipynb").read_text(encoding="utf-8"))

    def save(data: bytes, suffix: str) -> str:
        raise SystemExit("a picture in nbs/index.ipynb has to be a file in the repository, linked from a text cell")
    here = f"{site_settings()['repo-url']}/blob/main/"

    def prose(text: str) -> str:
        text = relink(CALLOUT.sub(github_callout, text), lambda link: f"nbs/{link}").replace(f"]({here}", "](")
        return re.sub(r"(!\[[^\]]*\]\()(?!https?:)", r"\1nbs/", text)
    body = body_markdown(nb, prose, save)
    return "<!-- made from nbs/index.ipynb by `python tools/site.py --readme` -->\n\n" + body.replace("{.text .output}", "text")


def main() -> int: # exit status
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true", help="write README.md from nbs/index.ipynb and stop")
    if not parser.parse_args().readme: return build_site()
    (ROOT / "README.md").write_text(readme_text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
