"Profiles: files that are whole or refused, found by name, shown, and exported."
import json
import logging

import pytest

from llm_quantize.errors import ArgumentError, ProfileError
from llm_quantize.gguf.allocation import Rule
from llm_quantize.gguf.profiles import PRESETS, Profile, Target, facts_of, list_profiles, make_target, target_of, type_map
from llm_quantize.gguf.resolution import make_plan
from llm_quantize.gguf.tensor_rules import why_f32
from llm_quantize.models.checkpoint import sample_path
from llm_quantize.models.job import Job


@pytest.fixture(scope="module")
def specs(): return [(t.name, t.shape) for t in Job(sample_path()).tensors.values()]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_QUANTIZE_PROFILE_DIR", str(tmp_path / "profiles"))
    (tmp_path / "profiles").mkdir()
    return tmp_path / "profiles"


def test_one_target_at_a_time():
    assert make_target() is None and make_target(3.0).of == "file" and make_target(target_size=2e9).value == 2e9
    for arguments in ((3, 1e9), (0, None), (-1, None), (float("nan"), None)):
        with pytest.raises(ArgumentError): make_target(*arguments)


def test_sizes_as_they_are_written():
    assert target_of() is None and target_of(3.0) == Target(3.0, "file")
    for text, size in ((1.5, 1.5e9), ("1.5", 1.5e9), (2, 2e9), ("500M", 500e6), ("0.002", 2e6)):
        assert target_of(None, text) == Target(size, "bytes"), text
    for text in ("much", "-1", "0", "nan"):
        with pytest.raises(ArgumentError): target_of(None, text)
    with pytest.raises(ArgumentError, match="both given"): target_of(3.0, "500M")


def full(specs): return Profile("mine", Target(3.1, "file"), "ünï", (Rule("attn_v", least="Q6_K"),), False, facts_of("llama", specs), {n: "IQ3_XXS" for n, s in specs if not why_f32(n, s)})


def test_files_come_back_as_they_were(specs, tmp_path, own_folder):
    profile = full(specs)
    path = profile.save(tmp_path / "m.dqprofile")
    assert Profile.load(path).to_dict() == profile.to_dict() and Profile.load(str(path)) == Profile.load(path)
    profile.save(own_folder / "mine.dqprofile")
    assert Profile.load("mine").name == "mine"
    assert [p.name for p, _ in list_profiles()] == [*PRESETS, "mine"]
    with pytest.raises(ProfileError, match="cannot write"): profile.save(tmp_path / "nowhere" / "x.dqprofile")


def test_a_damaged_file_in_the_folder_is_named_and_left_out(own_folder, caplog):
    (own_folder / "bad.dqprofile").write_text("{")
    with caplog.at_level(logging.WARNING): assert [p.name for p, _ in list_profiles()] == list(PRESETS)
    assert "bad.dqprofile" in caplog.text


@pytest.mark.parametrize("change", [
    {"version": 2}, {"name": None}, {"target": None}, {"target": {"value": "3", "of": "file"}}, {"target": {"value": 3, "of": "moon"}}, {"target": {"value": 3}},
    {"target": {"value": True, "of": "file"}}, {"rules": {}}, {"rules": [3]}, {"rules": [{"type": "Q4_K"}]}, {"rules": [{"pattern": "(", "type": "Q4_K"}]},
    {"rules": [{"pattern": "x", "kind": 1}]}, {"tensors": {"a": "Q4_X"}}, {"tensors": {"a": 4}}, {"tensors": []}, {"floors": "no"}, {"surprise": 1}], ids=str)
def test_what_makes_no_sense_is_refused_with_exit_code_13(specs, tmp_path, change):
    data = {**full(specs).to_dict(), **change}
    path = tmp_path / "x.dqprofile"
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
    with pytest.raises(ProfileError) as caught: Profile.load(path)
    assert caught.value.exit_code == 13 and str(path) in str(caught.value)


@pytest.mark.parametrize("name, hint", [("blanced", "balanced"), ("./none.dqprofile", "list"), ("zzzzzz", "compression-max")])
def test_unknown_names_get_a_hint(name, hint):
    with pytest.raises(ProfileError) as caught: Profile.load(name)
    assert hint in caught.value.suggestion
    with pytest.raises(ProfileError): PRESETS["balanced"].llama_cpp()


def test_binary_and_directories_are_refused(tmp_path):
    (tmp_path / "b.dqprofile").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "d.dqprofile").mkdir()
    for name in ("b", "d"):
        with pytest.raises(ProfileError): Profile.load(tmp_path / f"{name}.dqprofile")


def test_the_map_has_a_row_for_each_block(specs):
    rows = type_map(make_plan(full(specs).tensors, specs))
    assert rows[0][0] == "block" and len(rows) == 1 + 4 + 1 and all(len(row) == len(rows[0]) for row in rows)


def test_lines_for_llama_quantize(specs):
    lines = full(specs).llama_cpp().splitlines()
    assert len(lines) == 29 and lines[0] == r"^token_embd\.weight$=iq3_xxs"
