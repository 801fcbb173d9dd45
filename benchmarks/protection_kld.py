"""What the protection of super weights is worth: files with and without it, of the same size, on text that nothing was chosen by.

    python benchmarks/protection_kld.py MODEL [TEXT] [--imatrix FILE] [--types IQ1_S IQ2_XXS] [--plant 8] [--windows 32] [--steps] [--folder DIR]

MODEL defaults to the bundled sample, TEXT to the bundled held-out text. For each type two files are written by `quantize`, without protection and with it, decoded and scored on the same windows; perplexity
and KL divergence are paired, so their change has a standard error of its own. With --steps, what the parts do alone: pins only (with the spike's size and the raised weights), rescaling only, the exchange of
types only, and as a control the same exchange in favour of another block (the one in the middle), each in memory.

--plant S makes a copy of the model first in which every column of ffn_down with a super weight is S times larger and the row of ffn_up that feeds it S times smaller. The model computes the same as before, but
its super weights are now outliers of their blocks that no encoder can overlook. The importance matrix is changed accordingly.
"""
import argparse
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from llm_quantize.models.job import Job
from llm_quantize.models.architectures import architecture
from llm_quantize.calibration.analysis import cached_imatrix
from llm_quantize.calibration.text import bundled_text, load_tokenizer, read_text, windows
from llm_quantize.models.checkpoint import open_checkpoint, sample_path
from llm_quantize.quants.codec import decode
from llm_quantize.quality.quantized_model import load_quantized
from llm_quantize.gguf.feedback_pass import Prepared
from llm_quantize.models.reference import load_float
from llm_quantize.gguf.plan import Draft, plan_gguf
from llm_quantize.calibration.imatrix import ImportanceMatrix
from llm_quantize.gguf.resolution import sensitivity_path
from llm_quantize.gguf.protection import Changes, exchange, protect, scaled_importance, up_of, with_types
from llm_quantize.gguf.spikes import encode_protected
from llm_quantize.quality.metrics import score_windows
from llm_quantize.api import quantize
from llm_quantize.calibration.sensitivity import measure_sensitivity
from llm_quantize.calibration.super_weights import find_super_weights


def plant(checkpoint, imatrix, factor, folder):
    "A copy of the model with larger super weights, and its importance matrix."
    folder.mkdir(parents=True, exist_ok=True)
    for file in checkpoint.path.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and not file.name.endswith(".index.json"): shutil.copyfile(file, folder / file.name)
    specs = architecture(checkpoint.config).tensors(checkpoint)
    named, weights = {s.name: s for s in specs}, {name: checkpoint.tensor(name).clone() for name in checkpoint.names}
    ids = windows(load_tokenizer(checkpoint.path), [bundled_text("calibration")], limit=1)
    for name, col in dict.fromkeys((w.tensor, w.col) for w in find_super_weights(checkpoint, ids, device="cpu").found):
        down, up = named[name], up_of(specs, named[name])
        weights[down.sources[0]][:, col] *= factor
        weights[up.sources[0]][col] /= factor
        imatrix = scaled_importance(imatrix, name, col, factor ** -2)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return open_checkpoint(folder), replace(imatrix, notes={key: note for key, note in imatrix.notes.items() if "super_weights" not in key})


def module_of(checkpoint, plan, encoded):
    "A model with the weights of these bytes."
    model, types = load_float(checkpoint), plan.types
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for spec in plan.specs:
            if spec.name in encoded:
                for name, w in spec.to_hf(decode(encoded[spec.name], types[spec.name]).view(spec.shape)).items(): parameters[name].copy_(w)
    return model


