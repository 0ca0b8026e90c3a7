"""The strings of timm: `ofq_w2a2.<architecture>` in create_model, checkpoints, averages and optimisers."""

import copy
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from ofq_models import FAMILIES, VIT, build, images, local_dir
from processes import answer, run_python
from timm.models import load_checkpoint, resume_checkpoint
from timm.models._hub import save_for_hf
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from hf_ext import compat
from hf_ext.ofq_quantizer import (
    OFQConfig,
    activation_quantizers,
    calibrate,
    load_packed,
    quantize,
    save_packed,
)
from hf_ext.ofq_quantizer.timm_models import entry_points

VIT_NAME = FAMILIES["vit"][0]
RECIPES = [f"ofq_w{w}a{a}{end}" for w in (2, 3, 4) for a in (2, 3, 4, 8) for end in ("", "_qkr")]


def create(recipe: str = "ofq_w2a2", architecture: str = VIT_NAME, **kwargs: Any) -> nn.Module:
    return timm.create_model(f"{recipe}.{architecture}", **VIT | kwargs).eval()


def calibrated(model: nn.Module) -> nn.Module:
    return calibrate(model, [images(model, 4)])


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], but: tuple[str, ...] = ()) -> None:
    assert one.keys() == other.keys()
    for name in one.keys() - set(but):
        assert torch.equal(one[name], other[name]), name


# --- the strings


@pytest.mark.smoke
def test_the_strings_are_in_the_table_of_timm():
    assert set(timm.list_models("ofq_*")) == set(RECIPES)
    assert not timm.list_pretrained("ofq_*")
    for recipe in RECIPES:
        assert timm.is_model(recipe)
        assert timm.models.model_entrypoint(recipe).__name__ == recipe


@pytest.mark.skipif(not hasattr(timm.models, "resolve_model_input_args"), reason="timm's scripts do not use it yet")
def test_what_scripts_resolve_beforehand_is_the_architecture_under_the_recipe():
    """As train.py and validate.py have it: `--input-size 3 32 32` of a model of one size."""
    asked = {"args": {"input_size": [3, 32, 32]}, "num_classes": 7, "patch_size": 8, "depth": 1}
    resolved = timm.models.resolve_model_input_args(f"ofq_w2a2.{VIT_NAME}", **asked)
    stock = timm.models.resolve_model_input_args(VIT_NAME, **asked)
    assert {name: resolved[name] for name in stock if name not in ("model_name", "pretrained_cfg")} == {
        name: value for name, value in stock.items() if name not in ("model_name", "pretrained_cfg")
    }
    model, base = timm.create_model(**resolved), timm.create_model(**stock)
    assert activation_quantizers(model)
    assert (model.patch_embed.img_size, model.num_classes) == (base.patch_embed.img_size, 7)
    for key in ("mean", "std", "input_size", "crop_pct"):
        assert model.pretrained_cfg[key] == base.pretrained_cfg[key], key
    overlaid = timm.models.resolve_model_input_args(f"ofq_w2a2.{VIT_NAME}", pretrained_cfg_overlay={"crop_pct": 0.5})
    assert timm.create_model(**overlaid).pretrained_cfg["crop_pct"] == 0.5
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.models.resolve_model_input_args("ofq_w2a2.vit_tny")


@pytest.mark.skipif(not hasattr(timm.models, "resolve_model_input_args"), reason="timm's scripts do not use it yet")
def test_the_function_of_the_scripts_is_put_back():
    ours = timm.models.resolve_model_input_args
    compat.remove_timm_models(entry_points())
    try:
        assert timm.models.resolve_model_input_args is ours.__wrapped__
    finally:
        compat.add_timm_models(entry_points())
    assert timm.models.resolve_model_input_args.__wrapped__ is ours.__wrapped__


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_string_says_its_bits(recipe):
    model = create(recipe, depth=1)
    roles = activation_quantizers(model)
    w, a = int(recipe[5]), int(recipe[7])
    assert {quantizer.bits for role, quantizer in roles.items() if role.startswith("blocks.")} == {a}
    assert ("blocks.0.attn:qkx" in roles) == recipe.endswith("_qkr")
    expected = quantize(timm.create_model(VIT_NAME, **VIT | {"depth": 1}), OFQConfig(w, a, recipe.endswith("_qkr")))
    expected.load_state_dict(model.state_dict())
    x = images(model)
    assert torch.equal(logits(model, x), logits(expected, x))


