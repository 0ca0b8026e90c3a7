"""What is pushed to the hub and read from it again, by a hub in this process and the host's own offline cache.

Oracle of every artefact: the object that was pushed, value for value.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from bone_files import LLAMA, model_of
from bone_native import ROW_FORM
from fake_hub import Hub
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from importance_corpora import fitted, validation
from mcq_models import LETTERS, examples, tiny_model, word_tokenizer
from ofq_deployed import distance, full, quantized
from peft import BoneConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_ext import ImportanceWeights, bone_adapter, compat, mcq_bias, ofq_quantizer
from hf_ext.ofq_quantizer import OFQConfig, load_packed, quantize, save_packed

IDS = torch.arange(2, 12).reshape(2, 5)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub(monkeypatch)
    yield hub
    hub.clear()


@dataclass
class Artefact:
    """push(repo_id, ...), the files of it, and whether the names that the card's code leaves behind are its twin."""

    push: Callable[..., str]
    files: set[str]
    is_twin: Callable[[dict[str, Any]], bool]
    library: str
    base: str | None = None


def packed(kind: str) -> Artefact:
    model, x = quantized(kind)
    return Artefact(
        lambda *args, **kwargs: ofq_quantizer.push_to_hub(model, *args, **kwargs),
        {"config.json", "model.safetensors"},
        lambda names: distance(names["model"], model, x) == 0,
        "hf_ext",
    )


def weights() -> Artefact:
    iw = fitted()
    return Artefact(
        iw.push_to_hub,
        {"config.json", "importance.safetensors", "keys.arrow", "history.json"},
        lambda names: names["weights"].to_dict() == iw.to_dict(),
        "hf_ext",
    )


def from_the_hub(hub: Hub, model: Any, tmp_path: Path) -> Any:
    """The model as one that was read from "ann/base"."""
    model.save_pretrained(tmp_path / "base")
    hub.put("ann/base", {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()})
    return AutoModelForCausalLM.from_pretrained("ann/base").eval()


@torch.no_grad()
def same_logits(model: PeftModel, logits: torch.Tensor) -> bool:
    """With the adapter, and not without."""
    adapted = model.eval()(IDS).logits
    with model.disable_adapter():
        bare = model(IDS).logits
    return torch.allclose(adapted, logits, atol=1e-5) and not torch.allclose(bare, logits, atol=1e-2)


def anchored() -> Any:
    """Its first neuron is always on, and says A."""
    model, letter = tiny_model("gpt2", torch.float32), word_tokenizer().convert_tokens_to_ids(LETTERS[0])
    with torch.no_grad():
        block = model.transformer.h[1].mlp
        block.c_fc.weight[:, 0], block.c_fc.bias[0] = 0, 3
        block.c_proj.weight[0] = 5 * model.lm_head.weight[letter]
    return model


def repaired(model: Any) -> PeftModel:
    return mcq_bias.mitigate(model, word_tokenizer(), examples(20), strength=1.0, progress=False)


def mitigation(hub: Hub, tmp_path: Path) -> Artefact:
    pm = repaired(from_the_hub(hub, anchored(), tmp_path))
    logits = pm.eval()(IDS).logits.detach()
    return Artefact(
        lambda *args, **kwargs: mcq_bias.push_to_hub(pm, *args, **kwargs),
        {"adapter_config.json", "adapter_model.safetensors", "mcq_bias.json"},
        lambda names: same_logits(names["model"], logits),
        "peft",
        "ann/base",
    )


def with_bone(model: Any, adapter_name: str = "default") -> PeftModel:
    config = BoneConfig(r=8, target_modules=["q_proj", "down_proj"], init_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config, adapter_name)


