"""Train a small vision transformer of timm on images: an ordinary Accelerate loop, to copy and to change.

    python train_images.py --dataset digits --model vit_tiny_patch16_224 --output_dir runs/float
    python train_images.py --dataset digits --model vit_tiny_patch16_224 --output_dir runs/longer \\
        --initial_checkpoint runs/float/model.safetensors

The data set is a folder written by `datasets` with the splits "train" and "test" and the columns pixel_values
(channels, height, width) and labels. Also runs under `accelerate launch` and `torchrun`.
"""

import argparse
import ast
import json
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_from_disk
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from tqdm import tqdm


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="folder of the data set")
    parser.add_argument("--model", required=True, help="as in timm.create_model")
    parser.add_argument(
        "--model_kwargs", nargs="*", default=[], metavar="NAME=VALUE", help="further options of the model"
    )
    parser.add_argument("--initial_checkpoint", default="", help="file with weights to start from")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--weight_decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def value(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


@torch.no_grad()
def accuracy(model: torch.nn.Module, loader: DataLoader, accelerator: Accelerator) -> float:
    model.eval()
    right = []
    for batch in loader:
        guesses = model(batch["pixel_values"]).argmax(-1)
        right.append(accelerator.gather_for_metrics(guesses == batch["labels"]))
    model.train()
    return torch.cat(right).float().mean().item()


def main() -> None:
    args = parse_arguments()
    set_seed(args.seed)
    accelerator = Accelerator()
    data = load_from_disk(args.dataset).with_format("torch")
    options = dict(option.split("=", 1) for option in args.model_kwargs)
    model = timm.create_model(
        args.model,
        num_classes=data["train"].features["labels"].num_classes,
        checkpoint_path=args.initial_checkpoint,
        **{name: value(text) for name, text in options.items()},
    )
    optimizer = create_optimizer_v2(model, opt="adamw", lr=args.learning_rate, weight_decay=args.weight_decay)
    loaders = [DataLoader(data[split], args.batch_size, shuffle=split == "train") for split in ("train", "test")]
    model, optimizer, train, test = accelerator.prepare(model, optimizer, *loaders)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.epochs * len(train), pct_start=0.1
    )

    losses, accuracies = [], []
    bar = tqdm(total=args.epochs * len(train), disable=not accelerator.is_main_process)
    for _ in range(args.epochs):
        for batch in train:
            loss = cross_entropy(model(batch["pixel_values"]), batch["labels"])
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            bar.update()
        accuracies.append(accuracy(model, test, accelerator))

    if accelerator.is_main_process:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        save_file(accelerator.unwrap_model(model).state_dict(), Path(args.output_dir, "model.safetensors"))
        results = {"losses": losses, "accuracies": accuracies, "accuracy": accuracies[-1]}
        Path(args.output_dir, "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
