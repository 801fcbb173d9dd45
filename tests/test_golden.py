"""The sample model comes out as it always did, to the byte.

`tests/data/golden.json` holds what version 0.1.0 wrote, before the house was rebuilt; `tests/data/README.md` says how it was made.

The GGUF files are the same on every x86-64 processor, with and without AVX2 and AVX-512, on any number of threads: seen on AMD and Intel. For that, `golden.round_alike`
computes in float64 what torch leaves to MKL, for MKL's square roots differ between the two. W8A8 depends on more: the last digits of its scales are what they were
only on an AMD processor with AVX2. Elsewhere the sums of its codes and of its scales are compared.
"""
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests import golden

WANTED = json.loads((golden.DATA / "golden.json").read_text(encoding="utf-8"))
ROOT = Path(__file__).resolve().parents[1]
ANYWHERE = ("Q8_0", "Q4_K_M", "Q2_K", "IQ1_S", "dynamic")  # whatever the processor
ONLY_ON_AMD = ("W8A8",)
RUNS_THE_MODEL = ("dynamic", "W8A8")  # and takes its time

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"),
    reason="the files to compare with were made on x86-64; other processors add in another order")


def made_by_amd():
    path = Path("/proc/cpuinfo")
    return path.exists() and "AuthenticAMD" in path.read_text(encoding="utf-8")


def made(names):
    "What the given levels make now: name -> digest, by a process of its own."
    done = subprocess.run([sys.executable, "-m", "tests.golden", *names], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, **golden.SETTINGS})
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.fixture(scope="module")
def encoded(): return made([name for name in golden.LEVELS if name not in RUNS_THE_MODEL])


@pytest.fixture(scope="module")
def measured(): return made(RUNS_THE_MODEL)


def test_the_list_is_whole():
    assert set(WANTED) == set(golden.LEVELS) == {*ANYWHERE, *ONLY_ON_AMD}


@pytest.mark.parametrize("name", [name for name in ANYWHERE if name not in RUNS_THE_MODEL])
def test_a_file_is_what_it_was(name, encoded):
    assert encoded[name] == WANTED[name], f"{name} of the sample model has other bytes than before"


@pytest.mark.slow
def test_a_measured_mix_is_what_it_was(measured):
    assert measured["dynamic"] == WANTED["dynamic"], "dynamic: the sample model has other bytes than before"


@pytest.mark.slow
def test_an_int8_directory_is_what_it_was(measured):
    if made_by_amd(): assert measured["W8A8"]["sha256"] == WANTED["W8A8"]["sha256"], "W8A8: other weights than before"
    assert measured["W8A8"]["totals"] == pytest.approx(WANTED["W8A8"]["totals"], rel=2e-4), "W8A8: other sums than before"


def test_one_bit_shows(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(bytes(1000))
    file, folder = golden.digest(tmp_path / "a.safetensors"), golden.digest(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(bytes(999) + b"\1")
    assert golden.digest(tmp_path / "a.safetensors") != file
    assert golden.digest(tmp_path) != folder
