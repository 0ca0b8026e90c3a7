"""Answer questions by a vote of the nearest documents: an ordinary script of `datasets`, to copy and to change.

    python answer.py --dataset documents --output_dir runs/some --score package.module:Class --score_kwargs k=10

The data set is a folder written by `datasets` with the splits "corpus" (columns id, source, embedding, answer) and
"fit", "tune" and "test" (columns embedding, answer). --score names a class that learns which documents to keep; without
it all are. Its objects have fit(rows), tune_threshold(rows), prune(corpus) and save_pretrained(folder), and can be
given to corpus.map. rows are questions with the lists retrieved, source, answers and utility, best document first.
"""

import argparse
import ast
import json
import pkgutil
from pathlib import Path

import numpy as np
from datasets import Dataset, load_from_disk
from tqdm import tqdm


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="folder of the data set")
    parser.add_argument("--score", help="class that weighs documents, as package.module:Class")
    parser.add_argument("--score_kwargs", nargs="*", default=[], metavar="NAME=VALUE", help="options of that class")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--k", type=int, default=10, help="how many documents vote")
    parser.add_argument("--candidates", type=int, default=30, help="how many are retrieved to learn from")
    return parser.parse_args()


def value(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def nearest(corpus: Dataset, questions: Dataset, k: int) -> np.ndarray:
    """(questions, k): rows of the corpus with the largest inner product, best first."""
    documents, wanted = (
        dataset.with_format("numpy")["embedding"][:].astype(np.float64) for dataset in (corpus, questions)
    )
    return np.argsort(-(wanted @ documents.T), axis=1, kind="stable")[:, :k]


def judged(corpus: Dataset, questions: Dataset, k: int) -> Dataset:
    """The k nearest documents of each question; the utility of one is whether its answer is the right one."""
    columns = {name: np.array(corpus[name]) for name in ("id", "source", "answer")}
    rows = nearest(corpus, questions, k)
    answers = columns["answer"][rows]
    right = answers == np.array(questions["answer"])[:, None]
    lists = {"retrieved": columns["id"][rows], "source": columns["source"][rows], "answers": answers}
    return Dataset.from_dict(
        {name: table.tolist() for name, table in (lists | {"utility": right.astype(float)}).items()}
    )


def accuracy(corpus: Dataset, questions: Dataset, k: int, progress: bool = False) -> float:
    """Share of the questions for which the most frequent answer of k documents is right; ties to the nearest."""
    answers = np.array(corpus["answer"])[nearest(corpus, questions, k)].tolist()
    votes = [max(given, key=given.count) for given in tqdm(answers, disable=not progress)]
    return float(np.mean(np.array(votes) == np.array(questions["answer"])))


def main() -> None:
    args = parse_arguments()
    data = load_from_disk(args.dataset)
    corpus = data["corpus"]
    results = {"accuracy_of_all": accuracy(corpus, data["test"], args.k)}
    if args.score:
        options = dict(option.split("=", 1) for option in args.score_kwargs)
        weights = pkgutil.resolve_name(args.score)(**{name: value(text) for name, text in options.items()})
        weights.fit(judged(corpus, data["fit"], args.candidates))
        weights.tune_threshold(judged(corpus, data["tune"], args.candidates))
        corpus = weights.prune(corpus.map(weights, batched=True))
        weights.save_pretrained(args.output_dir)
        corpus.save_to_disk(Path(args.output_dir, "corpus"))

    results |= {"accuracy": accuracy(corpus, data["test"], args.k, progress=True), "documents": len(corpus)}
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    Path(args.output_dir, "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
