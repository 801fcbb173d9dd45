"""How fast an importance matrix is collected: beside a plain forward of the same windows, beside llama-imatrix, on a GPU; and how much memory it takes whole and layer by layer.

    python benchmarks/analyze.py [MODEL] [--data TEXT] [--windows 16] [--threads 2] [--cap MB] [--device cpu]
    python benchmarks/analyze.py [MODEL] [--data TEXT] [--windows 16] [--threads 2] --llama-imatrix PATH [--turns 3]
    python benchmarks/analyze.py --device cuda --random-8b [LAYERS] [--seconds 80]

MODEL defaults to the bundled sample. The ways take turns, four batches at a time, so that other work on the machine disturbs them alike; the best and the median of each are printed. Then each way of going
through the model runs in a process of its own and tells its peak memory above what its imports took. With --cap, a third process may take only so many megabytes beyond its imports (RLIMIT_DATA):
whole is shown to fail there, and the default to come through with the same sums.

With --llama-imatrix, the program of llama.cpp and this package take turns on the same windows: whole commands with all that belongs to starting, and `collect` alone, loading included.

With --random-8b, a model with the shape of Llama-3-8B and random weights runs instead (nothing is downloaded), within so many seconds in all; and the sample model's sums on the device are compared with
those of the CPU.
"""
import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BEGUN = time.perf_counter()

import torch  # noqa: E402

from llm_quantize.models.layer_stack import LayerStack, run_windows
from llm_quantize.calibration.text import bundled_text, load_tokenizer, read_text, windows
from llm_quantize.models.checkpoint import Checkpoint, sample_path
from llm_quantize.calibration.collect import ActivationSums, collect


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
    try: matrix = collect(LayerStack(args.model, device="cpu", keep=keep), ids, checkpoint_dir=args.folder)
    except (RuntimeError, MemoryError) as error: return print(json.dumps({"failed": str(error).splitlines()[0][:90]}))
    print(json.dumps({"peak": status("VmHWM") - before, "hash": hashlib.sha256(b"".join(matrix.sums[name].numpy().tobytes() for name in matrix.names)).hexdigest()[:12]}))


def memories(args) -> None:
    for label, way, cap in [("whole", "whole", 0), ("layer by layer", "layers", 0)] + ([("whole, capped", "whole", args.cap), ("by default, capped", "auto", args.cap)] if args.cap else []):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, str(args.model), "--windows", str(args.windows), "--threads", str(args.threads), "--memory", way, "--cap", str(cap), "--folder", folder]
            done = subprocess.run(command + (["--data", args.data] if args.data else []), capture_output=True, text=True)
        if done.returncode: print(f"{label:20} failed: {done.stderr.strip().splitlines()[-1]}"); continue
        found = json.loads(done.stdout)
        print(f"{label:20} " + (f"failed: {found['failed']}" if "failed" in found else f"peak {found['peak'] / 1e6:8,.1f} MB above its imports, sums {found['hash']}"))


def beside_llama(args, ids) -> None:
    "Turns of llama-imatrix and of this package on the same windows."
    from llm_quantize.calibration.imatrix import ImportanceMatrix
    from llm_quantize.api import quantize
    text, tokens, seconds = texts(args), ids.numel(), {"llama-imatrix, whole command": [], "llm-quantize analyze, whole command": [], "collect, without the imports": []}
    if not isinstance(text, str): [text] = text
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model = quantize(args.model, "gguf", "BF16", output_dir=folder, output_name="model.gguf").output_path
        (folder / "text.txt").write_text(text, encoding="utf-8", newline="")
        count, threads = str(len(ids)), str(args.threads)
        theirs = [args.llama_imatrix, "-m", str(model), "-f", str(folder / "text.txt"), "-o", str(folder / "theirs.gguf"), "-c", "512", "--chunks", count, "-t", threads, "--no-ppl"]
        ours = [sys.executable, "-m", "llm_quantize.cli.main", "analyze", str(args.model), "-o", str(folder / "ours.imatrix"), "--calibration-data", str(folder / "text.txt"), "--calibration-samples", count,
                "--checkpoint-dir", str(folder / "state")]
        command = lambda words: lambda: subprocess.run(words, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ""})
        actions = dict(zip(seconds, (command(theirs), command(ours), lambda: collect(LayerStack(args.model, device="cpu"), ids))))
        for _ in range(args.turns):
            for name, action in actions.items(): seconds[name].append(timed(action))
        one, other = (ImportanceMatrix.load(folder / name) for name in ("ours.imatrix", "theirs.gguf"))
        apart = max(abs(one.sums[name].sum() / other.sums[name].sum() - 1).item() for name in other.names)
    for name, found in seconds.items():
        print(f"{name:40} best {min(found):7.2f} s {tokens / min(found):9,.0f} tokens/s   median {statistics.median(found):7.2f} s {tokens / statistics.median(found):9,.0f} tokens/s")
    print(f"{tokens:,} tokens; largest difference of a tensor's total {apart:.1e}, of counts {max((one.counts[n] - other.counts[n]).abs().max().item() for n in other.names):g}")


