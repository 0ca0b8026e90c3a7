"""Real text that every machine has: docstrings and modules of Python's own standard library."""

import ast
import random
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

BOS = "<s>"


class NoTextError(LookupError):
    """Neither the standard library nor the installed packages have sources to read."""


def documents(count: int, seed: int, log: Callable[[str], object] = print) -> list[str]:
    """`count` docstrings of at least 20 characters, in an order fixed by `seed`.

    An interpreter without sources (zipped, compiled only) is told so, and the installed packages serve instead.

    Raises:
        NoTextError: there is too little text in either place.
    """
    found: list[str] = []
    for what, folder in _places():
        for docstring in _docstrings(_sources(folder, seed)):
            found.append(docstring)
            if len(found) == count:
                return found
        log(f"Looked for Python sources of {what} under {folder}: {len(found)} of {count} docstrings so far.")
    raise NoTextError(f"found only {len(found)} docstrings, and {count} are needed")


def modules(characters: int, seed: int, log: Callable[[str], object] = print) -> list[str]:
    """Whole modules of at least `characters` characters together, where `documents` takes docstrings.

    They come from the other end of the same order, so that no module gives both unless more is asked for than there is.

    Raises:
        NoTextError: there is too little text in either place.
    """
    found: list[str] = []
    missing = characters
    for what, folder in _places():
        for module in _texts(reversed(_sources(folder, seed))):
            found.append(module)
            missing -= len(module)
            if missing <= 0:
                return found
        log(f"Looked for Python sources of {what} under {folder}: {missing} of {characters} characters still missing.")
    raise NoTextError(f"found only {characters - missing} characters of Python, and {characters} are needed")


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose only special token is `<s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=BOS)


def _places() -> list[tuple[str, Path]]:
    paths = sysconfig.get_paths()
    return [("the standard library", Path(paths["stdlib"])), ("the installed packages", Path(paths["purelib"]))]


def _sources(folder: Path, seed: int) -> list[Path]:
    skipped = {"site-packages", "test", "tests"}  # tests: slow to parse, and hardly any text
    files = sorted(path for path in folder.rglob("*.py") if skipped.isdisjoint(path.relative_to(folder).parts))
    random.Random(seed).shuffle(files)
    return files


def _docstrings(files: list[Path]) -> Iterator[str]:
    for file in files:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old sources
                tree = ast.parse(file.read_bytes())
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue  # some sources are broken on purpose, as data of tests
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text and len(text) >= 20:
                    yield text


def _texts(files: Iterable[Path]) -> Iterator[str]:
    for file in files:
        try:
            yield file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # as above
