"""What error feedback is worth beside llama.cpp's encoder, step by step, in KL divergence: all block weights in one type, the same bytes.

    python benchmarks/feedback_kld.py MODEL CALIBRATION TEXT [TEXT ...] [--types Q3_K IQ2_XXS ...] [--windows 512] [--epochs 1] [--judged 48] [--device cuda] [--seconds S]

The steps: `reference` (llama.cpp's encoder with importance), `search` (ours), `feedback` (errors passed on, all tokens alike), `end-loss` (tokens weighted by squared gradients), `descent` (each scale and code once
more while the others stand), `tuned` (super-scales and norms moved). CALIBRATION is what moments, importance and tuning see; the TEXTs are only for judging. All steps are scored on the same windows, so their difference to the first has a standard error of its
own. Embeddings and output stay as they are. With --seconds, no further type is begun after that time. Where llama.cpp's library is missing the first step is left out.
"""
import argparse
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from llm_quantize.models.layer_stack import LayerStack
from llm_quantize.models.architectures import architecture
from llm_quantize.calibration.text import load_tokenizer, read_text, windows
from llm_quantize.models.checkpoint import open_checkpoint
from llm_quantize.quants.codec import decode, encode
from llm_quantize.errors import ArgumentError
from llm_quantize.quants.refine import feedback_encode
from llm_quantize.models.reference import load_float
from llm_quantize.calibration.hessian import second_moments
from llm_quantize.gguf.scale_tuning import tune

TYPES = ["Q3_K", "IQ2_XXS", "Q2_K", "IQ1_S", "IQ3_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "Q4_K", "IQ4_XS"]


class Judge:
    "KL divergence to the original on the second half of windows, one figure per window."
    def __init__(self, checkpoint, specs, texts, count, device, skip=0): # `skip`: windows left out at the beginning
        self.checkpoint, self.specs, self.device = checkpoint, specs, device
        tokenizer = load_tokenizer(checkpoint.path)
        self.ids = {name: windows(tokenizer, read_text(name), limit=skip + count)[skip:].to(device) for name in texts}
        self.original, self.model = (load_float(checkpoint, device=device) for _ in range(2))

    @torch.no_grad()
    def __call__(self, encoded: dict, norms: dict) -> list:
        "encoded: name -> (type, bytes)."
        parameters, before = dict(self.model.named_parameters()), dict(self.original.named_parameters())
        for name, p in parameters.items(): p.copy_(before[name])
        for spec in self.specs:
            if spec.name in encoded: weights = decode(encoded[spec.name][1].to(self.device), encoded[spec.name][0]).view(spec.shape)
            elif spec.name in norms: weights = norms[spec.name]
            else: continue
            for name, w in spec.to_hf(weights).items(): parameters[name].copy_(w)
        found = []
        for ids in self.ids.values():
            klds = []
            for part in ids.split(4):
                a, b = (m(part).logits[:, 256:-1].float().log_softmax(-1) for m in (self.original, self.model))
                klds.append((a.exp() * (a - b)).sum(-1).mean(-1))
            found.append(torch.cat(klds).double())
        return found


def reference(weights, name, moments):
    "llama.cpp's encoder, on all cores."
    def one(item): return item[0], (name, encode(item[1].cpu(), name, moments[item[0]][0].diagonal().contiguous().cpu(), search="reference"))
    with ThreadPoolExecutor() as pool: return dict(pool.map(one, weights.items()))


def fed(weights, name, moments, **options):
    "Error feedback, matrices of one shape together."
    shapes, out = {}, {}
    for key, w in weights.items(): shapes.setdefault(tuple(w.shape), []).append(key)
    for (rows, _), keys in shapes.items():
        data = feedback_encode(torch.stack([weights[k] for k in keys]), torch.cat([moments[k] for k in keys]), name, **options)
        out |= {k: (name, part) for k, part in zip(keys, data.split(rows))}
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--windows", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--judged", type=int, default=48)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    args = parser.parse_args()
    begun, checkpoint = time.monotonic(), open_checkpoint(args.model)
    specs = architecture(checkpoint.config).tensors(checkpoint)
    weights = {s.name: s.load(checkpoint).float().to(args.device) for s in specs if s.layer is not None and s.quantizable}
    ids = windows(load_tokenizer(checkpoint.path), read_text(args.calibration), limit=args.windows)
    stack = LayerStack(checkpoint, device=args.device)
    plain, end_loss = ({n: m for part in second_moments(stack, ids, end_loss=way, room=float("inf")) for n, m in part.items()} for way in (False, True))
    judge = Judge(checkpoint, specs, args.texts, args.judged, args.device)
    print(f"{len(weights)} matrices, {sum(w.numel() for w in weights.values()) / 1e6:.1f} million weights; calibration {len(ids)} windows, moments after {time.monotonic() - begun:.0f} s, {args.device}", flush=True)
    print(f"{'type':<8}{'step':<11}" + "".join(f"{text.rpartition('/')[2][:12]:>13}{'+-':>9}{'to first':>11}{'+-':>6}" for text in args.texts) + f"{'s':>7}")
    for name in args.types:
        if time.monotonic() - begun > args.seconds: break
        first, done = None, {}
        steps = {"reference": lambda: (reference(weights, name, plain), {}),
                 "search": lambda: ({k: (name, encode(w, name, plain[k][0].diagonal().contiguous())) for k, w in weights.items()}, {}),
                 "feedback": lambda: (fed(weights, name, plain), {}), "end-loss": lambda: (fed(weights, name, end_loss), {}),
                 "descent": lambda: (fed(weights, name, end_loss, descent_passes=3), {}),
                 "tuned": lambda: (lambda t: (done["descent"] | t.encoded, t.norms))(tune(checkpoint, specs, done["descent"], ids, epochs=args.epochs, batch=4, device=args.device))}
        for label, make in steps.items():
            start = time.monotonic()
            try: done[label], norms = make()
            except ArgumentError as error: print(f"{name:<8}{label:<11} left out: {error}"); continue
            seconds, klds = time.monotonic() - start, judge(done[label], norms)
            first = first or klds
            row = "".join(f"{k.mean():>13.5f}{k.std() / len(k) ** .5:>9.5f}{100 * (k / f.mean()).mean() - 100:>9.1f} %{100 * ((k - f) / f.mean()).std() / len(k) ** .5:>5.1f}%" for k, f in zip(klds, first))
            print(f"{name:<8}{label:<11}{row}{seconds:>7.1f}", flush=True)


if __name__ == "__main__": main()
