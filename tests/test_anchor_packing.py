"""AnchorPacking against a slow packer that follows its rules list by list, and in datasets and the stock Trainer."""

import pickle
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from anchor_oracle import assert_equal, visible_documents, visible_segments
from datasets import Dataset, IterableDataset, load_from_disk
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_ext import AnchorPacking

ANCHOR = 1
IGNORED = -100
Pair = tuple[int, int]  # a token and its label


# ---------------------------------------------------------------- the slow packer


def slow_packer(packing: AnchorPacking, documents: list[list[int]], labels: list[list[int]]) -> dict[str, list]:
    """Rows as lists of segments, segments as lists of (token, label); columns only at the very end."""
    full, rows = [], []
    for tokens, own in zip(documents, labels, strict=True):
        pairs = list(zip(tokens, own, strict=True))
        if pairs and pairs[0][0] == ANCHOR:
            pairs = pairs[1:]
        while pairs:
            needed = len(pairs) if not packing.split_documents else 1
            if not rows or not fits(packing, rows[-1], needed):
                rows.append([[head(packing)]] if packing.layout == "shared" else [])
            pairs = put(packing, rows[-1], pairs)
    for row in rows:
        room = packing.max_length - filled(row)
        if room and row is rows[-1] and packing.drop_remainder:
            continue
        pad = ANCHOR if packing.pad_token_id is None else packing.pad_token_id
        full.append([*row, [(pad, IGNORED)] * room] if room else row)
    return columns(packing, full)


def head(packing: AnchorPacking) -> Pair:
    return ANCHOR, ANCHOR if packing.label_anchor else IGNORED


def filled(row: list[list[Pair]]) -> int:
    return sum(len(segment) for segment in row)


def fits(packing: AnchorPacking, row: list[list[Pair]], tokens: int) -> bool:
    return packing.max_length - filled(row) >= tokens + (packing.layout == "replica")


def put(packing: AnchorPacking, row: list[list[Pair]], pairs: list[Pair]) -> list[Pair]:
    """Writes one piece; returns what is left of the document."""
    room = packing.max_length - filled(row)
    if packing.layout == "replica":
        row.append([head(packing), *pairs[: room - 1]])
        return pairs[room - 1 :]
    piece, rest = pairs[:room], pairs[room:]
    if len(row) > 1:
        piece[0] = (piece[0][0], IGNORED)
    row.append(piece)
    return rest


def columns(packing: AnchorPacking, rows: list[list[list[Pair]]]) -> dict[str, list]:
    out: dict[str, list] = {
        "input_ids": [[token for segment in row for token, _ in segment] for row in rows],
        "labels": [[label for segment in row for _, label in segment] for row in rows],
        "position_ids": [list(range(packing.max_length)) for _ in rows],
    }
    if packing.layout == "shared":
        out["anchor_doc_ids"] = [[number for number, segment in enumerate(row) for _ in segment] for row in rows]
        return out
    for row, positions in zip(rows, out["position_ids"], strict=True):
        for number in range(len(row)):
            positions[filled(row[:number])] = 0
    return out


@st.composite
def packings(draw: st.DrawFn) -> AnchorPacking:
    layout = draw(st.sampled_from(["replica", "shared"]))
    return AnchorPacking(
        max_length=draw(st.integers(2, 12)),
        anchor_token_id=ANCHOR,
        split_documents=draw(st.booleans()),
        drop_remainder=draw(st.booleans()),
        layout=layout,
        label_anchor=layout == "replica" and draw(st.booleans()),
        pad_token_id=draw(st.sampled_from([None, 0, 7])),
    )


# Few token ids, so that anchors stand in front of documents, twice in front, inside, and alone.
DOCUMENTS = st.lists(st.lists(st.integers(1, 4), max_size=16), max_size=8)
QUIET = pytest.mark.filterwarnings("ignore:layout", "ignore:drop_remainder", "ignore:.*skipped")


def without_anchor(document: list[int]) -> list[int]:
    return document[document[:1] == [ANCHOR] :]


@QUIET
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(packings(), DOCUMENTS, st.booleans())
@example(AnchorPacking(4, ANCHOR, drop_remainder=True), [[2, 3, 4], [2, 3]], False)
@example(AnchorPacking(4, ANCHOR, drop_remainder=True), [[2, 3, 4]], False)
@example(AnchorPacking(2, ANCHOR), [[1, 1, 2], [1], []], True)
def test_equals_the_slow_packer(packing, documents, own_labels):
    batch: dict[str, Any] = {"input_ids": documents}
    labels = documents
    if own_labels:
        # Different at every token, so that none can stand in another's place.
        numbers = iter(range(100, 10_000))
        batch["labels"] = labels = [[next(numbers) for _ in document] for document in documents]
    too_long = [i for i, d in enumerate(documents) if len(without_anchor(d)) >= packing.max_length]
    if too_long and not packing.split_documents:
        with pytest.raises(ValueError, match=f"document {too_long[0]} "):
            packing(batch)
        return
    assert packing(batch) == slow_packer(packing, documents, labels)


