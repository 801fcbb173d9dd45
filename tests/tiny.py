"""Tiny models with random weights, and what plain hooks see in them: made here, used by several test files.

`CASES` has one or more of every family. Norms and biases are random too, and weights are numbers that bfloat16 can hold.
"""
import json

import torch
import transformers
from transformers import AutoModelForCausalLM

VOCABULARY = 320
BASE = dict(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
SMALL = {**BASE, "hidden_size": 128, "intermediate_size": 256}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96)


# llama.cpp chooses the lists by the size of its context, which it rounds up to 256: so 256 is where the long one begins here
STRETCHED = {**BASE, "max_position_embeddings": 1024, "original_max_position_embeddings": 256}


def longrope(half): # two lists of factors, unlike each other
    return {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 256,
            "short_factor": [1.0 + 0.03 * i for i in range(half)], "long_factor": [1.5 + 0.2 * i for i in range(half)]}


def gemma(**more): return dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=16, **more)


GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
SEVEN = {**SMALL, "num_hidden_layers": 7}

# name: (config class, settings, tokens)
CASES = {
    "llama": ("LlamaConfig", BASE, 64),
    "llama-tied": ("LlamaConfig", {**BASE, "tie_word_embeddings": True}, 64),
    "llama-head-dim": ("LlamaConfig", {**BASE, "head_dim": 32}, 64),
    "llama-biases": ("LlamaConfig", {**BASE, "attention_bias": True, "mlp_bias": True}, 64),
    "llama-linear": ("LlamaConfig", {**BASE, "rope_parameters": LINEAR}, 64),
    "llama-dynamic": ("LlamaConfig", {**BASE, "rope_parameters": {**LINEAR, "rope_type": "dynamic"}}, 64),
    "llama-yarn": ("LlamaConfig", {**BASE, "rope_parameters": YARN}, 128),
    "llama-yarn-attention": ("LlamaConfig", {**BASE, "rope_parameters": {**YARN, "attention_factor": 1.3}}, 128),
    "llama-yarn-mscale": (
        "LlamaConfig",
        {**BASE, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}},
        128,
    ),
    "llama3": ("LlamaConfig", {**BASE, "rope_parameters": LLAMA3}, 128),
    "llama3-head-dim": ("LlamaConfig", {**BASE, "head_dim": 96, "rope_parameters": LLAMA3}, 128),
    "llama-longrope-short": ("LlamaConfig", {**STRETCHED, "rope_parameters": longrope(32)}, 48),
    "llama-longrope-long": ("LlamaConfig", {**STRETCHED, "rope_parameters": longrope(32)}, 288),
    "mistral": ("MistralConfig", {**BASE, "sliding_window": None, "head_dim": 32}, 64),
    "mistral-window": ("MistralConfig", {**BASE, "sliding_window": 64}, 64),
    "mixtral": ("MixtralConfig", {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}, 64),
    "qwen2": ("Qwen2Config", BASE, 64),
    "qwen2-tied-yarn": ("Qwen2Config", {**BASE, "tie_word_embeddings": True, "rope_parameters": YARN}, 128),
    "qwen3": ("Qwen3Config", {**BASE, "head_dim": 96}, 64),
    "qwen3-tied-linear": (
        "Qwen3Config",
        {**BASE, "head_dim": 32, "tie_word_embeddings": True, "attention_bias": False, "rope_parameters": LINEAR},
        64,
    ),
    "qwen3-yarn": ("Qwen3Config", {**BASE, "head_dim": 64, "rope_parameters": YARN}, 128),
    "qwen2moe": ("Qwen2MoeConfig", {**SMALL, **EXPERTS, "shared_expert_intermediate_size": 160}, 64),
    "qwen2moe-tied": (
        "Qwen2MoeConfig",
        {**SMALL, **EXPERTS, "shared_expert_intermediate_size": 160, "tie_word_embeddings": True},
        64,
    ),
    "qwen3moe": ("Qwen3MoeConfig", {**SMALL, **EXPERTS, "head_dim": 64, "norm_topk_prob": True}, 64),
    "gemma2": ("Gemma2Config", {**SMALL, **gemma(), "num_hidden_layers": 3}, 64),
    "gemma2-linear": ("Gemma2Config", {**SMALL, **gemma(), "rope_parameters": LINEAR}, 64),
    "gemma3": ("Gemma3TextConfig", {**SEVEN, **gemma()}, 64),
    "gemma3-linear": ("Gemma3TextConfig", {**SEVEN, **gemma(), "rope_parameters": GEMMA3_ROPE}, 64),
    "gemma3-pattern": (
        "Gemma3TextConfig",
        {**SMALL, **gemma(final_logit_softcapping=20.0), "layer_types": ["full_attention", "sliding_attention"]},
        64,
    ),
    "gemma3-untied": ("Gemma3TextConfig", {**SMALL, **gemma(), "tie_word_embeddings": False}, 64),
    "phi3": ("Phi3Config", {**BASE, "sliding_window": None}, 64),
    "phi3-window": ("Phi3Config", {**BASE, "sliding_window": 64}, 64),
    "phi3-partial-tied": ("Phi3Config", {**BASE, "partial_rotary_factor": 0.75, "tie_word_embeddings": True}, 64),
    "phi3-longrope-short": ("Phi3Config", {**STRETCHED, "rope_parameters": longrope(32)}, 48),
    "phi3-longrope-long": ("Phi3Config", {**STRETCHED, "rope_parameters": longrope(32)}, 288),
    "phi3-longrope-partial": (
        "Phi3Config",
        {**STRETCHED, "rope_parameters": {**longrope(24), "partial_rotary_factor": 0.75}},
        288,
    ),
    "bitnet": ("BitNetConfig", {**BASE, "hidden_act": "silu", "tie_word_embeddings": True}, 64),
    "bitnet-yarn": (
        "BitNetConfig",
        {**BASE, "hidden_act": "silu", "tie_word_embeddings": True, "rope_parameters": YARN},
        128,
    ),
}


