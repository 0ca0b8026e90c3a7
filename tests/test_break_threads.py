"""Two at once in one process: threads, models of different settings, and contexts that end out of turn."""

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import evaluate
import pytest
import torch
from anchor_models import build, config_of, logits
from anchor_oracle import positions_of
from bone_files import IDS, LLAMA, adapter, merged, model_of, write_adapter
from bone_native import ROW_FORM
from importance_corpora import corpus, fitted, validation
from mcq_models import alone, prompts_and_counts, tiny_model, word_tokenizer
from mcq_oracle import differences, draw_groups, draw_scores
from ofq_deployed import logits as image_logits
from ofq_deployed import quantized
from peft import PeftModel

from hf_ext import ImportanceWeights
from hf_ext.anchor_attention import available_engines, use_engine
from hf_ext.mcq_bias import bias_metrics, recalibrate_attention
from hf_ext.ofq_quantizer import load_packed, save_packed, to_int8


@pytest.fixture(autouse=True)
def _hasty(monkeypatch) -> Iterator[None]:
    """Threads that take turns a thousand times as often; the engine is that of before, whatever they leave."""
    monkeypatch.setattr("hf_ext.anchor_attention.choice._named", [])
    former = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(former)


def together(*jobs: Callable[[], Any], times: int = 3) -> list[list[Any]]:
    """The results of every job, which begin at the same time, each in a thread of its own."""
    start = threading.Barrier(len(jobs))

    def run(job: Callable[[], Any]) -> list[Any]:
        start.wait()
        return [job() for _ in range(times)]

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(run, jobs))


def same_as_alone(*jobs: Callable[[], torch.Tensor], tolerance: float = 0.0) -> None:
    expected = [job() for job in jobs]
    for results, wanted in zip(together(*jobs), expected, strict=True):
        assert max((result - wanted).abs().max().item() for result in results) <= tolerance


# --- anchor attention


def rows(*lengths: list[int]) -> dict[str, torch.Tensor]:
    positions = positions_of(list(lengths))
    generator = torch.Generator().manual_seed(positions.numel())
    return {"input_ids": torch.randint(3, 60, positions.shape, generator=generator), "position_ids": positions}


