"""`hf-ext doctor`: what it says of a fresh interpreter, and when it calls that a problem."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from hf_ext import compat, doctor, registry


@cache  # each run starts two processes
def run_doctor(*arguments: str, **env: str) -> tuple[int, dict]:
    command = [sys.executable, "-c", "from hf_ext.cli import main; main()", "doctor", "--json", *arguments]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    return done.returncode, json.loads(done.stdout) if done.stdout.startswith("{") else {"stderr": done.stderr}


@pytest.fixture(scope="module")
def healthy() -> tuple[int, dict]:
    return run_doctor()


@pytest.mark.smoke
def test_every_host_is_registered_by_autoload(healthy):
    status, report = healthy
    assert (status, report["ok"], report["problems"]) == (0, True, [])
    assert report["channel"] == "autoload"
    assert set(report["hosts"]) == {row.host for row in registry.TABLE}
    assert all(host["state"] in ("registered", "native", "not needed") for host in report["hosts"].values())


def test_schema(healthy):
    _, report = healthy
    expected = {"ok", "problems", "channel", "python", "hf_ext", "versions", "hosts", "engines", "model"}
    assert set(report) == expected
    assert set(report["hf_ext"]) == {"version", "path", "editable"}
    assert set(report["versions"]) == set(compat.TESTED)
    assert all(set(version) == {"installed", "tested", "ok"} for version in report["versions"].values())
    assert all(set(host) == {"state", "names", "reason", "module", "version"} for host in report["hosts"].values())


def test_one_engine_is_chosen_and_the_others_say_why_not(healthy):
    _, report = healthy
    chosen = [engine for engine in report["engines"] if engine["chosen"]]
    assert len(chosen) == 1
    assert all(len(engine["reason"].split()) >= 3 for engine in report["engines"])


def test_a_forced_engine_is_reported():
    _, report = run_doctor(HF_EXT_ANCHOR_ENGINE="dense")
    assert [engine["name"] for engine in report["engines"] if engine["chosen"]] == ["dense"]


def test_an_unknown_engine_in_the_environment_is_a_problem():
    status, report = run_doctor(HF_EXT_ANCHOR_ENGINE="spda")
    assert status == 1
    assert "HF_EXT_ANCHOR_ENGINE" in report["problems"][0]
    assert "'sdpa'" in report["problems"][0]


def test_switching_our_autoload_off_is_the_users_wish():
    status, report = run_doctor(HF_EXT_AUTOLOAD="0")
    assert (status, report["channel"]) == (0, "off")
    assert {host["state"] for host in report["hosts"].values()} == {"off"}


def test_torchs_own_switch_is_a_problem_with_its_cure():
    status, report = run_doctor(TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert (status, report["channel"]) == (1, "off")
    assert any("TORCH_DEVICE_BACKEND_AUTOLOAD" in text and "hf_ext.run" in text for text in report["problems"])


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch loads torchvision's operators")
def test_torchvision_beside_a_cpu_build_of_torch_is_named_with_its_cure():
    pytest.importorskip("torchvision")
    _, report = run_doctor(TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    problem = next(text for text in report["problems"] if "torchvision::nms" in text)
    assert "`import hf_ext` first cures it" in problem
    _, wished = run_doctor(HF_EXT_AUTOLOAD="0")
    assert "`import hf_ext` cures it" in wished["hosts"]["torchvision"]["reason"]


def test_an_untested_version_is_a_problem(monkeypatch):
    monkeypatch.setitem(compat.TESTED, "timm", ">=900")
    problems = doctor.examine()["problems"]
    assert any("timm" in text and "untested" in text and "pip install" in text for text in problems)


def test_an_absent_library_is_none(monkeypatch):
    monkeypatch.setattr(compat.metadata, "version", _absent)
    assert compat.supported("timm") == (None, compat.TESTED["timm"], True)


def _absent(name: str) -> str:
    raise compat.metadata.PackageNotFoundError(name)


def test_a_failed_registration_is_named_with_host_cause_and_version(tmp_path):
    """A stranger's plugin took our name: both are named, and the exit status is 1."""
    plugin = tmp_path / "sitecustomize.py"
    plugin.write_text(
        "import builtins, sys\n"
        "real = builtins.__import__\n"
        "def spy(name, *rest, **kw):\n"
        "    module = real(name, *rest, **kw)\n"
        "    masking = sys.modules.get('transformers.masking_utils')\n"
        "    if masking is not None and hasattr(masking, 'AttentionMaskInterface'):\n"
        "        masking.AttentionMaskInterface._global_mapping.setdefault('anchor', spy)\n"
        "    return module\n"
        "builtins.__import__ = spy\n"
    )
    status, report = run_doctor(PYTHONPATH=str(tmp_path))
    assert status == 1
    assert report["hosts"]["transformers"]["state"] == "failed"
    problem = next(text for text in report["problems"] if "transformers" in text)
    assert "'anchor'" in problem
    assert str(plugin) in problem
    assert "HF_EXT_DEBUG=1" in problem
    assert "mcq_recalibrated" in problem
    assert len([text for text in report["problems"] if "could not add" in text]) == 1


