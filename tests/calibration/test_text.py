"Text and windows: the cut is checked against SentencePiece and the tokenizers library directly, faults against the message that names them."
import hashlib
import json
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import llm_quantize
from llm_quantize.calibration.text import PARTS, ChatText, adds_bos, bundled_text, load_tokenizer, read_text, windows
from llm_quantize.models.checkpoint import sample_path
from llm_quantize.errors import CalibrationError, ConversionError

DATA = Path(llm_quantize.__file__).parent / "data"
PROSE = Path(__file__).parents[3] / "shared" / "models" / "prose-46m"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(sample_path())


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    "A byte-level BPE without BOS, as Qwen's is, trained here."
    path = tmp_path_factory.mktemp("bpe")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator([bundled_text("heldout")[:50_000]],
                             trainers.BpeTrainer(vocab_size=600, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    made.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "add_bos_token": False}))
    return path


# --- the bundled text -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("part", PARTS)
def test_bundled_text_is_the_one_its_provenance_describes(part):
    stated = re.search(rf"`{part}.txt.xz` .*`([0-9a-f]{{64}})`", (DATA / "text" / "PROVENANCE.md").read_text())[1]
    assert hashlib.sha256(bundled_text(part).encode()).hexdigest() == stated


def test_the_two_parts_share_no_paragraph():
    a, b = ({p for p in bundled_text(part).split("\n\n") if len(p) > 160} for part in PARTS)  # shorter ones: stock phrases of manuals
    assert len(a) > 1000 and len(b) > 400 and not a & b


def test_an_unknown_part_is_refused():
    with pytest.raises(CalibrationError, match="'test'"): bundled_text("test")


def test_package_data_says_where_it_comes_from():
    for folder in ("text", "sample-4m"): assert (DATA / folder / "PROVENANCE.md").read_text().strip()