@pytest.mark.smoke
@pytest.mark.parametrize(
    "family", ["vit", "deit_distilled", "deit3", "dinov2", "siglip", "swin", "beit", "eva02", "swinv2"]
)
def test_every_family_by_its_string(family):
    architecture, sizes = FAMILIES[family]
    model = timm.create_model(f"ofq_w2a2.{architecture}", **sizes)
    logits = model.train()(images(model))
    assert (logits[0] if isinstance(logits, tuple) else logits).shape == (2, 10)
    assert all(quantizer.initialized for quantizer in activation_quantizers(model).values())


@pytest.mark.smoke
def test_every_keyword_goes_on():
    model = create(in_chans=1, num_classes=7, global_pool="avg", drop_path_rate=0.1, qkv_bias=False)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert model.global_pool == "avg" and model.blocks[1].drop_path1.drop_prob == pytest.approx(0.1)
    assert model.blocks[0].attn.qkv.bias is None
    assert create(num_classes=0)(images(model)[:, :, :32, :32]).shape == (2, 48)
    with pytest.raises(TypeError, match="no_such_keyword"):
        create(no_such_keyword=1)


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_a_backbone_that_gives_features(family):
    architecture, sizes = FAMILIES[family]
    sizes = {name: value for name, value in sizes.items() if name != "num_classes"}
    features = {"features_only": True, "out_indices": (0, 1)}
    model = timm.create_model(f"ofq_w2a2.{architecture}", **sizes, **features)
    stock = timm.create_model(architecture, **sizes, **features)
    x = torch.randn(2, 3, 32, 32)
    assert [y.shape for y in model.train()(x)] == [y.shape for y in stock(x)]
    if family == "vit":
        with pytest.raises(ValueError, match="dynamic_img_size"):
            timm.create_model(f"ofq_w2a2.{architecture}", dynamic_img_size=True, **sizes, **features)
    assert sum(role.endswith(":probs") for role in activation_quantizers(model)) == (4 if family == "swin" else 2)


def test_tags_are_those_of_the_base():
    model = timm.create_model(f"ofq_w2a2.{VIT_NAME}.augreg_in21k", img_size=32, embed_dim=12, num_heads=3, depth=1)
    assert model.num_classes == 21843
    assert model.pretrained_cfg["num_classes"] == 21843
    for tag, error in (("augreg_in22k", "augreg_in22k"),):
        with pytest.raises(RuntimeError, match=error):
            create(architecture=f"{VIT_NAME}.{tag}")
    stock = timm.create_model(VIT_NAME, **VIT)
    ours = create()
    for key in ("mean", "std", "interpolation", "crop_pct", "input_size", "first_conv", "classifier"):
        assert ours.pretrained_cfg[key] == stock.pretrained_cfg[key], key


def test_options():
    model = create(ofq={"activation_scale": "tensor", "skip_modules": ["head"], "w_bits": 2})
    assert len(activation_quantizers(model)["blocks.0.attn:q"].scale) == 1
    assert type(model.head) is nn.Linear
    for options, message in (
        ({"w_bits": 3}, "ofq_w2a2 .*w_bits=2.*3"),
        ({"a_bits": 8}, "ofq_w2a2 .*a_bits=2.*8"),
        ({"qk_reparam": True}, "ofq_w2a2 .*qk_reparam=False.*True"),
        ({"wbits": 2}, "'wbits'.*'w_bits'"),
        ({"boundary_bits": 4}, "boundary_bits=4"),
    ):
        with pytest.raises(ValueError, match=message):
            create(ofq=options)


@pytest.mark.smoke
def test_names_that_lack_an_architecture_or_have_an_unknown_one():
    for name in ("ofq_w2a2", "ofq_w2a2."):
        with pytest.raises(ValueError, match=r"ofq_w2a2\.<timm architecture>"):
            timm.create_model(name)
    with pytest.raises(RuntimeError, match=r"Unknown model \(vit_tny_patch16_224\)"):
        timm.create_model("ofq_w2a2.vit_tny_patch16_224")
    with pytest.raises(ValueError, match="attention"):
        timm.create_model("ofq_w2a2.resnet10t")
    with pytest.raises((RuntimeError, ValueError)):
        timm.create_model("ofq_w2a2.ofq_w2a2.vit_tiny_patch16_224", **VIT)


