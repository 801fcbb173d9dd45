"""Importance matrices: sums against an independent implementation, runs that are killed and resumed, experts, disks that fill up."""
import logging
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llm_quantize.models.job import Job
from llm_quantize.models.layer_stack import LayerStack
from llm_quantize.calibration.text import bundled_text, load_tokenizer, windows
from llm_quantize.models.checkpoint import open_checkpoint
from llm_quantize.errors import ArgumentError, CheckpointError, ImportanceError, OutOfMemoryError
from llm_quantize.calibration.imatrix import ImportanceMatrix
from llm_quantize.calibration.collect import PRIOR, RARE, collect, saved_way, with_prior
from llm_quantize.calibration.resume import discard_state
from llm_quantize.models.fingerprint import fingerprint

from tests.tiny import VOCABULARY, hooked, random_model

@pytest.fixture(scope="module")
def ids(sample_model): return windows(load_tokenizer(sample_model), bundled_text("calibration"), size=512, limit=6)


def saved(matrix, path): return matrix.save(path).read_bytes()

# ---- sums ----------------------------------------------------------------------------------------------------------------------------------------

def test_activation_sums(sample_model, ids, tmp_path):
    "In float32 as plain hooks see them; in bfloat16 within a thousandth of that, tensor by tensor."
    model = AutoModelForCausalLM.from_pretrained(sample_model, dtype=torch.float32)
    sums, counts = hooked(model, ids)
    exact = collect(LayerStack(sample_model, dtype=torch.float32, device="cpu"), ids)
    low = collect(LayerStack(sample_model, dtype=torch.bfloat16, device="cpu"), ids)
    assert exact.names == sorted(name for name, _ in sums)
    for name in exact.names:
        assert torch.allclose(exact.sums[name][0], sums[name, 0], rtol=1e-5) and exact.counts[name].tolist() == [ids.numel()] == [counts[name, 0]]
        assert abs(low.sums[name].sum() / sums[name, 0].sum() - 1) < 1e-3, name
        assert not torch.allclose(exact.sums[name][0].roll(1), sums[name, 0], rtol=1e-5)
    assert (exact.chunk_count, exact.chunk_size) == tuple(ids.shape)
    assert saved(exact, tmp_path / "a") == saved(collect(LayerStack(sample_model, dtype=torch.float32, device="cpu", keep=False), ids), tmp_path / "b")


@pytest.mark.parametrize("method", ["gradient", "fisher"])
def test_gradient_sums(method, sample_model, ids):
    "x^2 times the squared gradient at the output, from autograd on transformers' model; `fisher` draws its labels as documented."
    ids = ids[:2, :128].contiguous()
    model, expected = AutoModelForCausalLM.from_pretrained(sample_model, dtype=torch.float32, attn_implementation="eager").requires_grad_(False), {}
    for path, role in (("self_attn.k_proj", "attn_k"), ("self_attn.o_proj", "attn_output"), ("mlp.gate_proj", "ffn_gate"), ("mlp.down_proj", "ffn_down")):
        def hook(module, args, out, name=f"blk.2.{role}.weight"):
            def back(g): expected[name] = expected.get(name, 0) + (args[0][0].double().square() * g[0].double().square().sum(-1, keepdim=True)).sum(0)
            out.register_hook(back)
        model.model.layers[2].get_submodule(path).register_forward_hook(hook)
    for window in range(2):
        hidden = model.model.embed_tokens(ids[window:window + 1]).requires_grad_()
        scores = model(inputs_embeds=hidden, use_cache=False).logits[0, :-1].log_softmax(-1)
        labels = ids[window, 1:]
        if method == "fisher":
            heights = scores.detach().exp().cumsum(-1)
            chance = torch.rand(127, 1, generator=torch.Generator().manual_seed(5 * 1_000_003 + window))
            labels = (heights < chance * heights[:, -1:]).sum(-1)
        (-scores.gather(1, labels[:, None]).sum()).backward()
    found = collect(LayerStack(sample_model, dtype=torch.float32, device="cpu"), ids, method=method, seed=5)
    for name, sums in expected.items():
        assert torch.allclose(found.sums[name][0] / found.notes["llm_quantize.scale"], sums, rtol=2e-3), name
        assert not torch.allclose(found.sums[name][0] / found.notes["llm_quantize.scale"], sums.roll(1), rtol=2e-3)
    other = collect(LayerStack(sample_model, dtype=torch.float32, device="cpu"), ids, method=method, seed=6)
    assert torch.equal(other.sums[name], found.sums[name]) == (method == "gradient")


