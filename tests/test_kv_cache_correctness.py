"""The specification's four acceptance tests, against PyTorch's SDPA and against the float64 oracle.

    python tests/test_kv_cache_correctness.py

prints a table and exits with 0 if everything holds, 1 otherwise; pytest collects the same tests.

The configurations: float32 with batch 2, 4 heads, head_dim 64; float16 with batch 1, 8 heads, head_dim 64; bfloat16
with batch 1, 8 query heads on 2 kv heads, head_dim 128. Prompts and steps are causal, aligned bottom-right; SDPA gets
an explicit mask, since its own ``is_causal`` is aligned top-left.

Two rules, and why there are two:

* **SDPA at atol = rtol = 1e-3** is what the specification asks for, and the only tolerance of this repository that
  somebody chose. SDPA runs in float64, so that it adds no error of its own. The rule is weak and strict in the wrong
  places. In float32 it lets pass an error thousands of times that of a correct kernel. In bfloat16 no correct kernel
  can promise it: rounding one output just below 1 may move it by 2e-3, and rounding the softmax weights as
  much again. So it is applied as it stands to float32 and float16; for bfloat16 it is applied to a float32 run on
  the same (bfloat16) numbers, and the bfloat16 run is judged by the second rule only.
* **The oracle within its error budget** is derived from the inputs, the format and the arithmetic of the device
  (docs/numerics.md). It covers every output and log-sum-exp of the run in the configuration's own dtype. Lengths
  and every stored key and value are compared bit for bit.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

if __name__ == "__main__":  # from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"

from flashcore import KVCache, attention_with_kv_cache
from flashcore.fast import interpreter, tuning
from references import kv_cache
from references.arithmetic_model import AMPERE, BLACKWELL, HOPPER, INTERPRETER, ArithmeticModel
from references.attention import visible_keys
from references.error_bounds import budget
from references.rounding import decode
from references.tiling import Tiles, tiling
from tests.tensors import DEVICE, normal

TOLERANCE = 1e-3


@dataclass(frozen=True)
class Configuration:
    """Sizes and dtype of a run."""

    dtype: torch.dtype
    batch: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        """For a row of the table."""
        heads = f"{self.num_q_heads}:{self.num_kv_heads}"
        return f"{self.format:8} batch {self.batch}, heads {heads}, head_dim {self.head_dim}"

    @property
    def format(self) -> str:
        """The dtype's name."""
        return str(self.dtype).removeprefix("torch.")


FLOAT32 = Configuration(torch.float32, 2, 4, 4, 64)
FLOAT16 = Configuration(torch.float16, 1, 8, 8, 64)
BFLOAT16 = Configuration(torch.bfloat16, 1, 8, 2, 128)
CONFIGURATIONS = (FLOAT32, FLOAT16, BFLOAT16)


@dataclass
class Report:
    """The worst of a run; 1 is what a rule allows.

    Attributes:
        sdpa: error over ``atol + rtol * abs(expected)``.
        out, lse: error over the oracle's budget.
        cache_exact: lengths and stored slots are those of the oracle.
    """

    sdpa: float = 0.0
    out: float = 0.0
    lse: float = 0.0
    cache_exact: bool = True

    @property
    def holds(self) -> bool:
        """All rules hold; NaN is no number below 1."""
        return self.sdpa <= 1 and self.out <= 1 and self.lse <= 1 and self.cache_exact

    def assert_holds(self) -> None:
        """Say which rule is broken."""
        assert self.sdpa <= 1, f"out is {self.sdpa:.2f} times as far from SDPA as atol = rtol = 1e-3 allows"
        assert self.out <= 1, f"out is {self.out:.2f} times its budget from the oracle"
        assert self.lse <= 1, f"lse is {self.lse:.2f} times its budget from the oracle"
        assert self.cache_exact, "the cache does not hold the bits of the tokens it was given"


def bits_of(tensor: Tensor) -> NDArray[Any]:
    """The raw bit patterns, as the references store numbers."""
    unsigned = torch.uint32 if tensor.element_size() == 4 else torch.uint16
    return tensor.detach().cpu().contiguous().view(unsigned).numpy()


