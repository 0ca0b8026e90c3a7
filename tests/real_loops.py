"""Other people's loops, as their users run them: what they run on, and the proof that a name of ours was at work.

Those in this process share `arguments`, `parameters` and `replayed`. Those of a command line get a folder to work in;
the scripts that no package carries are looked for in the folder HF_EXT_LOOPS_DIR.
"""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from anchor_models import ANCHOR, build, config_of
from anchor_oracle import visible_segments
from processes import run, write
from sixty_words import TEXTS, WORDS
from transformers import TrainingArguments

LOSS = torch.nn.functional.cross_entropy

# --- in this process

DOCUMENTS = [[ANCHOR, *(4 + WORDS.index(word) for word in text.split())] for text in TEXTS]
QUIET = pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")
SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


def arguments(folder: Path, kind: Any = TrainingArguments, **others: Any) -> Any:
    return kind(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        **others,
    )


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in model.named_parameters()}


def replayed(batches: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The parameters after a step of SGD on each batch, with stock attention given the mask."""
    stock = build(config_of("llama"), "sdpa").train()
    optimizer = torch.optim.SGD(stock.parameters(), lr=1e-2)
    for batch in batches:
        ids, positions = batch["input_ids"], batch["position_ids"]
        mask = visible_segments(positions)[:, None]
        logits = stock(input_ids=ids, position_ids=positions, attention_mask=mask).logits.float()
        labels = batch.get("labels", ids.masked_fill(positions == 0, -100))
        LOSS(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters(stock)


# --- on a command line

# What the Trainer's scripts and TRL's take.
SHORT = {"max_steps": 3, "report_to": "none", "use_cpu": True, "bf16": False}

# Without hf_ext the index's torchvision cannot be imported beside a CPU build of torch, and every host would fail for
# that reason. Python executes this file when it starts.
_CURED = """
import torch

try:
    import torchvision
except RuntimeError:
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
except ImportError:
    pass
"""


def script(name: str) -> Path:
    """A script that its project keeps beside its package; without it the test is skipped."""
    folder = os.environ.get("HF_EXT_LOOPS_DIR")
    path = Path(folder or "/nowhere", name)
    if not path.is_file():
        pytest.skip(f"no package carries {name}: set HF_EXT_LOOPS_DIR to a folder with it")
    return path


def flags(**options: Any) -> list[str]:
    """`--name value`, and `--name` alone where the value is None."""
    return [str(word) for name, value in options.items() for word in (f"--{name}", value) if word is not None]


def start(folder: Path, *command: Any, **env: str) -> Any:
    """`python *command` in `folder`."""
    return run(*command, cwd=folder, env={"HF_EXT_DEBUG": "1"} | env, timeout=400)


def start_without_us(folder: Path, *command: Any) -> Any:
    """The same, with the switch off."""
    write(folder, {"without/sitecustomize.py": _CURED})
    paths = [str(folder / "without"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return start(folder, *command, HF_EXT_AUTOLOAD="0", PYTHONPATH=os.pathsep.join(paths))


def names_used(done: Any) -> list[str]:
    """By a process that succeeded: each name once for every process that executed it, sorted."""
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return sorted(re.findall(r"hf_ext: using (\S+) \(", done.stderr))


def assert_fails_for(done: Any, error: str) -> None:
    """Of the name itself, and not of what else may be missing."""
    assert done.returncode != 0
    assert error in done.stdout + done.stderr, done.stdout[-2000:] + done.stderr[-6000:]
    assert "hf_ext: using" not in done.stderr


def write_language_model(folder: Path, tokenizer: Any) -> Path:
    """A tiny Llama in float32, with its tokenizer."""
    build(config_of("llama", eos_token_id=2), "sdpa", torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
