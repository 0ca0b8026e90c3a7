"""Work that is cut off: fits killed between epochs, folders written by half, calibrations and fits that fail inside."""

import errno
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from damage import outcome, restored
from importance_corpora import fitted, validation
from mcq_models import WORDS, examples, tiny_model, word_tokenizer
from ofq_deployed import full, logits, quantized
from processes import run_python

from hf_ext import ImportanceWeights
from hf_ext.importance_weights import saving
from hf_ext.mcq_bias import RecalibrationConfig, load_mitigation, mitigate, save_mitigation
from hf_ext.ofq_quantizer import OFQConfig, calibrate, load_packed, packed, quantize, save_packed


class FullDisk:
    """After `allowed` writes of whole files, one that ends half-way, or before it began, with the error of a full disk.

    begun: whether the file is opened.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, allowed: int, begun: bool = True) -> None:
        self.left = allowed
        write_text = Path.write_text

        def half(path: Any, content: bytes) -> None:
            self.left -= 1
            if self.left < 0:
                if begun:
                    Path(path).write_bytes(content[: len(content) // 2])
                raise OSError(errno.ENOSPC, "No space left on device", str(path))

        def text(path: Path, content: str, *args: Any, **kwargs: Any) -> int:
            half(path, content.encode())
            return write_text(path, content, *args, **kwargs)

        def tensors(save_file: Callable[..., None]) -> Callable[..., None]:
            def save(held: Any, path: Any, *args: Any, **kwargs: Any) -> None:
                aside = f"{path}.aside"
                save_file(held, aside, *args, **kwargs)
                content = Path(aside).read_bytes()
                os.unlink(aside)
                half(path, content)
                Path(path).write_bytes(content)

            return save

        @contextmanager
        def arrow(path: str, mode: str) -> Iterator[Any]:
            sink = pa.BufferOutputStream()
            yield sink
            half(path, content := sink.getvalue().to_pybytes())
            Path(path).write_bytes(content)

        monkeypatch.setattr(Path, "write_text", text)
        monkeypatch.setattr(saving, "save_file", tensors(saving.save_file))
        monkeypatch.setattr(packed, "save_file", tensors(packed.save_file))
        monkeypatch.setattr(saving.pa, "OSFile", arrow)


def written_by_half(save: Callable[[], None], monkeypatch: pytest.MonkeyPatch, *disk: Any) -> bool:
    """Whether the disk was full; then the caller was told."""
    with monkeypatch.context() as patch:
        FullDisk(patch, *disk)
        try:
            save()
        except OSError as error:
            assert error.errno == errno.ENOSPC
            return True
    return False


# --- folders


BEGUN = pytest.mark.parametrize("begun", [True, False], ids=["half a file", "whole files"])


@BEGUN
@pytest.mark.parametrize("allowed", range(5))
def test_importance_weights_written_by_half_are_the_old_ones_or_refused(tmp_path, monkeypatch, allowed, begun):
    """Four files and the card; each in turn is the one that the disk has no room for."""
    old, new = fitted(), fitted(validation(9))
    old.save_pretrained(tmp_path)
    facts = [(iw.to_dict(), iw.value, iw.history) for iw in (old, new)]
    assert written_by_half(lambda: new.save_pretrained(tmp_path), monkeypatch, allowed, begun)

    def is_one_of_them(iw: ImportanceWeights) -> bool:
        return (iw.to_dict(), iw.value, iw.history) in (facts if allowed == 4 else facts[:1])  # 4: all but the card

    found = outcome(lambda: ImportanceWeights.from_pretrained(tmp_path), is_one_of_them, tmp_path)
    assert found == ("right" if allowed == 4 or (allowed == 0 and not begun) else "refused")
    new.save_pretrained(tmp_path)
    assert ImportanceWeights.from_pretrained(tmp_path).to_dict() == facts[1][0]


@BEGUN
@pytest.mark.parametrize("allowed", range(3))
def test_packed_models_written_by_half_are_the_old_ones_or_refused(tmp_path, monkeypatch, allowed, begun):
    model, x = quantized()
    save_packed(model, tmp_path / "packed")
    old = logits(model, x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    assert written_by_half(lambda: save_packed(model, tmp_path / "packed"), monkeypatch, allowed, begun)
    expected = {0: old, 2: logits(model, x)}.get(allowed)  # 2: all but the card
    read = outcome(lambda: load_packed(tmp_path / "packed"), lambda m: torch.equal(logits(m, x), expected), tmp_path)
    assert read == ("right" if allowed == 2 or (allowed == 0 and not begun) else "refused")


def test_a_recalibration_written_by_half_is_refused(tmp_path, monkeypatch):
    RecalibrationConfig([(0, 1)]).save_pretrained(tmp_path)
    other = RecalibrationConfig([(1, 1)], "equalise")
    assert written_by_half(lambda: other.save_pretrained(tmp_path), monkeypatch, 0)
    assert outcome(lambda: RecalibrationConfig.from_pretrained(tmp_path), bool, tmp_path) == "refused"


@pytest.fixture(scope="module")
def repairs() -> list[Any]:
    """Two mitigations of one random model that leans to A."""

    def leaning() -> Any:
        model = tiny_model("gpt2")
        with torch.no_grad():
            for block in model.transformer.h:
                block.mlp.c_proj.weight += 0.1 * model.get_output_embeddings().weight[WORDS.index("A")]
        return model

    options = {"progress": False}
    return [mitigate(leaning(), word_tokenizer(), examples(20), strength=s, **options) for s in (0.5, 1.0)]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_record_of_a_mitigation_written_by_half_is_refused(repairs, tmp_path, monkeypatch):
    one, other = repairs
    save_mitigation(one, tmp_path)
    assert written_by_half(lambda: save_mitigation(other, tmp_path), monkeypatch, 0)
    assert (tmp_path / "mcq_bias.json").stat().st_size < 2000
    assert outcome(lambda: load_mitigation(tiny_model("gpt2"), tmp_path), bool, tmp_path) == "refused"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_adapter_of_one_mitigation_and_the_record_of_another_are_refused(repairs, tmp_path):
    one, other = repairs
    save_mitigation(one, tmp_path)
    other.save_pretrained(str(tmp_path))
    assert outcome(lambda: load_mitigation(tiny_model("gpt2"), tmp_path), lambda _: False, tmp_path) == "refused"


# --- fits

KILLED = """
import os, signal, sys, warnings
sys.path.insert(0, {tests!r})
from importance_corpora import validation
from hf_ext import ImportanceWeights

