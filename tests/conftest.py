"Fixtures that several test files need, and the marks by which `make quick` chooses."
import ast
import os
from functools import cache
from pathlib import Path

# Tests that run side by side share the processor: before torch is imported, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))))

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
SLOW = frozenset((ROOT / "tests" / "slow.txt").read_text(encoding="utf-8").split("\n"))
LLAMA = {"llama_cpp", "llama.cpp", "open_llama", "import_llama_cpp"}


@cache
def llama_users(path: Path) -> frozenset:
    "The functions, classes and fixtures of a test file that run llama.cpp, themselves or through each other."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    words = {}  # name of a function -> the names, parameters and whole strings in it
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)): continue
        parts = list(ast.walk(node))
        words[node.name] = ({n.id for n in parts if isinstance(n, ast.Name)} | {n.arg for n in parts if isinstance(n, ast.arg)}
                            | {str(n.value) for n in parts if isinstance(n, ast.Constant)})
    users, size = set(LLAMA), 0
    while size != len(users):
        size = len(users)
        users |= {name for name, own in words.items() if own & users}
    return frozenset(users)


def pytest_collection_modifyitems(items):
    "Mark as `slow` what slow.txt lists, and as `llama` what runs llama.cpp."
    for item in items:
        if not isinstance(item, pytest.Function): continue
        if f"{item.path.relative_to(ROOT)}::{item.originalname}" in SLOW: item.add_marker(pytest.mark.slow)
        if item.originalname in llama_users(item.path): item.add_marker(pytest.mark.llama)


@pytest.fixture(autouse=True)
def checkpoints_apart(tmp_path_factory, monkeypatch):
    "Tests that run side by side do not keep finished layers in one ./.checkpoint."
    monkeypatch.setenv("LLM_QUANTIZE_CHECKPOINT_DIR", str(tmp_path_factory.mktemp("checkpoints")))


@pytest.fixture(scope="session")
def root() -> Path:
    "The root of the repository."
    return ROOT


@pytest.fixture(scope="session")
def sample_model() -> Path:
    "The directory of the bundled sample model."
    return ROOT / "llm_quantize" / "data" / "sample-4m"


@pytest.fixture(scope="session")
def shared_model():
    "A function: the directory of a model in ../shared/models, or a skip that names it."
    def find(name: str) -> Path:
        path = SHARED / "models" / name
        if not path.is_dir(): pytest.skip(f"needs the model ../shared/models/{name} beside the repository")
        return path
    return find