def worst_ratio(error: NDArray[np.float64], allowed: NDArray[np.float64]) -> float:
    """The largest error in units of what is allowed; an allowance of 0 is met by 0 only, and NaN by nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(error == 0, 0.0, error / allowed)
    return float(np.where(np.isnan(ratio), np.inf, ratio).max(initial=0.0))


def device_model() -> ArithmeticModel:
    """How the device in use computes."""
    if interpreter.is_on():
        return INTERPRETER
    major, _ = torch.cuda.get_device_capability(DEVICE)
    return {8: AMPERE, 9: HOPPER}.get(major, BLACKWELL)


def tiles_of(configuration: Configuration, cached: int, q_len: int) -> Tiles:
    """The tiles in which flashcore visits the keys of a row."""
    plan = tuning.plan(
        q_len=q_len,
        group_size=configuration.num_q_heads // configuration.num_kv_heads,
        head_dim=configuration.head_dim,
        dtype=configuration.dtype,
    )
    if plan.path == "prefill":
        return tiling(cached, q_len, plan.block_n)
    *before, last = tiling(cached, 0, plan.block_n, plan.split_size(cached))
    return (*before, (*last, (cached, cached + q_len)))  # all new tokens are one tile


class Session:
    """One sequence of calls, followed by SDPA and by the oracle.

    Attributes:
        report: the worst so far.
        cache: what the last call returned.
    """

    def __init__(self, configuration: Configuration) -> None:
        self.configuration = configuration
        self.report = Report()
        self.cache: KVCache | None = None
        self._oracle: kv_cache.ReferenceCache | None = None
        self._float32_cache: KVCache | None = None
        self._steps = 0

    def tokens(self, q_len: int) -> tuple[Tensor, Tensor, Tensor]:
        """Fresh query, key and value."""
        c = self.configuration
        self._steps += 1
        query, key, value = (
            normal(c.batch, heads, q_len, c.head_dim, dtype=c.dtype, seed=3 * self._steps + i)
            for i, heads in enumerate((c.num_q_heads, c.num_kv_heads, c.num_kv_heads))
        )
        return query, key, value

    def start_from(self, cached: int) -> None:
        """Give all three the same exactly full cache of ``cached`` slots."""
        c = self.configuration
        _, key, value = self.tokens(cached)
        lens = torch.full((c.batch,), cached, dtype=torch.int32, device=DEVICE)
        self.cache = KVCache(key.clone(), value.clone(), lens)
        self._float32_cache = KVCache(key.float(), value.float(), lens)
        self._oracle = kv_cache.ReferenceCache(
            bits_of(key).copy(), bits_of(value).copy(), np.ones((c.batch, cached), np.bool_), [cached] * c.batch
        )

    def step(self, q_len: int) -> None:
        """Append ``q_len`` tokens to every row, attend, and compare."""
        c = self.configuration
        query, key, value = self.tokens(q_len)
        cached = 0 if self._oracle is None else self._oracle.seq_lens[0]
        result: Any = attention_with_kv_cache(query, key, value, self.cache, is_causal=True, return_lse=True)
        out, self.cache, lse = result
        expected = kv_cache.step(
            self._oracle,
            bits_of(query),
            bits_of(key),
            bits_of(value),
            fmt=c.format,
            seq_lens=None,
            new_lens=[q_len] * c.batch,
            cache_max_len=4096,
            update_cache=True,
            is_causal=True,
            scale=c.head_dim**-0.5,
        )
        assert expected.cache is not None
        assert isinstance(self.cache, KVCache)
        self._oracle = expected.cache
        keys, values = self._compare_cache(cached + q_len)
        self._compare_with_sdpa((query, key, value), out, keys, values)
        for b in range(c.batch):
            allowed = budget(
                decode(bits_of(query[b]), c.format),
                decode(bits_of(keys[b]), c.format),
                decode(bits_of(values[b]), c.format),
                visible_keys(q_len, cached + q_len, True),
                scale=c.head_dim**-0.5,
                fmt=c.format,
                model=device_model(),
                tiles=tiles_of(c, cached, q_len),
            )
            out_error = np.abs(decode(bits_of(out[b]), c.format) - expected.out[b])
            lse_error = np.abs(lse[b].double().cpu().numpy() - expected.lse[b])
            self.report.out = max(self.report.out, worst_ratio(out_error, allowed.out))
            self.report.lse = max(self.report.lse, worst_ratio(lse_error, allowed.lse))

    def _compare_cache(self, kv_len: int) -> tuple[Tensor, Tensor]:
        """Lengths and valid slots against the oracle; the valid keys and values."""
        assert self.cache is not None
        assert self._oracle is not None
        keys, values = (buffer[:, :, :kv_len] for buffer in self.cache)
        self.report.cache_exact &= (
            self.cache.seq_lens.tolist() == self._oracle.seq_lens == [kv_len] * self.configuration.batch
            and np.array_equal(bits_of(keys), self._oracle.k_bits[:, :, :kv_len])
            and np.array_equal(bits_of(values), self._oracle.v_bits[:, :, :kv_len])
        )
        return keys, values

    def _compare_with_sdpa(self, new: tuple[Tensor, Tensor, Tensor], out: Tensor, keys: Tensor, values: Tensor) -> None:
        """The specification's rule."""
        c = self.configuration
        if c.dtype == torch.bfloat16:
            query, key, value = (tensor.float() for tensor in new)
            out, self._float32_cache = attention_with_kv_cache(query, key, value, self._float32_cache, is_causal=True)[
                :2
            ]
        query = new[0].double().cpu()
        q_len, kv_len = query.shape[2], keys.shape[2]
        mask = torch.from_numpy(visible_keys(q_len, kv_len, True))
        group_size = c.num_q_heads // c.num_kv_heads
        key, value = (kv.double().cpu().repeat_interleave(group_size, dim=1) for kv in (keys, values))
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).numpy()
        error = np.abs(out.double().cpu().numpy() - expected)
        self.report.sdpa = max(self.report.sdpa, worst_ratio(error, TOLERANCE + TOLERANCE * np.abs(expected)))


