"""The tutorial of CONTRIBUTING.md, followed to the letter in a copy of the package."""

import re
from pathlib import Path
from textwrap import indent

import pytest
from processes import copy_package, run, run_python

ROOT = Path(__file__).parent.parent
USE = """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="softcap")
    model(input_ids=torch.tensor([[1, 2, 3]]))
"""


@pytest.fixture(scope="module")
def sixth(tmp_path_factory):
    """(folder with the package and the test of the tutorial, environment that prefers it)."""
    folder = tmp_path_factory.mktemp("sixth")
    env = copy_package(folder)
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tutorial = text[text.index("## A sixth method") :]
    written = []
    for said, code in re.findall(r"\n\n((?:(?!\n\n|```)[\s\S])+?)\n\n```python\n([\s\S]*?)```", tutorial):
        name = re.findall(r"`((?:hf_ext|tests)/[\w/]+\.py)`", said)[0]
        path = folder / name
        if name == "hf_ext/registry.py":
            table = path.read_text(encoding="utf-8")
            end = table.index("\n)\n", table.index("TABLE = ("))
            row = indent(f"{code.rstrip()},\n", "    ")
            path.write_text(table[: end + 1] + row + table[end + 1 :], encoding="utf-8")
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(code, encoding="utf-8")
        written.append(name)
    assert len(written) == 6
    return folder, env


def test_the_string_works_where_nobody_imported_us(sixth):
    folder, env = sixth
    done = run_python(USE, env=env | {"HF_EXT_DEBUG": "1"}, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "hf_ext: using softcap (" in done.stderr


def test_its_own_test_passes_and_can_fail(sixth):
    folder, env = sixth
    test = folder / "tests/test_softcap_attention.py"
    arguments = ("-m", "pytest", "-v", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", test)
    done = run(*arguments, env=env, cwd=folder)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
    reference = folder / "hf_ext/softcap_attention/reference.py"
    text = reference.read_text()
    reference.write_text(text.replace("logits = logits + mask", "pass"))
    try:
        assert "1 failed" in run(*arguments, env=env, cwd=folder).stdout
    finally:
        reference.write_text(text)


def test_it_is_taken_out_again(sixth):
    folder, env = sixth
    code = """
        import hf_ext
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
        tables = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
        assert all("softcap" in table for table in tables)
        hf_ext.unregister()
        assert not any("softcap" in table for table in tables)
    """
    done = run_python(code, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr
