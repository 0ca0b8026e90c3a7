"""Demo of Bone: a model trained on docstrings learns to read modules, by LoRA and by Bone of equal size."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_from_disk
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_ext import compat
from hf_ext.demo.report import Outcome, Run
from hf_ext.demo.text import modules

LENGTH, BATCH, TEST_ROWS = 128, 8, 64
BASE, RUNS = "base for adapters", {"lora": "LoRA", "bone": "Bone"}

# Layers of which in + out is on average twice out: LoRA of half the rank then has exactly as many parameters.
TARGETS = ["q_proj", "o_proj", "gate_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"peft_type": "LORA", "r": 8, "lora_alpha": 16},
    "bone": {"peft_type": "BONE", "r": 16},
}
# The best of 0.005, 0.01, 0.02 and 0.03 over three seeds, on rows apart from the test's (0.03 is level for LoRA).
RATES = {"lora": 0.02, "bone": 0.01}


def prepare(out: Path, quick: bool) -> list[Run]:
    """Write rows of two kinds of text and the adapters' configurations; return the commands to run.

    The docstrings, the tokenizer and the model's configuration are those that the demo of AnchorAttention wrote.
    """
    base_steps, steps, characters = (20, 10, 100_000) if quick else (250, 100, 400_000)
    packed = load_from_disk(str(out / "packed"))["train"].with_format("torch")["input_ids"][:]
    _save_rows(packed.flatten(), out / "docstrings")
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    text = "".join(tokenizer.bos_token + module for module in modules(characters, seed=0))
    _save_rows(tokenizer(text, return_tensors="pt")["input_ids"][0], out / "modules")
    for name, adapter in ADAPTERS.items():
        folder = out / "adapters" / name
        folder.mkdir(parents=True)
        config = adapter | {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    size = ["--per_device_train_batch_size", str(BATCH), "--max_steps"]
    base = ["train.py", "--dataset", "docstrings", "--config_name", "model", "--learning_rate", "0.005"]
    runs = [Run(BASE, [*base, *size, str(base_steps), "--output_dir", "runs/base"], base_steps)]
    for name, label in RUNS.items():
        script = ["train.py", "--dataset", "modules", "--model_name_or_path", "runs/base"]
        script += ["--adapter", f"adapters/{name}", "--learning_rate", str(RATES[name])]
        script += [*size, str(steps), "--output_dir", f"runs/{name}"]
        proof = "BONE" if name == "bone" and not compat.has_native_bone() else None
        runs.append(Run(label, script, steps, proof, after=BASE))
    return runs


def judge(out: Path) -> Outcome:
    """Compare the two adaptations, and hold the saved Bone adapter to its promises."""
    results = {name: json.loads((out / "runs" / name / "results.json").read_text()) for name in RUNS}
    counts = {name: result["trained_parameters"] for name, result in results.items()}
    saved = json.loads((out / "runs" / "bone" / "adapter_config.json").read_text())["peft_type"]
    rows = load_from_disk(str(out / "modules"))["test"].with_format("torch")["input_ids"][:]
    base = AutoModelForCausalLM.from_pretrained(out / "runs" / "base").eval()
    before, plain = _loss_and_logits(base, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about what PEFT calls
        adapted = PeftModel.from_pretrained(base, out / "runs" / "bone").eval()
    after, logits = _loss_and_logits(adapted, rows)
    again = abs(after - results["bone"]["eval_loss"])
    restored = _comes_back(adapted)
    merged = (_loss_and_logits(adapted.merge_and_unload(), rows)[1] - logits).abs().max().item()
    moved = (logits - plain).abs().max().item()
    native = compat.has_native_bone()  # PEFT up to 0.18, left alone: its unmerge subtracts, and drifts
    held = saved == "BONE" and again < 1e-5 and merged < 1e-4 < moved and (restored or native)
    return Outcome(
        string='--adapter DIR ("peft_type": "BONE")',
        baseline=_row("lora", counts, before, results),
        ours=f"{_row('bone', counts, before, results)} (equal parameters, learning rate chosen for each)",
        check=f"the saved file says {saved}; read back, its test loss is off by {again:.0e}; merging moves logits by "
        f"{merged:.0e} (the adapter: {moved:.2g}); unmerging {'restores' if restored else 'changes'} the base's bytes"
        + (" (PEFT's own Bone)" if native else ""),
        passed=held and counts["bone"] == counts["lora"] and after < before,
        numbers={
            "results": results,
            "learning_rates": RATES,
            "loss_before": before,
            "saved_peft_type": saved,
            "loss_off_after_reload": again,
            "logits_off_after_merge": merged,
            "logits_moved_by_adapter": moved,
            "base_restored": restored,
        },
    )


def panel(axes: Any, outcome: Outcome) -> None:
    for (name, label), colour in zip(RUNS.items(), ("0.6", "tab:blue"), strict=True):
        result = outcome.numbers["results"][name]
        steps, losses = zip(*result["losses"], strict=True)
        test = f"test loss {outcome.numbers['loss_before']:.3f} \N{RIGHTWARDS ARROW} {result['eval_loss']:.3f}"
        axes.plot(steps, losses, color=colour, label=f"{label}, {test}")
    axes.set_title(f"Bone: {result['trained_parameters']:,} parameters each, learning rate chosen for each")
    axes.set_xlabel("training step")
    axes.set_ylabel("training loss (nats a token)")
    axes.legend()


def _save_rows(tokens: Tensor, folder: Path) -> None:
    """Cut tokens (n,) into rows; the last ones are for testing, and are of other modules than most of the rest."""
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH).tolist()
    splits = {"train": rows[:-TEST_ROWS], "test": rows[-TEST_ROWS:]}
    DatasetDict(
        {name: Dataset.from_dict({"input_ids": part, "labels": part}) for name, part in splits.items()}
    ).save_to_disk(folder)


@torch.no_grad()
def _loss_and_logits(model: Any, rows: Tensor) -> tuple[float, Tensor]:
    """Mean loss over rows (n, length) in the script's batches, and the logits (n, length, vocabulary)."""
    batches = [model(input_ids=batch, labels=batch) for batch in rows.split(BATCH)]
    return sum(batch.loss.item() for batch in batches) / len(batches), torch.cat([batch.logits for batch in batches])


def _comes_back(model: PeftModel) -> bool:
    """Whether merging changes the base weights and unmerging restores every bit of them."""
    weights = [layer.get_base_layer().weight for layer in model.modules() if hasattr(layer, "get_base_layer")]
    before = [weight.clone() for weight in weights]
    model.merge_adapter()
    changed = not any(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
    model.unmerge_adapter()
    same = all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
    return changed and same


def _row(name: str, counts: dict[str, int], before: float, results: dict[str, Any]) -> str:
    return (
        f"{RUNS[name]}, {counts[name]:,} parameters, learning rate {RATES[name]:g}: "
        f"test loss {before:.3f} -> {results[name]['eval_loss']:.3f}"
    )
