"""`hf-ext bench`: that it measures, saves and judges; the numbers themselves are no test."""

import json

import pytest
import torch
from bone_native import OURS
from typer.testing import CliRunner

from hf_ext.bench import harness
from hf_ext.cli import BENCHMARKS, app


def bench(*arguments: str):
    return CliRunner().invoke(app, ["bench", *arguments])


def rows(*given: harness.Row):
    return lambda quick=False: iter(given)


MET = harness.Row("work", "peer", 1.0, 2.0, 2.0, target=">= 1.50 x", met=True)
MISSED = harness.Row("work", "peer", 1.0, 1.2, 1.2, target=">= 1.50 x", met=False)
NO_CUDA = harness.Row("work on CUDA", "peer", skipped="needs a CUDA device")


@pytest.fixture
def planted(monkeypatch):
    from hf_ext.bench import anchor

    return lambda *given: monkeypatch.setattr(anchor, "rows", rows(*given))


def test_quick_run_of_every_benchmark(tmp_path):
    done = bench("all", "--quick", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    for name in BENCHMARKS:
        result = json.loads((tmp_path / f"{name}.json").read_text())
        assert result["rows"]
        assert {"processor", "device", "threads", "versions", "date"} <= set(result["machine"])
        if name != "startup":
            assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        assert (tmp_path / f"{name}.md").read_text().count("\n|") == len(result["rows"]) + 2
    together = json.loads((tmp_path / "all.json").read_text())["rows"]
    parts = [json.loads((tmp_path / f"{name}.json").read_text())["rows"] for name in BENCHMARKS]
    assert [row["ratio"] for row in together] == [row["ratio"] for part in parts for row in part]
    assert (tmp_path / "all.md").read_text().count("\n|") == len(together) + 2


@pytest.mark.parametrize(
    ("given", "arguments", "status"),
    [
        ([MET], [], 0),
        ([MET, MISSED], [], 1),
        ([MISSED], ["--quick"], 0),
        ([MET, NO_CUDA], [], 0),
        ([MET, NO_CUDA], ["--require-cuda"], 1),
        ([NO_CUDA], ["--quick", "--require-cuda"], 1),
    ],
    ids=["met", "missed", "quick is not judged", "CUDA skipped", "CUDA required", "CUDA required, quick"],
)
def test_exit_status(planted, given, arguments, status):
    planted(*given)
    assert bench("anchor", *arguments).exit_code == status


@pytest.fixture
def cuda_rows(monkeypatch):
    """The CUDA benchmark on the CPU: everything runs once, nothing is timed."""
    from hf_ext.bench import anchor_cuda

    def compare(what, ours, peer, *, peer_name, repeats=0, at_least=None, **rest):
        ours(), peer()
        return harness.Row(what, peer_name, 1.0, 2.0, 2.0, **rest)

    monkeypatch.setattr(anchor_cuda, "compare_cuda", compare)
    monkeypatch.setattr(harness, "cuda_seconds", lambda function: function() or 1.0)
    monkeypatch.setattr(anchor_cuda, "peak_mib", lambda function: function() or 1.0)
    return anchor_cuda


def test_cuda_attention_rows_run(cuda_rows):
    rows = list(cuda_rows.attention_rows([32, 48], torch.device("cpu"), torch.float32))
    assert [row.peer_name for row in rows if not row.skipped] == ["bare sdpa", "SDPA, whole row"]
    assert {row.what.split()[-1] for row in rows if row.skipped} == {"varlen", "flash", "flex"}
    assert all("needs a CUDA device" in row.skipped for row in rows if row.skipped)


def test_cuda_training_step_runs_and_learns_the_same_from_one_document(cuda_rows):
    """A chunked loss is the loss; and one document is what the host computes."""
    shape = {**cuda_rows.SHAPE, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 31, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    cpu = torch.device("cpu")
    rows = list(cuda_rows.step_rows([20, 20], cpu, torch.float32, shape, 1.9))
    assert [row.unit for row in rows] == ["s", "MiB"]
    model = cuda_rows.llama("anchor", shape, 40, cpu, torch.float64)
    ids, positions = torch.randint(31, (1, 40)), cuda_rows.positions_on(cpu, [40])
    gradients = []
    model.zero_grad = lambda **_: gradients.append(model.lm_head.weight.grad.clone())
    cuda_rows.CHUNK, chunk = 7, cuda_rows.CHUNK
    cuda_rows.training_step(model, ids, positions)
    cuda_rows.CHUNK = chunk
    model.lm_head.weight.grad = None
    model(input_ids=ids, position_ids=positions, labels=ids).loss.backward()
    torch.testing.assert_close(gradients[0], model.lm_head.weight.grad, rtol=1e-5, atol=1e-8)


def compare(what, ours, peer, *, peer_name, repeats=0, at_most=None, **rest):
    """In the place of what measures by CUDA events."""
    ours(), peer()
    return harness.Row(what, peer_name, 1.0, 2.0, 2.0, target=at_most and f"ours <= {at_most:.2f} x", **rest)


def test_cuda_rows_of_ofq_run(monkeypatch):
    import timm

    from hf_ext.bench import ofq_cuda

    size = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2, "num_classes": 3}
    monkeypatch.setattr(ofq_cuda, "compare_cuda", compare)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)  # test_ofq_families compiles
    model = timm.create_model("vit_tiny_patch16_224", **size)
    rows = list(ofq_cuda.step_rows(model, torch.randn(2, 3, 16, 16), repeats=1))
    assert len(rows) == 4
    assert all(row.ours > 0 and row.peer > 0 for row in rows)


