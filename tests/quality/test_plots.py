"Pictures: the numbers in them are the numbers given, and drawing leaves nothing behind."
import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from llm_quantize.errors import ArgumentError
from llm_quantize.calibration.imatrix import ImportanceMatrix
from llm_quantize.quality.plots import importance_map, plot_channels, plot_importance, plot_super_weights
from llm_quantize.calibration.super_weights import SuperWeight, SuperWeights

KINDS = ("attn_q", "ffn_up", "ffn_down") # in the order of data through a block

@pytest.fixture
def matrix():
    g = torch.Generator().manual_seed(0)
    names = [f"blk.{i}.{kind}.weight" for i in range(12) for kind in KINDS] + ["output.weight"]
    return ImportanceMatrix({n: torch.rand(1, 32, generator=g).double() for n in names if n != "blk.5.ffn_up.weight"}, {n: torch.ones(1).double() for n in names if n != "blk.5.ffn_up.weight"})


def weight(layer, row, column):
    return SuperWeight(tensor=f"blk.{layer}.ffn_down.weight", row=row, col=column, value=1.0, hf_tensor="w", layer=layer, expert=None, token=0, input_spike=100.0, output_spike=90.0,
                       input_ratio=50.0, output_ratio=40.0, share=1.0)


def rows(count):
    return tuple({"tensor": f"blk.{i}.ffn_down.weight", "layer": i, "ordinary_input": 1.0, "largest_input": 2.0 + i, "ordinary_output": 1.0, "largest_output": 3.0 + i,
                  "largest_input_zeroed": 1.0, "largest_output_zeroed": 2.0 + i} for i in range(count))


def png(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=50)
    return file.getvalue()


def test_the_map_holds_the_statistics(matrix):
    values = importance_map(matrix)
    assert len(values) == 35 and {kind for _, kind in values} == set(KINDS) and (5, "ffn_up") not in values
    assert values[10, "attn_q"] == pytest.approx(matrix.sums["blk.10.attn_q.weight"].mean().item()) != pytest.approx(values[1, "attn_q"])
    assert importance_map(matrix, "cosine")[0, "attn_q"] is None


@pytest.mark.parametrize("field", ["mean", "max", "total", "active", "entropy_normalized", "zd", "cosine"])
def test_heat_map(matrix, field):
    figure, values = plot_importance(matrix, field), importance_map(matrix, field)
    shown = np.ma.filled(figure.axes[0].images[0].get_array().astype(float), np.nan)
    expected = np.array([[values.get((block, kind)) for block in range(12)] for kind in KINDS], dtype=float)
    np.testing.assert_allclose(shown, np.log10(expected) if field in ("mean", "max", "total") else expected)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == list(KINDS) and png(figure)[:4] == b"\x89PNG"


@pytest.mark.parametrize("shape", [(64,), (3, 64)])
def test_channels(shape):
    values = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.1
    figure = plot_channels(values, "blk.0.ffn_down")
    left, right = figure.axes
    assert len(left.lines) == len(right.lines) == (1 if len(shape) == 1 else 3)
    np.testing.assert_allclose(left.lines[-1].get_ydata(), values.reshape(-1, 64)[-1].numpy(), rtol=1e-6)
    np.testing.assert_allclose(right.lines[-1].get_ydata(), np.sort(values.reshape(-1, 64)[-1].numpy())[::-1], rtol=1e-6)
    assert left.get_title() == "blk.0.ffn_down" and png(figure) != png(plot_channels(values.flip(-1), "blk.0.ffn_down"))


def test_super_weights():
    found = SuperWeights((weight(1, 5, 9), weight(1, 6, 9), weight(3, 2, 2)), rows(4))
    left, right = plot_super_weights(found).axes
    assert left.lines[0].get_ydata().tolist() == [3.0, 4.0, 5.0, 6.0] and left.lines[1].get_ydata().tolist() == [2.0, 3.0, 4.0, 5.0]
    assert [c.get_offsets().tolist() for c in right.collections] == [[[9.0, 5.0], [9.0, 6.0]], [[2.0, 2.0]]]
    none = plot_super_weights(SuperWeights((), rows(2)))
    assert none.axes[1].get_title() == "none found" and png(none)


def test_drawing_is_pure(matrix):
    before = plt.get_fignums()
    assert png(plot_importance(matrix)) == png(plot_importance(matrix)) != png(plot_importance(matrix, "max"))
    assert plt.get_fignums() == before


@pytest.mark.parametrize("draw, message", [
    (lambda m: plot_importance(m, "median"), "unknown statistic"), (lambda m: plot_importance(ImportanceMatrix({"output.weight": torch.ones(1, 4)}, {"output.weight": torch.ones(1)})), "no tensor of a block"),
    (lambda m: plot_channels(torch.ones(2, 2, 2)), "cannot be drawn"), (lambda m: plot_channels(torch.ones(0)), "cannot be drawn"), (lambda m: plot_super_weights(SuperWeights()), "no layers")])
def test_what_cannot_be_drawn(matrix, draw, message):
    with pytest.raises(ArgumentError, match=message): draw(matrix)
