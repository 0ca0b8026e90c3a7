"""One thread, no network, caches of its own: set before any test module imports torch."""

import os
import tempfile
from collections.abc import Iterator

_CACHE = tempfile.mkdtemp(prefix="hf_ext_tests_")
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HOME": _CACHE,
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GLOO_SOCKET_IFNAME": "lo",
    "WANDB_DISABLED": "true",
}

import pytest  # noqa: E402
import torch  # noqa: E402
from ranks import both  # noqa: E402, F401
from sixty_words import tokenizer  # noqa: E402, F401

import hf_ext  # noqa: E402, F401

torch.set_num_threads(1)


# Files of few and long tests: begun first, else one of two processes waits for the other's last one.
LONG = (
    *("test_demo", "test_bench", "test_notebooks", "test_autoload", "test_real_loops", "test_contributing"),
    *("test_anchor_compile", "test_ofq_compiled", "test_mcq_toy"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.path.stem.startswith(LONG))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _leave_nothing_of_a_training() -> Iterator[None]:
    """transformers puts precision (up to 4.57) and compiler of a Trainer into the environment, where the next looks."""
    before = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    yield
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="module")
def llama() -> torch.nn.Module:
    return _llama("anchor")


@pytest.fixture(scope="module")
def stock_llama() -> torch.nn.Module:
    return _llama("sdpa")


def _llama(implementation: str) -> torch.nn.Module:
    from anchor_models import build, config_of

    return build(config_of("llama"), implementation)
