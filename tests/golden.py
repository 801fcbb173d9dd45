"""Quantize the bundled sample model in several ways and print what came out, one line of JSON each: name and sha256.

    python -m tests.golden NAME...

`tests/test_golden.py` runs it as a process of its own, because the settings below must be there before torch is loaded.
"""
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

# One thread, and instructions that every x86-64 processor of the last ten years has: sums in float are then made in the same order.
SETTINGS = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "AVX2", "TORCHDYNAMO_DISABLE": "1",
}
DATA = Path(__file__).resolve().parent / "data"
IMATRIX = DATA / "sample-4m-llama.imatrix.gguf"

# name: (format, level, options)
TRANSFORMS = {
    "Q8_0": ("gguf", "Q8_0", {}),
    "Q4_K_M": ("gguf", "Q4_K_M", {}),
    "Q2_K": ("gguf", "Q2_K", {}),
    "IQ1_S": ("gguf", "IQ1_S", {"imatrix": IMATRIX}),
    "dynamic": ("gguf", "dynamic", {"imatrix": IMATRIX, "effort": "quick"}),
    "W8A8": ("smoothquant", "W8A8", {"calibration_samples": 8, "alpha": 0.5}),
}


def digest(path: Path) -> str:
    "sha256 of a file, or of the weights in a directory."
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def made(name: str, folder: str) -> str:
    "Quantize the sample model in one of the `TRANSFORMS` and give its digest."
    import llm_quantize
    from llm_quantize.api import quantize

    output, level, options = TRANSFORMS[name]
    sample = Path(llm_quantize.__file__).parent / "data" / "sample-4m"
    result = quantize(sample, output, level, output_dir=folder, device="cpu", **options)
    return digest(Path(result.output_path))


def main(names: list[str]) -> None:
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["LLM_QUANTIZE_IMATRIX_CACHE"] = folder
            print(json.dumps([name, made(name, folder)]), flush=True)


if __name__ == "__main__": main(sys.argv[1:] or list(TRANSFORMS))
