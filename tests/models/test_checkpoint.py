"Opening models: what is read, and how each kind of damage is told."
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llm_quantize.models.checkpoint import Checkpoint, open_checkpoint, sample_path
from llm_quantize.errors import ConversionError, ModelNotFoundError


@pytest.fixture
def model(tmp_path):
    "A model directory of two shards with one tensor of each dtype."
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.full((2, 2), 0.5, dtype=torch.float16)}
    save_file({"a": tensors["a"]}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": tensors["b"], "c": tensors["c"]}, folder / "model-00002-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors", "c": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder, tensors


def test_shards_are_one_model(model):
    folder, tensors = model
    opened = open_checkpoint(str(folder))
    assert opened.name == "tiny" and sorted(opened.names) == ["a", "b", "c"] and opened.parameters == 14
    for name, tensor in tensors.items():
        assert opened.shape(name) == tuple(tensor.shape) and opened.dtype(name) == tensor.dtype
        assert torch.equal(opened.tensor(name), tensor)


def test_sample_tensors_equal_the_library_reading():
    opened = Checkpoint(sample_path())
    with safe_open(sample_path() / "model.safetensors", "pt") as file:
        for name in opened.names: assert torch.equal(opened.tensor(name), file.get_tensor(name))


def test_a_missing_shard_is_named(model):
    folder, _ = model
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="model-00002-of-00002"): open_checkpoint(folder)


def test_an_index_that_promises_more_than_there_is(model):
    folder, _ = model
    save_file({"b": torch.ones(4)}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(ModelNotFoundError, match="first: c"): open_checkpoint(folder)


@pytest.mark.parametrize("placed", [3, None, ["x"]], ids=["number", "null", "list"])
def test_an_index_that_names_no_files(model, placed):
    folder, _ = model
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": placed}}))
    with pytest.raises(ModelNotFoundError, match="names something that is no file"): open_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 4, 30, -1], ids=["empty", "no-length", "no-header", "last-byte-gone"])
def test_truncated_weights(model, keep):
    folder, _ = model
    file = folder / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelNotFoundError, match="damaged"): open_checkpoint(folder)


@pytest.mark.parametrize("config", ["", "{", "[1]", "\xff"], ids=["empty", "cut", "list", "not-utf8"])
def test_broken_config(model, config):
    folder, _ = model
    (folder / "config.json").write_bytes(config.encode("latin-1"))
    with pytest.raises(ModelNotFoundError, match="config.json"): open_checkpoint(folder)


def test_directories_that_are_no_model(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no config.json"): open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match="no .safetensors file"): open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ConversionError, match="pytorch_model"): open_checkpoint(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConversionError) as caught: open_checkpoint(tmp_path / "x.gguf")
    assert "GGUF file is an output" in caught.value.suggestion


def test_an_already_quantized_tensor_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": torch.zeros(2, 2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match="already quantized"): Checkpoint(tmp_path).tensor("w")


class Hub(BaseHTTPRequestHandler):
    "A Hub that answers as the real one does for a gated, a private or missing, a forbidden and a broken repository."
    def do_GET(self):
        answers = {"gated": (403, "GatedRepo"), "missing": (401, "RepoNotFound"), "forbidden": (403, ""), "broken": (500, "")}
        status, code = next(answer for name, answer in answers.items() if name in self.path)
        self.send_response(status)
        if code: self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")
    do_HEAD = do_GET
    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def open_in_process(models, folder, endpoint):
    "What is said of each. The Hub's address is read at import, so each address gets a process of its own."
    code = f"""
from llm_quantize.models.checkpoint import open_checkpoint
from llm_quantize.errors import LLMQuantizeError
for model in {models!r}:
    try: open_checkpoint(model)
    except LLMQuantizeError as error: print(error.exit_code, error, "|", error.suggestion)
"""
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder), "HF_HUB_DOWNLOAD_TIMEOUT": "2"}
    env.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert len(said) == len(models), done.stdout + done.stderr
    return dict(zip(models, said, strict=True))


REFUSED = {"owner/gated": ("4", "licence"), "owner/missing": ("3", "spelling"), "owner/forbidden": ("4", "HF_TOKEN"),
           "owner/broken": ("3", "HTTP 500")}


@pytest.fixture(scope="module")
def refusals(hub, tmp_path_factory): return open_in_process(list(REFUSED), tmp_path_factory.mktemp("hub"), hub)


@pytest.mark.parametrize("repository", REFUSED)
def test_hub_refusals(refusals, repository):
    code, word = REFUSED[repository]
    assert refusals[repository].startswith(code + " ")
    assert word in refusals[repository]


def test_no_network_is_said_plainly(tmp_path):
    said = open_in_process(["owner/name"], tmp_path, "http://127.0.0.1:9")["owner/name"]
    assert said.startswith("3 ")
    assert "cannot be reached" in said
