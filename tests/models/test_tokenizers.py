"llama.cpp's ids from the GGUF keys we write are the ids that transformers (or sentencepiece) gives, on text made to break tokenizers."
import ctypes
import io
import json
import subprocess
import sys

import gguf
import llama_cpp
import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from llm_quantize.calibration.text import bundled_text
from llm_quantize.errors import ArgumentError, ConversionError
from llm_quantize.models.pretokenizers import KNOWN_NAMES, PRE_TOKENIZERS, chain_of, recognise
from llm_quantize.models.tokenizer_files import read_sentencepiece
from llm_quantize.models.tokenizers import tokenizer_metadata
from llm_quantize.quality.llama_cpp_model import open_llama

# ---- text ----------------------------------------------------------------------------------------------------------------------------------------

SPACES = "\u00a0non-breaking\u00a0 \u3000wide\u2003em\u200bzero\u2028line\u2029para\ufeff"
HOSTILE = [
    "", "a", "Hello, world!", "Hello  world", "trailing space ", "trailing spaces   ", "two\nlines", "three\n\n\nlines\r\n\r\nand \n\n \n mixed\t\n",
    "tabs\t\tand\t spaces \t  \t\t x", "\n", "\t", "\n\n\n\n\n", "x\n", "x \n", "x\n ",
    "I'm, you're, he'll, we've, they'd, it's, don't; I'M, YOU'RE, HE'LL, WE'VE, THEY'D, IT'S, DON'T; 'tis 'S 'Ll o'clock rock'n'roll",
    "1 12 123 1234 12345 123456 1234567 3.14159 1,000,000 2026-10-01 0x1F 1e-5 x1y22z333", "def f(x: int) -> int:\n    return x ** 2 if x != 0 else -1  # comment\n",
    "#include <stdio.h>\nint main(void) {\n\tprintf(\"%d\\n\", a[i] += ~b & 0xff);\n}\n", "{\"key\": [1, 2.5, null, true], \"a\": {\"b\": \"c\\\"d\"}}",
    "camelCase PascalCase snake_case SCREAMING_CASE HTTPServer iPhone eBay McDonald", "... !!! ??? --- === *** /// \\\\ || && ~~ `` '' \"\" (()) [[]] {{}} <<>> $$ %% ^^ llm_quantize ##",
    "naïve café über straße Ærøskøbing Łódź Dvořák İstanbul", "Привет, мир! Как дела? Съешь ещё этих мягких булок", "Ελληνικά κείμενο με τόνους", "שלום עולם",
    "مرحبا بالعالم، كيف الحال؟ ۱۲۳ ١٢٣", "中文，标点。没有空格的文字「引号」", "日本語のテキスト、カタカナとひらがな", "한국어 텍스트 안녕하세요", "emoji 😀 🚀🚀 ❤️ ok",
    "family 👨‍👩‍👧‍👦 flag 🇩🇪 skin 👍🏽 keycap 1️⃣", "math ∑∫√≈≠ ½ ⅓ Ⅷ ² ₃ €£¥ © ™", SPACES, "\x00\x01\x7f control",
    "\U0001d5b3\U0001d5c1\U0001d5c2\U0001d5cc mathematical 𐍈 gothic", "<html><body class=\"x\">a&amp;b</body></html>", "http://example.org/path?q=1&r=%20#frag user@example.org",
    "a/b\n/c //\n\n/ /\r\n", "word" * 40, "ab " * 50, "a" * 29, "ÀÀÀ ÉÉÉ", "Ｆｕｌｌ　ｗｉｄｔｈ", "Việt Nam tiếng Việt", "ǅungla ǈubav",
]
LEADING = [" one", "    deep indentation", "  \n x", " "]
MARKS = ["cafe\u0301 n\u0303 combining", "हिन्दी में लिखा", "ภาษาไทยไม่มีช่องว่าง", "z\u0335\u0321a\u0489lgo", "🏳️‍🌈 a\u200d\u0301b"]
CASES = ["ПриветМир ЭтоТест", "ΕλληνικάΚείμενα", "ÉcoleÉlève straßeNAME"]
LONG_S = "it'\u017fx"
TEXTS = HOSTILE + LEADING + MARKS + CASES
CHAT = ["<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n", "a<|im_end|><|im_end|>b", "<|im_end", "<|im_start|>", " <|im_start|> x <|im_end|> ",
        "call <tool_call>{\"a\": 1}</tool_call> done", "<tool_call><tool_call>", "x<|endoftext|>", "<|im_start|>  two spaces\n\n<|im_end|>"]

# ---- the two sides -------------------------------------------------------------------------------------------------------------------------------

ARRAYS = {"int32": gguf.GGUFValueType.INT32, "float32": gguf.GGUFValueType.FLOAT32, "uint8": gguf.GGUFValueType.UINT8}

