"""The recipes of the package's README, block by block as they stand there."""

import re
from pathlib import Path

import pytest
import timm
import torch
from ofq_models import local_dir
from transformers import ViTConfig, ViTForImageClassification

import hf_ext

README = Path(hf_ext.__file__).parent / "ofq_quantizer" / "README.md"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What the names stand for after all blocks have run, in order, and the folder they ran in."""
    folder = tmp_path_factory.mktemp("model")
    config = ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        num_labels=10,
    )
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(folder)
    names = {"folder": str(folder), "images": torch.randn(8, 3, 32, 32), "labels": torch.randint(10, (8,))}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
            exec(block, names)
    return names | {"at": folder}


@torch.no_grad()
def test_packed_and_integer_models_give_the_logits_of_the_trained_one(ran):
    trained = ran["packed"](ran["images"])
    assert torch.equal(ran["integers"](ran["images"]), trained)
    assert trained.isfinite().all() and trained.std() > 0


@torch.no_grad()
def test_the_folder_of_transformers_gives_the_same_model(ran):
    first, again = (ran[name].eval()(ran["images"]).logits for name in ("model", "again"))
    assert torch.equal(first, again)


@local_dir
def test_the_exported_checkpoint_is_an_ordinary_one(ran):
    stock = timm.create_model(f"local-dir:{ran['at'] / 'latent'}", pretrained=True)
    assert not any("quantizer" in name for name in stock.state_dict())


def test_the_report_has_every_layer(ran):
    layers = {layer.name: layer for layer in ran["summary"].layers}
    assert {"patch_embed.proj", "blocks.0.attn.qkv", "blocks.1.mlp.fc2", "head"} <= layers.keys()
    assert layers["blocks.0.attn.qkv"].w_bits == 2
    assert layers["head"].w_bits == 8


def test_annealing_and_the_tracker_ran(ran):
    assert 0.9 < ran["frozen"] < 1
    assert 0 <= ran["oscillating"] < 1
