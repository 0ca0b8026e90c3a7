"""Quantised bases: the three forms on weights that bitsandbytes, torchao or HQQ hold, all on the CPU.

The oracle works in float64 on the dequantised weight, which is read here in the library's own way, not through PEFT.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_ext import compat

if compat.has_native_bone():
    pytest.skip("this peft has Bone itself", allow_module_level=True)

from bone_oracle import updated
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_ext import BoneConfig
from hf_ext.bone_adapter import BoneLayer

quantization = pytest.importorskip("peft.utils.quantization_utils", reason="peft >= 0.20 reads quantised layers")

IN, HIDDEN, OUT, R = 64, 128, 64, 16  # packing for AVX512 needs multiples of 64 inputs and 32 outputs
FORMS = {"tile": True, "bat": "bat", "bat_row": "bat_row"}
BNB = ("int8", "nf4", "fp4", "nf4-nested", "nf4-in-bf16")
KINDS = ("fake", "fake-hqq", *BNB, "torchao", "hqq")


# ---------------------------------------------------------------- a library of our own, for hosts without the others


class CodedLinear(nn.Module):
    """int8 codes with one scale a row, which hangs on the weight as bitsandbytes' does."""

    def __init__(self, linear: nn.Linear, replaced: bool = False):
        super().__init__()
        self.replaced = replaced  # by a new layer, with every write
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = coded(linear.weight), linear.bias

    def forward(self, x):
        return F.linear(x, decoded(self.weight).to(x.dtype), self.bias)


def coded(weight):
    scale = weight.detach().abs().amax(1, keepdim=True) / 127
    codes = nn.Parameter((weight.detach() / scale).round().to(torch.int8), requires_grad=False)
    codes.scale, codes.is_coded = scale, True
    return codes


def decoded(weight):
    assert weight.is_coded
    return weight.to(weight.scale.dtype) * weight.scale


class CodedBackend(quantization.QuantizationBackend):
    layer_type, backend_name, supports_merge = "linear", "coded", True

    def get_base_weight(self, base_layer):
        return decoded(base_layer.weight)

    def set_base_weight(self, peft_layer, weight_data):
        base = peft_layer.get_base_layer()
        base.weight.is_coded = False  # as bitsandbytes' backend spoils the 4-bit weight that it replaces
        base.weight = coded(weight_data)


class ReplacingBackend(CodedBackend):
    """As HQQ's, which puts in a new layer."""

    def set_base_weight(self, peft_layer, weight_data):
        base = peft_layer.get_base_layer()
        linear = nn.Linear(base.in_features, base.out_features)
        linear.weight, linear.bias = nn.Parameter(weight_data), base.bias
        peft_layer.base_layer = CodedLinear(linear, replaced=True)


class SealedBackend(quantization.ForwardOnlyQuantizationBackend):
    """What PEFT gives for GPTQ, AWQ, AQLM, EETQ..."""

    def __init__(self):
        super().__init__("gptq")


@pytest.fixture(autouse=True)
def backend_of_coded_layers(monkeypatch):
    choose = {False: CodedBackend, True: ReplacingBackend}
    resolve = quantization.resolve_quantization_backend

    def chosen(layer, **kwargs):
        return choose[layer.replaced]() if isinstance(layer, CodedLinear) else resolve(layer, **kwargs)

    monkeypatch.setattr("peft.utils.resolve_quantization_backend", chosen)
    return choose


# ---------------------------------------------------------------- each library: quantise, read, and everything it holds


def quantised(kind: str, linear: nn.Linear) -> nn.Module:
    if kind.startswith("fake"):
        return CodedLinear(linear, replaced=kind == "fake-hqq")
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        holder = nn.Sequential(linear)
        quantize_(holder, Int8WeightOnlyConfig())
        return holder[0]
    if kind == "hqq":
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        return HQQLinear(linear, BaseQuantizeConfig(4, 64), compute_dtype=torch.float32, device="cpu", initialize=True)
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    shape = linear.in_features, linear.out_features
    if kind == "int8":
        layer = Linear8bitLt(*shape, has_fp16_weights=False)
    else:
        in_bf16 = torch.bfloat16 if kind.endswith("bf16") else None
        layer = Linear4bit(
            *shape, compute_dtype=in_bf16, compress_statistics=kind.endswith("nested"), quant_type=kind[:3]
        )
    layer.load_state_dict(linear.state_dict())
    if kind.endswith("bf16"):
        layer.bias.data = layer.bias.data.bfloat16()  # as its first forward would
    return layer.to("cpu")


