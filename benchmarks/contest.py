"""One cell: flashcore and its peers on the same inputs, each checked against float64, then timed."""

from __future__ import annotations

import gc
import sys
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ceilings import Ceilings
from benchmarks.clock import Clock
from benchmarks.inputs import Problem, Reference, attend, poisoned, share_of_budget
from benchmarks.peers import Peer, Selection, Unsupported
from benchmarks.report import Results, Row
from benchmarks.shapes import Shape, bytes_floor_us, flops_floor_us
from benchmarks.timing import Call, Timing, time_interpreted, time_on_gpu

# Seconds that a cell may take before anything is known; a peer that compiles takes the second.
FIRST_GUESS = 4.0
COMPILE_GUESS = 30.0
SAY_EVERY = 30.0


class WrongResult(Exception):
    """A kernel's result is not the one it must be."""


@dataclass
class Bench:
    """What every cell of a run shares.

    Attributes:
        device: "cuda" or "cpu".
        quick: fewer cells.
        clock: the budget of seconds.
        selection: the peers.
        ceilings: of this run.
        results: where rows go.
        json_path: where they are saved after every cell; None: nowhere.
        wrong: cells whose result of ours was wrong.
    """

    device: str
    quick: bool
    clock: Clock
    selection: Selection
    ceilings: Ceilings
    results: Results
    json_path: Path | None = None
    wrong: list[str] = field(default_factory=list)
    _recent: dict[str, deque[float]] = field(default_factory=dict)
    _said: float = 0.0

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU."""
        return self.device == "cuda"

    @property
    def l2_bytes(self) -> int:
        """Size of the cache that inputs must not be found in."""
        return int(torch.cuda.get_device_properties(0).L2_cache_size) if self.on_gpu else 0

    def free_bytes(self) -> int:
        """Device memory left."""
        return int(torch.cuda.mem_get_info()[0]) if self.on_gpu else 1 << 30

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def time(self, calls: Sequence[Call], **options: Any) -> tuple[Timing, Tensor]:
        """Time one of the calls, and what the first one gave last."""
        return time_on_gpu(calls, **options) if self.on_gpu else time_interpreted(calls)

    def cell(self, suite: str, case: str, make: Callable[[], Row], *, needs_bytes: int = 0) -> None:
        """Make a row, unless time or memory do not allow it; then the cell is listed as not run.

        Args:
            suite, case: the cell.
            make: does the work.
            needs_bytes: of device memory.
        """
        recent = self._recent.setdefault(suite, deque(maxlen=4))
        expected = max(recent, default=FIRST_GUESS if self.on_gpu else 0.0)
        reason = None
        if not self.clock.fits(expected):
            reason = f"no time left: {self.clock.left():.0f} s of it, about {expected:.0f} s needed"
        elif needs_bytes > self.free_bytes():
            reason = f"no memory: needs {needs_bytes / 1e9:.1f} GB, {self.free_bytes() / 1e9:.1f} GB are free"
        if reason is None:
            began = self.clock.spent()
            try:
                row = make()
            except WrongResult as error:
                self.wrong.append(f"{suite} {case}: {error}")
                row = Row(suite, case, None, 0, None, {}, notes={"remark": f"WRONG: {error}"})
            except Exception as error:  # one cell that fails must not cost the others
                reason = first_line(error)
                print(f"{suite} {case}: {reason}", flush=True)
            if reason is None:
                self.results.rows.append(row)
            self.release()
            recent.append(self.clock.spent() - began)
        if reason is not None:
            self.results.not_run.append({"suite": suite, "case": case, "reason": reason})
        if self.json_path is not None:
            self.results.save(self.json_path)
        if self.clock.spent() - self._said > SAY_EVERY:
            self._said = self.clock.spent()
            print(
                f"... {suite}: {len(self.results.rows)} cells so far, {self._said:.0f} s", file=sys.stderr, flush=True
            )

    def release(self) -> None:
        """Give the memory of a finished cell back, so that the next one can be told whether it fits."""
        if self.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()

    # -- a cell of attention -----------------------------------------------------------------------------------

    def attention_row(
        self,
        suite: str,
        case: str,
        shape: Shape,
        ours: Sequence[Call],
        problems: Sequence[Problem],
        *,
        num_bytes: int | None = None,
        compiling: bool = False,
        skip: Callable[[Peer], str | None] = lambda _: None,
        **options: Any,
    ) -> Row:
        """Check and time flashcore and every peer on the same problems.

        Args:
            suite, case: the cell.
            shape: of a problem.
            ours: flashcore's calls, one a problem.
            problems: the inputs.
            num_bytes: that count; default those of the shape.
            compiling: whether peers that compile for every shape take part.
            skip: why a peer is left out of this cell, or None.
            options: of the timing.

        Raises:
            WrongResult: ours is wrong.
        """
        reference = attend(problems[0])
        notes: dict[str, Any] = {}
        with poisoned():
            out = ours[0]()
        notes["error"], notes["limit"] = checked(reference, out), reference.limit
        share = share_of_budget(shape, problems[0], reference, out)
        if share is not None:
            notes["share_of_budget"] = share
            if not share <= 1:
                raise WrongResult(f"the error is {share:.3g} times its derived budget")
        del out
        timing, last = self.time(ours, **options)
        checked(reference, last)

        num_bytes = shape.bytes() if num_bytes is None else num_bytes
        floor = bytes_floor_us(num_bytes, self.ceilings.copy_tb_s)
        if shape.q_len > 1:
            floor = max(floor, flops_floor_us(shape.flops(), self.ceilings.matmul_tflops))
            notes["tflops"] = shape.flops() / timing.us / 1e6
        row = Row(
            suite,
            case,
            timing.us,
            num_bytes,
            num_bytes / timing.us / 1e6 / self.ceilings.copy_tb_s,
            {},
            floor_us=floor,
            spread=timing.spread,
            shape=shape.record(),
            notes=notes,
        )
        for peer in self.selection.for_cell(compiling):
            reason = skip(peer)
            if reason is None:
                reason = self.add_peer(row, peer.name, peer, problems, reference, **options)
            if reason is not None:
                row.refused[peer.name] = reason
        return row

    def add_peer(
        self, row: Row, name: str, peer: Peer, problems: Sequence[Problem], reference: Reference, **options: Any
    ) -> str | None:
        """Check and time one peer into a row; why it has no time, or None."""
        if not self.clock.fits(COMPILE_GUESS if peer.compiles and self.on_gpu else 0.0):
            return "no time left"
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                calls = peer.prepare(problems)
                torch.full_like(problems[0].query, torch.nan)  # what the allocator is likely to hand out next
                checked(reference, calls[0]())
                timing, last = self.time(calls, **options)
                checked(reference, last)
            except Unsupported as error:
                return str(error)
            except WrongResult as error:
                return f"wrong result, not timed: {error}"
            except Exception as error:  # somebody else's kernel: whatever it raises is the reason
                if self.on_gpu:
                    torch.cuda.synchronize()  # a lost context raises here, and ends the cell
                reasons = [first_line(error)] + [" ".join(str(w.message).split()) for w in said]
                return "; ".join(dict.fromkeys(_without_place(reason) for reason in reasons))[:300]
        row.peers[name] = timing.us
        return None


def checked(reference: Reference, out: Tensor) -> float:
    """The relative error of a result.

    Raises:
        WrongResult: it is beyond what rounding can do.
    """
    error = reference.error(out)
    if not error <= reference.limit:
        raise WrongResult(f"relative error {error:.2e}, rounding explains {reference.limit:.2e}")
    return error


def first_line(error: BaseException) -> str:
    """An exception in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _without_place(text: str) -> str:
    """PyTorch ends warnings of its C++ code with where they were raised."""
    return text.split(" (Triggered internally at")[0].split(" (function ")[0]
