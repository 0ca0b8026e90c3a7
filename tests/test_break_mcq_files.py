"""Damaged files around anchored answers: recalibrations, mitigations, and the logs of other harnesses."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from damage import OF_FILES, OF_JSON, OF_SAFETENSORS, STRANGERS, flips, mistyped, outcome, restored, wrong
from mcq_models import WORDS, examples, tiny_model, word_tokenizer
from peft import PeftModel
from typer.testing import CliRunner

from hf_ext.cli import app
from hf_ext.mcq_bias import RecalibrationConfig, load_mitigation, mitigate, save_mitigation
from hf_ext.mcq_bias.logs import measure_logs

# --- recalibrations

SETTINGS = RecalibrationConfig([(0, 1), (1, 2)], "equalise", "colon")


@pytest.fixture
def recalibration(tmp_path) -> Path:
    SETTINGS.save_pretrained(tmp_path / "good")
    return tmp_path / "good"


def recalibrated(folder: Path, *names: str) -> str:
    """Options are checked as those of a call, and named without the file."""
    return outcome(lambda: RecalibrationConfig.from_pretrained(folder), lambda found: found == SETTINGS, folder, *names)


def test_damaged_recalibrations_are_refused_by_name(recalibration, tmp_path):
    found = {}
    for kind, damage in (OF_FILES | OF_JSON).items():
        folder = restored(recalibration, tmp_path / "copy")
        damage(folder / "recalibration.json")
        found[kind] = recalibrated(folder)
    assert found.pop("cut at 100%") == "right"  # a newline
    assert set(found.values()) == {"refused"}, wrong(found) or found


def test_recalibrations_of_another_type_are_refused_by_the_option(recalibration, tmp_path):
    found = {}
    for where, values in mistyped(json.loads((recalibration / "recalibration.json").read_text())):
        folder = restored(recalibration, tmp_path / "copy")
        (folder / "recalibration.json").write_text(json.dumps(values))
        found[where] = recalibrated(folder, where.partition(" ")[0].partition(".")[0])
    far = [where for where in found if where.endswith("= 1180591620717411303424")]  # heads far away, of no model
    assert {where: verdict for where, verdict in wrong(found).items() if where not in far} == {}


@pytest.mark.parametrize("values", [{}, {"mode": "equalise", "where": "colon"}, {"heads": {}}], ids=str)
def test_recalibrations_that_lack_an_option_are_refused(recalibration, values):
    (recalibration / "recalibration.json").write_text(json.dumps(values))
    assert recalibrated(recalibration) == "refused"


# --- mitigations


def leaning() -> Any:
    """A random model that often answers A."""
    model = tiny_model("gpt2")
    with torch.no_grad():
        for layer, block in enumerate(model.transformer.h):
            block.mlp.c_proj.weight += (0.05 + 0.05 * layer) * model.get_output_embeddings().weight[WORDS.index("A")]
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(2, 26).reshape(2, 12)).logits


RECORD = "mcq_bias.json"
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def repair(tmp_path_factory) -> tuple[Path, Any]:
    """A saved mitigation, and the model with it."""
    pm = mitigate(leaning(), word_tokenizer(), examples(30), strength=1.0, progress=False)
    good = tmp_path_factory.mktemp("repair") / "good"
    save_mitigation(pm, good)
    assert not torch.equal(logits(pm), logits(leaning()))
    return good, pm


def test_a_damaged_record_of_a_mitigation_is_refused_by_name_and_leaves_the_model(repair, tmp_path):
    """PEFT does not read it, and loads the adapter as ever."""
    (good, pm), model, found = repair, leaning(), {}
    names, before = set(dict(model.named_modules())), logits(model)
    for kind, damage in (OF_FILES | OF_JSON).items():
        folder = restored(good, tmp_path / "copy")
        damage(folder / RECORD)
        found[kind] = outcome(lambda folder=folder, model=model: load_mitigation(model, folder), bool, folder)
        assert torch.equal(logits(PeftModel.from_pretrained(leaning(), folder)), logits(pm))
        if kind == "cut at 100%":  # of a newline
            model = leaning()
    assert found.pop("cut at 100%") == "right"
    assert set(found.values()) == {"refused"}, wrong(found) or found
    assert set(dict(model.named_modules())) == names
    assert torch.equal(logits(model), before)


def test_a_damaged_adapter_of_a_mitigation_is_never_another_one(repair, tmp_path):
    """Its files are PEFT's, with PEFT's errors."""
    found = {}
    for read in (load_mitigation, PeftModel.from_pretrained):
        for kind, damage in (OF_FILES | OF_SAFETENSORS).items():
            damage(restored(repair[0], tmp_path / "copy") / "adapter_model.safetensors")
            found[kind] = outcome(lambda read=read: read(leaning(), tmp_path / "copy"), lambda _: True)
        assert set(found.values()) == {"refused"}, wrong(found) or found


@pytest.mark.parametrize("name", ["anchor", "letter_prefix", "prepend_bos"])
def test_what_a_report_takes_from_a_record_is_checked(repair, tmp_path, name):
    record, found = json.loads((repair[0] / RECORD).read_text()), {}
    for value in STRANGERS:
        folder = restored(repair[0], tmp_path / "copy")
        (folder / RECORD).write_text(json.dumps(record | {name: value}))
        if type(value) is not type(record[name]) or (name, value) == ("anchor", "strange"):
            found[repr(value)] = outcome(
                lambda folder=folder: load_mitigation(leaning(), folder), lambda _: False, folder
            )
    assert set(found.values()) == {"refused"}, found


# --- logs


def lm_eval(rows: int = 5, k: int = 3) -> list[dict[str, Any]]:
    """Samples as lm-eval writes them, one gold index after the other, answered A."""
    return [
        {
            "doc_id": row,
            "target": row % k,
            "arguments": {f"gen_args_{i}": {"arg_0": f"Question {row}", "arg_1": f" {'ABC'[i]}"} for i in range(k)},
            "filtered_resps": [[str(-1.5 - i), "False"] for i in range(k)],
            "filter": "none",
            "metrics": ["acc"],
            "acc": float(row % k == 0),
        }
        for row in range(rows)
    ]


def lighteval(rows: int = 6, k: int = 3) -> list[dict[str, Any]]:
    return [
        {
            "doc": {"choices": [" A", " B", " C"], "gold_index": row % k},
            "model_response": {"logprobs": [-1.5 - i for i in range(k)]},
        }
        for row in range(rows)
    ]


LINES, DETAILS = "samples_toy_2026-01-31T09-30-00.jsonl", "details_toy_2026-01-31T09-30-00.parquet"


def write_lines(folder: Path, samples: list[Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / LINES).write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return folder


def write_details(folder: Path, rows: list[Any]) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / DETAILS)
    return folder


class Logs:
    """Logs in a folder; reading them gives these results, or leaves the task out and says so."""

    def __init__(self, folder: Path) -> None:
        self.good, self.copy = folder, folder.with_name("copy")
        self.expected = str(measure_logs(folder))

    def outcome(self) -> str:
        def right(found: Any) -> bool:
            return bool(found[1]) or str(found) == self.expected

        return outcome(lambda: measure_logs(self.copy), right, self.copy)


def test_damaged_logs_of_lm_eval_are_refused_by_name(tmp_path):
    logs, found = Logs(write_lines(tmp_path / "good", lm_eval())), {}
    for kind, damage in (OF_FILES | OF_JSON).items():
        damage(restored(logs.good, logs.copy) / LINES)
        found[kind] = logs.outcome()
    for number, content in enumerate(flips((logs.good / LINES).read_bytes(), 60)):
        (restored(logs.good, logs.copy) / LINES).write_bytes(content)
        found[str(number)] = logs.outcome()
    valued = {number for number, verdict in found.items() if verdict == "another value, silently"}
    assert len(valued) < 15  # digits of scores and names of tasks, which have no checksum
    assert wrong(found).keys() == valued, wrong(found)


def test_metrics_of_lm_eval_of_another_type_are_named(tmp_path):
    samples = lm_eval()
    logs, found = Logs(write_lines(tmp_path / "good", samples)), {}
    for value in STRANGERS:
        write_lines(logs.copy, [samples[0], samples[1] | {"metrics": value}, *samples[2:]])
        found[repr(value)] = logs.outcome()
    assert wrong(found) == {}


def test_other_entries_of_lm_eval_of_another_type_are_named_or_leave_the_task_out(tmp_path):
    samples = lm_eval()
    logs, found = Logs(write_lines(tmp_path / "good", samples)), {}
    for where, changed in mistyped(samples[1], keep=("filter",)):  # filters are any text
        score = where.startswith("filtered_resps.") and where.partition(" ")[0].count(".") == 2
        if not score or where.endswith(("}", "]", "None", "'")):  # another number is another score
            write_lines(logs.copy, [samples[0], changed, *samples[2:]])
            found[where] = logs.outcome()
    assert len(found) > 100
    assert wrong(found) == {}


def test_damaged_details_of_lighteval_end_nobody(tmp_path):
    """Neither the interpreter nor its memory; a value may change, as their pages have no checksum."""
    logs = Logs(write_details(tmp_path / "good", lighteval()))
    for kind, damage in OF_FILES.items():
        damage(restored(logs.good, logs.copy) / DETAILS)
        verdict = logs.outcome()
        assert verdict == "refused", kind
    for content in flips((logs.good / DETAILS).read_bytes(), 150):
        (restored(logs.good, logs.copy) / DETAILS).write_bytes(content)
        verdict = logs.outcome()
        assert "MB" not in verdict and "TimeoutError" not in verdict


@pytest.mark.parametrize("kind", ["flipped", "no text", "no number", "no list"])
def test_details_of_lighteval_that_cannot_be_read_are_named(tmp_path, kind):
    rows = lighteval()
    logs = Logs(write_details(tmp_path / "good", rows))
    restored(logs.good, logs.copy)
    if kind == "flipped":
        content = bytearray((logs.good / DETAILS).read_bytes())
        content[20:60] = bytes(40)  # of the head of the first page
        (logs.copy / DETAILS).write_bytes(content)
    elif kind == "no list":
        write_details(logs.copy, [{**row, "model_response": {"logprobs": 0.5}} for row in rows])
    elif kind == "no text":
        rows[2]["doc"]["choices"][1] = None
        write_details(logs.copy, rows)
    else:
        rows[2]["model_response"]["logprobs"][1] = None
        write_details(logs.copy, rows)
    assert logs.outcome() in ("refused", "right")  # or the task is left out, with the reason


def test_the_command_says_in_a_line_that_a_log_is_a_folder(tmp_path):
    (tmp_path / LINES).mkdir()
    said = CliRunner().invoke(app, ["mcq-report", str(tmp_path)])
    assert (said.exit_code, type(said.exception)) == (2, SystemExit)
    assert LINES in said.output
