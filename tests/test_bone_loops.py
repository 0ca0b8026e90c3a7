"""Bone in other people's training loops, loaders and generation, with nothing of ours in them but the config."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from anchor_models import VOCABULARY, build, config_of
from anchor_oracle import assert_equal
from bone_native import ROW_FORM, TWO_FORMS, by_form, ours_only
from peft import AutoPeftModelForCausalLM, BoneConfig, PeftModel, PeftModelForCausalLM, get_peft_model
from processes import answer, run_python
from safetensors.torch import load_file
from sixty_words import TEXTS
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    T5Config,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.generation import CompileConfig

from hf_ext import compat

FORMS = {"tile": False, "bat": "bat", "bat_row": "bat_row"}
TARGETS = ["q_proj", "v_proj", "down_proj"]
R = 8
_DRAW = torch.Generator().manual_seed(0)
_IDS = torch.randint(3, VOCABULARY, (24, 9), generator=_DRAW).tolist()
# Nothing predicts the first token, and the Trainer of transformers 4 divides by all that have a label.
ROWS = [{"input_ids": row, "labels": [-100, *row[1:]]} for row in _IDS]
NAMES = ["bat", "__base__", "tile", "bat", "bat_row", "tile"]  # of rows in a mixed batch
IDS = torch.tensor([row["input_ids"] for row in ROWS[: len(NAMES)]])
SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def base(dtype: torch.dtype = torch.float32) -> Any:
    return build(config_of("llama", num_hidden_layers=2), "sdpa", dtype)


def config(form: str, **others: Any) -> BoneConfig:
    others = {"target_modules": TARGETS, "task_type": "CAUSAL_LM", **others}
    return BoneConfig(r=R, init_weights=FORMS[form], **others)


def randomise(model: Any, seed: int = 0) -> Any:
    """Every block, so that no adapter is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in blocks_of(model).values():
            block.copy_(0.2 * torch.randn(block.shape, generator=generator, dtype=torch.float64))
    return model


def adapted(form: str, dtype: torch.dtype = torch.float32) -> Any:
    return randomise(get_peft_model(base(dtype), config(form)))


def blocks_of(model: Any) -> dict[str, Tensor]:
    """By the names of the base model's own layers."""
    found = {name: x for name, x in model.named_parameters() if ".bone_block." in name}
    return {name.removeprefix("base_model.model."): x for name, x in found.items()}


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in tensors.items()}


def logits(model: Any, **batch: Any) -> Tensor:
    with torch.no_grad():
        return model(**{"input_ids": IDS, **batch}).logits


# ---------------------------------------------------------------- stock models with the weights written out


