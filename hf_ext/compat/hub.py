"""The hub: folders fetched from it and pushed to it, and the cards in them."""

import re
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

CARD = "README.md"
HERE = "PATH_OF_THIS_FOLDER"  # where a card names its own place; a push puts the repository there
_SEAL = "<!-- hf_ext replaces this card with the files beside it, until somebody edits it"


def folder_of(
    source: str | Path,
    files: Sequence[str],
    *,
    revision: str | None = None,
    token: bool | str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """A folder as it is, or else the repository "user/name" of the hub, in the host's cache.

    Args:
        source: a folder, or the id of a repository.
        files: what is fetched of the repository; its other files are left there.
        revision: branch, tag or commit of the repository.
        token: for a private one; None is the stored token.
        cache_dir: in place of the host's.
        local_files_only: ask nobody, as HF_HUB_OFFLINE=1 does.

    Raises:
        FileNotFoundError: neither a folder nor a repository that can be read from here. ValueError: a revision of a
            folder.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise ValueError(f"{source} is a folder here, and revision={revision!r} is for repositories of the hub")
        return Path(source)
    if not isinstance(source, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise FileNotFoundError(f"{source} is no folder here, and no id of the hub, which would read 'user/name'")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        found = snapshot_download(
            source,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=list(files),
        )
    except (LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        wanted = source if revision is None else f"{source} at revision {revision}"
        raise FileNotFoundError(f"{wanted} is no folder here, and cannot be had from the hub: {error}") from error
    return Path(found)


def push_folder(
    write: Callable[[Path], None],
    repo_id: str,
    *,
    commit_message: str,
    private: bool | None,
    token: bool | str | None,
    revision: str | None,
    create_pr: bool,
) -> str:
    """Upload what `write` puts into an empty folder, in one commit; returns its URL.

    Nothing reaches the hub before `write` is through. As with transformers' `push_to_hub`, a card that the repository
    has already stays as it is, unless it is one of ours that nobody has edited.

    Raises:
        ValueError: `repo_id` is no id.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(folder)
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/pr/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        text = (folder / CARD).read_text(encoding="utf-8").partition(_SEAL)[0]
        write_card(folder, text.replace(HERE, repo_id))
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            ignore_patterns=[CARD] if _has_own_card(api, repo_id, revision) else None,
        )


def front_matter(library_name: str, tags: Sequence[str], source: str | None = None) -> str:
    """The head of a card, in YAML between two lines. source: the model it is made of, left out where it is a path."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(library_name=library_name, tags=list(tags), base_model=known_model(source))
    return f"---\n{data.to_yaml()}\n---\n"


def known_model(source: str | None) -> str | None:
    """`source` if it reads like a model of the hub, and is no path on this machine."""
    reads_so = source is not None and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source)
    return source if reads_so and not Path(source).exists() else None


def may_write_card(folder: Path) -> bool:
    """Whether `folder` has no card, or one of ours that nobody has edited."""
    card = folder / CARD
    return not card.exists() or _is_untouched(card.read_text(encoding="utf-8"))


def write_card(folder: Path, text: str) -> None:
    """Write a card that `may_write_card` knows again."""
    (folder / CARD).write_text(_sealed(text), encoding="utf-8")


def _has_own_card(api: Any, repo_id: str, revision: str | None) -> bool:
    if not api.file_exists(repo_id, CARD, revision=revision):
        return False
    card = Path(api.hf_hub_download(repo_id, CARD, revision=revision))
    return not _is_untouched(card.read_text(encoding="utf-8"))


def _sealed(text: str) -> str:
    text = text.rstrip()
    return f"{text}\n\n{_SEAL}: {sha256(text.encode()).hexdigest()} -->\n"


def _is_untouched(text: str) -> bool:
    before, seal, _ = text.partition(_SEAL)
    return bool(seal) and text == _sealed(before)
