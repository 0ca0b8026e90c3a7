"""Any positions, documents and padding against loops: who sees whom, and what stands beside a token that is moved."""

from typing import Any

import pytest
import torch
from anchor_oracle import visible_documents, visible_segments
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_ext import AnchorCollator, AnchorPacking
from hf_ext.anchor_attention.segments import SegmentTable, build_table

small = settings(max_examples=60, deadline=None, derandomize=True, database=None)
ANCHOR, IGNORED = 1, -100


def matrix(draw: st.DrawFn, rows: int, length: int, values: st.SearchStrategy) -> list[list[int]]:
    return draw(st.lists(st.lists(values, min_size=length, max_size=length), min_size=rows, max_size=rows))


@st.composite
def padding(draw: st.DrawFn, rows: int, length: int) -> torch.Tensor | None:
    """Anywhere, whole rows too; of any type that hosts use."""
    if draw(st.booleans()):
        return None
    dtype = draw(st.sampled_from([torch.bool, torch.int64, torch.float32]))
    return torch.tensor(matrix(draw, rows, length, st.integers(0, 1))).to(dtype)


@st.composite
def any_positions(draw: st.DrawFn) -> tuple[tuple[int, int], torch.Tensor, torch.Tensor | None]:
    """Not those of a packer alone: they may fall, repeat, be negative, and hold no zero; one row may be for all."""
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    given_rows = shape[0] if draw(st.booleans()) else 1
    positions = matrix(draw, given_rows, shape[1], st.sampled_from([0, 0, 1, 2, 7, -1, 2**40]))
    dtype = torch.int64 if max(map(max, positions)) > 9 else draw(st.sampled_from([torch.int64, torch.int32]))
    return shape, torch.tensor(positions, dtype=dtype), draw(padding(*shape))


