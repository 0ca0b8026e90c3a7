"""The recipes of the package's README, block by block as they stand there."""

import re
from pathlib import Path

import pytest
import torch
from bone_native import OURS
from datasets import Dataset
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import hf_ext

README = Path(hf_ext.__file__).parent / "bone_adapter" / "README.md"
pytestmark = OURS


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What the names stand for after all blocks have run, in order, and the folder they ran in."""
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    ids = torch.randint(1, 32, (8, 6)).tolist()
    names = {"folder": str(folder), "rows": Dataset.from_dict({"input_ids": ids, "labels": ids})}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
            exec(block, names)
    return names | {"at": folder}


def test_every_way_of_loading_gives_the_same(ran):
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = ran["merged"](ids).logits
        for name in ("same", "too"):
            assert torch.allclose(ran[name](ids).logits, expected, atol=1e-6)


def test_the_report_says_what_was_trained(ran):
    report = ran["report"]
    assert (report.form, report.r, report.checked_against_base) == ("tile", 8, True)
    assert report.parameters == 8 * (4 * 16 + 2 * 24 + 16)


def test_the_way_to_miss_and_back_changes_nothing(ran):
    first, again = (load_file(ran["at"] / name / "adapter_model.safetensors") for name in ("adapter", "bone-again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_mean_of_an_adapter_with_itself_is_that_adapter(ran):
    layer = ran["model"].base_model.model.model.layers[0].mlp.down_proj
    assert torch.allclose(layer.bone_block["mean"], layer.bone_block["first"])