def write_vocab(path, keys):
    "A GGUF file with a vocabulary and the least a llama needs beside it."
    writer = gguf.GGUFWriter(path, "llama")
    for key in ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count"): writer.add_uint32(f"llama.{key}", 1)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for key, value in keys.items():
        if isinstance(value, bool): writer.add_bool(key, value)
        elif isinstance(value, int): writer.add_uint32(key, value)
        elif isinstance(value, str): writer.add_string(key, value)
        elif isinstance(value, np.ndarray): writer.add_key_value(key, value.tobytes() if value.dtype == np.uint8 else value.tolist(), gguf.GGUFValueType.ARRAY, ARRAYS[str(value.dtype)])
        else: writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


class Llama:
    "llama.cpp's tokenizer of a vocabulary-only file."
    def __init__(self, keys, path): self.model = open_llama(write_vocab(path, keys), vocab_only=True)

    def ids(self, text, add=True, special=True): return self.model.tokenize(text.encode(), add, special)

    def text(self, ids):
        buffer, out = ctypes.create_string_buffer(1024), b""
        for id in ids:
            size = llama_cpp.llama_token_to_piece(self.model._model.vocab, id, buffer, 1024, 0, True)
            out += buffer.raw[:size]
        return out.decode("utf-8", "replace")


def keys_of(directory, **options):
    return tokenizer_metadata(directory, json.loads((directory / "config.json").read_text()), **options)

def pair(directory, **options):
    "llama.cpp with our keys, and transformers, for one directory."
    return Llama(keys_of(directory, **options), directory / "vocab.gguf"), AutoTokenizer.from_pretrained(directory)

def differing(llama, reference, texts):
    "The texts whose ids differ, what stands around a text included."
    return [text for text in texts if llama.ids(text) != reference.encode(text)]

def write_directory(path, tokenizer, vocab_size, **settings):
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | settings))
    (path / "config.json").write_text(json.dumps({"vocab_size": vocab_size, "model_type": "llama"}))
    return path

# ---- real models ---------------------------------------------------------------------------------------------------------------------------------

def copy(source, path, names):
    path.mkdir()
    for name in names: (path / name).write_bytes((source / name).read_bytes())
    return path

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")

@pytest.mark.parametrize("names", [(*FILES, "tokenizer.model"), FILES], ids=["tokenizer.model", "tokenizer.json"])
def test_sample_model(sample_model, tmp_path, names):
    llama, reference = pair(copy(sample_model, tmp_path / "m", names))
    assert differing(llama, reference, HOSTILE + MARKS + CASES) == []
    words = bundled_text("heldout").split("\n")[:2000]
    assert differing(llama, reference, [line.strip() for line in words]) == []


def test_sample_model_known_differences(sample_model, tmp_path):
    "Where transformers' Metaspace step departs from SentencePiece, llama.cpp follows SentencePiece: a text that begins with a space; text behind a special token."
    llama, reference = pair(copy(sample_model, tmp_path / "m", (*FILES, "tokenizer.model")))
    original = sentencepiece.SentencePieceProcessor(model_file=str(sample_model / "tokenizer.model"))
    assert differing(llama, reference, LEADING) == LEADING
    assert [text for text in LEADING if llama.ids(text, add=False) != original.encode(text)] == []
    assert llama.ids("a</s>b") == [*reference.encode("a"), 2, *original.encode("b")] and reference.encode("a</s>b") != llama.ids("a</s>b")


@pytest.mark.shared
@pytest.mark.parametrize("name", ["sample-4m", "prose-46m", "trilm-27m"])
def test_shared_models(name, shared_model, tmp_path):
    llama, reference = pair(copy(shared_model(name), tmp_path / "m", FILES))
    assert differing(llama, reference, HOSTILE + MARKS + CASES + (LEADING if name != "sample-4m" else [])) == []

# ---- byte-level BPE ------------------------------------------------------------------------------------------------------------------------------

ENDS = [{"id": 0, "content": "<|endoftext|>"}]

def corpus():
    lines = bundled_text("calibration")[:60000].split("\n")
    return TEXTS * 4 + [LONG_S] * 9 + [" ".join(lines[i:i + 2]) + "\n" for i in range(0, len(lines), 2)]

def train(pre_tokenizer, size=4000):
    "A byte-level vocabulary trained on the pieces of this pre-tokenizer, as the dict of a tokenizer.json."
    shell = Tokenizer.from_str(json.dumps(json.loads(Tokenizer(models.BPE()).to_str()) | {"pre_tokenizer": pre_tokenizer}))
    shell.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
                                                            special_tokens=["<|endoftext|>"]))
    return json.loads(shell.to_str()) | {"decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}}

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}

