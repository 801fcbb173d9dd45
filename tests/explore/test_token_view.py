"The pieces of a text put together are the text, whatever its characters are made of."
import pytest

pytest.importorskip("transformers", reason="needs transformers: make test installs it")
from llm_quantize.calibration.text import load_tokenizer  # noqa: E402
from llm_quantize.explore.token_view import _pieces  # noqa: E402


@pytest.mark.parametrize("text", ["A naïve wave 🌊.", "日本語", "a\n\nb  c", " leading", "plain words"])
def test_pieces_make_the_text(text, sample_model):
    ids, pieces = _pieces(load_tokenizer(sample_model), text)
    assert "".join(pieces) == text and len(pieces) == len(ids)


def test_offsets_without_spaces_lose_none():
    class Trimmed:
        "A tokenizer whose tokens do not claim the space before them."
        bos_token_id = None
        def __call__(self, text, **options): return {"input_ids": [5, 6, 7], "offset_mapping": [(0, 1), (2, 3), (2, 3)]}
    assert _pieces(Trimmed(), "a b")[1] == ["a", "", " b"]
