"One model at work: what is known of it is made once, and a whole run opens, reads and tokenises no more than it must."
import sys
from collections import Counter
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from llm_quantize.api import quantize
from llm_quantize.calibration.text import text_of, tokenizer_of
from llm_quantize.errors import ArgumentError
from llm_quantize.gguf.plan import metadata_of
from llm_quantize.models.checkpoint import Checkpoint, open_checkpoint, sample_path
from llm_quantize.models.job import Job, find_device
from llm_quantize.models.layer_stack import LayerStack
from llm_quantize.models.views import Kept

DATA = Path(__file__).parents[1] / "data"

# ---- one job ---------------------------------------------------------------------------------------------------------


def test_what_is_made_is_made_once():
    job, made = Job(sample_path()), []
    def make():
        made.append("made")
        return made
    assert job.once("a", make) is job.once("a", make) is made and made == ["made"]
    job.once("b", make)
    Job(sample_path()).once("a", make)
    assert len(made) == 3
    def fail(): raise ValueError
    with pytest.raises(ValueError): job.once("c", fail)
    assert job.once("c", lambda: None) is None, "a failure is not remembered"
    assert job.once("c", make) is None, "and nothing is a result"


def test_nothing_is_opened_before_it_is_asked_for(tmp_path):
    "A job of a model that is not there can be made: options are checked first."
    job = Job(tmp_path / "nowhere", device="cpu")
    with pytest.raises(Exception, match="nowhere"): job.checkpoint


def test_an_opened_checkpoint_is_not_opened_again():
    checkpoint = open_checkpoint(sample_path())
    job = Job(checkpoint)
    assert job.checkpoint is job.checkpoint and job.name == checkpoint.name == "sample-4m"
    assert job.checkpoint.original is checkpoint and job.runnable
    assert list(job.tensors)[0] == "token_embd.weight" and job.tensors is job.tensors
    assert text_of(job) is text_of(job) and tokenizer_of(job) is text_of(job).tokenizer


def test_a_reader_of_metadata_cannot_change_it():
    job = Job(sample_path())
    metadata_of(job)["general.name"] = "mine"
    assert metadata_of(job)["general.name"] == "sample-4m"


def test_progress_is_told_under_its_name():
    told = []
    job = Job(sample_path(), progress=lambda *words: told.append(words))
    job.tell(1, 2, "reading")
    job.told("measuring")(3, 4)
    job.told("measuring")(4, 4, "5 tokens/s")
    assert told == [(1, 2, "reading"), (3, 4, "measuring"), (4, 4, "measuring 5 tokens/s")]
    Job(sample_path()).tell(1, 2, "nobody listens")

# ---- devices ---------------------------------------------------------------------------------------------------------


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device() == find_device("cpu") == Job(sample_path()).device == "cpu"
    for name, message in (("cuda", "no device cuda"), ("cuda:1", "no device cuda:1"), ("gpu", "'gpu' is not a device")):
        with pytest.raises(ArgumentError, match=message) as caught: Job(sample_path(), device=name)
        assert "cpu" in caught.value.suggestion
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device() == "cuda" and find_device("cuda:1") == "cuda:1" and find_device("cpu") == "cpu"

# ---- stacks ----------------------------------------------------------------------------------------------------------


def test_stacks_are_shared():
    job = Job(sample_path(), device="cpu")
    exact, usual = job.stack(torch.float32), job.stack()
    assert job.stack(torch.float32) is exact and job.stack() is usual
    assert job.stack(usual.dtype) is usual and job.stack(usual.dtype, keep=usual.keep) is usual
    assert exact.dtype == torch.float32 and exact.checkpoint is job.checkpoint and exact.device == "cpu"
    assert (job.stack(torch.float32) is usual) == (usual.dtype == torch.float32)
    apart = job.stack(torch.float32, keep=False)
    assert apart is not exact and not apart.keep and exact.keep

# ---- a whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    "What a run does, counted: calls go through to the real methods."
    counts = {key: Counter() for key in ("checkpoints", "files", "kept", "tensors", "texts", "stacks")}

    def count(owner, method, key, name):
        real = getattr(owner, method)
        def counting(*args, **options):
            counts[key][name(*args)] += 1
            return real(*args, **options)
        monkeypatch.setattr(owner, method, counting)

    count(Checkpoint, "__init__", "checkpoints", lambda self, path, *rest: Path(path).name)
    count(Checkpoint, "tensor", "tensors", lambda self, name: name)
    count(LayerStack, "__init__", "stacks", lambda self, *args: "stack")
    count(Kept, "__init__", "kept", lambda self, *args: self)
    count(PreTrainedTokenizerBase, "__call__", "texts", lambda self, text, *rest: "long" if len(text) > 1000 else "short")
    for name, module in list(sys.modules.items()):
        if name.startswith("llm_quantize") and hasattr(module, "safe_open"):
            count(module, "safe_open", "files", lambda path, *rest: Path(path).name)
    return counts


@pytest.fixture
def in_float32(tmp_path):
    "The sample model in float32: what is read of it needs no conversion, so that a careless reader writes into it."
    folder = copytree(sample_path(), tmp_path / "sample-4m")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.float() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def run(model, level, folder, **options):
    "Types by measurement or an exchange of types, protection, error feedback: each of them needs model and text."
    return quantize(model, "gguf", level, output_dir=folder, effort="quick", device="cpu", error_feedback=True,
                    protect_super_weights=True, **options)


def check(counted, stacks):
    "Opened once, tokenised once, read once, run in so many stacks, and left as it was."
    assert counted["checkpoints"] == {"sample-4m": 1}
    assert counted["texts"]["long"] == 1
    assert 1 <= counted["stacks"]["stack"] <= stacks
    assert counted["files"]["model.safetensors"] == 1 + counted["tensors"].total(), "the header, and each tensor"
    [kept] = counted["kept"]
    fresh = load_file(kept.path / "model.safetensors")
    assert set(counted["tensors"]) == set(fresh) and max(counted["tensors"].values()) <= 4
    assert [name for name in fresh if not torch.equal(kept.tensor(name), fresh[name])] == []


def test_a_dynamic_run_opens_reads_and_tokenises_once(counted, tmp_path):
    matrix = tmp_path / "own.imatrix.gguf" # costs are kept beside it
    matrix.write_bytes((DATA / "sample-4m-llama.imatrix.gguf").read_bytes())
    result = run(sample_path(), "dynamic", tmp_path, imatrix=matrix)
    assert (result.imatrix, result.error_feedback["tensors"], result.protection["identified"]) == ("given", 28, 4)
    check(counted, stacks=3) # in float32; with holes for super weights; for error feedback


def test_a_run_that_computes_its_importance_does_too(in_float32, counted, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_QUANTIZE_IMATRIX_CACHE", str(tmp_path / "cache"))
    result = run(in_float32, "IQ2_XXS", tmp_path, calibration_samples=16)
    assert (result.imatrix, result.error_feedback["tensors"], result.protection["identified"]) == ("computed", 28, 4)
    check(counted, stacks=4) # for importance, which error feedback cannot share where a column was rescaled
