"""Triton's CPU interpreter, made faster without touching what it computes.

An operation of a kernel costs the interpreter some fifty microseconds of Python, and NumPy two or three of them.
``save_time`` has the language remember what it derived from types (``interpreter_plans``), prepare a launch from what
the first launch found out, and take shorter ways to the results of the commonest calls. It does so for the versions of
Triton that it is known to hold for; elsewhere the interpreter stays as it is, slower and right.
``tests/test_interpreter.py`` compares the bits of kernels with and without it.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import numpy as np
import triton
import triton.language as tl

from flashcore.fast.interpreter_plans import Operation, remembering

KNOWN_VERSIONS = ("3.9.",)


class Language:
    """Prepares ``triton.language`` for a launch as upstream does, but finds out only once what is to be replaced."""

    def __init__(self, module: Any) -> None:
        """Nothing is replaced yet; ``module``: triton.runtime.interpreter."""
        self.module = module
        self.original = module._patch_lang
        self.remembered: dict[Any, Operation] = {}
        self.replaced: dict[tuple[int, ...], list[tuple[Any, str, Any]]] = {}
        self.prepared: set[int] = set()  # namespaces, during the launch

    def patch_attr(self, obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        """Replace a builtin by one that remembers."""
        del builder
        if member not in self.remembered:
            self.remembered[member] = remembering(member, self.module)
        scope.set_attr(obj, name, self.remembered[member])

    def patch_lang(self, fn: Any) -> Any:
        """Prepare the language for a kernel, or for a function that it calls."""
        namespace = id(fn.__globals__)
        if namespace in self.prepared:
            return None
        if not self.prepared and "__signature__" not in fn.__dict__:
            fn.__signature__ = inspect.signature(fn)  # upstream asks for it several times a launch
        outermost = not self.prepared
        languages = tuple(id(value) for value in fn.__globals__.values() if value is tl or value is tl.core)
        if languages in self.replaced:
            scope = self.module._LangPatchScope()
            for obj, name, value in self.replaced[languages]:
                scope.set_attr(obj, name, value)
        else:
            scope = self.original(fn)
            names = dict.fromkeys((obj, name) for obj, name, _ in scope._changes)
            self.replaced[languages] = [(obj, name, obj.__dict__[name]) for obj, name in names]
        self.prepared.add(namespace)
        return LaunchScope(scope, self.prepared) if outermost else scope


class LaunchScope:
    """Ends the launch: restores the language, and forgets what was prepared for it."""

    def __init__(self, scope: Any, prepared: set[int]) -> None:
        """``prepared``: to be emptied at the end."""
        self.scope = scope
        self.prepared = prepared

    def restore(self) -> None:
        """Called by upstream, whatever became of the launch."""
        self.prepared.clear()
        self.scope.restore()


def lean_builder(module: Any) -> None:
    """Give the builder shorter ways to upstream's results for what kernels do most."""
    builder, handle_type = module.interpreter_builder, module.TensorHandle
    numpy_dtype, binary_op, ternary_op = module._get_np_dtype, builder.binary_op, builder.ternary_op
    cast_impl, create_splat = builder.cast_impl, builder.create_splat
    numpy_dtypes: dict[str, Any] = {}
    widths: dict[str, int] = {}
    boolean = np.dtype(bool)
    new_object: Any = object.__new__

    def handle(data: Any, dtype: Any) -> Any:
        """A TensorHandle whose data are known to fit its type."""
        made = new_object(handle_type)
        made.data, made.dtype, made.attr = data, dtype, {}
        return made

    def lean_numpy_dtype(ty: Any) -> Any:
        found = numpy_dtypes.get(ty.name)
        if found is None:
            found = numpy_dtypes[ty.name] = numpy_dtype(ty)
        return found

    def lean_binary_op(lhs: Any, rhs: Any, op: Any) -> Any:
        dtype = lhs.data.dtype
        if dtype is boolean:
            return binary_op(lhs, rhs, op)
        data = op(lhs.data, rhs.data)
        if data.dtype is dtype or data.dtype is boolean:
            return handle(data, lhs.dtype.scalar)
        return binary_op(lhs, rhs, op)

    def lean_ternary_op(lhs: Any, rhs: Any, other: Any, op: Any) -> Any:
        data = op(lhs.data, rhs.data, other.data)
        if data.dtype is other.data.dtype:
            return handle(data, other.dtype.scalar)
        return ternary_op(lhs, rhs, other, op)

    def lean_expand_dims(arg: Any, axis: int) -> Any:
        shape = arg.data.shape
        return handle(arg.data.reshape((*shape[:axis], 1, *shape[axis:])), arg.dtype.scalar)

    def lean_cast(src: Any, ty: Any) -> Any:
        source, target = src.dtype.scalar, ty.scalar
        if source.name == "bf16" or target.name == "bf16":
            return cast_impl(src, ty)
        return handle(src.data.astype(lean_numpy_dtype(target)), target)

    def lean_splat(ty: Any, arg: Any) -> Any:
        data = arg.data
        if data.shape != (1,) or data.dtype is not lean_numpy_dtype(arg.dtype) or arg.dtype.is_block():
            return create_splat(ty, arg)
        return handle(data.repeat(ty.numel).reshape(ty.shape), arg.dtype.scalar)

    def lean_addptr(ptr: Any, offset: Any) -> Any:
        found = widths.get(ptr.dtype.name)
        if found is None:
            found = widths[ptr.dtype.name] = max(1, ptr.get_element_ty().primitive_bitwidth // 8)
        return handle(ptr.data + found * offset.data.astype(np.uint64), ptr.dtype)

    module._get_np_dtype = lean_numpy_dtype
    builder.binary_op = lean_binary_op
    builder.ternary_op = lean_ternary_op
    builder.create_expand_dims = lean_expand_dims
    builder.cast_impl = lean_cast
    builder.create_splat = lean_splat
    builder.create_addptr = lean_addptr


def save_time() -> None:
    """Make kernels that run in the interpreter faster; a second call does nothing."""
    from triton.runtime import interpreter

    module: Any = interpreter
    if hasattr(module, "flashcore_saves_time") or not triton.__version__.startswith(KNOWN_VERSIONS):
        return
    language = Language(module)
    module._patch_attr = language.patch_attr
    module._patch_lang = language.patch_lang
    # Overflow checks of integer sums feed device_assert, which the interpreter ignores: they only cost time.
    lean_builder(module)
    builder = module.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    module.flashcore_saves_time = True