replace, count = os.replace, 0

def counted(source, target):
    global count
    count += 1
    if count == 3:  # the checkpoint of the third epoch is written, and has not got its name yet
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = counted
ImportanceWeights(k=3, epochs=6).fit(
    validation(), progress=False, checkpoint_dir={folder!r}, checkpoint_every=1, resume_from_checkpoint=None
)
"""


def test_a_fit_that_was_killed_between_epochs_goes_on_to_the_same_bits(tmp_path):
    """By the system, so that nothing is tidied up; then once more, on top of what is left."""
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    assert run_python(code).returncode == -signal.SIGKILL
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left[0] == "checkpoint.safetensors" and len(left) == 2
    resumed = ImportanceWeights(k=3, epochs=6).fit(
        validation(), progress=False, checkpoint_dir=tmp_path, resume_from_checkpoint=True
    )
    whole = ImportanceWeights(k=3, epochs=6).fit(validation(), progress=False)
    assert resumed.to_dict() == whole.to_dict()
    assert (resumed.value, resumed.history) == (whole.value, whole.history)


def test_a_fit_that_fails_inside_leaves_the_one_before(tmp_path, monkeypatch):
    iw = fitted()
    before = iw.to_dict(), iw.value, iw.history

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(KeyboardInterrupt):
            iw.fit(validation(9), progress=False, checkpoint_dir=tmp_path, checkpoint_every=1)
    assert (iw.to_dict(), iw.value, iw.history) == before
    assert not list(tmp_path.iterdir())


# --- models


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_calibration_that_is_cut_off_leaves_no_trace(after):
    """A new one gives what it would have given at once, and the model evaluates as before."""
    plain, x = full("vit")
    model = quantize(plain, OFQConfig())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def batches() -> Iterator[torch.Tensor]:
        yield from [0.5 * x, 2 * x][:after]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, batches())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    at_once = calibrate(quantize(full("vit")[0], OFQConfig()), [x])
    assert torch.equal(logits(calibrate(model, [x]), x), logits(at_once, x))


def test_files_beside_a_folder_that_was_cut_off_are_left_alone(tmp_path, monkeypatch):
    """And what is restored from a copy is as good as new."""
    iw = fitted()
    iw.save_pretrained(tmp_path / "good")
    (tmp_path / "good" / "notes.txt").write_text("mine")
    folder = restored(tmp_path / "good", tmp_path / "copy")
    assert written_by_half(lambda: fitted(validation(9)).save_pretrained(folder), monkeypatch, 1)
    assert (folder / "notes.txt").read_text() == "mine"
    restored(tmp_path / "good", folder)
    assert ImportanceWeights.from_pretrained(folder).to_dict() == iw.to_dict()
    assert json.loads((folder / "config.json").read_text())["k"] == 3
