"""Peak memory of `quantize` on a checkpoint far larger than its bound.

Makes a Llama-shaped checkpoint of random bf16 weights (8 GB by default) in shards, quantizes it in a process of its own, and compares that
process's largest resident set with the promise: 1 GB plus three times the largest tensor, as the checkpoint holds it.

    python benchmarks/streaming_memory.py [--gigabytes 8] [--type Q4_K_M] [--folder DIR]
"""
import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from llm_quantize.models.checkpoint import sample_path

HIDDEN, FFN, HEADS, KV_HEADS, VOCABULARY = 4096, 14336, 32, 8, 4096  # Llama-3-8B's blocks, the sample tokenizer's vocabulary


def make_checkpoint(folder, gigabytes):
    "Random weights, one block per shard; returns (bytes, bytes of the largest tensor)."
    shapes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN * KV_HEADS // HEADS, HIDDEN), "self_attn.v_proj": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
              "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN), "mlp.down_proj": (HIDDEN, FFN)}
    block = 2 * sum(r * c for r, c in shapes.values())
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * HIDDEN) / block))
    folder.mkdir(parents=True)
    for file in sample_path().iterdir():
        if "tokenizer" in file.name: shutil.copy(file, folder)
    config = json.loads((sample_path() / "config.json").read_text())
    config |= {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "num_hidden_layers": layers,
               "head_dim": HIDDEN // HEADS, "vocab_size": VOCABULARY, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    placed, total, random = {}, 0, torch.Generator().manual_seed(0)
    parts = [{f"model.layers.{i}.{name}.weight": shape for name, shape in shapes.items()} | {f"model.layers.{i}.{n}.weight": (HIDDEN,) for n in ("input_layernorm", "post_attention_layernorm")}
             for i in range(layers)] + [{"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}]
    for k, part in enumerate(parts):
        name = f"model-{k + 1:05}-of-{len(parts):05}.safetensors"
        tensors = {t: torch.empty(shape).normal_(0, 0.02, generator=random).bfloat16() for t, shape in part.items()}
        save_file(tensors, folder / name)
        placed |= dict.fromkeys(part, name)
        total += sum(t.nbytes for t in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return total, 2 * FFN * HIDDEN


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--folder", type=Path, help="where to work; needs 1.5 times the size (default: a temporary directory)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder = Path(folder)
        size, largest = make_checkpoint(folder / "model", args.gigabytes)
        start = time.monotonic()
        run = subprocess.run([sys.executable, "-m", "llm_quantize.cli.main", "--format", "json", "quantize", str(folder / "model"), "gguf", "-q", args.type, "-o", str(folder)],
                             stdout=subprocess.PIPE, text=True)
        seconds = time.monotonic() - start
        result = json.loads(run.stdout)
        if run.returncode: sys.exit(f"failed: {result}")
        bound = 1e9 + 3 * largest
        print(f"checkpoint {size / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB")
        print(f"{args.type}: {result['file_size'] / 1e9:.2f} GB in {seconds:.0f} s, {size / 2e6 / seconds:.1f} million weights per second, {torch.get_num_threads()} threads")
        print(f"peak resident memory {result['peak_memory_bytes'] / 1e9:.2f} GB; bound, 1 GB + 3 x largest tensor: {bound / 1e9:.2f} GB")
        sys.exit(result["peak_memory_bytes"] > bound)


if __name__ == "__main__":
    main()
