"""The fast forms of Bone against the loops of `reference`, and the loops against the formulas written out here."""

import shutil
from itertools import product

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hf_ext.bone_adapter import affine, kernels, ops, reference

TILE, BAT, ROW = "tile", "bat", "bat_row"
LOW = [torch.bfloat16, torch.float16]
low_precision = pytest.mark.parametrize("dtype", LOW, ids=["bf16", "fp16"])
every_form = pytest.mark.parametrize("form", ops.FORMS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["whole", "chunked"])
def chunked(request, monkeypatch):
    """As small tensors are computed, and as large ones are: a few rows or tokens at a time, the last ones fewer."""
    if request.param == "chunked":
        monkeypatch.setattr(kernels, "_CPU_CHUNK", 60)


def some_block(form, r, width, out, dtype=torch.float64, scale=0.3):
    return (torch.randn(ops.block_shape(form, r, width, out), dtype=dtype) * scale).requires_grad_()


def on_activations(form, x, weight, bias, block):
    """The form around the base layer, as the layer uses it where it can."""
    if form == BAT:
        return on_weight(form, x, weight, bias, block)
    if form == TILE:
        return ops.tile_forward(F.linear(x, weight, bias), x, block)
    changed, total = ops.row_forward(x, block)
    return ops.add_tiled(F.linear(changed, weight, bias), total)


def on_weight(form, x, weight, bias, block):
    return ops.affine_linear(x, weight, bias, [(form, block)])


def values_and_gradients(y, inputs, g):
    return [y.detach(), *torch.autograd.grad(y, inputs, g)]


def assert_same(found, expected, tolerance=1e-11):
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape
        assert a.numel() == 0 or (a - b).abs().max() <= tolerance, f"number {number}"


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


# --- the reference


def entry(form, weight, b, a, k):
    """W'[a, k] by the formulas of arXiv 2409.15371 for one entry."""
    if form == TILE:
        return weight[a, k] + b[k % len(b), a]
    r = b.shape[-1]
    block = b[a // r] if form == BAT else b[k // r]
    start = k // r * r
    return weight[a, k] + sum(weight[a, start + m] * block[m, k % r] for m in range(r)) + block[a % r, k % r]


@every_form
def test_reference_is_the_formula_of_every_entry(form):
    weight, block = torch.randn(6, 9, dtype=torch.float64), some_block(form, 3, 9, 6).detach()
    new = reference.FORMS[form](weight, block)
    for a, k in product(range(6), range(9)):
        assert abs(new[a, k] - entry(form, weight, block, a, k)) < 1e-13


# --- values and gradients in float64

STEPS = {
    "tile": ([(TILE, 4)], 8, 12),
    "tile, in % r": ([(TILE, 4)], 10, 7),
    "tile, r > in": ([(TILE, 16)], 10, 6),
    "tile, r = 1": ([(TILE, 1)], 5, 3),
    "tile, r = in = out": ([(TILE, 8)], 8, 8),
    "bat": ([(BAT, 4)], 8, 24),
    "bat, r = 1": ([(BAT, 1)], 3, 2),
    "bat, r = in = out": ([(BAT, 4)], 4, 4),
    "row": ([(ROW, 4)], 24, 8),
    "row, r = 1": ([(ROW, 1)], 3, 2),
    "row, r = in = out": ([(ROW, 4)], 4, 4),
    "bat after tile after row": ([(ROW, 4), (TILE, 5), (BAT, 6)], 24, 12),
    "tile after row after bat": ([(BAT, 6), (ROW, 4), (TILE, 5)], 24, 12),
    "bat after bat": ([(BAT, 2), (BAT, 2)], 4, 4),
    "none": ([], 3, 2),
}
LEADING = {"1-D": (), "no token": (0,), "one token": (1,), "2-D": (11,), "3-D": (2, 3), "4-D": (2, 1, 3, 2)}
leading = pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)