def random_model(name, folder):
    "A transformers model with every weight random and representable in bfloat16, saved in `folder`."
    kind, settings, _ = CASES[name]
    config = getattr(transformers, kind)(**json.loads(json.dumps(settings)))
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            centre = 0.0 if "gemma" in kind.lower() else 1.0
            if weight.dim() == 1: weight.copy_(noise * 0.3 + (0 if key.endswith("bias") else centre))
            else: weight.copy_(noise / weight.shape[-1] ** 0.5)
            weight.copy_(weight.bfloat16().float())
    model.tie_weights()
    model.save_pretrained(folder)
    return model


# what transformers calls a linear layer -> what llama.cpp calls it
ROLES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "qkv_proj": "attn_qkv",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "gate_up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def hooked(model, ids):
    "The same from plain hooks on a transformers model."
    sums, counts = {}, {}

    def add(name, expert, x):
        sums[name, expert] = sums.get((name, expert), 0) + x.double().square().sum(0)
        counts[name, expert] = counts.get((name, expert), 0) + len(x)

    def linear(name): return lambda module, args: add(name, 0, args[0].flatten(0, -2))

    def experts(layer):
        def hook(module, args):
            hidden, chosen = args[0].flatten(0, -2), args[1].flatten(0, -2)
            for expert in range(module.gate_up_proj.shape[0]):
                own = hidden[(chosen == expert).any(-1)]
                if not len(own): continue
                gate, up = torch.einsum("tc,rc->tr", own.double(), module.gate_up_proj[expert].double()).chunk(2, -1)
                for role in ("ffn_gate_exps", "ffn_up_exps"): add(f"blk.{layer}.{role}.weight", expert, own)
                add(f"blk.{layer}.ffn_down_exps.weight", expert, torch.nn.functional.silu(gate) * up)
        return hook

    for path, module in model.base_model.named_modules():
        parts = path.split(".")
        if isinstance(module, torch.nn.Linear) and parts[-1] in ROLES:
            shared = "_shexp" if "shared_expert" in path else ""
            module.register_forward_pre_hook(linear(f"blk.{parts[1]}.{ROLES[parts[-1]]}{shared}.weight"))
        if parts[-1] == "experts": module.register_forward_pre_hook(experts(parts[1]))
    with torch.inference_mode(): model(input_ids=ids, use_cache=False)
    return sums, counts
