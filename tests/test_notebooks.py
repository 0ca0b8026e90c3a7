"""The notebooks: sources and executed copies agree, and what they claim holds in a fresh, small run."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bone_native import ours_only

from hf_ext import compat

jupytext = pytest.importorskip("jupytext")
nbformat = pytest.importorskip("nbformat")

FOLDER = Path(__file__).parent.parent / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))

RUN = """
import sys, jupytext, nbformat
from nbclient import NotebookClient
notebook = jupytext.read(sys.argv[1])
notebook.cells.append(nbformat.v4.new_code_cell(sys.stdin.read()))
NotebookClient(notebook, timeout=150, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""

# Independent of what the notebook prints: read off its variables.
ANCHOR_FACTS = """
import json
print(json.dumps({
    "leak": leak, "full_leak": full_leak, "layouts_differ": layouts_differ,
    "shift": {m: [d[s] for s in shifts] for m, d in by_shift.items()},
    "length": {m: [d[n] for n in lengths] for m, d in by_length.items()},
    "rope": {m: [r.ok, [f.name for f in r.findings]] for m, r in reports.items()},
    "d_right": d_right, "d_rounded": d_rounded, "distances": distances,
    "loss": loss, "verdicts": verdicts, "row": ROW,
    "reset": arguments(RESET, {k: x[:1] for k, x in rows.items()})["position_ids"][0].tolist(),
    "positions": rows["position_ids"][0].tolist(),
}))
"""

BONE_FACTS = """
import json
print(json.dumps({
    "parameters": parameters, "kept": kept, "rates": RATES, "tuning": [list(tuning[m].values()) for m in METHODS],
    "best": list(best.values()), "orders": list(orders.values()), "loss": loss, "verdicts": verdicts,
    "seeds": [list(TUNING_SEEDS), list(SEEDS)], "splits": [x.tolist() for x in (training, validation, test)],
    "ratios": list(ratios.values()), "moved": moved, "apart": apart,
    "errors": list(export.errors.values()), "exported": [export.config.peft_type.value, export.config.r],
    "layers": sorted({type(m).__module__ for m in stock.modules() if hasattr(m, "base_layer")}),
}))
"""

OFQ_FACTS = """
import json
from types import SimpleNamespace
from hf_ext.ofq_quantizer import activation_quantizers

seed, ROWS, FIRST = SEEDS[0], 8, "blocks.0.attn.qkv"  # FIRST: the first of the 2-bit layers

def numbers(tensor):
    return tensor.detach().tolist()

def layer_of(method):  # weight, scale and gradient of some rows, the rounded input, the output less its bias
    layer = student(method, seed).get_submodule("blocks.0.mlp.fc1").train()
    x = torch.randn(4, 17, layer.in_features, generator=torch.Generator().manual_seed(0))
    y = layer(x)
    y.square().sum().backward()
    return {
        "input": numbers(layer.input_quantizer(x)[0]), "output": numbers(y[0, :, :ROWS] - layer.bias[:ROWS]),
        "weight": numbers(layer.weight[:ROWS]), "gradient": numbers(layer.weight.grad[:ROWS]),
        "scale": None if layer.weight_scale_norm is None else numbers(layer.weight_scale_norm[:ROWS]),
    }

def unchanged(model, quantized):
    return [torch.equal(x, quantized.state_dict()[name]) for name, x in model.state_dict().items()]

def first_rows(method):
    layer = learned[method][0].get_submodule(FIRST)
    return {
        "weight": numbers(layer.weight[:ROWS]),
        "scale": None if layer.weight_scale_norm is None else numbers(layer.weight_scale_norm[:ROWS]),
        "distance": numbers(distances(learned[method][0])[: ROWS * layer.in_features]),
    }

def scales_of(model):
    of_weights = [getattr(module, "weight_scale_norm", None) for module in model.modules()]
    of_activations = [quantizer.scale for quantizer in activation_quantizers(model).values()]
    return [numbers(scale) for scale in (*of_weights, *of_activations) if scale is not None]

def seen_by(run):  # the labels of every batch
    global distillation_loss
    real, seen = distillation_loss, []
    distillation_loss = lambda logits, labels, taught: (seen.append(numbers(labels)), real(logits, labels, taught))[1]
    run()
    distillation_loss = real
    return seen

def moved(name):  # share of the weights of the first layer, number of those that began far from every threshold
    models = learned["StatsQ"][0], last[name][0].model
    before, now = (model.get_submodule(FIRST).weight.detach() for model in models)
    far = (distances(models[0])[: before.numel()] > 0.02).view_as(before)
    return [(before != now).float().mean().item(), int(((before != now) & far).sum()), int(far.sum())]

facts = {
    "splits": [numbers(x) for x in (training, validation, test)], "seeds": [list(TUNING_SEEDS), list(SEEDS)],
    "pairs": [[rate, factor] for rate in RATES for factor in FACTORS],
    "tuning": {m: [[*pair, losses] for pair, losses in by_pair.items()] for m, by_pair in tuning.items()},
    "best": best, "right": right, "after": after, "oscillating": oscillating,
    "findings": [[claim, d.mean, expected, findings[claim]] for claim, (d, expected) in CLAIMS.items()],
    "clear": [finding(Difference(mean, 1, 2), "higher") for mean in (3, -3, 1)],
    "gaps": [[*pair, gap.mean, gap.error, gap.verdict] for pair, gap in gaps.items()], "crowding": crowding,
    "counts": {n: [[int((x <= r).sum()) for r in (0.005, 0.05)] for x in v] for n, v in distance.items()},
    "by_annealing": {w: {n: d.verdict for n, d in ds.items()} for w, ds in by_annealing.items()},
    "frozen": {n: [run.frozen for run in runs] for n, runs in last.items()},
    "turned": {n: [[int((run.frequency > 0.005).sum()), run.frequency.numel()] for run in v] for n, v in last.items()},
    "from_teacher": {m: unchanged(teachers[seed], student(m, seed)) for m in METHODS},
    "learned": [not torch.equal(learned[m][0].head.weight, teachers[seed].head.weight) for m in METHODS],
    "layers": {m: layer_of(m) for m in ("LSQ", "StatsQ")}, "rows": {m: first_rows(m) for m in ("LSQ", "StatsQ")},
    "scales": {m: scales_of(learned[m][0]) for m in METHODS}, "off": {m: switched_off(learned[m][0]) for m in METHODS},
    "seen": [seen_by(lambda: learn(m, *best[m], seed)) for m in METHODS],
    "seen_last": [seen_by(lambda: finish(RUNS[name], seed)) for name in ("StatsQ", "StatsQ + CGA")],
    "moved": {n: moved(n) for n in ("StatsQ", "StatsQ + CGA")},
    "report": [[x.name, x.status, x.w_bits, x.a_bits, x.codes_used, x.executed] for x in summary.layers],
    "apart": apart, "bytes": [float_bytes, code_bytes, packed_bytes],
    "parameters": sum(x.numel() for x in teachers[seed].parameters()),
    "low_bit": sum(x.numel() for n, x in teachers[seed].named_parameters() if n.startswith("blocks") and x.ndim == 2),
}

path = torch.randint(-2, 2, (60, 40), generator=torch.Generator().manual_seed(0)).to(torch.int8)
counter = TurnCounter(None)
for row_of_codes in path:
    freeze = lambda _: {"w": SimpleNamespace(codes=row_of_codes[None], bits=2)}
    counter.update()
print(json.dumps(facts | {"path": numbers(path), "frequency": numbers(counter.frequency()["all"])}))
"""

IMPORTANCE_FACTS = """
import json

def digit(embedding):
    return hash(tuple(embedding))

def lies(drawn):  # of every source: its documents, those that are wrong, those that say one more
    counts = {}
    for source, answer, label in zip(drawn.corpus["source"], drawn.corpus["answer"], drawn.labels.tolist()):
        each = counts.setdefault(source, [0, 0, 0])
        counts[source] = [each[0] + 1, each[1] + (answer != label), each[2] + (answer == (label + 1) % 10)]
    return counts

def lists(rows):
    return [[row["retrieved"], row["source"], row["answers"], row["utility"], row["answer"]] for row in rows]

def told(difference):
    return [difference.mean, difference.error, difference.verdict]

drawn = {name: plant(case, SEEDS[0]) for name, case in CASES.items()}
parts = split(judged(drawn["topics"]))
print(json.dumps({
    "seeds": len(SEEDS), "digits": [[digit(x) for x in rows["embedding"]] for rows in (drawn["topics"].corpus, *parts)],
    "lies": {name: lies(one) for name, one in drawn.items()},
    "planted": {name: sorted(one.planted) for name, one in drawn.items()},
    "corpus": list(zip(*(drawn["topics"].corpus[name] for name in ("id", "source", "answer")))),
    "parts": [lists(rows) for rows in parts],
    "scores": {m: [x.vanilla, x.ways, x.tuned, list(x.weights.items()), x.threshold, sorted(x.pruned)]
               for m, (x, *_) in scores["topics"].items()},
    "vanilla": vanilla, "right": [[*case, values] for case, values in right.items()], "plain": PLAIN,
    "against_all": [[*case, m, *told(x)] for case, by in against_all.items() for m, x in by.items()],
    "against_mean": [[*case, m, *told(x)] for case, by in against_mean.items() for m, x in by.items()],
    "findings": [[*case, finding] for case, finding in findings.items()], "tally": tally, "helped": helped,
    "gains": gains, "control": {m: [[x.tuned for x in scores["none planted"][m]], told(x)] for m, x in control.items()},
    "found": [[*which, *numbers] for which, numbers in found.items()],
    "within": [[*which, values] for which, values in within.items()],
    "climbs": {rule: [[x["value"] for x in one.history], one.value] for rule, one in climbs.items()},
    "paths": {rule: [[at[s] for at in path] for s in path[0]] for rule, path in paths.items()},
    "truncated": truncated, "sampled": sampled, "largest": [largest, whole.history[0]["gradient_max"]],
    "used": np.abs((fits[0.0][0].weights - 0.5) / RATE - exact_gradient(np.full(len(keys), 0.5))).max(),
    "lists": [LISTS, DELTA],
}))
"""

TOGETHER_FACTS = """
import json

def finite(scores):
    return [[float(x) if np.isfinite(x) else None for x in row] for row in scores]

def chief(result):
    return [result[name] for name in CHIEF]

def lists_of(part):
    return [[row["retrieved"], row["source"], row["utility"], row["answer"]] for row in part]

def scored(model):
    return finite(scores_of(model).scores)

def size_of(folder):
    return {path.name: path.stat().st_size for path in (FOLDER / folder).iterdir()}

stated = {name: chief(result) for name, result in (("spoilt", report.before), ("repaired", report.after))}
stated |= {name: chief(read[name, 0]) for name in rows}
with repaired.disable_adapter():
    found = {"spoilt": scored(repaired)}
found |= {"repaired": scored(repaired)} | {name: scored(readers[name, 0]) for name in rows}
prompts = {"corpus": corpus, "questions": questions, "test": test, "skewed": skewed, "unlabelled": unlabelled}
print(json.dumps({
    "liars": sorted(liars), "left": list(kept["id"]), "parts": [lists_of(part) for part in (fit, tune, held)],
    "corpus": [[x["id"], x["source"], x["key"], x["label"], x["choices"], x["question"]] for x in corpus],
    "weights": {"learned weights": weights.to_dict(), "mean utility": mean.to_dict()},
    "column": list(weighed["importance"]),
    "thresholds": {"learned weights": weights.threshold, "mean utility": mean.threshold}, "useful": useful,
    "pruned": {name: sorted(sources) for name, sources in pruned.items()},
    "rows": {name: [[x.get("position_ids"), x["input_ids"], x["labels"]] for x in part] for name, part in rows.items()},
    "words": tokenizer.convert_ids_to_tokens(range(len(tokenizer))), "bos": tokenizer.bos_token_id, "leaks": leaks,
    "attention": {name: readers[name, 0].config._attn_implementation for name in rows}, "found": found,
    "stated": stated, "labels": labels, "counts": [len(item["choices"]) for item in test],
    "prompts": {name: [train_options.prompt(x) for x in part] for name, part in prompts.items()},
    "keys": [sorted(unlabelled[0]), [x["key"] for x in skewed]], "again": again, "merge_error": float(merge_error),
    "adapters": {x: json.loads((FOLDER / x / "adapter_config.json").read_text())["peft_type"] for x in ADAPTERS},
    "numbers": trained_numbers,
    "layers": [[m.out_features, m.in_features] for n, m in reader().named_modules() if n.endswith("_proj")],
    "shares": [facts["share_before"], facts["share_after"]], "rank": repaired.peft_config["default"].r,
    "apart": apart, "levels": levels, "right": right, "size": size, "files": [size_of("float"), size_of("packed")],
    "guesses": {name: logits_of(model).argmax(-1).tolist() for name, model in (("longer", longer), ("int8", integers))},
    "targets": test_answers.tolist(), "images": [len(images), len(test_images)], "closing": closing,
}))
"""


MCQ_FACTS = """
import json

def scored(model, items):
    return [[float(x) if np.isfinite(x) else None for x in row] for row in scores_of(model, items)]

def chief(rows):
    return {name: [[one["accuracy"], one["anchored_bias_rate"]] for one in results] for name, results in rows.items()}

def places_in(where, **way):  # what the questions of two, of three and of four choices are recalibrated with
    global recalibrate_attention
    real, seen = recalibrate_attention, []
    recalibrate_attention = lambda *given: (seen.append([given[3], given[2].tolist()]), real(*given))[1]
    recalibrated(spoilt[0], where, **way)
    recalibrate_attention = real
    return seen

mended_again, fresh = repaired(spoilt[0]), train_options.make_model(len(tokenizer), 100 + SEEDS[-1]).state_dict()
against = {RIVAL: against_rival, CLEAN: against_clean, "shuffled": owed}
kinds = {"clean": clean, "spoilt": spoilt}
print(json.dumps({
    "prompts": [[train_options.prompt(item) for item in part] for part in (unlabelled, labelled_fit, test, guard)],
    "fields": sorted(unlabelled[0]), "labels": [[x["label"] for x in part] for part in (labelled_fit, shuffled, test4)],
    "gold": gold, "chance_letter": chance_letter,
    "scores": {k: [[scored(nets[s], x) for s in SEEDS] for x in (test, unlabelled)] for k, nets in kinds.items()},
    "whole": parts["whole preference"], "total": sums["mean"].sum(), "left": left,
    "mended": [scored(mended_again, x) for x in (unlabelled, test)], "unloaded": same,
    "shares": [facts["share_before"], facts["share_after"]], "after": chief(after), "shuffled": chief(of_shuffled),
    "against": {other: [[name, *x, x.verdict] for name, x in rows.items()] for other, rows in against.items()},
    "clear": [Difference.of([4.0 * sign, 5.0 * sign, 7.0 * sign], [0.0] * 3).verdict for sign in (1, -1)],
    "places": {name: {where: places_in(where, **way) for where in WHERE} for name, way in WAYS.items()},
    "attention": chief(attention), "repairs": list(REPAIRS),
    "told": [told.argmax(1).tolist(), misled.argmax(1).tolist(), scores.argmax(1).tolist()],
    "untrained": chief(untrained), "fresh": all(torch.equal(x, fresh[n]) for n, x in model.state_dict().items()),
    "adapters": [{n: hash(x.numpy().tobytes()) for n, x in one.items()} for one in (*adapters, adapter(guard))],
    "alike": alike, "plain": scored(model, test4), "own": [[*which, values] for which, values in own.items()],
}))
"""


@pytest.fixture(params=SOURCES, ids=lambda path: path.stem)
def pair(request):
    return jupytext.read(request.param), nbformat.read(request.param.with_suffix(".ipynb"), as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_there_is_a_notebook_and_none_has_a_gap():
    assert SOURCES, "the tests of pairs would pass on nothing"
    assert not [path.name for path in SOURCES if re.search(r"\b(TODO|FIXME|XXX)\b", path.read_text(encoding="utf-8"))]


def test_source_and_executed_copy_have_the_same_cells(pair):
    source, executed = ([(cell.cell_type, cell.source) for cell in notebook.cells] for notebook in pair)
    assert executed == source


def test_executed_copy_ran_from_top_to_bottom_without_an_error_or_a_warning(pair):
    code = [cell for cell in pair[1].cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [
        output for output in outputs(pair[1]) if output.output_type == "error" or output.get("name") == "stderr"
    ]


def test_executed_copy_is_small_and_tells_no_path(pair):
    text = json.dumps([{k: v for k, v in output.items() if k != "data"} for output in outputs(pair[1])])
    assert not re.search(r"(?<![\w.])/(home|root|tmp|usr|opt|work|Users|mnt)\b|[A-Z]:\\\\", text)
    assert len(nbformat.writes(pair[1])) < 1_500_000


def run(name, facts, folder):
    """The facts and the executed notebook of a quick run."""
    for needed in ("nbclient", "ipykernel", "matplotlib", "scipy"):
        pytest.importorskip(needed)
    executed = folder / f"{name}.ipynb"
    command = [sys.executable, "-c", RUN, str(FOLDER / f"{name}.py"), str(executed)]
    env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"} | {"HF_EXT_QUICK": "1"}
    done = subprocess.run(command, input=facts, env=env, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    notebook = nbformat.read(executed, as_version=4)
    return json.loads(notebook.cells.pop().outputs[0].text), notebook


@pytest.fixture(scope="module")
def anchor(tmp_path_factory):
    return run("anchor_attention", ANCHOR_FACTS, tmp_path_factory.mktemp("anchor"))


@pytest.fixture(scope="module")
def bone(tmp_path_factory):
    if compat.has_native_bone():
        pytest.skip("this peft has Bone itself, and the notebook is of ours")
    return run("bone_adapter", BONE_FACTS, tmp_path_factory.mktemp("bone"))


@pytest.fixture(scope="module")
def ofq(tmp_path_factory):
    return run("ofq_quantizer", OFQ_FACTS, tmp_path_factory.mktemp("ofq"))


@pytest.fixture(scope="module")
def importance(tmp_path_factory):
    return run("importance_weights", IMPORTANCE_FACTS, tmp_path_factory.mktemp("importance"))


@pytest.fixture(scope="module")
def mcq(tmp_path_factory):
    return run("mcq_bias", MCQ_FACTS, tmp_path_factory.mktemp("mcq"))


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    return run("all_together", TOGETHER_FACTS, tmp_path_factory.mktemp("together"))


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("anchor", 4),
        ("bone", 2),
        ("ofq", 5),
        ("importance", 4),
        ("mcq", 3),
        pytest.param("together", 2, marks=ours_only("and warns that it will be removed")),
    ],
)
def test_a_fresh_run_is_quiet_and_draws_its_figures(name, figures, request):
    _, notebook = request.getfixturevalue(name)
    assert not [output.text for output in outputs(notebook) if output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs(notebook)) == figures


# --- AnchorAttention


def test_documents_are_apart_and_both_layouts_agree(anchor):
    facts, _ = anchor
    assert facts["leak"] == 0.0 < 0.01 < facts["full_leak"]
    assert facts["layouts_differ"] < 1e-4


def test_a_shift_matters_only_where_positions_are_rounded(anchor):
    drift = anchor[0]["shift"]
    assert max(drift["float32"]) < 0.01 * min(drift["bf16"])
    for mode in ("bf16", "bf16, cast"):
        assert max(drift[mode]) < 2 * min(drift[mode]), mode
    for mode in ("bf16 positions", "bf16 phases"):
        assert drift[mode] == sorted(drift[mode]), mode
        assert drift[mode][-1] > 10 * drift["bf16"][-1], mode


def test_drift_grows_with_length_where_phases_are_bfloat16(anchor):
    drift = anchor[0]["length"]
    assert drift["bf16"][-1] < 2 * drift["bf16"][0]
    assert drift["bf16, cast"][-1] < 2 * drift["bf16, cast"][0]
    assert drift["bf16 phases"][-1] > 4 * drift["bf16 phases"][0]


def test_rounded_positions_are_exact_up_to_256_and_not_beyond(anchor):
    shift, length = anchor[0]["shift"], anchor[0]["length"]
    assert shift["bf16 positions"][:2] == shift["bf16"][:2]  # 192 tokens, shifted by 16 and 64
    assert length["bf16 positions"][:3] == length["bf16"][:3]  # 48, 96 and 192 tokens, shifted by 16
    assert shift["bf16 positions"][2] > 2 * shift["bf16"][2]
    assert length["bf16 positions"][3] > 1.2 * length["bf16"][3]


def test_the_precision_check_finds_the_cast_model_and_the_rounded_positions(anchor):
    found = {mode: (ok, names) for mode, (ok, names) in anchor[0]["rope"].items()}
    buffers = "model.rotary_emb.inv_freq"
    assert found["float32"] == found["bf16"] == (True, [])
    for mode in ("bf16, cast", "bf16, cast, .float()"):
        assert not found[mode][0], mode
        assert buffers in found[mode][1], mode
    assert found["bf16, given bf16 position_ids"] == (False, ["position_ids"])


def test_rounded_frequencies_escape_the_drift_but_not_the_predictions(anchor):
    facts, _ = anchor
    assert facts["d_rounded"] < 10 * facts["d_right"]
    assert all(distance > 1e-5 for distance in facts["distances"])


def test_reset_positions_count_from_each_anchor(anchor):
    facts, _ = anchor
    counted, expected = -1, []
    for position in facts["positions"]:
        counted = 0 if position == 0 else counted + 1
        expected.append(counted)
    assert facts["reset"] == expected
    assert len(expected) == facts["row"]


def test_intra_document_attention_is_the_same_model_with_and_without_reset(anchor):
    loss = anchor[0]["loss"]
    assert loss["intra-document"] == pytest.approx(loss["intra-document, reset"], abs=1e-3)
    assert abs(loss["full attention"][0] - loss["AnchorAttention"][0]) > 1e-3


# --- Bone: six methods, of which the first is LoRA, the third the tile form and the last MiSS


def test_methods_train_equally_many_numbers(bone):
    outputs_of_a_layer = 64 * 4 + 192 + 64  # q, k, v and o, gate, down
    assert set(bone[0]["parameters"].values()) == {2 * outputs_of_a_layer * 8}


def test_what_is_kept_for_backward_is_what_each_method_needs(bone):
    kept, tokens = bone[0]["kept"], 8 * 128
    inputs = tokens * (64 + 64 + 192) * 4 * 2  # of q, k and v, of gate, of down; o's is kept by attention
    sums = 12 * tokens * 8 * 4
    assert kept["Bone, tile"] == kept["MiSS"] == sums
    assert kept["Bone, bat"] == kept["Bone, bat_row"] == inputs
    assert kept["LoRA"] == kept["PiSSA"] == inputs + sums // 2


def test_rates_are_chosen_on_other_rows_and_seeds_than_the_comparison_uses(bone):
    facts, _ = bone
    assert not set(facts["seeds"][0]) & set(facts["seeds"][1])
    training, validation, test = ({tuple(row) for row in split} for split in facts["splits"])
    assert not (training & validation or training & test or validation & test)
    rates = facts["rates"]
    assert rates[-1] / rates[0] == pytest.approx(100)
    for by_rate, best in zip(facts["tuning"], facts["best"], strict=True):
        means = [sum(losses) / len(facts["seeds"][0]) for losses in by_rate]
        assert best == rates[min(range(len(rates)), key=means.__getitem__)]


def test_orders_are_those_of_the_losses_at_each_rate(bone):
    facts, _ = bone
    names = list(facts["parameters"])
    for i, order in enumerate(facts["orders"][:-1]):
        losses = {name: sum(by_rate[i]) for name, by_rate in zip(names, facts["tuning"], strict=True)}
        assert [losses[name] for name in order] == sorted(losses.values())


def test_verdicts_are_those_of_a_paired_t_test(bone):
    from scipy.stats import ttest_rel

    loss, verdicts = bone[0]["loss"], bone[0]["verdicts"]
    assert list(verdicts) == list(loss)[1:]
    for method, verdict in verdicts.items():
        test = ttest_rel(loss[method], loss["LoRA"])
        sign = "better" if test.statistic < 0 else "worse"
        assert verdict == (sign if test.pvalue < 0.05 else "no difference shown")


def test_miss_is_the_tile_form_and_every_other_method_is_itself(bone):
    loss = bone[0]["loss"]
    assert loss["MiSS"] == pytest.approx(loss["Bone, tile"], abs=1e-4)
    assert len({round(values[0], 6) for name, values in loss.items() if name != "MiSS"}) == 5


def test_gradients_of_the_tile_form_are_larger_in_every_layer(bone):
    ratios = bone[0]["ratios"]
    assert len(ratios) == 12
    assert min(ratios) > 1.5


def test_bone_runs_as_stock_lora(bone):
    facts, _ = bone
    assert facts["layers"] == ["peft.tuners.lora.layer"]
    assert facts["exported"] == ["LORA", 8]
    assert facts["errors"] == [0.0] * 12
    assert facts["apart"] < 1e-4 < 0.01 < facts["moved"]


# --- OFQ: one block, in which 2-bit layers have 192 + 64 + 256 + 64 rows


def paired(values, others):
    """What a paired t-test at 5 % says of values minus others."""
    from scipy.stats import ttest_rel

    differences = {x - y for x, y in zip(values, others, strict=True)}
    if len(differences) == 1:  # no variance to test with
        direction, p = differences.pop(), 0.0
    else:
        test = ttest_rel(values, others)
        direction, p = test.statistic, test.pvalue
    return "no difference shown" if p >= 0.05 or direction == 0 else "higher" if direction > 0 else "lower"


def codes_by_hand(weight, scale):
    """2-bit codes and the step of each row: LSQ where there is a scale, else StatsQ, whose levels are half above."""
    import numpy as np

    weight = np.asarray(weight)
    if scale is None:
        step = np.abs(weight).mean(1, keepdims=True)
        return np.floor(weight / step).clip(-2, 1), step
    step = np.maximum(np.asarray(scale)[:, None], 1e-5)
    return (weight / step).clip(-2, 1).round(), step


def test_images_and_seeds_of_tuning_are_not_those_of_the_comparison(ofq):
    facts, _ = ofq
    assert not set(facts["seeds"][0]) & set(facts["seeds"][1])
    assert all(facts["splits"])
    everything = [image for split in facts["splits"] for image in split]
    assert len(everything) == len(set(everything))


def test_rates_are_those_with_the_lowest_loss_of_the_same_grid(ofq):
    facts, _ = ofq
    for method, tried in facts["tuning"].items():
        assert [pair for *pair, _ in tried] == facts["pairs"]
        assert facts["best"][method] == min(tried, key=lambda one: sum(one[2]))[:2]
    assert len({json.dumps(tried) for tried in facts["tuning"].values()}) == 3


def test_the_three_methods_start_from_the_teacher_and_see_the_same_batches(ofq):
    facts, _ = ofq
    assert set(facts["from_teacher"]) == {"LSQ", "StatsQ", "StatsQ + QKR"}
    assert all(map(all, facts["from_teacher"].values()))
    assert all(facts["learned"])
    assert facts["seen"][0] == facts["seen"][1] == facts["seen"][2] != []


def test_the_partner_built_for_the_notebook_is_lsq(ofq):
    import numpy as np

    layer = ofq[0]["layers"]["LSQ"]
    weight, scale, gradient = (np.asarray(layer[name]) for name in ("weight", "scale", "gradient"))
    codes, step = codes_by_hand(weight, scale)
    assert np.allclose(np.asarray(layer["input"]) @ (codes * step).T, layer["output"], atol=1e-4)
    assert np.allclose(scale, 2 * np.abs(weight).mean(1))  # Qp = 1
    beyond = (weight < -2 * step) | (weight > step)
    assert beyond.any()
    assert not gradient[beyond].any()
    assert (gradient[~beyond] != 0).mean() > 0.9


def test_statsq_has_other_levels_and_a_gradient_beyond_them(ofq):
    import numpy as np

    layer = ofq[0]["layers"]["StatsQ"]
    assert layer["scale"] is None
    codes, step = codes_by_hand(layer["weight"], None)
    assert np.allclose(np.asarray(layer["input"]) @ ((codes + 0.5) * step).T, layer["output"], atol=1e-4)
    beyond = np.abs(layer["weight"]) > 2 * step
    assert beyond.any()
    assert (np.asarray(layer["gradient"])[beyond] != 0).mean() > 0.9


def test_scales_that_are_switched_off_are_counted_among_all(ofq):
    facts, _ = ofq
    for method, scales in facts["scales"].items():
        together = [value for scale in scales for value in scale]
        assert facts["off"][method] == pytest.approx(100 * sum(x <= 1e-5 for x in together) / len(together), abs=1e-3)
    lsq, statsq = (sum(map(len, facts["scales"][method])) for method in ("LSQ", "StatsQ"))
    assert lsq == statsq + 192 + 64 + 256 + 64


def test_differences_of_accuracy_are_judged_by_a_paired_t_test(ofq):
    facts, _ = ofq
    pairs = [("StatsQ", "LSQ"), ("StatsQ + QKR", "LSQ"), ("StatsQ + QKR", "StatsQ")]
    assert [tuple(gap[:2]) for gap in facts["gaps"][3:]] == pairs
    for method, other, mean, error, verdict in facts["gaps"]:
        values, others = facts["right"][method], facts["right"][other]
        differences = [x - y for x, y in zip(values, others, strict=True)]
        assert mean == pytest.approx(sum(differences) / 2)
        assert error == pytest.approx(abs(differences[0] - differences[1]) / 2)  # of two seeds
        assert verdict == paired(values, others)


def test_turns_are_counted_as_nagel_et_al_define_them(ofq):
    facts, _ = ofq
    for column, found in zip(zip(*facts["path"], strict=True), facts["frequency"], strict=True):
        frequency, direction = 0.0, 0
        for before, now in itertools.pairwise(column):
            change = (now > before) - (now < before)
            frequency = 0.01 * (change != 0 and change == -direction) + 0.99 * frequency
            direction = change or direction
        assert found == pytest.approx(frequency, abs=1e-6)
    assert max(facts["frequency"]) > 0.1


def test_shares_of_oscillating_weights_are_of_all_that_the_method_rounds(ofq):
    facts, _ = ofq
    weights = 64 * (192 + 64 + 256 + 256)
    under_qkr = weights - 64 * 128 + 4 * 64 * 64  # W_q^T W_k of four heads in place of W_q and W_k
    for name, runs in facts["turned"].items():
        assert {of for _, of in runs} == {under_qkr if "QKR" in name else weights}
        assert facts["oscillating"][name] == pytest.approx([100 * turned / of for turned, of in runs])


def test_a_phase_with_annealing_and_its_control_see_the_same_batches(ofq):
    control, annealed = ofq[0]["seen_last"]
    assert control == annealed != []


def test_annealing_moves_none_but_weights_close_to_a_threshold(ofq):
    share, far, of = ofq[0]["moved"]["StatsQ"]
    assert share > 0.9
    assert far > 0.9 * of > 0
    share, far, _ = ofq[0]["moved"]["StatsQ + CGA"]
    assert 0 < share < 0.05
    assert far == 0


def test_annealing_freezes_nearly_all_weights_and_fewer_oscillate(ofq):
    facts, _ = ofq
    for name, frozen in facts["frozen"].items():
        assert min(frozen) > 99 if "CGA" in name else not any(frozen), name
    for annealed, control in (("StatsQ + CGA", "StatsQ"), ("StatsQ + QKR + CGA", "StatsQ + QKR")):
        pairs = zip(facts["oscillating"][annealed], facts["oscillating"][control], strict=True)
        assert all(fewer < more for fewer, more in pairs), annealed


@pytest.mark.parametrize("method", ["LSQ", "StatsQ"])
def test_a_code_changes_where_the_distance_says(method, ofq):
    import numpy as np

    rows = ofq[0]["rows"][method]
    weight = np.asarray(rows["weight"])
    codes, step = codes_by_hand(weight, rows["scale"])
    scale = rows["scale"]
    distance = np.asarray(rows["distance"]).reshape(weight.shape) * step
    if scale is None:  # so that the scale stays: StatsQ's codes are LSQ's of weights moved by half a step
        weight, codes, scale = weight - step / 2, codes, step[:, 0]

    def changed(share):
        moved = [codes_by_hand(weight + sign * share * distance, scale)[0] != codes for sign in (-1, 1)]
        return moved[0] | moved[1]

    assert changed(0.0).mean() < 1e-3
    assert changed(0.999).mean() < 1e-3
    assert changed(1.001).mean() > 0.999


def test_crowding_compares_the_closest_weights_with_an_even_spread(ofq):
    facts, _ = ofq
    for name, counts in facts["counts"].items():
        assert facts["crowding"][name] == pytest.approx([10 * near / wide for near, wide in counts]), name
        assert all(x < 0.5 if "CGA" in name else 0.7 < x < 1.4 for x in facts["crowding"][name]), name


def test_findings_are_those_of_paired_t_tests(ofq):
    facts, _ = ofq
    right, after, turning, crowding = (facts[name] for name in ("right", "after", "oscillating", "crowding"))
    claims = [
        (right["StatsQ"], right["LSQ"], "higher"),
        (right["StatsQ + QKR"], right["StatsQ"], "higher"),
        (turning["StatsQ"], turning["LSQ"], "lower"),
        (turning["StatsQ"], turning["LSQ, StatsQ's rate"], "lower"),
        (crowding["LSQ"], crowding["LSQ, not trained"], "higher"),
        (turning["StatsQ + CGA"], turning["StatsQ"], "lower"),
        (turning["StatsQ + QKR + CGA"], turning["StatsQ + QKR"], "lower"),
        (after["StatsQ + CGA"], after["StatsQ"], "higher"),
        (after["StatsQ + QKR + CGA"], after["StatsQ + QKR"], "higher"),
    ]
    for (claim, mean, direction, finding), (values, others, expected) in zip(facts["findings"], claims, strict=True):
        assert direction == expected, claim
        assert mean == pytest.approx(sum(x - y for x, y in zip(values, others, strict=True)) / len(values)), claim
        names = {"no difference shown": "not shown", expected: "reproduces"}
        assert finding == names.get(paired(values, others), "contrary"), claim
    assert facts["clear"] == ["reproduces", "contrary", "not shown"]
    for name, control in (("StatsQ + CGA", "StatsQ"), ("StatsQ + CGA, slower", "StatsQ, slower")):
        assert facts["by_annealing"]["accuracy"][name] == paired(after[name], after[control])
        assert facts["by_annealing"]["oscillating"][name] == paired(turning[name], turning[control])


def test_every_layer_of_the_annealed_model_is_quantised(ofq):
    block = [f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert [name for name, *_ in ofq[0]["report"]] == ["patch_embed.proj", *block, "head"]
    for name, status, w_bits, a_bits, codes, executed in ofq[0]["report"]:
        assert (status, executed) == ("quantized", True)
        assert (w_bits, a_bits) == ((2, 2) if name in block else (8, 8))
        assert 1 < codes <= 2**w_bits


def test_packed_and_int8_models_give_the_same_logits_from_fewer_bytes(ofq):
    facts, _ = ofq
    assert facts["apart"]["packed"] == facts["apart"]["int8"] == 0.0 < 0.01 < facts["apart"]["teacher"]
    float_bytes, code_bytes, packed = facts["bytes"]
    assert float_bytes == 4 * facts["parameters"]
    assert code_bytes == facts["low_bit"] / 4 < sum(packed.values()) / 2
    assert sum(packed.values()) < float_bytes / 4


# --- importance weights: 3 seeds of 400 documents; lists and weights are those of the first seed of "topics"


def voted(rows, weigh, k=10):
    """Percent of right answers, each document among the first k of weight above 0 voting by its weight."""
    right = 0
    for ids, sources, answers, _, wanted in rows:
        weights = [weigh(i, source) for i, source in zip(ids, sources, strict=True)]
        reading = [(answer, weight) for answer, weight in zip(answers, weights, strict=True) if weight > 0][:k]
        sums = {}
        for answer, weight in reading:
            sums[answer] = sums.get(answer, 0) + weight
        right += bool(sums) and max(sums, key=sums.get) == wanted
    return 100 * right / len(rows)


def keys_of(method, facts):
    """Of a document and its source, the one that the method weighs; and its weights."""
    return (0 if "documents" in method else 1), dict(facts["scores"][method][3])


def test_planted_sources_and_no_others_are_wrong_as_the_notebook_says(importance):
    planned = {"one lie": (16, 0.8, True), "carelessness": (20, 0.9, False), "topics": (20, 0.5, True)}
    for name, (count, wrong, alike) in planned.items():
        lies, planted = importance[0]["lies"][name], importance[0]["planted"][name]
        assert len(planted) == count
        assert sorted(source for source, (_, lied, _) in lies.items() if lied) == planted
        documents, lied, one_more = map(sum, zip(*(lies[source] for source in planted), strict=True))
        assert lied / documents == pytest.approx(wrong, abs=0.12)
        assert (one_more == lied) == alike
    assert not any(lied for _, lied, _ in importance[0]["lies"]["none planted"].values())
    topics = [int(source.split()[1]) // 4 for source in importance[0]["planted"]["topics"]]
    assert [topics.count(topic) for topic in range(10)] == [2] * 10


def test_documents_and_the_three_splits_have_no_digit_in_common(importance):
    digits = importance[0]["digits"]
    assert [len(part) for part in digits] == [400, 150, 100, 1797 - 650]
    assert len({digit for part in digits for digit in part}) == 1797


def test_lists_tell_what_the_documents_say(importance):
    facts, _ = importance
    source_of, answer_of = ({i: row[at] for i, *row in facts["corpus"]} for at in (0, 1))
    for ids, sources, answers, utility, wanted in itertools.chain(*facts["parts"]):
        assert len(set(ids)) == 30
        assert sources == [source_of[i] for i in ids]
        assert answers == [answer_of[i] for i in ids]
        assert utility == [answer == wanted for answer in answers]


def test_accuracies_are_those_of_votes_by_hand(importance):
    facts, _ = importance
    fit, tune, test = facts["parts"]
    utilities = [utility for row in fit for utility in row[3]]
    mean = sum(utilities) / len(utilities)
    assert len(facts["scores"]) == 7
    for method, (vanilla, ways, tuned, _, threshold, pruned) in facts["scores"].items():
        at, weights = keys_of(method, facts)
        unseen = 0.5 if method.startswith("learned") else mean if method.startswith("mean") else 0.0

        def weight(*key, at=at, weights=weights, unseen=unseen):
            return weights.get(key[at], unseen)

        def kept(*key, at=at, weights=weights, threshold=threshold):
            return weights.get(key[at], threshold) >= threshold

        assert vanilla == pytest.approx(voted(test, lambda *_: 1))
        assert ways["prune"] == pytest.approx(voted(test, kept)), method
        assert ways["weighted_vote"] == pytest.approx(voted(test, weight)), method
        assert tuned == pytest.approx(voted(tune, kept) - voted(tune, lambda *_: 1)), method
        assert pruned == sorted(key for key, value in weights.items() if value < threshold)


@pytest.mark.parametrize("method", ["learned, documents", "learned, mean", "learned, sum"])
def test_learned_weights_are_those_of_fifty_plain_steps_on_the_first_split(method, importance):
    from importance_oracle import train

    facts, _ = importance
    ids, _, _, utility, _ = zip(*facts["parts"][0], strict=True)
    update = {} if "documents" in method else {"group_of": {i: source for i, source, _ in facts["corpus"]}}
    plain = train(ids, utility, 10, 50, group_update="sum" if "sum" in method else "mean", **update)
    expected = dict(zip(plain.keys, plain.weights.tolist(), strict=True))
    assert keys_of(method, facts)[1] == pytest.approx(expected, abs=1e-9)


def test_mean_utility_and_leaving_one_out_by_hand(importance):
    facts, _ = importance
    fit = facts["parts"][0]
    everything = [one for row in fit for one in row[3]]
    mean = sum(everything) / len(everything)
    for method in ("mean utility", "mean utility, documents"):
        at, weights = keys_of(method, facts)
        slots = {key: [] for key in weights}
        for row in fit:
            for key, utility in zip(row[at], row[3], strict=True):
                slots[key].append(utility)
        assert weights == pytest.approx({key: (sum(us) + 2 * mean) / (len(us) + 2) for key, us in slots.items()})
    _, weights = keys_of("leave one out", facts)
    for source, weight in weights.items():
        lost = 0
        for _, sources, _, utility, _ in fit:
            rest = [u for u, other in zip(utility, sources, strict=True) if other != source]
            lost += (sum(utility[:10]) - sum(rest[:10])) / 10
        assert weight == pytest.approx(lost / len(fit), abs=1e-12)


def test_differences_of_votes_are_judged_by_a_paired_t_test(importance):
    facts, _ = importance
    right = {(name, way): values for name, way, values in facts["right"]}
    assert len(right) == 8
    assert len(facts["against_all"]) == 8 * 7
    assert len(facts["against_mean"]) == 8 * 5
    assert {len(values) for by_method in right.values() for values in by_method.values()} == {facts["seeds"]}
    for table in ("against_all", "against_mean"):
        for name, way, method, mean, _, verdict in facts[table]:
            values = right[name, way][method]
            others = facts["vanilla"][name] if table == "against_all" else right[name, way][facts["plain"][method]]
            assert mean == pytest.approx(sum(values) / len(values) - sum(others) / len(others))
            assert verdict == paired(values, others)


def test_the_text_on_the_plain_mean_follows_from_those_tests(importance):
    facts, notebook = importance
    printed = "".join(output.get("text", "") for output in outputs(notebook))
    verdicts = [(name, way, method, verdict) for name, way, method, _, _, verdict in facts["against_mean"]]
    learned = [row for row in verdicts if row[2].startswith("learned") and row[0] != "none planted"]
    assert len(facts["findings"]) == 6
    for name, way, finding in facts["findings"]:
        by_verdict = {
            verdict: [method for *case, method, said in learned if case == [name, way] and said == verdict]
            for verdict in ("higher", "lower")
        }
        assert ("the plain mean utility is as good" in finding) == (not by_verdict["higher"])
        better, _, worse = finding.partition("Less accurate than it: ")
        assert all(method in better for method in by_verdict["higher"])
        assert worse == "; ".join(by_verdict["lower"])
        assert f"{finding}." in printed
    for verdict, count in facts["tally"].items():
        assert count == [said for *_, said in learned].count(verdict)
    assert sum(facts["tally"].values()) == len(learned) == 24
    against_all = [said for name, *_, said in facts["against_all"] if name != "none planted"]
    assert facts["helped"] == {verdict: against_all.count(verdict) for verdict in facts["helped"]}


def test_what_pruning_found_is_counted_by_hand(importance):
    facts, _ = importance
    planted = set(facts["planted"]["topics"])
    found = {method: numbers for name, method, *numbers in facts["found"] if name == "topics"}
    assert len(facts["found"]) == 3 * 5
    for method, (_, recall, in_order) in found.items():
        _, weights = keys_of(method, facts)
        pruned = set(facts["scores"][method][5])
        assert recall[0] == pytest.approx(100 * len(pruned & planted) / len(planted))
        pairs = [weights[bad] < weights[good] for bad in planted for good in weights.keys() - planted]
        assert in_order[0] == pytest.approx(100 * sum(pairs) / len(pairs))
    for method, one_topic, values in facts["within"]:
        _, weights = keys_of(method, facts)
        pairs = [
            weights[bad] < weights[good]
            for bad in planted
            for good in weights.keys() - planted
            if (int(bad[-2:]) // 4 == int(good[-2:]) // 4) == one_topic
        ]
        assert values[0] == pytest.approx(100 * sum(pairs) / len(pairs))


def test_the_control_counts_gains_where_nothing_is_planted(importance):
    facts, _ = importance
    for way, counts in facts["gains"].items():
        said = [row[-1] for row in facts["against_all"] if row[:2] == ["none planted", way]]
        assert counts == {verdict: said.count(verdict) for verdict in counts}
    for values, (mean, _, verdict) in facts["control"].values():
        assert mean == pytest.approx(sum(values) / len(values))
        assert verdict == paired(values, [0.0] * len(values))
        assert min(values) >= 0  # no worse on the rows of its own choice


def test_the_executed_control_shows_no_gain():
    """Of the whole run, whose numbers mean something."""
    notebook = nbformat.read(FOLDER / "importance_weights.ipynb", as_version=4)
    printed = "".join(output.get("text", "") for output in outputs(notebook))
    for way in ("pruned", "weighted vote"):
        assert f"{way}, third split: none of 7 methods shows a gain" in printed


def test_the_steps_climb_and_weights_are_kept_in_range(importance):
    facts, _ = importance
    for values, last in facts["climbs"].values():
        assert len(values) == 50
        assert values[0] < last
    for path in facts["paths"].values():
        assert len(path) == 40
        assert all(0 <= weight <= 1 for weights in path for weight in weights)


def test_errors_that_were_made_are_below_those_that_were_certified(importance):
    facts, _ = importance
    assert facts["used"] < 1e-12
    made = [made for _, _, made, _ in facts["truncated"]]
    assert made == sorted(made, reverse=True)
    assert made[0] > 1e-4
    for epsilon, bound, made, _ in facts["truncated"]:
        assert 0 < made <= bound <= epsilon
    for epsilon, count, bound, errors in facts["sampled"]:
        assert min(errors) > 0
        assert max(errors) <= bound <= epsilon
        assert count < facts["lists"][0]


def test_as_many_lists_are_sampled_as_the_certificate_asks_for(importance):
    """One epoch, 50 documents of which a list holds 20 once, utilities of 0 and 1, k = 5."""
    from math import ceil, log

    N, delta = importance[0]["lists"]
    for epsilon, count, *_ in importance[0]["sampled"]:
        e, B, L = epsilon / 2, 1 / 5, log(2 * 50 / delta)
        Q = 2 * B**2 * L / e**2
        least, most = (
            min(Q * (N + 1) / (N + Q), (2 * B**2 * share / e**2 + 4 * B / (3 * e)) * L) for share in (0.4, 0.45)
        )
        assert ceil(least) <= count <= ceil(most)


# --- all together: one reader a way of training, from 24 sources of which 8 lie


def documents_of(row):
    """The documents of a packed row, each [positions, tokens, labels]; position 0 is an anchor."""
    found = []
    for position, token, label in zip(*row, strict=True):
        if position == 0:
            found.append([[], [], []])
        for column, value in zip(found[-1], (position, token, label), strict=True):
            column.append(value)
    return found


def judged_by_hand(scores, labels, offsets=None):
    """Accuracy, and how often A is said where it is wrong; offsets: number of choices -> what each letter loses."""
    said = []
    for row in scores:
        row = [score for score in row if score is not None]
        row = [score - off for score, off in zip(row, (offsets or {}).get(len(row), [0] * len(row)), strict=True)]
        said.append(row.index(max(row)))
    wrong = [answer for answer, label in zip(said, labels, strict=True) if label != 0]
    return [sum(a == b for a, b in zip(said, labels, strict=True)) / len(labels), wrong.count(0) / len(wrong)]


def mean_log_softmax(scores):
    """Number of choices -> the mean of each letter."""
    import numpy as np

    by_count = {}
    for row in scores:
        row = np.array([score for score in row if score is not None])
        by_count.setdefault(len(row), []).append(row - np.logaddexp.reduce(row))
    return {count: np.mean(rows, axis=0) for count, rows in by_count.items()}


def test_liars_and_nobody_else_lie_and_always_say_a(together):
    facts, _ = together
    wrong = {source for _, source, key, label, *_ in facts["corpus"] if key != label}
    assert sorted(wrong) == facts["liars"]
    assert {key for _, _, key, label, *_ in facts["corpus"] if key != label} == {0}
    assert len(facts["liars"]) == 8
    assert len({source for _, source, *_ in facts["corpus"]}) == 24


def test_lists_hold_documents_about_the_word_that_is_asked_for(together):
    facts, _ = together
    document = {i: (source, choices[key], question) for i, source, key, _, choices, question in facts["corpus"]}
    for ids, sources, utility, answer in itertools.chain(*facts["parts"]):
        assert len(set(ids)) == 60
        found = [document[i] for i in ids]
        assert [question for *_, question in found] == [f"{answer}?"] * 60
        assert sources == [source for source, *_ in found]
        assert utility == [float(said == answer) for _, said, _ in found]


def test_sources_are_weighed_and_pruned_by_hand(together):
    from importance_oracle import train

    facts, _ = together
    ids, sources, utility, _ = zip(*facts["parts"][0], strict=True)
    plain = train(ids, utility, 10, 50, group_of={i: source for i, source, *_ in facts["corpus"]}, group_update="mean")
    learned = dict(zip(plain.keys, plain.weights.tolist(), strict=True))
    assert facts["weights"]["learned weights"] == pytest.approx(learned, abs=1e-9)
    everything = [one for row in utility for one in row]
    overall, slots = sum(everything) / len(everything), {}
    for row in zip(sources, utility, strict=True):
        for source, one in zip(*row, strict=True):
            slots.setdefault(source, []).append(one)
    smoothed = {source: (sum(us) + 2 * overall) / (len(us) + 2) for source, us in slots.items()}
    assert facts["weights"]["mean utility"] == pytest.approx(smoothed)
    for name, weights in facts["weights"].items():
        pruned = sorted(source for source, weight in weights.items() if weight < facts["thresholds"][name])
        assert facts["pruned"][name] == pruned
        assert set(facts["liars"]) <= set(pruned)
    weights = facts["weights"]["learned weights"]
    assert facts["column"] == [weights[source] for _, source, *_ in facts["corpus"]]
    out = set(facts["pruned"]["learned weights"])
    assert facts["left"] == [i for i, source, *_ in facts["corpus"] if source not in out]


def test_what_pruning_leaves_is_useful_by_hand(together):
    facts, _ = together
    for name, sources_out in facts["pruned"].items():
        for way, out in (("vanilla", []), ("prune", sources_out)):
            shares = []
            for _, sources, utility, _ in facts["parts"][2]:
                left = [u for source, u in zip(sources, utility, strict=True) if source not in out]
                shares.append(sum(left[:10]) / 10)
            assert facts["useful"][name][way] == pytest.approx(sum(shares) / len(shares))


def test_rows_hold_each_document_whole_behind_an_anchor_with_a_label_on_its_letter(together):
    facts, _ = together
    bos, words = facts["bos"], facts["words"]
    left = set(facts["left"])
    for name, keep in (("all sources", lambda i: True), ("pruned", left.__contains__)):
        packed = []
        for row in facts["rows"][name]:
            start = 0
            for positions, tokens, labels in documents_of(row):
                assert positions == [0, *range(start + 1, start + len(tokens))]
                start += len(tokens)
                if set(tokens) == {bos}:  # what fills up a row
                    assert set(labels) == {-100}
                    continue
                assert tokens.count(bos) == 1
                assert labels == [-100] * (len(tokens) - 1) + tokens[-1:]
                packed.append(" ".join(words[token] for token in tokens[1:]))
            assert start == 256
        written = [
            f"Question : {question[:-1]} ? Answer Choices : "
            + " ".join(f"{letter} : {word}" for letter, word in zip("ABCD", choices, strict=False))
            + f" Answer : {'ABCD'[key]}"
            for i, _, key, _, choices, question in facts["corpus"]
            if keep(i)
        ]
        assert sorted(packed) == sorted(written), name


def test_rivals_get_the_same_rows_and_the_hosts_own_attention(together):
    facts, _ = together
    ours = facts["rows"]["pruned"]
    for name in ("pruned, whole rows, sdpa", "pruned, restarted, sdpa"):
        assert [row[1:] for row in facts["rows"][name]] == [row[1:] for row in ours]
        assert facts["attention"][name] == "sdpa"
    assert facts["attention"]["pruned"] == facts["attention"]["all sources"] == "anchor"
    assert {row[0] for row in facts["rows"]["pruned, whole rows, sdpa"]} == {None}
    for row, (positions, *_) in zip(ours, facts["rows"]["pruned, restarted, sdpa"], strict=True):
        assert positions == [at for document in documents_of(row) for at in range(len(document[0]))]
    leaks = facts["leaks"]
    assert leaks["pruned"] == leaks["all sources"] == leaks["pruned, restarted, sdpa"] == 0.0
    assert leaks["pruned, whole rows, sdpa"] > 0.01


def test_no_question_is_asked_that_was_seen_before(together):
    prompts = {name: set(part) for name, part in together[0]["prompts"].items()}
    for one, other in itertools.combinations(prompts, 2):
        assert not prompts[one] & prompts[other], (one, other)


def test_numbers_of_readers_are_those_of_their_scores(together):
    facts, _ = together
    assert len(facts["found"]) == 6
    for name, scores in facts["found"].items():
        assert [len(row) - row.count(None) for row in scores] == facts["counts"]
        accuracy, rate, _, calibrated = facts["stated"][name]
        assert [accuracy, rate] == pytest.approx(judged_by_hand(scores, facts["labels"])), name
        by_hand = judged_by_hand(scores, facts["labels"], mean_log_softmax(scores))
        assert calibrated == pytest.approx(by_hand[0]), name


def test_the_adapter_is_bone_and_is_read_back_and_merged(together):
    facts, _ = together
    assert facts["adapters"] == {"Bone": "BONE", "LoRA": "LORA"}
    assert facts["again"]
    assert facts["merge_error"] < 1e-4
    assert len(facts["layers"]) == 3 * 7
    assert facts["numbers"]["Bone"] == sum(8 * rows for rows, _ in facts["layers"])
    assert facts["numbers"]["LoRA"] == sum(4 * (rows + columns) for rows, columns in facts["layers"])


def test_the_repair_had_no_answers_and_took_the_preference_out(together):
    facts, _ = together
    fields, keys = facts["keys"]
    assert fields == ["choices", "question"]
    assert 0.65 < keys.count(0) / len(keys) < 0.85
    assert facts["rank"] == 1
    before, after = facts["shares"]
    chance = [1 / (prompt.count(":") - 3) for prompt in facts["prompts"]["unlabelled"]]
    assert after == pytest.approx(sum(chance) / len(chance), abs=2 / len(chance))
    assert before > 0.8
    assert facts["stated"]["repaired"][1] < facts["stated"]["spoilt"][1] / 2


def test_the_digits_end_in_two_bits_and_whole_numbers(together):
    facts, _ = together
    assert facts["images"] == [1400, 397]
    assert facts["levels"] <= 4
    assert facts["apart"] == {"packed": 0.0, "int8": 0.0}
    assert facts["size"] == {"float": facts["files"][0]["model.safetensors"], "packed": sum(facts["files"][1].values())}
    assert facts["size"]["packed"] < facts["size"]["float"] / 5
    for name, guesses in facts["guesses"].items():
        right = sum(a == b for a, b in zip(guesses, facts["targets"], strict=True)) / 397
        assert facts["right"][name] == pytest.approx(right)


def test_the_closing_table_repeats_the_numbers(together):
    facts, notebook = together
    closing, stated = facts["closing"], facts["stated"]
    assert len(closing) == 5

    def percent(name, at=0):
        return f"{100 * stated[name][at]:.1f}%"

    assert closing[0][2] == f"reader: {percent('all sources')} -> {percent('pruned')} right"
    assert closing[1][2] == f"{percent('pruned')} right"
    assert percent("pruned, whole rows, sdpa") in closing[1][3]
    assert closing[1][3].endswith(percent("pruned, restarted, sdpa"))
    assert closing[2][2] == f"{percent('spoilt')} right"
    assert closing[3][1] == f"A said where it is wrong: {percent('spoilt', 1)} -> {percent('repaired', 1)}"
    assert closing[3][2] == f"{percent('spoilt')} -> {percent('repaired')} right"
    assert closing[3][3] == f"output calibration: {percent('spoilt', 3)}"
    assert closing[4][1].startswith(f"{facts['size']['float']:,} -> {facts['size']['packed']:,} bytes")
    shown = "".join(output.get("data", {}).get("text/markdown", "") for output in outputs(notebook))
    assert all(cell in shown for line in closing for cell in line)


# --- anchored answers: two seeds; the tokens of a prompt are its words, letters, colons and the question mark


def letters_said(scores):
    return [row.index(max(score for score in row if score is not None)) for row in scores]


def choices_in(prompts):
    return [prompt.count(":") - 3 for prompt in prompts]


def test_questions_to_repair_with_have_no_label_and_are_not_tested_on(mcq):
    fit, labelled, test, guard = mcq[0]["prompts"]
    assert mcq[0]["fields"] == ["choices", "question"]
    assert fit == labelled
    assert len({*fit, *test, *guard}) == len(fit) + len(test) + len(guard)


def test_bias_before_the_repair_is_that_of_the_scores(mcq):
    facts, _ = mcq
    counts = choices_in(facts["prompts"][2])
    for kind, name in (("clean", "before it was spoilt"), ("spoilt", "spoilt")):
        for scores, result in zip(facts["scores"][kind][0], facts["after"][name], strict=True):
            assert [len(row) - row.count(None) for row in scores] == counts
            assert result == pytest.approx(judged_by_hand(scores, facts["gold"])), kind
    assert min(rate for _, rate in facts["after"]["spoilt"]) > 0.5


def test_the_split_adds_up_to_how_far_a_is_ahead(mcq):
    facts, _ = mcq
    for seed, scores in enumerate(facts["scores"]["spoilt"][1]):
        lead = [row[0] - max(score for score in row[1:] if score is not None) for row in scores]
        answered_by_a = [x for x in lead if x > 0]
        assert facts["whole"][seed] == pytest.approx(sum(answered_by_a) / len(answered_by_a), abs=1e-4)
        assert facts["left"]["none"][seed] == pytest.approx(sum(lead) / len(lead), abs=1e-4)
        assert facts["left"]["first by what they add"][seed] < facts["left"]["drawn by chance"][seed]
    assert facts["total"] == pytest.approx(facts["whole"][0], abs=1e-4)


def test_a_repair_without_labels_brings_a_down_to_chance_and_comes_off_again(mcq):
    facts, _ = mcq
    fit, test = facts["mended"]
    before, after = (letters_said(x).count(0) / len(fit) for x in (facts["scores"]["spoilt"][1][0], fit))
    assert facts["shares"] == pytest.approx([before, after])
    chance = [1 / choices for choices in choices_in(facts["prompts"][0])]
    assert after == pytest.approx(sum(chance) / len(chance), abs=2 / len(chance))
    assert before > after + 0.3
    assert facts["after"]["project, MLP"][0] == pytest.approx(judged_by_hand(test, facts["gold"]))
    assert facts["unloaded"]


def test_calibration_takes_off_the_means_of_the_questions_that_the_notebook_says(mcq):
    facts, _ = mcq
    scores = facts["scores"]["spoilt"]
    for seen, name in zip(scores, ("calibration, test", "calibration, unlabelled"), strict=True):
        for ours, theirs, result in zip(scores[0], seen, facts["after"][name], strict=True):
            assert result == pytest.approx(judged_by_hand(ours, facts["gold"], mean_log_softmax(theirs))), name


def test_differences_of_repairs_are_judged_by_a_paired_t_test(mcq):
    from statistics import fmean, stdev

    from scipy.stats import t

    facts, _ = mcq
    assert [len(rows) for rows in facts["against"].values()] == [6, 7, 2]
    for other, rows in facts["against"].items():
        for name, *numbers, verdict in rows:
            those = facts["shuffled"][name] if other == "shuffled" else facts["after"][other]
            values, others = ([100 * accuracy for accuracy, _ in results] for results in (facts["after"][name], those))
            differences = [x - y for x, y in zip(values, others, strict=True)]
            error = stdev(differences) / len(differences) ** 0.5
            half = t.ppf(0.975, len(differences) - 1) * error
            assert numbers == pytest.approx([fmean(differences), error, half]), (name, other)
            assert verdict == paired(values, others), (name, other)
    assert facts["clear"] == ["higher", "lower"]  # which two seeds hardly ever show


def test_attention_is_exchanged_between_a_and_the_option_that_a_swap_favours(mcq):
    facts, _ = mcq
    tokens = [re.findall(r"\w+|[:?]", prompt) for prompt in facts["prompts"][2]]
    letters = ([None] * len(tokens), facts["chance_letter"], facts["gold"])
    for (way, by_place), favoured in zip(facts["places"].items(), letters, strict=True):
        for behind, (where, found) in enumerate(by_place.items()):  # the colon is behind its letter, then the word
            expected = [["equalise" if way == "evened out" else "swap", []] for _ in (2, 3, 4)]
            for row, count, letter in zip(tokens, choices_in(facts["prompts"][2]), favoured, strict=True):
                options = range(count) if letter is None else (0, letter)
                places = [row.index("ABCD"[option]) + behind - len(row) for option in options]
                expected[count - 2][1].append([0, 0] if letter == 0 else places)  # A with itself
            assert found == expected, (way, where)


def test_an_edited_model_says_the_letter_that_it_is_told(mcq):
    facts, _ = mcq
    told, misled, _ = facts["told"]  # of the last seed at the last strength
    pairs = ((told, facts["gold"]), (misled, facts["gold"]), (misled, facts["chance_letter"]))
    by_hand = [100 * sum(map(int.__eq__, *pair)) / len(told) for pair in pairs]
    right, missed, said = (values for _, strength, values in facts["own"] if strength == 4)
    assert [right[-1], missed[-1], said[-1]] == pytest.approx(by_hand)
    assert min(right + said) > 95


def test_untrained_nets_stay_at_chance_and_are_right_if_told_the_right_letter(mcq):
    facts, _ = mcq
    labels = facts["labels"][2]
    assert facts["fresh"]
    assert facts["told"][2] == labels
    assert facts["untrained"]["as it is"][-1][0] == pytest.approx(judged_by_hand(facts["plain"], labels)[0])
    *repairs, right_letter = facts["untrained"].values()
    assert all(accuracy == 1 for accuracy, _ in right_letter)
    deviation = (0.25 * 0.75 / len(labels)) ** 0.5
    assert all(abs(accuracy - 0.25) < 3 * deviation for results in repairs for accuracy, _ in results)


def test_labels_of_any_kind_leave_the_adapter_as_it_is(mcq):
    true, shuffled, _ = mcq[0]["labels"]
    counts = choices_in(mcq[0]["prompts"][0])
    assert sorted(zip(counts, true, strict=True)) == sorted(zip(counts, shuffled, strict=True))
    assert true != shuffled
    none, of_true, of_shuffled, of_other_questions = mcq[0]["adapters"]
    assert none == of_true == of_shuffled != of_other_questions
    assert mcq[0]["alike"]


def test_the_closing_tally_is_counted_by_hand(mcq):
    facts, notebook = mcq
    after = facts["after"]
    printed = [output.text for output in outputs(notebook) if "text" in output][-1].splitlines()[1:]
    assert [line[:34].strip() for line in printed[:7]] == ["calibration, unlabelled", *facts["repairs"]]
    assert [line[:34].rpartition(",")[0] for line in printed[7:]] == list(facts["places"])
    for line in printed:
        results = (after | facts["attention"])[line[:34].strip()]
        pairs = list(zip(results, after["spoilt"], strict=True))
        halved = sum(rate < old / 2 for (_, rate), (_, old) in pairs)
        higher = sum(accuracy > old for (accuracy, _), (old, _) in pairs)
        gain = 100 * sum(accuracy - old for (accuracy, _), (old, _) in pairs) / len(pairs)
        assert line[34:].split() == [str(halved), str(higher), f"{gain:+.1f}"], line
