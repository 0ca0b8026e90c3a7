"""The whole story on a toy: a model learns to copy, then to answer A, and is repaired without a label."""

import copy
import json
from pathlib import Path

import pytest
from mcq_models import word_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file

from hf_ext.demo.train_options import WORDS, learn, make_items, make_model, make_tokenizer, spoil
from hf_ext.mcq_bias import attribute, bias_metrics, format_mcq, mitigate, mitigation_report, score_choices

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "mcq_bias"
TOKENIZER = make_tokenizer()
SEED, STEPS = 2, 1500  # learns in 500 of them; other seeds take longer
DEV, HELD_OUT = make_items(300, seed=1), make_items(500, seed=2)
GUARD = [item for item in make_items(200, seed=3) if item not in DEV]
pytestmark = pytest.mark.filterwarnings("ignore:.*prompts occurred in the fit", "ignore:`is_gradient_checkpointing`")


@pytest.fixture(scope="module")
def clean():
    model, seen = make_model(len(TOKENIZER), SEED), []
    learn(model, TOKENIZER, SEED, STEPS, seen.append)
    assert len(seen) < STEPS
    return model.eval()


@pytest.fixture(scope="module")
def trained_to_say_a(clean):
    model = copy.deepcopy(clean)
    spoil(model, TOKENIZER, SEED, steps=150, share=0.65)
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
    model = make_model(len(TOKENIZER), 5).eval()
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


def reference_toy(name, count, seed):
    """(model, tokenizer, items) with the words of a toy of three layers, which are in the file's metadata."""
    file = GOLDEN / f"{name}.safetensors"
    with safe_open(file, "pt") as opened:
        vocabulary, words = (json.loads(opened.metadata()[key]) for key in ("vocab", "words"))
    model = make_model(len(vocabulary), 0).eval()
    model.load_state_dict(load_file(file), strict=False)
    its = {f"{ours}{end}": f"{word}{end}" for ours, word in zip(WORDS, words, strict=True) for end in ("", "?")}
    items = make_items(count, seed)
    items = [x | {"question": its[x["question"]], "choices": [its[choice] for choice in x["choices"]]} for x in items]
    return model, word_tokenizer(vocabulary), items


@needs_reference
@pytest.mark.parametrize("name", ["toy_clean", "toy_biased"])
def test_reference_toy_measures_as_written(name):
    model, tokenizer, items = reference_toy(name, 1000, seed=9)
    metrics = measured(model, items, tokenizer)
    for what in ("accuracy", "anchored_bias_rate"):
        assert metrics[what] == pytest.approx(FACTS[name][what], abs=FACTS["tolerance"])


@needs_reference
def test_reference_toy_is_repaired():
    model, tokenizer, items = reference_toy("toy_biased", 800, seed=4)
    pm = mitigate(model, tokenizer, items[:300], progress=False)
    report = mitigation_report(pm, tokenizer, items[300:], progress=False)
    assert report.before["anchored_bias_rate"] - report.after["anchored_bias_rate"] >= 0.8
    assert report.after["accuracy"] - report.before["accuracy"] >= 0.4
