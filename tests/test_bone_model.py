"""The live model: forward and backward against stock layers with W' in them, states, merging, refusals, loading."""

import copy
import itertools
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bone_oracle import (
    Net,
    Single,
    adapted,
    config,
    fill,
    layers,
    matrix,
    merged,
    raw,
    single,
    snapshot,
    updated,
    wrapped,
)
from peft import PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from hf_ext import BoneConfig, BoneLinear
from hf_ext.bone_adapter import BoneLayer, reference
from hf_ext.compat import has_native_bone

if has_native_bone():
    pytest.skip("this peft has a Bone of its own", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers")

CLOSE = {"rtol": 1e-11, "atol": 1e-11}
INITS = [True, False, "bat", "bat_row"]
AFFINE = ["bat", "bat_row"]
SHAPE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
# One adapter of each form, of unlike r: names that PEFT does not mistake for a part of its prefix "bone_".
MIXED = {"a": (True, 5), "c": ("bat", 4), "d": ("bat_row", 3), "x": ("bat", 12)}


def inputs(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 11) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def llama(tied: bool = False, kind: Any = LlamaForCausalLM, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(4)
    model = kind(LlamaConfig(**{**SHAPE, "tie_word_embeddings": tied, "pad_token_id": 0, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model.to(dtype).eval()


def mixed(base: nn.Module | None = None) -> tuple[nn.Module, PeftModel]:
    base = base or Net()
    return base, adapted(base, **{name: config(*form) for name, form in MIXED.items()})


def activate(model: PeftModel, names: list[str]) -> None:
    model.base_model.set_adapter(names)


# ---------------------------------------------------------------- one layer against a stock one with W' in it


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["linear", "no_bias", "conv1d"])
@pytest.mark.parametrize(
    ("init_weights", "r", "fan_in", "fan_out"),
    [
        (True, 4, 12, 24),
        (False, 4, 12, 24),
        (True, 5, 12, 7),
        (True, 1, 12, 7),
        (True, 30, 12, 7),
        (True, 12, 12, 12),
        ("bat", 4, 12, 24),
        ("bat", 1, 12, 24),
        ("bat", 12, 12, 24),
        ("bat", 12, 12, 12),
        ("bat", 3, 24, 12),
        ("bat_row", 4, 12, 24),
        ("bat_row", 1, 12, 24),
        ("bat_row", 12, 12, 24),
        ("bat_row", 12, 12, 12),
        ("bat_row", 3, 24, 12),
    ],
    ids=str,
)
def test_layer_values_and_gradients(kind, init_weights, r, fan_in, fan_out):
    base = single(kind, fan_in, fan_out)
    model = adapted(base, default=config(init_weights, r, ["layer"]))
    layer = base.layer
    block = model.base_model.model.layer.bone_block["default"]
    x, twin, own = inputs(2, 5, fan_in), inputs(2, 5, fan_in), block.detach().clone().requires_grad_()
    y = model(x.requires_grad_())
    expected = twin.requires_grad_() @ updated(init_weights, matrix(layer), own).T
    if layer.bias is not None:
        expected = expected + layer.bias
    g = inputs(*y.shape, seed=12)
    (y * g).sum().backward()
    (expected * g).sum().backward()
    torch.testing.assert_close(y, expected, **CLOSE)
    torch.testing.assert_close(x.grad, twin.grad, **CLOSE)
    torch.testing.assert_close(block.grad, own.grad, **CLOSE)
    assert y.dtype == block.dtype == torch.float64
    assert all(p.grad is None for n, p in model.named_parameters() if "bone_block" not in n)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("kind", ["linear", "no_bias", "conv1d"])
@pytest.mark.parametrize("init_weights", INITS, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(12,), (1, 12), (40, 12), (2, 3, 12), (2, 1, 3, 12), (0, 12), (2, 0, 12)],
    ids=lambda s: "x".join(map(str, s)),
)
def test_every_shape_that_linear_takes(shape, init_weights, kind, grad):
    base = single(kind, 12, 24)
    model = adapted(base, default=config(init_weights, 4, ["layer"]))
    expected = merged(base, model, ["default"])
    x = inputs(*shape).requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        y = model(x)
    torch.testing.assert_close(y, expected(x), **CLOSE)
    if grad:
        y.sum().backward()
        assert x.grad.shape == x.shape
        assert bool(model.base_model.model.layer.bone_block["default"].grad.any()) == (x.numel() > 0)


@pytest.mark.parametrize(
    ("init_weights", "shape"), [(True, (4, 24)), (False, (4, 24)), ("bat", (6, 4, 4)), ("bat_row", (3, 4, 4))], ids=str
)
def test_block_shape_and_first_values(init_weights, shape):
    base = single("linear", 12, 24)
    model = get_peft_model(copy.deepcopy(base), config(init_weights, 4, ["layer"]))
    block = model.base_model.model.layer.bone_block["default"]
    assert block.shape == shape
    if init_weights is False:
        bound = math.sqrt(6 / (1 + 5) / 24)  # kaiming_uniform(a=sqrt 5): the fan-in of an (r, out) tensor is out
        assert 0.8 * bound < block.abs().max() <= bound
        assert block.mean().abs() < 0.2 * bound
    else:
        assert not block.any()
        x = inputs(3, 12)
        torch.testing.assert_close(model(x), base(x), **CLOSE)


def test_bat_and_bat_row_differ_on_a_square_matrix():
    base = single("linear", 12, 12)
    models = {name: adapted(base, default=config(name, 4, ["layer"])) for name in AFFINE}
    blocks = [m.base_model.model.layer.bone_block["default"] for m in models.values()]
    assert torch.equal(*blocks)
    x = inputs(3, 12)
    assert (models["bat"](x) - models["bat_row"](x)).abs().max() > 0.1


def test_layer_facts():
    base, model = mixed()
    layer = model.base_model.model.two
    assert isinstance(layer, BoneLinear)
    assert isinstance(layer, BoneLayer)
    assert (layer.in_features, layer.out_features) == (24, 12)
    assert layer.bone_form == {"a": "tile", "c": "bat", "d": "bat_row", "x": "bat"}
    assert layer.bone_r == {"a": 5, "c": 4, "d": 3, "x": 12}
    assert isinstance(layer.bone_block, nn.ParameterDict)
    assert torch.equal(model.base_model.model.one.get_base_weight(), base.one.weight)
    assert [n for n, _ in model.named_parameters() if n.endswith("two.bone_block.c")] == [
        "base_model.model.two.bone_block.c"
    ]


# ---------------------------------------------------------------- several adapters on a layer


def pairs_and_more() -> list[tuple[str, ...]]:
    return [*itertools.permutations(MIXED, 2), ("a", "c", "d", "x"), ("x", "d", "c", "a")]


@pytest.mark.parametrize("names", pairs_and_more(), ids="-".join)
def test_an_active_list_is_applied_in_its_order(names):
    base, model = mixed()
    activate(model, list(names))
    x, twin = inputs(5, 12).requires_grad_(), inputs(5, 12).requires_grad_()
    y = model(x)
    oracle = merged(base, model, list(names))
    torch.testing.assert_close(y, oracle(twin), **CLOSE)
    g = inputs(*y.shape, seed=12)
    (y * g).sum().backward()
    (oracle(twin) * g).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(model(x), y, **CLOSE)
    model.merge_adapter()
    for path, layer in layers(model):
        assert layer.merged_adapters == list(names)
        torch.testing.assert_close(matrix(layer.get_base_layer()), matrix(oracle.get_submodule(path)), **CLOSE)
    torch.testing.assert_close(model(x), y, **CLOSE)


@pytest.mark.parametrize("kind", ["linear", "no_bias", "conv1d"])
@pytest.mark.parametrize("names", pairs_and_more(), ids="-".join)
def test_gradients_of_an_active_list(names, kind):
    """Blocks of every adapter, the reference's loops under autograd as oracle."""
    base = single(kind, 12, 24)
    model = adapted(base, **{name: config(*form, ["layer"]) for name, form in MIXED.items()})
    activate(model, list(names))
    blocks = model.base_model.model.layer.bone_block
    own = {name: blocks[name].detach().clone().requires_grad_() for name in names}
    forms = {True: "tile"}
    steps = [(forms.get(MIXED[name][0], MIXED[name][0]), own[name]) for name in names]
    y = model(inputs(5, 12))
    expected = reference.linear(inputs(5, 12), matrix(base.layer).detach(), base.layer.bias, steps)
    g = inputs(*y.shape, seed=12)
    (y * g).sum().backward()
    (expected * g).sum().backward()
    torch.testing.assert_close(y, expected, **CLOSE)
    for name in MIXED:
        if name in names:
            torch.testing.assert_close(blocks[name].grad, own[name].grad, **CLOSE)
        else:
            assert blocks[name].grad is None


def test_order_matters():
    _, model = mixed()
    x = inputs(5, 12)
    outputs = []
    for names in (["c", "x"], ["x", "c"]):
        activate(model, names)
        outputs.append(model(x))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


@pytest.mark.parametrize("init_weights", AFFINE)
def test_a_stack_of_equal_r_is_one_adapter(init_weights):
    """I + b = (I + b1)(I + b2), in the order of activation."""
    base = Net()
    model = adapted(base, a=config(init_weights), c=config(init_weights), x=config(init_weights))
    unit = torch.eye(4, dtype=torch.float64)
    for _, layer in layers(model):
        first, second = layer.bone_block["a"].detach(), layer.bone_block["c"].detach()
        layer.bone_block["x"].data.copy_((unit + first) @ (unit + second) - unit)
    x = inputs(5, 12)
    activate(model, ["a", "c"])
    stacked = model(x)
    activate(model, ["x"])
    torch.testing.assert_close(model(x), stacked, **CLOSE)


# ---------------------------------------------------------------- what is trained, and which adapter is on


def test_only_the_blocks_of_the_active_adapter_are_trained(capsys):
    _, model = mixed()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"base_model.model.{path}.bone_block.a" for path in ("one", "two", "three")}
    # tile: r * out
    count, everything = 5 * (24 + 12 + 12), sum(p.numel() for p in model.parameters())
    assert model.get_nb_trainable_parameters() == (count, everything)
    model.print_trainable_parameters()
    assert f"trainable params: {count:,} || all params: {everything:,}" in capsys.readouterr().out


def test_parameters_per_form():
    sizes = {name: (12 + 24 + 12) * r if init == "bat_row" else (24 + 12 + 12) * r for name, (init, r) in MIXED.items()}
    _, model = mixed()
    for name, size in sizes.items():
        activate(model, [name])
        assert model.get_nb_trainable_parameters()[0] == size


def test_set_adapter_moves_training():
    base, model = mixed()
    x = inputs(5, 12)
    for name in ["c", "d", "a"]:
        model.set_adapter(name)
        assert model.active_adapters == [name]
        assert {n.rsplit(".", 1)[1] for n, p in model.named_parameters() if p.requires_grad} == {name}
        torch.testing.assert_close(model(x), merged(base, model, [name])(x), **CLOSE)
    with pytest.raises(ValueError, match="zzz"):
        model.set_adapter("zzz")
    assert model.active_adapters == ["a"]


def test_a_module_named_like_the_prefix_is_not_an_adapter(tmp_path):
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone_stem, self.head = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.backbone_stem(x))

    model = get_peft_model(Named(), config(targets=["head"]))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["base_model.model.head.bone_block.default"]
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {"base_model.model.head.bone_block"}


@pytest.mark.smoke
@pytest.mark.parametrize("init_weights", INITS, ids=str)
def test_disabled_and_unloaded_are_the_base(init_weights):
    base = Net()
    model = adapted(base, default=config(init_weights))
    x = inputs(5, 12)
    before = model(x)
    with model.disable_adapter():
        assert raw(model(x)) == raw(base(x))
    assert raw(model(x)) == raw(before)
    plain = model.unload()
    assert snapshot(plain) == snapshot(base)
    assert raw(plain(x)) == raw(base(x))
    assert [type(m) for m in plain.modules()] == [type(m) for m in base.modules()]


@pytest.mark.parametrize("init_weights", [True, *AFFINE], ids=str)
def test_unloaded_while_merged_is_the_base(init_weights):
    base = Net(torch.bfloat16)
    model = adapted(base, default=config(init_weights))
    model.merge_adapter()
    assert snapshot(model.unload()) == snapshot(base)


@pytest.mark.parametrize("init_weights", [True, *AFFINE], ids=str)
def test_disabled_while_merged_is_the_base(init_weights):
    base = Net(torch.bfloat16)
    model = adapted(base, default=config(init_weights))
    x = inputs(5, 12, dtype=torch.bfloat16)
    model.merge_adapter()
    with model.disable_adapter():
        assert raw(model(x)) == raw(base(x))
        assert snapshot(model) == snapshot(base)
    assert raw(model(x)) != raw(base(x))


def test_no_active_adapter_on_a_layer_is_the_base():
    """An adapter that was put on `two` leaves the others alone."""
    base = Net()
    model = adapted(base, a=config("bat"), c=config("bat", targets=["two"]))
    model.set_adapter("c")
    x = inputs(5, 12)
    torch.testing.assert_close(model(x), merged(base, model, ["c"])(x), **CLOSE)
    assert "c" not in model.base_model.model.one.bone_block
    model.merge_adapter()
    assert raw(model.base_model.model.one.get_base_layer().weight) == raw(base.one.weight)


def test_delete_adapter():
    base, model = mixed()
    model.delete_adapter("c")
    assert list(model.peft_config) == ["a", "d", "x"]
    for _, layer in layers(model):
        assert set(layer.bone_block) == set(layer.bone_r) == set(layer.bone_form) == {"a", "d", "x"}
    assert not any(".bone_block.c" in name for name in model.state_dict())
    model.delete_adapter("a")
    assert model.active_adapters == ["d"]
    x = inputs(5, 12)
    torch.testing.assert_close(model(x), merged(base, model, ["d"])(x), **CLOSE)
    with pytest.raises(ValueError, match="zzz"):
        model.delete_adapter("zzz")


def test_a_deleted_name_can_come_back_in_another_form():
    base, model = mixed()
    model.delete_adapter("c")
    model.add_adapter("c", config(True, 7))
    fill(model, 3)
    model.set_adapter("c")
    x = inputs(5, 12)
    torch.testing.assert_close(model(x), merged(base, model, ["c"])(x), **CLOSE)


def test_scaling_warns_and_does_nothing():
    _, model = mixed()
    layer, x = model.base_model.model.one, inputs(5, 12)
    before = model(x)
    with pytest.warns(UserWarning, match="scal"):
        layer.scale_layer(0.5)
    assert raw(model(x)) == raw(before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.scale_layer(1)
        layer.scale_layer(1.0)


@pytest.mark.parametrize("init_weights", INITS, ids=str)
def test_inject_without_a_peft_model(init_weights):
    base = Net()
    model = inject_adapter_in_model(config(init_weights), copy.deepcopy(base))
    fill(model)
    assert type(model) is Net
    model.peft_config = {"default": config(init_weights)}  # for the oracle
    x = inputs(5, 12)
    torch.testing.assert_close(model(x), merged(base, model, ["default"])(x), **CLOSE)
    assert all(p.requires_grad == ("bone_block" in n) for n, p in model.named_parameters())


def test_inject_from_a_state_dict():
    """The names in it say which layers; the form is the config's."""
    state = {"one.bone_block": torch.zeros(6, 4, 4), "two.bone_block": torch.zeros(3, 4, 4)}
    model = inject_adapter_in_model(config("bat"), Net(), state_dict=state)
    assert wrapped(model) == ["one", "two"]


# ---------------------------------------------------------------- which layers

QV = ["q_proj", "v_proj"]
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("options", "names", "indices"),
    [
        ({"target_modules": QV}, QV, [0, 1, 2]),
        ({"target_modules": r".*\.1\.self_attn\.(q|v)_proj"}, QV, [1]),
        ({"target_modules": "all-linear"}, ALL_LINEAR, [0, 1, 2]),
        (
            {"target_modules": "all-linear", "exclude_modules": ["up_proj"]},
            [n for n in ALL_LINEAR if n != "up_proj"],
            [0, 1, 2],
        ),
        ({"target_modules": QV, "exclude_modules": ["q_proj"]}, ["v_proj"], [0, 1, 2]),
        ({"target_modules": QV, "exclude_modules": r".*layers\.0\..*"}, QV, [1, 2]),
        ({"target_modules": QV, "layers_to_transform": [0, 2]}, QV, [0, 2]),
        ({"target_modules": QV, "layers_to_transform": 1}, QV, [1]),
        ({"target_modules": QV, "layers_to_transform": [1], "layers_pattern": "layers"}, QV, [1]),
        ({}, QV, [0, 1, 2]),
    ],
    ids=["list", "regex", "all-linear", "all-but", "exclude", "exclude-regex", "layers", "layer", "pattern", "default"],
)
def test_which_layers(options, names, indices):
    model = get_peft_model(llama(), BoneConfig(r=4, init_weights="bat", task_type="CAUSAL_LM", **options))
    found = [path.removeprefix("model.layers.").split(".") for path in wrapped(model)]
    assert sorted((int(index), name) for index, _, name in found) == sorted(itertools.product(indices, names))


def test_the_default_of_gpt2_is_a_conv1d():
    base = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=12, n_layer=1, n_head=2, n_positions=16)).double()
    model = get_peft_model(base, BoneConfig(r=4, init_weights="bat"))
    assert wrapped(model) == ["transformer.h.0.attn.c_attn"]
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 16)


