"""Dynamic files at the sizes of llama.cpp's mixes, beside those mixes: mean KL divergence on the reporting text.

    python benchmarks/dynamic_kld.py MODEL [--mixes IQ2_XXS,IQ3_XXS,Q4_K_M] [--windows 48] [--effort default] [--error-feedback] [--text FILE]

Each mix is made by llm_quantize with llama.cpp's own encoder (`--search reference`) and the same importance matrix. Types are chosen on other text than this reports on."""
import argparse
import tempfile
import time
from pathlib import Path

from llm_quantize.cached_imatrix import cached_imatrix
from llm_quantize.profiles import Profile, Target
from llm_quantize.quality import compare
from llm_quantize.gguf_plan import plan_dynamic
from llm_quantize.quantize import quantize


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--mixes", default="IQ1_M,IQ2_XXS,IQ2_M,Q2_K,IQ3_XXS,Q3_K_M,Q4_K_M")
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--samples", type=int, default=128, help="windows for the importance matrix")
    parser.add_argument("--effort", default="default")
    parser.add_argument("--error-feedback", action="store_true")
    parser.add_argument("--text", help="reporting text; default: the bundled held-out text")
    args = parser.parse_args()
    imatrix = cached_imatrix(args.model, calibration_samples=args.samples, device="cpu")
    print("| mix | its bytes | dynamic bytes | KLD mix | KLD dynamic | ratio | selected / predicted on selection text | seconds to plan |\n|---|--:|--:|--:|--:|--:|--:|--:|")
    for mix in args.mixes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            theirs = quantize(args.model, "gguf", mix, output_dir=folder, imatrix=imatrix, search="reference")
            start = time.monotonic()
            job, _ = plan_dynamic(args.model, target=Target(theirs.file_size, "bytes"), imatrix=imatrix, effort=args.effort)
            seconds = time.monotonic() - start
            fixed = Profile(mix, Target(theirs.file_size, "bytes"), tensors={t.name: t.type for t in job.plan if t.type != "F32"})
            ours = quantize(args.model, "gguf", "dynamic", output_dir=folder, imatrix=imatrix, profile=fixed, error_feedback=args.error_feedback)
            found = compare(args.model, [theirs.output_path, ours.output_path], calibration_data=args.text, calibration_samples=args.windows, device="cpu")
            kld = {Path(r.quantized_model).name: r.metrics for r in found.reports}
            a, b = kld[Path(theirs.output_path).name], kld[Path(ours.output_path).name]
            notes = job.allocation
            print(f"| {mix} | {theirs.file_size:,} | {ours.file_size:,} | {a.kld_mean:.4f} ± {a.kld_mean_se:.4f} | {b.kld_mean:.4f} ± {b.kld_mean_se:.4f} | {b.kld_mean / a.kld_mean:.3f} "
                  f"| {notes['kld_selected'] or 0:.4f} / {notes['kld_as_predicted'] or 0:.4f} / {notes['predicted_kld']:.4f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__": main()