def steps(chain, behavior="Isolated", invert=False):
    "A chain of expressions as the pre_tokenizer of a tokenizer.json."
    return {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": e}, "behavior": behavior, "invert": invert} for e in chain] + [BYTES]}

@pytest.fixture(scope="module")
def torn():
    "A vocabulary trained without any cuts: its tokens run over every border, so each wrong cut shows."
    return train(BYTES)

def with_pre(tokenizer, pre_tokenizer, ignore_merges=False, **parts):
    return tokenizer | {"pre_tokenizer": pre_tokenizer, "model": tokenizer["model"] | {"ignore_merges": ignore_merges}} | parts

# What llama.cpp cuts otherwise than the expressions it names. Each is stated in the notebook.
KNOWN = {
    "gpt-4o": MARKS + CASES,           # std::regex has no \p{Lu}: case is seen in ASCII only, and combining marks end a word
    "tekken": MARKS + CASES,
    "deepseek-llm": [SPACES],          # [\u0800-\u4e00] holds Unicode's spaces, which llama.cpp has turned into another character by then
    "deepseek-coder": [SPACES],
}
OWN = {"deepseek-llm", "falcon"}       # llama.cpp writes \p{N}+ for single digits; no difference where no token joins digits, as in the real vocabularies

@pytest.mark.parametrize("p", [p for p in PRE_TOKENIZERS if p.name not in OWN], ids=lambda p: p.name)
def test_byte_level(p, torn, tmp_path):
    llama, reference = pair(write_directory(tmp_path / "m", with_pre(torn, steps(p.chain), p.ignore_merges), 4007, eos_token="<|endoftext|>"))
    assert llama.model.metadata["tokenizer.ggml.pre"] == p.name
    assert differing(llama, reference, TEXTS) == KNOWN.get(p.name, [])
    assert [llama.text(llama.ids(text)) for text in TEXTS] == TEXTS


def natural(name):
    "The chain as the published tokenizer.json writes it."
    chain = next(p.chain for p in PRE_TOKENIZERS if p.name == name)
    digits, words = {"type": "Digits", "individual_digits": name != "falcon"}, BYTES | {"use_regex": True}
    if name == "falcon": return {"type": "Sequence", "pretokenizers": [{"type": "Punctuation", "behavior": "Contiguous"}, words, digits, steps(["[0-9][0-9][0-9]"])["pretokenizers"][0]]}
    if name == "smollm": return {"type": "Sequence", "pretokenizers": [digits, words]}
    if name == "gpt-2": return words
    if name.startswith("deepseek-"): return {"type": "Sequence", "pretokenizers": [*steps(chain[:-1])["pretokenizers"][:-1], digits, BYTES]}
    return steps(chain)

@pytest.mark.parametrize("name, but", [("gpt-2", []), ("smollm", []), ("llama-bpe", []), ("falcon", []), ("deepseek-llm", []), ("deepseek-coder", []), ("gpt-4o", MARKS), ("tekken", MARKS)])
def test_byte_level_trained_on_its_own_pieces(name, but, tmp_path):
    "A vocabulary as one gets it from training; most known differences need tokens that such a vocabulary does not have."
    p = next(p for p in PRE_TOKENIZERS if p.name == name)
    tokenizer = with_pre(train(natural(name), 2500), natural(name), p.ignore_merges)
    llama, reference = pair(write_directory(tmp_path / "m", tokenizer, 2500, eos_token="<|endoftext|>"))
    assert llama.model.metadata["tokenizer.ggml.pre"] == name
    assert differing(llama, reference, TEXTS) == but


@pytest.mark.parametrize("right, wrong", [("llama-bpe", "qwen2"), ("qwen2", "llama-bpe"), ("gpt-2", "smollm"), ("smollm", "gpt-2"), ("gpt-4o", "llama-bpe"), ("tekken", "gpt-4o"),
                                          ("deepseek-v3", "llama-bpe"), ("qwen2", "qwen35"), ("llama-bpe", "default")])
def test_a_wrong_name_is_noticed(right, wrong, torn, tmp_path):
    p = next(p for p in PRE_TOKENIZERS if p.name == right)
    llama, reference = pair(write_directory(tmp_path / "m", with_pre(torn, steps(p.chain), p.ignore_merges), 4000, eos_token="<|endoftext|>"), pre=wrong)
    assert len(set(differing(llama, reference, TEXTS)) - set(KNOWN.get(right, []))) > 0


@pytest.mark.parametrize("whole", [True, False])
def test_ignore_merges(whole, torn, tmp_path):
    "A word that is a token but that no merge makes: Llama 3 takes it whole, GPT-4 does not."
    word = next(t for t in torn["model"]["vocab"] if len(t) == 4 and t.isascii() and t.isalpha())
    merges = [m for m in torn["model"]["merges"] if "".join(m) != word]
    tokenizer = with_pre(torn | {"model": torn["model"] | {"merges": merges}}, steps(PRE_TOKENIZERS[2].chain), whole)
    assert len(merges) < len(torn["model"]["merges"])
    llama, reference = pair(write_directory(tmp_path / "m", tokenizer, 4000, eos_token="<|endoftext|>"))
    assert differing(llama, reference, TEXTS) == [] and (len(llama.ids(word)) == 1) == whole


def test_merges_as_strings(torn, tmp_path):
    "Both spellings of the merges, and one that is neither."
    tokenizer = with_pre(torn, steps(PRE_TOKENIZERS[4].chain))
    listed = keys_of(write_directory(tmp_path / "a", tokenizer, 4000))
    model = tokenizer["model"]
    joined = keys_of(write_directory(tmp_path / "b", tokenizer | {"model": model | {"merges": [" ".join(m) for m in model["merges"]]}}, 4000))
    assert listed["tokenizer.ggml.merges"] == joined["tokenizer.ggml.merges"] and len(listed["tokenizer.ggml.merges"]) == len(model["merges"])
    with pytest.raises(ConversionError, match="damaged"):
        keys_of(write_directory(tmp_path / "c", tokenizer | {"model": model | {"merges": ["a b c"]}}, 4000))


ADDED = [{"id": 4000 + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
         for i, (text, special) in enumerate([("<|im_start|>", True), ("<|im_end|>", True), ("<tool_call>", False), ("</tool_call>", False)])]
TEMPLATE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {t["content"]: {"id": t["content"], "ids": [t["id"]], "tokens": [t["content"]]} for t in ADDED[:2]}}

def test_added_tokens_and_template(torn, tmp_path):
    "Special and other added tokens inside a text, and those the template puts around it."
    tokenizer = with_pre(torn, steps(PRE_TOKENIZERS[4].chain), added_tokens=torn["added_tokens"] + ADDED, post_processor=TEMPLATE)
    directory = write_directory(tmp_path / "m", tokenizer, 4096, bos_token="<|im_start|>", eos_token={"__type": "AddedToken", **{k: v for k, v in ADDED[1].items() if k != "id"}}, pad_token="<|endoftext|>")
    llama, reference = pair(directory)
    assert differing(llama, reference, CHAT + TEXTS) == []
    assert [reference.decode(llama.ids(text), skip_special_tokens=False) for text in CHAT] == [f"<|im_start|>{text}<|im_end|>" for text in CHAT]
    keys = keys_of(directory)
    types = dict(zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"].tolist()))
    assert (types["<|im_end|>"], types["<tool_call>"], types["[PAD4004]"], len(types)) == (3, 4, 5, 4096)
    assert [keys[f"tokenizer.ggml.{k}"] for k in ("bos_token_id", "eos_token_id", "padding_token_id", "add_bos_token", "add_eos_token", "eot_token_id")] == [4000, 4001, 0, True, True, 4001]
    assert llama.ids("<|im_end|>", special=False)[1:-1] == reference.encode("<|im_end|>", split_special_tokens=True, add_special_tokens=False)


def test_known_difference_normalization(torn, tmp_path):
    "llama.cpp does not compose letters and marks: the same ids for composed text, others for decomposed text."
    llama, reference = pair(write_directory(tmp_path / "m", with_pre(torn, steps(PRE_TOKENIZERS[4].chain), normalizer={"type": "NFC"}), 4000, eos_token="<|endoftext|>"))
    assert differing(llama, reference, HOSTILE + CASES) == [] and differing(llama, reference, ["cafe\u0301"]) == ["cafe\u0301"]
    assert llama.ids("caf\u00e9") == reference.encode("cafe\u0301")


@pytest.mark.parametrize("name, differs", [("qwen2", True), ("gpt-2", False)])
def test_known_difference_case_folding(name, differs, torn, tmp_path):
    "(?i:'s) also matches the long s of Unicode; llama.cpp's own contraction does not."
    p = next(p for p in PRE_TOKENIZERS if p.name == name)
    llama, reference = pair(write_directory(tmp_path / "m", with_pre(torn, steps(p.chain)), 4000, eos_token="<|endoftext|>"))
    assert (differing(llama, reference, [LONG_S]) == [LONG_S]) == differs


@pytest.mark.parametrize("strip", ["lstrip", "rstrip"])
def test_known_difference_swallowed_spaces(strip, torn, tmp_path):
    "An added token that takes the spaces beside it along keeps them apart in llama.cpp; without spaces the ids agree."
    tokenizer = with_pre(torn, steps(PRE_TOKENIZERS[4].chain), added_tokens=torn["added_tokens"] + [ADDED[0] | {strip: True}])
    llama, reference = pair(write_directory(tmp_path / "m", tokenizer, 4001, eos_token="<|endoftext|>"))
    assert differing(llama, reference, ["a<|im_start|>b", "a <|im_start|> b"]) == ["a <|im_start|> b"]

# ---- SentencePiece -------------------------------------------------------------------------------------------------------------------------------

SPM = dict(vocab_size=2000, model_type="bpe", byte_fallback=True, character_coverage=0.998, normalization_rule_name="identity", remove_extra_whitespaces=False,
           split_digits=True, allow_whitespace_only_pieces=True, minloglevel=2, num_threads=1)

def train_spm(directory, **options):
    "A tokenizer.model in a new directory, and SentencePiece's own processor of it."
    directory.mkdir(exist_ok=True)
    sentences = [s for s in bundled_text("calibration")[:120000].split("\n") + TEXTS if s.strip() and "\x00" not in s]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences), model_writer=out, **SPM | options)
    (directory / "tokenizer.model").write_bytes(out.getvalue())
    (directory / "config.json").write_text("{}")
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())

