"""Operations of Triton's interpreter, remembered: what an operation had the builder do, for each kind of operands.

What ``triton.language`` derives for an operation - promotions, casts, broadcasts, the type of the result - is a
function of the types of its operands and of constants alone, never of the data, and ends in a few calls of the builder,
which are what computes. So the first call of an operation for some kind of operands runs upstream's code and records
the calls of the builder; later calls of the same kind repeat those calls on their own data. What cannot be recorded
faithfully is left to upstream's code, each time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
CONSTANTS = frozenset({int, bool, str, type(None), tl.PropagateNan})
SIMPLE = frozenset({int, bool, float, str, type(None)})

Operation = Callable[..., Any]
new_object: Any = object.__new__


class NoPlanError(Exception):
    """This call is left to upstream's code."""


class Types:
    """One object for all equal types, and a token of it that is quick to compare."""

    def __init__(self) -> None:
        """None seen yet."""
        self.known: dict[tuple[type, str], list[Any]] = {}

    def token(self, ty: Any) -> Any:
        """An object that equal types share and others do not."""
        found: Any = ty.__dict__.get("flashcore_token")
        if found is None:
            found = self.one_of(ty).__dict__.setdefault("flashcore_token", object())
            ty.flashcore_token = found
        return found

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
        try:
            return operand.type.flashcore_token
        except AttributeError:
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
        steps: (function, slots of its arguments, slot of its result), constants left out.
    """

    def __init__(self, builder: Any, handle_type: type, operands: list[Any]) -> None:
        """Nothing noted yet; ``operands``: the handles of the operation's tensors."""
        self._builder = builder
        self._handle_type = handle_type
        self.values: list[Any] = list(operands)
        self.constant = [False] * len(operands)
        self.slots = {id(handle): i for i, handle in enumerate(operands)}
        self.steps: list[tuple[Operation, tuple[int, ...], int]] = []
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
            self.steps.append((function, slots, where))

    def _is_strange(self, argument: Any) -> bool:
        """Whether an argument may carry data that the record does not know where to get from."""
        if isinstance(argument, self._handle_type):
            return id(argument) not in self.slots
        parts = argument if isinstance(argument, (list, tuple)) else (argument,)
        return not all(part.__class__ in SIMPLE or isinstance(part, tl.dtype) or _is_enum(part) for part in parts)


def _is_enum(value: Any) -> bool:
    return hasattr(type(value), "__members__")


class Plan:
    """What the builder is to do for one kind of operands."""

    def __init__(self, recorder: Recorder, num_operands: int, result: Any) -> None:
        """Take over a record.

        Raises:
            NoPlanError: the record does not say all.
        """
        if not recorder.faithful:
            raise NoPlanError
        order = [i for i in range(num_operands, len(recorder.values)) if recorder.constant[i]]
        self.constants = [recorder.values[i] for i in order]
        place = {i: i for i in range(num_operands)}
        place |= {i: num_operands + j for j, i in enumerate(order)}
        self.steps: list[tuple[Operation, tuple[int, ...]]] = []
        for function, slots, where in recorder.steps:
            place[where] = num_operands + len(order) + len(self.steps)
            self.steps.append((function, tuple(place[i] for i in slots)))
        self.result: int | None = None
        if result is None:
            return
        if result.__class__ is not tl.tensor or id(result.handle) not in recorder.slots:
            raise NoPlanError
        self.result = place[recorder.slots[id(result.handle)]]
        types.token(result.type)
        self.shape, self.numel, self.dtype = result.shape, result.numel, result.dtype
        self.type = types.one_of(result.type)

    def run(self, handles: list[Any]) -> Any:
        """Do it on other data of the same kind."""
        handles += self.constants
        for function, slots in self.steps:
            handles.append(function(*[handles[i] for i in slots]))
        if self.result is None:
            return None
        made = new_object(tl.tensor)
        made.handle = handles[self.result]
        made.shape = self.shape
        made.numel = self.numel
        made.type = self.type
        made.dtype = self.dtype
        return made


def remembering(member: Operation, module: Any) -> Operation:
    """A builtin of the language that remembers what it had the builder do."""
    plans: dict[Any, Plan | None] = {}
    semantic = module.interpreter_semantic

    def call(*operands: Any, **options: Any) -> Any:
        if options:
            given = options.pop("_semantic", None)
            if given is not None and given.builder.__class__ is Recorder:
                return member(*operands, **options, _semantic=given)
        try:
            key: Any = tuple(map(kind, operands))
            if options:
                key = key, tuple(options), tuple(map(kind, options.values()))
            plan = plans[key]
        except NoPlanError:
            plan = None
        except KeyError:
            return record(key, operands, options)
        if plan is None:
            return member(*operands, **options, _semantic=semantic)
        handles = [x.handle for x in operands if x.__class__ is tl.tensor]
        if options:
            handles += [x.handle for x in options.values() if x.__class__ is tl.tensor]
        return plan.run(handles)

    def record(key: Any, operands: Any, options: Any) -> Any:
        handles = [x.handle for x in (*operands, *options.values()) if x.__class__ is tl.tensor]
        distinct = len({id(handle) for handle in handles}) == len(handles)
        if not distinct:  # x + x: which of the two a step means is not to be told
            return member(*operands, **options, _semantic=semantic)
        recorder = Recorder(module.interpreter_builder, module.TensorHandle, handles)
        result = member(*operands, **options, _semantic=type(semantic)(recorder))
        try:
            plan = Plan(recorder, len(handles), result)
        except NoPlanError:
            plan = None
        if len(plans) >= MOST_PLANS:
            plans.clear()
        plans[key] = plan
        return result

    return call