class RandomCheckpoint(Checkpoint):
    "The shape of Llama-3-8B, with weights from a stretch of noise."
    def __init__(self, folder: Path, layers: int):
        self.config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": layers, "num_attention_heads": 32,
                       "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
                       "tie_word_embeddings": False, "bos_token_id": 128000, "eos_token_id": 128001, "torch_dtype": "bfloat16"}
        (folder / "config.json").write_text(json.dumps(self.config))
        self.path, self.name, hidden, inner = folder, "random-8b", 4096, 14336
        shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (1024, hidden), "self_attn.v_proj": (1024, hidden), "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden),
                  "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        self._info = {"model.embed_tokens.weight": ((128256, hidden), "BF16"), "model.norm.weight": ((hidden,), "BF16"), "lm_head.weight": ((128256, hidden), "BF16"),
                      **{f"model.layers.{i}.{name}.weight": (shape, "BF16") for i in range(layers) for name, shape in shapes.items()}}
        self._noise = (torch.randn(16_777_213, generator=torch.Generator().manual_seed(0)) / hidden ** 0.5).bfloat16() # a prime: no two rows are alike

    def tensor(self, name: str) -> torch.Tensor:
        shape = self.shape(name)
        if len(shape) == 1: return torch.ones(shape, dtype=torch.bfloat16)
        size = shape[0] * shape[1]
        return self._noise.repeat(-(-size // len(self._noise)))[:size].view(shape)


class Enough(Exception): pass


def random_8b(args) -> None:
    "Tokens per second and peak memory of collecting from a model as large as an 8B."
    cuda, moments = torch.device(args.device).type == "cuda", [time.perf_counter()]
    batch = args.batch if args.batch > 1 or not cuda else 8
    def step(place):
        if cuda: torch.cuda.synchronize()
        moments.append(time.perf_counter())
        if len(moments) == 2: print(f"loading and the first batch: {moments[1] - moments[0]:.1f} s", flush=True)
        if len(moments) > 3 and moments[-1] - BEGUN + moments[-1] - moments[-2] > args.seconds - args.reserve: raise Enough
    with tempfile.TemporaryDirectory() as folder:
        stack = LayerStack(RandomCheckpoint(Path(folder), args.random_8b), device=args.device, keep=True)
        ids = torch.randint(0, 128000, (24 * batch, 512), generator=torch.Generator().manual_seed(0))
        ids[:, 0] = 128000
        print(f"{args.random_8b} layers of 8B, products in {stack.dtype}, {batch} windows of 512 tokens at a time; imports done after {moments[0] - BEGUN:.1f} s", flush=True)
        sums = ActivationSums(stack.inputs, args.device)
        try: run_windows(stack, ids, sums, batch=batch, step=step)
        except Enough: pass
    seconds = [after - before for before, after in zip(moments[1:], moments[2:])]
    print(f"collecting: best {batch * 512 / min(seconds):,.0f} tokens/s, over all {len(seconds)} further batches {len(seconds) * batch * 512 / sum(seconds):,.0f} tokens/s")
    assert all(bool(torch.isfinite(s).all()) for s in sums.sums.values())
    if cuda: print(f"{torch.cuda.get_device_name()}: peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB allocated, of which the layers are {stack.bytes / 1e9:.1f} GB")


def devices(args) -> None:
    "The sample model's sums on the device beside those of the CPU."
    ids = windows(load_tokenizer(sample_path()), bundled_text("calibration"), size=512, limit=16)
    for dtype in (torch.float32, torch.bfloat16):
        here, there = (collect(LayerStack(sample_path(), device=device, dtype=dtype), ids, batch=8) for device in ("cpu", args.device))
        apart = torch.cat([(there.sums[name] / here.sums[name] - 1).abs().flatten() for name in here.names])
        totals = max(abs(there.sums[name].sum() / here.sums[name].sum() - 1).item() for name in here.names)
        same = all(torch.equal(here.counts[name], there.counts[name]) for name in here.names)
        print(f"sample-4m, {str(dtype).removeprefix('torch.'):9} {args.device} beside cpu: totals differ by {totals:.1e} at most, channels by {apart.mean():.1e} on average and {apart.max():.1e} at most, "
              f"counts {'equal' if same else 'DIFFER'}", flush=True)
    for method in ("fisher", "gradient"):
        here, there = (collect(LayerStack(sample_path(), device=device, dtype=torch.float32), ids[:4], method=method) for device in ("cpu", args.device))
        totals = max(abs(there.sums[name].sum() / here.sums[name].sum() - 1).item() for name in here.names)
        print(f"sample-4m, {method} in float32, {args.device} beside cpu: totals differ by {totals:.1e} at most", flush=True)


def main() -> int: # exit status
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=sample_path())
    parser.add_argument("--data")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1, help="windows at a time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cap", type=int, default=0, help="megabytes that the capped processes may take beyond their imports")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--llama-imatrix", help="the program of llama.cpp")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--random-8b", type=int, nargs="?", const=32, metavar="LAYERS", help="default: 32")
    parser.add_argument("--seconds", type=float, default=80, help="for --random-8b, start and comparison included")
    parser.add_argument("--reserve", type=float, default=15, help=argparse.SUPPRESS) # seconds kept for the comparison of devices
    parser.add_argument("--memory", choices=["whole", "layers", "auto"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.random_8b:
        random_8b(args)
        devices(args)
        print(f"done after {time.perf_counter() - BEGUN:.1f} s")
        return 0
    ids = windows(load_tokenizer(args.model), texts(args), size=512, limit=args.windows)
    if args.memory: memory(args, ids)
    elif args.llama_imatrix: beside_llama(args, ids)
    else:
        speed(args, ids)
        if args.device == "cpu": memories(args)
    return 0


if __name__ == "__main__": raise SystemExit(main())
