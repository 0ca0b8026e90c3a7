"""Whole training loops of other people, with nothing of ours in them but the string, the rows, the collator or the
sampler.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from anchor_models import ANCHOR, additive, build, config_of
from anchor_oracle import assert_equal, visible_segments
from datasets import Dataset
from importance_corpora import corpus, fitted, validation
from processes import run
from sixty_words import TEXTS, WORDS
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from hf_ext import AnchorCollator, AnchorPacking

DOCUMENTS = [[ANCHOR, *(4 + WORDS.index(word) for word in text.split())] for text in TEXTS]
QUIET = pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")
LOSS = torch.nn.functional.cross_entropy


def arguments(folder: Path, kind: Any = TrainingArguments, **others: Any) -> Any:
    return kind(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        **others,
    )


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in model.named_parameters()}


def summed_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return LOSS(logits[:-1], tokens[1:], reduction="sum")


@QUIET
@pytest.mark.smoke
def test_trainer_with_the_flattening_collator_isolates_documents_and_resets_positions(tmp_path):
    """The paper's baseline: every document as if alone, from position 0."""
    model, stock = build(config_of("llama"), "anchor"), build(config_of("llama"), "sdpa")
    seen = []

    def compare(model: Any, _: tuple, batch: dict[str, Any], out: Any) -> None:
        stock.load_state_dict(model.state_dict())
        documents = batch["input_ids"][0].tensor_split((batch["position_ids"][0] == 0).nonzero().flatten()[1:])
        with torch.no_grad():
            alone = sum(summed_loss(stock(input_ids=document[None]).logits[0], document) for document in documents)
        seen.append((out.loss.detach(), alone / sum(len(document) - 1 for document in documents), len(documents)))

    model.register_forward_hook(compare, with_kwargs=True)
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=Dataset.from_dict({"input_ids": DOCUMENTS}),
        data_collator=DataCollatorWithFlattening(),
    )
    trainer.train()
    assert [count for *_, count in seen] == [4, 4, 4]
    for ours, alone, _ in seen:
        assert_equal(ours, alone, 1e-6)


def test_accelerate_loop_with_packed_rows():
    rows = Dataset.from_dict({"input_ids": DOCUMENTS})
    rows = rows.map(AnchorPacking(32, ANCHOR), batched=True, remove_columns=["input_ids"]).with_format("torch")
    model = build(config_of("llama"), "anchor").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows, batch_size=2))
    stock = build(config_of("llama"), "eager").train()
    plain = torch.optim.SGD(stock.parameters(), lr=0.1)
    for batch in loader:
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        mask = additive(visible_segments(batch["position_ids"]))
        stock(**batch | {"attention_mask": mask}).loss.backward()
        plain.step()
        plain.zero_grad()
    assert len(loader) > 2
    # Eager attention takes its softmax in float32.
    assert_equal(parameters(accelerator.unwrap_model(model)), parameters(stock), 1e-4)


# ---------------------------------------------------------------- TRL


class Trained:
    """What a run of SFTTrainer did: the batches its model got, and its parameters afterwards."""

    def __init__(self, folder: Path, tokenizer: Any, name: str, collator: Any = None, **options: Any) -> None:
        trl = pytest.importorskip("trl")
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


