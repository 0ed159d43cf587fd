"""Operations of Triton's interpreter, remembered: what an operation had the builder do, for each kind of operands.

What ``triton.language`` derives for an operation - promotions, casts, broadcasts, the type of the result - is a
function of the types of its operands and of constants alone, never of the data, and ends in a few calls of the builder,
which are what computes. So the first call of an operation for some kind of operands runs upstream's code and records
the calls of the builder; later calls of the same kind repeat those calls on their own data. What cannot be recorded
faithfully is left to upstream's code, each time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import triton.language as tl

# Kinds remembered of one operation. Scales and loop counters are part of a kind, so that new ones keep coming.
MOST_PLANS = 2000
# Elements of a constant that is kept rather than made again.
MOST_ELEMENTS = 4096
# Calls of the builder whose result is a function of their arguments: with constant arguments it is a constant.
FOLDED = {
    "create_splat", "create_make_range", "create_broadcast", "create_expand_dims", "create_int_cast", "create_si_to_fp",
    "create_ui_to_fp", "create_fp_to_si", "create_fp_to_ui", "create_fp_ext", "create_fp_trunc",
}  # fmt: skip
# Calls of the builder that are one NumPy operation on each element, which broadcasts its operands in the same way.
ELEMENTWISE = ("create_add", "create_fadd", "create_sub", "create_fsub", "create_mul", "create_fmul", "create_icmp",
               "create_fcmp", "create_and", "create_or", "create_addptr", "create_select")  # fmt: skip
CONSTANTS = frozenset({int, bool, str, type(None), tl.PropagateNan})
SIMPLE = frozenset({int, bool, float, str, type(None)})

Operation = Callable[..., Any]
Plan = Callable[[tuple[Any, ...]], Any]
Step = tuple[str, Operation, tuple[int, ...], int]


class NoPlanError(Exception):
    """This call is left to upstream's code."""


class Types:
    """One token for all equal types, found by the identity of a type."""

    def __init__(self) -> None:
        """None seen yet."""
        self.known: dict[tuple[type, str], list[Any]] = {}

    def token(self, ty: Any) -> Any:
        """An object that equal types share and others do not, noted on the type."""
        try:
            return ty.flashcore_token
        except AttributeError:
            ty.flashcore_token = self.one_of(ty).__dict__.setdefault("flashcore_token", object())
            return ty.flashcore_token

    def one_of(self, ty: Any) -> Any:
        """The first type seen that is equal to this one."""
        same_name = self.known.setdefault((type(ty), ty.name), [])
        for known in same_name:
            if known == ty:
                return known
        same_name.append(ty)
        return ty


types = Types()


def kind(operand: Any) -> Any:
    """What the meaning of an operation depends on: the type of a tensor, the value of anything else."""
    cls = operand.__class__
    if cls is tl.tensor:
        return types.token(operand.type)
    if cls in CONSTANTS:
        return cls, operand
    if cls is float:
        return cls, operand.hex()  # tells -0.0 from 0.0
    if cls is tl.constexpr:
        return cls, kind(operand.value)
    if cls is tuple or cls is list:
        if any(isinstance(part, tl.tensor) for part in operand):
            raise NoPlanError
        return cls, tuple(map(kind, operand))
    if cls is slice:
        return cls, kind(operand.start), kind(operand.stop), kind(operand.step)
    if isinstance(operand, tl.dtype):
        return tl.dtype, types.token(operand)
    raise NoPlanError


