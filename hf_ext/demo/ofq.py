"""Demo of OFQ: a vision transformer learns digits, in full precision and then with 2-bit weights and activations."""

import json
import shutil
from pathlib import Path
from typing import Any

import timm
import torch
from datasets import Array3D, ClassLabel, Dataset, DatasetDict, Features, load_from_disk
from torch import Tensor, nn

from hf_ext.demo.report import DemoError, Outcome, Run
from hf_ext.ofq_quantizer import OFQConfig, calibrate, freeze, load_packed, quantize, save_packed, to_int8

BASE, RECIPE = "vit_tiny_patch16_224", "ofq_w2a2"
SIZE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 3, "num_heads": 4}
TEST_IMAGES = 397
RUNS = {"float": "full precision", "ofq": "OFQ W2A2"}
MODELS = {"float": BASE, "ofq": f"{RECIPE}.{BASE}"}


def prepare(out: Path, quick: bool) -> list[Run]:
    """Write scikit-learn's digits as a data set and the script beside it; return the commands to run."""
    images = write_digits(out / "digits")
    shutil.copy(Path(__file__).with_name("train_images.py"), out / "train_images.py")
    epochs = {"float": 5, "ofq": 2} if quick else {"float": 20, "ofq": 12}
    steps = {name: count * -(-(images - TEST_IMAGES) // 64) for name, count in epochs.items()}
    script = ["train_images.py", "--dataset", "digits"]
    size = ["--model_kwargs", *(f"{name}={value}" for name, value in SIZE.items())]
    base = [*script, "--model", MODELS["float"], *size, "--learning_rate", "0.003", "--epochs", str(epochs["float"])]
    ours = [*script, "--model", MODELS["ofq"], *size, "--initial_checkpoint", "runs/float/model.safetensors"]
    ours += ["--learning_rate", "0.003", "--epochs", str(epochs["ofq"])]
    return [
        Run(RUNS["float"], [*base, "--output_dir", "runs/float"], steps["float"]),
        Run(RUNS["ofq"], [*ours, "--output_dir", "runs/ofq"], steps["ofq"], proof=RECIPE, after=RUNS["float"]),
    ]


def write_digits(folder: Path) -> int:
    """The 1,797 digits of 8 x 8 pixels that scikit-learn carries, in a fixed random order; returns their number."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DemoError("the digits come with scikit-learn: `pip install 'hf-ext[demo]'`") from error
    digits = load_digits()
    pixels = (digits.images[:, None] / 8 - 1).astype("float32")
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0)).numpy()
    features = Features({"pixel_values": Array3D((1, 8, 8), "float32"), "labels": ClassLabel(num_classes=10)})
    splits = {"train": order[:-TEST_IMAGES], "test": order[-TEST_IMAGES:]}
    DatasetDict(
        {
            name: Dataset.from_dict({"pixel_values": pixels[rows], "labels": digits.target[rows]}, features=features)
            for name, rows in splits.items()
        }
    ).save_to_disk(folder)
    return len(pixels)


def judge(out: Path) -> Outcome:
    """Compare the accuracies, and hold the trained model to its promises: few levels, small files, whole numbers."""
    results = {name: json.loads((out / "runs" / name / "results.json").read_text()) for name in RUNS}
    data = load_from_disk(str(out / "digits")).with_format("torch")
    images, labels = data["test"]["pixel_values"][:], data["test"]["labels"][:]
    plain, trained = (_trained(out, name) for name in RUNS)
    rounded = calibrate(quantize(plain, OFQConfig()), [data["train"]["pixel_values"][:64]])
    logits = _logits(trained, images)
    save_packed(trained, out / "packed_ofq")
    packed = load_packed(out / "packed_ofq")
    levels = max(len(row.unique()) for weight in freeze(packed).values() if weight.bits == 2 for row in weight.codes)
    reread = (_logits(packed, images) - logits).abs().max().item()
    integers = (_logits(to_int8(packed), images) - logits).abs().max().item()
    sizes = {
        "float": (out / "runs" / "float" / "model.safetensors").stat().st_size,
        "ofq": sum(path.stat().st_size for path in (out / "packed_ofq").iterdir()),
    }
    untrained = _accuracy(_logits(rounded, images), labels)
    return Outcome(
        string=f"--model {MODELS['ofq']}",
        baseline=f"full precision: {results['float']['accuracy']:.1%} right, {sizes['float'] / 1024:.0f} KiB; "
        f"rounded to 2 bits without training: {untrained:.1%}",
        ours=f"2-bit weights and activations, trained on from there: {results['ofq']['accuracy']:.1%} right, "
        f"{sizes['ofq'] / 1024:.0f} KiB packed",
        check=f"at most {levels} levels in a row of the packed weights; read back, the logits are off by {reread:.0e}; "
        f"in int8 arithmetic by {integers:.0e}",
        passed=levels <= 4 and reread == 0 and integers < 1e-4 and results["ofq"]["accuracy"] > untrained,
        numbers={
            "results": results,
            "accuracy_untrained": untrained,
            "bytes": sizes,
            "levels": levels,
            "logits_off_after_reload": reread,
            "logits_off_in_int8": integers,
        },
    )


def panel(axes: Any, outcome: Outcome) -> None:
    numbers = outcome.numbers
    for (name, label), colour in zip(RUNS.items(), ("0.6", "tab:blue"), strict=True):
        accuracies = [100 * accuracy for accuracy in numbers["results"][name]["accuracies"]]
        size = f"{numbers['bytes'][name] / 1024:.0f} KiB"
        axes.plot(range(1, len(accuracies) + 1), accuracies, color=colour, label=f"{label}, {size}")
    untrained = 100 * numbers["accuracy_untrained"]
    axes.axhline(untrained, color="0.6", linestyle=":", label="rounded to 2 bits without training")
    axes.set_title(f"OFQ: {TEST_IMAGES} digits, 2-bit weights and activations")
    axes.set_xlabel("epoch")
    axes.set_ylabel("test accuracy (%)")
    axes.legend()


def _trained(out: Path, run: str) -> nn.Module:
    weights = str(out / "runs" / run / "model.safetensors")
    return timm.create_model(MODELS[run], num_classes=10, checkpoint_path=weights, **SIZE).eval()


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(-1) == labels).float().mean().item()