def readable(layer: nn.Module) -> torch.Tensor:
    """The dequantised weight, without PEFT."""
    if isinstance(layer, CodedLinear):
        return decoded(layer.weight)
    if hasattr(layer, "W_q"):
        return layer.dequantize().detach()
    if hasattr(layer.weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if hasattr(layer, "state"):
        scale = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        return layer.weight.data.float() * scale[:, None] / 127
    return layer.weight.dequantize()


def bytes_of(module: nn.Module) -> dict[str, bytes]:
    """Every tensor by which a layer, or every adapted layer of a model, answers for its weight."""
    found = {}

    def collect(name, thing):
        if isinstance(thing, torch.Tensor):
            if type(thing).__module__.startswith("torchao"):
                collect(f"{name}.qdata", thing.qdata)
                collect(f"{name}.scale", thing.scale)
            else:
                found[name] = bytes(thing.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            for key in ("quant_state", "scale"):
                collect(f"{name}.{key}", vars(thing).get(key))
        elif hasattr(thing, "absmax"):
            for key in ("absmax", "code", "offset"):
                collect(f"{name}.{key}", getattr(thing, key))
            collect(f"{name}.state2", thing.state2)
        elif isinstance(thing, dict):
            for key, value in thing.items():
                collect(f"{name}.{key}", value)

    for index, layer in enumerate([adapted.get_base_layer() for adapted in layers_of(module)] or [module]):
        if hasattr(layer, "W_q"):  # HQQ
            collect(f"{index}.W_q", layer.W_q)
            collect(f"{index}.meta", layer.meta)
            continue
        collect(f"{index}.weight", layer.weight)
        collect(f"{index}.quant_state", getattr(layer, "quant_state", None))
        if hasattr(layer, "state"):  # weight.CB and weight.SCB move here with the first forward
            collect(f"{index}.CB", layer.weight.data if layer.state.CB is None else layer.state.CB)
            collect(f"{index}.SCB", layer.weight.SCB if layer.state.CB is None else layer.state.SCB)
    assert found
    return found


def with_library(kind: str) -> str:
    library = {"fake": "torch", "fake-hqq": "torch", "torchao": "torchao", "hqq": "hqq"}.get(kind, "bitsandbytes")
    pytest.importorskip(library)
    return kind


@pytest.fixture(params=KINDS)
def kind(request):
    return with_library(request.param)


@pytest.fixture(params=BNB)
def bnb_kind(request):
    return with_library(request.param)


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


class Net(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = (quantised(kind, nn.Linear(*shape)) for shape in ((IN, HIDDEN), (HIDDEN, OUT)))
        if kind == "torchao":  # what transformers leaves on a model that it quantised
            from torchao.quantization import Int8WeightOnlyConfig

            config = SimpleNamespace(get_apply_tensor_subclass=Int8WeightOnlyConfig)
            self.hf_quantizer = SimpleNamespace(quantization_config=config)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def adapted(kind: str, *forms: str, filled: bool = True, **config) -> PeftModel:
    """Net with one adapter a form, "a", "c" and "d", all of them active."""
    names = "acd"[: len(forms)]
    model = None
    for name, form in zip(names, forms, strict=True):
        one = BoneConfig(r=R, init_weights=FORMS[form], target_modules=["first", "last"], **config)
        if model is None:
            model = get_peft_model(Net(kind), one, adapter_name=name)
        else:
            model.add_adapter(name, one)
    model.base_model.set_adapter(list(names))
    if filled:
        torch.manual_seed(1)
        for parameter in blocks_of(model).values():
            parameter.data.normal_(std=0.1)
    return model


def layers_of(model: nn.Module) -> list[BoneLayer]:
    return [module for module in model.modules() if isinstance(module, BoneLayer)]


def blocks_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if ".bone_block." in name}


def inputs(rows: int = 5, dtype=torch.float32):
    return torch.randn(rows, IN, generator=torch.Generator().manual_seed(2)).to(dtype)


def oracle_weight(layer: BoneLayer, names: str, blocks=None) -> torch.Tensor:
    weight = readable(layer.get_base_layer()).double()
    for name in names:
        block = layer.bone_block[name].detach().double() if blocks is None else blocks[name]
        weight = updated(FORMS[layer.bone_form[name]], weight, block)
    return weight


def assert_close_to(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5):
    scale = expected.abs().max().item()
    torch.testing.assert_close(found.double(), expected.double(), atol=tolerance * scale, rtol=0)


# ---------------------------------------------------------------- forward and backward


def test_outputs_and_gradients_are_those_of_the_dequantised_weight(kind, form):
    model = adapted(kind, form).train()
    layer = layers_of(model)[0]
    x = inputs().requires_grad_()
    y = layer(x)
    up = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    y.backward(up)

    exact_x, exact_block = x.detach().double().requires_grad_(), layer.bone_block["a"].detach().double()
    exact_block.requires_grad_()
    bias = layer.get_base_layer().bias.detach().double()
    exact = exact_x @ oracle_weight(layer, "a", {"a": exact_block}).T + bias
    exact.backward(up.double())
    tolerance = 2e-2 if kind == "nf4-in-bf16" else 1e-5
    assert y.dtype == torch.float32
    assert_close_to(y, exact, tolerance)
    assert_close_to(x.grad, exact_x.grad, tolerance)
    assert_close_to(layer.bone_block["a"].grad, exact_block.grad, tolerance)


def test_forms_stack_on_one_layer(kind):
    model = adapted(kind, "tile", "bat", "bat_row").train()
    layer = layers_of(model)[0]
    exact = inputs().double() @ oracle_weight(layer, "acd").T + layer.get_base_layer().bias.double()
    assert_close_to(layer(inputs()), exact, 2e-2 if kind == "nf4-in-bf16" else 1e-5)


def test_fresh_adapter_trains_and_the_base_does_not_move(kind, form):
    model = adapted(kind, form, filled=False).train()
    before, target = bytes_of(model), torch.ones(5, OUT)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = (model(inputs()) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert bytes_of(model) == before


def test_switched_off_the_base_answers(kind, form):
    model = adapted(kind, form).eval()
    x = inputs()
    with torch.no_grad():
        expected = layers_of(model)[0].get_base_layer()(x)
        with model.disable_adapter():
            assert torch.equal(layers_of(model)[0](x), expected)
        assert not torch.equal(layers_of(model)[0](x), expected)


@pytest.mark.parametrize("kind", ["fake", "nf4"])
def test_bf16_activations_get_bf16_accuracy(kind, form):
    model = adapted(with_library(kind), form).train()
    layer, x = layers_of(model)[0], inputs(64, torch.bfloat16)
    if kind == "fake":
        layer.get_base_layer().bias.data = layer.get_base_layer().bias.data.bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert_close_to(y, x.double() @ oracle_weight(layer, "a").T + layer.get_base_layer().bias.double(), 1.5e-2)


@pytest.mark.parametrize("form", ["tile", "bat_row"])
def test_tile_and_row_form_read_no_weight_before_the_merge(kind, form, monkeypatch):
    model = adapted(kind, form).train()
    backend = type(layers_of(model)[0].quantization_backend)

    def refuse(*_):
        raise AssertionError("dequantised")

    monkeypatch.setattr(backend, "get_base_weight", refuse)
    model(inputs()).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in blocks_of(model).values())
    with pytest.raises(AssertionError, match="dequantised"):
        model.merge_adapter()


def test_block_affine_form_keeps_its_input_and_its_blocks_only(kind):
    model = adapted(kind, "bat").train()
    layer, x = layers_of(model)[0], inputs().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    block = layer.bone_block["a"]
    assert sum(t.nbytes for t in kept) == x.nbytes + block.nbytes


# ---------------------------------------------------------------- merging


def requantised(kind: str, layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """`weight` written as the library would write a new layer, and read again."""
    linear = nn.Linear(layer.in_features, layer.out_features)
    linear.weight.data = weight.float()
    return readable(quantised(kind, linear))


def assert_same_codes(kind: str, layer: BoneLayer, expected: torch.Tensor):
    """The merged layer holds `expected` (out, in) quantised once: but for the ties of rounding, the same values."""
    once = requantised(kind, layer, expected)
    differing = (readable(layer.get_base_layer()) - once).abs() > 1e-4 * once.abs().max()
    assert differing.float().mean() < 2e-3


def test_merged_weight_is_the_requantised_sum(kind, form):
    model = adapted(kind, form).eval()
    expected = [oracle_weight(layer, "a") for layer in layers_of(model)]
    before = bytes_of(model)
    model.merge_adapter()
    assert bytes_of(model) != before
    for layer, weight in zip(layers_of(model), expected, strict=True):
        assert_same_codes(kind, layer, weight)


@pytest.mark.parametrize("used", [False, True], ids=["before_the_first_forward", "after_it"])
def test_unmerging_restores_every_byte(kind, form, used):
    model = adapted(kind, form).eval()
    before = bytes_of(model)
    with torch.no_grad():
        expected = model(inputs())
        if not used:
            model = adapted(kind, form).eval()
        bases = [layer.get_base_layer() for layer in layers_of(model)]
        model.merge_adapter()
        merged = model(inputs())
        assert not torch.equal(merged, expected)
        model.unmerge_adapter()
        assert bytes_of(model) == before
        assert [layer.get_base_layer() for layer in layers_of(model)] == bases
        assert torch.equal(model(inputs()), expected)
    assert bytes_of(model) == before  # a forward with the merged state would have written it back
    model.merge_adapter()
    with torch.no_grad():
        assert torch.equal(model(inputs()), merged)


def test_unmerged_layer_still_moves_and_saves_as_before(bnb_kind):
    """A 4-bit weight that believes itself unquantised would be quantised again by `.to`."""
    model = adapted(bnb_kind, "tile").eval()
    layer = layers_of(model)[0].get_base_layer()
    saved, before = {k: v.clone() for k, v in layer.state_dict().items()}, bytes_of(layer)
    model.merge_adapter()
    model.unmerge_adapter()
    assert layer.state_dict().keys() == saved.keys()
    assert all(torch.equal(value, saved[key]) for key, value in layer.state_dict().items())
    assert bytes_of(layer.to("cpu")) == before


def test_adapters_merged_one_after_the_other_are_quantised_once(kind):
    model, at_once = adapted(kind, "tile", "bat"), adapted(kind, "tile", "bat")
    expected = [oracle_weight(layer, "ac") for layer in layers_of(model)]
    before = bytes_of(model)
    model.merge_adapter(["a"])
    model.merge_adapter(["c"])
    at_once.merge_adapter(["a", "c"])
    assert bytes_of(model) == bytes_of(at_once)
    for layer, weight in zip(layers_of(model), expected, strict=True):
        assert_same_codes(kind, layer, weight)
    model.unmerge_adapter()
    assert bytes_of(model) == before


def test_failed_safe_merge_changes_no_byte_of_any_layer(kind, form):
    model = adapted(kind, form)
    before = bytes_of(model)
    layers_of(model)[-1].bone_block["a"].data.view(-1)[3] = float("nan")
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter a seems.*last"):
        model.merge_adapter(safe_merge=True)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)
    assert bytes_of(model) == before
    assert not any(layer.merged for layer in layers_of(model))


def test_merge_and_unload_leaves_a_layer_of_the_library(kind, form):
    model, merged = adapted(kind, form), adapted(kind, form)
    kinds = [type(layer.get_base_layer()) for layer in layers_of(model)]
    merged.merge_adapter()
    plain = model.merge_and_unload()
    assert [type(plain.first), type(plain.last)] == kinds
    assert readable(plain.first).equal(readable(layers_of(merged)[0].get_base_layer()))
    with torch.no_grad():
        assert torch.equal(plain.eval()(inputs()), merged.eval()(inputs()))


def test_unload_gives_the_base_back(kind, form):
    model = adapted(kind, form)
    before = [bytes_of(layer.get_base_layer()) for layer in layers_of(model)]
    model.merge_adapter()
    plain = model.unload()
    assert [bytes_of(plain.first), bytes_of(plain.last)] == before


@pytest.mark.parametrize("kind", ["fake", "fake-hqq", *BNB, "torchao"])
def test_copy_of_a_merged_model_is_restored_by_itself(kind):
    model = adapted(with_library(kind), "bat")
    before = bytes_of(model)
    model.merge_adapter()
    merged = bytes_of(model)
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert bytes_of(twin) == before
    assert bytes_of(model) == merged
    model.unmerge_adapter()
    assert bytes_of(model) == before


def test_without_a_kept_base_the_inverse_is_quantised(kind, form, monkeypatch):
    monkeypatch.setattr(BoneLayer, "keep_base_on_merge", False)
    model = adapted(kind, form)
    weights = [readable(layer.get_base_layer()).clone() for layer in layers_of(model)]
    model.merge_adapter()
    merged = [readable(layer.get_base_layer()).clone() for layer in layers_of(model)]
    with pytest.warns(UserWarning, match="drift by rounding"):
        model.unmerge_adapter()
    for layer, weight, changed in zip(layers_of(model), weights, merged, strict=True):
        back = readable(layer.get_base_layer())
        assert (back - weight).norm() < 0.5 * (changed - weight).norm()


def test_delta_is_that_of_the_dequantised_weight_also_while_merged(kind, form):
    model = adapted(kind, form)
    layer = layers_of(model)[0]
    expected = oracle_weight(layer, "a") - oracle_weight(layer, "")
    assert_close_to(layer.get_delta_weight("a"), expected, 1e-5)
    model.merge_adapter()
    merged = bytes_of(model)
    assert_close_to(layer.get_delta_weight("a"), expected, 1e-5)
    assert bytes_of(model) == merged


def test_weighted_adapter_needs_no_weight(backend_of_coded_layers):
    backend_of_coded_layers[False] = SealedBackend
    model = adapted("fake", "tile", "tile")
    model.base_model.add_weighted_adapter(["a", "c"], [0.5, -2.0], "sum")
    for layer in layers_of(model):
        a, c = (layer.bone_block[name].data for name in "ac")
        torch.testing.assert_close(layer.bone_block["sum"].data, 0.5 * a - 2.0 * c)


def test_unmerged_weight_follows_the_layer_to_its_device():
    model = adapted("fake", "tile")
    model.merge_adapter()
    model.to("meta")
    model.unmerge_adapter()
    assert {layer.get_base_layer().weight.device.type for layer in layers_of(model)} == {"meta"}


def test_merge_and_unload_keeps_no_second_weight(monkeypatch):
    monkeypatch.setattr(compat, "keep_base", lambda _: pytest.fail("a base weight was kept that nobody can restore"))
    adapted("fake", "tile").merge_and_unload()


# ---------------------------------------------------------------- layers that cannot be read


def test_sealed_layers_take_tile_and_row_form(backend_of_coded_layers, form):
    backend_of_coded_layers[False] = SealedBackend
    if form == "bat":
        with pytest.raises(ValueError, match=r'first: init_weights="bat" computes with the weight, which gptq layers'):
            adapted("fake", form)
        return
    model = adapted("fake", form).train()
    before = bytes_of(model)
    layer = layers_of(model)[0]
    assert_close_to(layer(inputs()), inputs().double() @ oracle_weight(layer, "a").T + layer.base_layer.bias.double())
    for merge in (model.merge_adapter, model.merge_and_unload, layer.merge):
        with pytest.raises(ValueError, match=r"gptq layers cannot be merged into.*Serve the adapter unmerged"):
            merge()
    assert bytes_of(model) == before


def test_delta_of_the_tile_form_needs_no_weight(backend_of_coded_layers):
    backend_of_coded_layers[False] = SealedBackend
    layer = layers_of(adapted("fake", "tile"))[0]
    block = layer.bone_block["a"].data
    assert layer.get_delta_weight("a").equal(block.T.repeat(1, layer.in_features // R))
    with pytest.raises(TypeError, match="gptq"):
        layers_of(adapted("fake", "bat_row"))[0].get_delta_weight("a")


class Float8Linear(nn.Linear):
    """As transformers' layers for finely scaled float8: a scale beside a weight that means nothing without it."""

    def __init__(self, *shape):
        super().__init__(*shape)
        self.weight = nn.Parameter(self.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale_inv = nn.Parameter(torch.full((), 3.0), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.weight_scale_inv, self.bias)


def test_float8_weight_that_peft_cannot_read_is_not_merged_into():
    model = nn.Sequential(Float8Linear(IN, HIDDEN))
    model = get_peft_model(model, BoneConfig(r=R, target_modules=["0"]))
    before = layers_of(model)[0].base_layer.weight.view(torch.uint8).clone()
    model(inputs()).sum().backward()
    with pytest.raises(ValueError, match=r"Float8Linear keeps its weight as Parameter of torch\.float8_e4m3fn"):
        model.merge_adapter()
    assert layers_of(model)[0].base_layer.weight.view(torch.uint8).equal(before)


def test_old_peft_refuses_quantised_layers_instead_of_reading_codes_as_numbers(monkeypatch):
    class Int8Params(nn.Parameter):
        __module__ = "bitsandbytes.nn.modules"

    layer = nn.Linear(IN, HIDDEN)
    monkeypatch.setattr("hf_ext.compat.peft.find_spec", lambda _: None)
    assert compat.quantization_backend(layer) is None
    layer.weight = Int8Params(torch.zeros(HIDDEN, IN, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"cannot read the bitsandbytes weight of a Linear.*'peft>=0\.20'"):
        get_peft_model(nn.Sequential(layer), BoneConfig(r=R, target_modules=["0"]))


def test_torchao_weights_that_transformers_did_not_make_are_refused():
    with_library("torchao")
    model = Net("torchao")
    del model.hf_quantizer
    with pytest.raises(ValueError, match=r"first: torchao quantized layer.*quantization_config=TorchAoConfig"):
        get_peft_model(model, BoneConfig(r=R, target_modules=["first"]))
    assert not layers_of(model)


# ---------------------------------------------------------------- bitsandbytes packs 4-bit weights for AVX512


class TestPacking:
    @pytest.fixture(autouse=True)
    def library(self):
        self.bnb = pytest.importorskip("bitsandbytes")

    @pytest.fixture
    def avx512(self):
        if not self.bnb.functional.has_avx512bf16():
            pytest.skip("needs a processor with AVX512-BF16")

    @pytest.fixture
    def packed(self, avx512):
        """A Net after one forward in eval mode, and its weights before."""
        model = Net("nf4").eval()
        weights = [readable(model.first).clone(), readable(model.last).clone()]
        with torch.no_grad():
            model(inputs())
        return model, weights

    def test_trap_exists(self, packed):
        """When this fails, `compat.keep_weight_readable` may go."""
        model, weights = packed
        assert (readable(model.first) - weights[0]).abs().max() > weights[0].abs().max()

    @pytest.mark.parametrize("trained", [True, False], ids=["trained", "loaded"])
    def test_no_form_lets_it_happen(self, avx512, form, trained):
        model = adapted("nf4", form, inference_mode=not trained).eval()
        before = bytes_of(model)
        with torch.no_grad():
            model(inputs())
            with model.disable_adapter():
                model(inputs())
        model.state_dict()
        assert bytes_of(model) == before
        layer = layers_of(model)[0]
        expected = oracle_weight(layer, "a")
        model.merge_adapter()
        with torch.no_grad():
            model(inputs())
        assert_same_codes("nf4", layer, expected)

    def test_evaluation_does_not_cut_the_gradient_of_the_training_after_it(self, avx512):
        model = adapted("nf4", "tile").eval()
        with torch.no_grad():
            model(inputs())
        model.train()(inputs()).sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in blocks_of(model).values())

    def test_packed_layer_lets_no_gradient_pass(self, packed, form):
        """It would drop the gradient of its input without a word; inference is all it can do."""
        if form == "bat":
            pytest.skip("is refused at once: the next test")
        model, _ = packed
        model = get_peft_model(model, BoneConfig(r=R, init_weights=FORMS[form], target_modules=["first"]))
        with torch.no_grad():
            model(inputs())
        with pytest.raises(ValueError, match=r"has packed this 4-bit weight.*Load the model again"):
            model(inputs().requires_grad_())

    def test_packed_layer_is_refused_by_the_form_that_reads_it(self, packed):
        config = BoneConfig(r=R, init_weights="bat", target_modules=["first"], inference_mode=True)
        with pytest.raises(ValueError, match=r'first: init_weights="bat" computes with the weight.*packed'):
            get_peft_model(packed[0], config)

    @pytest.mark.parametrize("form", ["tile", "bat_row"])
    def test_packed_layer_serves_the_other_forms_and_is_not_merged_into(self, packed, form):
        model, weights = packed
        config = BoneConfig(r=R, init_weights=FORMS[form], target_modules=["first"], inference_mode=True)
        model = get_peft_model(model, config, adapter_name="a").eval()
        layer = layers_of(model)[0]
        layer.bone_block["a"].data.normal_(std=0.1)
        expected = inputs().double() @ updated(FORMS[form], weights[0], layer.bone_block["a"].detach()).T
        with torch.no_grad():
            assert_close_to(layer(inputs()), expected + layer.base_layer.bias.double(), 2e-2)
        before = bytes_of(model)
        for merge in (model.merge_adapter, model.merge_and_unload, layer.merge):
            with pytest.raises(ValueError, match=r"merging reads the weight of the layer.*packed"):
                merge()
        assert bytes_of(model) == before

    def test_packed_weight_is_never_read(self, packed):
        config = BoneConfig(r=R, init_weights="bat_row", target_modules=["first"], inference_mode=True)
        layer = layers_of(get_peft_model(packed[0], config))[0]
        with pytest.raises(ValueError, match=r"has to be dequantised.*packed"):
            layer.get_delta_weight("default")


# ---------------------------------------------------------------- through transformers


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **shape)).save_pretrained(folder)
    return folder


def quantised_llama(kind: str, folder):
    from transformers import BitsAndBytesConfig, TorchAoConfig

    with_library(kind)
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    elif kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


TOKENS = torch.arange(24).view(2, 12) % 64


@pytest.mark.parametrize("kind", ["int8", "nf4", "torchao"])
class TestLlama:
    def adapted(self, kind, folder, form):
        model = get_peft_model(
            quantised_llama(kind, folder),
            BoneConfig(r=R, init_weights=FORMS[form], target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
        )
        torch.manual_seed(1)
        for parameter in blocks_of(model).values():
            parameter.data.normal_(std=0.05)
        return model

    def test_trains_saves_loads_generates_and_merges(self, kind, form, llama_folder, tmp_path):
        model = self.adapted(kind, llama_folder, form).train()
        optimizer = torch.optim.AdamW(blocks_of(model).values(), lr=0.01)
        losses = []
        for _ in range(4):
            losses.append(model(input_ids=TOKENS, labels=TOKENS).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < losses[0]

        model.eval()
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(quantised_llama(kind, llama_folder), tmp_path, is_trainable=True).eval()
        with torch.no_grad():
            logits = model(input_ids=TOKENS).logits
            assert torch.equal(loaded(input_ids=TOKENS).logits, logits)
            tokens = model.generate(input_ids=TOKENS, max_new_tokens=4, do_sample=False)
            assert torch.equal(loaded.generate(input_ids=TOKENS, max_new_tokens=4, do_sample=False), tokens)

        before = bytes_of(model)
        model.merge_adapter(safe_merge=True)
        with torch.no_grad():
            merged = model(input_ids=TOKENS).logits
        model.unmerge_adapter()
        assert bytes_of(model) == before
        plain = loaded.merge_and_unload()
        with torch.no_grad():
            assert torch.equal(plain(input_ids=TOKENS).logits, merged)

    def test_checkpointing_gives_the_same_gradients(self, kind, form, llama_folder):
        model = self.adapted(kind, llama_folder, form).train()
        gradients = []
        for prepare in (lambda: None, lambda: prepare_model_for_kbit_training(model.base_model.model)):
            prepare()
            model.zero_grad()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(".bone_block." in name)
            model(input_ids=TOKENS, labels=TOKENS).loss.backward()
            gradients.append({name: parameter.grad.clone() for name, parameter in blocks_of(model).items()})
        assert model.base_model.model.is_gradient_checkpointing
        plain, checkpointed = gradients
        for name, gradient in plain.items():
            torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-7)
