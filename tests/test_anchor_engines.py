"""anchor_attention, every engine usable on a CPU, against masks written by loops and a softmax written out."""

import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from anchor_oracle import (
    assert_equal,
    attend,
    documents_of,
    positions_of,
    visible_documents,
    visible_segments,
    with_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_ext.anchor_attention import anchor_attention, available_engines, reference, use_engine

ENGINES = ["sdpa", "dense"]
VARIABLE = "HF_EXT_ANCHOR_ENGINE"


@pytest.fixture(params=ENGINES)
def engine(request):
    with use_engine(request.param):
        yield request.param


@dataclass
class Problem:
    """One call: tensors as models hand them over (heads split off the last dimension, so not contiguous)."""

    position_ids: Tensor
    heads: tuple[int, int] = (4, 2)
    widths: tuple[int, int] = (6, 6)
    batch: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    sinks: bool = False
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        torch.manual_seed(7)
        (heads, kv_heads), (width, value_width) = self.heads, self.widths
        rows = self.batch or len(self.position_ids)
        self.tensors = {
            "query": self.random(rows, heads, width),
            "key": self.random(rows, kv_heads, width),
            "value": self.random(rows, kv_heads, value_width),
        }
        if self.sinks:
            self.tensors["sinks"] = torch.randn(heads, dtype=torch.float64).to(self.dtype)
        self.grad_out = self.random(rows, heads, value_width)
        if "attention_mask" in self.options:
            # Outputs of masked queries are undefined, so nothing may depend on them.
            self.grad_out = self.grad_out * self.options["attention_mask"][:, None, :, None]

    def random(self, rows: int, heads: int, width: int) -> Tensor:
        length = self.position_ids.shape[1]
        return torch.randn(rows, length, heads, width, dtype=torch.float64).to(self.dtype).transpose(1, 2)

    def visible(self) -> Tensor:
        window, padding = self.options.get("sliding_window"), self.options.get("attention_mask")
        if "anchor_doc_ids" in self.options:
            return visible_documents(self.options["anchor_doc_ids"], padding, window)
        return visible_segments(self.position_ids, padding, window)

    def expected(self) -> dict[str, Tensor]:
        scaling = self.options.get("scaling", self.widths[0] ** -0.5)
        visible, softcap = self.visible(), self.options.get("softcap")
        return with_gradients(
            lambda **x: attend(**x, visible=visible, scaling=scaling, softcap=softcap),
            self.grad_out.double(),
            **{name: x.double() for name, x in self.tensors.items()},
        )

    def computed(self) -> dict[str, Tensor]:
        return with_gradients(
            lambda **x: anchor_attention(**x, position_ids=self.position_ids, **self.options),
            self.grad_out,
            **self.tensors,
        )

    def check(self, tolerance: float = 1e-12) -> None:
        positions = self.position_ids.clone()
        computed, expected = self.computed(), self.expected()
        assert torch.equal(self.position_ids, positions)
        if "attention_mask" in self.options:
            for result in (computed, expected):
                assert result["out"].isfinite().all()
                result["out"] = result["out"] * self.options["attention_mask"][:, None, :, None]
        assert_equal(computed, expected, tolerance)


def masked(rows: int, length: int, *hidden: tuple[int, int, int]) -> Tensor:
    """All ones, but 0 in the columns [start, end) of the given rows."""
    mask = torch.ones(rows, length, dtype=torch.long)
    for row, start, end in hidden:
        mask[row, start:end] = 0
    return mask


RAGGED = positions_of([[5, 9, 1, 9], [3, 20, 1], [24]])
CONTINUED = RAGGED + torch.tensor([[0], [41], [7]]) * (torch.arange(24) < 3)
LEFT = masked(3, 24, (0, 0, 7), (2, 0, 1))
RIGHT = masked(3, 24, (0, 20, 24), (1, 12, 24))
INNER = masked(3, 24, (0, 3, 8), (0, 14, 15), (1, 3, 4), (2, 5, 19))

PROBLEMS = {
    "plain": Problem(RAGGED, heads=(3, 3)),
    "grouped": Problem(RAGGED, heads=(6, 2)),
    "one_kv_head": Problem(RAGGED, heads=(4, 1)),
    "values_wider": Problem(RAGGED, widths=(4, 9)),
    "values_narrower": Problem(RAGGED, widths=(9, 4)),
    "scaling": Problem(RAGGED, options={"scaling": 0.9}),
    "window": Problem(RAGGED, options={"sliding_window": 4}),
    "window_of_one": Problem(RAGGED, options={"sliding_window": 1}),
    "window_as_wide_as_a_segment": Problem(RAGGED, options={"sliding_window": 9}),
    "window_wider_than_the_row": Problem(RAGGED, options={"sliding_window": 500}),
    "softcap": Problem(RAGGED, options={"softcap": 0.7}),
    "sinks": Problem(RAGGED, sinks=True),
    "padding_left": Problem(RAGGED, options={"attention_mask": LEFT}),
    "padding_right": Problem(RAGGED, options={"attention_mask": RIGHT}),
    "padding_inside": Problem(RAGGED, options={"attention_mask": INNER}),
    "padding_bool": Problem(RAGGED, options={"attention_mask": INNER.bool()}),
    "padding_all_ones": Problem(RAGGED, options={"attention_mask": masked(3, 24)}),
    "window_softcap_padding": Problem(RAGGED, options={"sliding_window": 4, "softcap": 0.7, "attention_mask": INNER}),
    "window_sinks_padding": Problem(RAGGED, options={"sliding_window": 4, "attention_mask": LEFT}, sinks=True),
    "softcap_sinks_values_wider": Problem(RAGGED, widths=(4, 9), options={"softcap": 0.7}, sinks=True),
    "positions_of_one_row_for_all": Problem(RAGGED[:1], batch=3),
    "positions_of_one_row_for_all_padding": Problem(RAGGED[:1], batch=3, options={"attention_mask": INNER}),
    "positions_int32": Problem(RAGGED.int()),
    "all_zeros": Problem(torch.zeros(2, 9, dtype=torch.long)),
    "no_zero": Problem(torch.arange(1, 13).expand(2, -1)),
    "rows_start_inside_a_document": Problem(CONTINUED),
    "rows_start_inside_a_document_window": Problem(CONTINUED, options={"sliding_window": 2}),
    "one_token": Problem(torch.zeros(2, 1, dtype=torch.long)),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_op_equals_the_written_out_formula(engine, name):
    problem = PROBLEMS[name]
    if problem.batch:
        # The loop wants one row of positions a row; the op has to broadcast by itself.
        written_out = Problem(problem.position_ids.expand(problem.batch, -1), options=problem.options)
        assert_equal(written_out.computed(), problem.computed(), 1e-12)
        problem = written_out
    problem.check()


# Lengths on both sides of 64 and of 256, equal ones side by side, runs of short ones between long ones.
MIXES = {
    "one_long": [[700]],
    "one_short": [[50], [50]],
    "equal_long": [[70, 70, 70]],
    "equal_short": [[8] * 12, [8] * 12],
    "equal_across_rows": [[96, 96], [96, 96]],
    "short_between_long": [[3, 5, 300, 2, 2, 7, 90, 1, 1, 1, 66, 12]],
    "long_between_short": [[100, 4, 4, 4, 100, 9], [30, 2, 130, 1, 1, 57]],
    "around_the_edges": [[63, 64, 65, 66], [129, 1, 127, 1]],
    "over_256": [[255, 256, 257], [513, 20, 235]],
    "zeros_after_a_document": [[40, *[1] * 60], [*[1] * 99, 1]],
}
FEATURES = {
    "plain": {},
    "window_small": {"sliding_window": 5},
    "window_middle": {"sliding_window": 68},
    "window_wider_than_all": {"sliding_window": 1000},
    "softcap": {"softcap": 0.7},
    "window_softcap": {"sliding_window": 68, "softcap": 0.7},
}


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("mix", MIXES)
def test_sdpa_engine_on_every_mix_of_lengths(mix, features):
    with use_engine("sdpa"):
        Problem(positions_of(MIXES[mix]), heads=(2, 1), widths=(3, 3), options=FEATURES[features]).check()


@pytest.mark.parametrize("window", [None, 5, 68])
@pytest.mark.parametrize("mix", ["short_between_long", "over_256", "zeros_after_a_document"])
def test_sdpa_engine_with_sinks_and_padding_on_long_rows(mix, window):
    positions = positions_of(MIXES[mix])
    rows, length = positions.shape
    hidden = masked(rows, length, (0, 0, 4), (0, 11, 40), (rows - 1, length - 21, length))
    with use_engine("sdpa"):
        options = {"attention_mask": hidden, "sliding_window": window}
        Problem(positions, heads=(2, 1), widths=(3, 3), options=options, sinks=True).check()


@pytest.mark.parametrize(
    "name", ["plain", "no_zero", "all_zeros", "padding_left", "window_softcap_padding", "window_sinks_padding"]
)
def test_reference_equals_the_written_out_formula(name):
    problem = PROBLEMS[name]
    padding, window = (problem.options.get(key) for key in ("attention_mask", "sliding_window"))
    visible = reference.visible_keys(reference.same_segment(problem.position_ids), padding, window)
    assert torch.equal(visible, problem.visible())

    def formula(**tensors: Tensor) -> Tensor:
        scaling, softcap = problem.widths[0] ** -0.5, problem.options.get("softcap")
        return reference.masked_attention(**tensors, visible=visible[:, None], scaling=scaling, softcap=softcap)

    assert_equal(with_gradients(formula, problem.grad_out, **problem.tensors), problem.expected(), 1e-12)


def test_reference_shared_layout_equals_the_loop():
    documents = documents_of([[4, 3, 5], [1, 10, 1]])
    hidden = masked(2, 13, (0, 2, 4), (1, 12, 13))
    visible = reference.visible_keys(reference.same_document(documents), hidden, 4)
    assert torch.equal(visible, visible_documents(documents, hidden, 4))


UNSEEING = {
    "one_row_masked": masked(3, 24, (1, 0, 24)),
    "every_row_masked": torch.zeros(3, 24, dtype=torch.long),
    "left_padding": LEFT,
}


@pytest.mark.parametrize("features", [{}, {"sliding_window": 3}, {"softcap": 0.7}], ids=["plain", "window", "softcap"])
@pytest.mark.parametrize("sinks", [False, True], ids=["no_sinks", "sinks"])
@pytest.mark.parametrize("mask", UNSEEING)
def test_queries_that_see_nothing_stay_finite(engine, mask, sinks, features):
    problem = Problem(RAGGED, options={"attention_mask": UNSEEING[mask], **features}, sinks=sinks)
    problem.check()
    problem.grad_out = torch.ones_like(problem.grad_out)
    assert all(x.isfinite().all() for x in problem.computed().values())


@pytest.mark.parametrize("features", FEATURES)
def test_bfloat16_stays_close_to_the_exact_result(engine, features):
    positions = positions_of([[3, 5, 120, 2, 70], [200]])
    problem = Problem(positions, heads=(2, 1), options=FEATURES[features], sinks=True, dtype=torch.bfloat16)
    assert all(x.dtype == torch.bfloat16 for x in problem.computed().values())
    problem.check(tolerance=2e-2)


def test_float32_is_computed_in_float32(engine):
    Problem(positions_of([[3, 5, 120, 2, 70]]), heads=(2, 1), dtype=torch.float32).check(tolerance=2e-6)


# ---------------------------------------------------------------- shared layout

SHARED_PROBLEMS = {
    "plain": {},
    "window": {"sliding_window": 4},
    "softcap": {"softcap": 0.7},
    "padding_right": {"attention_mask": RIGHT},
    "padding_inside": {"attention_mask": INNER},
    "padding_hides_the_anchor": {"attention_mask": masked(3, 24, (0, 0, 1), (1, 0, 1))},
    "padding_hides_a_document": {"attention_mask": masked(3, 24, (0, 1, 6), (0, 15, 16))},
    "window_padding": {"attention_mask": INNER, "sliding_window": 4},
}


@pytest.mark.parametrize("documents", [[0, 1, -1, -1], [0, 1, 2, 1], [1, 0, 2, 2]], ids=["negative", "twice", "late"])
def test_document_ids_out_of_order_are_refused(documents):
    tensors = (torch.randn(1, 2, 4, 3) for _ in range(3))
    with pytest.raises(ValueError, match="anchor_doc_ids must hold") as caught:
        anchor_attention(*tensors, torch.arange(4)[None], anchor_doc_ids=torch.tensor([documents]))
    assert "row 0" in str(caught.value)


def test_tensors_of_several_dtypes_are_refused():
    q, k, v = (torch.randn(1, 2, 4, 3) for _ in range(3))
    with pytest.raises(ValueError, match=r"one dtype, not torch.float32, torch.float64 and torch.float32"):
        anchor_attention(q, k.double(), v, torch.arange(4)[None])


@pytest.mark.parametrize("sinks", [False, True], ids=["no_sinks", "sinks"])
@pytest.mark.parametrize("name", SHARED_PROBLEMS)
def test_shared_layout_equals_its_definition(engine, name, sinks):
    options = {"anchor_doc_ids": documents_of([[5, 9, 1, 8], [3, 20], [23]]), **SHARED_PROBLEMS[name]}
    Problem(torch.arange(24).expand(3, -1), options=options, sinks=sinks).check()


@pytest.mark.parametrize(
    "documents",
    [[0, 1, 1, 3, 3, 7], [0, 0, 1, 1, 2, 2], [1, 1, 2, 2, 3, 3], [0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5]],
    ids=["numbers_left_out", "two_anchors_in_front", "no_anchor", "anchors_only", "documents_of_one_token"],
)
def test_shared_layout_at_the_edges_of_its_definition(engine, documents):
    Problem(torch.arange(6)[None], options={"anchor_doc_ids": torch.tensor([documents])}).check()


@pytest.mark.parametrize("window", [None, 7, 100])
def test_shared_layout_on_long_rows(engine, window):
    documents = documents_of([[300, 3, 3, 70, 1, 80], [457]])
    options = {"anchor_doc_ids": documents, "sliding_window": window}
    Problem(torch.arange(458).expand(2, -1), heads=(2, 1), widths=(3, 3), options=options).check()


# ---------------------------------------------------------------- memory


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation inside the block returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return out


def largest_tensor(rows: list[list[int]], options: dict[str, Any]) -> int:
    problem = Problem(positions_of(rows), heads=(2, 1), widths=(4, 4), options=options, dtype=torch.float32)
    with LargestTensor() as largest:
        problem.computed()
    return largest.numel


MEMORY_ROWS = {"one_document": [[2048]], "documents": [[1000, 40, 8, 900, 100]], "zeros": [[1000, 900, *[1] * 148]]}


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("rows", MEMORY_ROWS)
def test_sdpa_engine_never_writes_out_a_mask(rows, features):
    with use_engine("sdpa"):
        assert largest_tensor(MEMORY_ROWS[rows], FEATURES[features]) < 2048**2 / 2


@pytest.mark.parametrize("shared", [False, True], ids=["replica", "shared"])
def test_sdpa_engine_never_writes_out_a_mask_for_padding(shared):
    options = {"attention_mask": masked(1, 2048, (0, 5, 40), (0, 2000, 2048))}
    if shared:
        options["anchor_doc_ids"] = documents_of([[1000, 47, 900, 100]])
    with use_engine("sdpa"):
        assert largest_tensor([[2048]], options) < 2048**2 / 2


def saved_for_backward(length: int, options: dict[str, Any]) -> int:
    """Bytes; views of one storage counted once."""
    saved = []
    problem = Problem(positions_of([[length]]), heads=(2, 1), widths=(4, 4), options=options, dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        problem.computed()
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}.values())


@pytest.mark.parametrize("features", [name for name in FEATURES if name != "window_wider_than_all"])
def test_what_the_sdpa_engine_saves_for_backward_is_linear_in_length(features):
    with use_engine("sdpa"):
        one, two = (saved_for_backward(length, FEATURES[features]) for length in (1024, 2048))
    assert two < 2.4 * one


def test_the_memory_probe_sees_the_dense_mask():
    with use_engine("dense"):
        assert largest_tensor([[2048]], {}) >= 2048**2


# ---------------------------------------------------------------- random problems


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    length = st.one_of(st.integers(1, 12), st.integers(50, 80))
    rows = draw(st.lists(st.lists(length, min_size=1, max_size=8), min_size=1, max_size=2))
    total = min(sum(lengths) for lengths in rows)
    positions = torch.stack([positions_of([lengths])[0, :total] for lengths in rows])
    if draw(st.booleans()):
        positions[-1, 0] = 41
    options: dict[str, Any] = {"sliding_window": draw(st.none() | st.integers(1, 90))}
    options["softcap"] = draw(st.none() | st.just(0.8))
    if draw(st.booleans()):
        hidden = draw(st.lists(st.booleans(), min_size=total, max_size=total))
        options["attention_mask"] = torch.tensor([hidden, hidden[::-1]][: len(rows)]).long()
    return Problem(positions, heads=(2, 1), widths=(2, 3), options=options, sinks=draw(st.booleans()))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(problems())
def test_random_problems(problem):
    for name in ENGINES:
        with use_engine(name):
            problem.check()


# ---------------------------------------------------------------- dropout


@pytest.mark.parametrize("features", [{}, {"sliding_window": 3}, {"softcap": 0.7}], ids=["plain", "window", "softcap"])
def test_dropout_keeps_the_mean(engine, features):
    copies = 1000
    positions = positions_of([[1, 5, 6]])
    tensors = {name: x.expand(copies, -1, -1, -1) for name, x in Problem(positions, heads=(2, 1)).tensors.items()}
    torch.manual_seed(3)
    dropped = anchor_attention(**tensors, position_ids=positions, dropout=0.25, **features)
    kept = anchor_attention(**tensors, position_ids=positions, **features)
    error = dropped.std(0) / copies**0.5
    assert ((dropped.mean(0) - kept[0]).abs() < 6 * error + 1e-12).all()

    # A segment's first token has one weight, 1: it is dropped, or scaled by 1 / (1 - p).
    first = (dropped / kept)[:, :, positions[0] == 0]
    lost = first.abs() < 1e-9
    assert 0.2 < lost.double().mean() < 0.3
    torch.testing.assert_close(first[~lost], torch.full_like(first[~lost], 4 / 3))


# ---------------------------------------------------------------- bad input


def refusal(error: type[Exception], *arguments: Any, **changes: Any) -> str:
    """Text of the error of a call that is right except for `changes`."""
    call = {**Problem(RAGGED).tensors, "position_ids": RAGGED, **changes}
    with pytest.raises(error) as caught:
        anchor_attention(**call)
    return str(caught.value)


BAD_SHAPES = {
    "positions_of_three_dimensions": ("position_ids", (3, 3, 24)),
    "positions_too_short": ("position_ids", (3, 23)),
    "positions_too_long": ("position_ids", (1, 25)),
    "positions_of_another_batch": ("position_ids", (2, 24)),
    "positions_of_one_dimension": ("position_ids", (24,)),
    "mask_too_short": ("attention_mask", (3, 20)),
    "mask_of_another_batch": ("attention_mask", (2, 24)),
    "mask_of_four_dimensions": ("attention_mask", (3, 1, 24, 24)),
    "documents_too_long": ("anchor_doc_ids", (3, 25)),
    "documents_of_another_batch": ("anchor_doc_ids", (4, 24)),
}


@pytest.mark.parametrize("name", BAD_SHAPES)
def test_a_wrong_shape_is_named_beside_the_right_one(engine, name):
    argument, shape = BAD_SHAPES[name]
    text = refusal(ValueError, **{argument: torch.ones(shape, dtype=torch.long)})
    assert argument in text
    assert str(shape) in text
    assert "(3, 24)" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 0},
        {"sliding_window": -3},
        {"softcap": 0.0},
        {"sliding_window": 2.5},
        {"softcap": -2.5},
        {"softcap": float("nan")},
        {"dropout": -0.5},
        {"dropout": 1.5},
    ],
    ids=str,
)
def test_a_bad_option_is_named_with_its_value(engine, changes):
    ((option, value),) = changes.items()
    text = refusal(ValueError, **changes)
    assert option in text
    assert str(value) in text


