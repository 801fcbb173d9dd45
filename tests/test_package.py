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


def test_pypi_will_take_it(built):
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout


def test_what_pypi_shows_needs_no_clone(built):
    [wheel] = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as file: text = file.read(next(n for n in file.namelist() if n.endswith("METADATA"))).decode()
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert any(link.endswith("nbs/images/frontier.png") for link in links) and len(links) > 20
    assert not [link for link in links if not link.startswith(("https://", "#"))]


def test_the_wheel_holds_model_texts_and_command(built):
    [wheel] = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        points = file.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    modules = {f"llm_quantize/{p.name}" for p in (ROOT / "llm_quantize").glob("*.py")}
    data = {str(p.relative_to(ROOT)) for p in (ROOT / "llm_quantize" / "data").rglob("*") if p.is_file()}
    assert modules | data <= names and "llm_quantize/data/sample-4m/model.safetensors" in data
    assert "llm-quantize=llm_quantize.cli.main:main" in points.replace(" ", "") and not [n for n in names if n.startswith(("tests/", "nbs/", "benchmarks/"))]


def test_the_wheel_runs_where_there_is_no_clone(built, tmp_path):
    [wheel] = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as file: file.extractall(tmp_path / "site")
    code = "import sys, llm_quantize; from llm_quantize.cli.main import main; print(llm_quantize.__file__); sys.exit(main(sys.argv[1:]))"
    run = lambda *words: subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")})
    said = run("sample")
    assert said.returncode == 0 and said.stdout.startswith(str(tmp_path / "site")), said.stderr
    assert run("quantize", "sample-4m", "gguf", "-q", "Q8_0").returncode == 0 and (tmp_path / "sample-4m-Q8_0.gguf").stat().st_size > 4e6
