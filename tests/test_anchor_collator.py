"""AnchorCollator against lists written out, on batches of the stock flattening collator and of TRL's."""

import copy
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import DataCollatorWithFlattening, default_data_collator

from hf_ext import AnchorCollator, AnchorPacking

ANCHOR, PAD, IGNORED = 1, 0, -100
Columns = dict[str, list[list[int]]]


# ---------------------------------------------------------------- lists written out


def inner_row(documents: list[list[int]], padding: int) -> dict[str, list[int]]:
    """What a padding-free collator gives: restarting positions, no label at a start, zeros behind."""
    row = {"input_ids": [], "labels": [], "position_ids": []}
    for document in documents:
        row["input_ids"] += document
        row["labels"] += [IGNORED, *document[1:]]
        row["position_ids"] += range(len(document))
    row["input_ids"] += [PAD] * padding
    row["labels"] += [IGNORED] * padding
    row["position_ids"] += [0] * padding
    return row


def expected_row(documents: list[list[int]], padding: int) -> list[list[tuple[int, int]]]:
    """Segments of (token, label). One-token documents at the end are padding: nobody could tell them from it."""
    documents = list(documents)
    closing = []
    while documents and len(documents[-1]) == 1:
        closing.insert(0, documents.pop()[0])
    segments = []
    for document in documents:
        pairs = list(zip(document, [IGNORED, *document[1:]], strict=True))
        segments.append(pairs if document[0] == ANCHOR else [(ANCHOR, IGNORED), *pairs])
    closing += [PAD] * padding
    return [*segments, [(token, IGNORED) for token in closing]] if closing else segments


def expected_columns(rows: list[tuple[list[list[int]], int]]) -> Columns:
    segments = [expected_row(*row) for row in rows]
    longest = max(sum(map(len, row)) for row in segments)
    columns: Columns = {"input_ids": [], "labels": [], "position_ids": []}
    for (documents, padding), row in zip(rows, segments, strict=True):
        missing = longest - sum(map(len, row))
        if missing and (padding or len(documents[-1]) == 1):
            row[-1] += [(ANCHOR, IGNORED)] * missing
        elif missing:
            row.append([(ANCHOR, IGNORED)] * missing)
        columns["input_ids"].append([token for segment in row for token, _ in segment])
        columns["labels"].append([label for segment in row for _, label in segment])
        starts = [sum(map(len, row[:i])) for i in range(len(row))]
        columns["position_ids"].append([0 if column in starts else column for column in range(longest)])
    return columns


def stacked(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


@st.composite
def batches(draw) -> list[tuple[list[list[int]], int]]:
    """Rows of one length, of documents with and without an anchor, and padding."""
    length = draw(st.integers(1, 14))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        padding = draw(st.integers(0, length - 1))
        cuts = sorted(draw(st.sets(st.integers(1, max(1, length - padding - 1)))) - {length - padding})
        edges = [0, *[cut for cut in cuts if cut < length - padding], length - padding]
        sizes = [end - start for start, end in pairwise(edges)]
        rows.append(
            ([draw(st.lists(st.integers(1, 4), min_size=size, max_size=size)) for size in sizes], padding),
        )
    return rows


@settings(max_examples=300, deadline=None)
@given(batches())
@example([([[2, 3, 4]], 0)])
@example([([[2], [3], [1, 4]], 0), ([[1, 2, 3]], 1)])
@example([([[5]], 2)])
def test_it_equals_the_lists(rows):
    batch = stacked([inner_row(*row) for row in rows])
    out = AnchorCollator(lambda _: batch, anchor_token_id=ANCHOR)([])
    assert {name: tensor.tolist() for name, tensor in out.items()} == expected_columns(rows)


# ---------------------------------------------------------------- real collators


DOCUMENTS = [[ANCHOR, 7, 8], [5, ANCHOR, 6, 9], [4, 3]]
FEATURES = [{"input_ids": document} for document in DOCUMENTS]


@pytest.mark.smoke
def test_around_the_flattening_collator():
    out = AnchorCollator(anchor_token_id=ANCHOR)(copy.deepcopy(FEATURES))
    assert out["input_ids"].tolist() == [[1, 7, 8, 1, 5, 1, 6, 9, 1, 4, 3]]
    assert out["position_ids"].tolist() == [[0, 1, 2, 0, 4, 5, 6, 7, 0, 9, 10]]
    assert out["labels"].tolist() == [[-100, 7, 8, -100, -100, 1, 6, 9, -100, -100, 3]]
    assert {tensor.dtype for tensor in out.values()} == {torch.int64}


def test_the_keywords_of_flash_kernels_describe_the_new_segments():
    inner = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    out = AnchorCollator(inner, anchor_token_id=ANCHOR)(FEATURES)
    assert out["cu_seq_lens_q"].tolist() == out["cu_seq_lens_k"].tolist() == [0, 3, 8, 11]
    assert (out["max_length_q"], out["max_length_k"]) == (5, 5)
    assert out["seq_idx"].tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2]]
    assert {out[name].dtype for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")} == {torch.int32}


def test_the_keywords_of_flash_kernels_run_over_all_rows():
    batch = stacked([inner_row([[1, 2, 3], [1, 5]], 0), inner_row([[1, 6]], 3)])
    batch |= {"cu_seq_lens_q": torch.zeros(2, dtype=torch.int32), "max_length_q": torch.tensor(0), "seq_idx": None}
    batch["seq_idx"] = torch.zeros(2, 5, dtype=torch.int32)
    out = AnchorCollator(lambda _: batch, anchor_token_id=ANCHOR)([])
    assert out["cu_seq_lens_q"].tolist() == [0, 3, 5, 7, 10]
    assert torch.equal(out["max_length_q"], torch.tensor(3))
    assert out["seq_idx"].tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]
    assert "cu_seq_lens_k" not in out


