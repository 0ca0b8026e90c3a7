"""The blocks of the package's README, as they stand there, on a random model that is made to prefer A."""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from mcq_models import tiny_model, word_tokenizer

import hf_ext

README = Path(hf_ext.__file__).parent / "mcq_bias" / "README.md"


def items(count=200):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 20, (count, 6), generator=generator).tolist()
    return [
        {"question": f"w{row[0]} w{row[1]}?", "choices": [f"w{i}" for i in row[2:]], "label": number % 4}
        for number, row in enumerate(drawn)
    ]


def anchored_model(tokenizer):
    """Its first neuron is always on, and says A."""
    model = tiny_model("gpt2", torch.float32)
    letter = tokenizer.convert_tokens_to_ids("A")
    with torch.no_grad():
        block = model.transformer.h[1].mlp
        block.c_fc.weight[:, 0], block.c_fc.bias[0] = 0, 3
        block.c_proj.weight[0] = 5 * model.lm_head.weight[letter]
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder, said, tokenizer = tmp_path_factory.mktemp("mcq"), io.StringIO(), word_tokenizer()
    names = {"tokenizer": tokenizer, "model": anchored_model(tokenizer), "items": items()}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.chdir(folder)
        for block in blocks:
            exec(block, names)
    return names | {"at": folder, "said": said.getvalue()}


def test_the_bias_is_found_located_and_gone(ran):
    assert ran["found"]["anchored_bias_rate"] > 0.9
    top = ran["where"].top(1)[0]
    assert (top.layer, top.index) == (1, 0)
    assert "output calibration" in ran["said"]
    assert ran["adapted"].mcq_bias["share_after"] < 0.5 < ran["adapted"].mcq_bias["share_before"]


def test_the_model_is_back_and_the_adapter_saved(ran):
    untouched = anchored_model(ran["tokenizer"]).state_dict()
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in ran["model"].state_dict().items())
    assert (ran["at"] / "repair" / "adapter_model.safetensors").exists()
    assert (ran["at"] / "repair" / "mcq_bias.json").exists()


def test_attention_is_evened_and_the_configuration_saved(ran):
    assert (ran["at"] / "evened" / "recalibration.json").exists()
    assert ran["positions"].shape == (len(ran["items"]), 4)
    plain = ran["score_choices"](ran["model"], ran["tokenizer"], ran["prompts"][7:8], 4, progress=False)
    assert abs(ran["evened"].scores - plain.scores).max() > 1e-6


def test_every_public_name_is_mentioned_there_or_in_the_card():
    text = README.read_text(encoding="utf-8") + (README.parent / "anchored_mcq_bias" / "README.md").read_text()
    assert not [name for name in hf_ext.mcq_bias.__all__ if name not in text]
