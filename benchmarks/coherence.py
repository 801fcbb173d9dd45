"""The coherence score of a model's quantizations, from lossless to destroyed: how the scale was calibrated.

    python benchmarks/coherence.py MODEL [FILE.gguf ...] [--device cpu]

Prints a line for each file, and one for the model with the weights of every matrix in its blocks shuffled. Exits with 1 if the first file scores below 0.95 or the shuffled model above 0.05.
"""
import argparse
import sys

import torch

from llm_quantize.calibration.text import bundled_text, load_tokenizer, windows
from llm_quantize.models.checkpoint import open_checkpoint, sample_path
from llm_quantize.quality.coherence import PARTS, bundled_prompts, coherence, continuations
from llm_quantize.models.reference import load_float
from llm_quantize.quality.quantized_model import load_quantized
from llm_quantize.quality.metrics import score_windows, statistics


def shuffled(checkpoint, device: str):
    "The model with the weights of each matrix of its blocks in random order."
    model, dice = load_float(checkpoint, device=device), torch.Generator().manual_seed(0)
    for p in model.base_model.layers.parameters():
        if p.dim() > 1: p.data = p.data.flatten()[torch.randperm(p.numel(), generator=dice).to(p.device)].view(p.shape)
    return model


def main() -> int: # exit status
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=sample_path())
    parser.add_argument("files", nargs="*")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    checkpoint, prompts = open_checkpoint(args.model), bundled_prompts()
    tokenizer, original = load_tokenizer(checkpoint.path), load_float(checkpoint, device=args.device)
    ids = windows(tokenizer, bundled_text("heldout"), limit=8)
    said = {sampled: continuations(original, tokenizer, prompts, sampled) for sampled in (False, True)}
    print(f"{checkpoint.name}, {len(prompts)} prompts", f"{'':<28} {'score':>13}  " + "  ".join(f"{part:>10}" for part in PARTS) + f"  {'loops':>6} (original)        KLD", sep="\n")
    scores = []
    for file in [*args.files, None]:
        model = shuffled(checkpoint, args.device) if file is None else load_quantized(checkpoint, file, device=args.device)
        found = coherence(original, model, tokenizer, prompts, said)
        kld = statistics(score_windows(original, [model], ids)[0])["kld_mean"]
        scores.append(found.score)
        name = "shuffled" if file is None else file.split("/")[-1]
        print(f"{name:<28} {found.score:.3f} ± {found.score_se:.3f}  " + "  ".join(f"{getattr(found, part):>10.3f}" for part in PARTS) + f"  {found.loops:>6.3f} ({found.loops_original:.3f})  {kld:>9.4f}", flush=True)
    return int(scores[0] < 0.95 or scores[-1] > 0.05)


if __name__ == "__main__":
    sys.exit(main())
