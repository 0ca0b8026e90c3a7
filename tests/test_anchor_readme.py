"""The recipes of the package's README, block by block as they stand there."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

import hf_ext
from hf_ext.demo import text

README = Path(hf_ext.__file__).parent / "anchor_attention" / "README.md"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What the names stand for after all blocks have run, in order."""
    folder = tmp_path_factory.mktemp("model")
    texts = text.documents(40, seed=0)
    tokenizer = text.train_tokenizer(texts, vocab_size=512)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    domains = ["first", "second"] * 20
    names = {
        "documents": Dataset.from_dict({"text": texts, "domain": domains}),
        "tokenizer": tokenizer,
        "folder": str(folder),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
            exec(block, names)
    return names


def test_rows_are_of_one_length_and_begin_with_the_anchor(ran):
    rows, anchor = ran["rows"], ran["tokenizer"].bos_token_id
    assert {len(row) for row in rows["input_ids"]} == {256}
    assert {row[0] for row in rows["input_ids"]} == {anchor}


def test_tags_are_read_but_not_learned(ran):
    tokenizer, documents, rows = ran["tokenizer"], ran["documents"], ran["tagged_rows"]
    ids, labels = (torch.tensor(rows[name]).flatten() for name in ("input_ids", "labels"))
    tags = {domain: tokenizer(f"{domain}: ", add_special_tokens=False)["input_ids"] for domain in ("first", "second")}
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in documents["text"]]
    assert sum((labels != -100).tolist()) == sum(map(len, texts))
    found = dict.fromkeys(tags, 0)
    for domain, tag in tags.items():
        windows = ids.unfold(0, len(tag), 1)
        behind_an_anchor = (windows == torch.tensor(tag)).all(1).nonzero().flatten()
        for start in behind_an_anchor.tolist():
            if start and ids[start - 1] == tokenizer.bos_token_id:
                assert (labels[start : start + len(tag)] == -100).all()
                found[domain] += 1
    # A tag may be cut by the end of a row.
    assert all(count >= 15 for count in found.values())


def test_the_collator_gives_every_document_its_anchor(ran):
    batch = ran["batch"]
    starts = batch["position_ids"] == 0
    assert (batch["input_ids"][starts] == ran["tokenizer"].bos_token_id).all()
    assert starts.sum() == 4


def test_the_checks_are_content_with_the_model(ran):
    assert ran["report"].supported
    assert ran["report"].bypassing == []
    assert ran["check_rope_precision"](ran["model"]).ok