def bone(hub: Hub, tmp_path: Path, adapter_name: str) -> Artefact:
    model = with_bone(from_the_hub(hub, model_of(LLAMA), tmp_path), adapter_name)
    logits = model.eval()(IDS).logits.detach()
    return Artefact(
        lambda *args, **kwargs: bone_adapter.push_to_hub(model, *args, **kwargs),
        {"adapter_config.json", "adapter_model.safetensors"},
        lambda names: same_logits(names["model"], logits),
        "peft",
        "ann/base",
    )


MAKE: dict[str, Callable[[Hub, Path], Artefact]] = {
    "packed_timm": lambda *_: packed("vit"),
    "packed_transformers": lambda *_: packed("hf_vit"),
    "weights": lambda *_: weights(),
    "mitigation": mitigation,
    "bone": lambda hub, tmp_path: bone(hub, tmp_path, "default"),
    "bone_of_another_name": lambda hub, tmp_path: bone(hub, tmp_path, "second"),
}


def code_of(card: Path) -> str:
    [code] = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    return code


@pytest.mark.parametrize("kind", MAKE)
def test_what_is_pushed_comes_back_by_the_command_on_its_card(kind, hub, tmp_path):
    artefact = MAKE[kind](hub, tmp_path)
    url = artefact.push("ann/it")
    assert url == "https://huggingface.co/ann/it/commit/1"
    [commit] = hub.commits
    assert commit["files"] == artefact.files | {"README.md"}
    assert commit["commit_message"].startswith("Upload ")
    assert (commit["revision"], commit["create_pr"]) == (None, False)
    assert hub.repos == {"ann/it": {"private": None, "token": None}}
    assert hub.branches == []

    card = ModelCard.load(hub.file("ann/it", "README.md"))
    assert (card.data.library_name, card.data.base_model, card.data.license) == (artefact.library, artefact.base, None)
    assert card.data.tags
    assert "arxiv.org/abs/" in card.text
    names: dict[str, Any] = {}
    exec(code_of(hub.file("ann/it", "README.md")), names)
    assert artefact.is_twin(names)


@pytest.mark.parametrize("kind", MAKE)
def test_options_reach_the_hub(kind, hub, tmp_path):
    artefact = MAKE[kind](hub, tmp_path)
    said = {"commit_message": "Third try", "revision": "next"}
    artefact.push("ann/it", **said, private=True, token="secret", create_pr=False)
    assert hub.repos == {"ann/it": {"private": True, "token": "secret"}}
    assert hub.branches == [("ann/it", "next")]
    artefact.push("ann/it", **said, create_pr=True)  # whoever may only propose may make no branch
    assert len(hub.branches) == 1
    told = [{name: commit[name] for name in (*said, "create_pr")} for commit in hub.commits]
    assert told == [said | {"create_pr": False}, said | {"create_pr": True}]


@pytest.mark.parametrize("form", [False, "bat", pytest.param("bat_row", marks=ROW_FORM)])
def test_card_of_an_adapter_of_a_model_of_ones_own(form, hub):
    config = BoneConfig(r=4, target_modules=["0"], init_weights=form)
    model, x = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), config), torch.ones(1, 8)
    block = next(parameter for name, parameter in model.named_parameters() if "bone_block" in name)
    block.data.uniform_(-1, 1)
    bone_adapter.push_to_hub(model, "ann/it")
    card, adapted = hub.file("ann/it", "README.md"), model(x)
    assert ("0.14 to 0.18" in card.read_text()) == (form != "bat_row")
    names = {"model": model.unload()}
    assert not torch.allclose(names["model"](x), adapted)
    exec(code_of(card), names)
    assert torch.allclose(names["model"](x), adapted)


@pytest.mark.smoke
def test_own_name_space_is_put_into_the_card(hub):
    fitted().push_to_hub("it")
    assert list(hub.repos) == ["ann/it"]
    assert 'from_pretrained("ann/it")' in code_of(hub.file("ann/it", "README.md"))


# --- nothing is uploaded


