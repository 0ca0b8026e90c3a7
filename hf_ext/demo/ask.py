"""Ask a causal model multiple-choice questions and judge its answers: an ordinary script, to copy and to change.

    python ask.py --model reader --questions questions.json --output_dir runs/plain
    python ask.py --model reader --questions questions.json --output_dir runs/judged --metric NAME
    python ask.py --model reader --questions questions.json --output_dir runs/mended --repair package.module:function

--metric is a name for `evaluate.load`. --repair names a function of model, tokenizer and questions without answers that
returns a PeftModel; the questions are those under "unlabelled" in the file, those under "test" are asked.
"""

import argparse
import json
import pkgutil
from pathlib import Path
from typing import Any

import evaluate
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

LETTERS = "ABCD"


@torch.no_grad()
def scores(model: Any, tokenizer: Any, items: list[dict[str, Any]]) -> list[list[float]]:
    """Logits of the letters behind each prompt."""
    letters = tokenizer.convert_tokens_to_ids(list(LETTERS))
    rows = []
    for item in tqdm(items):
        logits = model(**tokenizer(item["prompt"], return_tensors="pt")).logits[0, -1]
        rows.append(logits[letters[: item["num_choices"]]].tolist())
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--questions", required=True, help="JSON file with lists of items, 'unlabelled' and 'test'")
    parser.add_argument("--metric", help="name of a metric, as evaluate.load takes it")
    parser.add_argument("--repair", help="function that returns a better model, as package.module:function")
    parser.add_argument("--output_dir", required=True)
    args = parser.parse_args()

    torch.set_num_threads(1)
    questions = json.loads(Path(args.questions).read_text())
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    if args.repair:
        model = pkgutil.resolve_name(args.repair)(model, tokenizer, questions["unlabelled"])
        model.save_pretrained(args.output_dir)

    test = questions["test"]
    answers = {"predictions": scores(model, tokenizer, test), "references": [item["label"] for item in test]}
    best = [max(row) == row[label] for row, label in zip(*answers.values(), strict=True)]
    results = {"accuracy": sum(best) / len(best)}
    if args.metric:
        results |= evaluate.load(args.metric).compute(**answers, group=[item["group"] for item in test])
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    Path(args.output_dir, "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
