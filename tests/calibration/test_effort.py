"Efforts: found by name in any case, refused with the closest, and what they spend grows."
from dataclasses import fields

import pytest

from llm_quantize.calibration.effort import EFFORTS, find_effort
from llm_quantize.errors import ArgumentError


def test_names_in_any_case():
    for name, effort in EFFORTS.items(): assert find_effort(name.upper()) is find_effort(effort) is effort


@pytest.mark.parametrize("name, hint", [("thoro", "did you mean thorough?"), ("xyzzy", "use one of: quick, default, thorough")])
def test_an_unknown_name_gets_a_hint(name, hint):
    with pytest.raises(ArgumentError, match=f"unknown effort '{name}'") as caught: find_effort(name)
    assert caught.value.suggestion == hint


def test_more_effort_spends_more():
    for field in fields(EFFORTS["quick"]):
        quick, default, thorough = (getattr(EFFORTS[name], field.name) for name in ("quick", "default", "thorough"))
        assert quick <= default <= thorough, field.name
    assert find_effort("THOROUGH").trials > find_effort("default").trials > find_effort("quick").trials


def test_fewer_windows_are_damped_more():
    "The values that were measured: 32 windows 0.8, 64 windows 0.28, 256 and more 0.1."
    assert [round(EFFORTS[name].damping, 2) for name in ("quick", "default", "thorough")] == [0.8, 0.28, 0.1]
