"""What the encoders cost a model beside llama.cpp's own, in KL divergence: all block weights in one type, by either encoder, the same importance matrix.

    python benchmarks/encoder_kld.py MODEL IMATRIX TEXT [TYPE ...] [--windows 24]

TEXT must be text that the importance matrix has not seen. Both encoders are scored on the same windows, so their difference has a standard error of its own.
Embeddings, output and norms stay as they are.
"""
import argparse
import ctypes
import importlib.util
from pathlib import Path

import torch

from llm_quantize.architectures import architecture
from llm_quantize.blocks import ENCODERS
from llm_quantize.calibration import load_tokenizer, read_text, windows
from llm_quantize.checkpoint import open_checkpoint
from llm_quantize.codec import dequantize, quantize
from llm_quantize.decoded import load_float
from llm_quantize.imatrix import ImportanceMatrix
from llm_quantize.qtypes import qtype
from llm_quantize.quality import score_windows


def llama_cpp():
    "A function that encodes with the library of llama-cpp-python."
    library = ctypes.CDLL(str(Path(importlib.util.find_spec("llama_cpp").origin).parent / "lib" / "libggml-base.so"))
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    def encode(x, name, importance):
        out = torch.empty(x.shape[0], qtype(name).row_bytes(x.shape[1]), dtype=torch.uint8)
        library.ggml_quantize_chunk(qtype(name).ggml_id, x.data_ptr(), out.data_ptr(), 0, *x.shape, importance.data_ptr())
        return out
    return encode


def fill(model, tensors, checkpoint, imatrix, encode, name):
    "Give the model the weights that a file of that type would have."
    parameters = dict(model.named_parameters())
    for tensor in tensors:
        x = tensor.load(checkpoint).float().contiguous()
        rows = x.flatten(0, -2)
        importance = imatrix.importance(tensor.name, rows.shape[1]).contiguous()
        decoded = dequantize(encode(rows, name, importance), name).view_as(x)
        for target, weights in tensor.to_hf(decoded).items(): parameters[target].copy_(weights)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("imatrix")
    parser.add_argument("text")
    parser.add_argument("types", nargs="*", default=list(ENCODERS))
    parser.add_argument("--windows", type=int, default=24)
    args = parser.parse_args()
    checkpoint, imatrix = open_checkpoint(args.model), ImportanceMatrix.load(args.imatrix)
    ids = windows(load_tokenizer(checkpoint.path), read_text(args.text), limit=args.windows)
    original, quantized = load_float(checkpoint), load_float(checkpoint)
    tensors = [t for t in architecture(checkpoint.config).tensors(checkpoint) if t.layer is not None and t.quantizable]
    ways = {"llama.cpp": llama_cpp(), "ours": lambda x, name, importance: quantize(x, name, importance, compile=True)}
    print(f"{len(tensors)} tensors, {sum(x.numel() for x in (t.load(checkpoint) for t in tensors)) / 1e6:.1f} million weights, {len(ids)} windows")
    print(f"{'type':<7} {'bits':>6} {'KLD llama.cpp':>14} {'KLD ours':>10} {'difference':>11} {'+-':>5}")
    for name in args.types:
        kld = {}
        for way, encode in ways.items():
            fill(quantized, tensors, checkpoint, imatrix, encode, name)
            kld[way] = score_windows(original, [quantized], ids)[0].kld.double().view(len(ids), -1).mean(1)
        theirs, ours = kld.values()
        share = 100 / theirs.mean()
        error = (ours - theirs).std() / len(ids) ** 0.5
        print(f"{name:<7} {qtype(name).bpw:>6.3f} {theirs.mean():>14.6f} {ours.mean():>10.6f} {share * (ours.mean() - theirs.mean()):>9.1f} % {share * error:>4.1f}%", flush=True)


if __name__ == "__main__":
    main()