# --- weights


@pytest.fixture
def weights(tmp_path: Path) -> tuple[nn.Module, str]:
    """A full-precision model and the file of its weights."""
    stock = build("vit", seed=3)
    torch.save(stock.state_dict(), tmp_path / "stock.pth")
    return stock, str(tmp_path / "stock.pth")


@pytest.mark.smoke
@pytest.mark.parametrize("recipe", ["ofq_w2a2", "ofq_w4a4_qkr"])
def test_pretrained_loads_the_weights_of_the_base_and_converts_them(weights, recipe):
    stock, file = weights
    overlay = {"file": file, "num_classes": 10, "custom_load": False}
    model = create(recipe, pretrained=True, pretrained_cfg_overlay=overlay)
    expected = quantize(copy.deepcopy(stock), OFQConfig(int(recipe[5]), int(recipe[7]), recipe.endswith("_qkr")))
    assert_same(model.state_dict(), expected.state_dict())
    other = create(recipe, pretrained=True, num_classes=7, pretrained_cfg_overlay=overlay)
    found = other.state_dict()
    assert found["head.weight"].shape == (7, 48) and found["head.weight_scale_norm"].shape == (7,)
    for name, value in stock.state_dict().items():
        assert name.startswith("head.") or torch.equal(found[name], value), name


def test_checkpoints_of_both_kinds_by_path(weights, tmp_path):
    stock, file = weights
    model = create(checkpoint_path=file)
    assert_same(model.state_dict(), quantize(copy.deepcopy(stock), OFQConfig()).state_dict())
    torch.save(calibrated(model).state_dict(), tmp_path / "ours.pth")
    again = create(checkpoint_path=str(tmp_path / "ours.pth"))
    assert torch.equal(logits(again, images(model)), logits(model, images(model)))
    load_checkpoint(other := create(), str(tmp_path / "ours.pth"))
    assert_same(other.state_dict(), model.state_dict())


SAVED = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def test_arguments_are_recorded_where_timm_does_not(tmp_path, monkeypatch):
    """Those that JSON knows, so that a packed model can be packed again."""
    monkeypatch.setattr(compat.timm, "_records_args", lambda: False)
    model = compat.create_timm_model(VIT_NAME, False, **VIT, act_layer=nn.GELU, drop_path_rate=0.1)
    quantize(model, OFQConfig())
    assert compat.timm_model_args(model) == VIT | {"num_classes": 10, "in_chans": 3, "img_size": [32, 32]}
    x = images(calibrated(model))
    for folder in ("once", "twice"):
        save_packed(model, tmp_path / folder)
        again = load_packed(tmp_path / folder)
        assert torch.equal(logits(again, x), logits(model, x))
        model = again


@local_dir
@pytest.mark.parametrize("recipe", ["ofq_w2a2", "ofq_w3a4_qkr"])
def test_a_saved_directory_is_read_by_timm(tmp_path, recipe):
    options = {"ofq": {"activation_scale": "tensor"}} if recipe.endswith("_qkr") else {}
    model = calibrated(create(recipe, VIT_NAME + ".augreg_in21k", **options))
    recorded = recipe.endswith("_qkr") and hasattr(timm.models, "get_model_args")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    save_for_hf(model, tmp_path, model_args=None if recorded else SAVED | options)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == recipe
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert_same(again.state_dict(), model.state_dict())
    x = images(model)
    assert torch.equal(logits(again, x), logits(model, x))
    assert all(quantizer.ready for quantizer in activation_quantizers(again).values())
    for key in ("mean", "std", "interpolation", "input_size", "num_classes"):
        assert json.dumps(again.pretrained_cfg[key]) == json.dumps(config["pretrained_cfg"][key]), key
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]