def test_an_unknown_model_type_needs_target_modules():
    class Unknown(LlamaConfig):
        model_type = "no_such_model"

    base = llama()
    base.config = Unknown(**SHAPE)
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(base, BoneConfig(r=4))
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(Net(), BoneConfig(r=4))


# ---------------------------------------------------------------- biases and modules_to_save


@pytest.mark.parametrize(
    ("bias", "trained"), [("none", set()), ("bone_only", {"one", "two"}), ("all", {"one", "two", "free"})]
)
@pytest.mark.parametrize("init_weights", INITS, ids=str)
def test_biases_are_trained_saved_and_loaded(tmp_path, init_weights, bias, trained):
    base = Net()
    base.free = nn.Linear(12, 12).double()  # not a target

    model = adapted(base, default=config(init_weights, bias=bias, r=4))
    x = inputs(5, 12)
    model.base_model.model.free(model(x)).sum().backward()
    with_gradient = {
        n.removeprefix("base_model.model.").split(".")[0]
        for n, p in model.named_parameters()
        if n.endswith(".bias") and p.grad is not None and p.grad.any()
    }
    assert with_gradient == trained
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.endswith(".bias"):
                parameter.add_(1.0)
    y = model(x)
    model.save_pretrained(tmp_path)
    kept = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(name.endswith(".bias") for name in kept) == len(trained)
    back = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(back(x), y, **CLOSE)
    torch.testing.assert_close(back.base_model.model.free.bias, model.base_model.model.free.bias, **CLOSE)


