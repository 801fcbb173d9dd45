"The JSON error object: what it always says, whatever the details."
import pytest

from llm_quantize.errors import ArgumentError, LLMQuantizeError

FIXED = ["status", "error_code", "error_type", "message", "suggestion"]


@pytest.mark.parametrize("key", FIXED)
def test_a_detail_does_not_replace_a_fixed_field(key):
    plain = ArgumentError("found", "next").to_dict()
    told = ArgumentError("found", "next", {key: "other", "tried": 3}).to_dict()
    assert told == {**plain, "tried": 3} and list(told) == [*FIXED, "tried"]


def test_details_are_not_shared():
    first, second = LLMQuantizeError("a"), LLMQuantizeError("b")
    first.details["x"] = 1
    assert second.details == {} and list(second.to_dict()) == FIXED
