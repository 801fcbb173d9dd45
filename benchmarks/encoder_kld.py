"""What the encoders cost a model beside llama.cpp's own, in KL divergence: all block weights in one type, by each way of encoding, the same importance matrix.

    python benchmarks/encoder_kld.py MODEL IMATRIX TEXT [TYPE ...] [--windows 24] [--ways reference fast best fast:none fast:1]

A way is a search; after a colon, how much a weight's own magnitude counts: fast:4 is importance times sqrt(4 + x^2 / mean x^2), fast:none is importance alone; after another,
the factor on the super-scale: fast:4:1.05.
TEXT must be text that the importance matrix has not seen. All ways are scored on the same windows, so their difference to the first has a standard error of its own.
Embeddings, output and norms stay as they are.
"""
import argparse
from dataclasses import replace

from llm_quantize.quants import blocks
from llm_quantize.models.architectures import architecture
from llm_quantize.quants.blocks import ENCODERS
from llm_quantize.calibration.text import load_tokenizer, read_text, windows
from llm_quantize.models.checkpoint import open_checkpoint
from llm_quantize.quants.codec import decode, encode
from llm_quantize.models.reference import load_float
from llm_quantize.calibration.imatrix import ImportanceMatrix
from llm_quantize.quants.qtypes import qtype
from llm_quantize.quality.metrics import score_windows


def fill(model, tensors, checkpoint, imatrix, name, way):
    "Give the model the weights that a file of that type would have; returns the share of tensors' weighted signal lost."
    parameters, lost, encoders = dict(model.named_parameters()), [], (blocks.ENCODERS.copy(), blocks.THOROUGH.copy())
    search, *changes = way.split(":")
    changes = {k: None if v == "none" else float(v) for k, v in zip(("damping", "shrink_compensation"), changes) if v}
    for table in (blocks.ENCODERS, blocks.THOROUGH):
        if name in table: table[name] = replace(table[name], **changes)
    for tensor in tensors:
        x = tensor.load(checkpoint).float().contiguous()
        rows = x.flatten(0, -2)
        importance = imatrix.importance(tensor.name, rows.shape[1]).contiguous()
        decoded = decode(encode(rows, name, importance, search=search, compiled=True), name)
        lost.append(((importance * (decoded - rows).square()).sum() / (importance * rows.square()).sum()).item())
        for target, weights in tensor.to_hf(decoded.view_as(x)).items(): parameters[target].copy_(weights)
    for table, before in zip((blocks.ENCODERS, blocks.THOROUGH), encoders): table.update(before)
    return sum(lost) / len(lost)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("imatrix")
    parser.add_argument("text")
    parser.add_argument("types", nargs="*", default=list(ENCODERS))
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--ways", nargs="+", default=["reference", "fast"])
    args = parser.parse_args()
    checkpoint, imatrix = open_checkpoint(args.model), ImportanceMatrix.load(args.imatrix)
    ids = windows(load_tokenizer(checkpoint.path), read_text(args.text), limit=args.windows)
    original, models = load_float(checkpoint), [load_float(checkpoint) for _ in args.ways]
    tensors = [t for t in architecture(checkpoint.config).tensors(checkpoint) if t.layer is not None and t.quantizable]
    print(f"{len(tensors)} tensors, {sum(x.numel() for x in (t.load(checkpoint) for t in tensors)) / 1e6:.1f} million weights, {len(ids)} windows")
    print(f"{'type':<8}{'bits':>7}  {'way':<12}{'KLD':>10} {'+-':>9} {'to ' + args.ways[0]:>16} {'+-':>6}  signal lost")
    for name in args.types:
        lost = [fill(model, tensors, checkpoint, imatrix, name, way) for model, way in zip(models, args.ways)]
        scores = [s.kld.double().view(len(ids), -1).mean(1) for s in score_windows(original, models, ids)]
        for way, kld, share in zip(args.ways, scores, lost):
            to_first, root = 100 / scores[0].mean(), len(ids) ** 0.5
            print(f"{name:<8}{qtype(name).bpw:>7.4f}  {way:<12}{kld.mean():>10.6f} {kld.std() / root:>9.6f} {to_first * (kld.mean() - scores[0].mean()):>14.1f} % "
                  f"{to_first * (kld - scores[0]).std() / root:>5.1f}%  {share:.4f}", flush=True)


if __name__ == "__main__":
    main()