def updated(form: str, weight: Tensor, block: Tensor) -> Tensor:
    """W' (out, in)."""
    if form == "tile":
        return weight + block.T.repeat(1, -(-weight.shape[1] // len(block)))[:, : weight.shape[1]]
    blocks = weight.unflatten(1, (-1, R)).unflatten(0, (-1, R))  # [out-block, row, in-block, column]
    if form == "bat":
        new = blocks + torch.einsum("iajb,ibc->iajc", blocks, block) + block[:, :, None]
    else:
        new = blocks + torch.einsum("iajb,jbc->iajc", blocks, block) + block.transpose(0, 1)[None]
    return new.flatten(0, 1).flatten(1)


def stock_logits(form: str, stock: Any, blocks: dict[str, Tensor], bf16: bool = False, **batch: Any) -> Tensor:
    weights = dict(stock.named_parameters())
    for name, block in blocks.items():
        weight = f"{name.partition('.bone_block')[0]}.weight"
        weights[weight] = updated(form, weights[weight], block)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):  # the weights themselves are formed in float32
        return functional_call(stock, weights, kwargs={**batch, "use_cache": False}).logits


def replayed(
    form: str, start: dict[str, Tensor], batches: list[Any], rate: float = 1e-2, bf16: bool = False
) -> dict[str, Tensor]:
    """The blocks after a step of SGD on each batch."""
    stock = base().train()
    blocks = {name: x.clone().requires_grad_() for name, x in start.items()}
    for batch in batches:
        labels = batch["labels"][:, 1:].flatten()
        given = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        out = stock_logits(form, stock, blocks, bf16, **given).float()
        loss = F.cross_entropy(out[:, :-1].flatten(0, 1), labels)
        gradients = torch.autograd.grad(loss, list(blocks.values()))
        with torch.no_grad():
            for block, gradient in zip(blocks.values(), gradients, strict=True):
                block -= rate * gradient
    return copied(blocks)


def assert_same_training(
    form: str, start: dict[str, Tensor], end: dict[str, Tensor], batches: list[Any], tolerance: float, **how: Any
) -> None:
    """What training changed, not what it left."""
    expected = replayed(form, start, batches, **how)
    assert_equal(
        {name: end[name] - start[name] for name in start},
        {name: expected[name] - start[name] for name in start},
        tolerance,
    )


# ---------------------------------------------------------------- the Trainer


def arguments(folder: Path, **others: Any) -> TrainingArguments:
    usual = {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-2, "use_cpu": True, "bf16": False}
    quiet = {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    return TrainingArguments(output_dir=str(folder), **{**usual, **quiet, **others})


class Recorded:
    """A collator that keeps its batches."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []

    def __call__(self, examples: list[Any]) -> dict[str, Tensor]:
        self.batches.append(default_data_collator(examples))
        return self.batches[-1]


def checkpointing(use_reentrant):
    """The options of the Trainer, by the name that this version does not complain of."""
    old, new = "gradient_checkpointing", "activation_checkpointing"
    name = new if hasattr(TrainingArguments, new) else old
    return {name: True, f"{name}_kwargs": {"use_reentrant": use_reentrant}}


def require_input_gradients(model: Any) -> None:
    """Without them reentrant checkpointing has no gradients. transformers 5 sees to it; before, every user had to."""
    frozen = base().requires_grad_(False)
    compat.enable_checkpointing(frozen, use_reentrant=True)
    if not frozen.get_input_embeddings()(IDS).requires_grad:
        model.enable_input_require_grads()


@pytest.mark.parametrize("form", by_form(FORMS))
@pytest.mark.parametrize(
    "options, tolerance",
    [
        ({}, 1e-4),
        (checkpointing(use_reentrant=False), 1e-4),
        (checkpointing(use_reentrant=True), 1e-4),
        ({"bf16": True}, 5e-2),
    ],
    ids=["plain", "checkpointing", "reentrant", "bf16"],
)
def test_trainer_takes_the_steps_of_a_stock_model(tmp_path, form, options, tolerance):
    model, collator = adapted(form), Recorded()
    start = copied(blocks_of(model))
    args = arguments(tmp_path, **SGD, **options)
    if options == checkpointing(use_reentrant=True):
        require_input_gradients(model)
    Trainer(model, args, collator, ROWS).train()
    bf16 = options.get("bf16", False)
    assert_same_training(form, start, copied(blocks_of(model)), collator.batches[:3], tolerance, bf16=bf16)


@pytest.mark.smoke
@pytest.mark.parametrize("form", by_form(FORMS))
def test_trainer_resumes_to_the_bit(tmp_path, form):
    model, args = adapted(form), arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    Trainer(model, args, train_dataset=ROWS).train()
    again = get_peft_model(base(), config(form))
    Trainer(again, args, train_dataset=ROWS).train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert_equal(copied(blocks_of(again)), copied(blocks_of(model)), 0)
    middle = load_file(tmp_path / "checkpoint-2/adapter_model.safetensors")
    assert all(
        not torch.equal(x, middle[f"base_model.model.{name}".removesuffix(".default")])
        for name, x in blocks_of(model).items()
    )


@pytest.mark.parametrize("form", by_form(FORMS))
def test_trainer_returns_to_the_best_model(tmp_path, form):
    """The best is called the one with the largest loss: the first."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, **best)
    model = adapted(form)
    trainer = Trainer(model, args, train_dataset=ROWS, eval_dataset=ROWS[:4])
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    first, last = (load_file(tmp_path / f"checkpoint-{i}/adapter_model.safetensors") for i in (1, 3))
    for name, block in blocks_of(model).items():
        key = f"base_model.model.{name}".removesuffix(".default")
        assert torch.equal(block, first[key])
        assert not torch.equal(block, last[key])


# ---------------------------------------------------------------- accelerate


@pytest.mark.parametrize("form", by_form(FORMS))
def test_accelerate_loop_and_its_saved_state(tmp_path, form):
    model = adapted(form).train()
    start = copied(blocks_of(model))
    optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=0.1)
    rows = [{name: torch.tensor(x) for name, x in row.items()} for row in ROWS]
    # Whatever precision a Trainer before left there, and in the environment.
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows, batch_size=4))

    def train(batches: list[Any]) -> dict[str, Tensor]:
        for batch in batches:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        return copied(blocks_of(accelerator.unwrap_model(model)))

    batches = list(loader)
    train(batches[:3])
    accelerator.save_state(tmp_path / "state")
    end = train(batches[3:])
    assert_same_training(form, start, end, batches, 1e-4, rate=0.1)
    accelerator.load_state(tmp_path / "state")
    assert_equal(train(batches[3:]), end, 0)
    accelerator.unwrap_model(model).save_pretrained(tmp_path, state_dict=accelerator.get_state_dict(model))
    assert_equal(logits(PeftModel.from_pretrained(base(), tmp_path)), logits(model.eval()), 0)


