"""Bone adapters on the hub: PEFT's own files, checked, and a card that says who reads them."""

from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory

from peft import PeftModel
from torch import nn

from hf_ext import compat
from hf_ext.bone_adapter.check import CheckpointReport, check_checkpoint
from hf_ext.checks import did_you_mean

CARD = """{head}
# A Bone adapter for {kind}

{parameters:,} values in {tensors} blocks of size {r} ({form} form), after
[arXiv 2409.15371](https://arxiv.org/abs/2409.15371). {readers}:

```python
from peft import PeftModel
{load}
model = PeftModel.from_pretrained(model, "{here}")
```
"""

LOAD = """from transformers import {kind}

model = {kind}.from_pretrained("{base}")"""
READERS = "PEFT from 0.14 to 0.18 loads it alone, later ones where hf_ext is installed"
READERS_OF_ROWS = "PEFT from 0.19 on loads it where hf_ext is installed; earlier ones do not know this form"
NO_LOAD = """
# model: the one that the adapter was trained on"""


def push_to_hub(
    model: PeftModel,
    repo_id: str,
    adapter_name: str | None = None,
    *,
    commit_message: str = "Upload Bone adapter",
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Check a Bone adapter and upload it to the hub with a card; `PeftModel.from_pretrained(model, repo_id)` loads it.

    PEFT's own `model.push_to_hub` uploads all adapters of the model, unchecked, under a card without content.

    Args:
        model: with the adapter.
        repo_id: "user/name"; made where it is missing. A card that it has stays, unless it is an unedited one of ours.
        adapter_name: which of several; the active one by default. It goes into the root of the repository.
        commit_message: of the one commit.
        private: of a repository that is made now; None: public, unless its organisation has another default.
        token: None: the stored one.
        revision: branch to write to, made where it is missing.
        create_pr: propose the commit as a pull request.

    Returns:
        The URL of the commit.

    Raises:
        ValueError: no Bone adapter of this name, or one that `check_checkpoint` finds broken, before anything is
            uploaded; or `repo_id` is no id.
    """
    name = _bone_adapter(model, adapter_name)
    return compat.push_folder(
        lambda folder: _write(model, name, folder),
        repo_id,
        commit_message=commit_message,
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
    )


def _bone_adapter(model: PeftModel, name: str | None) -> str:
    """Which adapter is meant."""
    if not isinstance(model, PeftModel):
        raise ValueError(f"found a {type(model).__name__}, expected a PeftModel with a Bone adapter")
    name = model.active_adapter if name is None else name
    there = {key: config.peft_type.value for key, config in model.peft_config.items()}
    if there.get(name) != "BONE":
        kinds = ", ".join(f"{key!r} ({kind})" for key, kind in there.items())
        hint = did_you_mean(name, there.keys() - {name})
        raise ValueError(f"adapter_name={name!r} is no Bone adapter of this model, which has {kinds}{hint}")
    return name


def _write(model: PeftModel, name: str, folder: Path) -> None:
    with TemporaryDirectory() as saved:
        model.save_pretrained(saved, selected_adapters=[name])
        own = Path(saved) if name == "default" else Path(saved, name)  # where PEFT puts it
        report = check_checkpoint(own)
        copytree(own, folder, dirs_exist_ok=True)
    compat.write_card(folder, _card(model.get_base_model(), report))


def _card(base: nn.Module, report: CheckpointReport) -> str:
    of_transformers = type(base).__module__.startswith("transformers.")
    kind, source = type(base).__name__, base.config.name_or_path if of_transformers else None
    known = compat.known_model(source) or "PATH_OF_THE_BASE_MODEL"
    return CARD.format(
        head=compat.front_matter("peft", ["bone"], source),
        kind=kind,
        parameters=report.parameters,
        tensors=report.tensors,
        r=report.r,
        form=report.form,
        readers=READERS_OF_ROWS if report.form == "bat_row" else READERS,
        load=LOAD.format(kind=kind, base=known) if of_transformers else NO_LOAD,
        here=compat.HERE,
    )
