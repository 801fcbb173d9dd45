"One layer: its options, and numbers that are none."
import pytest
import torch

from llm_quantize.compressed.families import LayerMappings
from llm_quantize.compressed.layer import ROWS, InputCollector, SmoothQuantOptions, check_alpha, encode_layer
from llm_quantize.errors import ArgumentError, SmoothQuantError, ValidationError

@pytest.mark.parametrize("alpha", ["1.5", "-0.1", "nan", "much", ""])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ArgumentError, match="0 to 1"): check_alpha(alpha)
    with pytest.raises(ArgumentError, match="0 to 1"): SmoothQuantOptions(alpha)


@pytest.mark.parametrize("given, alpha", [("0", 0.0), (1, 1.0), ("AUTO", "auto"), ("none", None), (None, None)])
def test_alpha_as_given(given, alpha):
    assert check_alpha(given) == alpha
    assert SmoothQuantOptions(given).alpha == alpha


def test_weights_that_are_no_numbers_end_the_run():
    weights = {"up.weight": torch.full((2, 4), float("nan"))}
    with pytest.raises(ValidationError, match="NaN"): encode_layer(weights, LayerMappings((), ("up",), ()), {})


def test_inputs_that_are_no_numbers_end_the_run():
    collector = InputCollector(windows=1)
    collector.add(0, ("up",), torch.full((2, 4), float("inf")))
    with pytest.raises(SmoothQuantError) as failure: collector.take(0)
    assert failure.value.exit_code == 14


def test_the_collector_sums_over_windows_and_forgets_what_is_taken():
    x = torch.randn(4, 300, 8, generator=torch.Generator().manual_seed(0))
    collector = InputCollector(windows=len(x), moments=True)
    for window in x: collector.add(3, ("q", "k"), window)
    inputs = collector.take(3)
    assert inputs["q"] is inputs["k"]
    assert torch.equal(inputs["q"].largest, x.abs().amax((0, 1)))
    assert torch.allclose(inputs["q"].moments, x.flatten(0, 1).T @ x.flatten(0, 1), rtol=1e-4, atol=1e-3)
    assert len(inputs["q"].rows) == ROWS
    assert collector.take(3) == {}


def test_an_expert_that_nobody_asked_is_rounded_all_the_same():
    weights = {"up.weight": torch.randn(4, 8)}
    layer, options = LayerMappings((), ("up",), ()), SmoothQuantOptions(error_feedback=True)
    encoded, choices = encode_layer(weights, layer, {}, options)
    assert encoded["up.weight"].dtype == torch.int8
    assert choices == []