@pytest.mark.parametrize("padding", [0, 7], ids=["", "padded"])
def test_around_trl(padding):
    trainer = pytest.importorskip("trl.trainer.sft_trainer")
    multiple = len(DOCUMENTS[0] + DOCUMENTS[1] + DOCUMENTS[2]) + padding
    inner = trainer.DataCollatorForLanguageModeling(pad_token_id=PAD, padding_free=True, pad_to_multiple_of=multiple)
    out = AnchorCollator(inner, anchor_token_id=ANCHOR)(FEATURES)
    expected = expected_columns([(DOCUMENTS, padding)])
    assert {name: out[name].tolist() for name in expected} == expected
    assert out["cu_seq_lens_q"].tolist() == [0, 3, 8, 11] + ([18] if padding else [])
    assert out["max_length_k"] == max(5, padding)


def test_around_trl_with_documents_packed_into_rows():
    trainer = pytest.importorskip("trl.trainer.sft_trainer")
    inner = trainer.DataCollatorForLanguageModeling(pad_token_id=PAD, padding_free=True)
    rows = [{"input_ids": [*DOCUMENTS[0], *DOCUMENTS[1]], "seq_lengths": [3, 4]}, FEATURES[2] | {"seq_lengths": [2]}]
    out = AnchorCollator(inner, anchor_token_id=ANCHOR)(rows)
    expected = expected_columns([(DOCUMENTS, 0)])
    assert {name: out[name].tolist() for name in expected} == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_in_a_data_loader(workers):
    """In a spawned worker, it travels there as a pickle."""
    collator = AnchorCollator(anchor_token_id=ANCHOR, max_length=11)
    context = "spawn" if workers else None
    loader = DataLoader(
        FEATURES, batch_size=3, collate_fn=collator, num_workers=workers, multiprocessing_context=context
    )
    (batch,) = loader
    assert batch["input_ids"].tolist() == [[1, 7, 8, 1, 5, 1, 6, 9, 1, 4, 3]]
    assert pickle.loads(pickle.dumps(collator)).max_length == 11


# ---------------------------------------------------------------- what stands beside the tokens


def collate(batch: dict[str, Any], **options: Any) -> dict[str, Any]:
    return AnchorCollator(lambda _: batch, anchor_token_id=ANCHOR, **options)([])


def two_documents(**others: Any) -> dict[str, Any]:
    return stacked([inner_row([[ANCHOR, 7, 8], [5, 6]], 0)]) | others


