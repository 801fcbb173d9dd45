"What results show themselves with: escaping, tables, maps."
import math
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from llm_quantize.display import block_map, heat_map, html_summary, html_text, markdown_table
from llm_quantize.errors import ArgumentError

NASTY = """<img src=x onerror="alert('&')">"""


def test_a_name_cannot_become_a_part_of_the_page():
    assert ET.fromstring(f'<p title="{html_text(NASTY)}">{html_text(NASTY)}</p>').attrib["title"] == NASTY
    page = html_summary(NASTY, block_map({(0, NASTY): 1.0}, NASTY), [["name"], [NASTY]])
    assert "<img" not in page and page.count("&lt;img") == 4
    found = ET.fromstring(page)
    assert [e.text for e in found.iter("td")] == [NASTY]
    assert "<img" not in markdown_table([["name"], [NASTY]])


def test_a_cell_of_markdown_stays_one_cell():
    assert markdown_table([["a", "b"], ["x|y", "1"]], words=1).splitlines() == ["| a | b |", "|---|--:|", "| x&#124;y | 1 |"]


def grid_of(figure): return np.ma.filled(figure.axes[0].images[0].get_array(), np.nan)


def test_heat_map_puts_values_in_their_places():
    values = {(0, "ffn_down"): 100.0, (2, "attn_q"): 0.01, (1, "attn_q"): 0.0, (0, "attn_q"): None}
    plain, logarithm = grid_of(heat_map(values, title="x")), grid_of(heat_map(values, title="x", log=True))
    assert plain.shape == (2, 3) and plain[0, 2] == 0.01 and plain[1, 0] == 100 and plain[0, 1] == 0 and math.isnan(plain[0, 0])
    assert logarithm[0, 2] == -2 and logarithm[1, 0] == 2 and math.isnan(logarithm[0, 1])
    with pytest.raises(ArgumentError, match="'x'"): heat_map({}, title="x")


def test_display_loads_no_matplotlib():
    code = "import sys, llm_quantize.display; print('matplotlib' in sys.modules, 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["False", "False"]
