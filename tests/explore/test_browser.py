"""The explorers in a real browser: as widgets in JupyterLab, and as pages opened from a file.

Needs Chromium (`apt-get install chromium`, or its path in CHROMIUM) and the Python package playwright, which `make test` installs.
"""
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NEEDED = "the explorers were not looked at in a browser: needs {}"
WAIT = 20_000  # milliseconds for a picture to follow its control


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason=NEEDED.format("playwright (pip install playwright)"))
    if CHROMIUM is None: pytest.skip(NEEDED.format("Chromium (apt-get install chromium, or its path in CHROMIUM)"))
    with api.sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        yield found
        found.close()


@contextmanager
def page(browser, **options):
    "A page that remembers what went wrong in it and what it asked for."
    context = browser.new_context(**options)
    opened = context.new_page()
    opened.errors, opened.requests = [], []
    opened.on("pageerror", lambda error: opened.errors.append(str(error)))
    opened.on("console", lambda message: opened.errors.append(message.text) if message.type == "error" else None)
    opened.on("request", lambda request: opened.requests.append(request.url))
    try: yield opened
    finally: context.close()


def changes(opened, picture, action):
    "Do something that must change what is drawn there; a picture that stays is an AssertionError."
    from playwright.sync_api import TimeoutError
    before = opened.locator(picture).first.inner_html()
    action()
    try: opened.wait_for_function("([css, old]) => document.querySelector(css).innerHTML !== old", arg=[picture, before], timeout=opened.patience)
    except TimeoutError: raise AssertionError(f"{picture} did not follow its control") from None


# ---- pages -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pages(browser, tmp_path_factory):
    "The three explorers as files."
    from results import EXPLORERS
    folder = tmp_path_factory.mktemp("pages")
    return {name: make().to_html(folder / f"{name}.html") for name, make in EXPLORERS.items()}


def picture(name): return f".lq-panel.lq-{name} .lq-picture"


def check_importance(opened):
    for css, option, panels in (("statistic", "max", ["map"]), ("tensor", "attn_q", ["map", "channels", "sorted", "numbers"])):
        for panel in panels[:1]: changes(opened, picture(panel), lambda: opened.select_option(f".lq-{css} select", label=option))
    changes(opened, picture("channels"), lambda: opened.locator(".lq-layer input").press("ArrowRight"))
    assert opened.locator(".lq-layer output").inner_text() == "1" and "blk.1.attn_q.weight" in opened.locator(f"{picture('numbers')}").inner_text()
    assert opened.locator(f"{picture('map')} svg").count() == 2
    changes(opened, picture("map"), lambda: opened.locator(".lq-matrix input").nth(1).uncheck())
    assert opened.locator(f"{picture('map')} svg").count() == 1
    changes(opened, picture("channels"), lambda: opened.locator(f"{picture('map')} rect.pick").nth(3 * 3 + 1).click())  # ffn_down of block 1
    assert opened.locator(".lq-tensor select").evaluate("s => s.options[s.selectedIndex].text") == "ffn_down"
    assert "column 300" in opened.locator(picture("channels")).inner_text() and "super weight in row 7" in opened.locator(picture("map")).inner_html()


def check_allocation(opened):
    sizes = []
    for _ in range(3):
        changes(opened, picture("types"), lambda: opened.locator(".lq-target input").press("ArrowLeft"))
        sizes.append(opened.locator(f"{picture('facts')} td").nth(1).inner_text())
    assert len(set(sizes)) == 3
    changes(opened, picture("curve"), lambda: opened.select_option(".lq-rules select", label="free"))
    assert opened.locator(f"{picture('types')} svg").get_attribute("aria-label").startswith("types by block")


def check_quality(opened):
    for panel in ("tradeoff", "spread", "layers"): assert opened.locator(f"{picture(panel)} svg[role=img]").count() == (3 if panel == "layers" else 1)
    changes(opened, picture("spread"), lambda: opened.locator(".lq-models input").first.uncheck())
    changes(opened, picture("layers"), lambda: opened.select_option(".lq-error select", label="relative_error"))
    changes(opened, picture("text"), lambda: opened.select_option(".lq-reader select", label="Q2_K"))
    token = opened.locator(f"{picture('text')} .t").first
    assert opened.locator(f"{picture('text')} .t[tabindex='0']").count() == 1
    token.focus()
    for key in ("ArrowRight", "ArrowRight"): opened.keyboard.press(key)
    assert "<b>&" in opened.locator(f"{picture('text')} .t:focus .tip").inner_text() and opened.locator(".tip:visible").count() == 1


