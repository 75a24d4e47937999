"""Makes Triton's interpreter (3.6 to 3.9) right for bf16, and fast enough for top-k.

It keeps bf16 as the bit pattern in a uint16. Upstream, arithmetic and tl.dot then work on the patterns as if they were
numbers, without a word, and fp32 -> bf16 truncates where hardware rounds to nearest even. Here casts are right, dot
widens its operands, and all other arithmetic on bf16 raises, so that a kernel must write `.to(tl.float32)`.

Reductions with another function than sum, max or min go element by element through Python; those with xor are replaced
by numpy's. tl.topk, a network of them, takes 0.1 s even so: a sort by numpy takes its place, and
`test_interpreter_repair.py` compares the two.
"""

from __future__ import annotations

import functools
import inspect

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter


def widen(patterns: np.ndarray) -> np.ndarray:
    """fp32 of bf16 patterns."""
    return np.left_shift(patterns, 16, dtype=np.uint32).view(np.float32)


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """bf16 patterns of fp32 values, to nearest, ties to even; NaN stays NaN."""
    bits = np.atleast_1d(np.ascontiguousarray(values, dtype=np.float32)).view(np.uint32).reshape(np.shape(values))
    odd = (bits >> 16) & 1
    rounded = (bits + np.uint32(0x7FFF) + odd) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def repair_loops() -> None:
    """3.6 with numpy 2.4 or later: `range` of a runtime argument raises, since int() refuses an array of one value."""
    original = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


def look_up_once() -> None:
    """What is looked up anew in each call, of a kernel's own functions too: a sixth of the time."""
    found, original = {}, interpreter._get_np_dtype
    scalar_dtype = functools.cache(original)

    def patch_builtin(package, builder, scope):
        if package not in found:  # as imported: what is patched is no built-in
            found[package] = [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
        for name in found[package]:
            if tl.core.is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, builder, scope)

    def np_dtype(dtype):
        return original(dtype) if isinstance(dtype.scalar, tl.pointer_type) else scalar_dtype(dtype.scalar)

    interpreter._patch_builtin, interpreter._get_np_dtype = patch_builtin, np_dtype


def is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def repair() -> None:
    """Change the interpreter of this process; a second call changes nothing."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "repaired", False):
        return
    dot, cast, binary, unary = builder.create_dot, builder.cast_impl, builder.binary_op, builder.unary_op
    reduce = interpreter.ReduceOps.apply_impl

    def as_fp32(handle):
        return interpreter.TensorHandle(widen(handle.data), tl.float32) if is_bf16(handle) else handle

    def create_dot(self, a, b, *rest):
        return dot(self, as_fp32(a), as_fp32(b), *rest)

    def cast_impl(self, source, target, *rest):
        if is_bf16(source) and target.scalar != tl.bfloat16:
            return cast(self, as_fp32(source), target, *rest) if target.scalar != tl.float32 else as_fp32(source)
        if target.scalar == tl.bfloat16 and not is_bf16(source):
            if source.dtype.scalar != tl.float32:
                raise NotImplementedError(f"{source.dtype} to bf16: go by way of fp32")
            return interpreter.TensorHandle(round_to_bf16(source.data), tl.bfloat16)
        return cast(self, source, target, *rest)

    def refuse(kind, original):
        def operation(self, first, *rest):
            if is_bf16(first):
                raise NotImplementedError(f"{kind} on bf16 would work on its bit patterns: write .to(tl.float32)")
            return original(self, first, *rest)

        return operation

    def apply_impl(self, operands):
        if self.combine_fn is tl.standard._xor_combine:
            data = np.bitwise_xor.reduce(operands[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
            return self.to_tensor(data, operands[0].dtype)
        return reduce(self, operands)

    def topk(x, k, dim=None, descending=True):
        ordered = np.sort(x.handle.data, axis=-1)
        count = getattr(k, "value", k)
        data = np.ascontiguousarray(ordered[..., ::-1][..., :count] if descending else ordered[..., :count])
        scalar = x.dtype.scalar
        return tl.core.tensor(interpreter.TensorHandle(data, scalar), tl.block_type(scalar, list(data.shape)))

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    builder.binary_op, builder.unary_op = refuse("arithmetic", binary), refuse("a function", unary)
    # Upstream's own lambdas call cast_impl already; create_fp_to_fp (an explicit rounding mode) does not.
    builder.create_fp_to_fp = lambda self, source, target, rounding: self.cast_impl(source, target)
    interpreter.ReduceOps.apply_impl = apply_impl
    tl.topk = topk
    repair_loops()
    look_up_once()
    builder.repaired = True


if not triton.knobs.runtime.interpret:
    raise RuntimeError("set TRITON_INTERPRET=1 before anything imports triton")
