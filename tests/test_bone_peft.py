"""What PEFT's own suite asks of every method, for Bone: the cases that no test beside this one has.

The models are PEFT's: a small MLP, and tiny transformers of the families its suite uses.
"""

import copy
import warnings

import peft
import pytest
import torch
from bone_native import OURS
from peft import BoneConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

pytestmark = OURS

FORMS = {
    "tile": {"r": 2},
    "tile that does not divide": {"r": 3},
    "tile wider than in_features": {"r": 11},
    "bat": {"r": 2, "init_weights": "bat"},
    "bat_row": {"r": 2, "init_weights": "bat_row"},
}
per_form = pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
X = torch.arange(90.0).view(9, 10)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.drop = nn.Dropout(0.5)
        self.lin1 = nn.Linear(20, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(self.drop(self.lin0(x).relu())).log_softmax(-1)


def mlp(options: dict, adapter_name: str = "default", seed: int = 0, **more: object) -> PeftModel:
    """With an adapter that is not at its start."""
    torch.manual_seed(0)
    model = get_peft_model(MLP(), BoneConfig(**{"target_modules": ["lin0"]} | options | more), adapter_name)
    return randomised(model, seed).eval()


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "bone_block" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return model


@per_form
def test_merging_is_deterministic_in_training_mode(options):
    model = mlp(options).train()
    first, second = (copy.deepcopy(model).merge_and_unload().state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@per_form
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_merges(options, dtype):
    model = mlp(options).to(dtype)
    expected = model(X.to(dtype))
    merged = model.merge_and_unload()(X.to(dtype))
    assert merged.dtype == dtype
    assert merged.isfinite().all()
    torch.testing.assert_close(merged, expected, rtol=0.1, atol=0.3)


@per_form
def test_only_the_named_adapters_are_saved(options, tmp_path):
    model = mlp(options, "default")
    for name in ("other", "third"):
        model.add_adapter(name, BoneConfig(target_modules=["lin0"], **options))
    randomised(model)
    model.save_pretrained(tmp_path, selected_adapters=["default", "third"])
    assert sorted(path.name for path in tmp_path.rglob("*.safetensors")) == ["adapter_model.safetensors"] * 2
    assert not (tmp_path / "other").exists()
    for folder, name in ((tmp_path, "default"), (tmp_path / "third", "third")):
        [(key, tensor)] = load_file(folder / "adapter_model.safetensors").items()
        assert key == "base_model.model.lin0.bone_block"
        assert torch.equal(tensor, model.base_model.model.lin0.bone_block[name])


@per_form
def test_the_name_of_an_adapter_makes_no_difference(options):
    outputs, states = [], []
    for name in ("default", "adapter_name_with_underscores", "bone"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the host, about a name that is part of the prefix
            model = mlp(options, name)
        outputs.append(model(X))
        states.append(peft.get_peft_model_state_dict(model, adapter_name=name))
    for output, state in zip(outputs[1:], states[1:], strict=True):
        assert torch.equal(output, outputs[0])
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[key], states[0][key]) for key in state)


@pytest.mark.parametrize("bias", ["none", "all", "bone_only"])
def test_disabling_an_adapter_with_biases_warns(bias):
    model = mlp(FORMS["tile"], bias=bias)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with model.disable_adapter():
            model(X)
    said = [str(warning.message) for warning in caught if "disabling adapter layers with bias" in str(warning.message)]
    assert bool(said) == (bias != "none")


def test_a_second_adapter_with_biases_is_refused():
    model = mlp(FORMS["tile"], bias="all")
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("other", BoneConfig(target_modules=["lin0"], bias="bone_only"))


@per_form
def test_a_merged_adapter_cannot_be_deleted(options):
    model = mlp(options)
    model.add_adapter("other", BoneConfig(target_modules=["lin0"], **options))
    model.merge_adapter(["default"])
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")
    model.delete_adapter("other")
    model.unmerge_adapter()
    assert set(model.base_model.model.lin0.bone_block) == {"default"}


def test_repr():
    model = mlp(FORMS["bat"])
    assert "bone.BoneLinear" in repr(model.base_model.model.lin0)
    assert "bone.BoneLinear" in repr(model)


@pytest.mark.parametrize("saving", ["first", "second"])
def test_one_of_two_adapters_has_a_module_of_its_own(saving):
    torch.manual_seed(0)
    configs = {
        name: BoneConfig(r=2, target_modules=["lin0"], modules_to_save=["lin1"] if name == saving else None)
        for name in ("first", "second")
    }
    model = get_peft_model(MLP(), configs["first"], "first").eval()
    model.add_adapter("second", configs["second"])
    plain = model(X)
    head = model.base_model.model.lin1.modules_to_save[saving]
    head.weight.data += 1 + torch.rand(2, 20)
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        assert torch.equal(model(X), plain) == (name != saving)


@per_form
def test_the_base_state_dict_knows_no_adapter(options):
    model = mlp(options)
    state = {key: value.clone() for key, value in model.get_base_model().state_dict().items() if "bone" not in key}
    torch.manual_seed(0)
    plain = MLP().state_dict()
    assert {key.replace("base_layer.", "") for key in state} == plain.keys()
    assert all(torch.equal(value, plain[key.replace("base_layer.", "")]) for key, value in state.items())


@pytest.mark.parametrize(("options", "worst"), [(FORMS["tile"], 1e-5), (FORMS["bat"], None)], ids=["tile", "bat"])
def test_the_conversion_of_the_host(options, worst):
    conversion = pytest.importorskip("peft.tuners.lora.conversion")
    model = mlp(options)
    config, state = conversion.convert_to_lora(model, rank=10 if worst is None else 2)
    torch.manual_seed(0)
    lora = get_peft_model(MLP(), config).eval()
    peft.set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(lora(X), model(X), rtol=1e-3, atol=1e-3)


SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 40}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=24)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_head=2, n_layer=2, n_positions=32)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    ),
    "bert": lambda: BertForSequenceClassification(BertConfig(**SMALL, intermediate_size=24)),
}
TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "t5": ["q", "wo"],
    "bert": ["query", "dense"],
}
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}
IDS = torch.arange(1, 13).view(2, 6)


