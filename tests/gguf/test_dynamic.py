"Dynamic quantization the whole way: kills and resumes give the same bytes, sizes are kept, the file runs in llama.cpp."
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

from llm_quantize.models.checkpoint import sample_path
from llm_quantize.quality.llama_cpp_model import open_llama

RUN = """
import sys
from dataclasses import replace
from llm_quantize.calibration.effort import EFFORTS
from llm_quantize.cli.main import main
EFFORTS["quick"] = replace(EFFORTS["quick"], curvature=2, rows=16, selection=1, anchors=1, trials=3)
sys.exit(main(["--format", "json", "quantize", sys.argv[1], "gguf", "-q", "dynamic", "--effort", "quick", "--target-bpw", "4.0", "--calibration-samples", "4", "-o", sys.argv[2], *sys.argv[3:]]))
"""


def command(folder, *more): return [sys.executable, "-c", RUN, str(sample_path()), str(folder), "--checkpoint-dir", str(folder / "state"), *more]


def environment(folder): return {**os.environ, "LLM_QUANTIZE_CACHE": str(folder / "cache"), "LLM_QUANTIZE_IMATRIX_CACHE": str(folder / "cache")}


def measured(folder):
    "How many costs a run has measured and saved so far."
    files = list((folder / "cache").glob("*.sensitivity.json")) if (folder / "cache").exists() else []
    return sum(len(t["measured"]) for t in json.loads(files[0].read_text())["tensors"]) if files else 0


def test_killed_and_resumed_gives_the_same_bytes(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = json.loads(subprocess.run(command(whole), env=environment(whole), check=True, capture_output=True, text=True).stdout)
    process = subprocess.Popen(command(broken), env=environment(broken), stdout=subprocess.DEVNULL)
    while not measured(broken) and process.poll() is None: time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < measured(broken) < measured(whole) and not list(broken.glob("*.gguf"))
    subprocess.run(command(broken, "--resume", str(broken / "state")), env=environment(broken), check=True, capture_output=True)
    one, other = (hashlib.sha256((folder / "sample-4m-dynamic.gguf").read_bytes()).hexdigest() for folder in (whole, broken))
    assert one == other
    assert 3.98 <= result["effective_bpw"] <= 4.0 and len({t["type"] for t in result["tensors"]}) > 3
    model = open_llama(whole / "sample-4m-dynamic.gguf", n_ctx=128, seed=0)
    assert model.create_completion("The history of", max_tokens=8, temperature=0)["choices"][0]["text"]
