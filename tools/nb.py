"""Write notebooks from text, run them, and turn them back into text.

    python tools/nb.py write TEXT.py nbs/NN_name.ipynb    percent-format text -> notebook, executed, cleaned, exported
    python tools/nb.py text nbs/NN_name.ipynb [TEXT.py]   the way back, to edit in a plain editor
    python tools/nb.py run nbs/*.ipynb                    execute in place, keep the outputs, clean

The notebook is the source; the text is a way to edit it. Cell ids come from what a cell defines or says, so that a small edit makes a small diff.
"""
import argparse, re, sys, time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbdev.clean import clean_nb
from nbdev.export import nb_export

KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def cell_id(cell, stem, taken):
    "A readable id: the first name a cell defines, the words of its heading, or its first words."
    source = cell.source
    found = (re.search(r"^(?:class|def)\s+(\w+)", source, re.M) or re.search(r"^#+\s+(.+)$", source, re.M) if cell.cell_type == "markdown" or "#| export" in source
             else None)
    lines = [l for l in source.splitlines() if l.strip() and not l.startswith("#|")]
    words = found[1] if found else lines[0] if lines else cell.cell_type
    slug = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")[:28].strip("-") or "cell"
    base = f"{stem}-{slug}"[:58]
    name, k = base, 2
    while name in taken:
        name, k = f"{base}-{k}", k + 1
    taken.add(name)
    return name


def name_cells(nb, path):
    stem, taken = re.sub(r"^\d+_", "", path.stem), set()
    for cell in nb.cells:
        cell["id"] = cell_id(cell, stem, taken)


def execute(nb, folder, timeout, slow=False):
    """Run the cells and keep what they print. Cells marked `#| eval: false` are left out; so are those marked `#| slow`,
    which keep the outputs they have, unless `slow`."""
    def left_out(cell):
        return cell.cell_type == "code" and re.search(r"^#\|\s*eval:\s*false" + ("" if slow else r"|^#\|\s*slow"), cell.source, re.M)
    kept = {cell["id"]: (cell.source, cell.outputs) for cell in nb.cells if left_out(cell)}
    for cell in nb.cells:
        if cell["id"] in kept: cell.source = ""
    try:
        NotebookClient(nb, timeout=timeout, store_widget_state=False, coalesce_streams=True, resources={"metadata": {"path": str(folder)}}).execute()
    finally:
        for cell in nb.cells:
            if cell["id"] in kept: cell.source, cell.outputs = kept[cell["id"]]


def finish(nb, path, run, timeout, slow=False):
    start = time.time()
    if run: execute(nb, path.parent, timeout, slow)
    nb.metadata = nbformat.from_dict(KERNEL)
    clean_nb(nb)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(nbformat.writes(nb, version=4).rstrip("\n") + "\n", encoding="utf-8")
    if any("#| default_exp" in c.source for c in nb.cells): nb_export(path)
    print(f"{path}  {len(nb.cells)} cells  {time.time() - start:.1f} s", file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["write", "text", "run"])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--no-run", action="store_true", help="write without executing")
    parser.add_argument("--slow", action="store_true", help="run the cells marked `#| slow` as well")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for one cell")
    args = parser.parse_args()
    if args.verb == "write":
        text, path = args.files
        nb = jupytext.read(text, fmt="py:percent")
        nb = nbformat.from_dict({**nb, "nbformat": 4, "nbformat_minor": 5})
        name_cells(nb, path)
        finish(nb, path, not args.no_run, args.timeout, args.slow)
    elif args.verb == "text":
        text = jupytext.writes(nbformat.read(args.files[0], 4), fmt="py:percent")
        if len(args.files) > 1: args.files[1].write_text(text, encoding="utf-8")
        else: print(text)
    else:
        for path in args.files:
            finish(nbformat.read(path, 4), path, not args.no_run, args.timeout, args.slow)


if __name__ == "__main__":
    main()
