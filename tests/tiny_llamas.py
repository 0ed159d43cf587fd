"""Tiny models with random weights, once with flashcore and once with the library's own attention."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import flashcore.integrations.transformers  # noqa: F401 - registers the name
from properties import device as devices

VOCABULARY = 16


def config(
    heads: int = 4, kv_heads: int = 2, head_dim: int = 16, *, tied: bool = False, kind: Any = LlamaConfig, **others: Any
) -> Any:
    """A configuration of two layers and a hidden size of about 32, whatever its heads."""
    hidden = 32 // heads * heads or heads  # the library wants a multiple of the heads
    sizes = {"hidden_size": hidden, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCABULARY} | others
    tokens = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    # Weights this large make logits and attention weights that differ from token to token.
    return kind(
        **sizes,
        **tokens,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )


def pair(made: Any, seed: int = 0, model_class: Any = LlamaForCausalLM) -> tuple[Any, Any]:
    """Two models with the same weights: with flashcore, and eager."""
    torch.manual_seed(seed)
    eager = model_class._from_config(copy.deepcopy(made), attn_implementation="eager").eval()
    flash = model_class._from_config(copy.deepcopy(made), attn_implementation="flashcore").eval()
    flash.load_state_dict(eager.state_dict())
    return flash.to(devices.current()), eager.to(devices.current())


def tokens(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Random token ids without the padding token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (rows, columns), generator=generator).to(devices.current())
