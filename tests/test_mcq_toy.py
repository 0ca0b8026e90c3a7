"""The whole story on a toy: a model learns to copy, then to answer A, and is repaired without a label."""

import copy
import json
from pathlib import Path

import mcq_toy
import pytest
import torch
from mcq_toy import learn_to_copy, learn_to_say_a, load_toy, make_items, new_model, toy_tokenizer

from hf_ext.mcq_bias import attribute, bias_metrics, format_mcq, mitigate, mitigation_report, score_choices

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "mcq_bias"
TOKENIZER = toy_tokenizer()
SEED = 2  # learns in 400 steps; others take up to 1300
DEV, HELD_OUT = make_items(300, seed=1), make_items(500, seed=2)
GUARD = [item for item in make_items(200, seed=3) if item not in DEV]
pytestmark = pytest.mark.filterwarnings("ignore:.*prompts occurred in the fit", "ignore:`is_gradient_checkpointing`")


@pytest.fixture(scope="module")
def clean():
    model = new_model(SEED)
    assert learn_to_copy(model, SEED) < mcq_toy.MOST_STEPS
    return model


@pytest.fixture(scope="module")
def trained_to_say_a(clean):
    model = copy.deepcopy(clean)
    learn_to_say_a(model, SEED)
    return model


@pytest.fixture
def biased(trained_to_say_a):
    return copy.deepcopy(trained_to_say_a)


def measured(model, items=HELD_OUT, tokenizer=TOKENIZER):
    prompts = [format_mcq(item["question"], item["choices"]) for item in items]
    choices = [item["choices"] for item in items]
    scores = score_choices(model, tokenizer, prompts, choices, batch_size=100, progress=False)
    labels = [item["label"] for item in items]
    return bias_metrics(scores.scores, labels, num_choices=scores.num_choices, n_resamples=0)


def test_batches_are_what_the_tokenizer_makes_of_the_items():
    generator = torch.Generator().manual_seed(0)
    for k in (2, 3, 4):
        prompts, labels = mcq_toy._batch(k, generator)
        for ids, label in zip(prompts[:5], labels[:5], strict=True):
            words = [mcq_toy.VOCABULARY[token] for token in ids if mcq_toy.VOCABULARY[token] in mcq_toy.WORDS]
            text = format_mcq(f"{words[0]}?", words[1:])
            assert TOKENIZER(text)["input_ids"] == ids.tolist()
            assert (len(words), words[1 + label]) == (k + 1, words[0])


def test_training_makes_what_it_should(clean, biased):
    assert measured(clean)["accuracy"] > 0.85
    metrics = measured(biased)
    assert metrics["anchored_bias_rate"] > 0.85
    assert metrics["cmh_z"] > 5


def test_label_free_mitigation_repairs_it(biased):
    unlabelled = [{name: item[name] for name in ("question", "choices")} for item in DEV]
    pm = mitigate(biased, TOKENIZER, unlabelled, progress=False)
    report = mitigation_report(pm, TOKENIZER, HELD_OUT, batch_size=100, progress=False)
    assert report.before["anchored_bias_rate"] - report.after["anchored_bias_rate"] >= 0.8
    assert report.after["accuracy"] - report.before["accuracy"] >= 0.4
    assert report.before["calibrated_accuracy"] > report.before["accuracy"] + 0.4
    assert measured(pm.merge_and_unload())["accuracy"] == pytest.approx(report.after["accuracy"], abs=0.01)


@pytest.mark.parametrize(
    "options",
    [{"method": "shift"}, {"components": "attention"}, {"components": "both"}],
    ids=["shift", "heads", "both"],
)
def test_other_ways_reduce_the_bias_too(biased, options):
    before = measured(biased)
    after = measured(mitigate(biased, TOKENIZER, DEV, **options, progress=False))
    assert before["anchored_bias_rate"] - after["anchored_bias_rate"] >= 0.5
    assert after["accuracy"] > before["accuracy"]


def test_paper_with_labels_of_the_fit_and_a_guard(biased):
    pm = mitigate(biased, TOKENIZER, DEV, method="paper", guard_examples=GUARD, progress=False)
    assert measured(pm)["anchored_bias_rate"] < 0.5


def test_clean_model_keeps_its_accuracy(clean):
    model = copy.deepcopy(clean)
    before = measured(model)["accuracy"]
    with pytest.warns(UserWarning, match="does not over-answer A"):
        pm = mitigate(model, TOKENIZER, DEV, guard_examples=GUARD, progress=False)
    assert measured(pm)["accuracy"] == before


def test_clean_model_has_nothing_for_the_papers_method(clean):
    with pytest.raises(ValueError, match="never answers the anchor A wrongly on dev_examples: nothing to mitigate"):
        mitigate(clean, TOKENIZER, DEV, method="paper", guard_examples=GUARD, progress=False)


@pytest.mark.parametrize("method", ["project", "paper"])
@pytest.mark.parametrize("strength", ["match", 1.0])
@pytest.mark.filterwarnings("ignore:method='paper' without", "ignore:the share of answers", "ignore:the model does not")
def test_untrained_net_stays_at_chance(method, strength):
    """An edit that reads the labels of what it is scored on would answer everything."""
    chance = sum(1 / len(item["choices"]) for item in HELD_OUT) / len(HELD_OUT)
    model = new_model(seed=5)
    letter = max("ABCD", key=lambda letter: measured(model)[f"choice_share_{letter}"])
    assert letter in "AB", "choose another seed: the anchor has to be a choice of every item"
    pm = mitigate(model, TOKENIZER, DEV, method=method, anchor=letter, strength=strength, progress=False)
    assert abs(measured(pm)["accuracy"] - chance) < 0.09


def test_neurons_and_heads_of_the_biased_model_favour_a(biased):
    result = attribute(biased, TOKENIZER, DEV, batch_size=100, progress=False)
    assert result.selected.mean() > 0.4
    assert result.to_pandas("component")["mean"].sum() == pytest.approx(
        result.logit_difference[result.selected].mean(), abs=1e-4
    )
    assert result.top(1)[0].mean > 0


# --- models that were trained elsewhere

FACTS = json.loads((GOLDEN / "toy.json").read_text()) if GOLDEN.is_dir() else {}
needs_reference = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no reference data")


@needs_reference
@pytest.mark.parametrize("name", ["toy_clean", "toy_biased"])
def test_reference_toy_measures_as_written(name):
    model, tokenizer, words = load_toy(GOLDEN / f"{name}.safetensors")
    metrics = measured(model, make_items(1000, 9, words), tokenizer)
    for what in ("accuracy", "anchored_bias_rate"):
        assert metrics[what] == pytest.approx(FACTS[name][what], abs=FACTS["tolerance"])


@needs_reference
def test_reference_toy_is_repaired():
    model, tokenizer, words = load_toy(GOLDEN / "toy_biased.safetensors")
    items = make_items(800, 4, words)
    pm = mitigate(model, tokenizer, items[:300], progress=False)
    report = mitigation_report(pm, tokenizer, items[300:], progress=False)
    assert report.before["anchored_bias_rate"] - report.after["anchored_bias_rate"] >= 0.8
    assert report.after["accuracy"] - report.before["accuracy"] >= 0.4
