"llama.cpp's ids from the GGUF keys we write are the ids transformers gives, on text made to break tokenizers."
import ctypes
import json
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from transformers import AutoTokenizer

from llm_quantize.checkpoint import sample_path
from llm_quantize.errors import ConversionError
from llm_quantize.tokenizers import tokenizer_metadata

SHARED = Path(__file__).resolve().parents[2] / "shared" / "models"

HOSTILE = [
    "", "a", "Hello, world!", "Hello  world", "trailing space ", "trailing spaces   ", "two\nlines", "three\n\n\nlines\r\n\r\nand \n\n \n mixed\t\n",
    "tabs\t\tand\t spaces \t  \t\t x", "\n", "\t", "\n\n\n\n\n", "x\n", "x \n", "x\n ",
    "I'm, you're, he'll, we've, they'd, it's, don't; I'M, YOU'RE, HE'LL, WE'VE, THEY'D, IT'S, DON'T; 'tis 'S 'Ll o'clock rock'n'roll",
    "1 12 123 1234 12345 123456 1234567 3.14159 1,000,000 2026-10-01 0x1F 1e-5 x1y22z333", "def f(x: int) -> int:\n    return x ** 2 if x != 0 else -1  # comment\n",
    "#include <stdio.h>\nint main(void) {\n\tprintf(\"%d\\n\", a[i] += ~b & 0xff);\n}\n", "{\"key\": [1, 2.5, null, true], \"a\": {\"b\": \"c\\\"d\"}}",
    "camelCase PascalCase snake_case SCREAMING_CASE HTTPServer iPhone eBay McDonald", "... !!! ??? --- === *** /// \\\\ || && ~~ `` '' \"\" (()) [[]] {{}} <<>> $$ %% ^^ @@ ##",
    "naïve café über straße Ærøskøbing Łódź Dvořák İstanbul", "Привет, мир! Как дела? Съешь ещё этих мягких булок", "Ελληνικά κείμενο με τόνους", "שלום עולם", "مرحبا بالعالم، كيف الحال؟ ۱۲۳ ١٢٣",
    "中文，标点。没有空格的文字「引号」", "日本語のテキスト、カタカナとひらがな", "한국어 텍스트 안녕하세요", "emoji 😀 🚀🚀 ❤️ ok", "family 👨‍👩‍👧‍👦 flag 🇩🇪 skin 👍🏽 keycap 1️⃣", "math ∑∫√≈≠ ½ ⅓ Ⅷ ² ₃ €£¥ © ™",
    "\u00a0non-breaking\u00a0 \u3000wide\u2003em\u200bzero\u2028line\u2029para\ufeff", "\x00\x01\x7f control", "\U0001d5b3\U0001d5c1\U0001d5c2\U0001d5cc mathematical 𐍈 gothic",
    "<html><body class=\"x\">a&amp;b</body></html>", "http://example.org/path?q=1&r=%20#frag user@example.org", "a/b\n/c //\n\n/ /\r\n", "word" * 40, "ab " * 50, "aaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "ÀÀÀ ÉÉÉ", "Ｆｕｌｌ　ｗｉｄｔｈ",
]
LEADING = [" one", "    deep indentation", "  \n x", " "]
MARKS = ["cafe\u0301 n\u0303 combining", "हिन्दी में लिखा", "ภาษาไทยไม่มีช่องว่าง", "Việt Nam tiếng Việt", "z\u0335\u0321a\u0489lgo", "🏳️‍🌈 a\u200d\u0301b"]
CASES = ["ПриветМир ЭтоТест", "ΕλληνικάΚείμενα", "ÉcoleÉlève straßeNAME", "ǅungla ǈubav"]


def write_vocab(path, keys):
    "A GGUF file with a vocabulary and the least a llama needs beside it."
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"llama.context_length": 64, "llama.embedding_length": 64, "llama.block_count": 1, "llama.feed_forward_length": 64, "llama.attention.head_count": 1}.items():
        writer.add_uint32(key, value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for key, value in keys.items():
        if isinstance(value, bool): writer.add_bool(key, value)
        elif isinstance(value, int): writer.add_uint32(key, value)
        elif isinstance(value, str): writer.add_string(key, value)
        elif isinstance(value, np.ndarray): writer.add_key_value(key, value.tolist() if value.dtype != np.uint8 else value.tobytes(), gguf.GGUFValueType.ARRAY, sub_type=
                                                                {"int32": gguf.GGUFValueType.INT32, "float32": gguf.GGUFValueType.FLOAT32, "uint8": gguf.GGUFValueType.UINT8}[str(value.dtype)])
        else: writer.add_array(key, value)
    writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
    return path


class Llama:
    "llama.cpp's tokenizer of a vocabulary-only file."
    def __init__(self, path): self.model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    def ids(self, text, add=True, special=True): return self.model.tokenize(text.encode(), add, special)
    def text(self, ids, special=True):
        buffer, out = ctypes.create_string_buffer(512), b""
        for id in ids:
            n = llama_cpp.llama_token_to_piece(self.model._model.vocab, id, buffer, 512, 0, special)
            out += buffer.raw[:n]
        return out.decode("utf-8", "replace")


def convert(directory, path, vocab_size=None, **options):
    "The directory's tokenizer as llama.cpp loads it."
    config = json.loads((directory / "config.json").read_text()) if (directory / "config.json").is_file() else {}
    return Llama(write_vocab(path, tokenizer_metadata(directory, config | ({"vocab_size": vocab_size} if vocab_size else {}), **options)))


def differences(llama, reference, texts, **options):
    "The texts whose ids differ."
    return [text for text in texts if llama.ids(text, **options) != reference.encode(text, add_special_tokens=options.get("add", True))]


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return convert(sample_path(), tmp_path_factory.mktemp("sample") / "v.gguf"), AutoTokenizer.from_pretrained(sample_path())


def test_sample_model(sample):
    llama, reference = sample
    assert differences(llama, reference, HOSTILE + MARKS + CASES) == []


def test_sample_model_leading_space(sample):
    "SentencePiece (and llama.cpp) puts a space before a text that begins with one, transformers' Metaspace does not."
    llama, reference = sample
    assert differences(llama, reference, LEADING) == LEADING


@pytest.mark.parametrize("name", ["sample-4m", "prose-46m", "trilm-27m"])
def test_shared_models(name, tmp_path):
    if not (SHARED / name).is_dir(): pytest.skip(f"{SHARED / name} is not there: these models come with a development checkout")
    llama, reference = convert(SHARED / name, tmp_path / "v.gguf"), AutoTokenizer.from_pretrained(SHARED / name)
    assert differences(llama, reference, HOSTILE + MARKS + CASES) == []
