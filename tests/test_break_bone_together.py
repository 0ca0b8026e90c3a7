"""Several Bone adapters on one model, through any sequence of what PEFT allows, against weights kept apart."""

import copy
import warnings
from typing import Any

import pytest
import torch
from bone_native import TWO_FORMS, by_form, ours_only
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor, nn

from hf_ext.bone_adapter import BoneConfig, reference

LAYERS, NAMES = ("one", "two"), ("x", "y", "z")
KINDS = {"tile": (True, 5), "bat": ("bat", 4), "bat_row": ("bat_row", 2)}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(8, 12, dtype=torch.float64), nn.Linear(12, 8, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


class Together:
    """A model with adapters, and beside it what the paper makes of the weights: in the order of the adapters."""

    def __init__(self, form: str) -> None:
        self.base, self.x = Net(), torch.linspace(-1, 2, 40, dtype=torch.float64).view(5, 8)
        self.blocks: dict[str, dict[str, tuple[str, Tensor]]] = {}
        self.active, self.merged = ["x"], []
        self.model = get_peft_model(copy.deepcopy(self.base), self._config(form), adapter_name="x").eval()
        self._fill("x", form)

    @staticmethod
    def _config(form: str) -> BoneConfig:
        init_weights, r = KINDS[form]
        return BoneConfig(r=r, init_weights=init_weights, target_modules=list(LAYERS))

    def _fill(self, name: str, form: str) -> None:
        self.blocks[name] = {}
        for number, layer in enumerate(LAYERS):
            block = self.model.base_model.model.get_submodule(layer).bone_block[name]
            generator = torch.Generator().manual_seed(10 * NAMES.index(name) + number)
            block.data = 0.2 * torch.randn(block.shape, generator=generator, dtype=torch.float64)
            self.blocks[name][layer] = form, block.detach().clone()

    # --- what may be done

    def add(self, name: str, form: str) -> None:
        if name not in self.blocks and not self.merged:
            self.model.add_adapter(name, self._config(form))
            self._fill(name, form)

    def activate(self, names: list[str]) -> None:
        """PEFT unmerges before it."""
        self.merged = []
        self.active = [name for name in names if name in self.blocks] or self.active
        self.model.base_model.set_adapter(self.active)

    def merge(self, safe: bool) -> None:
        self.model.merge_adapter(safe_merge=safe)
        self.merged += [name for name in self.active if name not in self.merged]

    def unmerge(self) -> None:
        self.model.unmerge_adapter()
        self.merged = []

    def delete(self, name: str) -> None:
        if name in self.blocks and name not in [*self.active, *self.merged]:
            self.model.delete_adapter(name)
            del self.blocks[name]

    def disable(self) -> None:
        """Inside it is the base, to the bit; a merged model is unmerged by it, as with LoRA."""
        with self.model.disable_adapter():
            assert torch.equal(self.model(self.x), self.base(self.x))
        self.merged = []

    # --- what has to hold

    def check(self) -> None:
        expected = copy.deepcopy(self.base)
        for layer in LAYERS:
            linear = getattr(expected, layer)
            for name in self.merged or self.active:
                form, block = self.blocks[name][layer]
                linear.weight.data = reference.FORMS[form](linear.weight.data, block)
        torch.testing.assert_close(self.model(self.x), expected(self.x), rtol=1e-10, atol=1e-10)
        if not self.merged:
            for layer in LAYERS:
                weight = self.model.base_model.model.get_submodule(layer).base_layer.weight
                assert torch.equal(weight, getattr(self.base, layer).weight), "an unmerged base is the base to the bit"


FORMS = st.sampled_from(sorted(KINDS))
STEPS = st.one_of(
    st.tuples(st.just("add"), st.sampled_from(NAMES), FORMS),
    st.tuples(
        st.just("activate"),
        st.permutations(NAMES).flatmap(lambda names: st.sampled_from([names, names[:2], names[:1]])),
    ),
    st.tuples(st.just("merge"), st.booleans()),
    st.tuples(st.just("unmerge")),
    st.tuples(st.just("delete"), st.sampled_from(NAMES)),
    st.tuples(st.just("disable")),
)


@TWO_FORMS
@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(FORMS, FORMS, st.lists(STEPS, min_size=1, max_size=9))
def test_any_sequence_of_steps_computes_what_the_paper_says(first, second, steps):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing to merge, nothing to unmerge
        together = Together(first)
        together.add("y", second)
        together.check()
        for name, *arguments in steps:
            getattr(together, name)(*arguments)
            together.check()


@pytest.mark.parametrize("form", by_form(sorted(KINDS)))
def test_models_in_one_process_know_nothing_of_each_other(form):
    """Two with adapters of one name and one config object, one of them merged."""
    with torch.no_grad():
        one, other = Together(form), Together(form)
        other.model.base_model.model.one.bone_block["x"].data.neg_()
        one.merge(safe=True)
        one.check()
        unlike: Any = other.model(other.x) - one.model(one.x)
        assert unlike.abs().min() > 1e-6


@ours_only("whose unmerging subtracts, and drifts")
@pytest.mark.parametrize("form", sorted(KINDS))
def test_unmerging_one_of_two_models_brings_its_own_base_back(form):
    with torch.no_grad():
        one, other = Together(form), Together(form)
        one.merge(safe=True)
        other.merge(safe=False)
        one.unmerge()
        one.check()
        other.check()