def steps(checkpoint, imatrix, level):
    "Label, (model, bytes of its file): the parts of protection alone."
    job = Job(checkpoint, device="cpu")
    draft = Draft(plan_gguf(job, level, has_imatrix=True), imatrix)
    plan = protect(job, draft)
    changes = plan.changes
    def made(changed): # a Protection -> model and size
        encoded = encode_protected(changed, Prepared()).prepared.encoded
        return module_of(checkpoint, changed.draft.plan, encoded), changed.draft.plan.file_bytes
    def traded(types, blocks): # an exchange alone -> model and size
        other = Draft(with_types(draft.plan, types, blocks), imatrix)
        encoded = plan.encoded | {name: other.encode(job.tensors[name]) for name in types}
        return module_of(checkpoint, other.plan, encoded), other.plan.file_bytes
    yield "pins", made(replace(plan, draft=draft, changes=Changes()))
    if changes.rescaled or changes.weighted:
        same = replace(plan.draft, plan=replace(plan.draft.plan, plan=draft.plan.plan))
        yield "pins, rescaling", made(replace(plan, draft=same, changes=replace(changes, types={})))
    yield "exchange", traded(changes.types, plan.blocks)
    middle = (len({s.layer for s in draft.plan.specs}) - 1) // 2
    costs = measure_sensitivity(job, imatrix, effort="quick", path=sensitivity_path(job.name, imatrix, "quick"))
    yield f"control: block {middle}", traded(exchange(draft.plan, costs, (middle,)), (middle,))


def line(level, label, scores, base, size, base_size):
    ppl, kld = scores.nll.mean().exp().item(), scores.kld.mean().item()
    change, gain = scores.nll - base.nll, (scores.kld - base.kld) / base.kld.mean()
    spread = lambda x: (x.std() / len(x) ** 0.5).item()
    ratio = change.mean().exp().item()
    print(f"{level:<9}{label:<20}{size:>12,}{100 * (size / base_size - 1):>+8.2f} %{ppl:>10.3f}{100 * (ratio - 1):>+8.1f} % ± {100 * ratio * spread(change):.1f}{kld:>10.4f}{100 * gain.mean().item():>+8.1f} % ± {100 * spread(gain):.1f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=sample_path())
    parser.add_argument("text", nargs="?")
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--types", nargs="+", default=["IQ1_S", "IQ2_XXS"])
    parser.add_argument("--plant", type=float)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--folder", type=Path, help="where files are kept; default: nowhere")
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.model)
    imatrix = ImportanceMatrix.load(args.imatrix) if args.imatrix else cached_imatrix(Job(checkpoint))
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if args.plant: checkpoint, imatrix = plant(checkpoint, imatrix, args.plant, folder / f"{checkpoint.name}-planted")
        ids = windows(load_tokenizer(checkpoint.path), read_text(args.text) if args.text else bundled_text("heldout"), limit=args.windows)
        original = load_float(checkpoint)
        print(f"{checkpoint.name}, {len(ids)} windows of {args.text or 'held-out text'}")
        print(f"{'type':<9}{'file':<20}{'bytes':>12}{'':>10}{'perplexity':>10}{'change':>16}{'KLD':>10}{'change':>16}")
        for level in args.types:
            files = [quantize(checkpoint, "gguf", level, imatrix=imatrix, output_dir=folder, output_name=f"{label}-{level}", protect_super_weights=label == "with") for label in ("without", "with")]
            models = [load_quantized(checkpoint, f.output_path) for f in files]
            scores = score_windows(original, models, ids)
            sizes = [f.file_size for f in files]
            del models
            line(level, "without", scores[0], scores[0], sizes[0], sizes[0])
            if args.steps:
                for label, (model, size) in steps(checkpoint, imatrix, level): line(level, label, score_windows(original, [model], ids)[0], scores[0], size, sizes[0])
            line(level, "with", scores[1], scores[0], sizes[1], sizes[0])
            found = files[1].protection
            print(f"         {found['identified']} super weights, {sum(w['pinned'] for w in found['weights'])} pinned, largest error {max(w['relative_error_before'] for w in found['weights']):.1e} -> "
                  f"{max(w['relative_error'] for w in found['weights']):.1e}; spikes x {', '.join('%.3f' % w['activation_ratio'] for w in found['weights'])}; rescaled {found['rescaled'] or 'none'}, emphasized {found['emphasized'] or 'none'}", flush=True)


if __name__ == "__main__": main()
