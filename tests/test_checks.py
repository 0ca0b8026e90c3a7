"""What errors say of a wrong value, and how torch code is run: the two modules that every method shares."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_ext import checks, modes

# --- checks


@pytest.mark.parametrize(
    ("value", "allowed", "found"),
    [
        ("ancor", ("anchor", "sdpa"), "anchor"),
        ("ANCHOR", ("anchor", "sdpa"), "anchor"),
        ("causal_lm", ("CAUSAL_LM", "SEQ_CLS"), "CAUSAL_LM"),
        ("flase", (True, False, "bat"), False),
        ("xyz", ("anchor", "sdpa"), None),
        (None, ("none", "all"), "none"),
        (7, ("anchor",), None),
        ("anchor", (), None),
    ],
)
def test_nearest(value, allowed, found):
    assert checks.nearest(value, allowed) is found


def test_a_word_that_is_not_allowed_is_told_with_all_that_are_and_the_nearest():
    checks.check_word("layout", "shared", ("replica", "shared"))
    with pytest.raises(ValueError) as caught:
        checks.check_word("layout", "Shard", ("replica", "shared"), "or a callable")
    assert str(caught.value) == ("layout='Shard' is none of 'replica', 'shared' or a callable; did you mean 'shared'?")
    with pytest.raises(ValueError, match=r"layout=\['shared'\] is none of 'replica', 'shared'"):
        checks.check_word("layout", ["shared"], ("replica", "shared"))


def test_unknown_names_are_told_with_the_nearest():
    checks.refuse_unknown({}, ["k"], "ImportanceWeights")
    checks.refuse_unknown({"k": 1}, ["k"], "ImportanceWeights")
    with pytest.raises(
        ValueError, match=r"unknown option 'epoch' of X; known are 'k', 'epochs'; did you mean 'epochs'\?"
    ):
        checks.refuse_unknown({"k": 1, "epoch": 2}, ["k", "epochs"], "X")


@pytest.mark.parametrize("value", [1, 5, np.int64(1)])
def test_counts(value):
    checks.check_count("k", value)


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "1", None, float("nan")])
def test_no_counts(value):
    with pytest.raises(ValueError, match=r"k=.* is no integer of at least 1"):
        checks.check_count("k", value)


@pytest.mark.parametrize(
    ("value", "is_one"), [(0, True), (1.5, True), (np.float32(2), True), (True, False), ("1", False)]
)
def test_numbers(value, is_one):
    assert checks.is_number(value) is is_one


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1j, None])
def test_no_numbers(value):
    assert not checks.is_number(value)


def test_flags():
    checks.check_flag("bias", False)
    with pytest.raises(ValueError, match="bias must be True or False, not 0"):
        checks.check_flag("bias", 0)


# --- modes


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_has_its_own_mode_back(fails):
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    before = [module.training for module in model.modules()]
    try:
        with modes.evaluating(model) as same:
            assert same is model
            assert not torch.is_grad_enabled()
            assert not any(module.training for module in model.modules())
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_of_a_product_is_that_of_a_linear_layer(dtype):
    x, layer = torch.ones(2, 3, dtype=dtype), nn.Linear(3, 3, dtype=dtype)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert modes.product_dtype(x) == layer(x).dtype
            with modes.no_autocast(x):
                assert modes.product_dtype(x) == dtype == (x @ x.T).dtype


def test_a_dtype_without_autocast_can_be_given():
    x = torch.ones(2, dtype=torch.bfloat16)
    assert modes.product_dtype(x, torch.float32) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert modes.product_dtype(x, torch.float32) == torch.bfloat16


def test_a_device_without_autocast_has_none_to_switch_off():
    with modes.no_autocast(torch.ones(1, device="meta")):
        assert modes.product_dtype(torch.ones(1, device="meta")) == torch.float32


def test_a_number_beyond_floats_is_none():
    assert not checks.is_number(10**400)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", r"is not JSON \(Expecting property name"),
        (b"\xff", r"is not JSON \('utf-8' codec can't decode"),
        (b"[1]", "holds a list, not an object"),
        (b"null", "holds a NoneType, not an object"),
    ],
    ids=["cut", "bytes", "list", "null"],
)
def test_a_file_without_an_object_is_named(tmp_path, content, said):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{file} is damaged, or of something else: it {said}"):
        checks.read_object(file, "save_packed")


def test_an_object_is_read_and_its_lack_named(tmp_path):
    file = tmp_path / "config.json"
    with pytest.raises(OSError, match=f"^{tmp_path} holds no config.json; a folder written by save_packed is expected"):
        checks.read_object(file, "save_packed")
    file.write_text('{"größe": 1}', encoding="utf-8")
    assert checks.read_object(file, "save_packed") == {"größe": 1}