CHECKS = {"importance": check_importance, "allocation": check_allocation, "quality": check_quality}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", CHECKS)
def test_a_page_follows_its_controls_and_asks_for_nothing(browser, pages, name, scheme):
    with page(browser, color_scheme=scheme, viewport={"width": 1000, "height": 900}) as opened:
        opened.patience = WAIT
        opened.goto(pages[name].as_uri())
        CHECKS[name](opened)
        assert opened.requests == [pages[name].as_uri()] and opened.errors == []
        dark = opened.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        assert dark == (scheme == "dark")
        assert opened.locator("svg[role=img]:not([aria-label])").count() == 0 and not opened.locator("svg[role=img][aria-label='']").count()


def test_every_control_of_a_page_is_reached_by_the_tab_key(browser, pages):
    with page(browser) as opened:
        opened.goto(pages["importance"].as_uri())
        seen = []
        for _ in range(5):
            opened.keyboard.press("Tab")
            seen.append(opened.evaluate("document.activeElement.closest('[class^=lq-]').className"))
        assert seen == ["lq-matrix", "lq-matrix", "lq-statistic", "lq-layer", "lq-tensor"]


def test_a_page_fits_a_telephone(browser, pages):
    with page(browser, viewport={"width": 360, "height": 740}) as opened:
        for path in pages.values():
            opened.goto(path.as_uri())
            assert opened.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize("old, new", [("input.addEventListener(", "(() => {})("), ("if (p.depends.includes(name)", "if (p.name === name")], ids=["deaf controls", "panels not drawn"])
def test_a_dead_page_is_caught(browser, pages, tmp_path, old, new):
    text = pages["importance"].read_text(encoding="utf-8")
    assert old in text
    dead = tmp_path / "dead.html"
    dead.write_text(text.replace(old, new).replace("; script-src 'sha256-", "; script-src 'unsafe-inline' 'x-"), encoding="utf-8")
    with page(browser) as opened:
        opened.patience = 1500
        opened.goto(dead.as_uri())
        assert opened.errors == [] or "x-" in opened.errors[0]
        with pytest.raises(AssertionError, match="did not follow"): check_importance(opened)


def test_a_page_runs_no_script_but_its_own(browser, pages, tmp_path):
    text = pages["quality"].read_text(encoding="utf-8")
    changed = tmp_path / "changed.html"
    changed.write_text(text.replace("</main>", "</main><script>document.title = 'taken over'</script>"), encoding="utf-8")
    with page(browser) as opened:
        opened.goto(changed.as_uri())
        assert opened.title() == "Quality" and any("Content Security Policy" in error for error in opened.errors)


# ---- widgets in JupyterLab -----------------------------------------------------------------------------------

@contextmanager
def jupyter_lab(folder, private):
    "A throw-away JupyterLab on this machine: address and token."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, settings = secrets.token_hex(16), private / "settings"
    for where, what in (("apputils-extension/notification", {"fetchNews": "false", "checkForUpdates": False}), ("notebook-extension/tracker", {"windowingMode": "none"})):
        path = settings / "@jupyterlab" / f"{where}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(what), encoding="utf-8")
    own = {f"JUPYTER_{what}_DIR": str(private / what.lower()) for what in ("CONFIG", "DATA", "RUNTIME")} | {"JUPYTERLAB_SETTINGS_DIR": str(settings), "JUPYTERLAB_WORKSPACES_DIR": str(private / "spaces")}
    environment = {**os.environ, **own, "IPYTHONDIR": str(private / "ipython"), "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "explore")])}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip", "127.0.0.1", "--port", str(port), "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}"]
    with open(private / "lab.log", "w", encoding="utf-8") as log: server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(120):
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token={token}", timeout=2).close()
            except OSError: time.sleep(0.5)
            else: break
            assert server.poll() is None, (private / "lab.log").read_text(encoding="utf-8")[-2000:]
        yield f"http://127.0.0.1:{port}", token
    finally:
        server.terminate()
        server.wait(20)


