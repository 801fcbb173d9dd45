"Stages: as they stand, compiled, and with a compiler that fails."
import logging

import pytest
import torch

from llm_quantize.quants import compile as compiles
from llm_quantize.quants import legacy  # noqa: F401  fills the table of encoders
from llm_quantize.quants.blocks import encode_blocks
from llm_quantize.quants.compile import COMPILE_FROM, cache_dir, compiling, is_compiling, stage, wants_compile


@pytest.fixture
def fresh(monkeypatch):
    "A process that has encoded nothing and seen no failure."
    monkeypatch.setattr(compiles, "weights_seen", type(compiles.weights_seen)())
    monkeypatch.setattr(compiles, "failures", [])


def test_compiling_waits_for_work(fresh, monkeypatch):
    monkeypatch.setattr(compiles, "has_compiler", lambda: False)
    small, large = torch.zeros(1, 256), torch.empty(COMPILE_FROM // 256, 256, device="meta")
    gpu = torch.empty(1, 256, device="meta")
    assert not wants_compile("Q4_K", gpu)
    assert not wants_compile("Q4_K", large, False)
    assert wants_compile("Q4_K", gpu)          # what was seen before counts
    assert not wants_compile("Q5_K", gpu)      # for each type
    assert wants_compile("Q5_K", gpu, True)
    assert not wants_compile("Q4_K", small)    # a CPU without a compiler


def test_a_failing_compiler_is_survived(fresh, monkeypatch, caplog):
    def broken(*args, **options): raise RuntimeError("no compiler here")
    monkeypatch.setattr(torch, "compile", broken)
    @stage
    def double(x): return 2 * x
    with caplog.at_level(logging.WARNING), compiling(True):
        assert is_compiling()
        assert double(torch.ones(1)).item() == 2
        assert not is_compiling()              # one failure is enough
    assert "no compiler here" in caplog.text
    x = torch.randn(4, 64)
    assert torch.equal(encode_blocks("Q4_0", x, compiled=True), encode_blocks("Q4_0", x, compiled=False))


def test_compiling_is_left_when_the_block_is(fresh):
    with pytest.raises(ZeroDivisionError), compiling(True): 1 / 0
    assert not is_compiling()
    with compiling(True):
        with compiling(False): assert not is_compiling()
        assert is_compiling()


def test_the_folder_of_compiled_code_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("LLM_QUANTIZE_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("LLM_QUANTIZE_CACHE")
    assert cache_dir().parts[-2:] == (".cache", "llm-quantize")