def spm_json(processor, prefix):
    "The tokenizer.json that converters make of a BPE tokenizer.model: all pairs that make a token, best token first."
    pieces = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    merges = sorted(((-processor.get_score(i), len(text[:k]), text[:k], text[k:]) for text, i in pieces.items() for k in range(1, len(text)) if text[:k] in pieces and text[k:] in pieces))
    steps = {"metaspace": (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}),
             "legacy": ({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}, None),
             "gemma": ({"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False})}[prefix]
    added = [{"id": i, "content": processor.id_to_piece(i), "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True} for i in range(3)]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": steps[0], "pre_tokenizer": steps[1], "post_processor": None,
            "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": pieces, "merges": [[a, b] for _, _, a, b in merges]}}


@pytest.mark.parametrize("options", [{}, {"user_defined_symbols": ["<tool>", "▁▁▁"], "add_dummy_prefix": False}, {"add_dummy_prefix": False}, {"character_coverage": 1.0, "byte_fallback": False, "vocab_size": 2400}],
                         ids=["bytes", "symbols", "no prefix", "no bytes"])
def test_sentencepiece_bpe(options, tmp_path):
    original = train_spm(tmp_path / "m", **options)
    llama = Llama(keys_of(tmp_path / "m"), tmp_path / "v.gguf")
    texts = [t for t in TEXTS + ["a<tool>b <tool> c<tool><tool>"] if options.get("byte_fallback", True) or original.unk_id() not in original.encode(t)]
    assert [text for text in texts if llama.ids(text, add=False) != original.encode(text)] == [] and len(texts) > 50
    assert llama.ids("a") == [original.bos_id(), *original.encode("a")]
    assert [llama.text(llama.ids(t, add=False)).removeprefix(" " if options.get("add_dummy_prefix", True) else "") for t in texts] == texts


def test_scores_matter(tmp_path):
    "The comparison notices wrong scores."
    original = train_spm(tmp_path / "m")
    keys = keys_of(tmp_path / "m")
    llama = Llama(keys | {"tokenizer.ggml.scores": -keys["tokenizer.ggml.scores"]}, tmp_path / "v.gguf")
    assert any(llama.ids(text, add=False) != original.encode(text) for text in HOSTILE)


@pytest.mark.parametrize("prefix", ["metaspace", "legacy", "gemma"])
def test_sentencepiece_without_its_model(prefix, tmp_path):
    "tokenizer.json alone, in the three forms of its steps, with tokens added later."
    processor = train_spm(tmp_path / "spm")
    tokenizer = spm_json(processor, prefix)
    tokenizer["added_tokens"] += [t | {"id": t["id"] - 2000} for t in ADDED]
    llama, reference = pair(write_directory(tmp_path / "m", tokenizer, 2048, bos_token="<s>", eos_token="</s>"))
    same = HOSTILE + MARKS + CASES + ([] if prefix == "metaspace" else LEADING)
    assert differing(llama, reference, same) == []
    assert differing(llama, reference, CHAT if prefix != "metaspace" else [CHAT[2], CHAT[3], CHAT[6]]) == []
    keys = keys_of(tmp_path / "m")
    assert (keys["tokenizer.ggml.add_space_prefix"], keys["tokenizer.ggml.add_bos_token"]) == (prefix != "gemma", False) and len(keys["tokenizer.ggml.tokens"]) == 2048


def test_sentencepiece_style_from_the_trainer(tmp_path):
    "A vocabulary of the `tokenizers` trainer has one merge for each token, not all of them."
    shell = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    shell.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    shell.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=3000, special_tokens=specials, limit_alphabet=120, show_progress=False))
    tokenizer = json.loads(shell.to_str())
    tokenizer["added_tokens"] = tokenizer["added_tokens"][:3]
    llama, reference = pair(write_directory(tmp_path / "m", tokenizer, 3000, bos_token="<s>", eos_token="</s>"))
    assert differing(llama, reference, HOSTILE + MARKS + CASES + [line.strip() for line in bundled_text("heldout").split("\n")[:1500]]) == []


