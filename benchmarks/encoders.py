"""Encoders beside llama.cpp's own: weights per second, as they stand and compiled, with one thread and with all.

    python benchmarks/encoders.py [TYPE ...] [--rows 1024] [--rounds 5] [--device cpu] [--search fast]

Synthetic normal weights in rows of 4096 columns, with an importance vector. Each figure is the best of several rounds, million weights per second; `x` is the ratio to the
reference in the same run. Compiling is timed twice, with an empty cache and, in a fresh process, from the cache. The reference (search="reference": llama.cpp's own encoder) runs on
as many threads as ours, each with its own rows. Run it on a quiet machine.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import torch

from llm_quantize.quants.blocks import ENCODERS
from llm_quantize.quants.codec import encode

COLUMNS = 4096


def data(rows):
    "Weights and importance."
    seed = torch.Generator().manual_seed(0)
    return torch.randn(rows, COLUMNS, generator=seed) * 0.02, torch.randn(COLUMNS, generator=seed).exp()


def reference(name, x, importance, threads):
    "A function that encodes `x` with llama.cpp's library, or None."
    if find_spec("llama_cpp") is None: return None
    parts, pool = x.chunk(threads), ThreadPoolExecutor(threads)
    return lambda: list(pool.map(lambda rows: encode(rows, name, importance, search="reference"), parts))


def best(function, weights, rounds):
    "Million weights per second, the best of several rounds."
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return weights / min(seconds) / 1e6


def first_call(name, device, rows, search):
    "Seconds of the first compiled call, less those of the second."
    x, importance = (t.to(device) for t in data(rows))
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        encode(x, name, importance, search=search, compiled=True)
        if device != "cpu": torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[0] - seconds[1]


def measure(name, threads, rows, rounds, device, search):
    "One line of the table: reference, eager and compiled."
    torch.set_num_threads(threads)
    x, importance = data(rows)
    few = x[:max(threads, rows // 8)].contiguous()              # the slow ones get fewer rows
    theirs = reference(name, few, importance, threads)
    speeds = [best(theirs, few.numel(), rounds) if theirs else float("nan")]
    x, importance = x.to(device), importance.to(device)
    for compiled in (False, True):
        def run():
            encode(x, name, importance, search=search, compiled=compiled)
            if device != "cpu": torch.cuda.synchronize()
        run()
        speeds.append(best(run, x.numel(), rounds))
    return speeds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", default=list(ENCODERS))
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--search", default="fast", choices=("fast", "best"))
    parser.add_argument("--first-call", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.first_call: return print(first_call(args.types[0], args.device, args.rows, args.search))
    every = torch.get_num_threads()
    print(f"million weights per second, torch {torch.__version__}, {args.device}, search {args.search}; compile: seconds with an empty cache, and from the cache")
    print(f"{'type':<7} {'threads':>7} {'llama.cpp':>10} {'eager':>9} {'x':>6} {'compiled':>9} {'x':>6} {'compile':>14}")
    with tempfile.TemporaryDirectory() as cache:
        os.environ.update(LLM_QUANTIZE_CACHE=cache, TORCHINDUCTOR_CACHE_DIR=str(Path(cache) / "inductor"))
        for name in args.types:
            again = [sys.executable, __file__, name, "--first-call", "--rows", str(args.rows), "--device", args.device, "--search", args.search]
            cost = [float(subprocess.run(again, check=True, capture_output=True, text=True).stdout) for _ in range(2)]
            for threads in sorted({1, every}):
                theirs, eager, compiled = measure(name, threads, args.rows, args.rounds, args.device, args.search)
                print(f"{name:<7} {threads:>7} {theirs:>10.1f} {eager:>9.1f} {eager / theirs:>6.2f} {compiled:>9.1f} {compiled / theirs:>6.2f} {cost[0]:>7.1f} {cost[1]:>6.1f}", flush=True)


if __name__ == "__main__":
    main()