def test_bias_gradient():
    base = Net()
    model = adapted(base, default=config("bat", bias="bone_only"))
    oracle = merged(base, model, ["default"])
    x = inputs(5, 12)
    model(x).square().sum().backward()
    oracle(x).square().sum().backward()
    for path in ("one", "two"):
        found = model.base_model.model.get_submodule(path).base_layer.bias.grad
        torch.testing.assert_close(found, oracle.get_submodule(path).bias.grad, **CLOSE)


def test_a_bone_only_file_of_old_peft_without_biases_loads(tmp_path):
    base = Net()
    model = adapted(base, default=config("bat", bias="bone_only"))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if "bone_block" in k}, tmp_path / "adapter_model.safetensors")
    back = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    x = inputs(5, 12)
    torch.testing.assert_close(back(x), model(x), **CLOSE)


def test_modules_to_save(tmp_path):
    base = llama(kind=LlamaForSequenceClassification, num_labels=3)
    options = BoneConfig(r=4, target_modules=QV, task_type="SEQ_CLS", modules_to_save=["score"])
    model = adapted(base, default=options)
    assert {n.split(".")[-4] for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" in n} == {
        "score"
    }
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.add_(1.0)
    logits = model(ids).logits
    model.save_pretrained(tmp_path)
    kept = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(n for n in kept if "bone_block" not in n) == ["base_model.model.score.weight"]
    assert len(kept) == 1 + 2 * 3
    torch.testing.assert_close(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(ids).logits, logits, **CLOSE)
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, logits, **CLOSE)


def test_each_directory_has_its_own_tensors_only(tmp_path):
    base, model = mixed()
    model.save_pretrained(tmp_path)
    keys = {f"base_model.model.{path}.bone_block" for path in ("one", "two", "three")}
    x = inputs(5, 12)
    for name in MIXED:
        assert set(load_file(tmp_path / name / "adapter_model.safetensors")) == keys
        back = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name)
        model.set_adapter(name)
        torch.testing.assert_close(back(x), model(x), **CLOSE)
        assert not any(p.requires_grad for p in back.parameters())


# ---------------------------------------------------------------- mixed batches


@pytest.mark.smoke
def test_each_row_of_a_batch_has_its_adapter():
    base = Net()
    forms = {name: config(*form) for name, form in MIXED.items()}
    model = adapted(base, **forms, part=config("bat", targets=["two"]))
    names = ["x", "a", "__base__", "part", "c", "a", "d"]
    x = inputs(7, 3, 12)
    y = model(x, adapter_names=names)
    assert y.shape == (7, 3, 12)
    for row, name in enumerate(names):
        torch.testing.assert_close(y[row], merged(base, model, [name])(x[row]), **CLOSE)


