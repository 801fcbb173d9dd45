"""How fast an importance matrix is collected beside a plain forward of the same windows, and how much memory it takes whole and layer by layer.

    python benchmarks/analyze.py [MODEL] [--data TEXT] [--windows 16] [--threads 2] [--cap MB] [--device cpu]

MODEL defaults to the bundled sample. The ways take turns, four batches at a time, so that other work on the machine disturbs them alike; the best and the median of each are printed. Then each way of going
through the model runs in a process of its own and tells its peak memory above what its imports took. With --cap, a third process may take only so many megabytes beyond its imports (RLIMIT_DATA):
whole is shown to fail there, and the default to come through with the same sums.
"""
import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from llm_quantize.activations import LayerStack, run_windows
from llm_quantize.calibration import bundled_text, load_tokenizer, read_text, windows
from llm_quantize.checkpoint import sample_path
from llm_quantize.importance import ActivationSums, collect


def timed(action) -> float: # seconds
    start = time.perf_counter()
    action()
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter() - start


def texts(args): return [bundled_text("calibration")] if args.data is None else read_text(args.data)


def speed(args, ids) -> None:
    "Tokens per second of a plain float32 forward without logits, and of collecting."
    from transformers import AutoModelForCausalLM
    plain = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).base_model.to(args.device)
    stack = LayerStack(args.model, device=args.device, keep=True)
    sums = ActivationSums(stack.inputs, args.device)
    def forward(part):
        with torch.inference_mode():
            for some in part.split(args.batch): plain(input_ids=some.to(args.device), use_cache=False)
    ways = {"plain forward, float32": forward, f"collecting, {str(stack.dtype).removeprefix('torch.')} products": lambda part: run_windows(stack, part, sums, batch=args.batch)}
    parts, seconds = ids.split(4 * args.batch), {name: [] for name in ways}
    for way in ways.values(): way(parts[0])
    for part in parts:
        for name, way in ways.items(): seconds[name].append(timed(lambda: way(part)))
    for name, found in seconds.items():
        tokens = parts[0].numel()
        print(f"{name:40} best {tokens / min(found):9,.0f} tokens/s   median {tokens / statistics.median(found):9,.0f} tokens/s")


def status(key: str) -> int: # bytes
    return 1024 * int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0])


def memory(args, ids) -> None:
    "One run in this process; prints its peak and a hash of its sums as JSON."
    import resource
    with torch.inference_mode(): torch.nn.functional.linear(torch.ones(64, 64, dtype=torch.bfloat16), torch.ones(64, 64, dtype=torch.bfloat16)) # threads and kernels are there before we count
    before = status("VmRSS")
    if args.cap: resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + args.cap * 1_000_000,) * 2)
    keep = {"whole": True, "layers": False, "auto": None}[args.memory]
    try: matrix = collect(args.model, ids, device="cpu", keep=keep, checkpoint_dir=args.folder)
    except (RuntimeError, MemoryError) as error: return print(json.dumps({"failed": str(error).splitlines()[0][:90]}))
    print(json.dumps({"peak": status("VmHWM") - before, "hash": hashlib.sha256(b"".join(matrix.sums[name].numpy().tobytes() for name in matrix.names)).hexdigest()[:12]}))


def memories(args) -> None:
    import tempfile
    for label, way, cap in [("whole", "whole", 0), ("layer by layer", "layers", 0)] + ([("whole, capped", "whole", args.cap), ("by default, capped", "auto", args.cap)] if args.cap else []):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, str(args.model), "--windows", str(args.windows), "--threads", str(args.threads), "--memory", way, "--cap", str(cap), "--folder", folder]
            done = subprocess.run(command + (["--data", args.data] if args.data else []), capture_output=True, text=True)
        if done.returncode: print(f"{label:20} failed: {done.stderr.strip().splitlines()[-1]}"); continue
        found = json.loads(done.stdout)
        print(f"{label:20} " + (f"failed: {found['failed']}" if "failed" in found else f"peak {found['peak'] / 1e6:8,.1f} MB above its imports, sums {found['hash']}"))


def main() -> int: # exit status
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=sample_path())
    parser.add_argument("--data")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1, help="windows at a time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cap", type=int, default=0, help="megabytes that the capped processes may take beyond their imports")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", choices=["whole", "layers", "auto"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ids = windows(load_tokenizer(args.model), texts(args), size=512, limit=args.windows)
    if args.memory: memory(args, ids)
    else:
        speed(args, ids)
        if args.device == "cpu": memories(args)
    return 0


if __name__ == "__main__": raise SystemExit(main())
