"""Run a case on a subject, recording everything a law may ask about.

The tensors a kernel is given lie in guard regions; what the contract says is not read is NaN; what it allocates is
filled with NaN before it gets it. After every call the whole of every buffer is compared with what it should hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from properties import device as devices
from properties import layouts, subjects
from properties.assertions import CONTEXT_LOST, BitsArray, Got, LawViolation, describe
from properties.capabilities import NotOffered
from properties.case import Case
from properties.guards import Guarded, bits_of, poison, torch_dtype
from properties.schedule import PlannedStep, Problem, problem
from properties.subjects import Subject


@dataclass(frozen=True)
class Finding:
    """Something wrong that is not a matter of numbers.

    Attributes:
        kind: "raised", "overflow", "result", "lengths", "append", "cache", "guard", "inputs".
        sentence: what is wrong.
        detail: where.
    """

    kind: str
    sentence: str
    detail: str


@dataclass(eq=False)
class StepRun:
    """One call and what came of it.

    Attributes:
        plan: what it was given.
        got: output and log-sum-exp; None if the call raised or returned something else.
        raised: what it raised.
        seq_lens: lengths of the returned cache, as far as it tells them.
        k_bits, v_bits: [batch, num_kv_heads, capacity, head_dim], the returned cache's buffers after the call.
        findings: everything wrong that is not a matter of numbers.
    """

    plan: PlannedStep
    got: Got | None = None
    raised: Exception | None = None
    seq_lens: tuple[int, ...] | None = None
    k_bits: BitsArray | None = None
    v_bits: BitsArray | None = None
    findings: list[Finding] = field(default_factory=list)


@dataclass(eq=False)
class Run:
    """A case run from its first call to its last, or to the first that left nothing to go on with.

    Attributes:
        subject: what ran it.
        problem: the arrays it ran on.
        steps: the calls made.
    """

    problem: Problem
    subject: Subject
    steps: list[StepRun] = field(default_factory=list)

    @property
    def case(self) -> Case:
        """The case."""
        return self.problem.case

    @property
    def is_transformed(self) -> bool:
        """The case alone does not say what was run."""
        return self.problem.is_transformed or self.subject.is_disturbed

    @property
    def outputs(self) -> list[Got]:
        """What the calls returned, in order; for laws that compare two runs.

        Raises:
            LawViolation: a call that should have returned did not.
        """
        for step in self.steps:
            for finding in step.findings:
                if finding.kind in ("raised", "overflow", "result"):
                    raise violation(self.case, step, finding, self.is_transformed)
        return [step.got for step in self.steps if step.got is not None]


def violation(case: Case, step: StepRun, finding: Finding, is_transformed: bool = False) -> LawViolation:
    """The failure that a finding is; of a transformed run it names no case, because none shows it alone."""
    report = f"{finding.sentence}\n  {finding.detail}\n  case: {describe(case, step.plan.index)}"
    return LawViolation(finding.kind, report, None if is_transformed else case)


def run(what: Case | Problem, subject: Subject | None = None, *, poisoned: bool = True) -> Run:
    """Run every call of a case.

    Args:
        what: a case, or a problem whose arrays are no longer those of its case.
        subject: default the active one.
        poisoned: whether what the contract says is not read is NaN. False: padding holds ordinary numbers, unused
            slots and fresh memory zeros; by the contract this changes no bit of any result. A subject that does not
            promise that never gets NaN there.

    Raises:
        NotOffered: the subject does not take such a case, or its adapter says so of a call.
    """
    subject = subjects.active() if subject is None else subject
    given = problem(what) if isinstance(what, Case) else what
    case = given.case
    result = Run(given, subject)
    subject.capabilities.require(case)
    poisoned = poisoned and subject.capabilities.keeps("NaN in unread memory")
    session = _Session(given, subject, devices.current(), poisoned)
    with session.allocating(), subject.forced(case):
        for planned in given.steps:
            step = StepRun(planned)
            result.steps.append(step)
            session.call(step)
            if any(finding.kind in ("raised", "overflow", "result") for finding in step.findings):
                break
    return result


@dataclass(eq=False)
class _Cache:
    """A cache as the caller holds it: the object to pass on, and the buffers behind it."""

    handle: Any
    k: Guarded
    v: Guarded
    knows_lengths: bool

    def lengths(self) -> list[int]:
        """What the object says of its rows; a call must leave it as it is."""
        return list(self.handle.seq_lens.tolist()) if self.knows_lengths else []


class _Session:
    """The caller's side of one run: its tensors, caches and what it knows about their bytes."""

    def __init__(self, given: Problem, subject: Subject, device: str, poisoned: bool) -> None:
        self.problem = given
        self.case = case = given.case
        self.subject = subject
        self.device = device
        self.poisoned = poisoned
        self.dtype = torch_dtype(case.dtype)
        self.index_dtype = torch.int64 if case.seed % 2 else torch.int32
        self.fresh = poison(case.dtype, "fresh") if poisoned else 0
        self.buffers: list[Guarded] = []
        self.allocated: list[Guarded] = []
        self.caches: list[_Cache | None] = [self._initial()]
        self.stored: _Cache | None = None

    # -- memory ------------------------------------------------------------------------------------------------

    @contextmanager
    def allocating(self) -> Iterator[None]:
        """Whatever the subject allocates meanwhile is guarded and filled."""
        with ExitStack() as stack:
            for module in self.subject.allocators:
                stack.callback(setattr, module, "empty", module.empty)
                module.empty = self._empty  # type: ignore[attr-defined]
                if hasattr(module, "unused"):
                    stack.callback(setattr, module, "unused", module.unused)
                    module.unused = self._unused  # type: ignore[attr-defined]
            yield

    def _empty(self, shape: Any, dtype: torch.dtype, device: Any) -> torch.Tensor:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        names = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
        fill = poison(names.get(dtype, "float32"), "fresh") if self.poisoned and dtype.itemsize > 1 else 0
        name = f"the kernel's allocation {len(self.allocated)} {list(shape)}"
        guarded = Guarded.allocate(name, shape, dtype, device, fill=fill)
        self.allocated.append(guarded)
        return guarded.tensor

    def _unused(self, dtype: torch.dtype, device: Any) -> torch.Tensor:
        """One element amid guards, a guard itself: whoever follows a pointer that is not in use is found out."""
        guarded = Guarded.allocate("a pointer that the call does not use", (0,), dtype, device)
        self.allocated.append(guarded)
        return guarded.storage.view(dtype)[guarded.guard : guarded.guard + 1]

    def _index(self, name: str, values: tuple[int, ...]) -> Guarded:
        bits = np.array(values, dtype=np.int64).astype(f"i{self.index_dtype.itemsize}")
        return Guarded.holding(name, bits.view(f"u{bits.itemsize}"), self.index_dtype, self.device)

    def _initial(self) -> _Cache | None:
        given = self.problem.initial
        if given is None:
            return None
        unwritten = np.arange(self.case.capacity) >= np.array(given.seq_lens, np.int64)[:, None]
        buffers = []
        for name, bits in (("k_cache", given.key.copy()), ("v_cache", given.value.copy())):
            if self.poisoned:
                np.moveaxis(bits, 2, 1)[unwritten] = poison(self.case.dtype, "unused")
            strides = layouts.strides(bits.shape, self.case.cache_layout, of_values=name == "v_cache")
            buffers.append(Guarded.holding(name, bits, self.dtype, self.device, strides))
        self.buffers += buffers
        k, v = buffers
        if self.case.start == "kv_cache" and self.subject.make_cache is not None:
            lengths = torch.tensor(given.seq_lens, dtype=torch.int32, device=self.device)
            return _Cache(self.subject.make_cache(k.tensor, v.tensor, lengths), k, v, True)
        return _Cache((k.tensor, v.tensor), k, v, False)

    def _buffer(self, name: str, tensor: torch.Tensor) -> Guarded:
        """The record of a returned cache buffer: one of ours, one it allocated, or one we know nothing about."""
        for known in (*self.buffers, *self.allocated):
            same_place = known.tensor.data_ptr() == tensor.data_ptr()
            if same_place and known.tensor.shape == tensor.shape and known.strides == tuple(tensor.stride()):
                if known not in self.buffers:
                    known.name = f"the kernel's {name}"
                    self.buffers.append(known)
                return known
        unknown = Guarded.around(f"the kernel's {name}", tensor)
        self.buffers.append(unknown)
        return unknown

    # -- one call ----------------------------------------------------------------------------------------------

    def call(self, step: StepRun) -> None:
        """Make one call and note everything about it."""
        planned, case = step.plan, self.case
        inputs = {name: self._input(name, planned, getattr(planned, name)) for name in ("query", "key", "value")}
        tensors = [
            guarded.tensor for guarded in inputs.values()
        ]  # by position: the two functions name them differently
        arguments: dict[str, Any] = {"is_causal": case.is_causal, "return_lse": True}
        for name in ("scale", "block_m", "block_n"):
            if getattr(case, name) is not None:
                arguments[name] = getattr(case, name)
        parent = self.caches[planned.parent]
        if case.op == "attention_with_kv_cache":
            arguments |= {"cache_max_len": case.cache_max_len, "update_cache": planned.step.update_cache}
            if any(new != planned.q_len for new in planned.new_lens):
                inputs["new_lens"] = self._index("new_lens", planned.new_lens)
                arguments["new_lens"] = inputs["new_lens"].tensor
            if parent is not None:
                arguments["past_key_value"] = parent.handle
                if planned.passes_seq_lens or not parent.knows_lengths:
                    inputs["seq_lens"] = self._index("seq_lens", planned.seq_lens)
                    arguments["seq_lens"] = inputs["seq_lens"].tensor
            function = self.subject.attention_with_kv_cache
        else:
            assert self.subject.attention is not None
            function = self.subject.attention

        before = {id(buffer): buffer.snapshot() for buffer in (*self.buffers, *inputs.values())}
        old_buffers = list(self.buffers)
        self.stored = None
        lengths = [(cache, cache.lengths()) for cache in self.caches if cache is not None]
        try:
            # The interpreter computes with NumPy. Where a result may overflow it is judged, not warned about.
            with np.errstate(all="ignore"):
                result = function(*tensors, **arguments)
            if self.device == "cuda":
                torch.cuda.synchronize()
        except (LawViolation, NotOffered):  # of whoever stands between the law and the kernel
            raise
        except Exception as error:  # whatever a kernel raises is a verdict
            self._raised(step, error)
        else:
            if planned.overflow_row is not None:
                detail = f"row {planned.overflow_row} needs {planned.kv_lens[planned.overflow_row]} slots, "
                detail += f"cache_max_len is {case.cache_max_len}"
                step.findings.append(Finding("overflow", "a call that must overflow returned", detail))
            else:
                self._returned(step, result)

        # A call that stores nothing passes the cache on that it was given.
        self.caches.append(parent if self.stored is None else self.stored)
        self._compare_bytes(step, inputs, before, old_buffers, parent)
        for cache, old in lengths:
            if cache.lengths() != old:
                detail = f"they were {old}, are {cache.lengths()}"
                step.findings.append(Finding("inputs", "the call changed the seq_lens of an older cache", detail))

    def _input(self, name: str, planned: PlannedStep, bits: BitsArray) -> Guarded:
        if self.poisoned and self.case.op == "attention_with_kv_cache":
            padding = planned.is_padding
            if padding.any():
                bits = bits.copy()
                np.moveaxis(bits, 2, 1)[padding] = poison(self.case.dtype, "unused")
        layout = self.case.query_layout if name == "query" else self.case.key_layout
        strides = layouts.strides(bits.shape, layout, of_values=name == "value")
        return Guarded.holding(name, bits, self.dtype, self.device, strides)

    def _raised(self, step: StepRun, error: Exception) -> None:
        step.raised = error
        words = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if self.device == "cuda" and "CUDA error" in str(error):
            finding = Finding(CONTEXT_LOST, "the kernel destroyed the CUDA context", words)
            raise violation(self.case, step, finding, True) from error
        if step.plan.overflow_row is None:
            step.findings.append(Finding("raised", "a valid call raised", words))
        elif not isinstance(error, self.subject.overflow_error):
            sentence = f"an overflow must raise {self.subject.overflow_error.__name__}"
            step.findings.append(Finding("overflow", sentence, f"got {words}"))

    def _returned(self, step: StepRun, result: Any) -> None:
        """Take the result apart; whatever is not as promised is a finding."""
        planned, case = step.plan, self.case
        with_cache = case.op == "attention_with_kv_cache"
        wrong = _malformed(result, 3 if with_cache else 2)
        if wrong is None:
            out, lse = result[0], result[-1]
            if out.dtype != self.dtype or lse.dtype != torch.float32:
                wrong = f"out must be {self.dtype} and lse torch.float32, got {out.dtype} and {lse.dtype}"
            elif not out.is_contiguous():
                wrong = f"out must be contiguous, got strides {tuple(out.stride())}"
        if wrong is None and with_cache:
            cache = result[1]
            if not planned.step.update_cache:
                wrong = None if cache is None else f"cache must be None without update, got {type(cache).__name__}"
            else:
                wrong = _malformed(cache, 2)
                if wrong is None:
                    wrong = self._took_cache(step, cache)
        if wrong is not None:
            step.findings.append(Finding("result", "the call returned something else than promised", wrong))
            return
        step.got = Got(
            np.ascontiguousarray(bits_of(out)),
            np.ascontiguousarray(bits_of(lse)),
            case.dtype,
            case,
            planned.index,
            self.fresh if self.poisoned and self.subject.allocators else None,
            is_transformed=self.problem.is_transformed or self.subject.is_disturbed,
            has_lse=self.subject.capabilities.lse,
        )

    def _took_cache(self, step: StepRun, cache: Any) -> str | None:
        """Register a returned cache; what is wrong with it, if anything."""
        planned, case = step.plan, self.case
        k, v = self._buffer("k_cache", cache[0]), self._buffer("v_cache", cache[1])
        needed = max(planned.kv_lens, default=0)
        for name, buffer in (("k_cache", k), ("v_cache", v)):
            shape, dtype = tuple(buffer.tensor.shape), buffer.tensor.dtype
            if dtype != self.dtype:
                return f"{name} must be {self.dtype}, got {dtype}"
            fits = len(shape) == 4 and shape[:2] + shape[3:] == (case.batch, case.num_kv_heads, case.head_dim)
            given_capacity = case.capacity if case.start != "empty" else 0
            largest = max(case.cache_max_len, given_capacity)
            if not fits or not needed <= shape[2] <= largest:
                return (
                    f"{name} must be [{case.batch}, {case.num_kv_heads}, {needed}..{largest}, {case.head_dim}], "
                    f"got {list(shape)}"
                )
        lengths = getattr(cache, "seq_lens", None)
        if lengths is None and self.subject.make_cache is not None:
            return "the returned cache must carry seq_lens, and has none"
        if lengths is not None:
            step.seq_lens = tuple(int(n) for n in lengths.tolist())
            if step.seq_lens != planned.kv_lens:
                detail = f"expected {list(planned.kv_lens)}, got {list(step.seq_lens)}"
                step.findings.append(Finding("lengths", "the returned cache has wrong seq_lens", detail))
        step.k_bits, step.v_bits = bits_of(k.tensor).copy(), bits_of(v.tensor).copy()
        self.stored = _Cache(cache, k, v, lengths is not None)
        return None

    def _compare_bytes(
        self,
        step: StepRun,
        inputs: dict[str, Guarded],
        before: dict[int, BitsArray],
        old_buffers: list[Guarded],
        parent: _Cache | None,
    ) -> None:
        """Every byte of every buffer: changed where it should be, nowhere else."""
        findings, planned, stored = step.findings, step.plan, self.stored
        for guarded in inputs.values():
            change = guarded.difference(before[id(guarded)])
            if change is not None:
                findings.append(Finding("inputs", "the call changed its input", change))
        if stored is not None:
            has_room = parent is not None and max(planned.kv_lens, default=0) <= parent.k.tensor.shape[2]
            moved = has_room and parent is not None and (stored.k is not parent.k or stored.v is not parent.v)
            may_move = self.subject.capabilities.cache != "in place"
            if moved and not may_move and stored.k.tensor.numel():
                detail = f"{max(planned.kv_lens, default=0)} slots are needed and were there"
                findings.append(Finding("cache", "the cache moved although it had room", detail))
            self._compare_stored(step, stored, parent, before)
        for buffer in old_buffers:
            expected = before[id(buffer)]
            tokens = None
            if stored is not None and buffer in (stored.k, stored.v):
                tokens = planned.key if buffer is stored.k else planned.value
                slots = buffer.elements(expected)
                for b, (start, count) in enumerate(zip(planned.seq_lens, planned.new_lens, strict=True)):
                    # What the new slots hold is judged above.
                    end = start + count
                    slots[b, :, start:end] = buffer.elements(bits_of(buffer.storage))[b, :, start:end]
            change = buffer.difference(expected)
            if change is not None:
                where = "outside the new tokens' slots" if tokens is not None else "by a call that must not write it"
                findings.append(Finding("cache", f"the cache was written {where}", change))
        for allocation in (*self.allocated, *self.buffers):
            broken = allocation.broken_guard()
            if broken is not None and not any(finding.kind == "cache" for finding in findings):
                findings.append(Finding("guard", "the kernel wrote outside its buffers", broken))

    def _compare_stored(
        self, step: StepRun, stored: _Cache, parent: _Cache | None, before: dict[int, BitsArray]
    ) -> None:
        """The returned cache holds the old tokens of the one it continues from, then the new ones, bit for bit."""
        planned = step.plan
        for name, buffer, old, tokens in (
            ("k_cache", stored.k, parent.k if parent else None, planned.key),
            ("v_cache", stored.v, parent.v if parent else None, planned.value),
        ):
            holds = bits_of(buffer.tensor)
            was = old.elements(before[id(old)]) if old is not None else None
            for b, (start, count) in enumerate(zip(planned.seq_lens, planned.new_lens, strict=True)):
                parts = [("new", start, holds[b, :, start : start + count], tokens[b, :, :count])]
                if was is not None and buffer is not old:
                    parts.append(("old", 0, holds[b, :, :start], was[b, :, :start]))
                for which, first, is_bits, should in parts:
                    differing = np.argwhere(is_bits != should)
                    if not len(differing):
                        continue
                    h, i, d = (int(n) for n in differing[0])
                    digits = 2 * should.dtype.itemsize
                    detail = (
                        f"{name}[{b}, {h}, {first + i}, {d}]: expected 0x{int(should[h, i, d]):0{digits}x}, "
                        f"got 0x{int(is_bits[h, i, d]):0{digits}x} ({len(differing)} elements of row {b} differ)"
                    )
                    sentence = f"the {which} tokens in the cache are not bit-exact copies"
                    step.findings.append(Finding("append", sentence, detail))


def _malformed(result: Any, count: int) -> str | None:
    """What keeps a result from being a tuple of tensors (the cache in the middle may be anything)."""
    if not isinstance(result, tuple) or len(result) != count:
        size = f" of {len(result)}" if isinstance(result, tuple) else ""
        return f"the result must be a tuple of {count}, got {type(result).__name__}{size}"
    tensors = (result[0], result[-1])
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        return f"the result must hold tensors, got {', '.join(type(t).__name__ for t in tensors)}"
    return None
