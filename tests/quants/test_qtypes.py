"The table of types: the type that an error suggests is one that fits."
import pytest

from llm_quantize.errors import ArgumentError
from llm_quantize.quants.qtypes import QTYPES, qtype


@pytest.mark.parametrize("columns", [1, 31, 32, 100, 128, 576, 4000])
@pytest.mark.parametrize("name", [name for name, t in QTYPES.items() if t.block_size > 1])
def test_the_suggested_type_fits(name, columns):
    if columns % qtype(name).block_size == 0: return
    with pytest.raises(ArgumentError, match=f"{name} needs rows in blocks") as caught: qtype(name).row_bytes(columns)
    suggested = qtype(caught.value.suggestion.split()[1])
    assert suggested.row_bytes(columns) > 0
    assert suggested.name == (qtype(name).fallback if columns % 32 == 0 else "F16")
