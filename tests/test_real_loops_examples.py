"""Scripts that people copy: evaluate's evaluator, the examples of transformers, and timm's train.py and validate.py.

No package carries the examples, nor timm's scripts: see `real_loops.script`.
"""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ofq_hosts import stock
from PIL import Image
from real_loops import (
    SGD,
    SHORT,
    assert_fails_for,
    flags,
    names_used,
    script,
    start,
    start_without_us,
    write_language_model,
)
from safetensors.torch import load_file
from sixty_words import TEXTS
from transformers import BertConfig, BertForSequenceClassification, ViTImageProcessor

from hf_ext import compat
from hf_ext.mcq_bias import bias_metrics

NAME = "anchored_mcq_bias"
INFERRED = pytest.mark.filterwarnings("ignore:num_choices is not given:UserWarning")  # nor do those loops give it
BERT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 67}
ITEMS = [(f"w{i % 60} w{i * 7 % 60} w{i * i % 60}", "ABCD"[(3 * i + i // 4) % 4]) for i in range(32)]
QUESTIONS = [{"text": text, "label": label} for text, label in ITEMS]
TRAINER = SHORT | SGD | {"learning_rate": 0.1, "per_device_train_batch_size": 4, "do_train": None, "output_dir": "out"}


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def entries(path: Path, **more: Any) -> None:
    """Add these to a JSON file, as a person would."""
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def write_images(folder: Path, size: int, count: int) -> None:
    """`count` images of each of three colours, in a folder each."""
    draw = np.random.default_rng(0)
    for channel, colour in enumerate(("blue", "green", "red")):
        (folder / colour).mkdir(parents=True)
        for i in range(count):
            pixels = draw.integers(0, 120, (size, size, 3))
            pixels[..., channel] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(folder / colour / f"{i}.png")


def write_classifier(folder: Path, tokenizer: Any) -> None:
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(num_labels=4, initializer_range=1.0, **BERT)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------- evaluate

EVALUATOR = f"""
import json
from datasets import Dataset
from evaluate import evaluator
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

letters = {{f"LABEL_{{i}}": i for i in range(4)}}
data = Dataset.from_json("questions.json").map(lambda row: {{"label": "ABCD".index(row["label"])}})
model, tokenizer = AutoModelForSequenceClassification.from_pretrained("model"), AutoTokenizer.from_pretrained("model")
task = evaluator("text-classification")
found = task.compute(model, data, metric="{NAME}", tokenizer=tokenizer, label_mapping=letters)
pipe = pipeline("text-classification", model=model, tokenizer=tokenizer)
answers = [letters[answer["label"]] for answer in pipe(data["text"][:])]
print(json.dumps([found, answers]))
"""


@INFERRED
def test_the_evaluator_takes_the_bare_name(tmp_path, tokenizer):
    write_classifier(tmp_path / "model", tokenizer)
    lines(tmp_path / "questions.json", QUESTIONS)
    (tmp_path / "script.py").write_text(EVALUATOR)
    done = start(tmp_path, "script.py")
    assert names_used(done) == [NAME]
    found, answers = json.loads(done.stdout.splitlines()[-1])
    assert len({*answers}) > 2
    wanted = bias_metrics(answers, ["ABCD".index(row["label"]) for row in QUESTIONS])
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, nan_ok=True)
    assert_fails_for(start_without_us(tmp_path, "script.py"), f"Couldn't find a module script at {tmp_path / NAME}")


# ---------------------------------------------------------------- transformers


@pytest.mark.skipif(not compat.reads_attention_from_config(), reason="this transformers ignores the key in config.json")
def test_run_clm_with_the_name_in_config_json(tmp_path, tokenizer):
    """One document a row: nothing to isolate, and the answer is that of stock attention."""
    path = script("run_clm.py")
    write_language_model(tmp_path / "model", tokenizer)
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    trained = {}
    for name, used in {"sdpa": [], "anchor": ["anchor"]}.items():
        entries(tmp_path / "model/config.json", attn_implementation=name)
        options = TRAINER | {"model_name_or_path": "model", "block_size": 16}
        options |= {"train_file": "text.txt", "validation_file": "text.txt"}
        command = [path, *flags(**options | {"output_dir": name})]
        assert names_used(start(tmp_path, *command)) == used
        trained[name] = load_file(tmp_path / name / "model.safetensors")
    for key, expected in trained["sdpa"].items():
        torch.testing.assert_close(trained["anchor"][key], expected, rtol=0, atol=1e-6)
    done = start_without_us(tmp_path, *command)
    assert_fails_for(done, 'Specified `attn_implementation="anchor"` is not supported')


ACCURACY = """
import datasets
import evaluate

class Accuracy(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        return {"accuracy": sum(a == b for a, b in zip(predictions, references)) / len(references)}
"""


def test_run_image_classification_with_the_recipe_in_config_json(tmp_path):
    """Without us the host logs that it does not know the name, and trains in full precision."""
    path = script("run_image_classification.py")
    stock("vit").save_pretrained(tmp_path / "model")
    entries(tmp_path / "model/config.json", quantization_config={"quant_method": "ofq", "w_bits": 2, "a_bits": 2})
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    write_images(tmp_path / "train", 16, 8)
    write_images(tmp_path / "validation", 16, 4)
    (tmp_path / "accuracy").mkdir()
    (tmp_path / "accuracy/accuracy.py").write_text(ACCURACY)  # which is on the hub otherwise
    options = {"train_dir": "train", "validation_dir": "validation", "do_eval": None, "remove_unused_columns": False}
    command = [path, *flags(**TRAINER, **options, model_name_or_path="model")]
    assert names_used(start(tmp_path, *command)) == ["ofq"]
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["quant_method"] == "ofq"
    assert "eval_accuracy" in json.loads((tmp_path / "out/eval_results.json").read_text())
    saved = load_file(tmp_path / "out/model.safetensors")
    flags_of_calibration = [x for name, x in saved.items() if name.endswith(".initialized")]
    assert flags_of_calibration
    assert all(flags_of_calibration)
    done = start_without_us(tmp_path, *command[:-2], *flags(output_dir="off", model_name_or_path="model"))
    assert names_used(done) == []
    assert "Unknown quantization type, got ofq" in done.stdout + done.stderr
    assert not [name for name in load_file(tmp_path / "off/model.safetensors") if name.endswith(".initialized")]


@INFERRED
def test_run_classification_with_the_metric_by_name(tmp_path, tokenizer):
    path = script("run_classification.py")
    write_classifier(tmp_path / "model", tokenizer)
    lines(tmp_path / "questions.json", QUESTIONS)
    files = dict.fromkeys(("train_file", "validation_file", "test_file"), "questions.json")
    options = {"do_eval": None, "do_predict": None, "max_seq_length": 16, "text_column_names": "text"}
    command = [path, *flags(**TRAINER, **files, **options, model_name_or_path="model", metric_name=NAME)]
    assert names_used(start(tmp_path, *command)) == [NAME]
    with (tmp_path / "out/predict_results.txt").open() as file:
        answers = [row["prediction"] for row in csv.DictReader(file, delimiter="\t")]
    wanted = bias_metrics(["ABCD".index(x) for x in answers], ["ABCD".index(row["label"]) for row in QUESTIONS])
    found = json.loads((tmp_path / "out/eval_results.json").read_text())
    assert {name: found[f"eval_{name}"] for name in wanted} == pytest.approx(wanted, nan_ok=True)
    assert_fails_for(start_without_us(tmp_path, *command), f"Couldn't find a module script at {tmp_path / NAME}")


# ---------------------------------------------------------------- timm


def test_train_and_validate_of_timm_with_the_recipe_before_the_architecture(tmp_path):
    train, validate = script("train.py"), script("validate.py")
    write_images(tmp_path / "data/train", 32, 8)
    write_images(tmp_path / "data/val", 32, 8)
    (tmp_path / "cpu.yaml").write_text("device: cpu\n")  # older ones have no flag for it
    sizes = ("img_size=32", "patch_size=8", "embed_dim=24", "depth=2", "num_heads=3")
    model = ["--model", "ofq_w2a2.vit_tiny_patch16_224", "--model-kwargs", *sizes, "--input-size", 3, 32, 32]
    both = [*model, "--data-dir", "data", "--num-classes", 3, "--batch-size", 8, "--workers", 1]
    training = [train, *both, "--config", "cpu.yaml", "--epochs", 2, "--warmup-epochs", 0, "--lr", 0.05]
    training += ["--output", "out", "--experiment", "run"]
    assert names_used(start(tmp_path, *training)) == ["ofq_w2a2"]
    with (tmp_path / "out/run/summary.csv").open() as file:
        last = [*csv.DictReader(file)][-1]
    checkpoint = tmp_path / "out/run/last.pth.tar"
    done = start(tmp_path, validate, *both, "--device", "cpu", "--checkpoint", checkpoint)
    assert names_used(done) == ["ofq_w2a2"]
    assert json.loads(done.stdout.partition("--result\n")[2])["top1"] == pytest.approx(
        float(last["eval_top1"]), abs=1e-3
    )
    assert_fails_for(start_without_us(tmp_path, *training), "Unknown model (ofq_w2a2)")