@pytest.mark.parametrize("options", [{}, {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}], ids=["identity", "nmt_nfkc"])
def test_sentencepiece_unigram(options, tmp_path):
    original = train_spm(tmp_path / "m", model_type="unigram", byte_fallback=False, **options)
    llama = Llama(keys_of(tmp_path / "m"), tmp_path / "v.gguf")
    assert llama.model.metadata["tokenizer.ggml.model"] == "t5"
    # one known difference: a text of nothing but a space gives no token where extra spaces are kept
    assert [t for t in TEXTS if llama.ids(t, add=False) != original.encode(t)] == ([] if options else [" "])


def test_known_difference_unknown_characters(tmp_path):
    "Without byte tokens SentencePiece answers <unk>; llama.cpp stops the process. The converter warns of it."
    processor = train_spm(tmp_path / "m", byte_fallback=False)
    assert processor.encode("☃")[-1] == processor.unk_id()
    write_vocab(tmp_path / "v.gguf", keys_of(tmp_path / "m"))
    code = ("from llm_quantize.quality.llama_cpp_model import open_llama\n"
            f"print(open_llama({str(tmp_path / 'v.gguf')!r}, vocab_only=True).tokenize('☃'.encode()))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode < 0


def test_overlays(tmp_path, caplog):
    "Tokens from added_tokens.json and tokenizer_config.json lie over the pieces; ids beyond the embedding are left out, with a warning."
    directory = tmp_path / "m"
    train_spm(directory)
    (directory / "added_tokens.json").write_text(json.dumps({"<plain>": 2000, "▁▁▁": 2001, "<far>": 9999}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"2002": {"content": "<ctl>", "special": True}, "0": {"content": "<unk>", "special": True}}, "bos_token": "<ctl>"}))
    (directory / "config.json").write_text(json.dumps({"vocab_size": 2010, "eos_token_id": [2, 1]}))
    keys = keys_of(directory)
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"].tolist()
    assert tokens[2000:2004] == ["<plain>", "   ", "<ctl>", "[PAD2003]"] and types[2000:2004] == [4, 4, 3, 5] and types[0] == 2 and len(tokens) == 2010
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"], keys["tokenizer.ggml.unknown_token_id"]) == (2002, 2, 0)
    assert "<far>" in caplog.text and keys["tokenizer.ggml.scores"].dtype == np.float32 and keys["tokenizer.ggml.token_type"].dtype == np.int32


