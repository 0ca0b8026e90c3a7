"""TRL: its SFTTrainer in this process and in a script, and its command line, which starts a process of its own."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from anchor_models import ANCHOR, build, config_of
from anchor_oracle import assert_equal
from datasets import Dataset
from real_loops import (
    COMPILED,
    QUIET,
    SGD,
    SHORT,
    arguments,
    assert_fails_for,
    flags,
    names_used,
    parameters,
    replayed,
    start,
    start_without_us,
    write_language_model,
)
from safetensors.torch import load_file
from sixty_words import TEXTS

from hf_ext import AnchorCollator

trl = pytest.importorskip("trl")


class Trained:
    """What a run of SFTTrainer did: the batches its model got, and its parameters afterwards."""

    def __init__(self, folder: Path, tokenizer: Any, name: str, collator: Any = None, **options: Any) -> None:
        model = build(config_of("llama"), name)
        model.config.eos_token_id = 2
        self.batches: list[dict[str, Any]] = []
        # The inner model: chunked losses call no outer forward.
        model.model.register_forward_pre_hook(lambda _, args, kwargs: self.batches.append(kwargs), with_kwargs=True)
        trainer = trl.SFTTrainer(
            model=model,
            args=arguments(folder, trl.SFTConfig, **options),
            train_dataset=Dataset.from_dict({"text": TEXTS}),
            processing_class=tokenizer,
        )
        if collator is not None:
            trainer.data_collator = collator(trainer.data_collator)
        trainer.train()
        self.parameters = parameters(model)


@QUIET
@pytest.mark.parametrize(
    "options",
    [
        {"packing": True, "max_length": 24},
        {"packing": True, "max_length": 24, "pad_to_multiple_of": 16},
        {"padding_free": True, "max_length": None},
    ],
    ids=["packing", "packing and padding", "padding_free"],
)
def test_trl_under_the_second_string_equals_the_collator_under_the_first(tmp_path, tokenizer, options):
    def wrap(inner: Any) -> AnchorCollator:
        return AnchorCollator(inner, anchor_token_id=ANCHOR, on_missing_anchor="error")

    ours = Trained(tmp_path, tokenizer, "anchor_continuous", **options)
    theirs = Trained(tmp_path, tokenizer, "anchor", wrap, **options)
    assert len(ours.batches) == len(theirs.batches) == 3
    for one, other in zip(ours.batches, theirs.batches, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert torch.equal(one["position_ids"], other["position_ids"])
        assert (one["position_ids"] == 0).sum() > 3
    assert_equal(ours.parameters, theirs.parameters, 0)
    reset = Trained(tmp_path, tokenizer, "anchor", **options)
    assert max((ours.parameters[name] - reset.parameters[name]).abs().max() for name in reset.parameters) > 1e-4


@QUIET
@pytest.mark.parametrize("options", [{}, COMPILED], ids=["eager", "compiled"])
def test_trl_and_its_chunked_loss(tmp_path, tokenizer, options):
    """That loss is its default: no logits of a whole row, and no forward of the outer model."""

    def wrap(inner: Any) -> AnchorCollator:
        return AnchorCollator(inner, anchor_token_id=ANCHOR, on_missing_anchor="error")

    ours = Trained(tmp_path, tokenizer, "anchor", wrap, packing=True, max_length=24, **SGD, **options)
    assert_equal(ours.parameters, replayed(ours.batches[:3]), 1e-6)


# ---------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("trl")
    write_language_model(path / "model", tokenizer)
    (path / "data").mkdir()
    (path / "data/train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def sft(implementation: str, output: Path) -> list[Any]:
    """`trl sft`, packed; it starts the training through `accelerate launch`."""
    options = SHORT | SGD | {"max_length": 24, "packing": None, "per_device_train_batch_size": 2, "learning_rate": 0.1}
    data = {"model_name_or_path": "model", "dataset_name": "data", "output_dir": output}
    console = Path(sys.executable).with_name("trl")
    return [console, "sft", *flags(attn_implementation=implementation, **options, **data)]


def test_the_command_line_isolates_documents_under_anchor_and_shares_the_anchor_under_the_second_string(folder):
    trained = {}
    for name, used in {"sdpa": [], "anchor": ["anchor"], "anchor_continuous": ["anchor_continuous"]}.items():
        done = start(folder, *sft(name, folder / name))
        assert names_used(done) == used
        assert "no anchor" not in done.stderr
        trained[name] = load_file(folder / name / "model.safetensors")
    assert_equal(trained["anchor"], trained["sdpa"], 1e-6)
    assert max((trained["anchor_continuous"][key] - x).abs().max() for key, x in trained["sdpa"].items()) > 1e-4


def test_the_command_line_without_us(folder):
    done = start_without_us(folder, *sft("anchor", folder / "without_us"))
    assert_fails_for(done, 'Specified `attn_implementation="anchor"` is not supported')


# ---------------------------------------------------------------- a script

SCRIPT = """
from datasets import load_dataset
from peft import PeftConfig
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

for implementation in ("anchor", "sdpa"):
    set_seed(0)
    trainer = SFTTrainer(
        model="model",
        args=SFTConfig(
            f"adapter_{implementation}", model_init_kwargs={"attn_implementation": implementation}, packing=True,
            max_length=24, per_device_train_batch_size=4, max_steps=3, report_to=[], save_strategy="no", use_cpu=True,
            bf16=False, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0,
        ),
        train_dataset=load_dataset("data", split="train"),
        peft_config=PeftConfig.from_pretrained("config"),
    )
    trainer.train()
    trainer.save_model()
    print(implementation, sorted({type(module).__name__ for module in trainer.model.modules()}))
"""
BONE = {"peft_type": "BONE", "r": 8, "init_weights": "bat", "target_modules": ["q_proj", "down_proj"]}


def test_a_script_with_packing_and_an_adapter_from_a_folder(folder):
    (folder / "config").mkdir()
    (folder / "config/adapter_config.json").write_text(json.dumps(BONE | {"task_type": "CAUSAL_LM"}))
    (folder / "script.py").write_text(SCRIPT)
    done = start(folder, "script.py")
    assert names_used(done) == ["BONE", "anchor"]
    assert done.stdout.count("BoneLinear") == 2
    saved = {}
    for name in ("anchor", "sdpa"):
        path = folder / f"adapter_{name}"
        assert json.loads((path / "adapter_config.json").read_text())["peft_type"] == "BONE"
        saved[name] = load_file(path / "adapter_model.safetensors")
        assert all(x.abs().max() > 1e-3 for x in saved[name].values()), "a block that starts at zero was not trained"
    assert_equal(saved["anchor"], saved["sdpa"], 1e-5)
    assert_fails_for(start_without_us(folder, "script.py"), "BONE")
