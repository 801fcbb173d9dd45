"What the command prints: names as they are, whatever is in them."
import pytest

from llm_quantize.cli.console import console, print_rows
from llm_quantize.display import parse_size
from llm_quantize.errors import ArgumentError


@pytest.mark.parametrize("text", ["model[old].gguf", "[draft]", "a[/x]b", ":smile:", "[bold]"])
def test_brackets_and_colons_are_printed_as_they_are(text, capsys):
    print_rows([["name", "second"], [text, "x"]])
    console().print(f"{text}  1.0 MB", soft_wrap=True)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[1].split() == [text, "x"] and lines[2] == f"{text}  1.0 MB"


@pytest.mark.parametrize("text, size", [("4.1G", 4_100_000_000), ("8.2M", 8_200_000), ("2.01g", 2_010_000_000), ("0.6", 1)])
def test_sizes_are_not_a_byte_short(text, size): assert parse_size(text) == size


def test_less_than_a_byte_is_no_size():
    with pytest.raises(ArgumentError): parse_size("0.4")
