"""What int8 costs on a model, and what smoothing saves, beside llm-compressor on the same tokens.

    python benchmarks/smoothquant_kld.py MODEL OUT [--plant] [--peer PYTHON SCRIPT] [--windows 32] [--evaluate 32]

Windows of 256 tokens of the bundled calibration text, each beginning with BOS where the tokenizer adds it, go to every method alike. --plant first makes a copy of the model with loud channels: in every norm before
attention and MLP four channels are multiplied by 80, and the columns that read them divided by 80, which changes nothing in float. --peer names a Python with llm-compressor and the script that runs it
(`peer_smoothquant.py MODEL OUT --calib FILE --method M --alpha A --samples N --seq-len 256`). Every directory is read back by our evaluator, in exact int8 arithmetic, and compared with the float model on held-out text.
"""
import argparse
import json
import shutil
import subprocess
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from llm_quantize.calibration.text import bundled_text, load_tokenizer, windows
from llm_quantize.models.checkpoint import open_checkpoint
from llm_quantize.quality.evaluate import compare
from llm_quantize.compressed.families import ModelMappings
from llm_quantize.compressed.smoothing import fold_tensor
from llm_quantize.compressed.convert import smoothquant

SIZE = 256
OURS = {"none": dict(alpha=None), "0.5": dict(alpha=0.5), "0.8": dict(alpha=0.8), "auto": dict(alpha="auto"), "auto, feedback": dict(alpha="auto", error_feedback=True),
        "auto, static": dict(alpha="auto", static_activations=True)}
PEER = [("rtn", 0.5), ("gptq", 0.5), ("smoothquant-rtn", 0.5), ("smoothquant-rtn", 0.8), ("smoothquant-gptq", 0.5), ("smoothquant-gptq", 0.8)]


def plant(model, folder):
    "A copy of the model with loud channels."
    checkpoint = open_checkpoint(model)
    plan = ModelMappings(checkpoint)
    shutil.copytree(checkpoint.path, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    out = {name: checkpoint.tensor(name).float() for name in plan.rest}
    for i, names in plan.names.items():
        folded = []
        for k, mapping in enumerate(m for m in plan.layers[i].mappings if m.kind == "norm"):
            factors = torch.ones(mapping.stop - mapping.start)
            factors[torch.randperm(len(factors), generator=torch.Generator().manual_seed(10 * i + k))[:4]] = 1 / 80
            folded.append((mapping, factors))
        for within, name in names.items(): out[name] = fold_tensor(within, checkpoint.tensor(name), folded)
    if checkpoint.config.get("tie_word_embeddings"): out.pop("lm_head.weight", None)
    save_file({k: t.contiguous() for k, t in out.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2))
    return folder


def common_tokens(model, count):
    "Windows whose text gives the same tokens again, and that text: what a tool that reads text needs to see the same."
    tokenizer = load_tokenizer(model)
    chosen, text = [], ""
    for window in windows(tokenizer, bundled_text("calibration"), size=SIZE, limit=8 * count):
        if len(chosen) == count: break
        said = tokenizer.decode(window)
        if tokenizer(text + said, add_special_tokens=False).input_ids == [t for w in chosen for t in w] + window.tolist():
            chosen.append(window.tolist())
            text += said
    return torch.tensor(chosen), text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--plant", action="store_true")
    parser.add_argument("--peer", nargs=2, metavar=("PYTHON", "SCRIPT"))
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--evaluate", type=int, default=32, help="windows of 512 tokens")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = plant(args.model, args.out / "planted") if args.plant else args.model
    ids, text = common_tokens(model, args.windows)
    (args.out / "tokens.txt").write_text(text, encoding="utf-8")
    print(f"{len(ids)} windows of {SIZE} tokens, alike for all")
    found, seconds = {}, {}
    for name, options in OURS.items():
        start = time.monotonic()
        folder = f"ours-{name.replace(', ', '-')}"
        result = smoothquant(model, output_dir=args.out, output_name=folder, ids=ids, **options)
        found[f"ours {name}"] = result.output_path
        seconds[f"ours {name}"] = time.monotonic() - start
    for method, alpha in PEER if args.peer else []:
        name, start = f"{method} {alpha}" if "smooth" in method else method, time.monotonic()
        folder = args.out / f"peer-{method}-{alpha}"
        subprocess.run([args.peer[0], args.peer[1], str(model), str(folder), "--calib", str(args.out / "tokens.txt"), "--method", method, "--alpha", str(alpha), "--samples", str(len(ids)),
                        "--seq-len", str(SIZE)], check=True, capture_output=True)
        found[f"llm-compressor {name}"], seconds[f"llm-compressor {name}"] = str(folder), time.monotonic() - start
    reports = {r.quantized_model: r.metrics for r in compare(model, list(found.values()), calibration_samples=args.evaluate).reports}
    print("| directory | KLD | 99th percentile | same top token | perplexity | seconds |\n|---|--:|--:|--:|--:|--:|")
    for name, path in found.items():
        m = reports[Path(path).name]
        print(f"| {name} | {m.kld_mean:.6f} ± {m.kld_mean_se:.6f} | {m.kld_p99:.4f} | {100 * m.top1_agreement:.2f} % | {m.perplexity_quantized:.3f} (float {m.perplexity_original:.3f}) | {seconds[name]:.0f} |")


if __name__ == "__main__": main()
