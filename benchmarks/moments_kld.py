"""How little text is best spent on second moments: windows, how strongly tokens are told apart, damping; all block weights in one type, errors fed back, nothing tuned.

    python benchmarks/moments_kld.py MODEL CALIBRATION TEXT [--types IQ2_XXS ...] [--windows 32 64 128] [--powers 0 0.5 1] [--dampings 0.1 0.2 0.4 0.8] [--judged 24] [--skip 48] [--device cuda] [--seconds S]

A token counts with the mean square of its gradient to the given power: 1 is what the loss says, 0 counts all alike. One line for each type, number of windows and power, a column for each damping.
"""
import argparse
import time

from feedback_kld import Judge, fed
from llm_quantize.calibration import hessian
from llm_quantize.models.layer_stack import LayerStack
from llm_quantize.models.architectures import architecture
from llm_quantize.calibration.text import load_tokenizer, read_text, windows
from llm_quantize.models.checkpoint import open_checkpoint


def tempered(power):
    "Moments whose tokens count with a power of what the loss says."
    class Tempered(hessian.EndLossMoments):
        def gradient(self, name, x, g, expert):
            if name in self.moments: self.add(name, x.float(), x.float() * g.float().square().mean(-1, keepdim=True).clamp(min=1e-30).pow(power), expert)
    return Tempered


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("text")
    parser.add_argument("--types", nargs="+", default=["IQ2_XXS", "Q4_K", "Q3_K"])
    parser.add_argument("--windows", nargs="+", type=int, default=[32, 64, 128])
    parser.add_argument("--powers", nargs="+", type=float, default=[0, 0.5, 1])
    parser.add_argument("--dampings", nargs="+", type=float, default=[0.1, 0.2, 0.4, 0.8])
    parser.add_argument("--judged", type=int, default=24)
    parser.add_argument("--skip", type=int, default=48)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    args = parser.parse_args()
    begun, checkpoint = time.monotonic(), open_checkpoint(args.model)
    specs = architecture(checkpoint.config).tensors(checkpoint)
    weights = {s.name: s.load(checkpoint).float().to(args.device) for s in specs if s.layer is not None and s.quantizable}
    ids = windows(load_tokenizer(checkpoint.path), read_text(args.calibration), limit=max(args.windows))
    judge, stack = Judge(checkpoint, specs, [args.text], args.judged, args.device, args.skip), LayerStack(checkpoint, device=args.device)
    print(f"{'type':<9}{'windows':>8}{'power':>7}" + "".join(f"{f'damping {d}':>22}" for d in args.dampings), flush=True)
    for count in args.windows:
        for power in args.powers:
            hessian.EndLossMoments = tempered(power)
            moments = {n: m for part in hessian.second_moments(stack, ids[:count], end_loss=True, room=float("inf")) for n, m in part.items()}
            for name in args.types:
                if time.monotonic() - begun > args.seconds: return
                found = [judge(fed(weights, name, moments, damping=d), {})[0] for d in args.dampings]
                print(f"{name:<9}{count:>8}{power:>7}" + "".join(f"{f'{k.mean():.5f} ± {k.std() / len(k) ** 0.5:.5f}':>22}" for k in found), flush=True)


if __name__ == "__main__": main()
