"""How long error feedback takes on a model of the shape of Llama-3-8B: second moments of all layers measured, the encoding of one layer in each type multiplied by their number.

    python benchmarks/feedback_time.py [--layers 32] [--windows 40] [--types Q4_K IQ2_XXS ...] [--readings 0] [--device cuda] [--plain]

Weights are noise: nothing is downloaded, and no weight's value changes how long anything takes. --plain: moments without gradients, as where the layers do not fit in memory. Tuning needs 16 bytes a weight (129 GB),
and is not done on such a model.
"""
import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from analyze import RandomCheckpoint
from llm_quantize.models.layer_stack import LayerStack
from llm_quantize.calibration.effort import EFFORTS
from llm_quantize.gguf.feedback_pass import FeedbackSettings, encode_layer
from llm_quantize.gguf.plan import FilePlan
from llm_quantize.gguf.resolution import make_plan
from llm_quantize.calibration.hessian import second_moments


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--types", nargs="+", default=["Q4_K", "Q3_K", "Q2_K", "IQ4_XS", "IQ3_XXS", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--readings", type=int, default=0, help="of coordinate descent")
    parser.add_argument("--plain", action="store_true")
    args = parser.parse_args()
    cuda = torch.device(args.device).type == "cuda"
    done = lambda: (torch.cuda.synchronize() if cuda else None, time.perf_counter())[1]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = RandomCheckpoint(Path(folder), args.layers)
        stack = LayerStack(checkpoint, device=args.device, keep=True)
        for i in range(len(stack)): stack[i]
        ids = torch.randint(0, 128000, (args.windows, 512), generator=torch.Generator().manual_seed(0))
        begun, spent, groups, first = done(), 0.0, 0, {}
        for group in second_moments(stack, ids, end_loss=not args.plain):
            spent, groups = spent + done() - begun, groups + 1
            first = first or {name: m.cpu() for name, m in group.items() if name.startswith("blk.0.")}
            del group
            begun = done()
        print(f"moments of {args.layers} layers from {args.windows} windows of 512 tokens: {spent:.0f} s in {groups} passes, {torch.cuda.get_device_name() if cuda else 'CPU'}", flush=True)
        specs = [s for s in stack.tensors if s.layer == 0 and s.quantizable]
        effort = replace(EFFORTS["quick"], moments=args.windows, passes=args.readings)
        settings, tensors = FeedbackSettings(effort, device=args.device), [(s.name, tuple(s.shape)) for s in specs]
        for name in args.types:
            plan = FilePlan(checkpoint, name, tuple(specs), make_plan({s.name: name for s in specs}, tensors), {})
            start = done()
            encode_layer(plan, specs, first, settings)
            layer = done() - start
            print(f"{name:<8} {args.readings} readings, one layer {layer:6.1f} s, {32 * layer / 60:5.1f} minutes for 32; with moments {(32 * layer + spent * 32 / args.layers) / 60:5.1f} minutes", flush=True)
        if cuda: print(f"peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB allocated")


if __name__ == "__main__": main()
