"""One attention problem that a model posed: queries, keys and values as they were, and how well it was solved.

A stored one is a JSON file, its numbers the bytes of little-endian float32; `fixtures/schema` describes it.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import flashcore
from properties import device as devices
from properties.case import Case, Row
from properties.guards import bits_of, torch_dtype
from properties.subjects.flashcore import model, tiles
from references.attention import attention, visible_keys
from references.error_bounds import budget
from references.rounding import decode

Float64Array = NDArray[np.float64]
FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class Activation:
    """One row of one attention call.

    Attributes:
        query: [num_q_heads, q_len, head_dim], the new tokens, real ones only.
        key: [num_kv_heads, kv_len, head_dim], cached tokens first, then the new ones.
        value: like key.
        scale: of the logits.
        fmt: format of all numbers.
        cached: how many of the keys were in the cache.
        padded: columns of the call, padding included; q_len unless the row was padded.
        story: which model, layer and token, and what is extreme about it.
    """

    query: Float64Array
    key: Float64Array
    value: Float64Array
    scale: float
    fmt: str
    cached: int
    padded: int
    story: str = ""

    def expected(self) -> tuple[Float64Array, Float64Array]:
        """The exact output and its error budget, [num_q_heads, q_len, head_dim] each, on the device in use.

        Raises:
            ValueError: an intermediate may overflow, so that there is no budget.
        """
        num_q_heads, q_len, head_dim = self.query.shape
        kv_len = self.key.shape[1]
        case = Case(
            rows=(Row(self.cached, (q_len,)),),
            num_kv_heads=self.key.shape[0],
            group_size=num_q_heads // self.key.shape[0],
            head_dim=head_dim,
            dtype=self.fmt,  # type: ignore[arg-type]
            is_causal=True,
            start="kv_cache" if self.cached else "empty",
            capacity=kv_len if self.cached else 0,
        )
        visible = visible_keys(q_len, kv_len, True)
        allowed = budget(
            self.query,
            self.key,
            self.value,
            visible,
            scale=self.scale,
            fmt=self.fmt,
            model=model(devices.current()),
            tiles=tiles(case, self.padded, self.cached, kv_len - self.cached),
        )
        if not allowed.overflow_free.all():
            raise ValueError("the activations must be finite and their logits in range, got an overflow")
        out, _ = attention(self.query, self.key, self.value, is_causal=True, scale=self.scale)
        return out, allowed.out

    def solve(self) -> Float64Array:
        """What flashcore makes of it, from a cache that holds the cached tokens."""
        dtype, device = torch_dtype(self.fmt), devices.current()

        def tensor(array: Float64Array) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array[None])).to(device, dtype)

        kv_len = self.key.shape[1]
        cache = flashcore.KVCache.allocate(1, self.key.shape[0], kv_len, self.key.shape[2], dtype, device)
        for buffer, array in zip(cache, (self.key, self.value), strict=True):
            buffer[:, :, : self.cached] = tensor(array[:, : self.cached])
        lens = torch.tensor([self.cached], device=device)
        k_new, v_new = (tensor(array[:, self.cached :]) for array in (self.key, self.value))
        out, *_ = flashcore.attention_with_kv_cache(
            tensor(self.query), k_new, v_new, cache, lens, kv_len, scale=self.scale, is_causal=True
        )
        return decode(bits_of(out[0]), self.fmt)

    def rounded(self, fmt: str) -> Activation:
        """The same problem in another format."""

        def convert(array: Float64Array) -> Float64Array:
            return decode(bits_of(torch.from_numpy(array).to(torch_dtype(fmt))), fmt)

        return dataclasses.replace(
            self, fmt=fmt, query=convert(self.query), key=convert(self.key), value=convert(self.value)
        )

    def slice_of(self, q_head: int, q: int, story: str) -> Activation:
        """One query of one head with the keys that it sees."""
        group = self.query.shape[0] // self.key.shape[0]
        keys = self.key.shape[1] - self.query.shape[1] + q + 1
        kv = slice(q_head // group, q_head // group + 1)
        seen = self.key[kv, :keys], self.value[kv, :keys]
        return Activation(self.query[q_head : q_head + 1, q : q + 1], *seen, self.scale, self.fmt, keys - 1, 1, story)

    def dumps(self) -> str:
        """The text of a file; float32 only."""
        if self.fmt != "float32":
            raise ValueError(f"fmt must be float32 to be stored, got {self.fmt}")
        record: dict[str, Any] = {"format": FORMAT_VERSION, "story": self.story, "scale": self.scale.hex()}
        record |= {"cached": self.cached, "fmt": self.fmt}
        for name in ("query", "key", "value"):
            array = getattr(self, name)
            data = base64.b64encode(array.astype("<f4").tobytes()).decode()
            record[name] = {"shape": list(array.shape), "float32": data}
        return json.dumps(record, indent=1) + "\n"


def read(path: Path) -> Activation:
    """A stored activation."""
    record = json.loads(path.read_text())
    if record["format"] != FORMAT_VERSION:
        raise ValueError(f"{path.name} must have format {FORMAT_VERSION}, got {record['format']!r}")
    arrays = {}
    for name in ("query", "key", "value"):
        flat = np.frombuffer(base64.b64decode(record[name]["float32"], validate=True), "<f4")
        arrays[name] = flat.reshape(record[name]["shape"]).astype(np.float64)
    return Activation(
        **arrays,
        scale=float.fromhex(record["scale"]),
        fmt=record["fmt"],
        cached=record["cached"],
        padded=arrays["query"].shape[1],
        story=record["story"],
    )
