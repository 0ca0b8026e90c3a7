"""Whole training loops of other people in this process, with nothing of ours in them but the string, the rows or the
collator.

TRL, lm-eval, the scripts of transformers and timm, and two processes have files of their own.
"""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from anchor_models import ANCHOR, additive, build, config_of
from anchor_oracle import assert_equal, visible_segments
from datasets import Dataset
from real_loops import COMPILED, DOCUMENTS, LOSS, QUIET, SGD, arguments, parameters, replayed
from torch.utils.data import DataLoader
from transformers import DataCollatorWithFlattening, Trainer, default_data_collator

from hf_ext import AnchorPacking


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