READS = compat.reads_attention_from_config()
QUANT_METHOD = "quantization_config.quant_method"


@pytest.mark.parametrize(
    ("config", "effective", "reason"),
    [
        ({"model_type": "llama", "attn_implementation": "anchor"}, READS, None),
        ({"model_type": "llama", "attn_implementation": "anchor_continuous"}, READS, None),
        ({"model_type": "llama", "attn_implementation": "mcq_recalibrated"}, READS, None),
        ({"model_type": "llama", "attn_implementation": "sdpa"}, False, "not a name"),
        ({"model_type": "llama", "attn_implementation": "anchr"}, False, "did you mean 'anchor'?"),
        ({"model_type": "bloom", "attn_implementation": "anchor"}, False, "table of attention functions"),
        ({"model_type": "mamba", "attn_implementation": "anchor"}, False, "mix"),
        ({"model_type": "nothing", "attn_implementation": "anchor"}, False, "no causal language model"),
    ],
    ids=[
        "ours",
        "ours for loops",
        "recalibrated",
        "a stock name",
        "misspelt",
        "no attention function",
        "recurrent",
        "unknown type",
    ],
)
def test_model_folder(tmp_path, config, effective, reason):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (string,) = doctor.examine_model(tmp_path, "autoload")["strings"]
    assert string["value"] == config["attn_implementation"]
    assert string["effective"] is effective
    if reason and (READS or string["value"] != "anchor"):
        assert reason in string["reason"]


def test_a_name_of_ours_without_effect_is_a_problem(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "attn_implementation": "anchor"}')
    status, report = run_doctor("--model", str(tmp_path))
    assert status == 1
    assert "has no effect" in report["problems"][-1]