def run_all(opened, address, notebook, seconds):
    "Open a notebook, run all its cells, wait until the last has printed its word."
    base, token = address
    opened.goto(f"{base}/lab/tree/{notebook}?reset&token={token}")
    opened.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=60_000)
    opened.add_locator_handler(opened.locator(".jp-Dialog"), lambda: opened.locator(".jp-Dialog .jp-mod-accept").click())
    opened.locator("#jp-main-statusbar", has_text="| Idle").wait_for(timeout=60_000)
    assert opened.locator(".lq-explorer").count() == 0
    opened.get_by_role("menuitem", name="Run", exact=True).click()
    opened.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()
    opened.locator(".jp-OutputArea-output", has_text="all cells have run").wait_for(timeout=1000 * seconds)
    assert opened.locator("[data-mime-type='application/vnd.jupyter.error'], [data-mime-type='application/vnd.jupyter.stderr']").count() == 0


def notebook_of(path, cells):
    "Write a notebook: sources of code cells, then one that says it is over."
    cells = [{"cell_type": "code", "id": f"c{k}", "metadata": {}, "outputs": [], "execution_count": None, "source": source} for k, source in enumerate([*cells, "print('all cells', 'have run')"])]
    path.write_text(json.dumps({"cells": cells, "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")
    return path.name


def sources(notebook):
    "The code of a notebook of the project, without the cells that write into the project: its export, and pages for the site."
    cells = json.loads((ROOT / "nbs" / notebook).read_text(encoding="utf-8"))["cells"]
    return [text for cell in cells if cell["cell_type"] == "code" and not re.search(r"nbdev_export|pages/", text := "".join(cell["source"]))]


def move_every_control(opened, moves):
    "explorer, control, what to do with it, the panel that must follow."
    for explorer, control, kind, value, panel in moves:
        root, shown = f".lq-explorer.lq-{explorer}", f".lq-explorer.lq-{explorer} .lq-panel.lq-{panel}"
        target = opened.locator(f"{root} .lq-{control} {'.noUi-handle' if kind == 'slide' else 'select'}").first
        target.scroll_into_view_if_needed()
        changes(opened, shown, (lambda: target.press(value)) if kind == "slide" else (lambda: target.select_option(label=value)))


MOVES = [("importance", "statistic", "pick", "entropy_normalized", "map"), ("importance", "layer", "slide", "ArrowRight", "channels"), ("importance", "tensor", "pick", "attn_q", "sorted"),
         ("importance", "matrix", "many", ["first"], "map"), ("allocation", "target", "slide", "ArrowLeft", "types"), ("allocation", "rules", "pick", "free", "curve"),
         ("quality", "models", "many", ["Q8_0", "Q4_K_M"], "spread"), ("quality", "error", "pick", "relative_error", "layers"), ("quality", "reader", "pick", "Q4_K_M", "text")]


@pytest.mark.slow
def test_widgets_follow_their_controls_in_jupyterlab(browser, tmp_path):
    pytest.importorskip("jupyterlab", reason=NEEDED.format("jupyterlab (pip install 'llm_quantize[widgets]')"))
    folder, private = tmp_path / "notebooks", tmp_path / "private"
    for made in (folder, private): made.mkdir()
    real = notebook_of(folder / "explore.ipynb", sources("explore/04_views.ipynb"))
    dead = notebook_of(folder / "dead.ipynb", ["from results import importance\nfound = importance()", "found.live._draw = lambda name: None\nfound"])
    with jupyter_lab(folder, private) as address:
        with page(browser, viewport={"width": 1400, "height": 1800}) as opened:
            opened.patience = WAIT
            run_all(opened, address, real, seconds=240)
            move_every_control(opened, MOVES)
            token = opened.locator(".lq-explorer .lq-text .t").nth(5)
            token.hover()
            assert "original:" in token.locator(".tip").inner_text() and token.locator(".tip").is_visible()
            assert opened.locator(".lq-explorer figure svg[role=img]:not([aria-label])").count() == 0
            if os.environ.get("LQ_PICTURES"): opened.screenshot(path=Path(os.environ["LQ_PICTURES"]) / "lab.png")
            assert not [error for error in opened.errors if "favicon" not in error]
        with page(browser, viewport={"width": 1400, "height": 1800}) as opened:
            opened.patience = 2000
            run_all(opened, address, dead, seconds=60)
            with pytest.raises(AssertionError, match="did not follow"): move_every_control(opened, MOVES[:1])