def broken_bone() -> PeftModel:
    model = with_bone(model_of(LLAMA))
    next(p for name, p in model.named_parameters() if "bone_block" in name).data[0, 0] = torch.nan
    return model


def lora() -> PeftModel:
    return get_peft_model(model_of(LLAMA), LoraConfig(r=2, target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("push", "error", "text"),
    [
        pytest.param(lambda: ImportanceWeights().push_to_hub("ann/it"), RuntimeError, "no weights yet", id="no_fit"),
        pytest.param(
            lambda: ofq_quantizer.push_to_hub(quantize(full("vit")[0], OFQConfig()), "ann/it"),
            ValueError,
            "calibrat",
            id="not_calibrated",
        ),
        pytest.param(lambda: mcq_bias.push_to_hub(lora(), "ann/it"), ValueError, "has no mcq_bias", id="no_mitigation"),
        pytest.param(lambda: bone_adapter.push_to_hub(broken_bone(), "ann/it"), ValueError, "NaN", id="broken_bone"),
        pytest.param(
            lambda: bone_adapter.push_to_hub(lora(), "ann/it"), ValueError, r"which has 'default' \(LORA\)", id="lora"
        ),
        pytest.param(
            lambda: bone_adapter.push_to_hub(with_bone(model_of(LLAMA), "first"), "ann/it", "frist"),
            ValueError,
            r"'frist' is no Bone adapter.*did you mean 'first'\?",
            id="misspelt",
        ),
        pytest.param(
            lambda: bone_adapter.push_to_hub(model_of(LLAMA), "ann/it"), ValueError, "LlamaForCausalLM", id="no_peft"
        ),
        pytest.param(lambda: fitted().push_to_hub("ann/it/out"), HFValidationError, "ann/it/out", id="no_id"),
    ],
)
def test_what_cannot_be_saved_leaves_the_hub_alone(push, error, text, hub):
    with pytest.raises(error, match=text):
        push()
    assert (hub.repos, hub.commits, hub.branches) == ({}, [], [])


def test_unknown_option_is_refused(hub):
    with pytest.raises(TypeError, match="privat"):
        fitted().push_to_hub("ann/it", privat=True)
    assert hub.repos == {}


# --- cards that are there


SAVE: dict[str, Callable[[Path], Any]] = {
    "packed": lambda folder: save_packed(quantized("vit")[0], folder),
    "weights": lambda folder: fitted().save_pretrained(folder),
    "mitigation": lambda folder: mcq_bias.save_mitigation(repaired(anchored()), folder),
}


@pytest.mark.parametrize("kind", SAVE)
def test_card_of_somebody_stays_in_a_folder_and_ours_is_written_anew(kind, tmp_path):
    card = tmp_path / "README.md"
    SAVE[kind](tmp_path)
    first = card.read_text()
    assert compat.HERE in code_of(card)
    SAVE[kind](tmp_path)
    assert card.read_text() == first
    card.write_text(first.replace("# ", "# My ", 1))
    SAVE[kind](tmp_path)
    assert "# My " in card.read_text()


def test_mitigation_of_a_model_that_is_not_on_the_hub_names_no_path(tmp_path):
    anchored().save_pretrained(tmp_path / "mine")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mine")
    mcq_bias.save_mitigation(repaired(model), tmp_path / "repair")
    text = (tmp_path / "repair" / "README.md").read_text()
    assert str(tmp_path) not in text
    assert "PATH_OF_THE_BASE_MODEL" in text


def test_numbers_on_the_card_are_those_of_the_last_push(hub):
    iw = fitted()
    iw.push_to_hub("ann/it")
    card = hub.file("ann/it", "README.md")
    assert "not tuned" in card.read_text()
    assert f"| {iw.value:.4f} |" in card.read_text()
    iw.tune_threshold(validation(6))
    iw.push_to_hub("ann/it")
    assert "not tuned" not in card.read_text()


@pytest.mark.parametrize("edited", [False, True], ids=["own", "edited"])
def test_card_of_somebody_stays_on_the_hub_with_new_files_beside_it(edited, hub):
    iw = fitted()
    mine = "---\nlicense: mit\n---\nmine"
    if edited:
        iw.push_to_hub("ann/it")
        mine = hub.file("ann/it", "README.md").read_text().replace("# ", "# My ", 1)
    hub.put("ann/it", {"README.md": mine.encode()})
    iw.push_to_hub("ann/it")
    assert "README.md" not in hub.commits[-1]["files"]
    assert hub.file("ann/it", "README.md").read_text() == mine
    assert ImportanceWeights.from_pretrained("ann/it").to_dict() == iw.to_dict()


def test_card_of_somebody_on_another_branch_is_not_meant(hub):
    hub.put("ann/it", {"README.md": b"mine"})
    fitted().push_to_hub("ann/it", revision="next")
    assert "README.md" in hub.commits[0]["files"]


# --- loading


LOAD = {
    "packed": load_packed,
    "weights": ImportanceWeights.from_pretrained,
    "mitigation": lambda source, **options: mcq_bias.load_mitigation(anchored(), source, **options),
}
OURS = {
    "packed": ["config.json", "model.safetensors"],
    "weights": ["config.json", "importance.safetensors", "keys.arrow", "history.json"],
    "mitigation": ["mcq_bias.json", "adapter_config.json", "adapter_model.safetensors"],
}


@pytest.mark.parametrize("kind", LOAD)
def test_what_the_host_is_asked_for(kind, monkeypatch, tmp_path):
    SAVE[kind](tmp_path)
    asked = []

    def download(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    options = {"revision": "v1", "token": "secret", "cache_dir": "elsewhere", "local_files_only": True}
    LOAD[kind]("ann/it", **options)
    assert asked == [("ann/it", options | {"allow_patterns": OURS[kind]})]


@pytest.mark.parametrize("kind", LOAD)
def test_neither_a_folder_nor_an_id(kind, tmp_path):
    for source in ("pakced", tmp_path / "ann" / "it", str(tmp_path / "it"), "ann/it/out", "../it"):
        with pytest.raises(FileNotFoundError, match="is no folder here, and no id of the hub"):
            LOAD[kind](source)


@pytest.mark.parametrize("kind", LOAD)
def test_id_that_cannot_be_had(kind, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"ann/nowhere is no folder here.*HF_HUB_OFFLINE"):
        LOAD[kind]("ann/nowhere")

    def refuse(*_: Any, **__: Any) -> None:
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError, "401")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match=r"ann/it at revision v1 is no folder here, and cannot be had"):
        LOAD[kind]("ann/it", revision="v1")


def test_a_folder_goes_before_an_id_and_has_no_revisions(hub, monkeypatch, tmp_path):
    on_hub, here = fitted(), fitted(method="mean")
    on_hub.push_to_hub("ann/it")
    here.save_pretrained(tmp_path / "ann" / "it")
    monkeypatch.chdir(tmp_path)
    assert ImportanceWeights.from_pretrained("ann/it").to_dict() == here.to_dict()
    with pytest.raises(ValueError, match="ann/it is a folder here, and revision='v1'"):
        ImportanceWeights.from_pretrained("ann/it", revision="v1")


def test_revisions_are_told_apart(hub):
    main, other = fitted(), fitted(method="mean")
    main.push_to_hub("ann/it")
    other.push_to_hub("ann/it", revision="next")
    assert ImportanceWeights.from_pretrained("ann/it").to_dict() == main.to_dict()
    assert ImportanceWeights.from_pretrained("ann/it", revision="next").to_dict() == other.to_dict()


def test_repository_of_something_else(hub):
    hub.put("ann/it", {"config.json": b'{"model_type": "gpt2"}'})
    with pytest.raises(ValueError, match="was not written by save_packed"):
        load_packed("ann/it")