def test_the_command_line_of_trl(tmp_path, tokenizer):
    pytest.importorskip("trl")
    config = copy.deepcopy(config_of("llama"))
    config.eos_token_id = 2
    build(config, "sdpa", torch.float32).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    options = {
        "model_name_or_path": tmp_path / "model",
        "dataset_name": tmp_path / "data",
        "attn_implementation": "anchor_continuous",
        "max_length": 24,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "output_dir": tmp_path / "out",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
    }
    command = [sys.executable, "-m", "trl.scripts.sft", "--packing"]
    command += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    environment = os.environ | {"HF_EXT_DEBUG": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "hf_ext: using anchor_continuous (" in done.stderr
    assert "no anchor" not in done.stderr
    assert (tmp_path / "out/model.safetensors").exists()


# ---------------------------------------------------------------- what people run beside us


SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


def replayed(batches: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The parameters after a step of SGD on each batch, with stock attention given the mask."""
    stock = build(config_of("llama"), "sdpa").train()
    optimizer = torch.optim.SGD(stock.parameters(), lr=1e-2)
    for batch in batches:
        ids, positions = batch["input_ids"], batch["position_ids"]
        mask = visible_segments(positions)[:, None]
        logits = stock(input_ids=ids, position_ids=positions, attention_mask=mask).logits.float()
        labels = batch.get("labels", ids.masked_fill(positions == 0, -100))
        LOSS(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters(stock)


def test_trainer_with_a_compiled_model(tmp_path):
    rows = Dataset.from_dict({"input_ids": DOCUMENTS})
    rows = rows.map(AnchorPacking(16, ANCHOR), batched=True, remove_columns=["input_ids"])
    model, batches = build(config_of("llama"), "anchor"), []

    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batches.append(default_data_collator(examples))
        return batches[-1]

    Trainer(model, arguments(tmp_path, **SGD, **COMPILED), collate, rows).train()
    assert all((batch["position_ids"] == 0).sum() > 4 for batch in batches)
    assert_equal(parameters(model), replayed(batches[:3]), 1e-6)


@QUIET
@pytest.mark.parametrize("options", [{}, COMPILED], ids=["eager", "compiled"])
def test_trl_and_its_chunked_loss(tmp_path, tokenizer, options):
    """That loss is its default: no logits of a whole row, and no forward of the outer model."""

    def wrap(inner: Any) -> AnchorCollator:
        return AnchorCollator(inner, anchor_token_id=ANCHOR, on_missing_anchor="error")

    ours = Trained(tmp_path, tokenizer, "anchor", wrap, packing=True, max_length=24, **SGD, **options)
    assert_equal(ours.parameters, replayed(ours.batches[:3]), 1e-6)


@pytest.mark.gpu
def test_liger_kernels_leave_attention_alone():
    """What `use_liger_kernel=True` does to a model; in bfloat16, against the same model without."""
    liger = pytest.importorskip("liger_kernel.transformers")
    rows = Dataset.from_dict({"input_ids": DOCUMENTS})
    rows = rows.map(AnchorPacking(16, ANCHOR), batched=True, remove_columns=["input_ids"])
    batch = {name: x.cuda() for name, x in default_data_collator(list(rows)).items()}
    losses = []
    for patched in (False, True):
        model = build(config_of("llama"), "anchor", torch.bfloat16).cuda().train()
        if patched:
            liger._apply_liger_kernel_to_instance(model)
        losses.append(model(**batch).loss)
    assert_equal(losses[1], losses[0], 2e-2)


# ---------------------------------------------------------------- two processes that weigh a corpus


WEIGHING = """
import json
from accelerate import Accelerator
from datasets import load_from_disk
from torch.utils.data import DataLoader
from hf_ext import ImportanceWeights

accelerator = Accelerator(cpu=True)
weights = ImportanceWeights(k=3, epochs=5).fit(load_from_disk("validation"), accelerator)
with accelerator.main_process_first():
    corpus = load_from_disk("corpus").map(weights, batched=True)
rows = corpus.select_columns(["number", "importance"]).with_format("torch")
loader = accelerator.prepare(DataLoader(rows, batch_size=4, sampler=weights.sampler(corpus, seed=7)))
drawn = [[batch["number"].tolist() for batch in loader] for _ in range(2)]
assert min(batch["importance"].min() for batch in loader) > 0
found = [accelerator.num_processes, weights.to_dict(), corpus["importance"][:], drawn]
with open(f"rank{accelerator.process_index}.json", "w") as file:
    json.dump(found, file)
"""


def test_two_processes_weigh_a_corpus_and_draw_from_it(tmp_path):
    """The weights of one process, bit for bit, and its draws, every batch in one of the two."""
    Dataset.from_dict(validation()).save_to_disk(tmp_path / "validation")
    corpus().save_to_disk(tmp_path / "corpus")
    (tmp_path / "script.py").write_text(WEIGHING)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    done = run(*launch, "script.py", env={"HF_EXT_DEBUG": "1"}, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("hf_ext: using importance_weights (k=3, method=multilinear") == 2

    alone = fitted(Dataset.from_dict(validation()))
    weighed = corpus().map(alone, batched=True)
    sampler = alone.sampler(weighed, seed=7)
    rows = [list(sampler) for _ in range(2)]
    batches = [[epoch[at : at + 4] for at in range(0, len(epoch), 4)] for epoch in rows]
    assert rows[0] != rows[1]
    for rank in range(2):
        processes, weights, column, drawn = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert processes == 2
        assert weights == alone.to_dict()
        assert column == weighed["importance"][:]
        assert drawn == [epoch[rank::2] for epoch in batches]