def test_masks_grow_with_the_row():
    out = collate(
        two_documents(attention_mask=torch.ones(1, 5).long(), completion_mask=torch.tensor([[0, 1, 1, 1, 1]]).bool())
    )
    assert out["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1]]
    assert out["completion_mask"].tolist() == [[False, True, True, False, True, True]]
    assert out["attention_mask"].dtype == torch.int64


@pytest.mark.parametrize(
    "other",
    [torch.tensor([[3, 0, 0, 0, 0]]), torch.ones(1, 1, 5, 5), torch.rand(1, 5), torch.ones(3, 1, 5), torch.ones(5)],
    ids=["numbers", "4-D mask", "floats", "3-D", "1-D"],
)
def test_other_tensors_of_the_rows_length_are_refused_where_a_row_grows(other):
    with pytest.raises(ValueError, match="weights") as caught:
        collate(two_documents(weights=other))
    assert str(tuple(other.shape)) in str(caught.value)
    complete = stacked([inner_row([[ANCHOR, 7, 8], [ANCHOR, 6]], 0)])
    assert collate(complete | {"weights": other})["weights"] is other


def test_what_has_not_the_rows_length_is_handed_on():
    others = {"name": "x", "sizes": torch.tensor([3, 2]), "pixels": torch.rand(2, 3)}
    out = collate(two_documents(**others))
    assert all(out[name] is value for name, value in others.items())


@pytest.mark.parametrize("first", [5, ANCHOR], ids=["anchor inserted", "anchor there"])
def test_the_inner_batch_stays_as_it_is(first):
    batch = stacked([inner_row([[ANCHOR, 7, 8], [first, 6]], 2)]) | {"cu_seq_lens_q": torch.tensor([0, 3, 5, 6, 7])}
    before = copy.deepcopy(batch)
    collate(batch)
    assert batch.keys() == before.keys()
    assert all(torch.equal(batch[name], before[name]) for name in batch)


def test_without_labels_closing_zeros_are_padding_as_well():
    batch = stacked([inner_row([[ANCHOR, 7], [5, 6]], 3)])
    del batch["labels"]
    out = collate(batch)
    assert out["position_ids"].tolist() == [[0, 1, 0, 3, 4, 0, 6, 7]]
    assert "labels" not in out


def test_closing_zeros_with_a_label_are_documents():
    batch = stacked([inner_row([[ANCHOR, 7]], 0)])
    batch = {name: torch.cat([x, torch.tensor([[0, 0]])], 1) for name, x in batch.items()}
    batch["input_ids"][0, 2:] = batch["labels"][0, 2:] = torch.tensor([5, 6])
    out = collate(batch)
    assert out["input_ids"].tolist() == [[1, 7, 1, 5, 1, 6]]
    assert out["labels"].tolist() == [[-100, 7, -100, 5, -100, 6]]


# ---------------------------------------------------------------- errors


def refused(batch: dict[str, Any], *words: str, **options: Any) -> None:
    with pytest.raises(ValueError) as caught:
        collate(batch, **options)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_missing_anchor_is_an_error_where_asked():
    rows = [inner_row([[ANCHOR, 7, 8, 9, 2]], 0), inner_row([[ANCHOR, 7, 8], [5, 6]], 0)]
    refused(stacked(rows), "row 1, column 3", "token 5", "anchor 1", on_missing_anchor="error")
    complete = collate(stacked(rows[:1]), on_missing_anchor="error")
    assert complete["input_ids"].tolist() == [rows[0]["input_ids"]]
    padded = collate(stacked([inner_row([[ANCHOR, 7]], 2)]), on_missing_anchor="error")
    assert padded["position_ids"].tolist() == [[0, 1, 0, 3]]


def test_max_length_counts_the_inserted_anchors():
    assert collate(two_documents(), max_length=6)["input_ids"].shape == (1, 6)
    refused(two_documents(), "6 tokens", "max_length is 5", max_length=5)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"position_ids": torch.tensor([[2, 3, 4, 2, 3]])}, ["[2]", "position_ids_start=0"]),
        ({"position_ids": None}, ["position_ids", "DataCollatorWithFlattening"]),
        ({"position_ids": torch.zeros(3, 1, 5).long()}, ["(3, 1, 5)", "(1, 5)"]),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 4]])}, ["row 0", "AnchorPacking"]),
        ({"input_ids": [[1, 2, 3, 4, 5]]}, ["input_ids (list)"]),
        ({"labels": torch.zeros(1)}, ["labels", "(1,)"]),
    ],
    ids=["start", "none", "3-D", "anchor ids already", "lists", "labels of rows"],
)
def test_inner_batches_that_cannot_be_read_are_refused(change, words):
    refused(two_documents(**change), *words)


def test_rows_of_anchor_packing_are_refused_not_spoilt():
    rows = AnchorPacking(8, ANCHOR)({"input_ids": [[3, 4], [5, 6, 7]]})
    collator = AnchorCollator(default_data_collator, anchor_token_id=ANCHOR)
    with pytest.raises(ValueError, match="AnchorPacking"):
        collator([{name: row for name, (row,) in rows.items()}])


def test_a_flattening_collator_that_starts_elsewhere_is_refused():
    try:
        inner = DataCollatorWithFlattening(position_ids_start=2)
    except TypeError:
        pytest.skip("this transformers has no position_ids_start")
    with pytest.raises(ValueError, match="position_ids_start=0"):
        AnchorCollator(inner, anchor_token_id=ANCHOR)(FEATURES)
    with pytest.raises(ValueError, match="return_position_ids"):
        AnchorCollator(DataCollatorWithFlattening(return_position_ids=False), anchor_token_id=ANCHOR)(FEATURES)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"anchor_token_id": None}, ["anchor_token_id", "None", "BOS"]),
        ({"anchor_token_id": -1}, ["anchor_token_id", "-1"]),
        ({"anchor_token_id": True}, ["anchor_token_id", "True"]),
        ({"max_length": 1}, ["max_length", "not 1"]),
        ({"on_missing_anchor": "inser"}, ["'insert', 'error'", "did you mean 'insert'"]),
        ({"inner": 3}, ["inner", "3"]),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError) as caught:
        AnchorCollator(**{"anchor_token_id": ANCHOR, **options})
    assert all(word in str(caught.value) for word in words)
