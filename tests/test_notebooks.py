"""The notebooks: sources and executed copies agree, and what they claim holds in a fresh, small run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.fixture(params=SOURCES, ids=lambda path: path.stem)
def pair(request):
    return jupytext.read(request.param), nbformat.read(request.param.with_suffix(".ipynb"), as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_there_is_a_notebook():
    assert SOURCES, "the tests of pairs would pass on nothing"


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
    return run("bone_adapter", BONE_FACTS, tmp_path_factory.mktemp("bone"))


@pytest.mark.parametrize(("name", "figures"), [("anchor", 4), ("bone", 2)])
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
