"The state of an explorer: which frames a panel merges."
import json
import re
import shutil
import subprocess
from importlib.resources import files

import pytest

from llm_quantize.explore.widget import Control, Explorer, Panel
from llm_quantize.explore.chart_data import chart_frame, chart_series, merge_frames


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


@pytest.mark.parametrize("values, least", [([0.446, 8.45], 5), ([1.1, 1.9], 3), ([1e-5, 0.1], 3), ([5.0, 5.0], 1)], ids=str)
def test_the_script_finds_numbers_for_a_logarithmic_axis(values, least):
    node = shutil.which("node") or pytest.skip("the axes of pages were not looked at: needs node (apt-get install nodejs)")
    script = (files("llm_quantize") / "data" / "page" / "explorer.js").read_text(encoding="utf-8")
    parts = [re.search(pattern, script, re.M | re.S)[0] for pattern in (r"^const short = .*?;$", r"^const axis = .*?^};$")]
    done = subprocess.run([node, "-e", "\n".join([*parts, f"console.log(JSON.stringify(axis({values}, true, 0.06).ticks))"])], capture_output=True, text=True, check=True)
    ticks = json.loads(done.stdout)
    assert least <= len(ticks) <= 12 and all(0 <= at <= 1 for at, _ in ticks) and len({word for _, word in ticks}) == len(ticks)
