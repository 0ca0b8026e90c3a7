"""Folders of mitigations, here and on the hub: PEFT's own files, how the adapter came about, and the card."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from peft import PeftModel

from hf_ext import compat
from hf_ext.checks import read_object
from hf_ext.mcq_bias.letters import choice_index

FILE, ADAPTER = "mcq_bias.json", "adapter_model.safetensors"
_HASH = "adapter_sha256"  # in the file only: by which a record knows its adapter

CARD = """{head}
# A repair of a {kind} that preferred the answer {anchor}

A LoRA adapter of rank one that takes a preference for the letter {anchor} in multiple-choice questions out of a model,
fitted {labels} by `hf_ext.mcq_bias.mitigate`. The preference is that of
[arXiv 2405.03205](https://arxiv.org/abs/2405.03205). PEFT alone loads it:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "{here}")
```

| | |
|---|---|
| share of {anchor} among the answers, before | {share_before:.4f} |
| the same, after | {share_after:.4f} |
| the same, by chance | {target_share:.4f} |
| method | {method}, components={components}, strength {strength:.4g} |
| edited | {neurons} neurons, {heads} heads |
| questions | {questions} |

The shares are those on the questions of the fit; on others they differ. `mcq_bias.json` has the rest.
"""


def save_mitigation(pm: PeftModel, path: str | Path) -> None:
    """Write the adapter by `save_pretrained`, and `pm.mcq_bias` as `mcq_bias.json` into the same folder.

    With it goes the hash of the adapter's file, so that the record of one is never read with the adapter of another.

    And README.md, a card, unless somebody's own is there: into that PEFT writes what it always does.

    `load_mitigation(model, path)` loads it, and `PeftModel.from_pretrained` does without `mcq_bias`. A base model in
    float64 needs nothing more: PEFT brings the adapter to the precision of the base.

    Raises:
        ValueError: `pm` comes neither from `mitigate` nor from `load_mitigation`.
    """
    facts = facts_of(pm)
    if facts is None:
        raise ValueError(
            f"{type(pm).__name__} has no mcq_bias: save_mitigation takes what mitigate or load_mitigation returns"
        )
    folder = Path(path)
    ours = compat.may_write_card(folder)
    pm.save_pretrained(str(folder))
    record = facts | {_HASH: _hash_of(folder)}
    (folder / FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if ours:
        compat.write_card(folder, _card(pm, facts))


def load_mitigation(
    model: Any,
    path: str | Path,
    *,
    revision: str | None = None,
    token: bool | str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> PeftModel:
    """`PeftModel.from_pretrained(model, path)`, and `mcq_bias` with it: `mitigation_report` then knows what was fitted.

    Args:
        model: the base model, which PEFT wraps in place.
        path: a folder of `save_mitigation`, or a repository of `push_to_hub`.
        revision, token, cache_dir, local_files_only: of the repository, as in `from_pretrained` of transformers.

    Raises:
        OSError: there is no `mcq_bias.json`, no adapter, or no such repository.
        ValueError: that file is damaged, of something else, or of another adapter than the one beside it. In all these
            cases the model is as it was.
    """
    folder = compat.folder_of(
        path,
        (FILE, "adapter_config.json", ADAPTER),
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    file = folder / FILE
    facts = read_object(file, "save_mitigation")
    try:
        for name in ("edited", "edited_heads"):  # JSON knows no integers as keys
            facts[name] = {int(layer): indices for layer, indices in facts[name].items()}
        set(facts["fit_prompts"])
        choice_index("anchor", facts["anchor"])
        for name, kind in (("letter_prefix", str), ("prepend_bos", bool)):
            if not isinstance(facts[name], kind):
                raise TypeError(f"{name}={facts[name]!r} is no {kind.__name__}")
        recorded = facts.pop(_HASH)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{file} is damaged, or of something else: {error!r}") from None
    if recorded != _hash_of(folder):
        raise ValueError(
            f"{file} is the record of another adapter than the {ADAPTER} beside it, or that is damaged: the folder was "
            "written by half, or the adapter was changed since; PeftModel.from_pretrained takes it without the record"
        )
    pm = PeftModel.from_pretrained(model, str(folder))
    pm.mcq_bias = facts
    return pm


def push_to_hub(
    pm: PeftModel,
    repo_id: str,
    *,
    commit_message: str = "Upload mitigation",
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload what `save_mitigation` writes; `PeftModel.from_pretrained(model, repo_id)` loads it.

    Args:
        pm: what `mitigate` or `load_mitigation` returned.
        repo_id: "user/name"; made where it is missing. A card that it has stays, unless it is an unedited one of ours.
        commit_message: of the one commit.
        private: of a repository that is made now; None: public, unless its organisation has another default.
        token: None: the stored one.
        revision: branch to write to, made where it is missing.
        create_pr: propose the commit as a pull request.

    Returns:
        The URL of the commit.

    Raises:
        ValueError: as `save_mitigation` does, before anything is uploaded; or `repo_id` is no id.
    """
    return compat.push_folder(
        lambda folder: save_mitigation(pm, folder),
        repo_id,
        commit_message=commit_message,
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
    )


def prompt_hash(prompt: str) -> str:
    """By which a prompt is known again."""
    return sha256(prompt.encode()).hexdigest()[:16]


def facts_of(pm: PeftModel) -> dict | None:
    """`pm.mcq_bias`, of the wrapper itself and not of a model inside."""
    return vars(pm).get("mcq_bias")


def _hash_of(folder: Path) -> str:
    return sha256((folder / ADAPTER).read_bytes()).hexdigest()


def _card(pm: PeftModel, facts: dict) -> str:
    base = pm.get_base_model()
    source = base.config.name_or_path
    return CARD.format(
        **facts,
        head=compat.front_matter("peft", ["lora", "anchored-mcq-bias"], source),
        kind=type(base).__name__,
        labels="with labels" if facts["method"] == "paper" else "without labels",
        base=compat.known_model(source) or "PATH_OF_THE_BASE_MODEL",
        here=compat.HERE,
        neurons=sum(map(len, facts["edited"].values())),
        heads=sum(map(len, facts["edited_heads"].values())),
        questions=len(facts["fit_prompts"]),
    )
