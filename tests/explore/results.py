"Results that look real and cost nothing to make, for the explorers that a browser shall open."
import math

import numpy as np
import torch

from llm_quantize.explore.views import explore_allocation, explore_importance, explore_quality
from llm_quantize.calibration.imatrix import ImportanceMatrix
from llm_quantize.quality.report import SHARES, Metrics, QualityReport
from llm_quantize.quants.qtypes import qtype
from llm_quantize.calibration.sensitivity import CANDIDATES, Sensitivity, TensorCosts
from llm_quantize.calibration.super_weights import SuperWeight, SuperWeights
from llm_quantize.explore.token_view import ReadToken, TokenView

KINDS = {"attn_q": (256, 256), "attn_v": (256, 256), "ffn_up": (512, 256), "ffn_down": (256, 512)}
NAMES = [f"blk.{block}.{kind}.weight" for block in range(3) for kind in KINDS]


def shape(name): return KINDS[name.split(".")[2]]


def matrix(seed):
    draw = np.random.default_rng(seed)
    sums = {name: torch.from_numpy(draw.lognormal(k / 4, 1, (1, shape(name)[1])) * 512) for k, name in enumerate(NAMES)}
    return ImportanceMatrix(sums, {name: torch.full((1,), 512.0, dtype=torch.float64) for name in NAMES}, ("a text",), 1)


def importance():
    weight = SuperWeight("blk.1.ffn_down.weight", 7, 300, -1.5, "model.layers.1.mlp.down_proj.weight", 1, None, 3, 80.0, -120.0, 60.0, 90.0, 0.99)
    return explore_importance(matrix(1), matrix(2), SuperWeights((weight,)), names=("prose", "code"))


def allocation():
    costs = [TensorCosts(name, shape(name), {t: (1 + k) * 4 ** -qtype(t).bpw for t in CANDIDATES}) for k, name in enumerate(NAMES)]
    return explore_allocation(Sensitivity("a model", {}, tuple(costs)))


def report(name, bpw):
    kld = 4 ** -bpw * 10
    values = dict.fromkeys(Metrics.__dataclass_fields__, 0.1) | {key: kld * (share / 50) ** 2 for share, key in SHARES.items()}
    values |= {"kld_mean": kld, "file_size": int(1e6 * bpw), "effective_bpw": bpw, "tokens": 510, "windows": 2}
    errors = tuple({"layer_name": n, "output_error": kld * (1 + k), "relative_error": kld / (1 + k), "max_error": 0.1, "type": "Q4_K", "bit_width": bpw} for k, n in enumerate(NAMES))
    return QualityReport("a model", name, Metrics(**values), errors, None, "float32", "2026-01-01T00:00:00+00:00")


def view(name, far):
    tokens = [ReadToken(text, far * (k % 4) / 4, 0.4, 0.3, ((" the", 0.5), (" a", 0.2)), ((" a" if k % 4 == 3 else " the", 0.4), (" an", math.exp(-2)))) for k, text in enumerate([" river", " rose", " <b>&", " night"] * 4)]
    return TokenView(f"{name}.gguf", "The", tuple(tokens))


def quality(): return explore_quality([report(f"{name}.gguf", bpw) for name, bpw in (("Q8_0", 8.5), ("Q4_K_M", 4.8), ("Q2_K", 2.6))], (view("Q4_K_M", 0.2), view("Q2_K", 2.0)))


EXPLORERS = {"importance": importance, "allocation": allocation, "quality": quality}
