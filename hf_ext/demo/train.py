"""Train a small causal language model on rows of tokens: an ordinary Trainer script, to copy and to change.

    python train.py --dataset packed --config_name model --attn_implementation sdpa --output_dir runs/sdpa
    python train.py --dataset rows --model_name_or_path runs/sdpa --adapter adapters/lora --output_dir runs/lora

The data set is a folder written by `datasets` with the splits "train" and "test" and the columns input_ids, labels and,
for packed rows, position_ids, all rows of one length. Also runs under `accelerate launch` and `torchrun`.
"""

import argparse
import json
import time
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import set_seed
from datasets import load_from_disk
from peft import PeftConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="folder of the data set")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config_name", help="folder with the config.json of a model to train from scratch")
    model.add_argument("--model_name_or_path", help="folder with trained weights to start from")
    parser.add_argument("--adapter", help="folder with the adapter_config.json of an adapter to train instead")
    parser.add_argument("--attn_implementation", default="sdpa", help="as in from_pretrained")
    parser.add_argument(
        "--whole_rows",
        action="store_true",
        help="ignore position_ids: number a row from 0 to its end, and let its documents see each other",
    )
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--per_device_train_batch_size", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class StepClock(TrainerCallback):
    """Seconds of every training step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def main() -> None:
    args = parse_arguments()
    set_seed(args.seed)

    rows = load_from_disk(args.dataset)
    if args.whole_rows:
        rows = rows.remove_columns("position_ids")

    attention = {"attn_implementation": args.attn_implementation}
    if args.model_name_or_path:
        model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, **attention)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.config_name), **attention)
    if args.adapter:
        model = get_peft_model(model, PeftConfig.from_pretrained(args.adapter))

    clock = StepClock()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output_dir,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.per_device_train_batch_size,
            per_device_eval_batch_size=args.per_device_train_batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=args.max_steps // 10,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            seed=args.seed,
        ),
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        data_collator=default_data_collator,
        callbacks=[clock],
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()

    if PartialState().is_main_process:
        losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        results = {
            "losses": losses,
            "step_seconds": clock.seconds,
            "eval_loss": metrics["eval_loss"],
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }
        Path(args.output_dir, "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
