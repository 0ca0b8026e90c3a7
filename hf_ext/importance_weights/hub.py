"""Folders of fitted weights, here and on the hub, and the card in them."""

from pathlib import Path
from typing import Self

from hf_ext import compat
from hf_ext.importance_weights import saving
from hf_ext.importance_weights.config import ImportanceConfig

CARD = """{head}
# Importance weights of {number:,} {things}

How much each helps the answers of a model that reads the {k} best retrieved documents, fitted on a validation set after
[arXiv 2307.03027](https://arxiv.org/abs/2307.03027). Where hf_ext is installed, this reads them:

```python
from hf_ext import ImportanceWeights

weights = ImportanceWeights.from_pretrained("{here}")
```

`corpus.map(weights, batched=True)` looks up what a corpus has in `{key_column}`, and adds the column `{output_column}`.

| | |
|---|---|
| method | {method} |
| slots of the validation set | {slots:,} |
| smallest, mean and largest weight | {low:.4f}, {mean:.4f}, {high:.4f} |
| expected utility on the validation set | {value:.4f} |
| threshold for `weights.prune(corpus)` | {threshold} |

A weight says what helps beside the other documents of the same lists. It is no calibrated quality.
"""


class SavedWeights:
    """What `ImportanceWeights` has of the hub: save_pretrained, push_to_hub, from_pretrained."""

    config: ImportanceConfig
    _state: "saving.State | None"
    _fitted: "saving.State"

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json, importance.safetensors, keys.arrow and history.json into a folder.

        And README.md, a card, unless somebody's own is there.

        Raises:
            RuntimeError: there is no fit yet. ValueError: the folder has a config.json of something else.
        """
        directory, state = Path(directory), self._fitted
        saving.write(directory, self.config, state)
        if compat.may_write_card(directory):
            compat.write_card(directory, _card(self.config, state))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload importance weights",
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload what `save_pretrained` writes; `from_pretrained(repo_id)` reads it.

        Args:
            repo_id: "user/name"; made where it is missing. A card that it has stays, unless it is an unedited one of
                ours.
            commit_message: of the one commit.
            private: of a repository that is made now; None: public, unless its organisation has another default.
            token: None: the stored one.
            revision: branch to write to, made where it is missing.
            create_pr: propose the commit as a pull request.

        Returns:
            The URL of the commit.

        Raises:
            RuntimeError: there is no fit yet. ValueError: `repo_id` is no id.
        """
        return compat.push_folder(
            self.save_pretrained,
            repo_id,
            commit_message=commit_message,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: bool | str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Read what `save_pretrained` wrote.

        Args:
            source: a folder, or a repository "user/name" of the hub.
            revision, token, cache_dir, local_files_only: of the repository, as in `from_pretrained` of transformers.

        Raises:
            OSError: no such folder or repository, or without config.json. ValueError: of a newer format, or damaged.
        """
        folder = compat.folder_of(
            source,
            (saving.CONFIG, saving.WEIGHTS, saving.KEYS, saving.HISTORY),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        config, state = saving.read(folder)
        weights = cls(**config.to_dict())
        weights._state = state
        return weights


def _card(config: ImportanceConfig, state: saving.State) -> str:
    weights = state.weights
    return CARD.format(
        head=compat.front_matter("hf_ext", ["data-importance", "retrieval-augmented-generation"]),
        number=len(weights),
        things="documents" if config.group_column is None else f"groups, by `{config.group_column}`",
        k=config.k,
        here=compat.HERE,
        key_column=config.key_column,
        output_column=config.output_column,
        method=f"{config.method}, {len(state.history)} epochs" if state.history else config.method,
        slots=int(state.counts.sum()),
        low=weights.min(),
        mean=weights.mean(),
        high=weights.max(),
        value=state.value,
        threshold="not tuned" if state.threshold is None else f"{state.threshold:.4f}",
    )