@QUIET
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(packings(), st.lists(st.lists(st.integers(10, 99), max_size=16), max_size=8))
def test_every_token_once_and_rows_of_one_length(packing, documents):
    packing = replace(packing, split_documents=True, drop_remainder=False)
    out = packing({"input_ids": documents})
    assert [t for row in out["input_ids"] for t in row if t >= 10] == list(chain.from_iterable(documents))
    assert {len(row) for column in out.values() for row in column} <= {packing.max_length}
    assert {len(column) for column in out.values()} == {len(out["input_ids"])}
    labelled = [label for row in out["labels"] for label in row if label >= 10]
    if packing.layout == "replica":
        assert labelled == list(chain.from_iterable(documents))


def test_the_input_is_left_alone():
    documents = [[ANCHOR, 5, 6, 7, 8, 9], [5]]
    labels = [list(d) for d in documents]
    batch = {"input_ids": [list(d) for d in documents], "labels": labels, "text": ["a", "b"]}
    out = AnchorPacking(4, ANCHOR)(batch)
    assert batch["input_ids"] == documents == batch["labels"]
    assert set(out) == {"input_ids", "labels", "position_ids"}


def test_a_domain_tag_without_loss_is_a_matter_of_labels():
    tag, document = [40, 41], [5, 6, 7]
    out = AnchorPacking(6, ANCHOR)({"input_ids": [tag + document], "labels": [[IGNORED] * 2 + document]})
    assert out["input_ids"] == [[ANCHOR, 40, 41, 5, 6, 7]]
    assert out["labels"] == [[IGNORED, IGNORED, IGNORED, 5, 6, 7]]


# ---------------------------------------------------------------- warnings


def test_skipped_documents_are_counted_in_one_warning():
    with pytest.warns(UserWarning) as caught:
        AnchorPacking(4, ANCHOR)({"input_ids": [[], [5], [ANCHOR], []]})
    assert [("3" in str(w.message), "skipped" in str(w.message)) for w in caught] == [(True, True)]


def test_a_dropped_remainder_is_counted():
    with pytest.warns(UserWarning, match=r"drop_remainder.*\b3 tokens"):
        out = AnchorPacking(4, ANCHOR, drop_remainder=True)({"input_ids": [[5, 6, 7, 8, 9]]})
    assert out["input_ids"] == [[ANCHOR, 5, 6, 7]]


def test_the_shared_layout_tells_of_the_column_the_trainer_drops():
    with pytest.warns(UserWarning, match="remove_unused_columns=False"):
        AnchorPacking(4, ANCHOR, layout="shared")


