"Small random models of every family, and what is asked of them."
import json

import torch
import transformers
from transformers import AutoModelForCausalLM

from llm_quantize.models.checkpoint import open_checkpoint

VOCABULARY = 96
BASE = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
SHARED = dict(shared_expert_intermediate_size=48)
GEMMA = dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=16)
OPT = dict(
    vocab_size=VOCABULARY, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
    word_embed_proj_dim=64, max_position_embeddings=64, pad_token_id=1,
)
CASES = {
    "llama": ("LlamaConfig", BASE),
    "llama-biases": ("LlamaConfig", {**BASE, "attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("LlamaConfig", {**BASE, "head_dim": 32, "num_key_value_heads": 1}),
    "mistral": ("MistralConfig", {**BASE, "sliding_window": 16}),
    "qwen2": ("Qwen2Config", BASE),
    "qwen3": ("Qwen3Config", {**BASE, "head_dim": 24}),
    "gemma2": ("Gemma2Config", {**BASE, **GEMMA}),
    "gemma3": ("Gemma3TextConfig", {**BASE, **GEMMA}),
    "phi3": ("Phi3Config", BASE),
    "opt": ("OPTConfig", OPT),
    "opt-post-norm": ("OPTConfig", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "opt-gelu": ("OPTConfig", {**OPT, "activation_function": "gelu"}),
    "mixtral": ("MixtralConfig", {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2moe": ("Qwen2MoeConfig", {**BASE, **EXPERTS, **SHARED}),
    "qwen2moe-dense": ("Qwen2MoeConfig", {**BASE, **EXPERTS, **SHARED, "mlp_only_layers": [0]}),
    "qwen3moe": ("Qwen3MoeConfig", {**BASE, **EXPERTS, "head_dim": 32, "norm_topk_prob": True}),
    "qwen3moe-dense": ("Qwen3MoeConfig", {**BASE, **EXPERTS, "mlp_only_layers": [0]}),
}
MIXED = ("qwen2moe-dense", "qwen3moe-dense")  # layers of two kinds fold, but `LayerStack` does not run them
TEXT = torch.randint(2, VOCABULARY, (3, 48), generator=torch.Generator().manual_seed(1))


def tiny(name, folder, dtype=torch.float32):
    "A random model of a family, norms and biases included, saved in `folder`."
    kind, settings = CASES[name]
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**json.loads(json.dumps(settings)))).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            random = torch.randn_like(weight)
            centre = 0.0 if key.endswith("bias") or "gemma" in kind.lower() else 1.0
            weight.copy_(centre + 0.3 * random if weight.dim() == 1 else random / weight.shape[-1] ** 0.5)
    model.tie_weights()
    model.to(dtype).save_pretrained(folder)
    return open_checkpoint(folder)


def tokens(seed=3): return torch.randint(2, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(seed))


def logits(model, ids=None):
    with torch.inference_mode(): return model(input_ids=tokens() if ids is None else ids, use_cache=False).logits


def divergence(model, other, ids):
    "Kullback-Leibler divergence of the next token, in nats."
    p, q = (logits(m, ids).double().log_softmax(-1) for m in (model, other))
    return (p.exp() * (p - q)).sum(-1).mean().item()
