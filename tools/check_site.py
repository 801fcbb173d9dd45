"""Look at every page of the built site as a reader would: does each link arrive, does each picture show, does nothing come from elsewhere?

    python tools/check_site.py [FOLDER]    default: _docs; prints what is wrong, and exits with 1 if anything is
"""
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

MACHINE_PATH = re.compile(r"(?<![\w./~-])/(?:home|root|tmp|var/tmp|Users|mnt|private)/[\w.-]+[\w./-]*")
DEAD_WIDGET = re.compile(r"application/vnd\.jupyter\.widget-view|VBox\(children=|HBox\(children=|\bIPY_MODEL_|<ipywidgets\.")
LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href", "object": "data"}


class Page(HTMLParser):
    "Links, anchors, pictures and text of a page."
    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.links, self.loaded, self.anchors, self.nameless, self.words, self.skipped = [], [], set(), [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if "id" in found: self.anchors.add(found["id"])
        if tag == "a" and "name" in found: self.anchors.add(found["name"])
        if tag == "a" and found.get("href"): self.links.append(found["href"])
        address = found.get(LOADING.get(tag, ""))
        if address and not (tag == "link" and found.get("rel") in ("canonical", "next", "prev")): self.loaded.append(address)
        if tag == "img" and not (found.get("alt") or "").strip(): self.nameless.append(address or "")
        if tag in ("script", "style"): self.skipped += 1

    def handle_endtag(self, tag):
        if tag in ("script", "style"): self.skipped -= 1

    def handle_data(self, data):
        if not self.skipped: self.words.append(data)


def problems(folder: Path) -> list[str]:
    "What is wrong with the pages of a site, a line each."
    folder, pages = folder.resolve(), {}
    for path in sorted(folder.rglob("*.html")): pages[path] = Page(path.read_text(encoding="utf-8"))
    out = []
    for path, page in pages.items():
        name = path.relative_to(folder)
        if path.name == "404.html": continue # its addresses are absolute, for it is shown at any depth
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc: continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if there.is_dir(): there = there / "index.html"
            if not there.exists(): out.append(f"{name}: {link} leads nowhere")
            elif parts.fragment and there in pages and unquote(parts.fragment) not in pages[there].anchors: out.append(f"{name}: {link} has no such place")
        out += [f"{name}: {address} comes from elsewhere" for address in page.loaded if urlsplit(address).netloc]
        out += [f"{name}: a picture without a description, {address[:60]}" for address in page.nameless]
        text = "".join(page.words)
        out += [f"{name}: a path of a machine, {found}" for found in sorted(set(MACHINE_PATH.findall(text)))]
        if DEAD_WIDGET.search(text): out.append(f"{name}: a widget that is dead without a kernel, {DEAD_WIDGET.search(text)[0]}")
    return out if pages else [f"no page in {folder}"]


def main() -> int: # exit status
    found = problems(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "_docs"))
    for line in found: print(line)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
