"Views of a checkpoint: what they read, how often, and that they leave alone what they do not change."
import pytest
import torch

from llm_quantize.models.checkpoint import open_checkpoint
from llm_quantize.models.views import Kept, Replaced, View


class Counting(View):
    "Remembers what was read."
    def __init__(self, checkpoint):
        super().__init__(checkpoint)
        self.read = []

    def tensor(self, name):
        self.read.append(name)
        return super().tensor(name)


@pytest.fixture
def checkpoint(sample_model): return open_checkpoint(sample_model)


def test_a_view_offers_what_its_checkpoint_does(checkpoint):
    view = View(checkpoint)
    for what in ("path", "name", "config", "names", "parameters", "bytes"): assert getattr(view, what) == getattr(checkpoint, what), what
    for name in checkpoint.names:
        assert view.shape(name) == checkpoint.shape(name) and view.dtype(name) == checkpoint.dtype(name)
        assert torch.equal(view.tensor(name), checkpoint.tensor(name))
    assert open_checkpoint(view) is view


def test_kept_reads_each_tensor_once(checkpoint):
    counting = Counting(checkpoint)
    kept = Kept(counting)
    for _ in range(3):
        for name in kept.names: assert torch.equal(kept.tensor(name), checkpoint.tensor(name)), name
    assert counting.read == checkpoint.names
    assert kept.held == sum(checkpoint.tensor(name).nbytes for name in checkpoint.names)


def test_kept_stays_within_its_room(checkpoint):
    counting = Counting(checkpoint)
    kept = Kept(counting, room=checkpoint.bytes / 2)
    for _ in range(2):
        for name in kept.names: assert torch.equal(kept.tensor(name), checkpoint.tensor(name)), name
    assert 0 < kept.held <= checkpoint.bytes / 2
    assert len(checkpoint.names) < len(counting.read) < 2 * len(checkpoint.names)


@pytest.mark.parametrize("dtype, given", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float64, torch.float32)], ids=str)
def test_replaced_weights_are_not_rounded(dtype, given, checkpoint):
    name = "model.layers.1.mlp.up_proj.weight"
    weights = torch.randn(checkpoint.shape(name)).to(dtype)
    view = Replaced(checkpoint, {name: weights})
    assert view.tensor(name).dtype == given and torch.equal(view.tensor(name), weights.to(given))
    others = [other for other in checkpoint.names if other != name]
    assert all(torch.equal(view.tensor(other), checkpoint.tensor(other)) for other in others)


def test_what_the_files_hold_is_seen_through_a_view(checkpoint):
    name = checkpoint.names[0]
    view = Kept(Replaced(checkpoint, {name: torch.zeros(checkpoint.shape(name))}))
    assert view.stored_type(name) == "BF16" and torch.equal(view.stored(name), checkpoint.tensor(name))
    assert repr(view) == repr(checkpoint).replace("Checkpoint", "Kept", 1)


def test_views_around_views(checkpoint):
    name, counting = "model.norm.weight", Counting(checkpoint)
    kept = Kept(Replaced(counting, {name: torch.zeros(checkpoint.shape(name))}))
    for _ in range(2):
        assert not kept.tensor(name).any() and kept.tensor("model.embed_tokens.weight").any()
    assert counting.read == ["model.embed_tokens.weight"]
