"""Mitigation: the edit against dense algebra, its delivery through PEFT, and what it refuses."""

import json
import math
import re
import warnings
from hashlib import sha256

import numpy as np
import pytest
import torch
from mcq_models import LETTERS, WORDS, examples, tiny_model, word_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from hf_ext.mcq_bias import (
    attribute,
    bias_metrics,
    load_mitigation,
    mitigate,
    mitigation_report,
    save_mitigation,
    score_choices,
)
from hf_ext.mcq_bias.strength import Exam, matching_strength, over_answers

TOKENIZER = word_tokenizer()
DEV, HELD_OUT = examples(40), examples(30, seed=1)
QUIET = {"progress": False}
GIVEN = {**QUIET, "strength": 1.0}
FAMILIES = ("gpt2", "llama", "qwen3")
MLP = {"gpt2": "transformer.h.{}.mlp.c_proj"}
ATTENTION = {"gpt2": "transformer.h.{}.attn.c_proj"}
IDS = torch.arange(2, 26).reshape(2, 12)
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def biased(family="gpt2", dtype=torch.float64, letter="A", by=None, **changes):
    """A random model that often answers a letter: its value vectors are moved along the letter's row in the head."""
    model = tiny_model(family, dtype, **changes)
    by = (0.1 if family == "gpt2" else 1.0) if by is None else by
    row = model.get_output_embeddings().weight[WORDS.index(letter)].detach()
    with torch.no_grad():
        for layer in range(2):
            vectors(model, mlp(model, layer)).add_(
                by * torch.rand(1, generator=torch.Generator().manual_seed(layer)) * row
            )
    return model


def mlp(model, layer):
    return MLP.get(model.config.model_type, "model.layers.{}.mlp.down_proj").format(layer)


def attention(model, layer):
    return ATTENTION.get(model.config.model_type, "model.layers.{}.self_attn.o_proj").format(layer)


def vectors(model, name):
    """(in, out), a view of the weight of a layer."""
    module = model.get_submodule(name)
    module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return module.weight if type(module).__name__ == "Conv1D" else module.weight.T


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def adapter(pm):
    return {name: tensor for name, tensor in pm.state_dict().items() if "lora_" in name}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def untouched(model, before):
    return (
        same(state(model), before)
        and not hasattr(model, "peft_config")
        and not any(isinstance(module, BaseTunerLayer) for module in model.modules())
        and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        and all(parameter.requires_grad for parameter in model.parameters())
    )


def bias_vector(model, anchor=0, letters=LETTERS):
    """The unit vector along U[anchor] - mean of the other U, token by token."""
    gpt2 = model.config.model_type == "gpt2"
    gain = model.get_submodule("transformer.ln_f" if gpt2 else "model.norm").weight.double()
    rows = [gain * model.get_output_embeddings().weight[WORDS.index(letter)].double() for letter in letters]
    rows = [row - row.mean() for row in rows] if gpt2 else rows
    others = [row for index, row in enumerate(rows) if index != anchor]
    vector = rows[anchor] - sum(others) / len(others)
    return (vector / vector.square().sum().sqrt()).detach()


def largest(model, n, target="runner_up"):
    """[(layer, neuron)] by their mean contribution, as by hand from the attribution's rows."""
    result = attribute(model, TOKENIZER, DEV, target=target, progress=False)
    means = np.mean([row for row, kept in zip(result.neurons, result.selected, strict=True) if kept], axis=0)
    order = sorted(np.ndindex(means.shape), key=lambda place: -means[place])
    return [place for place in order if means[place] > 0][:n], result


# --- the edit, against dense algebra


@pytest.mark.smoke
@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_project_takes_the_direction_out_of_n_rows(family, strength):
    model = biased(family)
    before = state(model)
    chosen, _ = largest(model, 7)
    u = bias_vector(model)
    expected = {layer: vectors(model, mlp(model, layer)).detach().clone() for layer in range(2)}
    for layer, neuron in chosen:
        row = expected[layer][neuron]
        expected[layer][neuron] = row - strength * (row @ u) * u
    pm = mitigate(model, TOKENIZER, DEV, n=7, strength=strength, **QUIET)
    merged = pm.merge_and_unload()
    changed = 0
    for layer in range(2):
        rows = vectors(merged, mlp(merged, layer)).detach()
        assert (rows - expected[layer]).abs().max() < 1e-14
        old = before[f"{mlp(merged, layer)}.weight"]
        old = old if family == "gpt2" else old.T
        changed += int((rows != old).any(1).sum())
        for at, neuron in chosen:
            if at == layer and strength == 1:
                assert abs(rows[neuron] @ u) < 1e-14
    assert changed == 7
    others = {name for name in before if not torch.equal(before[name], merged.state_dict()[name])}
    assert others == {f"{mlp(merged, layer)}.weight" for layer in {layer for layer, _ in chosen}}


