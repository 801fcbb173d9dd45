"The state of an explorer: which frames a panel merges."
import json
import re

import pytest

from llm_quantize.explorer import Control, Explorer, Panel
from llm_quantize.frames import chart_frame, chart_series, merge_frames


def pairs():
    named = lambda *words: chart_frame([chart_series("".join(words), [0], [0])], "", "")
    controls = [Control("a", "a", ("1", "2"), kind="many"), Control("n", "n", ("-", "+")), Control("b", "b", ("x", "y"), kind="many")]
    return Explorer("Pairs", controls, [Panel("all", "All", ("a", "n", "b"), named)])


@pytest.mark.parametrize("chosen, names", [({}, ["1-x", "1-y", "2-x", "2-y"]), ({"a": ("2",), "n": "+"}, ["2+x", "2+y"]), ({"b": ("y",)}, ["1-y", "2-y"])], ids=["all", "one of a", "one of b"])
def test_a_panel_of_two_lists_is_called_for_each_pair(chosen, names):
    assert [s["name"] for s in pairs().frames(**chosen)["all"]["series"]] == names


def test_nothing_of_one_list_is_nothing():
    assert "Nothing is chosen" in pairs().frames(a=())["all"]["html"]


def test_the_page_merges_the_same_frames_in_the_same_order():
    data = json.loads(re.search(r'id="explorer-data">(.*?)</script>', pairs().page(), re.S)[1])
    [panel] = data["panels"]
    keys = [f"{a},0,{b}" for a in (0, 1) for b in (0, 1)] # as explorer.js nests its loops
    assert merge_frames([panel["pool"][panel["frames"][key]] for key in keys]) == pairs().frames()["all"]