@leading
@pytest.mark.parametrize(("steps", "width", "out"), STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("layout", ["linear", "conv1d", "function"])
def test_affine_linear_is_the_reference(steps, width, out, leading, layout, chunked):
    x = torch.randn(*leading, width, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(out, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(out, width, dtype=torch.float64)
    if layout == "conv1d":
        weight = weight.T.contiguous().T
    steps = [(form, some_block(form, r, width, out)) for form, r in steps]
    inputs = [x, bias, *(block for _, block in steps)]
    y = reference.linear(x, weight, bias, steps)
    g = torch.randn_like(y)
    expected = values_and_gradients(y, inputs, g)

    read = (lambda: weight) if layout == "function" else weight
    found = ops.affine_linear(x, read, bias, steps)
    assert_same(values_and_gradients(found, inputs, g), expected)
    with torch.no_grad():
        assert_same([ops.affine_linear(x, read, bias, steps)], expected[:1])


SINGLE = {name: (*steps[0], width, out) for name, (steps, width, out) in STEPS.items() if len(steps) == 1}


@leading
@pytest.mark.parametrize(
    ("form", "r", "width", "out"),
    [s for s in SINGLE.values() if s[0] != BAT],
    ids=[n for n in SINGLE if "bat" not in n],
)
def test_form_on_activations_is_the_reference(form, r, width, out, leading, chunked):
    x = torch.randn(*leading, width, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(out, width, dtype=torch.float64), torch.randn(out, dtype=torch.float64)
    block = some_block(form, r, width, out)
    y = reference.linear(x, weight, bias, [(form, block)])
    g = torch.randn_like(y)
    expected = values_and_gradients(y, [x, block], g)

    found = on_activations(form, x, weight, bias, block)
    assert_same(values_and_gradients(found, [x, block], g), expected)
    with torch.no_grad():
        assert_same([on_activations(form, x, weight, bias, block)], expected[:1])


@every_form
def test_strided_inputs_and_gradients(form, chunked):
    """A transposed x, and the gradient of a plain sum, which has stride 0."""
    x = torch.randn(8, 2, 5, dtype=torch.float64, requires_grad=True)
    weight, block = torch.randn(12, 8, dtype=torch.float64), some_block(form, 4, 8, 12)
    expected = torch.autograd.grad(reference.linear(x.movedim(0, -1), weight, None, [(form, block)]).sum(), [x, block])
    for function in (on_activations, on_weight):
        found = torch.autograd.grad(function(form, x.movedim(0, -1), weight, None, block).sum(), [x, block])
        assert_same(found, expected)


@pytest.mark.parametrize("leading", [(), (0,), (2, 3)], ids=["1-D", "no token", "3-D"])
@pytest.mark.parametrize(("steps", "width", "out"), STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("trained", ["weight", "conv1d", "weight and x", "weight and blocks"])
def test_a_weight_that_is_trained_gets_its_gradient(steps, width, out, leading, trained, chunked):
    x = torch.randn(*leading, width, dtype=torch.float64, requires_grad="x" in trained)
    weight = torch.randn(width, out, dtype=torch.float64, requires_grad=True)
    if trained != "conv1d":
        weight = weight.detach().T.contiguous().requires_grad_()
    w = weight.T if trained == "conv1d" else weight
    steps = [(form, some_block(form, r, width, out).requires_grad_("blocks" in trained)) for form, r in steps]
    inputs = [tensor for tensor in (x, weight, *(block for _, block in steps)) if tensor.requires_grad]
    y = reference.linear(x, w, None, steps)
    g = torch.randn_like(y)
    expected = values_and_gradients(y, inputs, g)
    assert_same(values_and_gradients(ops.affine_linear(x, w, None, steps), inputs, g), expected)


RANKED = {name: rank for name, rank in LEADING.items() if name != "no token"}
FUNCTIONS = {
    "tile_forward": lambda x, y, blocks: ops.tile_forward(y, x, blocks[TILE]),
    "row_forward": lambda x, y, blocks: ops.row_forward(x, blocks[ROW])[0],
    "row_forward, sum": lambda x, y, blocks: ops.row_forward(x, blocks[ROW])[1],
    "add_tiled": lambda x, y, blocks: ops.add_tiled(y, x[..., :4]),
    "affine_linear": lambda x, y, blocks: ops.affine_linear(
        x, torch.ones(8, 8).double(), y[..., 0].sum() + y.new_ones(8), [(BAT, blocks[BAT])]
    ),
    "affine_linear without bias": lambda x, y, blocks: ops.affine_linear(
        x, torch.ones(8, 8).double(), None, [(BAT, blocks[BAT])]
    ),
}


@pytest.mark.parametrize("leading", RANKED.values(), ids=RANKED)
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("no_grad", [False, True], ids=["", "made without gradient"])
def test_results_can_be_written_into(function, leading, no_grad, chunked):
    """As nn.Linear's can: `y += residual`, ReLU(inplace=True)."""
    x, y = (torch.randn(*leading, 8, dtype=torch.float64, requires_grad=True) for _ in "xy")
    blocks = {form: some_block(form, 4, 8, 8) for form in ops.FORMS}
    leaves = [x, y, *blocks.values()]

    def gradients(write):
        with torch.set_grad_enabled(not no_grad):
            out = function(x, y, blocks)
        residual = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape).requires_grad_()
        out = write(out, residual)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), [*leaves, residual], materialize_grads=True)]

    def in_place(out, residual):
        out += residual
        return F.relu(out, inplace=True)

    assert_same(gradients(in_place), gradients(lambda out, residual: F.relu(out + residual)))


def test_bat_and_row_form_differ_on_a_square_weight():
    weight, block = torch.randn(8, 8), torch.randn(2, 4, 4)
    assert (ops.updated_weight(BAT, weight, block) - ops.updated_weight(ROW, weight, block)).abs().max() > 0.1


@every_form
def test_inputs_are_left_alone(form):
    """float32 is not converted on the way in: what is returned must not be written into what was given."""
    weight, x, y = torch.randn(12, 8), torch.randn(3, 8, requires_grad=True), torch.randn(3, 12, requires_grad=True)
    block = some_block(form, 4, 8, 12, torch.float32)
    tensors = [weight, x, y, block]
    before = [tensor.detach().clone() for tensor in tensors]
    ops.updated_weight(form, weight, block.detach())
    ops.affine_linear(x, weight, None, [(form, block)]).sum().backward()
    on_activations(form, x, weight, None, block).sum().backward()
    ops.add_tiled(y, torch.randn(3, 4)).sum().backward()
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))


