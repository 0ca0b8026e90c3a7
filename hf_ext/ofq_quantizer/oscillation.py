"""How often weights jump back and forth between two codes: the frequency of Nagel et al. (arXiv 2203.11086)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.utils import logging

from hf_ext.checks import is_number
from hf_ext.ofq_quantizer.annealing import stepping
from hf_ext.ofq_quantizer.attention import QuantAttention
from hf_ext.ofq_quantizer.layers import QuantLinear
from hf_ext.ofq_quantizer.ops import statsq_codes

logger = logging.get_logger(__name__)

THRESHOLD = 0.005  # above this frequency a weight is said to oscillate


class Oscillation(NamedTuple):
    """What is kept of one weight (rows, columns).

    codes: int8, those of the last step; turn: int8, the sign of their last change, 0 before any; frequency: float32.
    """

    codes: Tensor
    turn: Tensor
    frequency: Tensor

    @classmethod
    def start(cls, codes: Tensor) -> "Oscillation":
        return cls(codes, torch.zeros_like(codes), torch.zeros_like(codes, dtype=torch.float32))

    def then(self, codes: Tensor, momentum: float) -> "Oscillation":
        """One step later: f = m o + (1 - m) f, o = 1 where a code changes against the direction of its last change."""
        change = torch.sign(codes - self.codes)
        reversed_ = (change != 0) & (change == -self.turn)
        turn = torch.where(change != 0, change, self.turn)
        return Oscillation(codes, turn, torch.lerp(self.frequency, reversed_.float(), momentum))


class OscillationTracker:
    """Follows the codes of every low-bit weight of a model; under QKR those of the product W_q^T W_k, "<attention>.qk".

    Costs 6 bytes a weight, and one rounding of all weights an update. The first update takes the codes to start from.

    Args:
        model: a quantised model.
        momentum: share of the newest step in the moving average.

    Raises:
        ValueError: the model is not quantised; momentum outside (0, 1].
    """

    def __init__(self, model: nn.Module, momentum: float = 0.01) -> None:
        _check_momentum(momentum)
        if not any(True for _ in low_bit_codes(model)):
            raise ValueError("no weight of this model is rounded by StatsQ; call hf_ext.ofq_quantizer.quantize first")
        self.model, self.momentum = model, momentum
        self._seen: dict[str, Oscillation] = {}
        self._handle: Any = None

    def update(self) -> None:
        """Take the codes of one more step."""
        for name, codes in low_bit_codes(self.model):
            seen = self._seen.get(name)
            self._seen[name] = Oscillation.start(codes) if seen is None else seen.then(codes, self.momentum)

    def attach(self, optimizer: Any) -> "OscillationTracker":
        """Update after each step of the optimizer, from now on; also through accelerate's wrapper.

        Raises:
            TypeError: an optimizer without step hooks.
            ValueError: attached already.
        """
        if self._handle is not None:
            raise ValueError("this tracker is attached already; call detach() first")
        optimizer = stepping(optimizer)
        if not self._seen:
            self.update()
        self._handle = optimizer.register_step_post_hook(lambda *_: self.update())
        return self

    def detach(self) -> None:
        """Stop updating; what was found stays."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def frequency(self) -> dict[str, Tensor]:
        """{name of the weight: (rows, columns) float32 in [0, 1]}."""
        return {name: seen.frequency for name, seen in self._seen.items()}

    def share(self, threshold: float = THRESHOLD) -> float:
        """Share of all low-bit weights whose frequency is above the threshold; 0 before the first update."""
        frequencies = [seen.frequency for seen in self._seen.values()]
        above = sum(int((frequency > threshold).sum()) for frequency in frequencies)
        return above / max(sum(frequency.numel() for frequency in frequencies), 1)

    def plot(self, threshold: float = THRESHOLD) -> Any:
        """A matplotlib Figure: share of oscillating weights of each layer, and the distribution of all frequencies > 0.

        Raises:
            ImportError: matplotlib is missing.
        """
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError("OscillationTracker.plot needs matplotlib: pip install 'hf-ext[demo]'") from error
        shares = {name: 100 * float((f > threshold).float().mean()) for name, f in self.frequency().items()}
        moving = [f[f > 0].cpu() for f in self.frequency().values()]
        figure, (layers, weights) = pyplot.subplots(1, 2, figsize=(11, 1.5 + 0.2 * len(shares)), layout="constrained")
        layers.barh(list(shares), list(shares.values()))
        layers.invert_yaxis()
        layers.set(xlabel=f"weights with frequency > {threshold:g} (%)")
        if any(map(len, moving)):
            weights.hist(torch.cat(moving).numpy(), bins=50, log=True)
        weights.axvline(threshold, color="black", linestyle=":")
        weights.set(xlabel="oscillation frequency", ylabel="weights")
        return figure

    def state_dict(self) -> dict[str, Tensor]:
        """{"<weight>:codes", "<weight>:turn", "<weight>:frequency": tensor}: flat, as safetensors takes it."""
        return {f"{name}:{key}": value for name, seen in self._seen.items() for key, value in seen._asdict().items()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Go on from a saved state, on the devices of the weights.

        Raises:
            ValueError: weights other than this model's.
        """
        devices = {name: codes.device for name, codes in low_bit_codes(self.model)}
        saved = {name.rpartition(":")[0] for name in state_dict}
        if saved and saved != set(devices):
            raise ValueError(f"the state is of another model: only one of them has {sorted(saved ^ set(devices))[0]!r}")
        self._seen = {}
        for name in saved:
            fields = (state_dict[f"{name}:{key}"] for key in Oscillation._fields)
            self._seen[name] = Oscillation(*(field.to(devices[name], copy=True) for field in fields))


@torch.no_grad()
def low_bit_codes(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, int8 codes (rows, columns)) of every weight that StatsQ rounds, named as in `freeze`."""
    for owner, module in model.named_modules():
        if isinstance(module, QuantLinear | QuantAttention):
            config = module.switches.config
            for part, weight in module.low_bit_weights().items():
                name = ".".join(filter(None, (owner, part)))
                yield name, statsq_codes(weight, config.w_bits, config.weight_scale_coefficient)[0]


def _check_momentum(momentum: float) -> None:
    if not is_number(momentum) or not 0 < momentum <= 1:
        raise ValueError(f"momentum={momentum!r} is outside (0, 1]")


class OscillationCallback(TrainerCallback):
    """An `OscillationTracker` inside `Trainer`, as `.tracker`; checkpoints hold its state, and a resumed run goes on.

    Args:
        momentum: as for `OscillationTracker`.

    Raises:
        ValueError: momentum outside (0, 1].
    """

    FILE = "oscillation.safetensors"

    def __init__(self, momentum: float = 0.01) -> None:
        _check_momentum(momentum)
        self.momentum = momentum
        self.tracker: OscillationTracker | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any, **kwargs: Any
    ) -> None:
        if self.tracker is not None:
            self.tracker.detach()  # an earlier run may have ended with an exception
        self.tracker = OscillationTracker(model, self.momentum)
        saved = self._folder(args, state) / self.FILE
        if saved.exists():
            self.tracker.load_state_dict(load_file(saved))
        elif state.global_step:
            logger.warning(f"no {saved}: oscillation is counted from step {state.global_step} on")
        self.tracker.attach(optimizer)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            save_file(self.tracker.state_dict(), self._folder(args, state) / self.FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tracker.detach()

    @staticmethod
    def _folder(args: Any, state: Any) -> Path:
        """Where Trainer keeps the checkpoint of this step."""
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"
