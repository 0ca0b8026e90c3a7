"""A hub in this process: what is uploaded is found in the host's cache, as if it had been downloaded from there."""

import inspect
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from hashlib import sha1
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi, constants


class Hub:
    """Takes the place of the methods of `HfApi` that write; those that read the cache, offline, are the host's own.

    Attributes:
        repos: id -> what `create_repo` was told. commits: what `upload_folder` was told, and the names of its files.
        branches: (id, name).
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.commits: list[dict[str, Any]] = []
        self.branches: list[tuple[str, str]] = []
        self.cache = Path(constants.HF_HUB_CACHE)
        for name in ("create_repo", "create_branch", "file_exists", "hf_hub_download", "upload_folder"):
            patch.setattr(HfApi, name, _called_like(getattr(HfApi, name), getattr(self, name)))

    def create_repo(self, api: HfApi, repo_id: str, *, private: bool | None, exist_ok: bool) -> SimpleNamespace:
        repo_id = repo_id if "/" in repo_id else f"ann/{repo_id}"
        assert exist_ok or repo_id not in self.repos
        self.repos.setdefault(repo_id, {"private": private, "token": api.token})
        return SimpleNamespace(repo_id=repo_id)

    def create_branch(self, _: HfApi, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        assert exist_ok
        self.branches.append((repo_id, branch))

    def file_exists(self, _: HfApi, repo_id: str, filename: str, *, revision: str | None) -> bool:
        return self.file(repo_id, filename, revision).is_file()

    def hf_hub_download(self, _: HfApi, repo_id: str, filename: str, *, revision: str | None) -> str:
        return str(self.file(repo_id, filename, revision))

    def upload_folder(
        self, _: HfApi, *, repo_id: str, folder_path: Path, ignore_patterns: list[str] | None, **said: Any
    ) -> str:
        assert repo_id in self.repos
        names = {path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()}
        names = {name for name in names if not any(fnmatch(name, pattern) for pattern in ignore_patterns or ())}
        self.put(repo_id, {name: (Path(folder_path) / name).read_bytes() for name in names}, said["revision"])
        self.commits.append({"repo_id": repo_id, "files": names, **said})
        return f"https://huggingface.co/{repo_id}/commit/{len(self.commits)}"

    def put(self, repo_id: str, files: dict[str, bytes], revision: str | None = None) -> None:
        """Lay files into the cache, beside those that the revision has."""
        revision = revision or "main"
        ref = self._folder(repo_id) / "refs" / revision
        commit = sha1(f"{repo_id}@{revision}".encode()).hexdigest()
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)
        for name, content in files.items():
            path = self._folder(repo_id) / "snapshots" / commit / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def file(self, repo_id: str, name: str, revision: str | None = None) -> Path:
        ref = self._folder(repo_id) / "refs" / (revision or "main")
        return self._folder(repo_id) / "snapshots" / (ref.read_text() if ref.is_file() else "none") / name

    def clear(self) -> None:
        shutil.rmtree(self.cache, ignore_errors=True)

    def _folder(self, repo_id: str) -> Path:
        return self.cache / f"models--{repo_id.replace('/', '--')}"


def _called_like(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """Ours, with the arguments that the original takes."""
    signature = inspect.signature(original)

    def method(*args: Any, **kwargs: Any) -> Any:
        signature.bind(*args, **kwargs)
        return ours(*args, **kwargs)

    return method
