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


# --- AnchorAttention


@pytest.fixture(scope="module")
def anchor(tmp_path_factory):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    executed = tmp_path_factory.mktemp("notebooks") / "anchor_attention.ipynb"
    command = [sys.executable, "-c", RUN, str(FOLDER / "anchor_attention.py"), str(executed)]
    env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"} | {"HF_EXT_QUICK": "1"}
    done = subprocess.run(command, input=ANCHOR_FACTS, env=env, cwd=executed.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    notebook = nbformat.read(executed, as_version=4)
    facts = json.loads(notebook.cells.pop().outputs[0].text)
    return facts, notebook


def test_a_fresh_run_is_quiet_and_draws_its_figures(anchor):
    _, notebook = anchor
    assert not [output.text for output in outputs(notebook) if output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs(notebook)) == 4


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