def test_each_row_of_a_batch_has_its_head():
    """modules_to_save goes with the adapter."""
    base = llama(kind=LlamaForSequenceClassification, num_labels=3)
    options = {"targets": QV, "task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    forms = {"a": config(True, **options), "x": config("bat", **options)}
    model = adapted(base, **forms)
    with torch.no_grad():
        for number, name in enumerate(forms):
            model.base_model.model.score.modules_to_save[name].weight.add_(1.0 + number)
    ids = torch.tensor([[1, 2, 3]])
    together = model(ids.expand(3, -1), adapter_names=["x", "__base__", "a"]).logits
    torch.testing.assert_close(together[1:2], base(ids).logits, **CLOSE)
    for row, name in ((0, "x"), (2, "a")):
        model.set_adapter(name)
        torch.testing.assert_close(together[row : row + 1], model(ids).logits, **CLOSE)


@pytest.mark.parametrize("names", [["a"] * 3, ["__base__"] * 3], ids=lambda n: n[0])
def test_a_batch_of_one_kind(names):
    base, model = mixed()
    model.set_adapter("c")
    x = inputs(3, 12)
    torch.testing.assert_close(model(x, adapter_names=names), merged(base, model, names[:1])(x), **CLOSE)
    # and it is over after the call
    torch.testing.assert_close(model(x), merged(base, model, ["c"])(x), **CLOSE)


@pytest.mark.parametrize(
    ("names", "message"),
    [(["a", "c"], "2.*3|3.*2"), (["a"] * 4, "4.*3|3.*4"), ([], "adapter_names"), (["a", "zzz", "c"], "zzz")],
    ids=["short", "long", "none", "unknown"],
)
def test_adapter_names_that_do_not_fit(names, message):
    base, model = mixed()
    x = inputs(3, 12)
    with pytest.raises(ValueError, match=message):
        model(x, adapter_names=names)
    torch.testing.assert_close(model(x), merged(base, model, ["a"])(x), **CLOSE)


def test_adapter_names_in_training_or_merged():
    _, model = mixed()
    x = inputs(3, 12)
    model.train()
    with pytest.raises(ValueError, match=r"eval|training"):
        model(x, adapter_names=["a", "c", "d"])
    model.eval()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model(x, adapter_names=["a", "c", "d"])


@pytest.mark.parametrize("search", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generate_with_a_mixed_batch(search):
    base = llama(dtype=torch.float32)
    forms = {"a": (True, 5), "c": ("bat", 8), "d": ("bat_row", 4)}
    model = adapted(base, **{name: config(*form, QV, task_type="CAUSAL_LM") for name, form in forms.items()})
    ids = torch.tensor([[1, 2, 3]])
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **search}
    names = ["a", "c", "__base__", "d"]
    together = model.generate(input_ids=ids.expand(4, -1), adapter_names=names, **options)
    alone = []
    for name in names:
        if name == "__base__":
            with model.disable_adapter():
                alone.append(model.generate(input_ids=ids, **options)[0])
        else:
            model.set_adapter(name)
            alone.append(model.generate(input_ids=ids, **options)[0])
    assert together.tolist() == torch.stack(alone).tolist()
    assert len({tuple(row.tolist()) for row in alone}) > 2


# ---------------------------------------------------------------- merging


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("init_weights", INITS, ids=str)
def test_merge_and_unmerge_restore_every_byte(init_weights, dtype):
    base = Net(dtype)
    model = adapted(base, default=config(init_weights))
    keys, before, expected = set(model.state_dict()), snapshot(model), merged(base, model, ["default"])
    for safe in (False, True, False):
        model.merge_adapter(safe_merge=safe)
        assert set(model.state_dict()) == keys
        for path, layer in layers(model):
            weight = layer.get_base_layer().weight
            assert weight.dtype == dtype
            assert raw(weight) != before[f"{path}.weight"]
            wanted = expected.get_submodule(path).weight
            # rounded once, from something of at least float32
            slack = 1e-12 if dtype is torch.float64 else 1e-6
            assert bool(((weight.double() - wanted).abs() <= 0.5 * spacing(wanted, dtype) + slack).all())
        model.unmerge_adapter()
        assert snapshot(model) == before == snapshot(base)
        assert not any(layer.merged for _, layer in layers(model))


def spacing(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between two numbers of dtype at x."""
    if dtype is torch.float64:
        return torch.zeros_like(x)
    smallest = torch.finfo(dtype).smallest_normal
    return torch.finfo(dtype).eps * 2.0 ** torch.floor(torch.log2(x.abs().clamp(min=smallest)))


@pytest.mark.parametrize("init_weights", [True, "bat"], ids=str)
def test_nothing_is_remembered_after_unmerging(init_weights):
    """A base weight that changed since is the one that is merged into and restored."""
    base = Net()
    model = adapted(base, default=config(init_weights))
    model.merge_adapter()
    model.unmerge_adapter()
    for net in (base, model):
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if name.endswith("weight"):
                    parameter.mul_(2)
    expected = merged(base, model, ["default"])
    model.merge_adapter()
    for path, layer in layers(model):
        torch.testing.assert_close(layer.get_base_layer().weight, expected.get_submodule(path).weight, **CLOSE)
    model.unmerge_adapter()
    assert snapshot(model) == snapshot(base)


@pytest.mark.parametrize("unlike", [True, False], ids=["r-above-in", "cut-tile"])
def test_merge_of_a_tile_that_does_not_divide(unlike):
    base = Net()
    model = adapted(base, default=config(True, 30 if unlike else 5))
    before, expected = snapshot(model), merged(base, model, ["default"])
    model.merge_adapter(safe_merge=True)
    for path, layer in layers(model):
        torch.testing.assert_close(layer.get_base_layer().weight, expected.get_submodule(path).weight, **CLOSE)
    model.unmerge_adapter()
    assert snapshot(model) == before


def test_a_singular_block_is_unmerged_exactly():
    base = Net()
    model = adapted(base, default=config("bat"))
    singular(model)
    model.merge_adapter()
    assert snapshot(model) != snapshot(base)
    model.unmerge_adapter()
    assert snapshot(model) == snapshot(base)


@torch.no_grad()
def singular(model: PeftModel) -> None:
    """I + b = 0 in the middle layer."""
    block = model.base_model.model.two.bone_block["default"]
    block.copy_(-torch.eye(block.shape[-1]).expand_as(block))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("names", pairs_and_more()[:6], ids="-".join)
def test_merging_one_more_is_merging_both(names, dtype):
    first, second = names
    base = Net(dtype)
    _, model = mixed(base)
    at_once = copy.deepcopy(model)
    at_once.merge_adapter([first, second])
    model.merge_adapter([first])
    with pytest.warns(
        UserWarning, match=f"Already following adapters were merged {first}.*additionally merging {second}"
    ):
        model.merge_adapter([second])
    assert snapshot(model) == snapshot(at_once)
    assert all(layer.merged_adapters == [first, second] for _, layer in layers(model))
    model.unmerge_adapter()
    assert snapshot(model) == snapshot(base)


def test_merging_twice_and_unmerging_twice_warn():
    _, model = mixed()
    model.merge_adapter()
    once = snapshot(model)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()
    assert snapshot(model) == once
    model.unmerge_adapter()
    before = snapshot(model)
    with pytest.warns(UserWarning, match="Already unmerged. Nothing to do"):
        model.unmerge_adapter()
    assert snapshot(model) == before


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("init_weights", INITS, ids=str)
def test_safe_merge_of_a_broken_last_layer_changes_nothing(init_weights, bad, how):
    base = Net()
    model = adapted(base, default=config(init_weights))
    with torch.no_grad():
        model.base_model.model.three.bone_block["default"].view(-1)[-1] = bad
    before = snapshot(model)
    sentence = "NaNs detected in the merged weights. The adapter default seems to be broken"
    with pytest.raises(ValueError, match=sentence) as caught:
        getattr(model, how)(safe_merge=True)
    assert "three" in str(caught.value)
    assert snapshot(model) == before == snapshot(base)
    assert wrapped(model) == ["one", "two", "three"]
    assert not any(layer.merged for _, layer in layers(model))
    with torch.no_grad():
        model.base_model.model.three.bone_block["default"].zero_()
    model.merge_adapter(safe_merge=True)  # and it can be tried again


@pytest.mark.parametrize("where", ["one", "three"])
def test_safe_merge_with_a_broken_base(where):
    """NaN anywhere: here in the base weight."""
    base = Net()
    with torch.no_grad():
        base.get_submodule(where).weight[0, 0] = math.nan
    model = adapted(base, default=config("bat"))
    before = snapshot(model)
    with pytest.raises(ValueError, match=where):
        model.merge_adapter(safe_merge=True)
    assert snapshot(model) == before


def test_safe_merge_names_the_broken_one_of_two():
    _, model = mixed()
    with torch.no_grad():
        model.base_model.model.three.bone_block["c"].fill_(math.nan)
    model.merge_adapter(["a"])
    before = snapshot(model)
    with pytest.raises(ValueError, match="The adapter c seems to be broken"):
        model.merge_adapter(["c", "d"], safe_merge=True)
    assert snapshot(model) == before
    assert all(layer.merged_adapters == ["a"] for _, layer in layers(model))


def test_safe_merge_of_an_overflow():
    """Finite in float32, infinite once rounded to the weight's float16."""
    base = Net(torch.float16)
    model = adapted(base, default=config(True))
    with torch.no_grad():
        model.base_model.model.three.bone_block["default"].fill_(70000.0)
    before = snapshot(model)
    with pytest.raises(ValueError, match="three"):
        model.merge_adapter(safe_merge=True)
    assert snapshot(model) == before


@pytest.mark.smoke
@pytest.mark.parametrize("init_weights", INITS, ids=str)
def test_merge_and_unload(init_weights):
    base = Net()
    model = adapted(base, default=config(init_weights))
    expected = merged(base, model, ["default"])
    plain = model.merge_and_unload()
    assert type(plain) is Net
    assert [type(m) for m in plain.modules()] == [type(m) for m in base.modules()]
    assert not hasattr(plain, "peft_config")
    assert set(plain.state_dict()) == set(base.state_dict())
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(plain.get_parameter(name), parameter, **CLOSE)


def test_merge_and_unload_of_named_adapters():
    base, model = mixed()
    expected = merged(base, model, ["d", "c"])
    plain = model.merge_and_unload(adapter_names=["d", "c"], safe_merge=True)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(plain.get_parameter(name), parameter, **CLOSE)


@pytest.mark.parametrize("path", ["merge_adapter", "merge_and_unload"])
def test_merging_an_unknown_adapter(path):
    """Nothing happens silently."""
    base, model = mixed()
    with pytest.raises(ValueError, match="zzz"):
        getattr(model, path)(adapter_names=["a", "zzz"])
    assert snapshot(model) == snapshot(base)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("init_weights", INITS, ids=str)
def test_a_tied_head_is_not_merged(init_weights, how):
    base = llama(tied=True)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    model = adapted(base, default=config(init_weights, 4, ["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    before, ids = snapshot(model), torch.tensor([[1, 2, 3]])
    logits = model(ids).logits
    free = copy.deepcopy(base)
    free.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())
    torch.testing.assert_close(logits, merged(free, model, ["default"])(ids).logits, **CLOSE)
    for safe in (False, True):
        with pytest.raises(ValueError) as caught:
            getattr(model, how)(safe_merge=safe)
        message = str(caught.value)
        assert "lm_head" in message
        assert "embed_tokens" in message
        assert "tie_word_embeddings" in message
        assert "LoRA" in message
        assert snapshot(model) == before
        assert "lm_head" in wrapped(model)
        assert not any(layer.merged for _, layer in layers(model))
    assert raw(model(ids).logits) == raw(logits)


@pytest.mark.parametrize("targets", [["one"], ["one", "three"]], ids="+".join)
def test_a_tie_without_a_config_is_seen(targets):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = (nn.Linear(12, 12).double() for _ in range(3))
            self.three.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.three(self.two(self.one(x)))

    base = Tied()
    model = adapted(base, default=config(targets=targets))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"one.*three|three.*one"):
        model.merge_adapter()
    assert snapshot(model) == before
    # a tie elsewhere is no business of the adapter
    adapted(base, default=config(targets=["two"])).merge_adapter()


def test_untied_weights_merge_although_the_config_says_tied():
    base = llama(tied=True)
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())
    model = get_peft_model(copy.deepcopy(base), config(targets=["lm_head"]))
    fill(model)
    expected = merged(base, model, ["default"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    torch.testing.assert_close(model.base_model.model.lm_head.base_layer.weight, expected.lm_head.weight, **CLOSE)


@pytest.mark.parametrize("init_weights", [True, *AFFINE], ids=str)
def test_a_copy_of_a_merged_model_can_be_unmerged(init_weights):
    base = Net(torch.bfloat16)
    model = adapted(base, default=config(init_weights))
    model.merge_adapter()
    twin = copy.deepcopy(model)
    assert snapshot(twin) == snapshot(model)
    twin.unmerge_adapter()
    assert snapshot(twin) == snapshot(base)
    assert snapshot(model) != snapshot(base)
    model.unmerge_adapter()
    assert snapshot(model) == snapshot(base)


def test_save_while_merged(tmp_path):
    _, model = mixed()
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter(["a", "c"])
    merged_weights = snapshot(model)
    model.save_pretrained(tmp_path / "merged")
    assert snapshot(model) == merged_weights
    for name in MIXED:
        before, after = (
            load_file(tmp_path / when / name / "adapter_model.safetensors") for when in ("before", "merged")
        )
        assert {k: raw(v) for k, v in before.items()} == {k: raw(v) for k, v in after.items()}


# ---------------------------------------------------------------- merging without keeping the base


@pytest.fixture
def keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BoneLayer.keep_base_on_merge is True
    monkeypatch.setattr(BoneLayer, "keep_base_on_merge", False)


@pytest.mark.usefixtures("keep_nothing")
@pytest.mark.parametrize("names", [*[[name] for name in MIXED], ["a", "c", "d"], ["d", "c", "a"]], ids="-".join)
def test_the_algebraic_inverse(names):
    base, model = mixed()
    expected = merged(base, model, names)
    model.merge_adapter(names)
    for path, layer in layers(model):
        torch.testing.assert_close(layer.get_base_layer().weight, expected.get_submodule(path).weight, **CLOSE)
    with pytest.warns(UserWarning, match=r"drift|round"):
        model.unmerge_adapter()
    for path, layer in layers(model):
        assert not layer.merged
        torch.testing.assert_close(layer.get_base_layer().weight, base.get_submodule(path).weight, rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures("keep_nothing")
@pytest.mark.filterwarnings("ignore:.*drift")
def test_a_singular_block_has_no_inverse():
    base = Net()
    model = adapted(base, default=config("bat"))
    singular(model)
    model.merge_adapter()
    layer, x = model.base_model.model.two, inputs(5, 12)
    before, y = raw(layer.base_layer.weight), model(x)
    with pytest.raises(ValueError, match="singular"):
        model.unmerge_adapter()
    assert raw(layer.base_layer.weight) == before
    assert layer.merged
    torch.testing.assert_close(model(x), y, rtol=1e-8, atol=1e-8)


# ---------------------------------------------------------------- weighted sums of adapters


def weighted(init_weights: Any, ranks: tuple[int, ...] = (4, 4, 4)) -> tuple[nn.Module, PeftModel]:
    base = Net()
    return base, adapted(base, **{name: config(init_weights, r) for name, r in zip("acd", ranks, strict=False)})


def deltas(base: nn.Module, model: PeftModel, name: str) -> dict[str, Tensor]:
    after = merged(base, model, [name])
    return {p: matrix(after.get_submodule(p)) - matrix(base.get_submodule(p)) for p in wrapped(model)}


@pytest.mark.parametrize("combination", ["linear", None], ids=str)
@pytest.mark.parametrize(
    ("init_weights", "ranks", "r"),
    [
        (True, (4, 4, 4), 4),
        (False, (4, 4, 4), 4),
        (True, (4, 6, 5), 60),
        (True, (2, 4, 8), 8),
        ("bat", (4,) * 3, 4),
        ("bat_row", (4,) * 3, 4),
    ],
    ids=str,
)
def test_linear_is_the_sum_of_the_changes(init_weights, ranks, r, combination):
    if combination is None and init_weights in AFFINE:
        pytest.skip("composes")
    base, model = weighted(init_weights, ranks)
    factors = {"a": 0.5, "c": -2.0, "d": 1.25}
    model.base_model.add_weighted_adapter(list(factors), list(factors.values()), "sum", combination_type=combination)
    each = {name: deltas(base, model, name) for name in [*factors, "sum"]}
    for path, total in each["sum"].items():
        torch.testing.assert_close(total, sum(f * each[name][path] for name, f in factors.items()), **CLOSE)
    assert (model.peft_config["sum"].r, model.peft_config["sum"].form) == (r, model.peft_config["a"].form)
    model.set_adapter("sum")
    x = inputs(5, 12)
    torch.testing.assert_close(model(x), merged(base, model, ["sum"])(x), **CLOSE)


@pytest.mark.parametrize("combination", ["compose", None], ids=str)
@pytest.mark.parametrize("init_weights", AFFINE)
def test_compose_is_the_product(init_weights, combination):
    _, model = weighted(init_weights)
    model.base_model.add_weighted_adapter(["d", "a", "c"], [0.5, 1.0, -2.0], "all", combination_type=combination)
    unit = torch.eye(4, dtype=torch.float64)
    for _, layer in layers(model):
        block = layer.bone_block
        product = (unit + 0.5 * block["d"]) @ (unit + block["a"]) @ (unit - 2.0 * block["c"])
        torch.testing.assert_close(unit + block["all"], product, **CLOSE)


@pytest.mark.parametrize("init_weights", AFFINE)
def test_compose_of_ones_is_the_active_list(init_weights):
    _, model = weighted(init_weights)
    model.base_model.add_weighted_adapter(["c", "a"], [1.0, 1.0], "all")
    x = inputs(5, 12)
    activate(model, ["c", "a"])
    stacked = model(x)
    model.set_adapter("all")
    torch.testing.assert_close(model(x), stacked, **CLOSE)


@pytest.mark.parametrize("combination", ["linear", "compose"])
def test_weighted_adapters_on_unlike_layers(combination):
    """Where an adapter is absent its change is zero."""
    base = Net()
    model = adapted(base, a=config("bat", targets=["one", "two"]), c=config("bat", targets=["two", "three"]))
    model.base_model.add_weighted_adapter(["a", "c"], [0.5, 1.5], "all", combination_type=combination)
    each = {name: deltas(base, model, name) for name in ("a", "c", "all")}
    assert all("all" in layer.bone_block for _, layer in layers(model))
    torch.testing.assert_close(each["all"]["one"], 0.5 * each["a"]["one"], **CLOSE)
    torch.testing.assert_close(each["all"]["three"], 1.5 * each["c"]["three"], **CLOSE)


@pytest.mark.parametrize(
    "narrow",
    [
        {"layers_to_transform": [0]},
        {"exclude_modules": ["v_proj"]},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
    ],
    ids="+".join,
)
@pytest.mark.parametrize("swap", [False, True], ids=["", "swapped"])
def test_weighted_adapters_that_choose_their_layers_unlike(narrow, swap):
    """The sum is on every layer of either."""
    base = llama()
    wide = {"layers_to_transform": 2} if "layers_to_transform" in narrow else {}
    model = adapted(base, a=config("bat", targets=QV, **narrow), c=config("bat", targets=QV, **wide))
    names = ["c", "a"] if swap else ["a", "c"]
    model.base_model.add_weighted_adapter(names, [1.0, 1.0], "sum", combination_type="linear")
    each = {name: deltas(base, model, name) for name in ("a", "c", "sum")}
    for path, total in each["sum"].items():
        torch.testing.assert_close(total, each["a"][path] + each["c"][path], **CLOSE)


def test_a_weighted_adapter_leaves_the_others_as_they_were():
    """Active, trained, and with the same values; the new one is neither."""
    _, model = weighted(True)
    model.train()
    before = {n: (raw(p), p.requires_grad) for n, p in model.named_parameters()}
    model.base_model.add_weighted_adapter(["a", "c"], [1.0, 1.0], "sum")
    after = {n: (raw(p), p.requires_grad) for n, p in model.named_parameters()}
    assert {n: after[n] for n in before} == before
    assert model.active_adapters == ["a"]
    assert not any(trained for n, (_, trained) in after.items() if n.endswith(".sum"))


def test_a_weighted_adapter_is_saved_and_loaded(tmp_path):
    base, model = weighted(True, (4, 6))
    model.base_model.add_weighted_adapter(["a", "c"], [0.5, 2.0], "sum")
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    x = inputs(5, 12)
    back = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "sum")
    torch.testing.assert_close(back(x), model(x), **CLOSE)
    assert json.loads((tmp_path / "sum" / "adapter_config.json").read_text())["r"] == 12


@pytest.mark.parametrize(
    ("adapters", "weights", "combination", "message"),
    [
        (["a", "c"], [1.0, 1.0], None, "bat"),
        (["c", "x"], [1.0, 1.0], None, "12"),
        (["c", "x"], [1.0, 1.0], "linear", "12"),
        (["c", "d"], [1.0, 1.0], "linear", "bat_row"),
        (["a", "zzz"], [1.0, 1.0], None, "zzz"),
        (["a"], [1.0, 2.0], None, "1"),
        (["a", "c"], [1.0], None, "1"),
        (["a"], [1.0], "svd", "svd.*linear"),
        (["c"], [1.0], "cat", "cat.*linear.*compose"),
        (["a"], [1.0], "compose", "compose"),
        ([], [], None, "adapter"),
    ],
    ids=["forms", "r", "r-linear", "bat-row", "unknown", "long", "short", "svd", "cat", "tile-compose", "empty"],
)
def test_weighted_adapters_that_are_refused(adapters, weights, combination, message):
    base, model = mixed()
    before, active = {n: raw(t) for n, t in model.state_dict().items()}, model.active_adapters
    with pytest.raises(ValueError, match=message):
        model.base_model.add_weighted_adapter(adapters, weights, "new", combination_type=combination)
    assert {n: raw(t) for n, t in model.state_dict().items()} == before
    assert list(model.peft_config) == list(MIXED)
    assert model.active_adapters == active
    x = inputs(5, 12)
    torch.testing.assert_close(model(x), merged(base, model, ["a"])(x), **CLOSE)


# ---------------------------------------------------------------- the change alone, and PEFT's own export


@pytest.mark.parametrize("init_weights", INITS, ids=str)
def test_get_delta_weight_is_the_change_only(init_weights):
    """Laid out as the weight of the layer, (in, out) for a Conv1D: so PEFT's conversion expects it."""
    base = Net()
    model = adapted(base, default=config(init_weights), other=config("bat", 12))
    expected = deltas(base, model, "default")
    for state in ("plain", "list", "disabled", "merged"):
        if state == "list":
            activate(model, ["other", "default"])
        if state == "disabled":
            model.base_model.disable_adapter_layers()
        if state == "merged":
            model.merge_adapter(["other"])
        for path, layer in layers(model):
            delta = layer.get_delta_weight("default")
            delta = delta.T if isinstance(layer.get_base_layer(), Conv1D) else delta
            torch.testing.assert_close(delta, expected[path], **CLOSE)


@pytest.mark.skipif(not hasattr(peft, "convert_to_lora"), reason="this peft has no convert_to_lora")
@pytest.mark.parametrize("init_weights", INITS, ids=str)
def test_pefts_own_conversion(init_weights):
    base = Net()
    model = adapted(base, default=config(init_weights))
    assert all(layer.supports_lora_conversion("default") for _, layer in layers(model))
    options, state = peft.convert_to_lora(model, rank=12)
    lora = get_peft_model(copy.deepcopy(base), options)
    result = set_peft_model_state_dict(lora, state)
    assert not result.unexpected_keys
    x = inputs(5, 12)
    torch.testing.assert_close(lora(x), model(x), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- dtypes


@pytest.mark.parametrize("autocast", [True, False], ids=["fp32-adapter", "base-adapter"])
@pytest.mark.parametrize("init_weights", INITS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtype_of_the_base(dtype, init_weights, autocast):
    base = Net(dtype)
    model = get_peft_model(copy.deepcopy(base), config(init_weights), autocast_adapter_dtype=autocast)
    fill(model)
    block = model.base_model.model.one.bone_block["default"]
    assert block.dtype == (torch.float32 if autocast and dtype is not torch.float64 else dtype)
    x = inputs(40, 12, dtype=dtype)
    y = model(x)
    assert y.dtype == dtype
    expected = merged(base, model, ["default"])(x.double())
    tolerance = {torch.bfloat16: 0.06, torch.float16: 0.006, torch.float64: 1e-11}[dtype]
    assert (y - expected).abs().max() < tolerance * expected.abs().max()
    y.float().square().mean().backward()
    assert block.grad.dtype == block.dtype
    assert torch.isfinite(block.grad).all()


@pytest.mark.parametrize("r", [16, 128])
@pytest.mark.parametrize("init_weights", [True, *AFFINE], ids=str)
def test_accuracy_under_a_bf16_base(init_weights, r):
    """At most twice the error of the base layer's own rounding; the updates are as large as the weight."""
    torch.manual_seed(0)
    base = Single(nn.Linear(512, 512, dtype=torch.bfloat16))
    model = get_peft_model(copy.deepcopy(base), config(init_weights, r, ["layer"]))
    with torch.no_grad():
        model.base_model.model.layer.bone_block["default"].normal_(std=0.02 if init_weights is True else 0.05)
    x = inputs(64, 512, dtype=torch.bfloat16)

    def error(net: nn.Module, exact: nn.Module) -> float:
        want = exact(x.double())
        return float((net(x).double() - want).norm() / want.norm())

    with torch.no_grad():
        assert error(model, merged(base, model, ["default"])) < 2 * error(base, copy.deepcopy(base).double())


@pytest.mark.parametrize("init_weights", INITS, ids=str)
def test_autocast(init_weights):
    base = Net(torch.float32)
    model = adapted(base, default=config(init_weights))
    x = inputs(40, 12, dtype=torch.float32)
    block = model.base_model.model.one.bone_block["default"]
    model(x).square().mean().backward()
    exact, block.grad = block.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = model(x), base(x)
        y.float().square().mean().backward()
    assert y.dtype == plain.dtype == torch.bfloat16
    want = merged(base, model, ["default"])(x.double())
    assert (y - want).abs().max() < 0.06 * want.abs().max()
    assert block.grad.dtype == torch.float32
    assert (block.grad - exact).norm() < 0.05 * exact.norm()


@pytest.mark.smoke
@pytest.mark.parametrize("init_weights", INITS, ids=str)
def test_low_cpu_mem_usage_keeps_the_bits_of_the_file(tmp_path, init_weights):
    base = Net(torch.bfloat16)
    model = adapted(base, default=config(init_weights))
    model.save_pretrained(tmp_path)
    kept = load_file(tmp_path / "adapter_model.safetensors")
    assert not any(torch.equal(t, t.bfloat16().float()) for t in kept.values())
    for low in (True, False):
        back = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low)
        for path, layer in layers(back):
            block = layer.bone_block["default"]
            assert (block.dtype, block.device.type) == (torch.float32, "cpu")
            assert raw(block) == raw(kept[f"base_model.model.{path}.bone_block"])
        back.load_adapter(tmp_path, "second", low_cpu_mem_usage=low)
        assert raw(back.base_model.model.one.bone_block["second"]) == raw(kept["base_model.model.one.bone_block"])


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low"])
def test_a_loaded_adapter_in_the_dtype_of_the_base(tmp_path, low_cpu_mem_usage):
    base = Net(torch.bfloat16)
    adapted(base, default=config("bat")).save_pretrained(tmp_path)
    options = {"low_cpu_mem_usage": low_cpu_mem_usage, "autocast_adapter_dtype": False}
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **options)
    kept = load_file(tmp_path / "adapter_model.safetensors")
    for path, layer in layers(model):
        assert raw(layer.bone_block["default"]) == raw(kept[f"base_model.model.{path}.bone_block"].bfloat16())


# ---------------------------------------------------------------- refusals at the time of wrapping


def state(model: nn.Module) -> tuple[dict[str, bytes], list[str], list[bool]]:
    return (
        {n: raw(t) for n, t in model.state_dict().items()},
        [f"{n}:{type(m).__name__}" for n, m in model.named_modules()],
        [p.requires_grad for p in model.parameters()],
    )


def refused(model: nn.Module, options: BoneConfig) -> str:
    before = state(model)
    with pytest.raises(ValueError) as caught:
        get_peft_model(model, options)
    assert state(model) == before
    assert not wrapped(model)
    assert not hasattr(model, "peft_config")
    return str(caught.value)


@pytest.mark.smoke
@pytest.mark.parametrize("init_weights", AFFINE)
@pytest.mark.parametrize(
    ("targets", "where", "sizes"), [(["one", "two"], "one", "12 24"), (["three", "last"], "last", "10 12")]
)
def test_r_that_does_not_divide(init_weights, targets, where, sizes):
    """`last` comes after a layer that r does divide."""
    base = Net()
    base.last = nn.Linear(10, 12)
    r = 4 if where == "last" else 8
    message = refused(base, config(init_weights, r, targets))
    assert where in message
    assert all(number in message for number in (str(r), *sizes.split()))
    good = get_peft_model(base, config(init_weights, 4, ["three"]))  # nothing is left that would be in the way
    assert good(inputs(2, 12)).shape == (2, 12)


@pytest.mark.parametrize("init_weights", AFFINE)
def test_r_that_does_not_divide_as_second_adapter(init_weights):
    base = Net()
    base.last = nn.Linear(10, 12).double()
    model = adapted(base, a=config(init_weights))
    before = state(model)
    with pytest.raises(ValueError, match="last"):
        model.add_adapter("c", config(init_weights, 4, ["three", "last"]))
    assert state(model) == before
    assert list(model.peft_config) == ["a"]
    x = inputs(5, 12)
    torch.testing.assert_close(model(x), merged(base, model, ["a"])(x), **CLOSE)
    model.add_adapter("c", config(init_weights, 4, ["three"]))
    assert list(model.peft_config) == ["a", "c"]


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(8, 8)
        self.table, self.norm, self.image = nn.Embedding(8, 8), nn.LayerNorm(8), nn.Conv2d(8, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2)
        self.twice = nn.Bilinear(8, 8, 8)


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("table", "Embedding"),
        ("norm", "LayerNorm"),
        ("image", "Conv2d"),
        ("twice", "Bilinear"),
        ("attention", "MultiheadAttention"),
        ("out_proj", "MultiheadAttention"),
    ],
)
@pytest.mark.parametrize("init_weights", [True, "bat"], ids=str)
def test_layers_that_are_not_supported(init_weights, target, kind):
    message = refused(Zoo(), config(init_weights, 4, ["line", target]))
    assert target in message
    assert kind in message
    if target != "out_proj":
        assert all(supported in message for supported in ("torch.nn.Linear", "Conv1D", "quantised"))


def mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(**{**SHAPE, "num_local_experts": 2}))


@pytest.mark.parametrize(
    "targets",
    [
        ["w1", "w2", "w3"],
        ["q_proj", "w1", "w2", "w3"],
        ["q_proj", "gate_up_proj"],
        ["q_proj", "down_proj"],
        ["q_proj", "experts"],
    ],
    ids="+".join,
)
def test_fused_experts(targets):
    """transformers 5 has them as one 3-D parameter; a name of old or new must not be passed over in silence."""
    model = mixtral()
    if not any(p.ndim == 3 for p in model.parameters()):
        pytest.skip("the experts of this transformers are linear layers")
    message = refused(model, config(targets=targets))
    assert "linear" in message.lower()
    assert any(name in message for name in ("w1", "gate_up_proj", "down_proj", "experts"))


def test_a_name_of_nothing():
    assert "nothing" in refused(Net(), config(targets=["nothing"]))


def test_offloaded_weights():
    """The tile form asks the base layer for its output, which is what offloading hooks serve; the others read W."""
    model = adapted(Net(), default=config("bat"))
    model.base_model.model.two.base_layer.to("meta")
    with pytest.raises((RuntimeError, ValueError), match=r"offload|meta"):
        model(inputs(5, 12))
    before = raw(model.base_model.model.one.base_layer.weight)
    with pytest.raises((RuntimeError, ValueError), match=r"offload|meta"):
        model.merge_adapter()
    assert raw(model.base_model.model.one.base_layer.weight) == before
    assert not any(layer.merged for _, layer in layers(model))


@pytest.mark.parametrize("init_weights", INITS, ids=str)
def test_a_partitioned_weight(init_weights):
    """Only bat reads W without calling the base layer."""
    base = Net()
    model = adapted(base, default=config(init_weights))
    for _, layer in layers(model):
        layer.get_base_layer().weight.ds_id = 0
    x = inputs(5, 12)
    if init_weights == "bat":
        with pytest.raises(RuntimeError, match=r"bat|block-affine") as caught:
            model(x)
        assert "ZeRO-3" in str(caught.value)
        assert "tile" in str(caught.value)
    else:
        y = model(x)
        y.sum().backward()
        torch.testing.assert_close(y, merged(base, model, ["default"])(x), **CLOSE)


# ---------------------------------------------------------------- loading

FIRST, SECOND = "base_model.model.one.bone_block", "base_model.model.three.bone_block"
NEW = "base_model.model.ninth.bone_block"
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def directory(
    folder: Path, form: Any = "bat", change: Change | None = None, /, **options: Any
) -> tuple[nn.Module, Path]:
    """A saved adapter, damaged; options are changes of its config, None removes a key."""
    base = Net(torch.float32)
    adapted(base, default=config(form)).save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    if change:
        save_file(change(load_file(file)), file)
    content = json.loads((folder / "adapter_config.json").read_text()) | options
    content = {key: value for key, value in content.items() if not (key in options and value is None)}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return base, folder


def put(name: str, edit: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors: tensors | {name: edit(tensors[name]).contiguous()}


def spoilt(value: float) -> Change:
    def edit(tensor: Tensor) -> Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return put(SECOND, edit)


DAMAGE: dict[str, tuple[Any, Change, str]] = {
    "nan": ("bat", spoilt(math.nan), "three"),
    "inf": ("bat_row", spoilt(math.inf), "three"),
    "tile-nan": (True, spoilt(math.nan), "three"),
    "transposed": (True, put(SECOND, lambda t: t.T), "three"),
    "bat-transposed": ("bat", put(FIRST, lambda t: t.transpose(0, 2)), "one"),
    "integer": (True, put(SECOND, lambda t: (10 * t).int()), "three"),
    "r": (True, put(SECOND, lambda t: t[:2]), "three"),
    "bat-r": ("bat", put(FIRST, lambda t: t.reshape(-1)[: 12 * 4].reshape(12, 2, 2)), "one"),
    "form": (True, put(SECOND, lambda t: t.reshape(-1)[:48].reshape(3, 4, 4)), "three"),
    "tile-for-bat": ("bat", put(SECOND, lambda t: t.reshape(4, 12)), "three"),
    "no-elements": (True, put(SECOND, lambda t: t[:0]), "three"),
    "nothing": ("bat", lambda tensors: {}, "tensor"),
}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused(tmp_path, damage, low_cpu_mem_usage):
    init_weights, change, where = DAMAGE[damage]
    base, folder = directory(tmp_path, init_weights, change)
    with pytest.raises(ValueError, match=where):
        PeftModel.from_pretrained(copy.deepcopy(base), folder, low_cpu_mem_usage=low_cpu_mem_usage)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_dict_is_refused_before_anything_is_copied(damage):
    init_weights, change, where = DAMAGE[damage]
    base = Net(torch.float32)
    donor, model = adapted(base, default=config(init_weights)), adapted(base, default=config(init_weights))
    fill(donor, 99)
    tensors = change(peft.get_peft_model_state_dict(donor))
    before = state(model)
    with pytest.raises(ValueError, match=where):
        set_peft_model_state_dict(model, tensors)
    assert state(model) == before


def test_every_bad_tensor_is_named():
    """One message, not one a run."""
    base = Net(torch.float32)
    model = adapted(base, default=config("bat"))
    tensors = peft.get_peft_model_state_dict(model)
    broken = spoilt(math.nan)(put(FIRST, lambda t: t[:1])({k: v.clone() for k, v in tensors.items()}))
    with pytest.raises(ValueError, match="one") as caught:
        set_peft_model_state_dict(model, broken)
    assert "three" in str(caught.value)
    assert "two" not in str(caught.value)
    assert "(1, 4, 4)" in str(caught.value)
    assert "(6, 4, 4)" in str(caught.value)


def test_a_truncated_file(tmp_path):
    base, folder = directory(tmp_path)
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-7], b""):
        file.write_bytes(content)
        with pytest.raises(Exception, match=r"(?i)header|incomplete|invalid|metadata|empty|safetensors"):
            PeftModel.from_pretrained(copy.deepcopy(base), folder)


