"""Documents to rows of one length, for the anchor backends: a function for `datasets.map`."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from hf_ext.checks import check_flag, check_word, is_integer

IGNORED = -100
LAYOUTS = ("replica", "shared")


@dataclass(frozen=True)
class AnchorPacking:
    """Packs tokenised documents for AnchorAttention (arXiv 2411.13476, section 4), each behind its anchor.

    Use as `dataset.map(packing, batched=True, remove_columns=dataset.column_names)`. It reads the columns `input_ids`
    and, where present, `labels` (same lengths), and writes `input_ids`, `labels`, `position_ids` (and
    `anchor_doc_ids` for the shared layout), every row exactly `max_length` long, so that the default collator stacks
    them at any batch size. (DataCollatorForLanguageModeling will not do: it puts labels of its own in their place.)
    No token is lost: a document that does not fit is continued in the next row, behind an anchor of its own. A
    document's leading anchor token is the anchor; it is not doubled. A larger `batch_size` in `map` means less padding.
    Streams (IterableDataset) of datasets 3.0 drop `remove_columns` from its rows as well: there, name only those that
    it does not write.

    Args:
        max_length: tokens a row.
        anchor_token_id: the token every document begins with, usually `tokenizer.bos_token_id`.
        split_documents: False: a document that does not fit opens a new row instead, and one longer than
            `max_length - 1` is an error.
        drop_remainder: drop the last, unfilled row of a call instead of padding it.
        layout: "replica": an anchor before every document, at position 0; other positions are row indices.
            "shared": one anchor a row, positions 0 to L - 1, and `anchor_doc_ids` telling the documents apart.
        label_anchor: train the last token of a document to predict the anchor (replica layout only).
        pad_token_id: fills up rows; the anchor by default. Padding is a segment of its own, with label -100.

    Raises:
        ValueError: an option out of range; in a call, a column of the wrong form, with the index of the document.
    """

    max_length: int
    anchor_token_id: int
    split_documents: bool = True
    drop_remainder: bool = False
    layout: str = "replica"
    label_anchor: bool = False
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        check_length_and_anchor(self.max_length, self.anchor_token_id)
        if self.pad_token_id is not None and (not is_integer(self.pad_token_id) or self.pad_token_id < 0):
            raise ValueError(f"pad_token_id must be a token id or None, not {self.pad_token_id!r}")
        for name in ("split_documents", "drop_remainder", "label_anchor"):
            check_flag(name, getattr(self, name))
        check_word("layout", self.layout, LAYOUTS)
        if self.layout == "shared" and self.label_anchor:
            raise ValueError("label_anchor needs layout='replica': a shared row has no anchor between its documents")
        if self.layout == "shared":
            warnings.warn(
                "layout='shared' needs remove_unused_columns=False in TrainingArguments: otherwise the Trainer drops "
                "anchor_doc_ids, and every row silently becomes one document",
                stacklevel=3,
            )

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[list[int]]]:
        documents = self._documents(batch)
        rows = _Rows(self)
        for index, tokens, labels in documents:
            if not self.split_documents:
                if len(tokens) > self.max_length - 1:
                    raise ValueError(
                        f"document {index} has {len(tokens)} tokens without its anchor, and a row holds "
                        f"{self.max_length - 1}; raise max_length or allow split_documents"
                    )
                rows.make_room(len(tokens))
            while tokens:
                taken = rows.write(tokens, labels)
                tokens, labels = tokens[taken:], labels[taken:]
        return rows.finish()

    def _documents(self, batch: Mapping[str, Sequence[Any]]) -> list[tuple[int, list[int], list[int]]]:
        """(index, tokens, labels) of every document that has tokens, without its leading anchor."""
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            given = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            raise ValueError(
                f"packing needs a column input_ids, and was given {given or 'no columns'}; "
                "call it through dataset.map(packing, batched=True, ...)"
            )
        documents = _lists(batch["input_ids"], "input_ids")
        labels = _lists(batch["labels"], "labels") if "labels" in batch else documents
        masks = _lists(batch["attention_mask"], "attention_mask") if "attention_mask" in batch else None
        if len(documents) != len(labels):
            raise ValueError(f"input_ids holds {len(documents)} documents and labels {len(labels)}")
        if masks is not None and len(documents) != len(masks):
            raise ValueError(f"input_ids holds {len(documents)} documents and attention_mask {len(masks)}")
        for index, (document, label) in enumerate(zip(documents, labels, strict=True)):
            if len(document) != len(label):
                raise ValueError(f"document {index} has {len(document)} tokens but {len(label)} labels")
            if min(document, default=0) < 0:
                raise ValueError(f"document {index} holds a negative token id, {min(document)}")
            if masks is not None and masks[index] != [1] * len(document):
                raise ValueError(f"document {index} is padded: its attention_mask is not one 1 a token")
        heads = [int(document[:1] == [self.anchor_token_id]) for document in documents]
        rows = enumerate(zip(documents, labels, heads, strict=True))
        kept = [(i, tokens[head:], label[head:]) for i, (tokens, label, head) in rows if len(tokens) > head]
        if len(kept) < len(documents):
            warnings.warn(f"{len(documents) - len(kept)} documents without tokens were skipped", stacklevel=3)
        return kept


@dataclass
class _Rows:
    """The rows of one call; the last of `rows` is being filled."""

    packing: AnchorPacking
    rows: dict[str, list[list[int]]] = field(init=False)
    filled: int = field(init=False)
    document: int = 0  # of the last piece written, in the shared layout

    def __post_init__(self) -> None:
        self.shared = self.packing.layout == "shared"
        names = ["input_ids", "labels", "position_ids", *(["anchor_doc_ids"] if self.shared else [])]
        self.rows = {name: [] for name in names}
        self.filled = self.packing.max_length  # no row is open

    def make_room(self, tokens: int) -> None:
        """Close the row if `tokens` more do not fit into it as one piece."""
        if self.filled + (0 if self.shared else 1) + tokens > self.packing.max_length:
            self._close()

    def write(self, tokens: list[int], labels: list[int]) -> int:
        """Append one piece of a document, opening a row where needed; returns the number of tokens it took."""
        head = 0 if self.shared else 1
        if self.packing.max_length - self.filled < head + 1:
            self._close()
        if self.filled == self.packing.max_length:
            self._open()
        if not self.shared:
            anchor = self.packing.anchor_token_id
            self._append([anchor], [anchor if self.packing.label_anchor else IGNORED], [0])
        taken = min(self.packing.max_length - self.filled, len(tokens))
        labels = labels[:taken]
        if self.shared:
            self.document += 1
            if self.filled > 1:  # its predecessor in the row belongs to another document
                labels = [IGNORED, *labels[1:]]
        self._append(tokens[:taken], labels, range(self.filled, self.filled + taken))
        return taken

    def finish(self) -> dict[str, list[list[int]]]:
        if self.filled < self.packing.max_length:
            if self.packing.drop_remainder:
                for column in self.rows.values():
                    column.pop()
                warnings.warn(
                    f"drop_remainder: the last row of this call ({self.filled} tokens) was dropped", stacklevel=3
                )
            else:
                self._close()
        return self.rows

    def _open(self) -> None:
        for column in self.rows.values():
            column.append([])
        self.filled = self.document = 0
        if self.shared:
            self._append([self.packing.anchor_token_id], [IGNORED], [0])

    def _close(self) -> None:
        missing = self.packing.max_length - self.filled
        if not missing:
            return
        pad = self.packing.anchor_token_id if self.packing.pad_token_id is None else self.packing.pad_token_id
        positions = list(range(self.filled, self.packing.max_length))
        if not self.shared:
            positions[0] = 0
        self.document += 1
        self._append([pad] * missing, [IGNORED] * missing, positions)

    def _append(self, tokens: Sequence[int], labels: Sequence[int], positions: Sequence[int]) -> None:
        self.rows["input_ids"][-1] += tokens
        self.rows["labels"][-1] += labels
        self.rows["position_ids"][-1] += positions
        if self.shared:
            self.rows["anchor_doc_ids"][-1] += [self.document] * len(tokens)
        self.filled += len(tokens)


def check_length_and_anchor(max_length: Any, anchor_token_id: Any) -> None:
    """Raises ValueError unless one is a length that holds an anchor and a token, and the other a token id."""
    if not is_integer(max_length) or max_length < 2:
        raise ValueError(f"max_length must be an integer of at least 2, not {max_length!r}")
    if not is_integer(anchor_token_id) or anchor_token_id < 0:
        raise ValueError(
            f"anchor_token_id must be a token id, not {anchor_token_id!r}; "
            "a tokenizer without a BOS token can lend its EOS token"
        )


def _lists(column: Sequence[Any], name: str) -> list[list[int]]:
    if column is None:
        raise ValueError(f"the column {name} is None; leave it out, or give a list a document")
    rows = [row.tolist() if hasattr(row, "tolist") else row for row in column]
    for index, row in enumerate(rows):
        if not isinstance(row, (list, tuple)):
            raise ValueError(
                f"{name} must hold a list of token ids a document, but row {index} is {row!r}; "
                "call it through dataset.map(packing, batched=True, ...)"
            )
        foreign = {kind.__name__ for kind in set(map(type, row)) if not issubclass(kind, Integral)}
        if foreign:
            raise ValueError(f"{name} must hold integers, but row {index} holds {', '.join(sorted(foreign))}")
    return [list(map(int, row)) for row in rows]