@pytest.fixture(params=[(family, form) for family in MODELS for form in ("tile", "bat", "bat_row")], ids="-".join)
def adapted(request):
    family, form = request.param
    torch.manual_seed(0)
    # No bert.pooler or classifier: heads are trained whole.
    exclude = ["classifier"] if family == "bert" else None
    options = {"r": 8, "init_weights": True if form == "tile" else form}
    config = BoneConfig(**options, target_modules=TARGETS[family], exclude_modules=exclude, task_type=TASKS[family])
    return family, randomised(get_peft_model(MODELS[family](), config)).eval()


def loss_of(family, model):
    labels = torch.tensor([0, 1]) if family == "bert" else IDS
    return model(input_ids=IDS, labels=labels).loss


@pytest.mark.filterwarnings("ignore:You have passed exclude_modules")
def test_every_adapter_parameter_gets_a_gradient_and_no_other(adapted):
    family, model = adapted
    loss_of(family, model).backward()
    for name, parameter in model.named_parameters():
        trained = "bone_block" in name or "modules_to_save" in name
        assert parameter.requires_grad == trained
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == trained, name


@pytest.mark.filterwarnings("ignore:You have passed exclude_modules")
def test_reload_and_merge_give_the_same(adapted, tmp_path):
    family, model = adapted
    expected = loss_of(family, model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(MODELS[family](), tmp_path).eval()
    torch.testing.assert_close(loss_of(family, again), expected)
    torch.testing.assert_close(loss_of(family, again.merge_and_unload(safe_merge=True)), expected)


@pytest.mark.filterwarnings("ignore:You have passed exclude_modules")
def test_generation_by_position_and_by_keyword(adapted):
    family, model = adapted
    if family in ("bert", "t5"):
        pytest.skip("classifies, or the host takes keywords only")
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **options), model.generate(input_ids=IDS, **options))


def test_embeddings_in_the_place_of_ids(adapted):
    family, model = adapted
    if family != "llama":
        pytest.skip("one decoder is enough")
    embeddings = model.get_input_embeddings()(IDS)
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(IDS).logits)