def test_fake_quantisation_beside_ofq_computes_the_same():
    from hf_ext.bench import ofq

    torch.manual_seed(0)
    x = torch.randn(2, 5, 12)
    naive = ofq.NaiveLinear(5, 12, 8)
    ours = ofq.quantized_layer(naive, x)
    naive.scale.data.copy_(ours.input_quantizer.scale.unsqueeze(-1))
    assert torch.allclose(naive(x), ours(x), atol=1e-5)


@OURS
def test_cuda_rows_of_bone_run(monkeypatch):
    from hf_ext.bench import bone_cuda

    monkeypatch.setattr(bone_cuda, "compare_cuda", compare)
    monkeypatch.setattr(bone_cuda, "added_mib", lambda step: step() or 1.0)
    shape = bone_cuda.SHAPE | {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 31, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    rows = list(bone_cuda.step_rows(shape, torch.device("cpu"), torch.float32, 12, 4))
    assert [row.peer_name for row in rows if row.unit == "s"] == ["LoRA", "LoRA", "old-style bat", "LoRA"]
    assert [row.target for row in rows if row.unit == "s"] == ["ours <= 0.95 x", "ours <= 1.15 x", None, None]
    assert all(row.met for row in rows if row.unit == "MiB" and row.peer_name == "LoRA")


@OURS
def test_lora_beside_bone_has_as_many_parameters():
    from hf_ext.bench import bone, bone_cuda

    def trained(module):
        return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)

    for form in ("tile", "bat", "bat_row"):
        assert trained(bone.layer(form, 32, torch.float32, 8)) == trained(bone.layer(bone.LORA, 32, torch.float32, 8))
    shape = bone_cuda.SHAPE | {"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 31}
    shape |= {"num_attention_heads": 6, "num_key_value_heads": 2}
    sizes = {
        method: trained(bone_cuda.adapted(method, shape, torch.device("cpu"), torch.float32, 8, 16))
        for method in ("tile", bone_cuda.LORA)
    }
    assert abs(sizes["tile"] / sizes[bone_cuda.LORA] - 1) < 0.05


@OURS
def test_kept_bytes_are_counted_to_the_byte():
    from hf_ext.bench import bone

    count = {name: bone.kept_bytes(name, 32, torch.float32, 8, 10) for name in ("tile", "bat", bone.FROZEN, bone.OLD)}
    assert count["tile"] == 10 * 8 * 4
    assert count["bat"] == count[bone.FROZEN] == 0
    assert count[bone.OLD] >= 32 * 32 * 4


def test_a_skipped_row_says_why(planted):
    planted(NO_CUDA)
    assert "needs a CUDA device" in " ".join(bench("anchor").output.split())


def test_unknown_benchmark():
    done = bench("anchr")
    assert done.exit_code == 2
    assert "there is no benchmark 'anchr'" in done.output
    assert "; did you mean 'anchor'?" in done.output


def test_ratio_is_the_median_of_the_pairs(monkeypatch):
    times = iter([1.0, 2.0, 1.0, 6.0, 2.0, 6.0])
    monkeypatch.setattr(harness, "cpu_seconds", lambda function: next(times))
    assert harness.paired(lambda: None, lambda: None, repeats=3) == (1.0, 6.0, 3.0)


def test_misspelt_command_is_suggested():
    done = CliRunner().invoke(app, ["docter"])
    assert done.exit_code == 2
    assert "doctor" in done.output


def test_version():
    from hf_ext import __version__

    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output.strip()) == (0, f"hf_ext {__version__}")


@pytest.mark.parametrize(
    ("out", "text"), [("file", "is a file; name a folder"), ("file/inside", "cannot be written to: Not a directory")]
)
def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_measured(out, text, planted, tmp_path):
    planted(MET)
    (tmp_path / "file").write_text("mine")
    done = bench("anchor", "--out", str(tmp_path / out))
    assert done.exit_code == 2
    assert text in done.output
    assert "work" not in done.output
    assert (tmp_path / "file").read_text() == "mine"
