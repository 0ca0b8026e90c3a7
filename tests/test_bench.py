"""`hf-ext bench`: that it measures, saves and judges; the numbers themselves are no test."""

import json

import pytest
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
    done = bench("--quick", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    for name in BENCHMARKS:
        result = json.loads((tmp_path / f"{name}.json").read_text())
        assert result["rows"]
        assert {"processor", "device", "threads", "versions", "date"} <= set(result["machine"])
        assert (tmp_path / f"{name}.md").read_text().count("\n|") == len(result["rows"]) + 2


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


def test_a_skipped_row_says_why(planted):
    planted(NO_CUDA)
    assert "needs a CUDA device" in " ".join(bench("anchor").output.split())


def test_unknown_benchmark():
    done = bench("anchr")
    assert done.exit_code == 2
    assert "there is no benchmark 'anchr'" in done.output
    assert "Did you mean 'anchor'?" in done.output


def test_ratio_is_the_median_of_the_pairs(monkeypatch):
    times = iter([1.0, 2.0, 1.0, 6.0, 2.0, 6.0])
    monkeypatch.setattr(harness, "_cpu_seconds", lambda function: next(times))
    assert harness.paired(lambda: None, lambda: None, repeats=3) == (1.0, 6.0, 3.0)


def test_misspelt_command_is_suggested():
    done = CliRunner().invoke(app, ["docter"])
    assert done.exit_code == 2
    assert "doctor" in done.output


def test_a_file_as_output_folder_is_refused_before_anything_is_measured(planted, tmp_path):
    planted(MET)
    (tmp_path / "file").write_text("")
    done = bench("anchor", "--out", str(tmp_path / "file"))
    assert done.exit_code == 2
    assert "is a file" in done.output


def test_version():
    from hf_ext import __version__

    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output.strip()) == (0, f"hf_ext {__version__}")