WANTED = {"x": [0], "bias": [1], "block": [2], "x and block": [0, 2], "bias and block": [1, 2]}


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
@every_form
def test_gradient_of_some_inputs_only(form, wanted):
    weight = torch.randn(12, 8, dtype=torch.float64)
    given = [torch.randn(5, 8, dtype=torch.float64), torch.randn(12, dtype=torch.float64)]
    given.append(some_block(form, 4, 8, 12).detach())
    g = torch.randn(5, 12, dtype=torch.float64)
    results = []
    for function in (reference.linear, ops.affine_linear, None):
        x, bias, block = (tensor.clone().requires_grad_(i in wanted) for i, tensor in enumerate(given))
        y = function(x, weight, bias, [(form, block)]) if function else on_activations(form, x, weight, bias, block)
        y.backward(g)
        assert [i for i, tensor in enumerate((x, bias, block)) if tensor.grad is not None] == wanted
        results.append([tensor.grad for tensor in (x, bias, block) if tensor.grad is not None])
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@every_form
def test_second_derivative_is_refused(form):
    x, block = torch.randn(3, 8, requires_grad=True), some_block(form, 4, 8, 12, torch.float32)
    for function in (on_activations, on_weight):
        y = function(form, x, torch.randn(12, 8), None, block)
        (first,) = torch.autograd.grad(y.square().sum(), block, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            first.sum().backward()


# --- refusals


WEIGHTS = {"weight": lambda weight: weight, "function": lambda weight: lambda: weight}


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("layout", WEIGHTS.values(), ids=WEIGHTS)
@every_form
def test_x_of_integers_is_refused(form, layout, dtype, autocast):
    x, weight = torch.ones(3, 8).to(dtype), torch.randn(12, 8)
    block = some_block(form, 4, 8, 12, torch.float32)
    with torch.autocast("cpu", enabled=autocast), pytest.raises(RuntimeError, match=f"x is {dtype} .* torch.float32"):
        ops.affine_linear(x, layout(weight), None, [(form, block)])
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"x is {dtype} .* torch.float32"):
        ops.affine_linear(x[:1], layout(weight), None, [(form, block)])


