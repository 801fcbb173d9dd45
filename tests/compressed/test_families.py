"The table of smoothing mappings, and what it says of layers and models."
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize.compressed.families import FAMILIES, ModelMappings, ResolvedMapping, SmoothingMapping, family
from llm_quantize.errors import ConversionError
from llm_quantize.models.checkpoint import open_checkpoint
from tests.compressed.models import CASES, MIXED, tiny

# mappings of layer 0, where not 4
COUNTS = {"opt-post-norm": 2, "opt-gelu": 3, "mixtral": 3 + 4, "qwen2moe": 3 + 4 + 1, "qwen3moe": 3 + 4}


def test_every_architecture_has_one_row():
    names = [name for row in FAMILIES for name in row.hf]
    assert len(names) == len(set(names)) == 12


@pytest.mark.parametrize("name", CASES)
def test_mappings_of_a_layer(name, tmp_path):
    plan = ModelMappings(tiny(name, tmp_path))
    assert list(plan.layers) == list(plan.names) == [0, 1]
    assert len(plan.layers[0].mappings) == COUNTS.get(name, 4)


@pytest.mark.parametrize("name", MIXED)
def test_layers_with_and_without_experts_in_one_model(name, tmp_path):
    dense, experts = ModelMappings(tiny(name, tmp_path)).layers.values()
    assert [m.label for m in dense.mappings][2:] == ["post_attention_layernorm -> gate, up", "up -> down"]
    assert "up -> down of expert 3" in [m.label for m in experts.mappings]


def test_what_cannot_be_folded_is_said(tmp_path):
    layer = ModelMappings(tiny("opt-post-norm", tmp_path)).layers[0]
    assert layer.unfoldable == ("self_attn_layer_norm -> q, k, v", "final_layer_norm -> fc1")
    assert len(layer.matrices) == 6


def test_a_matrix_outside_the_table_stops_the_work(tmp_path):
    file = tiny("llama", tmp_path).path / "model.safetensors"
    save_file({**load_file(file), "model.layers.1.mlp.extra_proj.weight": torch.zeros(4, 4)}, file, {"format": "pt"})
    with pytest.raises(ConversionError, match="mlp.extra_proj.weight"): ModelMappings(open_checkpoint(tmp_path))


@pytest.mark.parametrize("config, words", [
    ({"architectures": ["FalconForCausalLM"]}, "FalconForCausalLM"),
    ({}, "none in config.json"),
    ({"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "gptq"}}, "already quantized"),
], ids=["unknown", "nameless", "quantized"])
def test_unknown_and_quantized_models_are_refused(config, words):
    with pytest.raises(ConversionError, match=words) as failure: family(config)
    assert failure.value.suggestion


def test_a_label_leaves_out_what_is_known():
    mapping = SmoothingMapping("self_attn.v_proj", ("block_sparse_moe.experts.*.w1", "mlp.shared_expert.up_proj"))
    assert mapping.label == "v -> w1, shared_expert.up"


def test_spread_undoes_gather_where_heads_agree():
    mapping = ResolvedMapping("", "values", "v", ("o",), (), 0, 6, repeat=3, head=2)
    factors = torch.arange(1.0, 7.0)
    assert mapping.spread(factors).tolist() == [1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4, 5, 6, 5, 6, 5, 6]
    assert torch.equal(mapping.gather(mapping.spread(factors)), factors)