class Recorder:
    """Stands in for the builder: passes every call on, and notes it.

    Attributes:
        values: handles and other arguments, in the order of their slots; first the operands' handles.
        steps: (name, function, slots of its arguments, slot of its result), constants left out.
    """

    def __init__(self, builder: Any, handle_type: type, operands: list[Any]) -> None:
        """Nothing noted yet; ``operands``: the handles of the operation's tensors."""
        self._builder = builder
        self._handle_type = handle_type
        self.values: list[Any] = list(operands)
        self.constant = [False] * len(operands)
        self.slots = {id(handle): i for i, handle in enumerate(operands)}
        self.steps: list[Step] = []
        self.faithful = True

    def __getattr__(self, name: str) -> Any:
        """The builder's attribute; of one that computes or makes a constant, a function that notes its calls."""
        found = getattr(self._builder, name)
        if not name.startswith(("create_", "get_")):
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            result = found(*arguments, **options)
            self._note(name, found, arguments, options, result)
            return result

        return call

    def slot(self, value: Any, constant: bool) -> int:
        """Where a value is, or from now on is."""
        if isinstance(value, self._handle_type) and id(value) in self.slots:
            return self.slots[id(value)]
        self.values.append(value)
        self.constant.append(constant)
        if isinstance(value, self._handle_type):
            self.slots[id(value)] = len(self.values) - 1
        return len(self.values) - 1

    def looked_at(self, handle: Any) -> None:
        """Python has asked for the data behind a handle: unless they are constant, a record may not hold for others."""
        where = self.slots.get(id(handle))
        if where is None or not self.constant[where]:
            self.faithful = False

    def _note(self, name: str, function: Operation, arguments: Any, options: Any, result: Any) -> None:
        is_handle = isinstance(result, self._handle_type)
        if name.startswith("get_"):  # constants, and types
            if is_handle:
                self.slot(result, constant=True)
            return
        strange = [a for a in (*arguments, *options.values()) if self._is_strange(a)]
        if strange or options or not (is_handle or result is None):
            self.faithful = False
            return
        slots = tuple(self.slot(argument, constant=True) for argument in arguments)
        small = is_handle and result.data.size <= MOST_ELEMENTS
        folds = small and name in FOLDED and all(self.constant[i] for i in slots)
        where = self.slot(result, constant=folds)
        if not folds:
            self.steps.append((name, function, slots, where))

    def _is_strange(self, argument: Any) -> bool:
        """Whether an argument may carry data that the record does not know where to get from."""
        if isinstance(argument, self._handle_type):
            return id(argument) not in self.slots
        parts = argument if isinstance(argument, (list, tuple)) else (argument,)
        return not all(part.__class__ in SIMPLE or isinstance(part, tl.dtype) or _is_enum(part) for part in parts)


def _is_enum(value: Any) -> bool:
    return hasattr(type(value), "__members__")


def without_broadcasts(recorder: Recorder) -> list[Step]:
    """The steps, without broadcasts of operands that the one operation after them does as well."""
    views = {where: slots[0] for name, _, slots, where in recorder.steps if name == "create_broadcast"}
    if not recorder.steps:
        return []
    name, function, slots, where = recorder.steps[-1]
    if not name.startswith(ELEMENTWISE) or len(recorder.steps) != len(views) + 1 or not views.keys() <= set(slots):
        return recorder.steps
    sources = tuple(views.get(slot, slot) for slot in slots)
    shape = np.broadcast_shapes(*(recorder.values[slot].data.shape for slot in sources))
    return [(name, function, sources, where)] if shape == recorder.values[where].data.shape else recorder.steps


def plan_of(recorder: Recorder, operands: Sequence[Any], result: Any) -> Plan:
    """A function that repeats a record on other operands of the same kind.

    Args:
        recorder: what noted the calls of the builder.
        operands: the arguments of the operation.
        result: what the operation gave.

    Raises:
        NoPlanError: the record does not say all.
    """
    if not recorder.faithful:
        raise NoPlanError
    steps = without_broadcasts(recorder)
    names = {i: f"c{i}" for i in range(len(recorder.values))}
    tensors = [i for i, operand in enumerate(operands) if operand.__class__ is tl.tensor]
    names |= {slot: f"h{slot}" for slot in range(len(tensors))}
    lines = [f"h{slot} = operands[{i}].handle" for slot, i in enumerate(tensors)]
    functions = []
    for i, (_, function, slots, where) in enumerate(steps):
        names[where] = f"h{where}"
        lines.append(f"h{where} = f{i}({', '.join(names[slot] for slot in slots)})")
        functions.append(function)
    known: dict[str, Any] = {f"f{i}": function for i, function in enumerate(functions)}
    known |= {name: recorder.values[i] for i, name in names.items() if name[0] == "c"}
    if result is None:
        lines.append("return None")
    else:
        if result.__class__ is not tl.tensor or not (result.handle is None or id(result.handle) in recorder.slots):
            raise NoPlanError
        types.token(result.type)
        known |= {"shape": result.shape, "numel": result.numel, "type": types.one_of(result.type)}
        known |= {"dtype": result.dtype, "new": object.__new__, "tensor": tl.tensor}
        handle = "None" if result.handle is None else names[recorder.slots[id(result.handle)]]
        lines += ["made = new(tensor)", f"made.handle = {handle}", "made.shape = shape", "made.numel = numel"]
        lines += ["made.type = type", "made.dtype = dtype", "return made"]
    return compiled(tuple(sorted(known)), tuple(lines))(**known)


