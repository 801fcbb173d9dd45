"The profile verbs: what cannot be written is refused before anything is measured, and like any other failure."
import pytest

from llm_quantize.cli import profile as profile_verbs
from llm_quantize.errors import LLMQuantizeError, ProfileError
from llm_quantize.gguf.profiles import Profile, Target


@pytest.mark.parametrize("options", [dict(name="a/b"), dict(name="far", out="nowhere/far.dqprofile")], ids=["name", "directory"])
def test_create_refuses_a_place_before_it_measures(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = options.get("out")
    with pytest.raises(ProfileError, match="cannot be the name|no directory"): # and not that there is neither matrix nor model
        profile_verbs.profile_create(tmp_path / "s.imatrix", options["name"], out=tmp_path / out if out else None, model="any")


def test_export_to_a_place_that_is_not_there_is_foreseen(tmp_path):
    profile = Profile("p", Target(3.0, "file"), tensors={"blk.0.attn_q.weight": "Q4_K"}).save(tmp_path / "p.dqprofile")
    with pytest.raises(LLMQuantizeError, match="cannot be written"):
        profile_verbs.profile_export(str(profile), llama_cpp=True, out=tmp_path / "nowhere" / "types.txt")
    profile_verbs.profile_export(str(profile), llama_cpp=True, out=tmp_path / "types.txt")
    assert (tmp_path / "types.txt").read_text() == "^blk\\.0\\.attn_q\\.weight$=q4_k\n"