@local_dir
def test_a_saved_directory_with_other_classes_and_without_weights(tmp_path):
    model = calibrated(create())
    save_for_hf(model, tmp_path / "saved", model_args=SAVED)
    again = timm.create_model(f"local-dir:{tmp_path}/saved", pretrained=True, num_classes=7)
    head = {name for name in model.state_dict() if name.startswith("head.") and "input_quantizer" not in name}
    found = again.state_dict()
    assert again(images(model)).shape == (2, 7)
    rows = found["head.weight"].abs().mean(1)
    torch.testing.assert_close(found["head.weight_scale_norm"], 2 * rows / 127**0.5)
    assert_same(
        {k: v for k, v in found.items() if k not in head},
        {k: v for k, v in model.state_dict().items() if k not in head},
    )
    save_for_hf(again, tmp_path / "again", model_args=SAVED)
    third = timm.create_model(f"local-dir:{tmp_path}/again", pretrained=True)
    assert_same(third.state_dict(), found)
    blank = timm.create_model(f"local-dir:{tmp_path}/saved")
    assert not any(quantizer.ready for quantizer in activation_quantizers(blank).values())
    assert not torch.equal(blank.head.weight, model.head.weight)


# --- what timm's scripts do with a model


def train(model: nn.Module, optimizer: Any, steps: int = 2, ema: Any = None) -> None:
    model.train()
    for step in range(steps):
        loss = F.cross_entropy(model(images(model, 4, seed=10 + step)), torch.arange(4))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.update(model, step=step + 1)


@pytest.mark.smoke
def test_checkpoints_of_a_training_run_and_their_resumption(tmp_path):
    model = create()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    ema = ModelEmaV3(model, decay=0.5)
    args = Namespace(model=f"ofq_w2a2.{VIT_NAME}")
    saver = CheckpointSaver(model, optimizer, args=args, model_ema=ema, checkpoint_dir=str(tmp_path))
    train(model, optimizer, ema=ema)
    saver.save_checkpoint(0, metric=1.0)
    x = images(model)
    averaged = create()
    load_checkpoint(averaged, str(tmp_path / "last.pth.tar"), use_ema=True)
    assert torch.equal(logits(averaged, x), logits(ema.module, x)), "the average evaluates as its checkpoint does"
    resumed = create()
    other = create_optimizer_v2(resumed, opt="adamw", lr=1e-3, weight_decay=0.05)
    assert resume_checkpoint(resumed, str(tmp_path / "last.pth.tar"), other) == 1
    assert torch.equal(logits(resumed, x), logits(model, x))
    train(model, optimizer)
    train(resumed, other)
    assert_same(resumed.state_dict(), model.state_dict())


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "calibrated"])
def test_the_average_of_a_model_follows_it(lazy):
    """timm's first update copies; later ones are theirs in every tensor, the scales too."""
    model = create() if lazy else calibrated(create())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ema = ModelEmaV3(model, decay=0.5)
    states = []
    for step in range(3):
        train(model, optimizer, 1)
        ema.update(model, step=step + 1)
        states.append({name: value.detach().clone() for name, value in model.state_dict().items()})
    for name, value in ema.module.state_dict().items():
        one, two, three = (state[name] for state in states)
        if value.is_floating_point():
            torch.testing.assert_close(value, ((one + two) / 2 + three) / 2, rtol=1e-5, atol=1e-6)
        else:
            assert value.all()
    x = images(model, 2, seed=4)
    assert torch.equal(logits(ema.module, x), torch.cat([logits(ema.module, one) for one in x.split(1)]))


def test_latent_weights_decay_and_scales_and_shifts_do_not():
    model = create("ofq_w2a2_qkr")
    groups = timm.optim.param_groups_weight_decay(model, weight_decay=0.05)
    names = {id(value): name for name, value in model.named_parameters()}
    kept = {names[id(x)] for group in groups if not group["weight_decay"] for x in group["params"]}
    decayed = {names[id(x)] for group in groups if group["weight_decay"] for x in group["params"]}
    ours = {name for name in names.values() if name.endswith(("scale_norm", "bias_in", "bias_out"))}
    assert ours <= kept and len(ours) == 3 * 2 + 2 + 2 * (3 + 3 + 3 + 3 + 2 + 3 + 1)
    assert {"blocks.0.attn.qkv.weight", "head.weight"} <= decayed
    layered = timm.optim.param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    scale = {id(x): group["lr_scale"] for group in layered for x in group["params"]}
    of = dict(model.named_parameters())
    for name, owner in (("blocks.0.attn.qkx_quantizer.scale_norm", "blocks.0.attn.qkv.weight"),):
        assert scale[id(of[name])] == scale[id(of[owner])]
    assert len(scale) == len(of)