BATCHES = [rows([5, 7], [3, 9]), rows([12], [1, 11]), rows([4, 1, 1, 14])]


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference mode"])
def test_one_anchor_model_in_several_threads(llama, inference):
    """Each has its rows; what a forward keeps for all its layers is of its own thread's tensors."""

    def job(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.inference_mode(inference):
            return llama(**{name: tensor.clone() for name, tensor in batch.items()}).logits

    same_as_alone(*(lambda batch=batch: job(batch) for batch in BATCHES))


def test_anchor_models_of_different_settings_side_by_side(llama, stock_llama):
    mistral, gemma = build(config_of("mistral")), build(config_of("gemma2"))
    jobs = [(llama, BATCHES[0]), (mistral, BATCHES[1]), (gemma, BATCHES[2]), (stock_llama, BATCHES[0])]
    same_as_alone(*(lambda model=model, batch=batch: logits(model, **batch) for model, batch in jobs))


def test_engines_in_several_threads_change_no_result(llama):
    """`use_engine` is for the process: a thread may compute by the engine of another, and the same."""

    def job(name: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with use_engine(name):
            return logits(llama, **batch)

    pairs = zip(("sdpa", "dense", "sdpa"), BATCHES, strict=True)
    same_as_alone(*(lambda name=name, batch=batch: job(name, batch) for name, batch in pairs), tolerance=1e-12)


def test_contexts_of_engines_may_end_in_any_order():
    def chosen() -> list[str]:
        return [name for name, status in available_engines().items() if status.chosen]

    before = chosen()
    first = use_engine("dense")
    second = use_engine("sdpa")
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert chosen() == before


# --- Bone


@pytest.mark.parametrize("row_form", [False, pytest.param(True, marks=ROW_FORM)], ids=["", "row form"])
def test_bone_adapters_in_several_threads(tmp_path, row_form):
    """Models with adapters of unlike forms, each of which two threads use."""
    base, jobs = model_of(LLAMA), []
    for init_weights, r in ((True, 8), ("bat", 4), *([("bat_row", 4)] if row_form else [])):
        config, tensors = adapter(base, init_weights, r)
        folder = write_adapter(tmp_path / str(init_weights), config, tensors)
        model = PeftModel.from_pretrained(model_of(LLAMA), folder).eval()
        with torch.no_grad():
            expected = merged(base, config, tensors)(IDS).logits
        jobs += [lambda model=model, expected=expected: logits(model, input_ids=IDS) - expected] * 2
    for results in together(*jobs):
        assert max(result.abs().max().item() for result in results) < 1e-4


# --- OFQ


def test_quantised_models_of_different_bits_in_several_threads(tmp_path):
    model, x = quantized(w_bits=2, a_bits=3)
    other, y = quantized("hf_vit", w_bits=4, a_bits=8, qk_reparam=True)
    save_packed(other, tmp_path / "packed")
    jobs = [(model, x), (to_int8(model), x), (other, y), (to_int8(other), y), (load_packed(tmp_path / "packed"), y)]
    same_as_alone(*(lambda model=model, x=x: image_logits(model, x) for model, x in jobs + jobs[1:2]))


def test_folders_are_packed_and_read_in_several_threads(tmp_path):
    models = [quantized(w_bits=bits)[0] for bits in (2, 4)]
    _, x = quantized()

    def job(number: int) -> torch.Tensor:
        save_packed(models[number], tmp_path / str(number))
        return image_logits(load_packed(tmp_path / str(number)), x)

    same_as_alone(lambda: job(0), lambda: job(1))


# --- importance weights


def test_fits_and_maps_in_several_threads():
    """Every number to the bit, with threads of their own in each."""
    data, rows = corpus(), validation(rows=9000)

    def job(options: dict[str, Any]) -> Any:
        iw = ImportanceWeights(k=3, epochs=4, **options).fit(rows, progress=False, num_threads=2)
        return iw.to_dict(), iw.value, data.map(iw, batched=True)["importance"][:], iw.evaluate(validation(6))

    kinds = [{}, {"method": "shapley"}, {"group_column": "source"}, {"epsilon": 0.05}, {"dtype": "float32"}]
    expected = [job(options) for options in kinds]
    for results, wanted in zip(together(*(lambda o=o: job(o) for o in kinds), times=2), expected, strict=True):
        assert all(result == wanted for result in results)


def test_one_fit_is_read_by_several_threads():
    iw, data = fitted(), corpus()
    ids = data["id"][:]
    expected = iw.lookup(ids).tolist(), iw.prune(data, 0.5)["id"][:], data.map(iw, batched=True)["importance"][:]

    def job() -> Any:
        return iw.lookup(ids).tolist(), iw.prune(data, 0.5)["id"][:], data.map(iw, batched=True)["importance"][:]

    assert all(result == expected for results in together(job, job, job) for result in results)


# --- anchored answers


def sized(rows: dict[str, Any]) -> dict[str, Any]:
    return rows | {"num_choices": list(map(len, rows["predictions"]))}


def test_metrics_in_several_threads():
    drawn = [draw_scores(150, seed=1), draw_scores(150, seed=2), draw_groups(20, seed=3), draw_groups(20, seed=4)]
    jobs = list(map(sized, drawn))
    expected = [bias_metrics(**job, n_resamples=200) for job in jobs]

    def by_batches(job: dict[str, Any]) -> dict[str, float]:
        metric = evaluate.load("anchored_mcq_bias")
        for at in range(0, len(job["references"]), 17):
            metric.add_batch(**{name: column[at : at + 17] for name, column in job.items()})
        return metric.compute(n_resamples=200)

    for way in (lambda job: bias_metrics(**job, n_resamples=200), by_batches):
        found = together(*(lambda job=job, way=way: way(job) for job in jobs), times=2)
        for results, wanted in zip(found, expected, strict=True):
            assert all(differences(result, wanted) == {} for result in results)


def test_metrics_of_two_tasks_are_filled_in_turn():
    one, other = sized(draw_scores(60, seed=1)), sized(draw_scores(60, seed=2))
    metrics = [evaluate.load("anchored_mcq_bias") for _ in range(2)]
    for at in range(0, 60, 13):
        for metric, job in zip(metrics, (one, other), strict=True):
            metric.add_batch(**{name: column[at : at + 13] for name, column in job.items()})
    for metric, job in zip(metrics, (one, other), strict=True):
        assert differences(metric.compute(n_resamples=0), bias_metrics(**job, n_resamples=0)) == {}


def test_recalibrations_of_two_models_in_two_threads():
    tokenizer, (prompt, *_) = word_tokenizer(), prompts_and_counts(1)[0]
    models = [tiny_model("llama", seed=0), tiny_model("gpt2", seed=1), tiny_model("llama", seed=0)]
    settings = [("all", "swap"), ([(0, 1)], "equalise"), ([], "swap")]

    def job(number: int) -> torch.Tensor:
        heads, mode = settings[number]
        with recalibrate_attention(models[number], heads, [-2, -4], mode):
            return alone(models[number], tokenizer, prompt)

    same_as_alone(*(lambda number=number: job(number) for number in range(3)))
    assert not torch.equal(job(0), job(2))


def test_recalibrations_of_one_model_may_end_in_any_order():
    model, tokenizer, (prompt, *_) = tiny_model("llama"), word_tokenizer(), prompts_and_counts(1)[0]
    before, config, names = alone(model, tokenizer, prompt), model.config, set(vars(model))
    places = [[-2, -4], [-3, -5]]
    with recalibrate_attention(model, "all", places[1], "swap"):
        second_alone = alone(model, tokenizer, prompt)
    contexts = [recalibrate_attention(model, "all", positions, "swap") for positions in places]
    for context in contexts:
        context.__enter__()
    model.config.written_inside = 1
    contexts[0].__exit__(None, None, None)
    assert torch.equal(alone(model, tokenizer, prompt), second_alone)
    assert not torch.equal(second_alone, before)
    contexts[1].__exit__(None, None, None)
    assert torch.equal(alone(model, tokenizer, prompt), before)
    assert model.config is config and config.written_inside == 1
    assert set(vars(model)) == names