def test_ordinary_use_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = AnchorPacking(4, ANCHOR, drop_remainder=True)({"input_ids": [[5, 6, 7]]})
    assert len(out["input_ids"]) == 1


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "options, words",
    [
        ({"max_length": 1}, ["max_length", "1", "2"]),
        ({"max_length": -4}, ["max_length", "-4"]),
        ({"max_length": "16"}, ["max_length", "'16'"]),
        ({"anchor_token_id": None}, ["anchor_token_id", "None"]),
        ({"anchor_token_id": "<s>"}, ["anchor_token_id", "<s>"]),
        ({"layout": "replicas"}, ["layout", "'replicas'", "shared", "'replica'"]),
        ({"layout": "interleaved"}, ["layout", "'interleaved'", "replica", "shared"]),
        ({"layout": "shared", "label_anchor": True}, ["label_anchor", "shared", "replica"]),
        ({"pad_token_id": "<pad>"}, ["pad_token_id", "<pad>"]),
        ({"split_documents": "no"}, ["split_documents", "'no'", "True or False"]),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_options(options, words):
    with pytest.raises(ValueError) as caught:
        AnchorPacking(**{"max_length": 8, "anchor_token_id": ANCHOR, **options})
    assert all(word in str(caught.value) for word in words)


def test_an_unknown_option_is_an_error():
    with pytest.raises(TypeError, match="split_docs"):
        AnchorPacking(8, ANCHOR, split_docs=True)


@pytest.mark.parametrize(
    "batch, words",
    [
        ({"input_ids": [5, 6, 7]}, ["input_ids", "batched=True"]),
        ({"input_ids": [[5], 6]}, ["input_ids"]),
        ({"input_ids": [[5, 6], [7, 8, 9]], "labels": [[5, 6], [7]]}, ["document 1", "3", "1"]),
        ({"input_ids": [[5, 6], [7]], "labels": [[5, 6]]}, ["labels", "2", "1"]),
        ({"input_ids": [[5, 6], [7]], "labels": [5, 6]}, ["labels"]),
        ({"input_ids": [[5, 6], [7, 0]], "attention_mask": [[1, 1], [1, 0]]}, ["document 1", "attention_mask"]),
        ({"text": ["a"]}, ["input_ids", "text"]),
        ({"input_ids": [[5], [6, 7.5]]}, ["input_ids", "row 1", "float"]),
        ({"input_ids": [[[5, 6]]]}, ["input_ids", "row 0", "list"]),
        ({"input_ids": [[5, 6], [7]], "attention_mask": [[1, 1]]}, ["attention_mask", "2", "1"]),
        ({"input_ids": [[5, 6]], "attention_mask": [[1]]}, ["document 0", "attention_mask"]),
        ({"input_ids": [[5, 6], [7, -1]]}, ["document 1", "-1"]),
        ([{"input_ids": [5]}], ["input_ids", "list", "batched=True"]),
    ],
    ids=[
        "flat_integers",
        "one_flat_integer",
        "label_lengths",
        "label_lists",
        "flat_labels",
        "padded_documents",
        "no_input_ids",
        "fractions",
        "nested_lists",
        "fewer_masks",
        "short_mask",
        "negative_token",
        "rows_instead_of_columns",
    ],
)
def test_bad_columns(batch, words):
    with pytest.raises(ValueError) as caught:
        AnchorPacking(8, ANCHOR)(batch)
    assert all(word in str(caught.value) for word in words)


def test_a_document_longer_than_a_row_is_named_with_its_length():
    packing = AnchorPacking(6, ANCHOR, split_documents=False)
    assert packing({"input_ids": [[ANCHOR, 2, 3, 4, 5, 6]]})["input_ids"] == [[ANCHOR, 2, 3, 4, 5, 6]]
    with pytest.raises(ValueError, match=r"document 2 .*\b17\b"):
        packing({"input_ids": [[2], [3], [9] * 17]})


def test_an_attention_mask_of_ones_is_fine():
    batch = {"input_ids": [[5, 6], [7]], "attention_mask": [[1, 1], [1]]}
    assert AnchorPacking(5, ANCHOR)(batch)["input_ids"] == [[ANCHOR, 5, 6, ANCHOR, 7]]


# ---------------------------------------------------------------- datasets

PACKING = AnchorPacking(8, ANCHOR, pad_token_id=0)
TEXTS = [[10 + i] * (3 + 5 * i % 17) for i in range(24)]


def corpus() -> Dataset:
    return Dataset.from_dict({"input_ids": TEXTS, "source": [f"document {i}" for i in range(len(TEXTS))]})


def tokens_of(rows: Any) -> list[int]:
    return [token for row in rows for token in row["input_ids"] if token >= 10]


COLUMNS = ["input_ids", "source"]


def mapped(dataset: Any, columns: list[str] = COLUMNS, **options: Any) -> Any:
    return dataset.map(PACKING, batched=True, remove_columns=columns, **options)


def test_survives_pickling():
    again = pickle.loads(pickle.dumps(PACKING))
    assert again == PACKING
    assert again({"input_ids": TEXTS}) == PACKING({"input_ids": TEXTS})


def test_in_map():
    rows = mapped(corpus())
    assert rows.column_names == ["input_ids", "labels", "position_ids"]
    assert rows.to_dict() == PACKING({"input_ids": TEXTS})


@pytest.mark.parametrize("batch_size", [1, 7])
def test_in_map_every_batch_is_packed_by_itself(batch_size):
    rows = mapped(corpus(), batch_size=batch_size)
    batches = [PACKING({"input_ids": TEXTS[i : i + batch_size]}) for i in range(0, len(TEXTS), batch_size)]
    assert rows["input_ids"][:] == [row for batch in batches for row in batch["input_ids"]]


def test_in_map_with_two_processes():
    rows = mapped(corpus(), num_proc=2)
    assert tokens_of(rows) == list(chain.from_iterable(TEXTS))
    assert {len(row["position_ids"]) for row in rows} == {8}


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_in_map_of_a_formatted_dataset(kind):
    rows = mapped(corpus().with_format(kind)).with_format(None)
    assert rows.to_dict() == PACKING({"input_ids": TEXTS})


def a_stream_keeps_what_is_removed_and_returned() -> bool:
    stream = corpus().to_iterable_dataset().map(lambda batch: dict(batch), batched=True, remove_columns=["input_ids"])
    return "input_ids" in next(iter(stream))


@pytest.mark.parametrize("columns", [COLUMNS, ["source"]], ids=["all", "others"])
def test_in_map_of_an_iterable_dataset(columns):
    if columns == COLUMNS and not a_stream_keeps_what_is_removed_and_returned():
        pytest.skip("streams of this datasets drop a column to remove from what the function returns, too")
    rows = mapped(IterableDataset.from_generator(lambda: iter(corpus())), columns)
    assert tokens_of(rows) == list(chain.from_iterable(TEXTS))
    assert tokens_of(mapped(corpus().to_iterable_dataset(), columns, batch_size=5)) == list(chain.from_iterable(TEXTS))


IN_A_NEW_PROCESS = """
import sys
from datasets import load_from_disk
from hf_ext import AnchorPacking

def refuse(self, batch):
    raise SystemExit("packed again: the cache was missed")

AnchorPacking.__call__ = refuse
packing = AnchorPacking(8, 1, pad_token_id=0)
print(load_from_disk(sys.argv[1]).map(packing, batched=True, remove_columns=["input_ids", "source"])._fingerprint)
"""


def test_a_new_process_finds_the_rows_in_the_cache(tmp_path):
    corpus().save_to_disk(tmp_path)
    first = mapped(load_from_disk(tmp_path))
    run = subprocess.run(
        [sys.executable, "-c", IN_A_NEW_PROCESS, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == first._fingerprint


def test_another_option_is_another_fingerprint(tmp_path):
    corpus().save_to_disk(tmp_path)
    dataset = load_from_disk(tmp_path)
    fingerprints = {
        dataset.map(replace(PACKING, **changes), batched=True, remove_columns=["input_ids", "source"])._fingerprint
        for changes in ({}, {"max_length": 9}, {"label_anchor": True}, {"pad_token_id": None})
    }
    assert len(fingerprints) == 4


# ---------------------------------------------------------------- the stock Trainer


def tiny_llama(implementation: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation=implementation,
    )
    torch.manual_seed(3)
    model = LlamaForCausalLM(config).double()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model


class Recorder:
    """Per forward of the Trainer: the batch, its loss, and the loss of stock sdpa with the same weights and a mask."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.stock = tiny_llama("sdpa")
        self.batches: list[dict[str, Any]] = []
        self.losses: list[tuple[torch.Tensor, torch.Tensor]] = []
        model.register_forward_hook(self.record, with_kwargs=True)

    def record(self, model: LlamaForCausalLM, _: tuple, batch: dict[str, Any], out: Any) -> None:
        self.batches.append(batch)
        self.stock.load_state_dict(model.state_dict())
        stock_batch = dict(batch)
        documents = stock_batch.pop("anchor_doc_ids", None)
        positions = batch["position_ids"]
        visible = visible_segments(positions) if documents is None else visible_documents(documents)
        with torch.no_grad():
            stock = self.stock(**{**stock_batch, "attention_mask": visible[:, None]})
        self.losses.append((out.loss.detach(), stock.loss))


@QUIET
@pytest.mark.parametrize("layout", [pytest.param("replica", marks=pytest.mark.smoke), "shared"])
def test_stock_trainer_with_its_default_collator(tmp_path, layout):
    documents = [[10 + i] + [40 + i] * (2 + 3 * i % 11) for i in range(20)]
    packing = AnchorPacking(16, ANCHOR, layout=layout)
    rows = Dataset.from_dict({"input_ids": documents}).map(packing, batched=True, remove_columns=["input_ids"])
    model = tiny_llama("anchor")
    recorder = Recorder(model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        num_train_epochs=1,
        learning_rate=1e-2,
        remove_unused_columns=layout == "replica",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()

    sizes = [len(batch["input_ids"]) for batch in recorder.batches]
    assert sizes == [min(2, len(rows) - i) for i in range(0, len(rows), 2)]
    seen = Counter(token for batch in recorder.batches for token in batch["labels"].flatten().tolist())
    del seen[IGNORED]
    if layout == "shared":
        # The first token of a document is trained only where the anchor stands right before it.
        seen = Counter({token: count for token, count in seen.items() if token >= 40})
        documents = [document[1:] for document in documents]
    assert seen == Counter(chain.from_iterable(documents))
    for ours, stock in recorder.losses:
        assert_equal(ours, stock, 1e-6)


def test_a_column_without_lists_is_refused():
    with pytest.raises(ValueError, match="the column labels is None"):
        AnchorPacking(8, 1)({"input_ids": [[3, 4]], "labels": None})