def test_positions_of_a_rounding_type(engine):
    text = refusal(ValueError, position_ids=RAGGED.bfloat16())
    assert "position_ids" in text
    assert "bfloat16" in text


def test_rows_without_tokens(engine):
    empty = {name: x[:, :, :0] for name, x in Problem(RAGGED).tensors.items() if name in ("query", "key", "value")}
    assert "(3, 0)" in refusal(ValueError, **empty, position_ids=RAGGED[:, :0])


@pytest.mark.parametrize("heads", [(4, 3), (2, 4)], ids=str)
def test_heads_that_do_not_divide(engine, heads):
    text = refusal(ValueError, **Problem(RAGGED, heads=heads).tensors)
    assert f"(3, {heads[0]}, 24, 6)" in text
    assert f"(3, {heads[1]}, 24, 6)" in text


@pytest.mark.parametrize(
    "tensors",
    [{"key": (3, 2, 23, 6)}, {"value": (3, 2, 23, 6)}, {"key": (2, 2, 24, 6)}, {"key": (3, 2, 24, 5)}],
    ids=str,
)
def test_tensors_that_do_not_fit_each_other(engine, tensors):
    text = refusal(ValueError, **{name: torch.ones(shape, dtype=torch.float64) for name, shape in tensors.items()})
    assert all(str(shape) in text for shape in tensors.values())


