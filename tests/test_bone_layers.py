"""Layers and uses that a weight alone does not describe: parametrised, hooked, offloaded, shared, trained along."""

import warnings
from collections import OrderedDict

import pytest
import torch
from accelerate import cpu_offload
from bone_native import OURS
from peft import BoneConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

pytestmark = OURS

FORMS = [True, "bat", "bat_row"]
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


class Doubling(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def adapted(layer: nn.Module, init_weights: bool | str = True, **options: object) -> nn.Module:
    net = nn.Sequential(OrderedDict(fc=layer))
    model = get_peft_model(net, BoneConfig(r=4, init_weights=init_weights, target_modules=["fc"], **options))
    for name, parameter in model.named_parameters():
        if "bone_block" in name:
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    return model


COMPUTED = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(8, 12)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(8, 12)),
    "old weight_norm": lambda: weight_norm(nn.Linear(8, 12)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(8, 12), "weight", amount=0.3),
    "own forward": lambda: Doubling(8, 12),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("layer", COMPUTED.values(), ids=COMPUTED)
@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_computed_weight_is_not_merged_into(layer, merge):
    torch.manual_seed(0)
    model = adapted(layer()).eval()
    before = model(X)
    with pytest.raises(ValueError, match=r"would not give the same after a merge.*\(fc; no weight of the model"):
        getattr(model, merge)()
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("init_weights", FORMS)
def test_the_base_may_be_trained_along(init_weights):
    torch.manual_seed(0)
    model = adapted(nn.Linear(8, 12), init_weights).requires_grad_(True)
    layer = model.base_model.model[0]
    model(X).square().sum().backward()
    weight = layer.get_base_layer().weight
    analytic = weight.grad.clone()
    step = torch.randn_like(weight)
    with torch.no_grad():
        outputs = []
        for sign in (1, -1):
            weight += sign * 1e-2 * step
            outputs.append(model(X).double().square().sum())
            weight -= sign * 1e-2 * step
    numeric = (outputs[0] - outputs[1]) / 2e-2
    torch.testing.assert_close((analytic * step).sum().double(), numeric, rtol=1e-3, atol=1e-3)


def test_bat_says_that_hooks_do_not_run():
    layer = nn.Linear(8, 12)
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.warns(UserWarning, match="a layer with hooks: they do not run"):
        adapted(layer, "bat")


@pytest.mark.parametrize("init_weights", [True, "bat_row"])
def test_tile_and_row_run_the_hooks(init_weights):
    layer = nn.Linear(8, 12)
    ran = []
    layer.register_forward_hook(lambda module, inputs, output: ran.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted(layer, init_weights)(X)
    assert ran == [1]


@pytest.mark.parametrize("change", ["load", "step"])
def test_a_weight_that_changed_while_merged_is_told(change):
    model = adapted(nn.Linear(8, 12))
    weight = model.base_model.model[0].get_base_layer().weight
    before = weight.detach().clone()
    model.merge_adapter()
    if change == "load":
        model.load_state_dict({key: value + 1 for key, value in model.state_dict().items()})
    else:
        weight.requires_grad_(True)
        model(X).sum().backward()
        torch.optim.SGD([weight], lr=0.1).step()
    with pytest.warns(UserWarning, match="was changed since; unmerging restores what was before"):
        model.unmerge_adapter()
    assert torch.equal(weight, before)


def test_unmerging_an_untouched_weight_says_nothing():
    model = adapted(nn.Linear(8, 12))
    model.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.unmerge_adapter()


def test_views_of_one_memory_are_tied():
    memory = torch.randn(12, 8)
    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    layers[0].weight, layers[1].weight = nn.Parameter(memory[:8]), nn.Parameter(memory[4:])
    model = get_peft_model(layers, BoneConfig(r=4, target_modules=["0"]))
    with pytest.raises(ValueError, match="0 shares its weight with 1"):
        model.merge_adapter()
    layers = nn.Sequential(nn.Linear(8, 6), nn.Linear(8, 6))
    layers[0].weight, layers[1].weight = nn.Parameter(memory[:6]), nn.Parameter(memory[6:])
    get_peft_model(layers, BoneConfig(r=4, target_modules=["0"])).merge_adapter()


def test_layers_that_others_read_past_the_adapter_are_refused():
    encoder = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    with pytest.raises(ValueError, match="TransformerEncoderLayer reads this weight itself"):
        get_peft_model(encoder, BoneConfig(r=4, target_modules=["linear1"]))
    assert type(encoder[0].linear1) is nn.Linear


@pytest.mark.parametrize("init_weights", FORMS)
def test_an_adapter_that_is_named_twice_counts_once(init_weights):
    model = adapted(nn.Linear(8, 12), init_weights)
    expected = model(X)
    model.base_model.set_adapter(["default", "default"])
    assert torch.equal(model(X), expected)
    torch.testing.assert_close(model.merge_and_unload()(X), expected)


def test_the_input_cast_of_the_host_can_be_switched():
    model = adapted(nn.Linear(8, 12))
    expected = model(X)
    with disable_input_dtype_casting(model):
        assert torch.equal(model(X), expected)


@pytest.mark.parametrize("init_weights", [True, "bat_row"])
def test_an_offloaded_base_takes_an_adapter(init_weights):
    torch.manual_seed(0)
    layer = nn.Linear(8, 12)
    expected = adapted(nn.Linear(8, 12), init_weights)
    expected.base_model.model[0].get_base_layer().load_state_dict(layer.state_dict())
    model = nn.Sequential(layer)
    cpu_offload(model, execution_device=torch.device("cpu"))
    model = get_peft_model(model, BoneConfig(r=4, init_weights=init_weights, target_modules=["0"]))
    block = model.base_model.model[0].bone_block["default"]
    assert not block.is_meta
    block.data.copy_(expected.base_model.model[0].bone_block["default"])
    torch.testing.assert_close(model(X), expected(X))


@pytest.mark.parametrize("init_weights", FORMS)
def test_blocks_without_values_are_not_computed_with(init_weights):
    config = BoneConfig(r=4, init_weights=init_weights, target_modules=["0"])
    model = inject_adapter_in_model(config, nn.Sequential(nn.Linear(8, 12)), low_cpu_mem_usage=True)
    with pytest.raises(RuntimeError, match="never loaded"):
        model(X)


@pytest.mark.parametrize("init_weights", FORMS)
def test_a_layer_with_an_adapter_of_another_method_is_refused(init_weights):
    net = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(8, 12)))
    before = net(X)
    with pytest.raises(ValueError, match="0: the layer carries an adapter of another method, Linear"):
        inject_adapter_in_model(BoneConfig(r=4, init_weights=init_weights, target_modules=["0"]), net)
    assert torch.equal(net(X), before)


def test_a_state_dict_on_meta_loads():
    model = adapted(nn.Linear(8, 12))
    model.load_state_dict({key: value.to("meta") for key, value in model.state_dict().items()}, assign=True)
    assert model.base_model.model[0].bone_block["default"].is_meta
