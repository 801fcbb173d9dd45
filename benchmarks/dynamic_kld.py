"""Dynamic files at the sizes of llama.cpp's mixes, with and without error feedback, beside those mixes: mean KL divergence on reporting text.

    python benchmarks/dynamic_kld.py MODEL [--mixes IQ2_XXS,IQ3_XXS,Q4_K_M] [--windows 48] [--effort default] [--no-error-feedback] [--text FILE ...] [--json FILE]

Each mix is made by llm_quantize with llama.cpp's own encoder (`--search reference`) and the same importance matrix. Types are chosen on other text than this reports on.
`--text` may be given several times; without it the bundled held-out text is used, which it also names (`heldout`)."""
import argparse
import json
import tempfile
import time
from pathlib import Path

from llm_quantize.models.job import Job
from llm_quantize.gguf.options import Dynamic
from llm_quantize.calibration.analysis import cached_imatrix
from llm_quantize.gguf.plan import plan_dynamic
from llm_quantize.gguf.profiles import Profile, Target
from llm_quantize.quality.evaluate import compare
from llm_quantize.api import quantize


def made(args, mix, imatrix, folder): # {kind: result}, seconds to plan and to write
    "The mix, and dynamic files of at most its size."
    out = {"mix": quantize(args.model, "gguf", mix, output_dir=folder, imatrix=imatrix, search="reference")}
    start = time.monotonic()
    plan, _ = plan_dynamic(Job(args.model), Dynamic(target=Target(out["mix"].file_size, "bytes")), imatrix=imatrix, effort=args.effort)
    seconds = [time.monotonic() - start]
    fixed = Profile(mix, Target(out["mix"].file_size, "bytes"), tensors={t.name: t.type for t in plan.plan if t.type != "F32"})
    for kind in ("dynamic",) if args.no_error_feedback else ("dynamic", "feedback"):
        start = time.monotonic()
        out[kind] = quantize(args.model, "gguf", "dynamic", output_dir=folder, output_name=f"{mix}-{kind}.gguf", imatrix=imatrix, profile=fixed, error_feedback=kind == "feedback")
        seconds.append(time.monotonic() - start)
    return out, seconds, plan.allocation


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--mixes", default="IQ1_M,IQ2_XXS,IQ2_M,Q2_K,IQ3_XXS,Q3_K_M,Q4_K_M")
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--samples", type=int, default=128, help="windows for the importance matrix")
    parser.add_argument("--effort", default="default")
    parser.add_argument("--no-error-feedback", action="store_true")
    parser.add_argument("--text", action="append", help="reporting text; default: the bundled held-out text")
    parser.add_argument("--json", type=Path, help="also keep the figures in this file")
    args = parser.parse_args()
    imatrix, kept = cached_imatrix(Job(args.model, device="cpu"), calibration_samples=args.samples), []
    print("| mix | text | its bytes | dynamic bytes | KLD mix | KLD dynamic | ratio | with error feedback | ratio | selected / predicted on selection text | seconds: plan, write, with feedback |")
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for mix in args.mixes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            results, seconds, notes = made(args, mix, imatrix, folder)
            for text in args.text or ["heldout"]:
                found = compare(args.model, [r.output_path for r in results.values()], calibration_data=None if text == "heldout" else text, calibration_samples=args.windows, device="cpu")
                kld = {Path(r.quantized_model).name: r.metrics for r in found.reports}
                m = {kind: kld[Path(r.output_path).name] for kind, r in results.items()}
                told = [f"{m[k].kld_mean:.4f} ± {m[k].kld_mean_se:.4f}" + ("" if k == "mix" else f" | {m[k].kld_mean / m['mix'].kld_mean:.3f}") for k in m] + [" | "] * ("feedback" not in m)
                print(f"| {mix} | {Path(text).stem} | {results['mix'].file_size:,} | {results['dynamic'].file_size:,} | {' | '.join(told)} "
                      f"| {notes['kld_selected'] or 0:.4f} / {notes['kld_as_predicted'] or 0:.4f} / {notes['predicted_kld']:.4f} | {', '.join(f'{s:.0f}' for s in seconds)} |", flush=True)
                kept += [{"mix": mix, "text": Path(text).stem, "kind": k, "bytes": results[k].file_size, "kld": m[k].kld_mean, "se": m[k].kld_mean_se} for k in m]
            if args.json: args.json.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__": main()