def test_sinks_of_another_number_of_heads(engine):
    assert "sinks" in refusal(ValueError, sinks=torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize(
    "documents",
    [[0, 1, 1, 0, 2, 2], [1, 1, 0, 0, 2, 2], [0, 1, 2, 2, 1, 1], [0, 2, 2, 1, 1, 2]],
    ids=["second_anchor", "anchor_in_the_middle", "first_document_again", "last_document_again"],
)
def test_badly_ordered_documents_are_refused(engine, documents):
    good = [0, 1, 1, 2, 2, 3]
    with pytest.raises(ValueError, match="anchor_doc_ids") as caught:
        problem = Problem(torch.arange(6).expand(2, -1))
        anchor_attention(
            **problem.tensors, position_ids=problem.position_ids, anchor_doc_ids=torch.tensor([good, documents])
        )
    assert "row 1" in str(caught.value)


# ---------------------------------------------------------------- choosing an engine


@pytest.fixture
def fresh_choice(monkeypatch):
    """No engine named by anybody, whatever ran before; the choice made before comes back afterwards."""
    from hf_ext.anchor_attention import choice

    monkeypatch.setattr(choice, "_named", [])
    monkeypatch.delenv(VARIABLE, raising=False)


def writes_out_a_mask() -> bool:
    """Tells the dense engine by what it does."""
    return largest_tensor([[256]], {}) >= 256**2


@pytest.mark.usefixtures("fresh_choice")
class TestChoice:
    @pytest.mark.parametrize("name, near", [("spda", "sdpa"), ("densse", "dense"), ("Auto", "auto")])
    def test_unknown_engine(self, name, near):
        with pytest.raises(ValueError, match=name) as caught:
            use_engine(name)
        text = str(caught.value)
        assert all(allowed in text for allowed in ("auto", *ENGINES))
        assert text.count(near) == 2, "once among the allowed names, once as the nearest match"

    def test_unknown_engine_changes_nothing(self):
        with use_engine("dense"):
            with pytest.raises(ValueError):
                use_engine("dens")
            assert writes_out_a_mask()

    def test_unknown_engine_through_the_environment(self, monkeypatch):
        monkeypatch.setenv(VARIABLE, "dens")
        text = refusal(ValueError)
        assert all(word in text for word in (VARIABLE, "'dens'", "auto", "sdpa", "dense"))

    @pytest.mark.parametrize("name, dense", [("dense", True), ("sdpa", False), ("auto", False), ("", False)])
    def test_environment(self, monkeypatch, name, dense):
        monkeypatch.setenv(VARIABLE, name)
        assert writes_out_a_mask() is dense

    def test_auto_is_sdpa_here(self):
        assert not writes_out_a_mask()

    def test_setter_holds_until_the_next_one(self):
        use_engine("dense")
        assert writes_out_a_mask()
        use_engine("sdpa")
        assert not writes_out_a_mask()

    def test_setter_goes_before_the_environment(self, monkeypatch):
        monkeypatch.setenv(VARIABLE, "dense")
        use_engine("sdpa")
        assert not writes_out_a_mask()

    def test_context_managers_nest(self):
        use_engine("sdpa")
        with use_engine("dense"):
            with use_engine("sdpa"):
                assert not writes_out_a_mask()
            assert writes_out_a_mask()
        assert not writes_out_a_mask()

    def test_context_manager_gives_back_after_an_error(self):
        with pytest.raises(KeyError), use_engine("dense"):
            raise KeyError
        assert not writes_out_a_mask()

    def test_available_engines_tells_which_is_chosen(self, monkeypatch):
        assert {name for name, status in available_engines().items() if status.usable} >= set(ENGINES)
        assert "chosen" in available_engines()["sdpa"].reason
        monkeypatch.setenv(VARIABLE, "dense")
        assert "chosen" in available_engines()["dense"].reason
        assert VARIABLE in available_engines()["dense"].reason
        assert os.environ[VARIABLE] == "dense"


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("options", [{}, {"sliding_window": 5}, {"softcap": 3.0}], ids=["plain", "window", "softcap"])
def test_on_cuda(engine, dtype, tolerance, options):
    problem = Problem(RAGGED, widths=(16, 16), options=options, dtype=dtype)
    expected = problem.expected()
    problem.tensors = {name: x.cuda() for name, x in problem.tensors.items()}
    problem.grad_out, problem.position_ids = problem.grad_out.cuda(), problem.position_ids.cuda()
    computed = {name: x.cpu().double() for name, x in problem.computed().items()}
    assert_equal(computed, expected, tolerance)