# ---------------------------------------------------------------- TRL

SFT = """
    import torch
    from datasets import Dataset
    from peft import BoneConfig, PeftConfig
    from trl import SFTConfig, SFTTrainer

    blocks = lambda: {{name.removeprefix("base_model.model."): x.detach().clone()
                      for name, x in trainer.model.named_parameters() if x.requires_grad}}

    for name, peft_config in {{
        "made": BoneConfig(r=8, init_weights=False, target_modules={targets!r}, task_type="CAUSAL_LM"),
        "read": PeftConfig.from_pretrained("config"),
    }}.items():
        torch.manual_seed(0)
        args = SFTConfig(
            output_dir=name, per_device_train_batch_size=4, max_steps=3, learning_rate=1e-2,
            report_to=[], save_strategy="no", logging_strategy="no", use_cpu=True, bf16=False, optim="sgd",
            lr_scheduler_type="constant", max_grad_norm=0.0, max_length=24,
        )
        trainer = SFTTrainer(
            model="base", args=args, train_dataset=Dataset.from_dict({{"text": {texts!r}}}),
            peft_config=peft_config,
        )
        batches, collator = [], trainer.data_collator
        trainer.data_collator = lambda examples: batches.append(collator(examples)) or batches[-1]
        start = blocks()
        trainer.train()
        trainer.save_model()
        torch.save((start, blocks(), [dict(batch) for batch in batches[:3]]), f"{{name}}.pt")
"""


def test_trl_in_a_process_that_never_heard_of_us(tmp_path, tokenizer):
    pytest.importorskip("trl")
    stock = base()
    stock.config.eos_token_id = 2
    stock.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "config").mkdir()
    entries = {"peft_type": "BONE", "r": R, "init_weights": "bat", "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    (tmp_path / "config/adapter_config.json").write_text(json.dumps(entries))
    done = run_python(SFT.format(texts=TEXTS, targets=TARGETS), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name, form in {"made": "tile", "read": "bat"}.items():
        start, end, batches = torch.load(tmp_path / f"{name}.pt")
        assert len(start) == 6
        assert_same_training(form, start, end, batches, 1e-4)
        loaded = PeftModel.from_pretrained(base(), tmp_path / name)
        assert_equal(copied(blocks_of(loaded)), end, 0)


# ---------------------------------------------------------------- transformers' own adapters

HOST = """
    import copy, torch
    from transformers import AutoModelForCausalLM, pipeline

    ids = torch.load("ids.pt")

    def logits(model):
        with torch.no_grad():
            return model.eval()(input_ids=ids).logits

    seen = {}
    for form in FORMS:
        seen[f"{form} from_pretrained"] = logits(AutoModelForCausalLM.from_pretrained(form))
        model = AutoModelForCausalLM.from_pretrained("base")
        model.load_adapter(form, adapter_name="first")
        seen[f"{form} load_adapter"] = logits(model)
        model.disable_adapters()
        seen["base disabled"] = logits(model)
        model.enable_adapters()
        seen[f"{form} enabled"] = logits(model)

        from peft import BoneConfig
        other = BoneConfig(r=4, init_weights=False, target_modules=["q_proj", "k_proj", "up_proj"])
        model.add_adapter(other, adapter_name="second")
        blocks = {n.removesuffix(".second"): x for n, x in model.named_parameters() if n.endswith(".second")}
        seen[f"second {form}"] = logits(model), {n: x.detach().clone() for n, x in blocks.items()}
        assert model.active_adapters() == ["second"]
        model.set_adapter("first")
        seen[f"{form} set_adapter"] = logits(model)
        model.delete_adapter("second")
        seen[f"{form} after the other is deleted"] = logits(model)
        model.delete_adapter("first")
        seen["base deleted"] = logits(model)

        tokens = pipeline("text-generation", model=form)("w1 w2 w3", max_new_tokens=4, do_sample=False,
                                                         return_tensors=True)
        seen[f"{form} pipeline"] = tokens[0]["generated_token_ids"]
    torch.save(seen, "seen.pt")
"""


@TWO_FORMS
@pytest.mark.smoke
def test_transformers_loads_and_switches_adapters_in_a_process_that_never_heard_of_us(tmp_path, tokenizer):
    base().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    torch.save(IDS, tmp_path / "ids.pt")
    for form in FORMS:
        model = randomise(get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config(form)))
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(tmp_path / form)
        tokenizer.save_pretrained(tmp_path / form)
    done = run_python(f"FORMS = {[*FORMS]}\n" + dedent(HOST), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    seen = torch.load(tmp_path / "seen.pt", weights_only=False)
    stock = base()
    expected = {"base": logits(stock)}
    for form in FORMS:
        ours = PeftModel.from_pretrained(base(), tmp_path / form)
        expected[form] = logits(ours)
        assert_equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / form)), expected[form], 0)
        prompt = tokenizer("w1 w2 w3", return_tensors="pt").input_ids
        tokens = ours.generate(input_ids=prompt, max_new_tokens=4, do_sample=False)[0].tolist()
        assert seen.pop(f"{form} pipeline") == tokens
        got, blocks = seen.pop(f"second {form}")
        assert_equal(got, stock_logits("tile", stock, blocks, input_ids=IDS), 1e-5)
    assert len(seen) == 2 + 5 * len(FORMS)
    for what, got in seen.items():
        assert torch.equal(got, expected[what.partition(" ")[0]]), what