FLOATS = [torch.float64, torch.float32, *LOW]


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize(("of_x", "of_weight"), list(product(FLOATS, FLOATS)), ids=str)
def test_dtypes_are_refused_where_a_linear_layer_refuses_them(of_x, of_weight, autocast):
    x, weight, block = torch.randn(3, 8).to(of_x), torch.randn(12, 8).to(of_weight), torch.zeros(3, 4, 4)
    with torch.autocast("cpu", enabled=autocast):
        try:
            expected = F.linear(x, weight).dtype
        except RuntimeError:
            with pytest.raises(RuntimeError, match=f"x is {of_x} and the weight {of_weight}"):
                ops.affine_linear(x, weight, None, [(BAT, block)])
        else:
            assert ops.affine_linear(x, weight, None, [(BAT, block)]).dtype == expected


@pytest.mark.parametrize(("of_x", "of_weight"), list(product(FLOATS, FLOATS)), ids=str)
def test_a_weight_to_be_read_may_have_another_dtype(of_x, of_weight):
    x, weight, block = torch.randn(3, 8).to(of_x), torch.randn(12, 8).to(of_weight), torch.zeros(3, 4, 4)
    y = ops.affine_linear(x, lambda: weight, None, [(BAT, block)])
    assert torch.equal(y, F.linear(x, weight.to(of_x)))


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@every_form
def test_blocks_that_were_never_loaded_are_refused(form, grad):
    x, weight = torch.randn(1, 8), torch.randn(12, 8)
    block = torch.empty(ops.block_shape(form, 4, 8, 12), device="meta", requires_grad=True)
    for function in (on_activations, on_weight):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"never loaded.* meta device.* cpu"):
            function(form, x, weight, None, block)
    loaded = some_block(form, 4, 8, 12, torch.float32)
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="never loaded"):
        ops.affine_linear(x, weight, None, [(form, loaded), (form, block)])


# --- weights


@every_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW], ids=str)
def test_updated_weight_is_not_rounded_below_float32(form, dtype):
    weight, block = torch.randn(12, 8).to(dtype), some_block(form, 4, 8, 12, torch.float32).detach()
    new = ops.updated_weight(form, weight, block)
    assert new.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert error(new, reference.FORMS[form](weight.double(), block.double())) < 2e-7


@every_form
def test_restored_weight_is_the_inverse(form):
    weight, block = torch.randn(12, 8, dtype=torch.float64), some_block(form, 4, 8, 12).detach()
    assert_same([ops.restored_weight(form, ops.updated_weight(form, weight, block), block)], [weight])


@pytest.mark.parametrize("form", [BAT, ROW])
def test_singular_update_is_not_inverted(form):
    block = some_block(form, 4, 8, 8).detach()
    block[1] = torch.ones(4, 1) @ torch.ones(1, 4) / 7 - torch.eye(4)  # I + b has rank 1, and no pivot is exactly 0
    with pytest.raises(ValueError, match="singular in block 1"):
        ops.restored_weight(form, torch.randn(8, 8), block.float())


@pytest.mark.parametrize("form", [BAT, ROW])
def test_composed_is_one_after_the_other(form):
    weight = torch.randn(8, 12, dtype=torch.float64)
    blocks = [some_block(form, 4, 12, 8) for _ in range(3)]
    new = weight
    for block in blocks:
        new = reference.FORMS[form](new, block)
    g = torch.randn_like(weight)
    expected = values_and_gradients(new, blocks, g)
    one = ops.composed(blocks)
    assert_same(values_and_gradients(reference.FORMS[form](weight, one), blocks, g), expected)
    assert (one - ops.composed(blocks[::-1])).abs().max() > 1e-3


def test_block_shapes():
    assert ops.block_shape(TILE, 16, 10, 6) == (16, 6)
    assert ops.block_shape(BAT, 4, 8, 24) == (6, 4, 4)
    assert ops.block_shape(ROW, 4, 8, 24) == (2, 4, 4)


@pytest.mark.parametrize("form", [BAT, ROW])
@pytest.mark.parametrize(("width", "out"), [(60, 128), (128, 60)])
def test_r_that_divides_one_side_only_is_refused(form, width, out):
    with pytest.raises(ValueError, match=rf"r=8 .*in_features={width} .*out_features={out}.* 1, 2, 4 would"):
        ops.block_shape(form, 8, width, out)


