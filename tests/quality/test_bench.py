"The bench: what is made once, what is refused early, what gives its memory back."
import pytest

from llm_quantize.api import quantize
from llm_quantize.errors import ArgumentError, CalibrationError
from llm_quantize.models.checkpoint import open_checkpoint
from llm_quantize.quality import bench as room
from llm_quantize.quality.bench import Bench, Setting, reports
from llm_quantize.quality.coherence import bundled_prompts
from llm_quantize.quality.evaluate import quality_report


@pytest.fixture(scope="module")
def files(sample_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return [quantize(sample_model, "gguf", level, output_dir=folder).output_path for level in ("Q8_0", "Q2_K")]


@pytest.fixture
def counted(monkeypatch):
    "How often the original was loaded, the text read, and a model spoken with; the real functions run."
    counts = {}
    def counting(name):
        real = getattr(room, name)
        def call(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return real(*args, **kwargs)
        monkeypatch.setattr(room, name, call)
    for name in ("load_float", "windows", "load_tokenizer", "continuations"): counting(name)
    return counts


def test_the_original_is_loaded_once_and_asked_once(sample_model, files, counted):
    bench, prompts = Bench(sample_model, Setting(samples=2, device="cpu")), bundled_prompts()[:2]
    assert counted == {}, "nothing is made before it is asked for"
    for path in files:
        with bench.load(bench.open(path)) as loaded:
            bench.report(loaded)
            bench.coherence(loaded, prompts)
    assert counted == {"load_float": 1, "windows": 1, "load_tokenizer": 1, "continuations": 2}


def test_several_in_one_pass_are_what_they_are_alone(sample_model, files):
    one = Bench(sample_model, Setting(samples=2, device="cpu"))
    two = Bench(sample_model, Setting(samples=2, device="cpu", together=2))
    alone, steps = [], []
    for path in files:
        with one.load(one.open(path)) as loaded: alone.append(one.report(loaded).metrics)
    together = reports(two, [two.open(path) for path in files], lambda *step: steps.append(step))
    assert [report.metrics for report in together] == alone
    assert alone[0].kld_mean < alone[1].kld_mean and steps == [(1, 2), (2, 2)]


def test_a_loaded_model_gives_its_memory_back(sample_model, files):
    bench = Bench(sample_model, Setting(samples=1, device="cpu"))
    with bench.load(bench.open(files[0])) as loaded:
        bench.scores([loaded], windows=1)
        assert "module" in vars(loaded)
    assert "module" not in vars(loaded)


def test_an_opened_checkpoint_is_as_good_as_a_path(sample_model):
    checkpoint = open_checkpoint(sample_model)
    found = quality_report(checkpoint, checkpoint, calibration_samples=1)
    assert found.metrics.kld_max == 0 and found.quantized_model == checkpoint.name


@pytest.mark.parametrize("setting, error", [({"backend": "onnx"}, ArgumentError), ({"text": "nowhere.txt"}, CalibrationError)])
def test_what_cannot_be_is_refused_before_a_model_is_loaded(setting, error, sample_model, files, counted):
    with pytest.raises(error):
        bench = Bench(sample_model, Setting(**setting))
        with bench.load(bench.open(files[0])) as loaded: bench.report(loaded)
    assert "load_float" not in counted
