"""Accelerate scripts under torchrun: two processes do what one does."""

import json
from pathlib import Path

import pytest
import torch
from anchor_models import ANCHOR, VOCABULARY
from datasets import Dataset
from importance_corpora import corpus, fitted, validation
from real_loops import assert_fails_for, names_used, start, start_without_us, write_language_model

from hf_ext import AnchorPacking, compat

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)


def of_ranks(folder: Path, count: int) -> list:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(count)]


# ---------------------------------------------------------------- every string in one script

SCRIPT = """
import json
from pkgutil import resolve_name

import evaluate
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from datasets import load_from_disk
from peft import PeftConfig, get_peft_model
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

LETTERS = [10, 11, 12, 13]
accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
set_seed(0)


def loader(name, **options):
    return accelerator.prepare(DataLoader(load_from_disk(name).with_format("torch"), batch_size=4, **options))


def train(model, name, loss_of):
    optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for batch in loader(name):
        loss = loss_of(model, batch)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    return accelerator.unwrap_model(model), losses


found = {"processes": accelerator.num_processes}

model = AutoModelForCausalLM.from_pretrained("model", attn_implementation="anchor")
model = get_peft_model(model, PeftConfig.from_pretrained("config"))
model, found["language"] = train(model, "rows", lambda model, batch: model(**batch).loss)

metric = evaluate.load("anchored_mcq_bias", experiment_id=str(accelerator.process_index))
for batch in loader("questions"):
    with torch.no_grad():
        scores = model(input_ids=batch["input_ids"]).logits[:, -1, LETTERS]
    scores, labels = accelerator.gather_for_metrics((scores, batch["label"]))
    metric.add_batch(predictions=scores, references=labels)
found["bias"] = metric.compute()

sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 4}
vision = timm.create_model("ofq_w2a2.vit_tiny_patch16_224", **sizes)
by_label = lambda model, batch: cross_entropy(model(batch["pixel_values"]), batch["label"])
vision, found["vision"] = train(vision, "images", by_label)

weights = resolve_name("hf_ext.importance_weights:ImportanceWeights")(k=3, epochs=5)
weights.fit(load_from_disk("validation"), accelerator)
with accelerator.main_process_first():
    weighed = load_from_disk("corpus").map(weights, batched=True)
found["importance"] = weighed["importance"][:]

found["classes"] = sorted({type(layer).__name__ for part in (model, vision) for layer in part.modules()})
if accelerator.is_main_process:
    model.save_pretrained(f"adapter of {accelerator.num_processes}")
with open(f"rank{accelerator.process_index}.json", "w") as file:
    json.dump(found, file)
"""
BONE = {"peft_type": "BONE", "r": 8, "init_weights": "bat", "target_modules": ["q_proj", "down_proj"]}
NAMES = ["BONE", "anchor", "anchored_mcq_bias", "importance_weights", "ofq_w2a2"]
if compat.has_native_bone():
    NAMES.remove("BONE")  # PEFT's own, which announces nothing


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """Every row has two documents of one length: a mean over rows is a mean over tokens."""
    path = tmp_path_factory.mktemp("ranks")
    write_language_model(path / "model", tokenizer)
    (path / "config").mkdir()
    (path / "config/adapter_config.json").write_text(json.dumps(BONE | {"task_type": "CAUSAL_LM"}))
    torch.manual_seed(3)
    documents = [[ANCHOR, *row] for row in torch.randint(4, VOCABULARY, (32, 7)).tolist()]
    rows = Dataset.from_dict({"input_ids": documents})
    rows = rows.map(AnchorPacking(16, ANCHOR), batched=True, remove_columns=["input_ids"])
    assert {row["labels"].count(-100) for row in rows} == {2}
    labels = [(3 * i + i // 4) % 4 for i in range(16)]
    data = {
        "rows": rows,
        "questions": Dataset.from_dict({"input_ids": documents[:16], "label": labels}),
        "images": Dataset.from_dict({"pixel_values": torch.randn(16, 3, 16, 16).tolist(), "label": labels}),
        "validation": Dataset.from_dict(validation()),
        "corpus": corpus(),
    }
    for name, table in data.items():
        table.save_to_disk(path / name)
    (path / "script.py").write_text(SCRIPT)
    return path


def test_every_string_in_one_script_in_one_process_and_in_two(folder):
    assert names_used(start(folder, "script.py")) == NAMES
    [alone] = of_ranks(folder, 1)
    assert names_used(start(folder, *TORCHRUN, "script.py")) == sorted(2 * NAMES)
    one, other = of_ranks(folder, 2)
    assert (alone["processes"], one["processes"]) == (1, 2)
    assert one == other
    assert one["language"] == pytest.approx(alone["language"], rel=1e-6)
    assert len({*one["language"]}) == 4
    assert one["bias"] == pytest.approx(alone["bias"], rel=1e-6, nan_ok=True)
    assert one["bias"]["n"] == 16
    # After it, steps differ: LSQ's gradient scale counts the images of one process.
    assert one["vision"][0] == pytest.approx(alone["vision"][0], rel=1e-6)
    assert one["importance"] == alone["importance"]
    assert {"BoneLinear", "QuantLinear", "QuantVitAttention"} <= {*one["classes"]}
    for name in ("adapter of 1", "adapter of 2"):
        assert json.loads((folder / name / "adapter_config.json").read_text())["peft_type"] == "BONE"


def test_every_string_in_one_script_without_us(folder):
    done = start_without_us(folder, "script.py")
    assert_fails_for(done, 'Specified `attn_implementation="anchor"` is not supported')


# ---------------------------------------------------------------- a corpus that is weighed and drawn from

WEIGHING = """
import json
from accelerate import Accelerator
from datasets import load_from_disk
from torch.utils.data import DataLoader
from hf_ext import ImportanceWeights

accelerator = Accelerator(cpu=True)
weights = ImportanceWeights(k=3, epochs=5).fit(load_from_disk("validation"), accelerator)
with accelerator.main_process_first():
    corpus = load_from_disk("corpus").map(weights, batched=True)
rows = corpus.select_columns(["number", "importance"]).with_format("torch")
loader = accelerator.prepare(DataLoader(rows, batch_size=4, sampler=weights.sampler(corpus, seed=7)))
drawn = [[batch["number"].tolist() for batch in loader] for _ in range(2)]
assert min(batch["importance"].min() for batch in loader) > 0
found = [accelerator.num_processes, weights.to_dict(), corpus["importance"][:], drawn]
with open(f"rank{accelerator.process_index}.json", "w") as file:
    json.dump(found, file)
accelerator.end_training()  # without it a process may abort on its way out
"""


def test_two_processes_weigh_a_corpus_and_draw_from_it(tmp_path):
    """The weights of one process, bit for bit, and its draws, every batch in one of the two."""
    Dataset.from_dict(validation()).save_to_disk(tmp_path / "validation")
    corpus().save_to_disk(tmp_path / "corpus")
    (tmp_path / "script.py").write_text(WEIGHING)
    done = start(tmp_path, *TORCHRUN, "script.py")
    assert names_used(done) == ["importance_weights"] * 2
    assert done.stderr.count("(k=3, method=multilinear") == 2

    alone = fitted(Dataset.from_dict(validation()))
    weighed = corpus().map(alone, batched=True)
    sampler = alone.sampler(weighed, seed=7)
    rows = [list(sampler) for _ in range(2)]
    batches = [[epoch[at : at + 4] for at in range(0, len(epoch), 4)] for epoch in rows]
    assert rows[0] != rows[1]
    for rank, (processes, weights, column, drawn) in enumerate(of_ranks(tmp_path, 2)):
        assert processes == 2
        assert weights == alone.to_dict()
        assert column == weighed["importance"][:]
        assert drawn == [epoch[rank::2] for epoch in batches]