@pytest.mark.parametrize("call", [ops.block_shape, ops.updated_weight, ops.restored_weight], ids=lambda f: f.__name__)
def test_unknown_form_is_refused(call):
    arguments = (4, 8, 8) if call is ops.block_shape else (torch.randn(8, 8), torch.randn(2, 4, 4))
    with pytest.raises(ValueError, match=r"one of tile, bat, bat_row, not 'Bat'"):
        call("Bat", *arguments)
    with pytest.raises(ValueError, match="not 'Bat'"):
        ops.affine_linear(torch.randn(8), torch.randn(8, 8), None, [("Bat", torch.randn(2, 4, 4))])


# --- precision


@low_precision
@pytest.mark.parametrize("tokens", [1, 64], ids=["one token", "64 tokens"])
@every_form
def test_low_precision_errs_at_most_twice_as_much_as_the_base_layer(form, tokens, dtype):
    width, out, r = 256, 512, 16
    weight = (torch.randn(out, width) / width**0.5).to(dtype)
    x, block = (
        torch.randn(tokens, width).to(dtype).requires_grad_(),
        some_block(form, r, width, out, torch.float32, 0.02),
    )
    g = torch.randn(tokens, out).to(dtype)
    x64, block64 = x.detach().double().requires_grad_(), block.detach().double().requires_grad_()
    exact_weight = ops.updated_weight(form, weight.double(), block64)
    exact = values_and_gradients(x64 @ exact_weight.T, [x64, block64], g.double())
    base = values_and_gradients(F.linear(x, weight), [x], g)
    allowed = [2 * error(base[0], x64 @ weight.double().T), 2 * error(base[1], g.double() @ weight.double())]

    for function in (on_activations, on_weight):
        found = values_and_gradients(function(form, x, weight, None, block), [x, block], g)
        assert [tensor.dtype for tensor in found] == [dtype, dtype, torch.float32]
        assert error(found[0], exact[0]) <= allowed[0]
        assert error(found[1], exact[1]) <= allowed[1]
        assert error(found[2], exact[2]) <= max(allowed)
        with torch.no_grad():
            assert error(function(form, x, weight, None, block), exact[0]) <= allowed[0]


@low_precision
def test_what_is_added_to_the_base_output_is_rounded_once(dtype):
    """A second rounding, or one of s, would change a tenth of the entries or more."""
    y, x = torch.randn(64, 128).to(dtype), torch.randn(64, 256).to(dtype)
    block, t = torch.randn(16, 128) / 16, torch.randn(64, 16)
    sums = x.double().view(64, 16, 16).sum(1)
    tile = (y.double() + sums @ block.double()).to(dtype)
    tiled = (y.double() + t.double().repeat(1, 8)).to(dtype)
    assert (ops.tile_forward(y, x, block) == tile).double().mean() > 0.99
    assert (ops.add_tiled(y, t) == tiled).double().mean() > 0.99


@every_form
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=["fp32 base", "bf16 base"])
def test_autocast_computes_as_it_makes_a_linear_layer_compute(form, base):
    width, out, r = 64, 128, 8
    weight, bias = (torch.randn(out, width) / width**0.5).to(base), torch.randn(out).to(base).requires_grad_()
    x, block = torch.randn(32, width, requires_grad=True), some_block(form, r, width, out, torch.float32, 0.02)
    inputs = [x, bias, block]
    g = torch.randn(32, out)
    tensors = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact_weight = ops.updated_weight(form, weight.double(), tensors[2])
    exact = values_and_gradients(tensors[0] @ exact_weight.T + tensors[1], tensors, g.double())
    for function in (on_activations, on_weight):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = function(form, x, weight, bias, block)
            assert y.dtype == F.linear(x, weight).dtype == torch.bfloat16
        found = values_and_gradients(y, inputs, g.bfloat16())
        assert [tensor.dtype for tensor in found[1:]] == [tensor.dtype for tensor in inputs]
        assert all(error(a, b) < 8e-3 for a, b in zip(found, exact, strict=True))


@every_form
def test_autocast_leaves_float64_alone_and_weights_unrounded(form):
    weight, x = torch.randn(12, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    block, g = some_block(form, 4, 8, 12), torch.randn(5, 12, dtype=torch.float64)
    expected = values_and_gradients(reference.linear(x, weight, None, [(form, block)]), [x, block], g)
    single = weight.float(), block.detach().float()
    new, old = ops.updated_weight(form, *single), ops.restored_weight(form, *single)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.updated_weight(form, *single), new)
        assert torch.equal(ops.restored_weight(form, *single), old)
        found = ops.affine_linear(x, weight, None, [(form, block)])
    assert_same(values_and_gradients(found, [x, block], g), expected)