@pytest.mark.parametrize("components", ["attention", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_project_takes_the_direction_out_of_every_head_that_favours_the_anchor(family, components):
    model = biased(family)
    _, result = largest(model, 1)
    favouring = [
        tuple(place) for place in np.argwhere(result.heads[result.selected].mean(0) > 0) if result.selected.any()
    ]
    u, width = bias_vector(model), model.get_submodule(attention(model, 0).rpartition(".")[0]).head_dim
    expected = {layer: vectors(model, attention(model, layer)).detach().clone() for layer in range(2)}
    for layer, head in favouring:
        block = expected[layer][head * width : (head + 1) * width]
        block -= torch.outer(block @ u, u)
    assert favouring
    pm = mitigate(model, TOKENIZER, DEV, components=components, n=3, **GIVEN)
    facts = pm.mcq_bias
    assert sorted((layer, head) for layer, heads in facts["edited_heads"].items() for head in heads) == favouring
    assert sum(map(len, facts["edited"].values())) == (3 if components == "both" else 0)
    merged = pm.merge_and_unload()
    for layer in range(2):
        assert (vectors(merged, attention(merged, layer)) - expected[layer]).abs().max() < 1e-14


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_shift_by_the_sign_of_the_mean_activation(family):
    model = biased(family)
    chosen, result = largest(model, 9)
    u = bias_vector(model)
    expected = {layer: vectors(model, mlp(model, layer)).detach().clone() for layer in range(2)}
    for layer, neuron in chosen:
        activation = result.activations[result.selected, layer, neuron].mean()
        expected[layer][neuron] -= 0.25 * math.copysign(1, activation) * u
    merged = mitigate(model, TOKENIZER, DEV, method="shift", n=9, strength=0.25, **QUIET).merge_and_unload()
    for layer in range(2):
        assert (vectors(merged, mlp(merged, layer)) - expected[layer]).abs().max() < 1e-14


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.filterwarnings("ignore:method='paper' without guard")
def test_paper_strengthens_the_gold_letters_of_the_fit(family):
    model = biased(family)
    [(layer, neuron)], result = largest(model, 1, target="gold")
    gpt2 = family == "gpt2"
    gain = model.get_submodule("transformer.ln_f" if gpt2 else "model.norm").weight
    rows = [gain * row for row in model.get_output_embeddings().weight]
    rows = [row - row.mean() for row in rows] if gpt2 else rows
    mean = sum(rows) / len(rows)
    gold = [row["label"] for row, kept in zip(DEV, result.selected, strict=True) if kept]
    favoured = sum(rows[WORDS.index(LETTERS[label])] - mean for label in gold) / len(gold)
    expected = vectors(model, mlp(model, layer)).detach().clone()
    expected[neuron] += 0.5 * (8 * favoured - (rows[WORDS.index("A")] - mean)).detach()
    pm = mitigate(model, TOKENIZER, DEV, method="paper", strength=0.5, **QUIET)
    assert pm.mcq_bias["edited"] == {layer: [neuron]}
    assert (vectors(pm.merge_and_unload(), mlp(model, layer)) - expected).abs().max() < 1e-13


def test_other_anchor_and_its_choices():
    """B against A, C and D: letters beyond the largest number of choices do not count."""
    model = biased(letter="B")
    dev = [row for row in examples(60) if row["num_choices"] <= 4]
    u = bias_vector(model, anchor=1, letters="ABCD")
    pm = mitigate(model, TOKENIZER, dev, anchor="B", **GIVEN)
    assert pm.mcq_bias["anchor"] == "B"
    for name, weight in adapter(pm).items():
        if "lora_B" in name:
            assert (weight[:, 0] + u).abs().max() < 1e-14
    by_index = mitigate(biased(letter="B"), TOKENIZER, dev, anchor=1, **GIVEN)
    assert same(adapter(pm), adapter(by_index))


@pytest.mark.smoke
def test_share_after_is_what_the_adapter_gives():
    pm = mitigate(biased(), TOKENIZER, DEV, strength=0.7, **QUIET)
    facts = pm.mcq_bias
    for share, model in ((facts["share_after"], pm), (facts["share_before"], biased())):
        scores = score_choices(model, TOKENIZER, *asked(DEV), progress=False)
        metrics = bias_metrics(scores.scores, [0] * len(DEV), num_choices=scores.num_choices)
        assert share == pytest.approx(metrics["choice_share_A"], abs=1e-12)
    assert facts["share_before"] > facts["share_after"]
    assert facts["target_share"] == pytest.approx(sum(1 / row["num_choices"] for row in DEV) / len(DEV))


def asked(rows):
    return [row["prompt"] for row in rows], [row["num_choices"] for row in rows]


# --- labels

LABELS = {
    "shuffled": [
        {**row, "label": DEV[(i * 7 + 3) % len(DEV)]["label"] % row["num_choices"]} for i, row in enumerate(DEV)
    ],
    "missing": [{name: row[name] for name in ("prompt", "num_choices")} for row in DEV],
    "nonsense": [{**row, "label": object()} for row in DEV],
}


@pytest.mark.parametrize("options", [{}, {"method": "shift"}, {"components": "both"}], ids=["project", "shift", "both"])
def test_labels_never_matter(options):
    true = mitigate(biased(), TOKENIZER, DEV, **options, **QUIET)
    for kind, rows in LABELS.items():
        ours = mitigate(biased(), TOKENIZER, rows, **options, **QUIET)
        assert same(adapter(ours), adapter(true)), kind
        assert ours.mcq_bias == true.mcq_bias, kind


def test_data_set_and_generator_are_examples_too():
    from datasets import Dataset

    expected = adapter(mitigate(biased(), TOKENIZER, DEV, **GIVEN))
    for dev in (Dataset.from_list(DEV), iter(DEV)):
        assert same(adapter(mitigate(biased(), TOKENIZER, dev, **GIVEN)), expected)


# --- delivery through PEFT


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("components", ["mlp", "both"])
def test_disabled_and_unloaded_it_is_the_model_bit_for_bit(family, components):
    model = biased(family)
    before, expected = state(model), logits(model)
    pm = mitigate(model, TOKENIZER, DEV, components=components, **GIVEN)
    assert not torch.equal(logits(pm), expected)
    with pm.disable_adapter():
        assert torch.equal(logits(pm), expected)
    back = pm.unload()
    assert back is model
    assert same(state(back), before)
    assert torch.equal(logits(back), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_it_gives_the_same_logits(family):
    pm = mitigate(biased(family), TOKENIZER, DEV, components="both", **GIVEN)
    expected = logits(pm)
    assert (logits(pm.merge_and_unload()) - expected).abs().max() < 1e-12


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_saved_and_loaded_again(tmp_path, family, dtype):
    pm = mitigate(biased(family, dtype), TOKENIZER, DEV, components="both", **GIVEN)
    save_mitigation(pm, tmp_path / "adapter")
    again = PeftModel.from_pretrained(biased(family, dtype), tmp_path / "adapter")
    assert same(adapter(again), adapter(pm))
    assert torch.equal(logits(again), logits(pm))
    precision = torch.promote_types(dtype, torch.float32)
    assert {weight.dtype for weight in adapter(again).values()} == {precision}


def test_file_beside_the_adapter(tmp_path):
    pm = mitigate(biased(), TOKENIZER, DEV, **GIVEN)
    save_mitigation(pm, tmp_path)
    written = json.loads((tmp_path / "mcq_bias.json").read_text())
    assert written.pop("adapter_sha256") == sha256((tmp_path / "adapter_model.safetensors").read_bytes()).hexdigest()
    edited = written.pop("edited")
    assert {int(layer): indices for layer, indices in edited.items()} == pm.mcq_bias["edited"]
    assert {**written, "edited": pm.mcq_bias["edited"]} == pm.mcq_bias
    assert set(written["versions"]) == {"hf_ext", "torch", "transformers", "peft"}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_save_refuses_what_has_no_record(tmp_path):
    pm = get_peft_model(tiny_model("gpt2"), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    with pytest.raises(ValueError, match="mcq_bias"):
        save_mitigation(pm, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapter_is_on_the_edited_layers_alone(family):
    """In GPT-2 both projections are called c_proj. More layers than PEFT lists by whole names."""
    layers = {"n_layer": 24} if family == "gpt2" else {"num_hidden_layers": 24}
    model = biased(family, **layers)
    pm = mitigate(model, TOKENIZER, DEV, n=30, **GIVEN)
    wrapped = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    assert wrapped == {mlp(model, layer) for layer in pm.mcq_bias["edited"]}
    assert len(adapter(pm)) == 2 * len(wrapped)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_warned_of_where_all_is_well(family):
    """PEFT says so when it is told wrongly which way round a layer keeps its weight."""
    model = biased(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
        pm = mitigate(model, TOKENIZER, DEV, **GIVEN)
    config = pm.peft_config["default"]
    assert (config.r, config.lora_alpha, config.bias) == (1, 1, "none")
    assert config.fan_in_fan_out is (family == "gpt2")


def test_tied_head_stays_as_it_is():
    model = biased("qwen3")
    head = model.get_output_embeddings()
    before = head.weight.clone()
    assert head.weight is model.get_input_embeddings().weight
    merged = mitigate(model, TOKENIZER, DEV, components="both", **GIVEN).merge_and_unload()
    assert merged.get_output_embeddings() is head
    assert head.weight is merged.get_input_embeddings().weight
    assert torch.equal(head.weight, before)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_mode_and_random_numbers_are_left_alone(training):
    """PEFT's new modules would start in training mode, and its initial weights are drawn."""
    model = biased().train(training)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    pm = mitigate(model, TOKENIZER, DEV, **GIVEN)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert {module.training for module in pm.modules()} == {training}
    assert not any(parameter.requires_grad for parameter in pm.parameters())
    assert same(adapter(pm), adapter(mitigate(biased(), TOKENIZER, DEV, **GIVEN)))


def test_unloaded_model_can_be_mitigated_again():
    first = mitigate(biased(), TOKENIZER, DEV, **GIVEN)
    expected = adapter(first)
    again = mitigate(first.unload(), TOKENIZER, DEV, **GIVEN)
    assert same(adapter(again), expected)


# --- strength


@pytest.mark.parametrize("wanted", [0.2, 1.0, 3.7, 900.0])
def test_search_finds_the_strength_of_a_falling_share(wanted):
    strength, share = matching_strength(lambda s: 0.9 - 0.6 * s / wanted, target=0.3, anchor=0, progress=False)
    assert strength == pytest.approx(wanted, rel=2e-3, abs=1e-3)
    assert share == pytest.approx(0.3, abs=2e-3)


def test_search_that_never_arrives_uses_the_best_and_says_so():
    asked_at = []

    def share_at(strength):
        asked_at.append(strength)
        return 0.5 + 0.01 * abs(strength - 4)

    with pytest.warns(UserWarning, match=r"share of answers B.*0\.250.*0\.500.*strength 4"):
        assert matching_strength(share_at, target=0.25, anchor=1, progress=False) == (4.0, 0.5)
    assert asked_at == [2.0**i for i in range(11)]


def test_search_takes_the_closest_of_what_it_has_seen():
    """A share that jumps over the target."""
    strength, share = matching_strength(lambda s: 0.9 if s < 0.6 else 0.28, target=0.3, anchor=0, progress=False)
    assert share == 0.28
    assert strength == pytest.approx(0.6, abs=1e-3)


def test_match_brings_the_share_to_chance():
    pm = mitigate(biased(), TOKENIZER, DEV, components="both", **QUIET)
    facts = pm.mcq_bias
    assert facts["share_before"] > 0.5
    assert abs(facts["share_after"] - facts["target_share"]) <= 1.5 / len(DEV)
    assert facts["strength"] > 0


@pytest.mark.parametrize(
    ("share", "rows", "expected"), [(0.3, 100, False), (0.4, 100, True), (0.3, 1000, True), (0.1, 9, False)]
)
def test_over_answers_is_a_test_against_chance(share, rows, expected):
    assert over_answers(share, 0.25, rows) is expected


def test_model_that_does_not_over_answer_gets_an_adapter_that_does_nothing():
    model = biased(by=0.0)
    expected = logits(model)
    with pytest.warns(UserWarning, match="the model does not over-answer A"):
        pm = mitigate(model, TOKENIZER, DEV, **QUIET)
    assert pm.mcq_bias["strength"] == 0
    assert pm.mcq_bias["share_after"] == pm.mcq_bias["share_before"] > 0
    assert torch.equal(logits(pm), expected)


def test_strength_zero_is_allowed():
    model = biased()
    expected = logits(model)
    assert torch.equal(logits(mitigate(model, TOKENIZER, DEV, strength=0, **QUIET)), expected)


# --- the guard


def accuracy(model, rows):
    scores = score_choices(model, TOKENIZER, *asked(rows), progress=False)
    return bias_metrics(scores.scores, [row["label"] for row in rows], num_choices=scores.num_choices)["accuracy"]


def labelled_by(model, rows):
    scores = score_choices(model, TOKENIZER, *asked(rows), progress=False).scores
    return [{**row, "label": int(best)} for row, best in zip(rows, scores.argmax(1), strict=True)]


@pytest.mark.parametrize("method", ["project", "paper"])
def test_guard_refuses_a_fall_and_the_model_is_untouched(method):
    model = biased()
    before = state(model)
    guard = labelled_by(model, HELD_OUT)  # all right as it is
    with pytest.raises(ValueError, match=r"accuracy on guard_examples falls from 1\.0000 to 0\."):
        mitigate(model, TOKENIZER, DEV, method=method, strength=5.0, guard_examples=guard, **QUIET)
    assert untouched(model, before)


def test_guard_lets_an_improvement_through():
    guard = [{**row, "label": 1} for row in HELD_OUT]
    pm = mitigate(biased(), TOKENIZER, DEV, strength=1.0, components="both", guard_examples=guard, **QUIET)
    assert accuracy(pm, guard) >= accuracy(biased(), guard)


def test_paper_without_a_guard_says_so():
    with pytest.warns(UserWarning, match="without guard_examples"):
        mitigate(biased(), TOKENIZER, DEV, method="paper", **GIVEN)


# --- bad input

BAD = {
    "method": ({"method": "projekt"}, ["'projekt'", "did you mean 'project'"]),
    "components": ({"components": "mpl"}, ["'mpl'", "did you mean 'mlp'"]),
    "strength_word": ({"strength": "mach"}, ["'mach'", "did you mean 'match'"]),
    "negative_strength": ({"strength": -0.5}, ["-0.5", "at least 0"]),
    "infinite_strength": ({"strength": math.inf}, ["inf"]),
    "nan_strength": ({"strength": math.nan}, ["nan"]),
    "bool_strength": ({"strength": True}, ["True"]),
    "no_neurons": ({"n": 0}, ["n=0", "at least 1"]),
    "half_a_neuron": ({"n": 1.5}, ["n=1.5"]),
    "shift_of_heads": ({"method": "shift", "components": "both"}, ["'shift'", "'both'", "'mlp'"]),
    "paper_of_heads": ({"method": "paper", "components": "attention"}, ["'paper'", "'attention'"]),
    "anchor": ({"anchor": "AB"}, ["'AB'"]),
    "anchor_beyond": ({"anchor": "C"}, ["dev_examples[0]", "C", "2"]),
    "batch_size": ({"batch_size": 0}, ["batch_size=0"]),
    "prefix": ({"letter_prefix": " w1 "}, ["one token"]),
    "guard_without_labels": ({"guard_examples": LABELS["missing"]}, ["guard_examples[0]", "label"]),
    "guard_from_the_fit": ({"guard_examples": DEV[:3]}, ["guard_examples", "3", "dev_examples"]),
    "long_guard": (
        {"guard_examples": [{"prompt": "w1 " * 70, "num_choices": 2, "label": 0}]},
        ["guard_examples[0]", "70 tokens", "64"],
    ),
}
BAD_DEV = {
    "empty": ([], {}, ["dev_examples", "no examples"]),
    "no_choices": ([{"prompt": "w1 Answer:"}], {}, ["examples[0]", "num_choices"]),
    "paper_without_labels": (LABELS["missing"], {"method": "paper"}, ["examples[0]", "label"]),
    "too_long": ([*DEV, {"prompt": "w1 " * 65, "num_choices": 5}], {}, ["dev_examples[40]", "65", "64"]),
    "a_text": ("w1 Answer:", {}, ["str"]),
}


@pytest.mark.parametrize("case", [*BAD, *BAD_DEV])
def test_bad_input_is_named_and_the_model_untouched(case):
    dev, options, words = BAD_DEV[case] if case in BAD_DEV else (DEV, *BAD[case])
    model = biased()
    before = state(model)
    with pytest.raises(ValueError) as caught:
        mitigate(model, TOKENIZER, dev, **options, **QUIET)
    for word in words:
        assert word in str(caught.value)
    assert untouched(model, before)


def test_model_with_an_adapter_is_refused():
    pm = mitigate(biased(), TOKENIZER, DEV, **GIVEN)
    before = adapter(pm)
    with pytest.raises(ValueError, match="PeftModelForCausalLM has adapters"):
        mitigate(pm, TOKENIZER, DEV, **GIVEN)
    assert same(adapter(pm), before)


def test_other_family_is_refused():
    from anchor_models import build, config_of

    with pytest.raises(ValueError, match="'gemma2'"):
        mitigate(build(config_of("gemma2"), "eager"), TOKENIZER, DEV, **GIVEN)


def test_model_that_never_answers_the_anchor():
    model = tiny_model("gpt2")
    before_bias = model.transformer.ln_f.bias
    with torch.no_grad():
        before_bias.sub_(20 * model.lm_head.weight[WORDS.index("A")])
    before = state(model)
    with pytest.raises(ValueError, match=re.escape("the model never answers the anchor A on dev_examples: nothing")):
        mitigate(model, TOKENIZER, DEV, **GIVEN)
    assert untouched(model, before)


@pytest.mark.parametrize("components", ["mlp", "attention", "both"])
def test_model_without_a_component_for_the_anchor(components):
    """Only the final norm's bias says A."""
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.bias.add_(20 * model.lm_head.weight[WORDS.index("A")])
        for layer in range(2):
            for name in (mlp(model, layer), attention(model, layer)):
                vectors(model, name).zero_()
    before = state(model)
    with pytest.raises(ValueError, match="no component favours the anchor A"):
        mitigate(model, TOKENIZER, DEV, components=components, **GIVEN)
    assert untouched(model, before)


# --- the report


def test_report_is_the_metric_before_and_after():
    pm = mitigate(biased(), TOKENIZER, DEV, **GIVEN)
    report = mitigation_report(pm, TOKENIZER, HELD_OUT, progress=False)
    for metrics, model in ((report.before, biased()), (report.after, pm)):
        scores = score_choices(model, TOKENIZER, *asked(HELD_OUT), batch_size=64, progress=False)
        labels = [row["label"] for row in HELD_OUT]
        expected = bias_metrics(scores.scores, labels, num_choices=scores.num_choices, anchor="A")
        np.testing.assert_equal(metrics, expected)
    frame = report.to_pandas()
    assert list(frame.index) == ["before", "output calibration", "after"]
    assert frame.loc["output calibration", "accuracy"] == report.before["calibrated_accuracy"]
    assert frame.loc["output calibration", "anchored_bias_rate"] == report.before["calibrated_anchored_bias_rate"]
    assert math.isnan(frame.loc["output calibration", "tvd"])
    assert frame.loc["after", "cmh_z"] == report.after["cmh_z"]
    neurons = {layer: len(chosen) for layer, chosen in sorted(pm.mcq_bias["edited"].items())}
    assert report.localisation == {"neurons": neurons, "heads": {}}
    text = str(report)
    first, number = next(iter(neurons.items()))
    assert f"edited neurons: {number} in layer {first}" in text
    for word in ("before", "output calibration", "after", "accuracy", "30 examples", f"{report.after['accuracy']:.3f}"):
        assert word in text


def test_report_of_another_anchor():
    pm = mitigate(biased(letter="B"), TOKENIZER, DEV, anchor="B", **GIVEN)
    report = mitigation_report(pm, TOKENIZER, HELD_OUT, anchor="b", progress=False)
    assert report.anchor == "B"
    assert report.before["anchored_bias_rate"] > report.after["anchored_bias_rate"]


def test_report_warns_of_prompts_of_the_fit():
    pm = mitigate(biased(), TOKENIZER, DEV, **GIVEN)
    with pytest.warns(UserWarning, match="2 of the 32 prompts occurred in the fit"):
        mitigation_report(pm, TOKENIZER, [*HELD_OUT, *DEV[:2]], progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mitigation_report(pm, TOKENIZER, HELD_OUT, progress=False)


def test_report_of_a_loaded_adapter(tmp_path):
    pm = mitigate(biased(), TOKENIZER, DEV, **GIVEN)
    expected = mitigation_report(pm, TOKENIZER, HELD_OUT, progress=False)
    save_mitigation(pm, tmp_path)
    again = PeftModel.from_pretrained(biased(), tmp_path)
    with pytest.warns(UserWarning, match="not known"):
        report = mitigation_report(again, TOKENIZER, HELD_OUT, progress=False)
    np.testing.assert_equal(report.after, expected.after)
    again.mcq_bias = json.loads((tmp_path / "mcq_bias.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mitigation_report(again, TOKENIZER, HELD_OUT, progress=False)


def test_report_needs_labels_and_an_adapter():
    pm = mitigate(biased(), TOKENIZER, DEV, **GIVEN)
    with pytest.raises(ValueError, match=r"examples\[0\].*label"):
        mitigation_report(pm, TOKENIZER, LABELS["missing"], progress=False)
    with pytest.raises(ValueError, match="GPT2LMHeadModel"):
        mitigation_report(pm.unload(), TOKENIZER, HELD_OUT, progress=False)


def test_report_asks_as_the_fit_did():
    """Anchor, letter prefix and BOS are those of the fit unless given; others cause a warning."""
    fitted = {"anchor": "B", "letter_prefix": "", "prepend_bos": True}
    pm = mitigate(biased(letter="B"), TOKENIZER, DEV, **fitted, **GIVEN)
    assert {name: pm.mcq_bias[name] for name in fitted} == fitted
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = mitigation_report(pm, TOKENIZER, HELD_OUT, progress=False)
        same_again = mitigation_report(pm, TOKENIZER, HELD_OUT, **fitted | {"anchor": 1}, progress=False)
    assert report.anchor == "B"
    np.testing.assert_equal(report.after, same_again.after)
    scores = score_choices(pm, TOKENIZER, *asked(HELD_OUT), letter_prefix="", prepend_bos=True, progress=False)
    labels = [row["label"] for row in HELD_OUT]
    expected = bias_metrics(scores.scores, labels, num_choices=scores.num_choices, anchor="B")
    assert report.after["anchored_bias_rate"] == expected["anchored_bias_rate"]
    for name, value in (("anchor", "A"), ("prepend_bos", False), ("letter_prefix", " ")):
        with pytest.warns(UserWarning, match=f"{name}={value!r}, and the fit had {fitted[name]!r}"):
            mitigation_report(pm, TOKENIZER, HELD_OUT, **{name: value}, progress=False)


def test_report_names_its_rows():
    pm = mitigate(biased(), TOKENIZER, DEV, **GIVEN)
    with pytest.raises(ValueError, match=r"examples\[1\] has 70 tokens"):
        mitigation_report(pm, TOKENIZER, [HELD_OUT[0], {"prompt": "w1 " * 70, "num_choices": 2, "label": 0}])


def test_unloaded_model_is_frozen_and_can_be_trained_again():
    """PEFT freezes what it wraps, and leaves it so."""
    model = biased()
    assert all(parameter.requires_grad for parameter in model.parameters())
    back = mitigate(model, TOKENIZER, DEV, **GIVEN).unload()
    assert not any(parameter.requires_grad for parameter in back.parameters())
    back.requires_grad_(True)(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in back.parameters())


@pytest.mark.parametrize("method", ["project", "shift", "paper"])
@pytest.mark.filterwarnings("ignore:method='paper' without guard")
def test_edits_keep_their_precision_under_autocast(method):
    model = biased(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pm = mitigate(model, TOKENIZER, DEV, method=method, **GIVEN)
    weights = adapter(pm)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert not all(torch.equal(weight, weight.bfloat16().float()) for name, weight in weights.items() if "_B" in name)
    if method == "project":
        u = bias_vector(model)
        for layer, neurons in pm.mcq_bias["edited"].items():
            [read] = [weight[0] for name, weight in weights.items() if f"{mlp(model, layer)}.lora_A" in name]
            expected = vectors(model, mlp(model, layer)).double() @ u
            assert (read - expected)[neurons].abs().max() < 1e-6


def test_warning_points_at_the_caller(monkeypatch):
    monkeypatch.setattr(Exam, "share", lambda *_: 0.9)
    with pytest.warns(UserWarning, match="does not fall to") as caught:
        mitigate(biased(), TOKENIZER, DEV, **QUIET)
    assert {warning.filename for warning in caught if "does not fall" in str(warning.message)} == {__file__}


def test_wrapper_and_model_on_several_devices_are_refused():
    model = biased()
    before = state(model)
    with pytest.raises(ValueError, match=r"DataParallel wraps a GPT2LMHeadModel"):
        mitigate(torch.nn.DataParallel(model), TOKENIZER, DEV, **GIVEN)
    assert untouched(model, before)


# --- logits that are not finite


def test_prompt_without_an_answer_is_no_success():
    """Else an edit that ruins the model would count as one that keeps it from saying A."""
    model = biased()
    exam = Exam(model, TOKENIZER, *asked(DEV), {"batch_size": 64, "letter_prefix": " ", "prepend_bos": False}, "dev")
    assert 0 < exam.share(0) < 1
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = math.nan
    assert exam.share(0) == math.inf


def test_search_keeps_away_from_strengths_that_ruin_the_model():
    with pytest.warns(UserWarning, match=r"the best is 0\.550, at strength 2"):
        strength, share = matching_strength(lambda s: math.inf if s >= 4 else 0.8 - s / 8, 0.2, 0, progress=False)
    assert (strength, share) == (2.0, 0.55)


@pytest.mark.parametrize("broken", ["before", "by_the_edit"])
def test_logits_that_are_not_finite_are_refused(broken):
    model = biased(dtype=torch.float32)
    if broken == "before":
        with torch.no_grad():
            model.transformer.ln_f.bias[0] = math.nan
    before = state(model)
    options = {"strength": 3e38} if broken == "by_the_edit" else {}
    words = "at strength 3e\\+38" if broken == "by_the_edit" else "as it is"
    with pytest.raises(ValueError, match=f"not finite {words}"):
        mitigate(model, TOKENIZER, DEV, **options, **QUIET)
    assert all(
        torch.equal(tensor.nan_to_num(), before[name].nan_to_num()) for name, tensor in model.state_dict().items()
    )
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())


# --- loading with the record


def test_loaded_with_its_record(tmp_path):
    pm = mitigate(biased(), TOKENIZER, DEV, components="both", **GIVEN)
    save_mitigation(pm, tmp_path / "one")
    again = load_mitigation(biased(), tmp_path / "one")
    assert again.mcq_bias == pm.mcq_bias
    assert torch.equal(logits(again), logits(pm))
    with pytest.warns(UserWarning, match="2 of the 32 prompts occurred in the fit"):
        mitigation_report(again, TOKENIZER, [*HELD_OUT, *DEV[:2]], progress=False)
    save_mitigation(again, tmp_path / "two")
    assert (tmp_path / "two" / "mcq_bias.json").read_text() == (tmp_path / "one" / "mcq_bias.json").read_text()


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [(None, OSError, "holds no mcq_bias.json"), ("{", ValueError, "damaged"), ("[]", ValueError, "damaged")],
    ids=["missing", "half", "list"],
)
def test_record_that_cannot_be_read_leaves_the_model_alone(tmp_path, text, error, words):
    save_mitigation(mitigate(biased(), TOKENIZER, DEV, **GIVEN), tmp_path)
    (tmp_path / "mcq_bias.json").unlink()
    if text:
        (tmp_path / "mcq_bias.json").write_text(text)
    model = biased()
    before = state(model)
    with pytest.raises(error, match=words):
        load_mitigation(model, tmp_path)
    assert untouched(model, before)
