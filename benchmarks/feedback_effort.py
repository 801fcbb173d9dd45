"""What an effort of error feedback costs and gives: seconds of each phase, and KL divergence, all block weights in one type.

    python benchmarks/feedback_effort.py MODEL CALIBRATION TEXT [TEXT ...] [--types IQ3_XXS ...] [--efforts 40,20,1,1 ...] [--judged 48] [--skip 0] [--threads 2] [--device cpu]

An effort: windows, of these for tuning, epochs of tuning, readings of descent; see `feedback_pass`. The whole of `feedback_pass` is timed, loading included, judging is not.
"""
import argparse
import time
from dataclasses import replace

import torch

from feedback_kld import Judge
from llm_quantize.calibration.effort import EFFORTS
from llm_quantize.gguf.feedback_pass import feedback_pass
from llm_quantize.gguf.options import Calibration, Feedback
from llm_quantize.gguf.plan import Draft, plan_gguf
from llm_quantize.models.job import Job


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--types", nargs="+", default=["IQ3_XXS"])
    parser.add_argument("--efforts", nargs="+", default=[",".join(str(v) for v in (e.moments, e.tuning, e.epochs, e.passes)) for e in (EFFORTS["default"],)])
    parser.add_argument("--judged", type=int, default=48)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    job = Job(args.model, device=args.device)
    start = plan_gguf(job, "Q4_0")
    judge = Judge(job.checkpoint, list(start.specs), args.texts, args.judged, args.device, args.skip)
    for name in args.types:
        types = {s.name: name if s.layer is not None and s.quantizable else "F32" for s in start.specs}
        draft = Draft(replace(start, plan=replace(start.plan, tensors=tuple(replace(t, type=types[t.name]) for t in start.plan))))
        for effort in args.efforts:
            tried = replace(EFFORTS["default"], **dict(zip(("moments", "tuning", "epochs", "passes"), map(int, effort.split(",")))))
            begun, marks = time.perf_counter(), {}
            def progress(done, total, what): marks["blocks" if "block" in what else what.rpartition(": ")[2]] = time.perf_counter() - begun
            fresh = Job(args.model, device=args.device, progress=progress) # loading is timed, too
            own = replace(draft, plan=replace(draft.plan, checkpoint=fresh.checkpoint))
            found = feedback_pass(fresh, own, Feedback(True), Calibration(args.calibration), effort=tried)
            seconds, before, phases = time.perf_counter() - begun, 0.0, []
            for what, end in sorted(marks.items(), key=lambda mark: mark[1]): phases, before = [*phases, f"{what} {end - before:.0f} s"], end
            klds = judge({n: (name, data) for n, data in found.encoded.items()}, {n: v.to(args.device) for n, v in found.norms.items()})
            print(f"{name:<8} {effort:<14} {seconds:5.0f} s ({', '.join(phases)})  KLD " + "  ".join(f"{k.mean():.5f} +- {k.std() / len(k) ** .5:.5f}" for k in klds), flush=True)


if __name__ == "__main__": main()
