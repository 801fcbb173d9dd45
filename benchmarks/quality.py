"""How fast quality is measured, beside plain transformers forwards of the same two models on the same windows.

    python benchmarks/quality.py [MODEL] [FILE.gguf] [--windows 8] [--threads 2] [--limit 1.3] [--device cpu]

MODEL defaults to the bundled sample, FILE to a Q4_K_M made of it. Both ways take turns, window by window, so that other work on the machine disturbs them alike; the best and the
median of each are printed. Exits with 1 when the medians' ratio is above the limit.
"""
import argparse
import statistics
import sys
import tempfile
import time

import torch

from llm_quantize.calibration.text import bundled_text, load_tokenizer, windows
from llm_quantize.models.checkpoint import open_checkpoint, sample_path
from llm_quantize.models.reference import load_float
from llm_quantize.quality.quantized_model import load_quantized
from llm_quantize.quality.metrics import score_windows
from llm_quantize.api import quantize


def timed(action) -> float: # seconds
    start = time.perf_counter()
    action()
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter() - start


def plain(models: list, ids: torch.Tensor) -> None:
    "What two forwards cost, all logits included and none looked at."
    with torch.inference_mode():
        for model in models: model(input_ids=ids, use_cache=False)


def measure(models: list, ids: torch.Tensor, batch: int) -> dict[str, list[float]]: # way -> seconds of each batch
    "Both ways in turn on every batch of windows, after one batch to warm up."
    parts = [ids[i:i + batch].to(models[0].device) for i in range(0, len(ids), batch)]
    ways = {"two plain forwards": lambda part: plain(models, part), "score_windows": lambda part: score_windows(models[0], models[1:], part, batch=batch)}
    for way in ways.values(): way(parts[0])
    seconds = {name: [] for name in ways}
    for part in parts:
        for name, way in ways.items(): seconds[name].append(timed(lambda: way(part)))
    return seconds


def main() -> int: # exit status
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=sample_path())
    parser.add_argument("file", nargs="?")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1, help="windows at a time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=1.3, help="seconds of ours per second of plain forwards")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    checkpoint = open_checkpoint(args.model)
    with tempfile.TemporaryDirectory() as folder:
        path = args.file or quantize(checkpoint, "gguf", "Q4_K_M", output_dir=folder).output_path
        models = [load_float(checkpoint, device=args.device), load_quantized(checkpoint, path, device=args.device)]
    ids = windows(load_tokenizer(checkpoint.path), bundled_text("heldout"), limit=args.windows)
    seconds = measure(models, ids, args.batch)
    tokens = args.batch * ids.shape[1]
    print(f"{checkpoint.name}, {len(ids)} windows of {ids.shape[1]} tokens, {args.batch} at a time, {args.device}, {args.threads} threads")
    for name, values in seconds.items():
        print(f"{name:<20} median {1000 * statistics.median(values):8.1f} ms   best {1000 * min(values):8.1f} ms a batch   {tokens / statistics.median(values):8.0f} tokens/s through both models")
    ours, reference = seconds["score_windows"], seconds["two plain forwards"]
    ratio = statistics.median(ours) / statistics.median(reference)
    print(f"ratio of the medians {ratio:.2f}, of the best {min(ours) / min(reference):.2f}   (limit {args.limit})")
    return int(ratio > args.limit)


if __name__ == "__main__":
    sys.exit(main())
