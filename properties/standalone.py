# This file is the second part of every stand-alone script; properties/script.py writes the data before it.
# It may use nothing of this project but the kernel under test.
from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

# ruff: noqa: D100, D103, F821, B905 - the data comes from the first part; a script of one page explains itself
# mypy: ignore-errors

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), os.getcwd()]  # a checkout that is not installed
DEVICE = "cuda" if torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET") else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
faulthandler.dump_traceback_later(SECONDS, exit=True)  # a kernel that hangs fails

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SIGNED = {2: np.int16, 4: np.int32}


def oracle(q, k, v, causal, scale):
    """Attention of one row in float64: q [heads, n, d], k and v [kv_heads, m, d], aligned bottom-right."""
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    for h, i in np.ndindex(*q.shape[:2]):
        m = max(0, k.shape[1] - q.shape[1] + i + 1) if causal else k.shape[1]
        if m > 0:
            keys, values = (x[h // (len(q) // len(k)), :m] for x in (k, v))
            logits = scale * (keys @ q[h, i])
            weights = np.exp(logits - logits.max())
            out[h, i], lse[h, i] = weights @ values / weights.sum(), logits.max() + np.log(weights.sum())
    return out, lse


WIDTH = 8 if FMT == "float32" else 4


def numbers(bits, fmt):
    wide = bits.astype(np.uint32) << 16 if fmt == "bfloat16" else bits
    return wide.view({"float16": np.float16}.get(fmt, np.float32)).astype(np.float64)


def unpack(shape, text, width):
    """Bits from hexadecimal digits, ``width`` an element; "*" repeats what is before it: "3c00*17"."""
    digits = [part.partition("*") for part in text.split()]
    flat = [
        int(d[i : i + width], 16) for d, _, n in digits for _ in range(int(n or 1)) for i in range(0, len(d), width)
    ]
    return np.array(flat, np.uint16 if width == 4 else np.uint32).reshape(shape)


def place(bits, strides):
    """A tensor with these bits and strides (in elements) in the middle of a buffer of NaN; and the buffer."""
    span = 1 + sum((n - 1) * s for n, s in zip(bits.shape, strides)) if bits.size else 0
    flat = np.full(span + 512, -1, SIGNED[bits.itemsize])
    view = np.lib.stride_tricks.as_strided(flat[256:], bits.shape, [s * bits.itemsize for s in strides])
    view[...] = bits.view(SIGNED[bits.itemsize])
    storage = torch.from_numpy(flat).to(DEVICE)
    return storage.view(DTYPES[FMT]).as_strided(bits.shape, strides, 256), storage


def bits_of(tensor):
    ints = tensor.detach().view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).cpu().numpy()
    return ints.view(f"u{ints.itemsize}")


def complain(text):
    print(text)
    sys.exit(1)


def compare(name, step, got, expected, budget):
    if got.shape != expected.shape:
        complain(f"FAILED at step {step + 1}: {name} has shape {got.shape}, expected {expected.shape}")
    may_overflow = np.signbit(budget) & ~np.isfinite(got)
    budget = np.abs(budget)
    with np.errstate(all="ignore"):
        error = np.where((got == expected) | np.isnan(budget) | may_overflow, 0, np.abs(got - expected))
        ratio = np.where(error == 0, 0, error / budget)
    ratio = np.where(np.isnan(ratio), np.inf, ratio)
    if ratio.size and ratio.max() > 1:
        at = np.unravel_index(ratio.argmax(), ratio.shape)
        where = [int(i) for i in at]
        print(f"step {step + 1}, {name}{where}: expected {expected[at]:.9g}, got {got[at]:.9g}")
        complain(f"FAILED: error {error[at]:.3g} exceeds the budget {budget[at]:.3g} in {(ratio > 1).sum()} elements")


def run(data):
    """Make every call of a schedule, checking numbers and bytes; the bits of every output."""
    tensors, caches, results = {}, [None], []
    watched = []  # (name, storage) of everything whose bytes are followed
    truth = [None]  # what the oracle's cache holds: key and value bits [batch, kv_heads, slots, d]
    if data["cache"] is not None:
        pair, contents = [], []
        for name, (shape, strides, text) in zip(("k_cache", "v_cache"), data["cache"]["buffers"]):
            bits = unpack(shape, text, WIDTH)
            tensor, storage = place(bits, strides)
            watched.append((name, storage))
            pair.append(tensor)
            contents.append(bits)
        lengths = torch.tensor(data["cache"]["seq_lens"], dtype=torch.int32, device=DEVICE)
        caches = [make_cache(*pair, lengths) if data["cache"]["as_object"] else tuple(pair)]
        truth = [contents]
    for number, step in enumerate(data["steps"]):
        inputs, arguments = {}, dict(step["arguments"])
        for name in ("query", "key", "value"):
            shape, strides, text = step[name]
            inputs[name] = unpack(shape, text, WIDTH)
            tensors[name], storage = place(inputs[name], strides)
            watched.append((name, storage))
        for name in ("seq_lens", "new_lens"):
            if name in arguments:
                dtype = getattr(torch, data["index_dtype"])
                arguments[name] = torch.tensor(arguments[name], dtype=dtype, device=DEVICE)
        parent, known = caches[step["parent"]], truth[step["parent"]]
        if parent is not None:
            arguments["past_key_value"] = parent
        before = [storage.cpu().clone() for _, storage in watched]
        cached, new = step["seq_lens"], step["lengths"]
        try:
            result = data_function(data)(*tensors.values(), return_lse=True, **arguments)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            if not step["overflows"]:
                complain(f"FAILED at step {number + 1}: a valid call raised {type(error).__name__}: {error}")
            result = None
        else:
            if step["overflows"]:
                complain(f"FAILED at step {number + 1}: a call that must overflow returned")
        stores = result is not None and step["stores"]
        caches.append(result[1] if stores else parent)
        truth.append(known)
        if result is not None:
            out, lse = result[0], result[-1]
            expected, sums = np.zeros(tuple(step["query"][0])), np.full(tuple(step["query"][0])[:3], -np.inf)
            for b, n in enumerate(new):
                rows = inputs["query"][b, :, :n], inputs["key"][b, :, :n], inputs["value"][b, :, :n]
                if data["op"] == "attention":
                    rows = inputs["query"][b], inputs["key"][b], inputs["value"][b]
                elif known is not None:
                    rows = (rows[0], *(np.concatenate([k[b, :, : cached[b]], t], 1) for k, t in zip(known, rows[1:])))
                decoded = (numbers(np.ascontiguousarray(bits), FMT) for bits in rows)
                expected[b, :, :n], sums[b, :, :n] = oracle(*decoded, data["is_causal"], data["scale"])
            results.append((bits_of(out), bits_of(lse)))
            budgets = [numbers(unpack(shape, text, 8), "float32") for shape, text in step["budgets"]]
            compare("out", number, numbers(bits_of(out), FMT), expected, budgets[0])
            compare("lse", number, numbers(bits_of(lse), "float32"), sums, budgets[1])
        if stores:
            slots = max((a + n for a, n in zip(cached, new)), default=0)
            held = []
            for name, buffer, tokens, index in (
                ("k_cache", result[1][0], "key", 0),
                ("v_cache", result[1][1], "value", 1),
            ):
                shape = (*buffer.shape[:2], max(slots, buffer.shape[2]), buffer.shape[3])
                content = np.zeros(shape, inputs[tokens].dtype)
                if known is not None:
                    content[:, :, : known[index].shape[2]] = known[index][:, :, : shape[2]]
                got = bits_of(buffer)
                for b, (a, n) in enumerate(zip(cached, new)):
                    content[b, :, a : a + n] = inputs[tokens][b, :, :n]
                    if not np.array_equal(got[b, :, : a + n], content[b, :, : a + n]):
                        complain(f"FAILED at step {number + 1}: row {b} of {name} does not hold its tokens bit for bit")
                held.append(content)
            truth[-1] = held
            told = getattr(result[1], "seq_lens", None)
            if told is not None and told.tolist() != [a + n for a, n in zip(cached, new)]:
                complain(f"FAILED at step {number + 1}: the returned cache says seq_lens {told.tolist()}")
        in_place = stores and parent is not None and result[1][0].data_ptr() == parent[0].data_ptr()
        for (name, storage), old in zip(watched, before):
            now = storage.cpu()
            if in_place and name in ("k_cache", "v_cache"):
                shape, strides, _ = data["cache"]["buffers"][name == "v_cache"]
                views = [flat.as_strided(shape, strides, 256) for flat in (old, now)]
                for b, (a, n) in enumerate(zip(cached, new)):
                    views[0][b, :, a : a + n] = views[1][b, :, a : a + n]
            if not torch.equal(now, old):
                complain(
                    f"FAILED at step {number + 1}: {(now != old).sum()} elements of {name} or around it were written"
                )
        watched = [(name, storage) for name, storage in watched if name in ("k_cache", "v_cache")]
    return results


module = importlib.import_module(MODULE)
make_cache: Any = getattr(module, "KVCache", None)
for allocator in ALLOCATORS:  # fresh memory is NaN
    importlib.import_module(allocator).empty = lambda shape, dtype, device: torch.full(
        (shape,) if isinstance(shape, int) else tuple(shape),
        float("nan") if dtype.is_floating_point else 0,
        dtype=dtype,
        device=device,
    )


def data_function(data):
    return getattr(module, FUNCTION if data["op"] == "attention_with_kv_cache" else "attention")


def forced(data):
    if data["kv_split_size"] is None or MODULE != "flashcore":
        return contextlib.nullcontext()
    return importlib.import_module("flashcore.fast.tuning").forced(kv_split_size=data["kv_split_size"])


outcomes = []
for data in RUNS:
    with forced(data):
        outcomes.append(run(data))
if SAME_BITS is not None:
    which, (step, index), (other_step, other_index) = SAME_BITS
    tensor = 0 if which == "out" else 1
    bits = outcomes[0][step][tensor][tuple(index)], outcomes[-1][other_step][tensor][tuple(other_index)]
    print(
        f"{which}{list(index)} of the first run: 0x{bits[0]:x}; {which}{list(other_index)} of the second: 0x{bits[1]:x}"
    )
    if bits[0] != bits[1]:
        complain("FAILED: the bits must be the same")
print("FIXED: every call gives what it should")
