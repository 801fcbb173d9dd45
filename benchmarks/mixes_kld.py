"""Named mixes by three searches: the file that llama.cpp's own encoder makes, the one of `fast` and the one of `best`, in KL divergence from the original.

    python benchmarks/mixes_kld.py MODEL IMATRIX TEXT [MIX ...] [--windows 48] [--threads 2] [--searches reference fast best]

Every search writes a whole GGUF file with the same tensor types; the files are decoded and run on the same windows as the original. TEXT must be text that the importance matrix has not
seen. Standard errors are over windows; those of the differences to the first search are of differences window by window.
Ternary types are forced. A line is printed as soon as its files are judged.
"""
import argparse
import tempfile
from pathlib import Path

import torch

from llm_quantize.quants import compile as compiling
from llm_quantize.calibration.text import load_tokenizer, read_text, windows
from llm_quantize.models.checkpoint import open_checkpoint
from llm_quantize.quants.codec import SEARCHES
from llm_quantize.models.reference import load_float
from llm_quantize.quality.quantized_model import load_quantized
from llm_quantize.calibration.imatrix import ImportanceMatrix
from llm_quantize.quality.metrics import score_windows
from llm_quantize.api import quantize

MIXES = ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_XS", "IQ4_NL", "Q2_K", "Q3_K_M", "Q4_K_M", "TQ2_0"]


def divergences(checkpoint, original, imatrix, ids, mix: str, searches: list) -> tuple: # bytes of the file; mean KL divergence (windows,) of each search
    "Write a mix once by each search, and judge the files."
    with tempfile.TemporaryDirectory() as folder:
        made = [quantize(checkpoint, "gguf", mix, output_dir=folder, output_name=f"{search}.gguf", imatrix=imatrix, search=search, force=True, device="cpu") for search in searches]
        sizes = {result.file_size for result in made}
        if len(sizes) != 1: raise SystemExit(f"{mix}: files of different sizes, {sorted(sizes)}")
        models = [load_quantized(checkpoint, Path(result.output_path)) for result in made]
    return sizes.pop(), [scores.kld.view(len(ids), -1).mean(1) for scores in score_windows(original, models, ids, names=searches)]


def mean(x: torch.Tensor) -> tuple[float, float]: # of (windows,): mean, standard error
    return x.mean().item(), (x.std() / len(x) ** 0.5).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("imatrix")
    parser.add_argument("text")
    parser.add_argument("mixes", nargs="*", default=MIXES)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--searches", nargs="+", choices=SEARCHES, default=["reference", "fast", "best"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    compiling.COMPILE_FROM = 0 # each type is used in many files
    checkpoint, imatrix = open_checkpoint(args.model), ImportanceMatrix.load(args.imatrix)
    ids, original = windows(load_tokenizer(checkpoint.path), read_text(args.text), limit=args.windows), load_float(checkpoint)
    print(f"{checkpoint.name}, {checkpoint.parameters:,} weights; {len(ids)} windows of {ids.shape[1]} tokens; torch {torch.__version__}, threads {args.threads}")
    print(f"{'mix':<8}{'bytes':>12}" + "".join(f"{search + ' KLD':>16} {'+-':>8}" for search in args.searches) + "".join(f"{search + ', %':>12} {'+-':>5}" for search in args.searches[1:]), flush=True)
    for mix in args.mixes:
        size, found = divergences(checkpoint, original, imatrix, ids, mix, args.searches)
        percent = [[100 * v / found[0].mean().item() for v in mean(kld - found[0])] for kld in found[1:]]
        print(f"{mix:<8}{size:>12}" + "".join(f"{k:>16.6f} {error:>8.6f}" for k, error in map(mean, found)) + "".join(f"{k:>+12.1f} {error:>5.1f}" for k, error in percent), flush=True)


if __name__ == "__main__":
    main()
