"""Two processes under gloo: the bits of one process, and the same error in both."""

import io
import threading
from contextlib import redirect_stderr
from typing import Any

import pytest
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from importance_oracle import fingerprint, grouped, some_rows, sources
from ranks import RANKS

from hf_ext import ImportanceWeights

PATIENCE = 30  # seconds that a fit of milliseconds may take before it counts as hanging
MODES = {
    "item": {},
    "float32": {"dtype": "float32"},
    "truncated": {"epsilon": 0.02},
    "sampled": {"epsilon": 2.0, "delta": 0.3, "seed": 4},
    "mean_of_items": {"group_column": "source"},
    "sum": {"group_column": "source", "group_update": "sum"},
    "sum_truncated": {"group_column": "source", "group_update": "sum", "epsilon": 0.1},
    "exact": {"group_column": "source", "group_update": "exact"},
    "item_exact": {"group_update": "exact", "epochs": 1},
    "shapley": {"method": "shapley"},
    "banzhaf": {"method": "banzhaf"},
    "loo": {"method": "loo"},
    "mean": {"method": "mean"},
    "shapley_grouped": {"method": "shapley", "group_column": "source"},
    "banzhaf_grouped": {"method": "banzhaf", "group_column": "source"},
    "loo_grouped": {"method": "loo", "group_column": "source"},
    "mean_grouped": {"method": "mean", "group_column": "source"},
}
each_mode = pytest.mark.parametrize("mode", MODES)


def all_rows(strings: bool = True) -> dict[str, list[Any]]:
    """An odd number, so that the shares are unequal; some keys are held by one share only."""
    rows = some_rows(rows=201, items=60, longest=40, seed=1, strings=strings)
    return grouped(rows, sources(rows))


def share(rows: dict[str, list[Any]], rank: int, cut: int) -> dict[str, list[Any]]:
    return {name: column[:cut] if rank == 0 else column[cut:] for name, column in rows.items()}


def fit(rows: Any, mode: str, **options: Any) -> ImportanceWeights:
    return ImportanceWeights(**{"k": 4, "epochs": 4} | MODES[mode]).fit(rows, **{"progress": False} | options)


