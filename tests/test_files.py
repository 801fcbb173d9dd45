"No verb writes over a file that it reads, nor over a file of a model: exit 2, and the file is what it was."
import hashlib
import os
import shutil

import pytest

from llm_quantize.cli.main import main
from llm_quantize.errors import ArgumentError
from llm_quantize.files import refuse_inputs


@pytest.fixture(scope="module")
def made(sample_model, root, tmp_path_factory):
    "A folder with a model, a GGUF of it, a text, an imatrix and a profile; verbs run in it."
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(sample_model, folder / "m")
    shutil.copyfile(root / "tests" / "data" / "sample-4m-llama.imatrix.gguf", folder / "m.gguf-imatrix")
    shutil.copyfile(folder / "m.gguf-imatrix", folder / "matrix.gguf")
    (folder / "text.csv").write_text("A text of some words. " * 600, encoding="utf-8")
    os.symlink(folder / "m" / "config.json", folder / "link.json")
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert main(["quantize", "m", "-q", "Q8_0"]) == 0
        yield folder
    finally: os.chdir(before)


def digests(folder): return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


OVER = [
    "analyze m -o m/model.safetensors --calibration-samples 1",
    "analyze m -o m/tokenizer.json --calibration-samples 1",
    "analyze m --calibration-data text.csv --calibration-samples 1 -o text.csv",
    "quality report m m-Q8_0.gguf -o m/config.json --calibration-samples 1",
    "quality report m m-Q8_0.gguf -o link.json --calibration-samples 1",
    "quality compare m m-Q8_0.gguf --calibration-data text.csv -o text.csv --calibration-samples 1",
    "profile create --imatrix matrix.gguf --name p -o m/tokenizer.json",
    "profile create --imatrix m.gguf-imatrix --name p -o m.gguf-imatrix",
    "quantize m -q IQ2_XXS --imatrix matrix.gguf -n matrix.gguf",
    "quantize m -q IQ2_XXS --calibration-data text.csv --imatrix matrix.gguf -n ./matrix",
]


@pytest.mark.parametrize("line", OVER)
def test_what_is_read_is_not_written_over(made, capsys, line):
    before = digests(made)
    assert main(line.split()) == 2
    assert digests(made) == before
    assert "written over" in (said := capsys.readouterr().err) or "contains a directory" in said


def test_what_was_made_here_may_be_made_again(made):
    for _ in range(2):
        assert main("profile create --imatrix matrix.gguf --name p -o p.dqprofile".split()) == 0
        assert main("quantize m -q Q8_0 -o m".split()) == 0


def test_a_new_file_beside_a_model_is_no_file_of_it(made):
    assert refuse_inputs(made / "m" / "new-report.json", made / "m").name == "new-report.json"
    with pytest.raises(ArgumentError, match="file of a model"): refuse_inputs(made / "m" / "config.json")
    with pytest.raises(ArgumentError, match="is read by this run"): refuse_inputs(made / "text.csv", made / "text.csv")
