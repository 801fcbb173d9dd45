"""Which importance matrix serves a model best: files made by llama.cpp's own quantizer (llama_model_quantize of llama-cpp-python) with each, and their KL divergence.

    python benchmarks/importance_kld.py [MODEL] [--types IQ2_XXS Q2_K] [--methods activation gradient fisher] [--calibration-windows 48] [--windows 16]
                                        [--data TEXT] [--heldout TEXT] [--llama-imatrix PATH] [--threads 2]

MODEL defaults to the bundled sample; the texts to the bundled ones, one part for calibration and the other for judging. With --llama-imatrix (the program of llama.cpp), its matrix of the same
windows takes part. All files are scored on the same tokens, so the differences to the first matrix have standard errors of their own, smaller than those of the divergences.
"""
import argparse
import ctypes
import subprocess
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
import torch

from llm_quantize.models.layer_stack import LayerStack
from llm_quantize.calibration.text import bundled_text, load_tokenizer, read_text, windows
from llm_quantize.models.checkpoint import open_checkpoint, sample_path
from llm_quantize.models.reference import load_float
from llm_quantize.quality.quantized_model import load_quantized
from llm_quantize.calibration.imatrix import ImportanceMatrix
from llm_quantize.calibration.collect import METHODS, collect
from llm_quantize.quality.metrics import score_windows
from llm_quantize.api import quantize

QUIET = llama_cpp.llama_log_callback(lambda *_: None)


def llama_quantize(source, target, name: str, matrix: ImportanceMatrix, threads: int) -> None:
    "llama.cpp's quantizer with the matrix, as llama-quantize hands it over."
    llama_cpp.llama_log_set(QUIET, None)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}"), threads
    kept = {entry: np.ascontiguousarray(matrix.importance(entry).flatten().numpy(), np.float32) for entry in matrix.names}
    entries = (llama_cpp.llama_model_imatrix_data * (len(kept) + 1))() # the last stays empty: the end
    for entry, (name, data) in zip(entries, kept.items()): entry.name, entry.data, entry.size = name.encode(), data.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), data.size
    params.imatrix = entries
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)): raise SystemExit(f"llama_model_quantize failed for {target.name}")


def llama_imatrix(program, model, text: str, count: int, folder: Path, threads: int) -> ImportanceMatrix:
    "The matrix that llama-imatrix makes of the first windows of a text."
    (folder / "text.txt").write_text(text, encoding="utf-8", newline="")
    done = subprocess.run([program, "-m", str(model), "-f", str(folder / "text.txt"), "-o", str(folder / "llama.gguf"), "-c", "512", "--chunks", str(count), "-t", str(threads), "--no-ppl"],
                          capture_output=True, text=True)
    if done.returncode: raise SystemExit(f"llama-imatrix failed: {done.stderr[-500:]}")
    return ImportanceMatrix.load(folder / "llama.gguf")


def agreement(ours: ImportanceMatrix, theirs: ImportanceMatrix) -> str:
    "How far two matrices of the same windows are apart."
    same = ours.names == theirs.names and all(torch.equal(ours.counts[name], theirs.counts[name]) for name in ours.names)
    totals = [abs(ours.sums[name].sum() / theirs.sums[name].sum() - 1).item() for name in ours.names]
    channels = torch.cat([(ours.sums[name] / theirs.sums[name] - 1).abs().flatten() for name in ours.names])
    return f"counts {'equal' if same else 'DIFFER'}, a tensor's total differs by {max(totals):.1e} at most, a channel by {channels.mean():.1e} on average and {channels.max():.1e} at most"


def main() -> int: # exit status
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=sample_path())
    parser.add_argument("--types", nargs="+", default=["IQ2_XXS", "Q2_K"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--calibration-windows", type=int, default=48)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--data")
    parser.add_argument("--heldout")
    parser.add_argument("--llama-imatrix")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    checkpoint = open_checkpoint(args.model)
    tokenizer = load_tokenizer(checkpoint.path)
    texts = [bundled_text("calibration")] if args.data is None else read_text(args.data)
    ids = windows(tokenizer, texts, limit=args.calibration_windows)
    judged = windows(tokenizer, bundled_text("heldout") if args.heldout is None else read_text(args.heldout), limit=args.windows)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        source = quantize(checkpoint, "gguf", "BF16", output_dir=folder, output_name="source.gguf").output_path
        matrices = {method: collect(LayerStack(checkpoint, device="cpu"), ids, method=method) for method in args.methods}
        if args.llama_imatrix:
            if len(texts) != 1: raise SystemExit("llama-imatrix takes one text file, not several documents")
            matrices["llama-imatrix"] = llama_imatrix(args.llama_imatrix, source, texts[0], len(ids), folder, args.threads)
            if "activation" in matrices: print(f"activation beside llama-imatrix: {agreement(matrices['activation'], matrices['llama-imatrix'])}")
        print(f"{checkpoint.name}: {len(ids)} windows for calibration, judged on {len(judged)} windows of 512 tokens")
        print(f"{'type':<9}{'importance':<15}{'KLD':>9}{'+-':>9}{'difference':>12}{'+-':>9}{'perplexity':>12}")
        original = load_float(checkpoint)
        for name in args.types:
            files = {label: folder / f"{label}-{name}.gguf" for label in matrices}
            for label, path in files.items(): llama_quantize(source, path, name, matrices[label], args.threads)
            found = score_windows(original, [load_quantized(checkpoint, path) for path in files.values()], judged, names=list(files))
            for path in files.values(): path.unlink()
            for label, scores in zip(files, found):
                apart, root = scores.kld - found[0].kld, len(scores.kld) ** 0.5
                print(f"{name:<9}{label:<15}{scores.kld.mean():>9.4f}{scores.kld.std() / root:>9.4f}{apart.mean():>+12.4f}{apart.std() / root:>9.4f}{scores.nll.mean().exp():>12.2f}", flush=True)
    return 0


if __name__ == "__main__": raise SystemExit(main())