@functools.cache
def compiled(known: tuple[str, ...], lines: tuple[str, ...]) -> Callable[..., Plan]:
    """From the values of the names that are ``known`` to a plan of these lines; many plans differ in values only."""
    body = "".join(f"        {line}\n" for line in lines)
    source = f"def make({', '.join(known)}):\n    def plan(operands):\n{body}    return plan\n"
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    make: Callable[..., Plan] = namespace["make"]
    return make


@contextlib.contextmanager
def noticing_looks(recorder: Recorder) -> Iterator[None]:
    """Tell the recorder when Python asks a tensor of one element for its truth, or any tensor for an index."""

    def noticing(method: Operation, of_blocks: bool) -> Operation:
        def call(tensor: Any) -> Any:
            if of_blocks or tensor.handle.data.size == 1:
                recorder.looked_at(tensor.handle)
            return method(tensor)

        return call

    original = {name: getattr(tl.tensor, name) for name in ("__bool__", "__index__")}
    for name, method in original.items():
        setattr(tl.tensor, name, noticing(method, of_blocks=name == "__index__"))
    try:
        yield
    finally:
        for name, method in original.items():
            setattr(tl.tensor, name, method)


def remembering(member: Operation, module: Any) -> Operation:
    """A builtin of the language that remembers what it had the builder do."""
    plans: dict[Any, Plan | None] = {}
    tensor = tl.tensor
    semantic = module.interpreter_semantic

    def call(*operands: Any, **options: Any) -> Any:
        if options:
            given = options.pop("_semantic", None)
            if given is not None and given.builder.__class__ is Recorder:
                return member(*operands, **options, _semantic=given)
        try:
            try:  # most operands are tensors whose type is known
                key: Any = tuple([x.type.flashcore_token if x.__class__ is tensor else kind(x) for x in operands])
            except AttributeError:
                key = tuple(map(kind, operands))
            if options:
                key = (*key, tuple(options), *map(kind, options.values()))
            plan = plans[key]
        except NoPlanError:
            plan = None
        except KeyError:
            return record(key, (*operands, *options.values()), tuple(options))
        if plan is None:
            return member(*operands, **options, _semantic=semantic)
        return plan((*operands, *options.values()) if options else operands)

    def record(key: Any, values: tuple[Any, ...], names: tuple[str, ...]) -> Any:
        """Run upstream's code; ``values``: the operands, then the options of these names."""
        split = len(values) - len(names)
        operands, options = values[:split], dict(zip(names, values[split:], strict=True))
        handles = [x.handle for x in values if x.__class__ is tl.tensor]
        if len({id(handle) for handle in handles}) < len(
            handles
        ):  # x + x: which of the two a call means is not to be told
            return member(*operands, **options, _semantic=semantic)
        recorder = Recorder(module.interpreter_builder, module.TensorHandle, handles)
        with noticing_looks(recorder):
            result = member(*operands, **options, _semantic=type(semantic)(recorder))
        if len(plans) >= MOST_PLANS:
            plans.clear()
        try:
            plans[key] = plan_of(recorder, values, result)
        except NoPlanError:
            plans[key] = None
        return result

    return call
