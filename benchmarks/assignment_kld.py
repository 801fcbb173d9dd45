"""Does the sum of predicted costs rank whole assignments of types as their measured KL divergence does?

    python benchmarks/assignment_kld.py MODEL [--sizes 2.5,3,3.5,4.25] [--each 6] [--windows 4] [--effort default]

For each size (bits per weight of the file) the best assignment by the table of costs, and others that are best by a table in which every cost was multiplied by a random factor
(log-normal, sigma 1). Each is measured as a whole on held-out text, which the costs have not seen. Prints the rank correlation within each size and over all."""
import argparse
from dataclasses import replace

import numpy as np
import torch

from llm_quantize.models.job import Job
from llm_quantize.gguf.allocation import allocate
from llm_quantize.calibration.analysis import cached_imatrix
from llm_quantize.calibration.text import bundled_text, load_tokenizer, windows
from llm_quantize.gguf.resolution import _measurer, sensitivity_path, unmeasured
from llm_quantize.calibration.probe import Probe
from llm_quantize.calibration.sensitivity import measure_sensitivity, spearman


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--sizes", default="2.5,3,3.5,4.25")
    parser.add_argument("--each", type=int, default=6)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--samples", type=int, default=128, help="windows for the importance matrix")
    parser.add_argument("--effort", default="default")
    args = parser.parse_args()
    job = Job(args.model, device="cpu")
    imatrix = cached_imatrix(job, calibration_samples=args.samples)
    found = measure_sensitivity(job, imatrix, effort=args.effort, path=sensitivity_path(job.name, imatrix, args.effort))
    choices = [replace(c, costs=found[c.name].costs) for c in unmeasured(list(job.tensors.values()))]
    text = windows(load_tokenizer(job.checkpoint.path), bundled_text("heldout"), limit=args.windows)
    measure, chance, rows = _measurer(Probe(job.stack(torch.float32), text), imatrix), np.random.default_rng(0), []
    print("| bits per weight | assignment | predicted | measured |\n|--:|--:|--:|--:|")
    for size in map(float, args.sizes.split(",")):
        for i in range(args.each):
            wild = [replace(c, costs={t: v * (np.exp(chance.normal()) if i else 1.0) for t, v in c.costs.items()}) for c in choices]
            types = allocate(wild, int(size * sum(c.weights for c in choices) / 8)).types
            predicted = sum(c.costs[types[c.name]] for c in choices)
            rows.append((size, predicted, float(measure(types).mean())))
            print(f"| {size:g} | {i} | {predicted:.4f} | {rows[-1][2]:.4f} |", flush=True)
        own = [r for r in rows if r[0] == size]
        print(f"rank correlation at {size:g} bits: {spearman([r[1] for r in own], [r[2] for r in own]):.2f}", flush=True)
    print(f"rank correlation over all: {spearman([r[1] for r in rows], [r[2] for r in rows]):.2f}; of logarithms: {np.corrcoef(np.log([r[1:] for r in rows]).T)[0, 1]:.3f}")


if __name__ == "__main__": main()