def patiently(job: Any) -> Any:
    """What `job()` returns or raises; a process that waits for the other for ever is a failure, not a wait."""
    found = []

    def target() -> None:
        try:
            found.append((job(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert found, "hangs"
    result, error = found[0]
    if error is not None:
        raise error
    return result


def assert_equal_to_one(answers: list[Any], mode: str, rows: Any = None) -> None:
    assert len(answers) == RANKS
    expected = fingerprint(fit(rows or all_rows(), mode))
    assert expected["keys"] and (expected["history"] or "method" in MODES[mode])
    for answer in answers:
        assert answer == expected


# ---------------------------------------------------------------- the same rows in every process


def as_dataset(rows: dict[str, list[Any]]) -> Dataset:
    return Dataset.from_dict(rows)


def as_lists(rows: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]


def as_two_shards(rows: dict[str, list[Any]]) -> IterableDataset:
    """A shard for every process."""
    return Dataset.from_dict(rows).to_iterable_dataset(num_shards=RANKS)


def as_generator(rows: dict[str, list[Any]]) -> IterableDataset:
    """One shard, of which every process skips what is another's."""

    def every() -> Any:
        yield from as_lists(rows)

    return IterableDataset.from_generator(every, features=Dataset.from_dict(rows).features)


FORMS = {form.__name__: form for form in (as_dataset, as_lists, as_two_shards, as_generator)}


def fit_the_same(rank: int, form: str, mode: str) -> Any:
    return patiently(lambda: fingerprint(fit(FORMS[form](all_rows()), mode)))


@each_mode
@pytest.mark.parametrize("form", FORMS)
def test_two_processes_find_what_one_finds(both, form, mode):
    rows = all_rows()
    if (form, mode) == ("as_generator", "sampled"):  # a sample is of row numbers, which are those of the processes
        rows = {name: [row for rank in range(RANKS) for row in column[rank::RANKS]] for name, column in rows.items()}
    assert_equal_to_one(both(fit_the_same, form, mode), mode, rows)


def fit_with_accelerator(rank: int, mode: str) -> Any:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == RANKS
    return patiently(lambda: fingerprint(fit(as_dataset(all_rows()), mode, accelerator=accelerator)))


@pytest.mark.parametrize("mode", ["item", "truncated", "sampled", "mean_of_items", "shapley"])
def test_with_an_accelerator(both, mode):
    assert_equal_to_one(both(fit_with_accelerator, mode), mode)


def fit_few(rank: int, rows: dict[str, list[Any]]) -> Any:
    return patiently(lambda: fingerprint(fit(as_dataset(rows), "item")))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_rows_than_processes_would_like(both, count):
    """With one row, one process has nothing."""
    rows = {name: column[:count] for name, column in all_rows().items()}
    assert_equal_to_one(both(fit_few, rows), "item", rows)


def fit_threads(rank: int, mode: str) -> Any:
    return patiently(lambda: fingerprint(fit(as_dataset(all_rows()), mode, num_threads=1 + rank)))


@pytest.mark.parametrize("mode", ["item", "exact"])
def test_processes_of_unequal_threads(both, mode):
    assert_equal_to_one(both(fit_threads, mode), mode)


def fit_groups_apart(rank: int) -> Any:
    rows = all_rows()
    group_of = sources(rows)
    del rows["source"]
    return patiently(lambda: fingerprint(fit(as_dataset(rows), "sum", groups=group_of)))


def test_groups_that_are_given_apart(both):
    assert_equal_to_one(both(fit_groups_apart), "sum")


def test_a_sample_is_not_everything_and_a_truncation_cuts():
    assert {entry["tuples"] < 201 for entry in fit(all_rows(), "sampled").history} == {True}
    for mode in ("truncated", "sum_truncated"):
        assert {entry["bound"] > 0 for entry in fit(all_rows(), mode).history} == {True}


# ---------------------------------------------------------------- rows of its own in every process


def fit_presharded(rank: int, mode: str, cut: int, form: str) -> Any:
    rows = FORMS[form](share(all_rows(), rank, cut))
    return patiently(lambda: fingerprint(fit(rows, mode, presharded=True)))


@each_mode
def test_presharded(both, mode):
    assert_equal_to_one(both(fit_presharded, mode, 140, "as_dataset"), mode)


@pytest.mark.parametrize("form", ["as_lists", "as_generator"])
@pytest.mark.parametrize("cut", [1, 100, 200])
def test_presharded_at_any_row(both, cut, form):
    assert_equal_to_one(both(fit_presharded, "mean_of_items", cut, form), "mean_of_items")


def fit_other_order(rank: int, mode: str) -> Any:
    """The later rows in the first process."""
    rows = as_dataset(share(all_rows(), 1 - rank, 77))
    return patiently(lambda: fingerprint(fit(rows, mode, presharded=True)))


@pytest.mark.parametrize("mode", ["item", "sum_truncated", "exact", "mean_grouped"])
def test_presharded_in_any_order(both, mode):
    assert_equal_to_one(both(fit_other_order, mode), mode)


# ---------------------------------------------------------------- errors


def complaint(rank: int, rows: Any, mode: str, options: dict[str, Any]) -> tuple[str, str]:
    try:
        patiently(lambda: fit(rows, mode, **options))
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def complaint_about_share(rank: int, place: int, fault: str, form: str) -> tuple[str, str]:
    return complaint(rank, FORMS[form](broken(place, fault)), "sum", {})


def broken(place: int, fault: str) -> dict[str, list[Any]]:
    rows = all_rows()
    if fault == "nan":
        rows["utility"][place] = [float("nan")] * len(rows["utility"][place])
    elif fault == "null_id":
        rows["retrieved"][place] = [None] * len(rows["retrieved"][place])
    elif fault == "lengths":
        rows["utility"][place] = [1.0] * 41
    else:  # of one source in the share that has this row, of another in the other share
        for t in range(len(rows["retrieved"])):
            for i, item in enumerate(rows["retrieved"][t]):
                if item == "doc7" and t == 100:  # the last row of a share, or the first of one
                    rows["retrieved"][t][i], rows["source"][t][i] = "doc0", sources(rows)["doc0"]
                elif item == "doc7" and (t < 100) == (place < 100):
                    rows["source"][t][i] = "another"
    return rows


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", [50, 150], ids=["first", "second"])
@pytest.mark.parametrize("fault", ["nan", "null_id", "lengths", "two_sources"])
def test_a_bad_row_of_one_share_is_an_error_of_both(both, fault, place, form):
    (_, one), (_, other) = answers = both(complaint_about_share, place, fault, form)
    assert {kind for kind, _ in answers} == {"ValueError"}, answers
    assert one == other
    if fault == "two_sources":
        assert "doc7" in one and "another" in one
    elif form in ("as_dataset", "as_lists"):  # they know the number of a row
        assert str(place) in one
    # Nothing is left behind that would disturb the next fit.
    assert_equal_to_one(both(fit_the_same, "as_dataset", "item"), "item")


def complaint_of_one(rank: int, fault: str) -> tuple[str, str]:
    rows = share(all_rows(), rank, 100)
    if rank == 1 and fault == "no_column":
        del rows["utility"]
    if rank == 1 and fault == "nan":
        rows["utility"][9] = [float("nan")] * len(rows["utility"][9])
    if rank == 1 and fault == "not_lists":
        rows["utility"] = [1.0] * len(rows["utility"])
    return complaint(rank, as_dataset(rows), "item", {"presharded": True})


@pytest.mark.parametrize(
    ("fault", "error"), [("no_column", "MissingColumnError"), ("nan", "ValueError"), ("not_lists", "ValueError")]
)
def test_a_bad_share_is_an_error_of_both(both, fault, error):
    answers = both(complaint_of_one, fault)
    assert {kind for kind, _ in answers} == {error}, answers
    assert len({text for _, text in answers}) == 1
    assert_equal_to_one(both(fit_the_same, "as_dataset", "item"), "item")


def complaint_of_other_ids(rank: int) -> tuple[str, str]:
    rows = share(all_rows(strings=rank == 0), rank, 100)
    return complaint(rank, as_dataset(rows), "item", {"presharded": True})


def test_integers_in_one_share_and_strings_in_the_other(both):
    answers = both(complaint_of_other_ids)
    assert {kind for kind, _ in answers} <= {"ValueError", "TypeError"}, answers
    assert len(set(answers)) == 1


def complaint_of_nothing(rank: int) -> tuple[str, str]:
    return complaint(rank, as_dataset({name: [] for name in all_rows()}), "item", {"presharded": True})


def test_no_rows_anywhere(both):
    answers = both(complaint_of_nothing)
    assert {kind for kind, _ in answers} == {"ValueError"}, answers


# ---------------------------------------------------------------- checkpoints and progress


def fit_with_folder_each(rank: int, folder: Any, mode: str) -> Any:
    options = {"checkpoint_dir": folder / str(rank), "checkpoint_every": 2}
    return patiently(lambda: fingerprint(fit(as_dataset(all_rows()), mode, **options)))


@pytest.mark.parametrize("mode", ["item", "sampled", "exact"])
def test_only_the_first_process_writes(both, tmp_path, mode):
    assert_equal_to_one(both(fit_with_folder_each, tmp_path, mode), mode)
    assert [*(tmp_path / "0").rglob("*")]
    assert not [*(tmp_path / "1").rglob("*")]


def fit_in_two_parts(rank: int, folder: Any, mode: str, epochs: int) -> Any:
    def job() -> Any:
        rows, how = as_dataset(all_rows()), {"k": 4} | MODES[mode]
        options = {"checkpoint_dir": folder, "checkpoint_every": 3, "progress": False}
        ImportanceWeights(epochs=epochs, **how).fit(rows, **options)
        weights = ImportanceWeights(epochs=4, **how).fit(rows, resume_from_checkpoint=folder, progress=False)
        return fingerprint(weights)

    return patiently(job)


@pytest.mark.parametrize("mode", ["item", "truncated", "sum"])
@pytest.mark.parametrize("epochs", [1, 3])
def test_resuming_in_two_processes(both, tmp_path, epochs, mode):
    assert_equal_to_one(both(fit_in_two_parts, tmp_path, mode, epochs), mode)


def complaint_of_resuming(rank: int, folder: Any) -> tuple[str, str]:
    return complaint(rank, as_dataset(all_rows()), "item", {"resume_from_checkpoint": folder / "nothing"})


def test_no_checkpoint_for_either(both, tmp_path):
    answers = both(complaint_of_resuming, tmp_path)
    assert {kind for kind, _ in answers} == {"FileNotFoundError"}, answers
    assert_equal_to_one(both(fit_the_same, "as_dataset", "item"), "item")


def printed(rank: int) -> str:
    rows, text = as_dataset(all_rows()), io.StringIO()
    with redirect_stderr(text):
        patiently(lambda: fit(rows, "item", progress=True))
    return text.getvalue()


def test_only_the_first_process_shows_progress(both):
    assert both(printed)[1] == ""


# ---------------------------------------------------------------- processes that disagree


def fit_with_other_options(
    rank: int, options: list[dict[str, Any]], arguments: list[dict[str, Any]]
) -> tuple[str, str]:
    """As `complaint`, with options and arguments of fit of each process's own."""
    rows = as_dataset(all_rows())
    weights = ImportanceWeights(**{"k": 4, "epochs": 2} | options[rank])
    try:
        patiently(lambda: weights.fit(rows, progress=False, **arguments[rank]))
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", fingerprint(weights)["weights"]


@pytest.mark.parametrize("other", [{"k": 5}, {"epochs": 3}, {"method": "mean"}], ids=str)
def test_options_that_differ_are_refused_in_both(both, other):
    answers = both(fit_with_other_options, [{}, other], [{}, {}])
    assert {kind for kind, _ in answers} == {"ValueError"}
    assert all("differ between processes" in text for _, text in answers)


@pytest.mark.parametrize("argument", [{"num_threads": 0}, {"checkpoint_every": 0}], ids=str)
@pytest.mark.parametrize("rank", range(RANKS))
def test_a_wrong_argument_of_one_process_hangs_none(both, rank, argument):
    arguments = [argument if rank == i else {} for i in range(RANKS)]
    kinds = {kind for kind, _ in both(fit_with_other_options, [{}, {}], arguments)}
    assert len(kinds) == 1, "both fit, where the first process decides alone, or both raise"
    assert kinds == {"ValueError"} or (rank, list(argument)) == (1, ["checkpoint_every"])


def test_checkpoints_are_the_business_of_the_first_process(both, tmp_path):
    """The others may lack the folder: it may be on a disk of the first one's own."""
    whole = both(fit_with_other_options, [{}, {}], [{}, {}])
    first, other = {"checkpoint_dir": str(tmp_path / "run")}, {"checkpoint_dir": str(tmp_path / "nowhere")}
    assert both(fit_with_other_options, [{"epochs": 1}] * 2, [first, {}])[0][0] == "nothing"
    assert both(fit_with_other_options, [{}, {}], [first | {"resume_from_checkpoint": True}, other]) == whole
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "file").write_text("")
    answers = both(fit_with_other_options, [{}, {}], [{"checkpoint_dir": str(tmp_path / "file/run")}, {}])
    assert {kind for kind, _ in answers} <= {"NotADirectoryError", "OSError", "FileExistsError"}