# ---------------------------------------------------------------- copies


def test_deep_copies_stand_alone():
    model = adapted("bat")
    twin, settings = copy.deepcopy(model), copy.deepcopy(model.peft_config["default"])
    assert settings == model.peft_config["default"]
    assert settings.peft_type is model.peft_config["default"].peft_type
    expected = logits(model)
    randomise(model, 1)
    assert_equal(logits(twin), expected, 0)
    assert not torch.equal(logits(model), expected)


UNPICKLING = """
    import pickle
    with open("config.pkl", "rb") as file:
        config = pickle.load(file)
    with open("model.pkl", "rb") as file:
        model = pickle.load(file)
    import torch
    from peft import BoneConfig, BoneModel, PeftType
    assert type(config) is BoneConfig and config.peft_type is PeftType("BONE") is PeftType.BONE
    assert model.peft_config["default"] == config and type(model.base_model) is BoneModel
    with torch.no_grad():
        torch.save(model(input_ids=torch.load("ids.pt")).logits, "logits.pt")
"""


@pytest.mark.smoke
def test_pickles_open_in_a_process_that_imported_nothing(tmp_path):
    model = adapted("bat").eval()
    for name, what in {"config": model.peft_config["default"], "model": model}.items():
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(what))
    torch.save(IDS, tmp_path / "ids.pt")
    done = run_python(UNPICKLING, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_equal(torch.load(tmp_path / "logits.pt"), logits(model), 0)


OFF = """
    import json, sys
    sys.modules["torchvision"] = None  # whose builds for other torches need us
    import peft
    try:
        peft.PeftConfig.from_pretrained(".")
    except KeyError as error:
        print(json.dumps([str(error), hasattr(peft, "BoneConfig"), "hf_ext" in sys.modules]))
"""


@ours_only("which needs nobody to be switched on")
@pytest.mark.smoke
def test_switched_off_the_host_fails_as_without_us(tmp_path):
    config("bat").save_pretrained(tmp_path)
    done = run_python(OFF, cwd=tmp_path, env={"HF_EXT_AUTOLOAD": "0"})
    assert answer(done) == ["'BONE'", False, False]


def test_lm_eval_scores_an_adapter_folder(tmp_path, tokenizer):
    lm_eval = pytest.importorskip("lm_eval.models.huggingface")
    base().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = adapted("bat").eval()
    model.save_pretrained(tmp_path / "adapter")
    harness = lm_eval.HFLM(pretrained=str(tmp_path / "base"), peft=str(tmp_path / "adapter"), device="cpu")
    size = len(tokenizer)  # to which lm-eval cuts the base model
    ids = IDS.clamp(max=size - 1)
    assert_equal(harness._model_call(ids), logits(model, input_ids=ids)[..., :size], 0)


# ---------------------------------------------------------------- torch.compile


def several(*forms: str, dtype: torch.dtype = torch.float64) -> Any:
    """One adapter of each form, called as it; all of them active."""
    model = get_peft_model(base(dtype), config(forms[0]), forms[0])
    for form in forms[1:]:
        model.add_adapter(form, config(form))
    model.base_model.set_adapter([*forms])
    return randomise(model)


@pytest.mark.parametrize(
    "forms",
    [
        ["tile"],
        ["bat"],
        pytest.param(["bat_row"], marks=ROW_FORM),
        pytest.param(["bat_row", "bat", "tile"], marks=TWO_FORMS),
    ],
    ids="-".join,
)
def test_one_graph_compiles_with_the_same_gradients(forms):
    torch._dynamo.reset()
    model = several(*forms)
    model.train()

    def step(forward: Callable[..., Any]) -> dict[str, Tensor]:
        model.zero_grad()
        out = forward(input_ids=IDS, labels=IDS, use_cache=False)
        out.loss.backward()
        return {"loss": out.loss.detach(), **{name: x.grad.clone() for name, x in blocks_of(model).items()}}

    expected = step(model)
    assert_equal(step(torch.compile(model, fullgraph=True, backend="aot_eager")), expected, 1e-6)


@pytest.mark.parametrize("form", by_form(FORMS))
def test_generation_with_a_static_cache_and_a_compiled_step(form):
    torch._dynamo.reset()
    model = adapted(form, torch.float64).eval()
    how = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(input_ids=IDS, **how)
    compiled = CompileConfig(fullgraph=True, backend="aot_eager")
    compiled._compile_all_devices = True
    torch._dynamo.utils.counters.clear()
    got = model.generate(input_ids=IDS, cache_implementation="static", compile_config=compiled, **how)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert torch.equal(got.sequences, expected.sequences)
    assert_equal(torch.stack(got.logits), torch.stack(expected.logits), 1e-6)


# ---------------------------------------------------------------- mixed batches

SEARCHES = {"greedy": {}, "beams": {"num_beams": 3}}
MIXED_BATCHES = ours_only("whose layers take one adapter for all rows, and no two forms")


def single(model: Any, name: str, **inputs: Any) -> Tensor:
    how = {"do_sample": False, "max_new_tokens": 6, **inputs}
    if name == "__base__":
        with model.disable_adapter():
            return model.generate(**how)
    model.set_adapter(name)
    return model.generate(**how)


def assert_rows_are_single_runs(model: Any, ids: Tensor, search: dict[str, Any]) -> None:
    rows = [single(model, name, input_ids=ids[i : i + 1], **search) for i, name in enumerate(NAMES)]
    alike = [single(model, "__base__", input_ids=ids[i : i + 1], **search) for i in range(len(NAMES))]
    assert sum(torch.equal(one, other) for one, other in zip(rows, alike, strict=True)) == 1, "an adapter does nothing"
    model.set_adapter("tile")
    got = model.generate(input_ids=ids, adapter_names=NAMES, do_sample=False, max_new_tokens=6, **search)
    for mixed, row in zip(got, rows, strict=True):
        assert mixed.tolist() == row[0].tolist()


def own_head(form: str, heads: list[str]) -> BoneConfig:
    return config(form, modules_to_save=["lm_head"] if form in heads else None)


@MIXED_BATCHES
@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
@pytest.mark.parametrize("heads", [[], ["bat"], ["tile", "bat", "bat_row"]], ids=["", "one_head", "own_heads"])
def test_rows_with_adapters_of_their_own(search, heads):
    model = PeftModelForCausalLM(base(torch.float64), own_head("tile", heads), "tile")
    for form in ("bat", "bat_row"):
        model.add_adapter(form, own_head(form, heads))
    randomise(model).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in heads:
            head = model.base_model.model.lm_head.modules_to_save[name].weight
            head.copy_(torch.randn(head.shape, generator=generator))
    assert_rows_are_single_runs(model, IDS, search)


@MIXED_BATCHES
@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_rows_of_an_encoder_decoder(search):
    shape = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 56, "num_layers": 2, "num_heads": 4}
    ends = {"pad_token_id": 0, "eos_token_id": None, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    stock = AutoModelForSeq2SeqLM.from_config(T5Config(**shape, **ends)).double().eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    targets = {"target_modules": ["q", "v", "wo"], "task_type": "SEQ_2_SEQ_LM"}
    model = get_peft_model(stock, config("tile", **targets), "tile")
    for form in ("bat", "bat_row"):
        model.add_adapter(form, config(form, **targets))
    assert_rows_are_single_runs(randomise(model).eval(), IDS, search)