@pytest.mark.parametrize("opt", ["sgd", "adamw", "lion", "lamb", "adafactor", "rmsproptf", "adan"])
def test_optimisers_of_timm(opt):
    model = quantize(build("vit"), OFQConfig())
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    train(model, create_optimizer_v2(model, opt=opt, lr=1e-3, weight_decay=0.05), steps=3)
    for name, value in model.named_parameters():
        assert value.isfinite().all() and not torch.equal(value, before[name]), name


@pytest.mark.parametrize("recipe", ["ofq_w2a2", "ofq_w2a2_qkr"])
@pytest.mark.parametrize("architecture", [VIT_NAME, FAMILIES["swin"][0]])
def test_checkpointing_of_gradients_changes_nothing(recipe, architecture):
    sizes = FAMILIES["vit" if architecture == VIT_NAME else "swin"][1]
    model = timm.create_model(f"{recipe}.{architecture}", **sizes)
    other = copy.deepcopy(model)
    other.set_grad_checkpointing(True)
    for _ in range(2):
        for one in (model, other):
            F.cross_entropy(one.train()(images(one, 4)), torch.arange(4)).backward()
    assert_same(model.state_dict(), other.state_dict())
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert (one.grad is None and two.grad is None) or torch.equal(one.grad, two.grad)


def test_another_head_or_no_head():
    model = calibrated(create())
    features = model.forward_features(images(model))
    assert features.shape == (2, 17, 48)
    model.reset_classifier(5)
    assert model(images(model)).shape == (2, 5)


# --- the table of timm


@pytest.mark.smoke
def test_a_process_that_never_imports_us():
    found = answer(
        run_python(f"""
            import json, sys, timm, torch
            model = timm.create_model("ofq_w2a2.{VIT_NAME}", img_size=32, embed_dim=12, num_heads=3, depth=1)
            model(torch.randn(1, 3, 32, 32)).sum().backward()
            print(json.dumps(sum("scale_norm" in name for name, _ in model.named_parameters())))
        """)
    )
    assert found == 8 + 2 + 2


TABLES = """
    import copy, json
    import hf_ext, timm
    from timm.models import _registry

    def tables():
        dicts = {name: value for name, value in vars(_registry).items() if isinstance(value, dict)}
        return copy.deepcopy({name: dicts[name] for name in dicts if not name.startswith("__")})

    hf_ext.unregister()
    before = tables()
    assert not timm.list_models("ofq*") and "timm_models" not in str(before)
"""


@pytest.mark.smoke
def test_names_in_the_tables_of_timm_come_and_go_and_are_never_taken_from_others():
    found = answer(
        run_python(
            TABLES
            + """
    hf_ext.register()
    there = timm.is_model("ofq_w2a2"), tables() != before
    hf_ext.unregister()
    equal, errors = [tables() == before], []
    try:
        timm.create_model("ofq_w2a2.vit_tiny_patch16_224")
    except RuntimeError as e:
        errors.append(str(e))
    hf_ext.register()
    listed = timm.list_models("ofq*")
    hf_ext.unregister()

    def theirs(pretrained=False, **kwargs):
        return hf_ext

    _registry._model_entrypoints["ofq_w3a3"] = theirs
    before = tables()
    try:
        hf_ext.register()
    except hf_ext.RegistrationError as e:
        errors.append(str(e))
    equal.append(tables() == before)
    print(json.dumps([*there, len(before), equal, errors, listed, hf_ext.status()["timm"]["state"]]))
    """
        )
    )
    registered, changed, count, equal, errors, listed, state = found
    assert registered and changed and count >= 3
    assert equal == [True, True] and state == "failed"
    assert sorted(listed) == sorted(RECIPES)
    assert "Unknown model (ofq_w2a2)" in errors[0]
    assert "timm already has 'ofq_w3a3'" in errors[1] and "__main__" in errors[1]
