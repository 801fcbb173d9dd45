"""Running a model layer by layer: the logits of transformers, and the sums that plain hooks on transformers' own model see, for every family.

The oracle knows nothing of the module under test: it hooks transformers' linear layers, and works the experts out again from what the router chose, in float64.
"""
import json
import subprocess
import sys

import pytest
import torch

from llm_quantize.models.layer_stack import LayerStack, Place, run_backward, run_windows
from llm_quantize.models.hidden_states import HiddenStates
from llm_quantize.models.listeners import Listener, layer_inputs
from llm_quantize.models.memory import available_memory
from llm_quantize.models.views import Replaced, View
from llm_quantize.models.architectures import architecture
from llm_quantize.models.checkpoint import open_checkpoint
from llm_quantize.errors import ArgumentError, ConversionError, OutOfMemoryError

from tests.tiny import VOCABULARY, hooked, random_model

FAMILIES = ["llama-biases", "llama-tied", "llama3", "mistral-window", "mixtral", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma2", "gemma3", "gemma3-pattern", "phi3", "phi3-longrope-short"]


class Sums(Listener):
    "Sums of squares and counts, by weight and expert."
    def __init__(self): self.sums, self.counts, self.calls = {}, {}, 0

    def input(self, read, x, expert):
        self.calls += 1
        for name in read.names:
            self.sums[name, expert] = self.sums.get((name, expert), 0) + x.double().square().sum(0)
            self.counts[name, expert] = self.counts.get((name, expert), 0) + len(x)


def same(a, b): return a.sums.keys() == b.sums.keys() and a.counts == b.counts and all(torch.equal(a.sums[key], b.sums[key]) for key in a.sums)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A function: a random model of a family and its checkpoint."
    kept = {}
    def make(name):
        if name not in kept:
            folder = tmp_path_factory.mktemp(name)
            kept[name] = random_model(name, folder), open_checkpoint(folder)
        return kept[name]
    return make


def tokens(windows=3, size=40, seed=5): return torch.randint(0, VOCABULARY, (windows, size), generator=torch.Generator().manual_seed(seed))


def logits(stack, ids):
    with torch.inference_mode():
        hidden = stack.embedding(ids)(ids)
        for i in range(len(stack)): hidden = stack[i](hidden)
        return stack.head()(hidden)

# ---- the same model --------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_transformers(family, made):
    model, checkpoint = made(family)
    ids = tokens(2)
    with torch.inference_mode(): expected = model(input_ids=ids, use_cache=False).logits
    found = logits(LayerStack(checkpoint, dtype=torch.float32, device="cpu"), ids)
    assert torch.allclose(found, expected, atol=2e-4, rtol=1e-4), (found - expected).abs().max()
    assert not torch.allclose(found.roll(1, 1), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_are_those_of_plain_hooks(family, made):
    model, checkpoint = made(family)
    listener, ids = Sums(), tokens()
    stack = LayerStack(checkpoint, dtype=torch.float32, device="cpu", keep=True)
    run_windows(stack, ids, listener)
    sums, counts = hooked(model, ids)
    assert listener.counts == counts
    for key in sums: assert torch.allclose(listener.sums[key], sums[key], rtol=2e-4, atol=1e-6), key
    assert any(not torch.allclose(listener.sums[key].flip(0), sums[key], rtol=2e-4, atol=1e-6) for key in sums)
    quantized = {t.name for t in stack.tensors if t.layer is not None and t.quantizable and t.name.endswith("weight")}
    assert {name for name, _ in listener.sums} == quantized


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_layer_by_layer_is_the_same_to_the_bit(family, dtype, made):
    _, checkpoint = made(family)
    ids, found = tokens(), []
    for keep in (True, False):
        listener = Sums()
        run_windows(LayerStack(checkpoint, dtype=dtype, device="cpu", keep=keep), ids, listener, batch=2)
        found.append(listener)
    assert same(*found)
    key = next(iter(found[1].sums))
    found[1].sums[key] = found[1].sums[key] + 1e-9
    assert not same(*found)


def test_one_reduction_for_weights_with_a_common_input(made):
    "Dense layers: four streams for seven weights; with experts and a shared expert, one more for each that was visited."
    for family in ("llama3", "qwen2moe"):
        listener, ids = Sums(), tokens(1)
        stack = LayerStack(made(family)[1], device="cpu")
        run_windows(stack, ids, listener)
        visited = sum(1 for name, _ in listener.sums if "ffn_down_exps" in name)
        assert listener.calls == (4 if family == "llama3" else 4) * len(stack) + 2 * visited
        assert sum(len(read.names) for read in layer_inputs(stack.tensors)) == (7 if family == "llama3" else 10) * len(stack)


def test_first_token_is_exact_in_bfloat16(sample_model):
    "BOS begins every window: rounding it the same way every time would bias the sums."
    ids = torch.cat([torch.ones(2, 1, dtype=torch.int64), tokens(2, 31)], 1)
    low, high = (LayerStack(sample_model, dtype=dtype, device="cpu") for dtype in (torch.bfloat16, torch.float32))
    with torch.inference_mode():
        a, b = low.embedding(ids)(ids), high.embedding(ids)(ids)
        for i in range(len(low)): a, b = low[i](a), high[i](b)
    assert torch.allclose(a[:, 0], b[:, 0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(a[:, 1:], b[:, 1:], rtol=1e-4, atol=1e-4)
    alone = LayerStack(sample_model, dtype=torch.bfloat16, device="cpu")
    with torch.inference_mode():
        other = tokens(1, 32, seed=9)
        alone[0](alone.embedding(other)(other))          # another first token was seen before
        again = alone.embedding(ids)(ids)
        for i in range(len(alone)): again = alone[i](again)
    assert torch.equal(a, again)

# ---- other weights -------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", ["llama-biases", "mixtral", "qwen2moe", "gemma3", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "loaded"])
def test_replaced_tensors_give_what_another_checkpoint_would(family, dtype, keep, made):
    "Each tensor by itself: layers, embedding and head are those of a stack of the changed checkpoint, and the stack stays as it was."
    _, checkpoint = made(family)
    ids, stack = tokens(2, 16), LayerStack(checkpoint, dtype=dtype, device="cpu", keep=keep)
    before = logits(stack, ids)
    for name in [name for name in checkpoint.names if "layers.1." in name or "layers" not in name]:
        replaced = {name: checkpoint.tensor(name).float() * 1.25 + 0.01}
        expected = logits(LayerStack(Replaced(checkpoint, replaced), dtype=dtype, device="cpu", keep=False), ids)
        with torch.inference_mode():
            hidden = stack.embedding(ids, replaced)(ids)
            for i in range(len(stack)): hidden = stack.layer(i, replaced)(hidden)
            found = stack.head(replaced)(hidden)
        assert torch.equal(found, expected), name
        assert not torch.equal(found, before) or "k_proj.bias" in name, name
    assert torch.equal(logits(stack, ids), before)


class Counting(View):
    "Remembers what was read."
    read = ()
    def tensor(self, name):
        self.read += (name,)
        return super().tensor(name)


@pytest.mark.parametrize("family", ["llama-tied", "mixtral", "gemma3"])
def test_embedding_and_head_read_nothing_of_the_layers(family, made):
    checkpoint = Counting(made(family)[1])
    stack, ids = LayerStack(checkpoint, device="cpu", keep=False), tokens(1, 8)
    checkpoint.read = ()
    assert stack.embedding(ids)(ids).shape == (1, 8, stack.config.hidden_size)
    assert stack.head()(torch.zeros(1, stack.config.hidden_size)).shape[0] == 1
    assert checkpoint.read and not [name for name in checkpoint.read if "layers." in name]


def test_a_kept_layer_is_not_read_again(made):
    checkpoint = Counting(made("qwen3")[1])
    stack, name = LayerStack(checkpoint, device="cpu", keep=True), "model.layers.1.mlp.up_proj.weight"
    changed = torch.zeros(checkpoint.shape(name))
    before = stack[1]
    checkpoint.read = ()
    other = stack.layer(1, {name: changed})
    assert checkpoint.read == () and stack[1] is before and stack.layer(0, {name: changed}) is stack[0]
    assert not other.module.mlp.up_proj.weight.any() and before.module.mlp.up_proj.weight.any()
    assert other.module.mlp.down_proj.weight is before.module.mlp.down_proj.weight

# ---- going on ------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("keep", [True, False])
def test_start_and_step_cover_every_window_once(keep, made):
    _, checkpoint = made("qwen3")
    ids, whole, places = tokens(5), Sums(), []
    run_windows(LayerStack(checkpoint, device="cpu", keep=keep), ids, whole, batch=2, step=places.append)
    assert places == ([Place(0, 2), Place(0, 4), Place(0, 5)] if keep else [Place(0, 2), Place(0, 4), Place(1, 0), Place(1, 2), Place(1, 4), Place(2, 0)])
    if not keep: return
    parts = Sums()
    run_windows(LayerStack(checkpoint, device="cpu", keep=True), ids[:2], parts, batch=2)
    run_windows(LayerStack(checkpoint, device="cpu", keep=True), ids, parts, batch=2, start=Place(0, 2))
    assert same(whole, parts)


@pytest.mark.parametrize("room", [0, 1.5 * 2 * 40 * 64 * 4, None], ids=["all in files", "some in files", "all in memory"])
def test_layers_in_two_stretches_and_hidden_states_in_files(room, made, tmp_path):
    _, checkpoint = made("qwen3")
    ids, whole, parts, waiting, files = tokens(6), Sums(), Sums(), HiddenStates(room, tmp_path), []
    stack = LayerStack(checkpoint, device="cpu", keep=False)
    run_windows(stack, ids, whole, batch=2)
    run_windows(stack, ids, parts, batch=2, waiting=waiting, stop=1, step=lambda _: files.append(len(list(tmp_path.glob("*/*")))))
    only_first = {name.split(".")[1] for name, _ in parts.sums}
    run_windows(stack, ids, parts, batch=2, waiting=waiting, start=Place(1, 0))
    assert only_first == {"0"} and same(whole, parts)
    hidden = 2 * 40 * stack.config.hidden_size * 4
    assert max(files) == (0 if room is None else 3 - int(room // hidden)) and waiting.held == 0 and not list(tmp_path.glob("*/*"))
    del waiting
    assert not list(tmp_path.iterdir())


def test_hidden_states_stay_in_memory_where_no_file_can_be_made(made, tmp_path, caplog):
    _, checkpoint = made("qwen3")
    ids, whole, parts = tokens(4), Sums(), Sums()
    run_windows(LayerStack(checkpoint, device="cpu", keep=True), ids, whole)
    run_windows(LayerStack(checkpoint, device="cpu", keep=False), ids, parts, waiting=HiddenStates(0, tmp_path / "missing"))
    assert same(whole, parts) and len([r for r in caplog.records if "stay in memory" in r.message]) == 1


def test_gradients_are_autograds(made):
    "x and g together give the gradient of the weight, which autograd on transformers' model gives directly."
    class WeightGradients(Listener):
        def __init__(self): self.found = {}
        def gradient(self, name, x, g, expert): self.found[name, expert] = g.double().T @ x.double()
    for family in ("qwen3", "mixtral"):
        model, checkpoint = made(family)
        listener, ids = WeightGradients(), tokens(1)
        run_backward(LayerStack(checkpoint, dtype=torch.float32, device="cpu", keep=True), ids, listener, lambda first, scores, following: following)
        model.requires_grad_(True)
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(input_ids=ids, use_cache=False).logits[0, :-1], ids[0, 1:], reduction="sum").backward()
        layer = model.model.layers[1]
        pairs = [("attn_q", 0, layer.self_attn.q_proj.weight.grad), ("attn_output", 0, layer.self_attn.o_proj.weight.grad)]
        if family == "qwen3": pairs += [("ffn_up", 0, layer.mlp.up_proj.weight.grad), ("ffn_down", 0, layer.mlp.down_proj.weight.grad)]
        else: pairs += [("ffn_down_exps", e, layer.mlp.experts.down_proj.grad[e]) for e in range(4)] + [("ffn_up_exps", e, layer.mlp.experts.gate_up_proj.grad[e].chunk(2)[1]) for e in range(4)]
        for role, expert, expected in pairs:
            found = listener.found[f"blk.1.{role}.weight", expert]
            assert torch.allclose(found, expected.double(), rtol=1e-3, atol=1e-3 * expected.abs().max().item()), (role, expert)
        model.zero_grad()
        model.requires_grad_(False)

# ---- trouble -------------------------------------------------------------------------------------------------------------------------------------

def test_refusals(made, sample_model):
    _, checkpoint = made("qwen3")
    with pytest.raises(OutOfMemoryError, match="gradients need all layers"): run_backward(LayerStack(checkpoint, keep=False, device="cpu"), tokens(), Listener(), None)
    if not torch.cuda.is_available():
        with pytest.raises(ArgumentError, match="no device cuda"): LayerStack(checkpoint, device="cuda")
    with pytest.raises(IndexError): LayerStack(checkpoint, device="cpu")[99]
    with pytest.raises(ConversionError, match="not supported"): architecture({"architectures": ["RwkvForCausalLM"]})


def test_a_listener_that_fails_leaves_the_layer_usable(made):
    class Broken(Listener):
        def input(self, read, x, expert): raise ZeroDivisionError
    _, checkpoint = made("qwen3")
    stack, ids, listener = LayerStack(checkpoint, device="cpu", keep=True), tokens(1), Sums()
    with pytest.raises(ZeroDivisionError): run_windows(stack, ids, Broken())
    run_windows(stack, ids, listener)
    assert listener.calls == 4 * len(stack)


def test_a_limit_on_the_process_is_seen(sample_model):
    "Under a limit that the layers do not fit, the stack goes layer by layer by itself."
    pytest.importorskip("resource", reason="needs limits of Unix")
    code = """if True:
        import json, resource, sys, torch
        from llm_quantize.models.layer_stack import LayerStack
        from llm_quantize.models.memory import available_memory
        free = LayerStack(sys.argv[1], device="cpu").keep
        used = 1024 * int(open("/proc/self/status").read().split("VmData:")[1].split()[0])
        resource.setrlimit(resource.RLIMIT_DATA, (used + 9_000_000,) * 2)
        print(json.dumps([free, LayerStack(sys.argv[1], device="cpu").keep, available_memory()]))"""
    done = subprocess.run([sys.executable, "-c", code, str(sample_model)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    free, capped, bytes_left = json.loads(done.stdout)
    assert free and not capped and bytes_left <= 9_000_000 < available_memory()
