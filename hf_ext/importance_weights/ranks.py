"""The processes of a job: integers added up, errors shared. One process is a job too."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from hf_ext.importance_weights.columns import MissingColumnError

Result = TypeVar("Result")


class Ranks:
    """What `torchrun` or `accelerate launch` started, `rank` of `world`."""

    def __init__(self, accelerator: Any = None) -> None:
        self.together = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if self.together else (0, 1)
        on_cuda = self.together and dist.get_backend() == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
        if accelerator is not None and accelerator.num_processes != self.world:
            raise ValueError(
                f"the accelerator counts {accelerator.num_processes} processes and torch.distributed {self.world}; "
                "pass the Accelerator of this job"
            )

    def gather(self, thing: Any) -> list[Any]:
        """The `thing` of every rank, in their order."""
        if not self.together:
            return [thing]
        things: list[Any] = [None] * self.world
        dist.all_gather_object(things, thing)
        return things

    def add(self, numbers: np.ndarray) -> np.ndarray:
        """The sum over all ranks of int64 numbers."""
        return self._reduce(numbers, dist.ReduceOp.SUM) if self.together else numbers

    def largest(self, numbers: np.ndarray) -> np.ndarray:
        """The maximum over all ranks."""
        return self._reduce(numbers, dist.ReduceOp.MAX) if self.together else numbers

    def _reduce(self, numbers: np.ndarray, operation: Any) -> np.ndarray:
        tensor = torch.tensor(numbers, device=self.device)  # a copy: the reduction writes into it
        dist.all_reduce(tensor, operation)
        return tensor.cpu().numpy()

    def same(self, what: str, thing: Any) -> None:
        """
        Raises:
            ValueError: on every rank, where `thing` is not the same on all.
        """
        things = self.gather(thing)
        other = next((rank for rank, one in enumerate(things) if one != things[0]), None)
        if other is not None:
            raise ValueError(
                f"{what} differ between processes: {things[0]!r} on rank 0, {things[other]!r} on rank {other}"
            )

    def first(self, work: Callable[[], Result]) -> Result:
        """What rank 0 makes of `work`, on every rank; where it fails, all raise that error."""
        result = self.agree(lambda: work() if self.rank == 0 else None)
        return self.gather(result)[0]

    def agree(self, work: Callable[[], Result]) -> Result:
        """Do `work` on every rank; where it fails on one, all raise that error and none waits for it."""
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            if not self.together:
                raise
            failure = error
        texts = self.gather(None if failure is None else (_kind(failure), str(failure)))
        first = next((rank for rank, text in enumerate(texts) if text is not None), None)
        if first is None:
            return result
        if first == self.rank:
            raise failure
        kind, text = texts[first]
        raise kind(text)


def _kind(error: Exception) -> type[Exception]:
    """What another rank raises: an exception of a library's own may not be made from its text."""
    known = (MissingColumnError, TypeError, ValueError, FileNotFoundError, OSError)
    return next((kind for kind in known if isinstance(error, kind)), RuntimeError)