def one_warning(caught: list[warnings.WarningMessage]) -> str:
    told = [str(w.message) for w in caught if "bone_block" in str(w.message)]
    assert len(told) == 1
    return told[0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: {k: t for k, t in tensors.items() if k != FIRST}, "one"),
        (lambda tensors: tensors | {NEW: tensors[SECOND].clone()}, "ninth"),
        (lambda tensors: tensors | {f"{FIRST}.other": tensors[FIRST].clone()}, "one.bone_block.other"),
    ],
    ids=["missing", "unknown", "foreign"],
)
def test_a_tensor_too_few_or_too_many_is_one_warning(tmp_path, change, named):
    base, folder = directory(tmp_path, "bat", change)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    assert named in one_warning(caught)
    kept = load_file(folder / "adapter_model.safetensors")
    for path, layer in layers(model):
        expected = kept.get(f"base_model.model.{path}.bone_block", torch.zeros(6, 4, 4))
        assert raw(layer.bone_block["default"]) == raw(expected)


@pytest.mark.smoke
def test_a_foreign_tensor_does_not_reach_the_adapter_of_that_name(tmp_path):
    """PEFT <= 0.18 wrote the blocks of `other` into the file of every adapter."""
    base, folder = directory(tmp_path, "bat", lambda tensors: tensors | {f"{FIRST}.other": 9 + tensors[FIRST]})
    model = adapted(base, other=config("bat"))
    before = state(model)[0]
    with pytest.warns(UserWarning, match=r"bone_block\.other"):
        model.load_adapter(folder, "mine")
    after = state(model)[0]
    assert {name: after[name] for name in before} == before
    assert raw(model.base_model.model.one.bone_block["mine"]) == raw(
        load_file(folder / "adapter_model.safetensors")[FIRST]
    )


