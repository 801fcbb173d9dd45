"""Quantize the bundled sample model in several ways and print what came out, one line of JSON each: name and digest.

    python -m tests.golden NAME...

`tests/test_golden.py` runs it as a process of its own, because the settings below must be there before torch is loaded.
"""
import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional

# One thread, and instructions that every x86-64 processor of the last ten years has: sums in float are then made in the same order.
SETTINGS = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "AVX2", "TORCHDYNAMO_DISABLE": "1",
}
# What torch leaves to MKL and oneDNN. Their last digits depend on the processor: AMD gets other square roots than Intel.
ROUNDED = ("sqrt", "exp", "log", "log2", "log10", "sin", "cos", "tanh", "erf")
MULTIPLIED = ((torch, "matmul"), (torch, "bmm"), (torch.Tensor, "matmul"), (torch.Tensor, "__matmul__"),
              (torch.Tensor, "bmm"), (torch.Tensor, "softmax"), (functional, "linear"),
              (functional, "scaled_dot_product_attention"))
DATA = Path(__file__).resolve().parent / "data"
IMATRIX = "sample-4m-llama.imatrix.gguf"

# name: (format, level, options)
LEVELS = {
    "Q8_0": ("gguf", "Q8_0", {}),
    "Q4_K_M": ("gguf", "Q4_K_M", {}),
    "Q2_K": ("gguf", "Q2_K", {}),
    "IQ1_S": ("gguf", "IQ1_S", {"imatrix": IMATRIX}),
    "dynamic": ("gguf", "dynamic", {"imatrix": IMATRIX, "effort": "quick"}),
    "W8A8": ("smoothquant", "W8A8", {"smoothquant": True, "calibration_samples": 8, "alpha": 0.5}),
}


def in_float64(plain):
    "The function computed in float64 where it was to be float32. Rounded back, the digits that differ are gone."
    def doubled(x): return x.double() if torch.is_tensor(x) and x.dtype == torch.float32 else x

    def function(x, *args, **options):
        if x.dtype != torch.float32 or x.device.type != "cpu": return plain(x, *args, **options)
        options = {key: doubled(value) for key, value in options.items()}
        return plain(doubled(x), *map(doubled, args), **options).float()
    return function


def round_alike() -> None:
    "Make torch compute the same on every processor."
    for place, name in MULTIPLIED: setattr(place, name, in_float64(getattr(place, name)))
    for name in ROUNDED:
        exact = in_float64(getattr(torch.Tensor, name))
        for place in (torch, torch.Tensor): setattr(place, name, exact)
        setattr(torch.Tensor, name + "_", lambda x, exact=exact: x.copy_(exact(x)))


def digest(path: Path) -> str:
    "sha256 of a file, or of the weights in a directory."
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def totals(path: Path) -> list[float]: # of the codes, of the scales
    "Sums over all tensors of a directory, which hardly move when the last digit of a scale does."
    tensors = [tensor for file in sorted(path.glob("*.safetensors")) for tensor in load_file(file).values()]
    codes = sum(int(t.long().abs().sum()) for t in tensors if t.dtype == torch.int8)
    return [codes, sum(float(t.double().sum()) for t in tensors if t.dtype != torch.int8)]


def made(name: str, folder: str) -> dict:
    "Quantize the sample model in one of the `LEVELS`: its sha256, and the totals of a directory."
    import llm_quantize
    from llm_quantize.api import quantize

    output, level, options = LEVELS[name]
    sample = Path(llm_quantize.__file__).parent / "data" / "sample-4m"
    result = quantize(sample, output, level, output_dir=folder, device="cpu", **options)
    path = Path(result.output_path)
    return {"sha256": digest(path)} | ({"totals": totals(path)} if path.is_dir() else {})


def main(names: list[str]) -> None:
    round_alike()
    for name in names:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            os.environ["LLM_QUANTIZE_IMATRIX_CACHE"] = folder
            os.chdir(folder)  # nothing is taken up from an earlier run, here or beside the imatrix
            shutil.copyfile(DATA / IMATRIX, IMATRIX)
            print(json.dumps([name, made(name, folder)]), flush=True)


if __name__ == "__main__": main(sys.argv[1:] or list(LEVELS))