def test_the_key_is_found_in_the_parts_of_a_composite_model(tmp_path):
    config = {"model_type": "llava", "text_config": {"model_type": "llama", "attn_implementation": "anchr"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (string,) = doctor.examine_model(tmp_path, "autoload")["strings"]
    assert string["key"] == "text_config.attn_implementation"


def test_the_key_may_name_an_attention_a_part(tmp_path):
    config = {"model_type": "llava", "attn_implementation": {"text_config": "anchor", "vision_config": "sdpa"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    strings = doctor.examine_model(tmp_path, "autoload")["strings"]
    names = {string["key"]: string["value"] for string in strings}
    assert names == {"attn_implementation.text_config": "anchor", "attn_implementation.vision_config": "sdpa"}


@pytest.mark.parametrize(
    ("file", "config", "text"),
    [
        ("adapter_config.json", {"peft_type": "BONE", "init_weights": "batt"}, "did you mean 'bat'?"),
        ("adapter_config.json", {"peft_type": "BONE", "r": -8}, "r: found -8"),
        (
            "adapter_config.json",
            {"peft_type": "BONE", "target_module": ["q"]},
            "target_modules, which it seems to mean",
        ),
        ("config.json", {"quantization_config": {"quant_method": "ofq", "w_bit": 2}}, "did you mean 'w_bits'?"),
        ("config.json", {"quantization_config": {"quant_method": "ofq", "w_bits": 5}}, "w_bits=5 is none of 2, 3, 4"),
    ],
)
def test_options_that_loading_will_refuse_are_told(tmp_path, file, config, text):
    (tmp_path / file).write_text(json.dumps(config))
    (string,) = doctor.examine_model(tmp_path, "autoload")["strings"]
    assert not string["effective"]
    assert text in string["reason"]


@pytest.mark.parametrize(
    ("file", "config", "key", "channel", "reason"),
    [
        ("adapter_config.json", {"peft_type": "BONE"}, "peft_type", "autoload", None),
        ("adapter_config.json", {"peft_type": "BONES"}, "peft_type", "autoload", "did you mean 'BONE'?"),
        ("adapter_config.json", {"peft_type": "LORA"}, "peft_type", "autoload", "not a name"),
        ("config.json", {"quantization_config": {"quant_method": "ofq"}}, QUANT_METHOD, "autoload", None),
        ("config.json", {"quantization_config": {"quant_method": "ofq"}}, QUANT_METHOD, "off", "autoload is off"),
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, QUANT_METHOD, "autoload", "not a name"),
    ],
    ids=["BONE", "misspelt", "LoRA", "ofq", "ofq without autoload", "gptq"],
)
def test_strings_of_adapters_and_quantisation(tmp_path, file, config, key, channel, reason):
    (tmp_path / file).write_text(json.dumps(config))
    (string,) = doctor.examine_model(tmp_path, channel)["strings"]
    assert (string["file"], string["key"], string["effective"]) == (file, key, reason is None)
    assert (reason or "") in (string["reason"] or "")


@pytest.mark.parametrize("native", [True, False], ids=["their Bone", "our Bone"])
def test_the_row_form_is_a_problem_where_peft_has_a_bone_of_its_own(tmp_path, monkeypatch, native):
    monkeypatch.setattr(compat, "has_native_bone", lambda: native)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "BONE", "init_weights": "bat_row"}')
    (string,) = doctor.examine_model(tmp_path, "autoload")["strings"]
    assert string["effective"] is not native
    assert ("trains the tile form; install peft>=0.19" in (string["reason"] or "")) is native


def test_model_folder_without_a_string_of_ours(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert doctor.examine_model(tmp_path, "autoload")["strings"] == []


@pytest.mark.parametrize(("content", "text"), [(None, "no config.json"), ("{", "not JSON"), ("[1]", "not an object")])
def test_a_useless_model_folder_is_refused(tmp_path, content, text):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=text):
        doctor.examine_model(Path(tmp_path), "autoload")


def test_peft_too_old_for_this_transformers(monkeypatch):
    real = compat.supported
    monkeypatch.setattr(compat, "supported", lambda name: ("0.17.0", "", True) if name == "peft" else real(name))
    problems = compat.pair_problems()
    if not problems:
        pytest.skip("this transformers asks for no particular peft")
    assert "0.17.0" in problems[0]
    assert "pip install" in problems[0]


def test_brackets_in_names_are_printed_as_they_are(tmp_path):
    """rich would take them for markup."""
    folder = tmp_path / "m[/x]"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"attn_implementation": "anchr"}')
    command = [sys.executable, "-c", "from hf_ext.cli import main; main()", "doctor", "--model", str(folder)]
    done = subprocess.run(command, env=os.environ | {"COLUMNS": "300"}, capture_output=True, text=True)
    assert done.returncode == 1
    assert str(folder) in done.stdout
