"""The most extreme attention problems of a run, each kept with the words that say why."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from properties.llama.activations import Activation
from properties.llama.capture import LayerCall

Float64Array = NDArray[np.float64]

MAX_KEYS = 40
"""Longer problems are not kept: a slice is stored as text."""


@dataclass
class Extremes:
    """The record of each kind, and the slice that set it."""

    kept: dict[str, tuple[float, Activation]] = field(default_factory=dict)

    def look(self, call: LayerCall, ratios: Float64Array, source: str) -> None:
        """Compare the last query of one sequence's call with the records.

        Args:
            call: of one row.
            ratios: [num_q_heads, q_len, head_dim], error over budget.
            source: the model and the text.
        """
        row = call.rows[0]
        if row.key.shape[1] > MAX_KEYS:
            return
        group = row.query.shape[0] // row.key.shape[0]
        for head in range(row.query.shape[0]):
            key, value = row.key[head // group], row.value[head // group]
            logits = row.scale * (key @ row.query[head, -1])
            weights = np.exp(logits - logits.max())
            weights /= weights.sum()
            where = f"{source}, layer {call.layer}, query head {head}, token {len(key) - 1}"
            sink = float(weights[0]) if len(key) > 16 else 0.0
            entropy = float(-(weights * np.log(np.maximum(weights, 1e-300))).sum() / np.log(len(key) + 1))
            spread = float(logits.max() - logits.min())
            found = {
                "massive-key": (float(np.abs(key).max()), "the largest element of a key is {:.1f}"),
                "massive-value": (float(np.abs(value).max()), "the largest element of a value is {:.1f}"),
                "attention-sink": (sink, "the first token takes {:.6f} of the weight of a much later one"),
                "wide-logits": (spread, "logits lie {:.1f} apart"),
                "even-weights": (
                    entropy if len(key) > 16 else 0.0,
                    "weights are nearly even: entropy {:.3f} of its most",
                ),
                "worst-error": (float(ratios[head, -1].max()), "the error was {:.3f} of its budget"),
            }
            for kind, (size, words) in found.items():
                if size > self.kept.get(kind, (0.0, row))[0]:
                    story = f"{kind.replace('-', ' ')}: {words.format(size)} ({where})"
                    self.kept[kind] = size, row.slice_of(head, row.query.shape[1] - 1, story)
