"""Vector registers for numba: a row of numbers, one a lane, that is loaded, computed with and stored as a whole.

Left to itself, the compiler turns loops over lanes into vector code with tests for overlapping arrays and a round trip
to memory for every operation: a third to a fifth of the speed. A row is 128 bytes, 16 numbers in float64 and 32 in
float32, whatever the width of the registers here: the compiler splits it. Every operation acts on each lane alone, so
a lane's result is the same whatever its neighbours hold.
"""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, overload, register_model

ROW_BYTES = 128


def lanes(dtype: Any) -> int:
    """How many numbers of this dtype a row holds."""
    return ROW_BYTES // np.dtype(dtype).itemsize


def rows(count: int, dtype: Any) -> np.ndarray:
    """Zeros (count, lanes), each row on cache lines of its own."""
    memory = np.zeros((count + 1) * ROW_BYTES, np.uint8)
    start = -memory.ctypes.data % ROW_BYTES
    return memory[start : start + count * ROW_BYTES].view(dtype).reshape(count, lanes(dtype))


class Row(types.Type):
    """A row of lanes of this dtype, as numba knows it."""

    def __init__(self, dtype: Any) -> None:
        self.dtype, self.count = dtype, 8 * ROW_BYTES // dtype.bitwidth
        super().__init__(name=f"Row({dtype})")


@register_model(Row)
class _RowModel(models.PrimitiveModel):
    def __init__(self, manager: Any, row: Row) -> None:
        number = manager.lookup(row.dtype).get_value_type()
        super().__init__(manager, row, ir.VectorType(number, row.count))


@intrinsic
def load(typing: Any, array: Any, index: Any) -> Any:
    """Row `index` of a contiguous array (rows, lanes) made by `rows`."""
    row = Row(array.dtype)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(_pointer(context, builder, signature.args[0], row, *args))
        value.align = ROW_BYTES // 2
        return value

    return row(array, types.intp), code


@intrinsic
def store(typing: Any, array: Any, index: Any, row: Any) -> Any:
    """Write row `index` of a contiguous array (rows, lanes) made by `rows`."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        done = builder.store(args[2], _pointer(context, builder, signature.args[0], row, *args[:2]))
        done.align = ROW_BYTES // 2
        return context.get_dummy_value()

    return types.none(array, types.intp, row), code


def _pointer(context: Any, builder: Any, array_type: Any, row: Row, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    first = builder.mul(index, ir.Constant(index.type, row.count))
    return builder.bitcast(builder.gep(data, [first]), context.get_value_type(row).as_pointer())


@intrinsic
def zero_row(typing: Any, array: Any) -> Any:
    """A row of zeros, of the array's dtype."""
    row = Row(array.dtype)
    return row(array), lambda context, builder, signature, args: ir.Constant(context.get_value_type(row), None)


@intrinsic
def above(typing: Any, row: Any, bound: Any) -> Any:
    """The row with 0 in every lane that is not above `bound`."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = context.get_value_type(row)
        number = context.cast(builder, args[1], signature.args[1], row.dtype)
        bounds = builder.insert_element(ir.Constant(kind, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
        everywhere = ir.Constant(ir.VectorType(ir.IntType(32), row.count), None)
        bounds = builder.shuffle_vector(bounds, bounds, everywhere)
        return builder.select(builder.fcmp_ordered(">", args[0], bounds), args[0], ir.Constant(kind, None))

    return row(row, bound), code


def _define(operation: Callable[[Any, Any], Any], instruction: str) -> None:
    @intrinsic
    def compute(typing: Any, left: Any, right: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            # A product may be fused into the sum that takes it, never reordered.
            return getattr(builder, instruction)(*args, flags=["contract"])

        return left(left, left), code

    @overload(operation)
    def for_rows(left, right):  # numba compares the parameters, annotations too
        if isinstance(left, Row) and left == right:
            return lambda left, right: compute(left, right)


for _operation, _instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul")):
    _define(_operation, _instruction)


@intrinsic
def add_atomically(typing: Any, array: Any, index: Any, number: Any) -> Any:
    """array[index] += number for an array that several threads add to."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        builder.atomic_rmw("add", builder.gep(data, [args[1]]), args[2], "monotonic")
        return context.get_dummy_value()

    return types.none(array, types.intp, types.int64), code