@pytest.mark.parametrize(
    ("init_weights", "changes"),
    [
        ("bat", {"r": None}),
        (True, {"r": None}),
        ("bat", {"r": 2}),
        (True, {"r": 2}),
        ("bat", {"init_weights": "mini"}),
        ("bat", {"init_weights": "bat_row"}),
        ("bat", {"init_weights": True, "r": 2}),
        (True, {"init_weights": "bat"}),
        (True, {"init_weights": "bat_row"}),
        ("bat", {"bias": "lora_only"}),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_its_file(tmp_path, init_weights, changes):
    base, folder = directory(tmp_path, init_weights, **changes)
    with pytest.raises(ValueError):
        PeftModel.from_pretrained(copy.deepcopy(base), folder)


@pytest.mark.smoke
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low"])
@pytest.mark.parametrize("init_weights", [True, False], ids=str)
def test_a_development_checkpoint_is_a_bat(tmp_path, init_weights, low_cpu_mem_usage):
    """November 2024: three dimensions under init_weights true."""
    base, folder = directory(tmp_path / "old", "bat", init_weights=init_weights)
    options = {"low_cpu_mem_usage": low_cpu_mem_usage}
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True, **options)
    assert all(layer.bone_form == {"default": "bat"} for _, layer in layers(model))
    assert all(p.requires_grad == ("bone_block" in n) for n, p in model.named_parameters())
    kept = load_file(folder / "adapter_model.safetensors")
    for path, layer in layers(model):
        assert raw(layer.bone_block["default"]) == raw(kept[f"base_model.model.{path}.bone_block"])
    twin = adapted(base, default=config("bat"))
    set_peft_model_state_dict(twin, kept)
    x = inputs(5, 12, dtype=torch.float32)
    torch.testing.assert_close(model(x), twin(x))
    assert model.peft_config["default"].form == "bat"
    model.save_pretrained(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["init_weights"] == "bat"


def test_a_development_checkpoint_beside_a_tile_of_the_same_config(tmp_path):
    """The config object may be shared: only the loaded adapter becomes a bat."""
    base, folder = directory(tmp_path, "bat", init_weights=True)
    shared = config(True)
    model, neighbour = adapted(base, default=shared), adapted(base, default=shared)
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    assert model.base_model.model.one.bone_form == {"default": "bat"}
    assert neighbour.base_model.model.one.bone_form == {"default": "tile"}
    x = inputs(5, 12, dtype=torch.float32)
    assert neighbour.peft_config["default"].form == "tile"
    expected = merged(base, neighbour, ["default"])(x.double())
    torch.testing.assert_close(neighbour(x).double(), expected, rtol=1e-4, atol=1e-5)


def test_bat_tensors_under_another_explicit_form_are_an_error(tmp_path):
    """A bool may be the old spelling of bat; "bat_row" never is."""
    base, folder = directory(tmp_path, "bat", init_weights="bat_row")
    with pytest.raises(ValueError) as caught:
        PeftModel.from_pretrained(copy.deepcopy(base), folder)
    assert "(6, 4, 4)" in str(caught.value)
    assert "(3, 4, 4)" in str(caught.value)


def test_no_warning_of_experts_where_there_are_only_tokens_of_three_dimensions():
    net = Net()
    net.cls_token = nn.Parameter(torch.zeros(1, 1, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(net, config(targets="all-linear"))