@st.composite
def any_documents(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Each document in one piece, under numbers in any order, with an anchor or without."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    ids = []
    for _ in range(rows):
        cuts = sorted(draw(st.sets(st.integers(1, length))) - {length})
        names = draw(st.permutations(range(1, len(cuts) + 2)))
        if draw(st.booleans()):
            names = [0, *names[1:]]
        sizes = [end - start for start, end in zip([0, *cuts], [*cuts, length], strict=True)]
        ids.append([name for name, size in zip(names, sizes, strict=True) for _ in range(size)])
    return torch.tensor(ids), draw(padding(rows, length))


def seen_by(table: SegmentTable) -> torch.Tensor:
    """(B, L, L), [row, query, key]: what the slots say, one after the other."""
    rows, length = table.shape
    count = sum(table.lengths)
    tokens = table.token_of_slot(torch.device("cpu")).tolist()
    slots = list(range(count)) if table.slots is None else table.slots.tolist()
    start_of = [start for start, size in zip(table.bounds.tolist(), table.lengths, strict=False) for _ in range(size)]
    visible = torch.zeros(rows, length, length, dtype=torch.bool)
    for query, slot in enumerate(slots):
        if slot < count:
            assert tokens[slot] == query
            for key in tokens[start_of[slot] : slot + 1]:
                assert key // length == query // length, "a token of another row"
                visible[query // length, query % length, key % length] = True
    return visible


def check_table(table: SegmentTable, expected: torch.Tensor, mask: torch.Tensor | None) -> None:
    real = torch.ones(table.shape, dtype=torch.bool) if mask is None else mask.bool()
    assert torch.equal(seen_by(table), expected & real[..., None])
    assert sum(table.rows) == sum(table.lengths) and min(table.lengths, default=1) > 0
    assert len(table.rows) == table.shape[0]
    tokens = table.token_of_slot(torch.device("cpu"))
    inside = torch.arange(len(tokens)).unsqueeze(1) < table.bounds[1:]
    segment = inside.long().argmax(1) if table.lengths else torch.zeros(0)
    assert table.gaps == bool(((segment.diff() == 0) & (tokens.diff() != 1)).any())


@small
@given(any_positions())
@example(((2, 1), torch.tensor([[5]]), torch.tensor([[0], [0]])))
@example(((1, 4), torch.tensor([[0, 0, 0, 0]]), torch.tensor([[1, 0, 0, 1]])))
def test_any_positions_are_segments_as_in_a_loop(problem):
    shape, positions, mask = problem
    before = positions.clone()
    table = build_table(shape, positions, mask)
    check_table(table, visible_segments(positions.expand(shape), None if mask is None else mask.bool()), mask)
    assert torch.equal(positions, before)


@small
@given(any_documents())
def test_any_documents_are_segments_as_in_a_loop(problem):
    documents, mask = problem
    before = documents.clone()
    table = build_table(documents.shape, torch.zeros_like(documents), mask, documents)
    check_table(table, visible_documents(documents, None if mask is None else mask.bool()), mask)
    assert torch.equal(documents, before)


@small
@given(st.lists(st.integers(-1, 3), min_size=1, max_size=7))
def test_documents_are_refused_exactly_when_they_are_no_anchor_and_whole_documents(ids):
    pieces = [number for place, number in enumerate(ids) if place == 0 or ids[place - 1] != number]
    sound = min(ids) >= 0 and len(set(pieces)) == len(pieces) and 0 not in pieces[1:]
    documents = torch.tensor([[0] * len(ids), ids])
    if sound:
        build_table(documents.shape, torch.zeros_like(documents), None, documents)
    else:
        with pytest.raises(ValueError, match=r"row 1 holds the documents"):
            build_table(documents.shape, torch.zeros_like(documents), None, documents)


# --- what the collator moves


@st.composite
def flattened(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """A padding-free batch in which no token stands twice, with masks beside it and the keywords of flash kernels."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 10))
    positions = [[0] for _ in range(rows)]
    for row in positions:
        while len(row) < length:
            row.append(draw(st.sampled_from([0, row[-1] + 1])))
    ids = torch.arange(100, 100 + rows * length).view(rows, length)
    begins = torch.tensor(positions) == 0
    anchored = begins & torch.tensor(matrix(draw, rows, length, st.booleans()))
    batch: dict[str, Any] = {"input_ids": ids.masked_fill(anchored, ANCHOR), "position_ids": torch.tensor(positions)}
    batch["labels"] = batch["input_ids"].masked_fill(begins, IGNORED)
    batch["completion_mask"] = torch.tensor(matrix(draw, rows, length, st.integers(0, 1)))
    batch["attention_mask"] = torch.tensor(matrix(draw, rows, length, st.integers(0, 1))).bool()
    return batch | {"cu_seq_lens_q": torch.zeros(2, dtype=torch.int32), "max_length_q": 0, "seq_idx": torch.zeros(1, 1)}


def beside(batch: dict[str, torch.Tensor]) -> dict[int, tuple[Any, ...]]:
    """token -> what stands beside it; anchors left out."""
    names = ("input_ids", "labels", "completion_mask", "attention_mask")
    rows = zip(*(batch[name].flatten().tolist() for name in names), strict=True)
    return {token: rest for token, *rest in rows if token != ANCHOR}


@small
@given(flattened())
def test_what_stands_beside_a_token_moves_with_it(batch):
    before = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    out = AnchorCollator(lambda _: batch, anchor_token_id=ANCHOR)([])
    assert beside(out) == beside(before)
    order = [token for token in out["input_ids"].flatten().tolist() if token != ANCHOR]
    assert order == [token for token in before["input_ids"].flatten().tolist() if token != ANCHOR]
    shape = out["input_ids"].shape
    assert {out[name].shape for name in ("labels", "position_ids", "completion_mask", "attention_mask")} == {shape}
    starts = (out["position_ids"] == 0).flatten().nonzero().flatten().tolist()
    assert out["cu_seq_lens_q"].tolist() == [*starts, shape.numel()]
    assert out["max_length_q"] == max(b - a for a, b in zip(starts, [*starts[1:], shape.numel()], strict=True))
    assert torch.equal(out["seq_idx"].long(), (out["position_ids"] == 0).cumsum(1) - 1)


@small
@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.integers(2, 9), st.booleans())
def test_packed_rows_are_segments_of_their_documents(sizes, max_length, pad):
    """Packer and segments agree: two tokens see each other only if they are of one document, or one is an anchor."""
    documents = [[100 * i + j for j in range(size)] for i, size in enumerate(sizes, 1)]
    rows = AnchorPacking(max_length, ANCHOR, pad_token_id=0 if pad else None)({"input_ids": documents})
    positions, ids = torch.tensor(rows["position_ids"]), torch.tensor(rows["input_ids"])
    visible = seen_by(build_table(positions.shape, positions))
    document = torch.where(ids >= 100, ids // 100, 0)
    both = (document[:, :, None] > 0) & (document[:, None] > 0)
    assert not (visible & both & (document[:, :, None] != document[:, None])).any()
    earlier = torch.ones(max_length, max_length).tril().bool()
    assert torch.equal(visible & both, earlier & both & (document[:, :, None] == document[:, None]))
    assert sorted(ids[ids >= 100].tolist()) == sorted(token for row in documents for token in row)
