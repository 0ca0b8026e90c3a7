"""The recipe of the package's README, as it stands there, on documents of which one source lies."""

import io
import re
from ast import literal_eval
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

import hf_ext
from hf_ext import ImportanceWeights

README = Path(hf_ext.__file__).parent / "importance_weights" / "README.md"
DOCUMENTS, QUESTIONS, LIAR = 120, 160, "source 3"


def two_data_sets() -> dict[str, Dataset]:
    """Points around four centres, whose number is the right answer; 2 of 5 documents are of a source that lies."""
    draw = np.random.default_rng(0)
    centres = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    near, asked = draw.integers(0, 4, DOCUMENTS), draw.integers(0, 4, QUESTIONS)
    sources = [f"source {number}" for number in draw.choice([0, 1, 2, 3, 3], DOCUMENTS)]
    answers = [(answer + (source == LIAR)) % 4 for answer, source in zip(near.tolist(), sources, strict=True)]
    documents, questions = (centres[at] + 0.35 * draw.standard_normal((len(at), 2)) for at in (near, asked))
    ids = [f"document {number}" for number in range(DOCUMENTS)]
    columns = {"id": ids, "source": sources, "embedding": documents.tolist(), "answer": answers}
    return {
        "corpus": Dataset.from_dict(columns),
        "questions": Dataset.from_dict({"embedding": questions.tolist(), "answer": asked.tolist()}),
    }


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What the names stand for after all blocks have run, in order; the folder, and what was printed."""
    folder, said = tmp_path_factory.mktemp("importance"), io.StringIO()
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    names = two_data_sets()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.chdir(folder)
        for block in blocks:
            exec(block, names)
    return names | {"at": folder, "said": said.getvalue()}


def test_every_question_gets_its_nearest_documents_and_what_each_is_worth(ran):
    documents, questions = two_data_sets().values()
    scores = np.array(questions["embedding"][:]) @ np.array(documents["embedding"][:]).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :30]
    for row, places in zip(ran["validation"], order.tolist(), strict=True):
        nearest = documents.select(places).to_dict()
        assert row["retrieved"] == nearest["id"]
        assert row["source"] == nearest["source"]
        assert row["answers"] == nearest["answer"]
        assert row["utility"] == [float(answer == row["answer"]) for answer in nearest["answer"]]


def test_three_splits_have_no_row_in_common(ran):
    rows = [{tuple(row) for row in ran[name]["embedding"]} for name in ("fit", "tune", "test")]
    assert [len(split) for split in rows] == [QUESTIONS // 2, QUESTIONS // 4, QUESTIONS // 4]
    assert len(set.union(*rows)) == QUESTIONS


def test_the_source_that_lies_is_found_and_taken_out(ran):
    weights = ran["weights"].to_dict()
    assert len(weights) == 4
    assert min(weights, key=weights.get) == LIAR
    corpus = ran["corpus"]
    assert corpus["importance"][:] == [weights[source] for source in corpus["source"]]
    assert ran["better"].to_dict() == corpus.filter(lambda row: row["source"] != LIAR).to_dict()


def test_what_is_printed_is_that_votes_without_it_are_more_often_right(ran):
    printed = literal_eval(ran["said"])
    assert printed == ran["weights"].evaluate(ran["test"])
    votes = {name: [] for name in ("vanilla", "prune")}
    for row in ran["test"]:
        kept = [a for a, source in zip(row["answers"], row["source"], strict=True) if source != LIAR]
        for name, answers in (("vanilla", row["answers"]), ("prune", kept)):
            votes[name].append(max(answers[:10], key=answers[:10].count) == row["answer"])
    for name, right in votes.items():
        assert printed[name] == pytest.approx(np.mean(right))
    assert printed["prune"] > printed["vanilla"] + 0.05
    assert printed["rows"] == QUESTIONS // 4


def test_what_was_saved_is_what_was_fitted(ran):
    again = ImportanceWeights.from_pretrained(ran["at"] / "importance")
    assert again.to_dict() == ran["weights"].to_dict()
    assert again.threshold == ran["weights"].threshold
    assert again.prune(ran["corpus"]).to_dict() == ran["better"].to_dict()