# --- what is kept, and what is not computed


def kept_storages(function):
    """Data pointer -> bytes of what autograd keeps while `function` runs; and its result, to keep it alive."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return kept, result


def bytes_beside(kept, *tensors):
    return sum(kept.values()) - sum(kept.get(t.untyped_storage().data_ptr(), 0) for t in tensors)


@low_precision
def test_tile_form_keeps_the_slice_sums_only(dtype):
    x, y, block = (
        torch.randn(50, 64).to(dtype),
        torch.randn(50, 128).to(dtype),
        some_block(TILE, 8, 64, 128, torch.float32),
    )
    x, y = x.requires_grad_(), y.requires_grad_()
    kept, _ = kept_storages(lambda: ops.tile_forward(y, x, block))
    assert bytes_beside(kept, block) == 50 * 8 * 4
    kept, _ = kept_storages(lambda: ops.tile_forward(y, x, block.detach()))
    assert bytes_beside(kept, block) == 0


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@every_form
def test_affine_linear_keeps_its_inputs_only(form, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    x, weight = torch.randn(50, 64).to(dtype).requires_grad_(), torch.randn(128, 64).to(dtype)
    bias, block = torch.randn(128).to(dtype).requires_grad_(), some_block(form, 8, 64, 128, torch.float32)
    second = torch.zeros(3, 128, requires_grad=True)
    with torch.autocast("cpu", enabled=autocast):
        kept, _ = kept_storages(lambda: ops.affine_linear(x, weight, bias, [(form, block), (TILE, second)]))
        assert bytes_beside(kept, x, weight, block, second) == 0
        kept, _ = kept_storages(lambda: on_weight(form, x, weight.clone, bias, block))
        assert bytes_beside(kept, x, block) == 0
        kept, _ = kept_storages(lambda: on_weight(form, x, weight, bias, block.detach()))
        assert x.untyped_storage().data_ptr() not in kept


@every_form
def test_a_weight_that_is_trained_keeps_the_inputs_only(form):
    x, weight = torch.randn(50, 64), torch.randn(128, 64, requires_grad=True)
    block = some_block(form, 8, 64, 128, torch.float32).detach()
    kept, _ = kept_storages(lambda: on_weight(form, x, weight, None, block))
    assert bytes_beside(kept, x, weight, block) == 0


def test_row_form_keeps_its_inputs_only():
    x, block = torch.randn(50, 64).bfloat16().requires_grad_(), some_block(ROW, 8, 64, 64, torch.float32)
    kept, (changed, total) = kept_storages(lambda: ops.row_forward(x, block))
    assert bytes_beside(kept, x, block) == 0
    kept, _ = kept_storages(lambda: ops.add_tiled(changed, total))
    assert bytes_beside(kept) == 0


def test_a_weight_to_be_read_is_read_once_forward_and_once_backward():
    reads = []
    weight, block = torch.randn(12, 8), some_block(BAT, 4, 8, 12, torch.float32)
    y = ops.affine_linear(torch.randn(3, 8), lambda: reads.append(1) or weight, None, [(BAT, block)])
    assert len(reads) == 1
    y.sum().backward()
    assert len(reads) == 2


def test_no_updated_weight_for_few_tokens_without_gradient(monkeypatch):
    x, weight, block = torch.randn(2, 64), torch.randn(64, 64), some_block(BAT, 8, 64, 64, torch.float32)
    monkeypatch.setattr(affine, "updated", None)
    with torch.no_grad():
        on_weight(BAT, x, weight, None, block)
        with pytest.raises(TypeError):
            on_weight(BAT, x.repeat(9, 1), weight, None, block)
    with pytest.raises(TypeError):
        on_weight(BAT, x, weight, None, block)


@every_form
def test_meta_tensors(form):
    x = torch.randn(2, 3, 8, device="meta", requires_grad=True)
    weight, block = torch.randn(12, 8, device="meta"), some_block(form, 4, 8, 12, torch.float32).detach().to("meta")
    block.requires_grad_()
    y = on_activations(form, x, weight, None, block)
    assert y.shape == (2, 3, 12)
    dx, db = torch.autograd.grad(y, [x, block], torch.empty_like(y))
    assert (dx.shape, db.shape) == (x.shape, block.shape)


# --- hosts of the graph


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@every_form
def test_checkpointing_changes_no_gradient(form, reentrant, autocast):
    weight, x = torch.randn(12, 8), torch.randn(5, 8, requires_grad=True)
    block = some_block(form, 4, 8, 12, torch.float32)
    with torch.autocast("cpu", enabled=autocast):
        plain = on_activations(form, x, weight, None, block)
        again = checkpoint(on_activations, form, x, weight, None, block, use_reentrant=reentrant)
    plain.float().square().sum().backward()
    expected, x.grad, block.grad = [x.grad, block.grad], None, None
    again.float().square().sum().backward()
    assert torch.equal(again, plain)
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(block.grad, expected[1])


def chained(x, weight, bias, blocks):
    """One form after the other, each on what the one before it made."""
    for form, block in blocks.items():
        x = on_activations(form, x, weight, bias, block)
    y = ops.affine_linear(x, weight, bias, list(blocks.items())[:2])
    y += x
    return y


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_compiles_into_one_graph(autocast):
    torch.compiler.reset()
    weight, bias = torch.randn(16, 16) / 4, torch.randn(16)
    blocks = {form: some_block(form, 8, 16, 16, torch.float32) for form in ops.FORMS}
    compiled = torch.compile(chained, fullgraph=True, backend="aot_eager")
    for tokens in (6, 9):  # the second length makes the number of tokens a symbol
        assert_compiled(compiled, chained, torch.randn(2, tokens, 16), weight, bias, blocks, autocast)
    with torch.no_grad():
        x = torch.randn(1, 16)
        assert torch.equal(compiled(x, weight, bias, blocks), chained(x, weight, bias, blocks))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_a_weight_that_is_trained_compiles_into_one_graph(autocast):
    torch.compiler.reset()

    def steps_on_weight(x, weight, bias, blocks):
        return ops.affine_linear(x, weight, bias, list(blocks.items()))

    weight, bias = torch.randn(16, 16, requires_grad=True), torch.randn(16)
    blocks = {form: some_block(form, 8, 16, 16, torch.float32) for form in ops.FORMS}
    compiled = torch.compile(steps_on_weight, fullgraph=True, backend="aot_eager")
    assert_compiled(compiled, steps_on_weight, torch.randn(2, 6, 16), weight, bias, blocks, autocast)


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_compiles_with_inductor():
    torch.compiler.reset()

    def both(x, weight, bias, blocks):
        return on_activations(TILE, x, weight, bias, blocks[TILE]) + on_weight(BAT, x, weight, bias, blocks[BAT])

    weight, bias = torch.randn(16, 16) / 4, torch.randn(16)
    blocks = {form: some_block(form, 8, 16, 16, torch.float32) for form in (TILE, BAT)}
    compiled = torch.compile(both, fullgraph=True)
    assert_compiled(compiled, both, torch.randn(2, 6, 16), weight, bias, blocks, autocast=False)


def assert_compiled(compiled, function, x, weight, bias, blocks, autocast):
    inputs = [x.requires_grad_(), *blocks.values(), *([weight] if weight.requires_grad else [])]
    results = []
    for run in (function, compiled):
        with torch.autocast("cpu", enabled=autocast):
            y = run(x, weight, bias, blocks)
        results.append(values_and_gradients(y, inputs, torch.ones_like(y)))
    for expected, found in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        assert error(found, expected.double()) < 1e-5


@pytest.mark.parametrize("tokens", [1, 2, 64], ids=["one token", "few tokens", "many tokens"])
def test_the_first_token_of_each_row_of_a_batch(tokens):
    """x[:, 0], as a pooler takes it: rows that do not lie one after the other."""
    weight, block = torch.randn(12, 16).double(), torch.randn(3, 4, 4).double()
    x = torch.randn(tokens, 5, 16).double()[:, 0]
    with torch.no_grad():
        y = ops.affine_linear(x, weight, None, [("bat", block)])
    torch.testing.assert_close(y, x @ reference.bat(weight, block).T, rtol=0, atol=1e-11)