def test_scale_keeps_the_mean_near_one(sample_model, ids):
    matrix = collect(LayerStack(sample_model, device="cpu"), ids[:2], method="fisher")
    mean = torch.cat([matrix.importance(name).flatten() for name in matrix.names]).mean().item()
    assert 0.5 < mean < 2 and torch.tensor(matrix.notes["llm_quantize.scale"]).log2().item() % 1 == 0

# ---- experts -------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", ["mixtral", "qwen2moe", "qwen3moe"])
@pytest.mark.parametrize("method", ["activation", "fisher"])
def test_experts_are_counted_apart(family, method, tmp_path):
    model = random_model(family, tmp_path)
    tokens = torch.randint(0, VOCABULARY, (8, 64), generator=torch.Generator().manual_seed(1))
    sums, counts = hooked(model, tokens)
    matrix = collect(LayerStack(tmp_path, dtype=torch.float32, device="cpu"), tokens, method=method)
    for layer in range(2):
        for role in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
            name = f"blk.{layer}.{role}.weight"
            plenty = [e for e in range(4) if counts.get((name, e), 0) >= RARE]
            assert plenty and matrix.counts[name][plenty].tolist() == [counts[name, e] for e in plenty]
            if method == "activation":
                for e in plenty: assert torch.allclose(matrix.sums[name][e], sums[name, e], rtol=2e-4, atol=1e-6)
                assert not torch.allclose(matrix.sums[name][plenty[0]], matrix.sums[name][plenty[-1]])
    assert sum(matrix.counts["blk.0.ffn_up_exps.weight"]) == 2 * tokens.numel()


def test_rare_experts_lean_on_the_others(tmp_path, caplog):
    "Two tokens of text cannot visit every expert often: all are named, none is without importance."
    random_model("mixtral", tmp_path)
    tokens = torch.randint(0, VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(1))
    matrix = collect(LayerStack(tmp_path, device="cpu"), tokens)
    rare = matrix.notes["llm_quantize.rare_experts"]
    assert len(rare) == 2 * 3 * 4 and all("tokens" in line for line in rare) and "neutral prior" in caplog.text
    for name in matrix.names:
        assert (matrix.counts[name] > 0).all() and (matrix.sums[name].sum(1) > 0).all()
    again = ImportanceMatrix.load(matrix.save(tmp_path / "m.imatrix"))
    assert again.notes["llm_quantize.rare_experts"] == rare


def test_prior():
    sums, counts = torch.tensor([[640.0, 64.0], [6.0, 2.0], [0.0, 0.0]]).double(), torch.tensor([64.0, 2.0, 0.0]).double()
    after, tokens, rare = with_prior(sums, counts, True)
    mean = sums.sum(0) / 66
    assert rare == [1, 2] and tokens.tolist() == [64, 2 + PRIOR, PRIOR] and torch.equal(after[0], sums[0])
    assert torch.allclose(after[2] / PRIOR, mean) and torch.allclose(after[1], sums[1] + PRIOR * mean)
    assert torch.allclose(with_prior(sums, counts, False)[0][2] / PRIOR, mean.mean().expand(2))
    nothing = torch.zeros(3, 2).double()
    assert torch.equal(with_prior(nothing, torch.zeros(3).double(), True)[0], nothing) and with_prior(nothing, torch.zeros(3).double(), True)[2] == [0, 1, 2]

# ---- interruptions -------------------------------------------------------------------------------------------------------------------------------

# Runs are killed in processes of their own. They are forked from one that has done the imports and nothing else, since those take longer than the runs.

PROCESSES = multiprocessing.get_context("forkserver") if "forkserver" in multiprocessing.get_all_start_methods() else None
if PROCESSES: PROCESSES.set_forkserver_preload(["llm_quantize.calibration.collect", "llm_quantize.calibration.text", "transformers.models.llama.modeling_llama", __name__])


def whole_run(said, model, folder, target, method, keep, resume):
    "What the process does: eight windows, progress told after each step."
    torch.set_num_threads(1)
    ids = windows(load_tokenizer(model), bundled_text("calibration"), size=512, limit=8)
    collect(LayerStack(model, device="cpu", keep=keep), ids, method=method, checkpoint_dir=folder, resume=resume, interval=0.0, progress=lambda done, total: said.send(done)).save(target)