def prefill_and_decode() -> Report:
    """Prefill of 64 tokens, then 10 decode steps."""
    session = Session(FLOAT32)
    for q_len in (64, *[1] * 10):
        session.step(q_len)
    return session.report


def first_call() -> Report:
    """A first call without a cache makes one of cache_max_len slots."""
    session = Session(FLOAT32)
    session.step(32)
    assert session.cache is not None
    session.report.cache_exact &= session.cache.capacity == 4096
    return session.report


def one_decode_step() -> Report:
    """One decode step on 256 cached tokens, in buffers that are exactly full."""
    session = Session(FLOAT32)
    session.start_from(256)
    session.step(1)
    return session.report


def one_configuration(configuration: Configuration) -> Report:
    """A prompt, a chunk of it, and two decode steps."""
    session = Session(configuration)
    for q_len in (24, 9, 1, 1):
        session.step(q_len)
    return session.report


def test_prefill_of_64_tokens_and_10_decode_steps() -> None:
    prefill_and_decode().assert_holds()


def test_the_first_call_without_a_cache() -> None:
    first_call().assert_holds()


def test_one_decode_step_on_256_cached_tokens() -> None:
    one_decode_step().assert_holds()


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda c: c.format)
def test_the_three_configurations(configuration: Configuration) -> None:
    one_configuration(configuration).assert_holds()


@pytest.mark.parametrize(
    "report", [Report(sdpa=1.01), Report(out=1.01), Report(lse=np.inf), Report(out=np.nan), Report(cache_exact=False)]
)
def test_a_report_can_fail(report: Report) -> None:
    assert not report.holds
    with pytest.raises(AssertionError):
        report.assert_holds()


def test_a_wrong_number_is_infinitely_worse_than_a_budget_of_zero() -> None:
    error = np.array([0.0, 1e-30, np.nan])

    assert worst_ratio(error[:1], np.zeros(1)) == 0
    assert worst_ratio(error[1:2], np.zeros(1)) == np.inf
    assert worst_ratio(error[2:], np.ones(1)) == np.inf


def main() -> int:
    """Run the four tests, print the table, and return the exit status."""
    runs = [
        ("1. prefill 64, decode 10 steps", FLOAT32, prefill_and_decode),
        ("2. first call, no cache given", FLOAT32, first_call),
        ("3. decode step on 256 cached", FLOAT32, one_decode_step),
        *(("4. configuration", c, lambda c=c: one_configuration(c)) for c in CONFIGURATIONS),
    ]
    where = "Triton's interpreter" if interpreter.is_on() else torch.cuda.get_device_name(DEVICE)
    print(f"flashcore on {where}: the worst error of each test, in units of what is allowed (1 = just allowed)\n")
    print(f"{'test':31} {'configuration':45} {'SDPA 1e-3':>9} {'out':>8} {'lse':>8}  cache  verdict")
    all_hold = True
    for name, configuration, run in runs:
        report = run()
        all_hold &= report.holds
        cache = "exact" if report.cache_exact else "WRONG"
        verdict = "pass" if report.holds else "FAIL"
        numbers = f"{report.sdpa:9.4f} {report.out:8.4f} {report.lse:8.4f}"
        print(f"{name:31} {configuration!s:45} {numbers}  {cache}  {verdict}", flush=True)
    print("\nSDPA 1e-3: float64 SDPA at atol = rtol = 1e-3 (bfloat16: a float32 run on the same numbers).")
    print("out, lse: the float64 oracle within its derived error budget. cache: every stored bit.")
    print("\nall tests passed" if all_hold else "\nSOME TESTS FAILED")
    return 0 if all_hold else 1


if __name__ == "__main__":
    sys.exit(main())
