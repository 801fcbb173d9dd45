"Fixtures that several test files need."
from pathlib import Path

import pytest

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