# --- reading files ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, content, expected", [
    ("a.txt", "one\n\ntwo\n", ["one\n\ntwo\n"]),
    ("a.md", "# one", ["# one"]),
    ("bom.txt", "\ufeffone", ["one"]),
    ("a.json", '["one", {"text": "two"}, "  "]', ["one", "two"]),
    ("a.jsonl", '"one"\n\n{"text": "t\\nwo", "id": 3}\r\n', ["one", "t\nwo"]),
    ("separator.jsonl", '"one\u2028still one"\n"two"', ["one\u2028still one", "two"]),
], ids=["txt", "other suffix", "byte order mark", "json", "jsonl", "unicode line separator"])
def test_read_text(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content.encode("utf-8"))
    assert read_text(tmp_path / name) == expected


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", b"", "holds no text"),
    ("a.txt", b" \n\t\n", "holds no text"),
    ("a.txt", b"a\nb\nc \xff d", r"line 3 is not UTF-8 \(byte 0xff\)"),
    ("a.txt", "wide".encode("utf-16"), "line 1 is not UTF-8"),
    ("a.json", b"", "holds no text"),
    ("a.json", b"[]", "holds no text"),
    ("a.json", b'["one", "two"', "is not JSON"),
    ("a.json", b'{"text": "one"}', "holds dict where a list was expected"),
    ("a.json", b'["one", {"content": "two"}]', r"record 2 has no key 'text' \(its keys: content\)"),
    ("a.json", b'["one", "two", null]', "record 3 holds NoneType"),
    ("a.jsonl", b'{"text": "one"}\n{"text": \n', "line 2 is not JSON"),
    ("a.jsonl", b'{"text": "one"}\n\n{"text": 5}\n', "line 3 holds int"),
    ("a.jsonl", b'{"text": "one"}\n{}\n', "line 2 has no key 'text' .its keys: none"),
    ("a.jsonl", b"\n\n", "holds no text"),
])
def test_read_text_names_the_fault(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught: read_text(tmp_path / name)
    assert caught.value.exit_code == 15 and caught.value.suggestion


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(CalibrationError, match="no text file"): read_text(tmp_path / "none.txt")
    with pytest.raises(CalibrationError, match="directory without a text file"): read_text(tmp_path)


def test_a_directory_is_its_files_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, content in {"b.txt": "two", "a.jsonl": '{"text": "one"}\n', "sub/c.json": '["three"]', "image.png": "no text", ".hidden.txt": "no"}.items(): (tmp_path / name).write_text(content)
    assert read_text(tmp_path) == ["one", "two", "three"]
    (tmp_path / "sub" / "d.jsonl").write_text('{"text": "x"}\n{"tekst": "y"}')
    with pytest.raises(CalibrationError, match=r"d.jsonl line 2 has no key 'text'"): read_text(tmp_path)


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", '{"text": ""}\n\n{"text": " "}', "holds no text: line 1 is blank, and so is all that follows"), ("a.json", '[""]', "holds no text: record 1 is blank$"), ("a.txt", "\n", "line 1 is blank")])
def test_empty_strings_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(CalibrationError, match=message) as caught: read_text(tmp_path / name)
    assert caught.value.exit_code == 15

# --- conversations ----------------------------------------------------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Good day"}]
TEMPLATE = "{% for m in messages %}{% if m['role'] not in ['user', 'assistant'] %}{{ raise_exception('no role ' + m['role']) }}{% endif %}{{ bos_token }}{{ m['content'] }}{{ eos_token }}{% endfor %}"


@pytest.fixture
def chatty():
    tokenizer = load_tokenizer(sample_path())
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_messages_go_through_the_template(tmp_path, chatty):
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": MESSAGES}) + "\n" + json.dumps({"text": "<s> plain"}))
    chat, plain = read_text(tmp_path / "c.jsonl", chatty)
    assert chat == "<s>Hello there</s><s>Good day</s>" and isinstance(chat, ChatText) and not isinstance(plain, ChatText)
    expected = chatty.apply_chat_template(MESSAGES, return_dict=False)
    assert expected.count(1) == expected.count(2) == 2
    assert windows(chatty, [chat, plain], size=len(expected), limit=1, bos=False)[0].tolist() == expected
    assert windows(chatty, str.__str__(chat), size=8, bos=False).flatten().tolist().count(1) == 0  # the same characters as plain text hold no mark


@pytest.mark.parametrize("record, message", [
    ({"messages": []}, "no list of objects"), ({"messages": "hello"}, "no list of objects"), ({"messages": [{"role": "user"}]}, "no list of objects"), ({"messages": [{"role": 1, "content": "a"}]}, "no list"),
    ({"messages": [{"role": "wizard", "content": "a"}]}, "refuses the messages: no role wizard")])
def test_bad_messages_are_named(tmp_path, chatty, record, message):
    (tmp_path / "c.jsonl").write_text('"fine"\n' + json.dumps(record))
    with pytest.raises(CalibrationError, match=f"c.jsonl line 2.*{message}"): read_text(tmp_path / "c.jsonl", chatty)


def test_a_conversation_needs_a_template(tmp_path, tokenizer):
    (tmp_path / "c.json").write_text(json.dumps([{"messages": MESSAGES}]))
    for given in (None, tokenizer):
        with pytest.raises(CalibrationError, match="record 1 is a conversation"): read_text(tmp_path / "c.json", given)

# --- wikitext ---------------------------------------------------------------------------------------------------------------------------

def test_wikitext_without_the_package(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match="datasets, which is not installed") as caught: read_text("wikitext")
    assert caught.value.exit_code == 15 and "pip install datasets" in caught.value.suggestion
    (tmp_path / "wikitext").write_text("a file of that name")
    assert read_text("wikitext") == ["a file of that name"]


@pytest.mark.parametrize("works", [True, False])
def test_wikitext_with_a_stand_in_for_the_package(monkeypatch, tmp_path, works):
    def load_dataset(name, config, split):
        if not works: raise ConnectionError("no network")
        assert (name, config, split) == ("Salesforce/wikitext", "wikitext-2-raw-v1", "train")
        return {"text": [" = Title = \n", "", " Text .\n"]}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    if works: assert read_text("wikitext") == [" = Title = \n Text .\n"]
    else:
        with pytest.raises(CalibrationError, match=r"cannot be fetched \(ConnectionError\)"): read_text("wikitext")


# --- windows ----------------------------------------------------------------------------------------------------------------------------

def llama_cut(stream, size, bos):
    "The procedure of llama-perplexity, written out: BOS before the stream, chunks, BOS over the first token of each."
    stream = ([] if bos is None else [bos]) + stream
    chunks = [stream[i:i + size] for i in range(0, len(stream) - size + 1, size)]
    return [c if bos is None else [bos] + c[1:] for c in chunks]


@pytest.mark.parametrize("size", [64, 512])
def test_windows_equal_sentencepiece(tokenizer, size):
    text = bundled_text("heldout")
    stream = sentencepiece.SentencePieceProcessor(str(sample_path() / "tokenizer.model")).encode(text)
    expected, found = torch.tensor(llama_cut(stream, size, 1)), windows(tokenizer, text, size)
    assert torch.equal(found, expected) and found.dtype == torch.int64
    assert not torch.equal(found, torch.tensor(llama_cut(stream[1:], size, 1)))  # a stream off by one token is noticed
    assert not torch.equal(windows(tokenizer, text, size, bos=False), expected)


@pytest.mark.skipif(not PROSE.exists(), reason="needs ../shared/models/prose-46m beside the repository")
def test_windows_of_a_byte_level_model_with_bos():
    text = bundled_text("heldout")
    stream = Tokenizer.from_file(str(PROSE / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    assert windows(load_tokenizer(PROSE), text).tolist() == llama_cut(stream, 512, 16382)


def test_windows_without_bos(bpe):
    text = bundled_text("heldout")[50_000:90_000]
    found = load_tokenizer(bpe)
    assert not adds_bos(found)
    stream = Tokenizer.from_file(str(bpe / "tokenizer.json")).encode(text).ids
    assert windows(found, text, 128).tolist() == llama_cut(stream, 128, None)
    with pytest.raises(CalibrationError, match="no BOS token"): windows(found, text, 128, bos=True)


def test_documents_are_joined_and_the_tail_dropped(tokenizer):
    documents = ["It was a dark night. " * 20, "The parameter is optional. " * 20]
    stream = [i for d in documents for i in tokenizer(d, add_special_tokens=False).input_ids]
    assert windows(tokenizer, documents, 50).tolist() == llama_cut(stream, 50, 1)
    whole = (len(stream) + 1) // 50
    assert len(windows(tokenizer, documents, 50)) == whole and (len(stream) + 1) % 50


def test_limit_takes_the_first_windows(tokenizer):
    texts = bundled_text("calibration").split("\n\n")[:400]
    every = windows(tokenizer, texts, 64)
    assert len(every) > 5 and torch.equal(windows(tokenizer, texts, 64, limit=5), every[:5])
    assert torch.equal(windows(tokenizer, texts, 64, limit=10**6), every)


@pytest.mark.parametrize("arguments, message", [
    ({"texts": "short", "size": 512}, r"has \d+ tokens, a window needs 512"),
    ({"texts": [], "size": 512}, "has 1 tokens"),
    ({"texts": "short", "size": 1}, "predicts nothing"),
    ({"texts": "short", "size": 4, "limit": 0}, "limit of 0"),
])
def test_windows_refuses(tokenizer, arguments, message):
    with pytest.raises(CalibrationError, match=message): windows(tokenizer, **arguments)


def test_special_tokens_in_text_are_text(tokenizer, bpe):
    assert (windows(tokenizer, "a <s> b </s> " * 30, 32)[:, 1:] > 2).all()
    end = load_tokenizer(bpe)
    assert (windows(end, "one <|end|> two " * 30, 32) != end.eos_token_id).all()
    assert end("<|end|>").input_ids == [end.eos_token_id]  # recognised outside of windows: the tokenizer is left as it was


# --- the tokenizer ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("key, expected", [(True, True), (False, False), (None, True)])
def test_the_key_decides_over_the_post_processor(tmp_path, key, expected):
    for name in ("tokenizer.json", "tokenizer_config.json"): shutil.copy(sample_path() / name, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("add_bos_token")
    if key is not None: config["add_bos_token"] = key
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert adds_bos(load_tokenizer(tmp_path)) is expected


def test_no_tokenizer(tmp_path):
    shutil.copy(sample_path() / "config.json", tmp_path)
    with pytest.raises(ConversionError, match="no tokenizer in") as caught: load_tokenizer(tmp_path)
    assert caught.value.exit_code == 8


@pytest.mark.parametrize("damage", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_tokenizer(tmp_path, damage):
    for name in ("tokenizer.json", "tokenizer_config.json"): shutil.copy(sample_path() / name, tmp_path)
    (tmp_path / damage).write_text((tmp_path / damage).read_text()[:200])
    with pytest.raises(ConversionError, match="cannot be read"): load_tokenizer(tmp_path)
