"""What else could be done to encoded weights, in KL divergence: readings of coordinate descent, and channel scales that are folded into the layer before.

    python benchmarks/refinement_kld.py MODEL CALIBRATION TEXT [TEXT ...] [--types Q3_K ...] [--windows 512] [--damping 0.1] [--judged 48] [--skip 48] [--tune] [--scales 0.1 0.25 0.5] [--readings 0 1 3] [--device cuda]

All beside error feedback alone, with end-loss moments, on the same windows; --skip leaves out the windows that other figures are reported on. `N readings`: of all scales and codes, see `feedback`. `scaled P`: the input
channels of every matrix multiplied by the power P of their activations' size before it is encoded and divided by it in the layer before, as AWQ does (arXiv 2306.00978): a norm's gain takes what its readers need
together, the up matrix's rows what the down matrix needs; what attention's values would take is shared by heads and left alone. Nothing here is written to a file.
"""
import argparse

import torch

from feedback_kld import Judge, fed
from llm_quantize.models.layer_stack import LayerStack
from llm_quantize.models.architectures import architecture
from llm_quantize.calibration.text import load_tokenizer, read_text, windows
from llm_quantize.models.checkpoint import open_checkpoint
from llm_quantize.quants.codec import decode
from llm_quantize.calibration.hessian import second_moments
from llm_quantize.gguf.scale_tuning import tune

READERS = (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up"), ("ffn_down",)) # that share channel scales


def scales_of(moments, power):
    "name -> factors of the input channels, mean 1 in the logarithm, common to those who read them together."
    out = {}
    for layer in {name.split(".")[1] for name in moments}:
        for group in READERS:
            names = [f"blk.{layer}.{role}.weight" for role in group]
            size = sum(moments[n][0].diagonal() / moments[n][0].diagonal().mean() for n in names).clamp(min=1e-8).sqrt().pow(power)
            out |= {n: size / size.log().mean().exp() for n in names}
    return out


def scaled(weights, name, moments, power, **options):
    "Feedback on scaled channels; decoded weights in the frame of the original."
    one = {n: torch.ones(w.shape[1], device=w.device) for n, w in weights.items()} | scales_of(moments, power)
    turned = fed({n: w * one[n] for n, w in weights.items()}, name, {n: m / one[n] / one[n].unsqueeze(-1) for n, m in moments.items()}, **options)
    return {n: decode(data, name).view(weights[n].shape) / one[n] for n, (_, data) in turned.items()}


def row(klds, first):
    return "".join(f"{k.mean():>13.5f}{k.std() / len(k) ** .5:>9.5f}{100 * (k / f.mean()).mean() - 100:>10.1f} %{100 * ((k - f) / f.mean()).std() / len(k) ** .5:>5.1f}%" for k, f in zip(klds, first))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--types", nargs="+", default=["Q3_K", "IQ2_XXS", "Q2_K", "IQ3_XXS", "Q4_K"])
    parser.add_argument("--windows", type=int, default=512)
    parser.add_argument("--damping", type=float, default=0.1)
    parser.add_argument("--readings", type=int, nargs="*", default=[0, 1, 3])
    parser.add_argument("--again", type=int, nargs="*", default=[8], help="grid points tried where a code stands")
    parser.add_argument("--scales", type=float, nargs="*", default=[])
    parser.add_argument("--tune", action="store_true", help="each variant of readings also tuned")
    parser.add_argument("--judged", type=int, default=48)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.model)
    specs = architecture(checkpoint.config).tensors(checkpoint)
    weights = {s.name: s.load(checkpoint).float().to(args.device) for s in specs if s.layer is not None and s.quantizable}
    ids = windows(load_tokenizer(checkpoint.path), read_text(args.calibration), limit=args.windows)
    moments = {n: m for part in second_moments(LayerStack(checkpoint, device=args.device), ids, end_loss=True, room=float("inf")) for n, m in part.items()}
    judge = Judge(checkpoint, specs, args.texts, args.judged, args.device, args.skip)
    tuned = lambda encoded: (lambda t: judge(encoded | t.encoded, t.norms))(tune(checkpoint, specs, encoded, ids, batch=4 if args.windows > 64 else 1, device=args.device))
    print(f"{args.windows} windows, damping {args.damping}")
    print(f"{'type':<8}{'variant':<21}" + "".join(f"{text.rpartition('/')[2][:12]:>13}{'+-':>9}{'to first':>12}{'+-':>6}" for text in args.texts))
    for name in args.types:
        first, first_tuned = None, None
        for n in args.readings:
            for again in args.again if n else args.again[:1]:
                encoded, label = fed(weights, name, moments, damping=args.damping, descent_passes=n, descent_points=again), f"{n} readings" + (f", {again} points" if n and len(args.again) > 1 else "")
                klds = judge(encoded, {})
                first = first or klds
                print(f"{name:<8}{label:<21}{row(klds, first)}", flush=True)
                if not args.tune: continue
                klds = tuned(encoded)
                first_tuned = first_tuned or klds
                print(f"{name:<8}{'  then tuned':<21}{row(klds, first_tuned)}", flush=True)
        for p in args.scales: print(f"{name:<8}{f'scaled {p}':<21}{row(judge({}, scaled(weights, name, moments, p, damping=args.damping, descent_passes=0)), first)}", flush=True)


if __name__ == "__main__": main()