def test_reading_a_model(tmp_path):
    "Our reader of the protocol buffer and sentencepiece's agree on every piece."
    processor = train_spm(tmp_path / "m", user_defined_symbols=["<x>"])
    model = read_sentencepiece(tmp_path / "m" / "tokenizer.model")
    assert [(t, pytest.approx(s)) for t, s, _ in model.pieces] == [(processor.id_to_piece(i), processor.get_score(i)) for i in range(2000)]
    assert [k for _, _, k in model.pieces][:5] == [2, 3, 3, 4, 6] and model.special == {"unk": 0, "bos": 1, "eos": 2, "pad": -1} and model.byte_fallback and not model.remove_extra_whitespaces

# ---- settings ------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("post, flags, expected", [(True, {}, (True, False)), (True, {"add_bos_token": False}, (True, False)), (False, {}, (False, False)), (False, {"add_bos_token": True}, (True, False)),
                                                   (False, {"add_bos_token": True, "add_eos_token": True}, (True, True)), (False, {"add_eos_token": True}, (False, True))])
def test_add_bos(post, flags, expected, sample_model, tmp_path):
    "The template decides, as in transformers; without one the flags do."
    tokenizer = json.loads((sample_model / "tokenizer.json").read_text())
    directory = write_directory(tmp_path / "m", tokenizer | ({} if post else {"post_processor": None}), 4096, bos_token="<s>", eos_token="</s>", **flags)
    keys = keys_of(directory)
    assert (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_eos_token"]) == expected
    if post: assert (AutoTokenizer.from_pretrained(directory).encode("a")[0] == 1) == expected[0]


def test_chat_templates(sample_model, tmp_path):
    directory = copy(sample_model, tmp_path / "m", FILES)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    assert not any("chat" in key for key in keys_of(directory))
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    assert keys_of(directory)["tokenizer.chat_template"] == "from json"
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": [{"name": "default", "template": "d"}, {"name": "tool use", "template": "t"}]}))
    keys = keys_of(directory)
    assert (keys["tokenizer.chat_template"], keys["tokenizer.chat_template.tool_use"], keys["tokenizer.chat_templates"]) == ("d", "t", ["tool_use"])
    (directory / "chat_template.jinja").write_text("from file")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "rag.jinja").write_text("r")
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "in settings"}))
    keys = keys_of(directory)
    assert (keys["tokenizer.chat_template"], keys["tokenizer.chat_template.rag"]) == ("from file", "r")
    assert AutoTokenizer.from_pretrained(directory).chat_template == {"default": "from file", "rag": "r"}