def start(*arguments):
    "A process on its way, and the end of a pipe where it tells its progress."
    here, there = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=whole_run, args=(there, *arguments))
    process.start()
    there.close()
    return process, here


def finish(process, said):
    "How many steps a process told until its good end."
    steps = 0
    try:
        while True:
            said.recv()
            steps += 1
    except EOFError: process.join()
    assert process.exitcode == 0
    return steps


def kill_after(process, said, lines, moments):
    "kill -9 after so many steps and a random moment more."
    for _ in range(lines): said.recv()
    time.sleep(moments)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.skipif(not PROCESSES, reason="needs kill -9 and a fork server, of Unix")
@pytest.mark.parametrize("method, keep", [("activation", True), ("activation", False), ("fisher", True)], ids=["by window", "by layer", "fisher"])
def test_killed_and_resumed_is_the_same_to_the_byte(method, keep, sample_model, tmp_path):
    chance = random.Random(f"{method} {keep}")
    whole, resumed, folder = tmp_path / "whole.imatrix", tmp_path / "resumed.imatrix", tmp_path / "state"
    steps = finish(*start(sample_model, tmp_path / "other", whole, method, keep, False))
    assert steps == (8 if keep else 32)
    first = chance.randrange(1, steps // 2)
    kill_after(*start(sample_model, folder, resumed, method, keep, False), first, chance.random() * 0.05)
    assert not resumed.exists() and (folder / "analyze.state").exists()
    kill_after(*start(sample_model, folder, resumed, method, keep, True), chance.randrange(1, max(2, steps // 3)), chance.random() * 0.05)
    assert finish(*start(sample_model, folder, resumed, method, keep, True)) < steps # it did go on, and not begin again
    assert resumed.read_bytes() == whole.read_bytes()
    with open(resumed, "rb+") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\1")
    assert resumed.read_bytes() != whole.read_bytes()

# ---- states that do not fit ----------------------------------------------------------------------------------------------------------------------

class Stop(Exception): pass


def interrupted(model, ids, folder, tokens=1024, keep=None, **options):
    "A run that was stopped after some tokens."
    def progress(done, total):
        if done >= tokens: raise Stop
    with pytest.raises(Stop): collect(LayerStack(model, device="cpu", keep=keep), ids, checkpoint_dir=folder, interval=0.0, progress=progress, **options)


def test_another_model_text_or_option(sample_model, ids, tmp_path):
    folder = tmp_path / "state"
    interrupted(sample_model, ids, folder)
    other = tmp_path / "other"
    other.mkdir()
    for file in sample_model.iterdir(): (other / file.name).write_bytes(file.read_bytes())
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"] * 2
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    before = (folder / "analyze.state").read_bytes()
    for model, text, options, message in [(other, ids, {}, "another model"), (sample_model, ids[:5], {}, "another text"), (sample_model, ids.flip(0), {}, "another text"),
                                          (sample_model, ids, {"method": "fisher"}, "method = activation, not fisher"), (sample_model, ids, {"batch": 2}, "batch = 1, not 2"),
                                          (sample_model, ids, {"keep": False}, "way = by window, not by layer")]:
        stack = LayerStack(model, device="cpu", keep=options.pop("keep", None))
        with pytest.raises(CheckpointError, match=message) as caught: collect(stack, text, checkpoint_dir=folder, resume=True, **options)
        assert caught.value.exit_code == 7 and "--resume" in caught.value.suggestion
    assert (folder / "analyze.state").read_bytes() == before  # a refusal destroys nothing
    collect(LayerStack(sample_model, device="cpu"), ids, checkpoint_dir=folder, resume=True)
    discard_state(folder)
    assert not list(folder.iterdir())


def test_damaged_states(sample_model, ids, tmp_path):
    folder = tmp_path / "state"
    interrupted(sample_model, ids, folder, keep=False, tokens=2000)
    whole = (folder / "analyze.state").read_bytes()
    for data in (b"", whole[:100], whole[:-50], b"\0" * len(whole)):
        (folder / "analyze.state").write_bytes(data)
        with pytest.raises(CheckpointError, match="damaged") as caught: collect(LayerStack(sample_model, device="cpu", keep=False), ids, checkpoint_dir=folder, resume=True)
        assert caught.value.exit_code == 7
    (folder / "analyze.state").write_bytes(whole)
    states = list(folder.glob("analyze-hidden-?.f32"))
    assert states
    for path in states: path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="lost its hidden states"): collect(LayerStack(sample_model, device="cpu", keep=False), ids, checkpoint_dir=folder, resume=True)


def test_resume_takes_the_way_of_the_run(sample_model, ids, tmp_path):
    "Memory may look different the second time: the way through model and text is that of the first."
    for keep in (False, True):
        interrupted(sample_model, ids, tmp_path / "state", keep=keep)
        assert saved_way(tmp_path / "state") is keep
        resumed = collect(Job(sample_model, device="cpu").stack(keep=saved_way(tmp_path / "state")), ids, checkpoint_dir=tmp_path / "state", resume=True)
        assert saved(resumed, tmp_path / "a") == saved(collect(LayerStack(sample_model, device="cpu"), ids), tmp_path / "b")
        discard_state(tmp_path / "state")
        assert saved_way(tmp_path / "state") is None


def test_nothing_saved_yet_is_a_beginning(sample_model, ids, tmp_path, caplog):
    matrix = collect(LayerStack(sample_model, device="cpu"), ids[:1], checkpoint_dir=tmp_path, resume=True)
    assert "starting from the beginning" in caplog.text and matrix.chunk_count == 1

# ---- disks ---------------------------------------------------------------------------------------------------------------------------------------

def limited_run(said, model, folder, target, keep, limit):
    "Four windows in a process whose files cannot grow beyond a limit; tells the warnings."
    import resource
    class Tell(logging.Handler):
        def emit(self, record): said.send(record.getMessage())
    logging.getLogger("llm_quantize").addHandler(Tell())
    torch.set_num_threads(1)
    ids = windows(load_tokenizer(model), bundled_text("calibration"), size=512, limit=4)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    matrix = collect(LayerStack(model, device="cpu", keep=keep), ids, checkpoint_dir=folder, interval=0.0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    matrix.save(target)


@pytest.mark.skipif(not PROCESSES, reason="needs limits and a fork server, of Unix")
@pytest.mark.parametrize("keep, limit", [(True, 20_000), (False, 20_000), (False, 1_200_000)], ids=["by window", "by layer", "by layer, state fits"])
def test_a_full_disk_does_not_stop_the_run(keep, limit, sample_model, ids, tmp_path):
    "No file may grow beyond the limit, which is what writing to a full disk looks like."
    here, there = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=limited_run, args=(there, sample_model, tmp_path / "state", tmp_path / "a", keep, limit))
    process.start()
    there.close()
    said = []
    try:
        while True: said.append(here.recv())
    except EOFError: process.join()
    assert process.exitcode == 0 and sum("going on without" in line for line in said) == 1
    torch.set_num_threads(1)
    assert (tmp_path / "a").read_bytes() == saved(collect(LayerStack(sample_model, device="cpu"), ids[:4]), tmp_path / "b")
    assert not (tmp_path / "state" / "analyze.state").exists()


def test_a_folder_that_cannot_be_made(sample_model, ids, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    matrix = collect(LayerStack(sample_model, device="cpu"), ids[:1], checkpoint_dir=tmp_path / "file" / "state", interval=0.0)
    assert matrix.chunk_count == 1 and "going on without" in caplog.text

# ---- trouble -------------------------------------------------------------------------------------------------------------------------------------

def test_refusals(sample_model, ids, tmp_path):
    with pytest.raises(ArgumentError, match="unknown method"): collect(LayerStack(sample_model), ids, method="hessian")
    with pytest.raises(OutOfMemoryError, match="all layers in memory"): collect(LayerStack(sample_model, keep=False, device="cpu"), ids, method="fisher")
    for file in sample_model.iterdir(): (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.1.self_attn.o_proj.weight"][3, 5] = float("inf")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ImportanceError, match="blk.1.* not numbers") as caught: collect(LayerStack(tmp_path, device="cpu"), ids[:1])
    assert caught.value.exit_code == 16


def test_identity_tells_models_apart(sample_model, ids, tmp_path):
    checkpoint = open_checkpoint(sample_model)
    mine = fingerprint(checkpoint, ids, method="activation")
    assert mine == fingerprint(open_checkpoint(sample_model), ids.clone(), method="activation")
    for file in sample_model.iterdir(): (tmp_path / file.name).write_bytes(file.read_bytes())
    assert fingerprint(open_checkpoint(tmp_path), ids, method="activation") == mine
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-06'))
    assert config != (tmp_path / "config.json").read_text() and fingerprint(open_checkpoint(tmp_path), ids, method="activation")["model"] != mine["model"]
    assert LayerStack(checkpoint, device="cpu").bytes < checkpoint.bytes
