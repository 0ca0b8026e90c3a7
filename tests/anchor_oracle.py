"""Slow answers from the definition alone, for the tests to hold the package to: loops over lists, masks written out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def positions_of(rows: list[list[int]]) -> Tensor:
    """Segment lengths of each row -> replica positions (B, L): 0 where a segment starts, else the column."""
    return torch.tensor(
        [[0 if i == 0 else start + i for start, n in _spans(lengths) for i in range(n)] for lengths in rows]
    )


def documents_of(rows: list[list[int]]) -> Tensor:
    """Document lengths of each row -> anchor_doc_ids (B, L): one anchor, then the documents 1, 2, ..."""
    return torch.tensor([[0] + [d for d, n in enumerate(lengths, 1) for _ in range(n)] for lengths in rows])


def _spans(lengths: list[int]) -> list[tuple[int, int]]:
    return [(sum(lengths[:s]), n) for s, n in enumerate(lengths)]


def segments_of(positions: list[int]) -> list[tuple[int, int]]:
    """[start, end) of every segment of one row."""
    starts = [0] + [i for i in range(1, len(positions)) if positions[i] == 0]
    return list(zip(starts, [*starts[1:], len(positions)], strict=True))


def visible_segments(position_ids: Tensor, attention_mask: Tensor | None = None, window: int | None = None) -> Tensor:
    """bool (B, L, L), [row, query, key]: walk back from the query to where its segment starts."""
    return _visible(position_ids, _walk_back, attention_mask, window)


def visible_documents(doc_ids: Tensor, attention_mask: Tensor | None = None, window: int | None = None) -> Tensor:
    """bool (B, L, L), [row, query, key]: earlier, and of the query's document or the anchor."""
    return _visible(doc_ids, _own_document_or_anchor, attention_mask, window)


def _walk_back(positions: list[int], query: int) -> list[int]:
    seen = []
    for key in range(query, -1, -1):
        seen.append(key)
        if positions[key] == 0:
            break
    return seen


def _own_document_or_anchor(documents: list[int], query: int) -> list[int]:
    return [key for key in range(query + 1) if documents[key] in (documents[query], 0)]


def _visible(
    ids: Tensor, keys_of: Callable[[list[int], int], list[int]], attention_mask: Tensor | None, window: int | None
) -> Tensor:
    mask = torch.zeros(*ids.shape, ids.shape[1], dtype=torch.bool)
    for row, values in enumerate(ids.tolist()):
        real = [True] * len(values) if attention_mask is None else attention_mask[row].bool().tolist()
        for query in range(len(values)):
            keys = [k for k in keys_of(values, query) if real[k] and (window is None or query - k < window)]
            mask[row, query, keys] = True
    return mask


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Explicit softmax; (B, Hq, L, D), (B, Hkv, L, D), (B, Hkv, L, Dv), (B, L, L) -> (B, Hq, L, Dv)."""
    shared_by = query.shape[1] // key.shape[1]
    kv_head = [head // shared_by for head in range(query.shape[1])]
    scores = scaling * torch.einsum("bhid,bhjd->bhij", query, key[:, kv_head])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.exp() * visible[:, None]
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp()[:, None, None]
    # Only rows that see nothing have total 0; their output is undefined, and 0 keeps the gradients clean.
    weights = weights / total.masked_fill(total == 0, 1)
    return torch.einsum("bhij,bhjd->bhid", weights, value[:, kv_head])


def with_gradients(function: Callable[..., Tensor], grad_out: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
    """{"out": ..., and the gradient of every input}, on copies of the inputs."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    out = function(**leaves)
    # An input that nothing depends on (the sinks of an all-masked batch) has the gradient 0.
    gradients = torch.autograd.grad(out, list(leaves.values()), grad_out, materialize_grads=True)
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def assert_equal(got: Any, expected: Any, tolerance: float, what: str = "") -> None:
    """Equal up to `tolerance` times the largest entry; dicts of tensors entry by entry. nan equals nothing.

    Some gradients are 0 exactly, and rounding errors in them are as large as in the others: hence the 0.01.
    """
    if isinstance(expected, dict):
        assert list(got) == list(expected)
        for name in expected:
            assert_equal(got[name], expected[name], tolerance, f"{what} {name}")
        return
    got, expected = got.double(), expected.double()
    limit = tolerance * max(expected.abs().max().item(), 0.01)
    torch.testing.assert_close(got, expected, rtol=0, atol=limit, msg=lambda text: f"{what}: {text}")
