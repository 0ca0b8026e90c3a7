"""lm-evaluation-harness on its command line, with strings in `--model_args`; `hf-ext mcq-report` reads its samples."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mcq_models import LETTERS, examples, tiny_model, word_tokenizer
from peft import BoneConfig, get_peft_model
from real_loops import assert_fails_for, flags, names_used, start, start_without_us
from typer.testing import CliRunner

from hf_ext.cli import app
from hf_ext.mcq_bias import bias_metrics

pytest.importorskip("lm_eval")

TASK = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: items.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{prompt}}"
doc_to_choice: "{{letters}}"
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, a Bone adapter of it, the model with the adapter merged, and a task of 2 to 5 letters."""
    path = tmp_path_factory.mktemp("lm_eval")
    base = tiny_model("llama", torch.float32, attention_bias=False)
    base.save_pretrained(path / "base")
    adapted = get_peft_model(base, BoneConfig(r=8, init_weights="bat", target_modules=["q_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, block in adapted.named_parameters():
            if "bone_block" in name:
                block.copy_(0.2 * torch.randn(block.shape, generator=generator))
    adapted.save_pretrained(path / "adapter")
    adapted.merge_and_unload().save_pretrained(path / "merged")
    for name in ("base", "merged"):
        word_tokenizer().save_pretrained(path / name)
    (path / "letters.yaml").write_text(TASK)
    rows = [row | {"letters": [*LETTERS[: row["num_choices"]]]} for row in examples(28)]
    (path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluate(output: str, **model: Any) -> list[str]:
    arguments = ",".join(f"{name}={value}" for name, value in (model | {"dtype": "float32"}).items())
    run = {"model": "hf", "model_args": arguments, "include_path": ".", "tasks": "letters", "device": "cpu"}
    return ["-m", "lm_eval", *flags(**run, batch_size=4, output_path=output, log_samples=None)]


def samples(folder: Path) -> list[dict[str, Any]]:
    [path] = folder.rglob("samples_letters_*.jsonl")
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])


def scores(sample: dict[str, Any]) -> list[float]:
    return [float(score) for score, _ in sample["filtered_resps"]]


def test_an_adapter_under_anchor_scores_as_the_merged_model_does_in_a_process_without_us(folder):
    done = start(folder, *evaluate("ours", pretrained="base", peft="adapter", attn_implementation="anchor"))
    assert names_used(done) == ["BONE", "anchor"]
    done = start_without_us(folder, *evaluate("stock", pretrained="merged", attn_implementation="sdpa"))
    assert names_used(done) == []
    ours, stock = samples(folder / "ours"), samples(folder / "stock")
    assert len(ours) == len(stock) == 28
    for one, other in zip(ours, stock, strict=True):
        assert scores(one) == pytest.approx(scores(other), abs=1e-5)

    report = CliRunner().invoke(app, ["mcq-report", str(folder / "ours"), "--json"])
    assert report.exit_code == 0, report.output
    found = json.loads(report.stdout)
    wanted = bias_metrics([scores(one) for one in ours], [int(one["target"]) for one in ours])
    assert found["refused"] == {}
    assert found["tasks"]["letters"] == {name: None if x != x else x for name, x in wanted.items()}
    assert wanted["n"] == 28
    assert wanted["accuracy"] == pytest.approx(sum(one["acc"] for one in ours) / 28)


def test_an_adapter_without_us(folder):
    done = start_without_us(folder, *evaluate("off", pretrained="base", peft="adapter"))
    assert_fails_for(done, "KeyError: 'BONE'")
