"""How fast int8 is beside bfloat16: tokens per second in vLLM, and single products in torch.

    python benchmarks/smoothquant_speed.py products [--device cpu|cuda]         torch._int_mm beside bfloat16 for the layers of Llama-7B
    VLLM_PYTHON benchmarks/smoothquant_speed.py vllm FLOAT_DIR INT8_DIR          the same prompts through both, three times in turn (needs vLLM only)

`products` times the product alone and, as a layer needs it, with the inputs rounded token by token and the result scaled (on a GPU compiled by torch.compile).
"""
import argparse
import json
import os
import subprocess
import sys
import time

SHAPES = {"q, k, v, o": (4096, 4096), "gate, up": (11008, 4096), "down": (4096, 11008)} # rows, columns
COUNTS = {"cpu": (1, 16, 128, 512), "cuda": (32, 128, 512, 2048, 8192)}                 # tokens


def timed(run, device, seconds=0.7):
    "Best time of a run out of those that fit."
    import torch
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    run(); wait()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run(); wait()
        best = min(best, time.perf_counter() - start)
    return best


def products(device):
    import torch
    print(torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| layer | tokens | bfloat16 ms | int8 product ms | ratio | with rounding and scales ms | ratio |\n|---|--:|--:|--:|--:|--:|--:|")
    for name, (rows, columns) in SHAPES.items():
        w, scale = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=device), torch.rand(1, rows, device=device)
        half = w.bfloat16()
        for count in COUNTS[device]:
            x = torch.randn(count, columns, device=device).bfloat16()
            q = x.to(torch.int8)

            def layer():
                step = x.abs().amax(1, keepdim=True).float() / 127
                return (torch._int_mm((x / step).round().to(torch.int8), w.T) * step * scale).bfloat16()

            if device == "cuda": # rounding and scaling as one kernel each, as a runtime has them
                torch._dynamo.reset()
                layer = torch.compile(layer)
            a, b, c = timed(lambda: x @ half.T, device), timed(lambda: torch._int_mm(q, w.T), device), timed(layer, device)
            print(f"| {name} | {count} | {1e3 * a:.3f} | {1e3 * b:.3f} | {a / b:.2f} | {1e3 * c:.3f} | {a / c:.2f} |", flush=True)


def one(folder):
    "Tokens per second of a directory, in this process."
    os.environ.update({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1", "VLLM_NO_USAGE_STATS": "1"})
    from vllm import LLM, SamplingParams
    llm = LLM(folder, dtype="bfloat16", max_model_len=640, enforce_eager=True, max_num_seqs=16, disable_log_stats=True, enable_prefix_caching=False)
    read = lambda seed: [{"prompt_token_ids": [(seed + 31 * i + 7 * j) % 4000 + 10 for j in range(512)]} for i in range(8)]
    say = [{"prompt_token_ids": [20 + i, 30, 40, 50]} for i in range(8)]

    def run(prompts, tokens):
        start = time.perf_counter()
        llm.generate(prompts, SamplingParams(max_tokens=tokens, min_tokens=tokens, temperature=0, ignore_eos=True), use_tqdm=False)
        return time.perf_counter() - start

    run(read(0), 1)
    print(json.dumps({"read": 8 * 512 / min(run(read(k), 1) for k in (1, 2)), "write": 8 * 48 / min(run(say, 48) for _ in range(2))}))
    sys.stdout.flush()
    os._exit(0)


def vllm(float_folder, int8_folder):
    found = {float_folder: [], int8_folder: []}
    for _ in range(3):
        for folder in found:
            said = subprocess.run([sys.executable, __file__, "one", folder], capture_output=True, text=True, check=True).stdout
            found[folder].append(json.loads(said.strip().splitlines()[-1]))
    best = {folder: {key: max(f[key] for f in runs) for key in ("read", "write")} for folder, runs in found.items()}
    for key, what in (("read", "reading 8 prompts of 512 tokens"), ("write", "writing 48 tokens in 8 streams")):
        a, b = best[float_folder][key], best[int8_folder][key]
        print(f"{what}: bfloat16 {a:,.0f} tokens/s, int8 {b:,.0f} tokens/s, ratio {b / a:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["products", "vllm", "one"])
    parser.add_argument("folders", nargs="*")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    if args.what == "products": products(args.device)
    elif args.what == "one": one(args.folders[0])
    else: vllm(*args.folders)
