"Axes one can read: a logarithmic one has numbers, however narrow it is."
import pytest

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'llm_quantize[widgets]'")
from llm_quantize.explore.chart_data import chart_frame, chart_series, draw_frame  # noqa: E402


@pytest.mark.parametrize("values", [[0.02, 0.04, 0.08], [0.3, 0.9], [1.1, 1.9], [1e-5, 0.1], [0.5, 6.0], [0.446, 8.45], [0.011, 0.9]], ids=str)
@pytest.mark.parametrize("name", ["x", "y"])
def test_a_logarithmic_axis_has_two_numbers_or_more(name, values):
    flat = list(range(1, len(values) + 1))
    series = chart_series("", values if name == "x" else flat, flat if name == "x" else values)
    axis = draw_frame(chart_frame([series], "", "", log=name)).axes[0]
    low, high = getattr(axis, f"get_{name}lim")()
    assert 2 <= sum(low <= tick <= high for tick in getattr(axis, f"get_{name}ticks")()) <= 12


def test_an_axis_without_positive_values_stays_linear():
    assert draw_frame(chart_frame([chart_series("", [0, 1], [0.0, None])], "", "", log="y")).axes[0].get_yscale() == "linear"
