"The sample model without and with protection of its super weights: several test files look at these files."
import pytest

from llm_quantize.api import quantize
from llm_quantize.calibration.analysis import cached_imatrix
from llm_quantize.models.checkpoint import sample_path
from llm_quantize.models.job import Job


@pytest.fixture(scope="session")
def imatrix():
    "Of the sample model, from 16 windows."
    return cached_imatrix(Job(sample_path()), calibration_samples=16)


@pytest.fixture(scope="session", params=["IQ1_S", "IQ2_XXS"])
def pair(request, imatrix, tmp_path_factory):
    "The same mix without and with protection."
    folder = tmp_path_factory.mktemp("pair")
    def make(name, protected):
        options = {"output_dir": folder, "output_name": name, "protect_super_weights": protected}
        return quantize(sample_path(), "gguf", request.param, imatrix=imatrix, **options)
    return make("without", False), make("with", True)
