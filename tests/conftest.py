"Fixtures that several test files need."
import os
from pathlib import Path

# Tests that run side by side share the processor: before torch is imported, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))))

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


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