# ---- recognition ---------------------------------------------------------------------------------------------------------------------------------

TIKTOKEN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"

@pytest.mark.parametrize("pre_tokenizer, name", [
    (steps([TIKTOKEN]), "dbrx"), (steps([TIKTOKEN.replace("{1,3}", "")]), "qwen2"), (steps([TIKTOKEN.replace("{1,3}", "{1}")]), "qwen2"),
    (steps(PRE_TOKENIZERS[2].chain, "Removed", True), "dbrx"), (steps(PRE_TOKENIZERS[6].chain, "Removed", True), "gpt-4o"),
    (steps([PRE_TOKENIZERS[2].chain[0].replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])")]), "dbrx"),
    (steps([PRE_TOKENIZERS[2].chain[0].replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?i:'[sdmt]|'ll|'ve|'re)")]), "dbrx"),
    (steps([PRE_TOKENIZERS[2].chain[0].replace(r"\r", "\r").replace(r"\n", "\n")]), "dbrx"),
    ({"type": "ByteLevel", "add_prefix_space": False}, "gpt-2"), ({"type": "Sequence", "pretokenizers": [{"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}]}, BYTES | {"use_regex": True}]}, "smollm")])
def test_spellings(pre_tokenizer, name): assert recognise(pre_tokenizer) == name


def test_spellings_cut_alike():
    "The rewritings the recognition relies on are equivalences: the cuts of every hostile text agree."
    from tokenizers import Regex
    inside = PRE_TOKENIZERS[2].chain[0].replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?i:'[sdmt]|'ll|'ve|'re)")
    for a, b in [(inside, PRE_TOKENIZERS[2].chain[0]), (TIKTOKEN, PRE_TOKENIZERS[2].chain[0]), (TIKTOKEN.replace("{1,3}", "{1}"), PRE_TOKENIZERS[4].chain[0])]:
        for text in TEXTS + ["\n \n x", " \r\n\r\n y", "!!\n\n\n", "'S'LL'x"]:
            assert pre_tokenizers.Split(Regex(a), "isolated").pre_tokenize_str(text) == pre_tokenizers.Split(Regex(b), "isolated").pre_tokenize_str(text)


@pytest.mark.parametrize("pre_tokenizer", [
    steps([TIKTOKEN.replace("{1,3}", "{1,2}")]), steps([TIKTOKEN], "MergedWithNext"), steps([r"\p{N}", TIKTOKEN]), steps([r"\p{L}+"], "Removed", True), BYTES, None,
    {"type": "ByteLevel", "add_prefix_space": True}, {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, BYTES]}, {"type": "NoSuchStep"}])
def test_unknown_patterns_are_refused(pre_tokenizer):
    with pytest.raises(ConversionError) as caught: recognise(pre_tokenizer)
    assert "--pre NAME" in caught.value.suggestion and any(p.name in caught.value.suggestion for p in PRE_TOKENIZERS)


@pytest.mark.parametrize("row, spelling, text", [
    (2, "(?i:[sdmt]|'ll|'ve|'re)", "stand"), (6, "'(?i:[sdmt]|ll|ve|re)", "theHouse")], ids=["apostrophe-of-some", "optional-without-apostrophe"])
def test_lookalikes_are_refused(row, spelling, text):
    "Spellings that look like a known one and cut otherwise."
    from tokenizers import Regex
    known = PRE_TOKENIZERS[row].chain[0]
    lookalike = known.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", spelling)
    a, b = (pre_tokenizers.Split(Regex(expression), "isolated").pre_tokenize_str(text + " it's") for expression in (known, lookalike))
    assert a != b
    with pytest.raises(ConversionError): recognise(steps([lookalike]))


def test_every_known_name_loads(torn, tmp_path):
    "llama.cpp accepts each name in the list; and refuses one that is not."
    keys = keys_of(write_directory(tmp_path / "m", with_pre(torn, steps(PRE_TOKENIZERS[0].chain)), 4000, eos_token="<|endoftext|>"))
    def loads(name):
        path = write_vocab(tmp_path / "v.gguf", keys | {"tokenizer.ggml.pre": name})
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if model: llama_cpp.llama_model_free(model)
        return bool(model)
    llama_cpp.llama_log_set(QUIET, None)
    assert [name for name in KNOWN_NAMES if not loads(name)] == [] and not loads("llama-bpe-2")

QUIET = llama_cpp.llama_log_callback(lambda *_: None)

# ---- bad input -----------------------------------------------------------------------------------------------------------------------------------

def edit(source, path, **parts):
    "The sample's tokenizer.json with parts replaced; None removes one."
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    return write_directory(path, {k: v for k, v in (tokenizer | parts).items() if v != "gone"}, 4096)

MODEL = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}

@pytest.mark.parametrize("parts, message", [
    ({"model": {"type": "WordPiece", "vocab": {}}}, "WordPiece"), ({"model": {"type": "Unigram", "vocab": []}}, "Unigram"), ({"model": "gone"}, "no model"),
    ({"normalizer": {"type": "Lowercase"}}, "Lowercase"), ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}]}}, "NFKC"),
    ({"model": MODEL | {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix"), ({"model": MODEL | {"vocab": {"a": 0, "b": 0}}}, "one id"), ({"model": MODEL | {"vocab": {"a": -1}}}, "id -1"),
    ({"model": MODEL | {"vocab": {"a": 10**12}}}, "id 1000"), ({"model": MODEL | {"vocab": {"a": "x"}}}, "damaged"), ({"model": MODEL | {"merges": [["a"]]}}, "damaged"),
    ({"added_tokens": [{"id": 5, "content": "a", "special": True}], "model": MODEL}, "same text"), ({"added_tokens": [{"content": "a"}]}, "damaged"),
    ({"model": MODEL | {"vocab": {f"t{i}": i for i in range(5000)}}}, "5000 tokens")], ids=lambda v: v if isinstance(v, str) else "")
def test_bad_tokenizer_json(parts, message, sample_model, tmp_path):
    with pytest.raises(ConversionError, match=message) as caught: keys_of(edit(sample_model, tmp_path / "m", **parts))
    assert caught.value.suggestion and "\n" not in str(caught.value)


@pytest.mark.parametrize("name, content, message", [
    ("tokenizer.json", b"{\"model\": ", "tokenizer.json is damaged"), ("tokenizer.json", b"[1, 2]", "no JSON object"), ("tokenizer.json", b"\xff\xfe\x00", "damaged"),
    ("tokenizer.model", b"", "tokenizer.model is damaged"), ("tokenizer.model", b"version https://git-lfs", "tokenizer.model is damaged"), ("tokenizer.model", b"\x0a\xff\xff\xff\x7f", "damaged"),
    ("tokenizer_config.json", b"nonsense", "tokenizer_config.json is damaged")])
def test_damaged_files(name, content, message, sample_model, tmp_path):
    directory = copy(sample_model, tmp_path / "m", FILES[:1] if name == "tokenizer.model" else FILES)
    (directory / name).write_bytes(content)
    with pytest.raises(ConversionError, match=message) as caught: keys_of(directory)
    assert caught.value.suggestion


def test_truncated_model(sample_model, tmp_path):
    "A tokenizer.model cut at any of many places is refused."
    whole = (sample_model / "tokenizer.model").read_bytes()
    for cut in list(range(1, 40)) + [len(whole) // 2, len(whole) - 1]:
        (tmp_path / "tokenizer.model").write_bytes(whole[:cut])
        try: read_sentencepiece(tmp_path / "tokenizer.model")
        except ConversionError: continue
        pytest.fail(f"accepted {cut} bytes")


def test_no_tokenizer(tmp_path):
    with pytest.raises(ConversionError, match="no tokenizer.json and no tokenizer.model") as caught: tokenizer_metadata(tmp_path, {})
    assert "copy" in caught.value.suggestion
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ConversionError, match="only vocab.json") as caught: tokenizer_metadata(tmp_path, {})
    assert "save_pretrained" in caught.value.suggestion


def test_pre_option(sample_model, torn, tmp_path):
    with pytest.raises(ArgumentError, match="only byte-level"): tokenizer_metadata(sample_model, {}, pre="qwen2")
    odd = write_directory(tmp_path / "m", with_pre(torn, steps([TIKTOKEN.replace("{1,3}", "{1,2}")])), 4000)
    with pytest.raises(ConversionError): keys_of(odd)
    with pytest.raises(ArgumentError) as caught: keys_of(odd, pre="lama-bpe")
    assert "llama-bpe" in caught.value.suggestion
    assert keys_of(odd, pre="llama-bpe")["tokenizer.ggml.pre"] == "llama-bpe"


def test_two_files_that_disagree(sample_model, tmp_path, caplog):
    "A tokenizer.model of another vocabulary beside tokenizer.json: what transformers reads is written."
    directory = copy(sample_model, tmp_path / "m", FILES)
    train_spm(directory)
    (directory / "config.json").write_bytes((sample_model / "config.json").read_bytes())
    llama, reference = pair(directory)
    assert differing(llama, reference, HOSTILE) == [] and "different tokens" in caplog.text
