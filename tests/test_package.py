"The package as it goes to PyPI: what is in it, and that it runs from anywhere."
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory): # folder with a wheel and a source archive
    "Both, made from a copy of what git knows."
    folder, out = tmp_path_factory.mktemp("package") / "source", tmp_path_factory.mktemp("dist")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if not (ROOT / name).is_file(): continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    done = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def wheel(built):
    "The wheel, opened."
    [path] = built.glob("*.whl")
    with zipfile.ZipFile(path) as file: yield file


def read(wheel, ending): return wheel.read(next(name for name in wheel.namelist() if name.endswith(ending))).decode()


def test_pypi_will_take_it(built):
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("PASSED") == 2, done.stdout


def test_what_pypi_shows_needs_no_clone(wheel):
    links = re.findall(r"\]\(([^)\s]+)\)", read(wheel, "METADATA"))
    assert len(links) > 20
    assert any(link.endswith("nbs/images/frontier.png") for link in links)
    assert not [link for link in links if not link.startswith(("https://", "#"))]


def test_the_wheel_holds_every_module_of_every_package(wheel):
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "llm_quantize").rglob("*.py")}
    assert "llm_quantize/quants/qtypes.py" in modules
    assert modules <= set(wheel.namelist())


def test_the_wheel_holds_model_and_texts(wheel):
    data = {str(path.relative_to(ROOT)) for path in (ROOT / "llm_quantize" / "data").rglob("*") if path.is_file()}
    assert "llm_quantize/data/sample-4m/model.safetensors" in data
    assert data <= set(wheel.namelist())


def test_type_checkers_may_use_the_hints(wheel):
    assert "llm_quantize/py.typed" in wheel.namelist()


def test_the_wheel_holds_nothing_else(wheel):
    assert not [name for name in wheel.namelist() if not name.startswith("llm_quantize")]


def test_the_wheel_brings_the_command(wheel):
    assert "llm-quantize=llm_quantize.cli.main:main" in read(wheel, "entry_points.txt").replace(" ", "")


def test_the_version_is_that_of_the_package_and_of_the_newest_change(wheel):
    import llm_quantize
    version = re.search(r"^Version: (.*)", read(wheel, "METADATA"), re.M)[1]
    changes = re.findall(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert version == llm_quantize.__version__
    assert version == changes[0]


def test_the_wheel_runs_where_there_is_no_clone(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    code = "import sys, llm_quantize; from llm_quantize.cli.main import main; print(llm_quantize.__file__); sys.exit(main(sys.argv[1:]))"
    run = lambda *words: subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")})
    said = run("sample")
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith(str(tmp_path / "site"))
    assert run("quantize", "sample-4m", "gguf", "-q", "Q8_0").returncode == 0
    assert (tmp_path / "sample-4m-Q8_0.gguf").stat().st_size > 4e6
