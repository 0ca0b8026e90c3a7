"""Two processes under gloo that serve the tests of a file: starting them takes longer than what they do."""

import os
import pickle
import socket
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

RANKS = 2


def serve(rank: int, port: int, calls: Connection) -> None:
    """Does what comes through the pipe, and sends back (result, None) or (None, traceback)."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    while (call := calls.recv()) is not None:
        job, arguments = call
        try:
            answer = job(rank, *arguments), None
        except BaseException:  # pytest.raises has one of those to say that nothing was raised
            answer = None, traceback.format_exc()
        calls.send(pickle.dumps(answer))  # by value; tensors in a pipe of their own accord share memory
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both() -> Iterator[Callable[..., list[Any]]]:
    """`both(job, ...)`: what `job(rank, ...)` returns in each of two processes, which serve all tests of this file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("spawn")
    pipes = [context.Pipe() for _ in range(RANKS)]
    workers = [context.Process(target=serve, args=(i, port, end)) for i, (_, end) in enumerate(pipes)]
    for worker in workers:
        worker.start()

    def ask(job: Callable[..., Any], *arguments: Any) -> list[Any]:
        for pipe, _ in pipes:
            pipe.send((job, arguments))
        answers = [pickle.loads(pipe.recv()) for pipe, _ in pipes]
        for rank, (_, trouble) in enumerate(answers):
            assert trouble is None, f"process {rank}: {trouble}"
        return [result for result, _ in answers]

    yield ask
    for (pipe, _), worker in zip(pipes, workers, strict=True):
        pipe.send(None)
        worker.join(20)
        worker.kill()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
