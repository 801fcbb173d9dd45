"Rotary embeddings: our factors and keys against the frequencies and attention factors that transformers computes."
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llm_quantize.errors import ConversionError
from llm_quantize.models.rope import llama3_factors, rope_factors, rope_metadata, rope_settings

BASE = {"rope_theta": 50000.0, "original_max_position_embeddings": 4096}


def config(context=65536, head_dim=128, **rope):
    return LlamaConfig(hidden_size=512, num_attention_heads=8, head_dim=head_dim, max_position_embeddings=context, rope_parameters={**BASE, **rope})


def frequencies(c, length=None): return ROPE_INIT_FUNCTIONS[c.rope_parameters["rope_type"]](c, "cpu", seq_len=length)


def plain(c): return c.rope_parameters["rope_theta"] ** -(np.arange(0, c.head_dim, 2) / c.head_dim)


@pytest.mark.parametrize("factor, low, high, head_dim", [(8.0, 1.0, 4.0, 128), (32.0, 1.0, 4.0, 64), (2.0, 0.5, 16.0, 80)])
def test_llama3_factors(factor, low, high, head_dim):
    c = config(head_dim=head_dim, rope_type="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high)
    factors = np.array(rope_factors(rope_settings(c.to_dict()), head_dim)["rope_freqs"])
    expected = frequencies(c)[0].numpy()
    assert np.allclose(plain(c) / factors, expected, rtol=1e-5)
    assert not np.allclose(plain(c), expected, rtol=1e-5) and not np.allclose(plain(c) / factors[::-1], expected, rtol=1e-5)


@pytest.mark.parametrize("more", [{}, {"factor": 2.0}, {"attention_factor": 1.25}])
def test_longrope(more):
    lists = {"short_factor": [1 + i / 100 for i in range(64)], "long_factor": [2 + i / 10 for i in range(64)]}
    c = config(rope_type="longrope", **lists, **more)
    settings = rope_settings(c.to_dict())
    factors, keys = rope_factors(settings, 128), rope_metadata(settings, 128)
    for name, length in (("short", 100), ("long", 5000)):
        inverse, attention = frequencies(c, length)
        assert np.allclose(plain(c) / np.array(factors[f"rope_factors_{name}"]), inverse.numpy(), rtol=1e-5)
        assert keys["rope.scaling.attn_factor"] == pytest.approx(attention)
    assert keys["rope.scaling.original_context_length"] == 4096 and keys["rope.scaling.type"] == "longrope"


@pytest.mark.parametrize("more", [{}, {"attention_factor": 1.5}, {"mscale": 1.0, "mscale_all_dim": 0.5}, {"mscale": 0.7, "mscale_all_dim": 0.7}, {"factor": 1.0}])
def test_yarn_attention(more):
    "What is written times what llama.cpp multiplies by on its own is transformers' attention factor."
    c = config(**{"rope_type": "yarn", "factor": 16.0, **more})
    keys = rope_metadata(rope_settings(c.to_dict()), 128)
    own = 0.1 * math.log(keys["rope.scaling.factor"]) + 1
    assert keys.get("rope.scaling.attn_factor", 1.0) * own == pytest.approx(frequencies(c)[1])
    assert ("rope.scaling.attn_factor" in keys) == bool(more and "factor" not in more)


def test_forms_of_config():
    "Old and new spelling, kinds of layers, and what is silent."
    bare = {"max_position_embeddings": 2048}
    assert rope_settings(bare)["theta"] == 10000 and rope_settings(bare)["type"] == "default" and rope_metadata(rope_settings(bare), 64) == {"rope.dimension_count": 64, "rope.freq_base": 10000.0}
    assert rope_settings({**bare, "rope_scaling": None, "rope_parameters": None})["partial"] == 1
    layers = {**bare, "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8, "rope_theta": 1e6}, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}
    assert rope_metadata(rope_settings(layers), 64) == {"rope.dimension_count": 64, "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    assert rope_metadata(rope_settings({**bare, "partial_rotary_factor": 0.75}), 64)["rope.dimension_count"] == 48


@pytest.mark.parametrize("rope, word", [
    ({"rope_type": "linear"}, "factor"), ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "high_freq_factor"), ({"rope_type": "longrope", "long_factor": [1.0] * 32}, "short_factor"),
    ({"rope_type": "longrope", "long_factor": [1.0] * 9, "short_factor": [1.0] * 32}, "9 numbers"), ({"rope_type": "yarn", "factor": 4.0, "beta_slow": 2}, "beta_slow 2"),
    ({"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}, "sliding")],
    ids=["linear", "llama3", "longrope", "longrope length", "yarn", "window"])
def test_scaling_that_cannot_be_written(rope, word):
    with pytest.raises(ConversionError, match=word) as caught:
        settings = rope_settings({"max_position_embeddings": 2048, "rope_parameters": rope})
        rope_metadata(settings, 64), rope_factors(settings, 64)
    assert caught.value.suggestion


def test_size_of_llama3_factors():
    rope = {"type": "llama3", "theta": 1e4, "original": 512, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert len(llama3_factors(rope, 96)) == 48 and torch.tensor(llama3_factors(rope, 96)).min() == 1
