"""Padded batches, chunks, beams and assistants: what ``generate`` does with a model and its cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flashcore.integrations.transformers import FlashCoreCache, flashcore_attention
from flashcore.integrations.transformers_padding import visible_tokens
from properties import device as devices
from properties.guards import bits_of
from properties.llama.activations import Activation
from properties.llama.capture import capturing, worst_of
from properties.llama.replay import replay
from references.rounding import decode
from tests import tiny_llamas

LENGTHS = (9, 6, 1, 8)


def left_padded() -> Tensor:
    return torch.tensor([[0] * (9 - n) + [1] * n for n in LENGTHS], device=devices.current())


def right_padded() -> Tensor:
    return left_padded().flip(1)


def run(
    model: Any, ids: Tensor, mask: Tensor | None, chunks: tuple[int, ...]
) -> tuple[list[Any], list[Any], list[Any]]:
    """Forward passes over columns in chunks, with positions that count real tokens; inputs, layers, logits."""
    inputs = []
    start = 0
    cache = FlashCoreCache(model.config, max_cache_len=16)
    for chunk in chunks:
        columns = slice(start, start + chunk)
        step = {"input_ids": ids[:, columns]}
        if mask is not None:
            step["attention_mask"] = mask[:, : columns.stop]
            step["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, columns]
        inputs.append(step)
        start = columns.stop
    with capturing() as captured, torch.no_grad():
        logits = [model(**step, past_key_values=cache).logits for step in inputs]
    return inputs, captured.steps(model.config.num_hidden_layers), logits


@pytest.mark.parametrize("padded", [left_padded, right_padded], ids=["left", "right"])
def test_a_ragged_batch_attends_to_its_real_tokens(padded: Any) -> None:
    """Prefill and two steps of four rows: the kernel gets the real tokens of each row and no others."""
    flash, eager = tiny_llamas.pair(tiny_llamas.config(4, 2, 16))
    mask = torch.cat([padded(), torch.ones(4, 2, dtype=torch.int64, device=devices.current())], dim=1)
    ids = tiny_llamas.tokens(4, 11) * mask
    inputs, steps, logits = run(flash, ids, mask, (9, 1, 1))

    assert [row.key.shape[1] for row in steps[-1][0].rows] == [n + 2 for n in LENGTHS]
    assert max(worst_of(call) for step in steps for call in step) <= 1
    again = replay(eager, inputs, steps, mask)
    assert all(torch.equal(first, second) for first, second in zip(logits, again, strict=True))


@pytest.mark.parametrize("padded", [left_padded, right_padded], ids=["left", "right"])
def test_a_row_gets_what_it_gets_alone(padded: Any) -> None:
    """Padding and neighbours change no bit of what the kernel returns for a row."""
    made = tiny_llamas.config(4, 2, 16)
    mask = padded()
    query, key, value = (torch.randn(4, heads, 9, 16, device=devices.current()) for heads in (4, 2, 2))
    out = attend(made, query, key, value, mask)

    for b in range(4):
        columns = mask[b].bool()
        row = slice(b, b + 1)
        q, k, v = (t[row].masked_fill(~columns[:, None], torch.nan) for t in (query, key, value))
        assert torch.equal(out[row], attend(made, q, k, v, mask[row]))
        assert (out[b, ~columns] == 0).all()


def attend(made: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """One layer's attention with a fresh cache."""
    rows, columns = mask.shape
    visible = visible_tokens(rows, columns, columns, attention_mask=mask, device=devices.current())
    new_key, new_value = FlashCoreCache(made, 16).update(key, value, 0)
    out, _ = flashcore_attention(torch.nn.Module(), query, new_key, new_value, visible)
    return out


@pytest.mark.parametrize("padded", [left_padded, right_padded, None], ids=["left", "right", "whole"])
@pytest.mark.parametrize("cached", [0, 9])
def test_with_the_librarys_own_cache_only_attention_is_done(padded: Any, cached: int) -> None:
    """Given all columns, padding included, each row attends to its real ones within the error budget."""
    columns = cached + 9
    mask = None if padded is None else torch.cat([padded(), padded()], dim=1)[:, :columns]
    visible = visible_tokens(4, 9, columns, cached, attention_mask=mask, device=devices.current())
    query = torch.randn(4, 4, 9, 16, device=devices.current())
    key, value = (torch.randn(4, 2, columns, 16, device=devices.current()) for _ in range(2))

    out, _ = flashcore_attention(torch.nn.Module(), query, key, value, visible, scaling=0.25)

    real = np.ones((4, columns), bool) if mask is None else mask.cpu().numpy().astype(bool)
    for b in range(4):
        new = real[b, cached:]
        q, k, v = (decode(bits_of(t[b]), "float32") for t in (query, key, value))
        row = Activation(q[:, new], k[:, real[b]], v[:, real[b]], 0.25, "float32", int(real[b, :cached].sum()), 9)
        exact, allowed = row.expected()
        got = decode(bits_of(out[b].transpose(0, 1)), "float32")
        assert (np.abs(got[:, new] - exact) <= allowed).all()
        assert (got[:, ~new] == 0).all()


def test_a_prompt_in_chunks_is_one_prompt() -> None:
    flash, eager = tiny_llamas.pair(tiny_llamas.config(9, 3, 64))
    inputs, steps, logits = run(flash, tiny_llamas.tokens(2, 11), None, (4, 5, 1, 1))

    assert [step[0].rows[0].cached for step in steps] == [0, 4, 9, 10]
    assert max(worst_of(call) for step in steps for call in step) <= 1
    again = replay(eager, inputs, steps)
    assert all(torch.equal(first, second) for first, second in zip(logits, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_model_in_half_precision(dtype: torch.dtype) -> None:
    """Prefill and two steps of a padded batch: the formats that models are run in."""
    flash, eager = (model.to(dtype) for model in tiny_llamas.pair(tiny_llamas.config(8, 2, 64)))
    mask = torch.cat([left_padded(), torch.ones(4, 2, dtype=torch.int64, device=devices.current())], dim=1)
    inputs, steps, logits = run(flash, tiny_llamas.tokens(4, 11) * mask, mask, (9, 1, 1))

    assert logits[-1].dtype == dtype
    assert max(worst_of(call) for step in steps for call in step) <= 1
    again = replay(eager, inputs, steps, mask)
    assert all(torch.equal(first, second) for first, second in zip(logits, again, strict=True))


RELATIVES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "Mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "Qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "Qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
}


@pytest.mark.parametrize("name", list(RELATIVES))
def test_the_llama_family_shares_the_interface(name: str) -> None:
    kind, model_class, others = RELATIVES[name]
    flash, eager = tiny_llamas.pair(tiny_llamas.config(4, 2, 16, kind=kind, **others), model_class=model_class)
    inputs, steps, logits = run(flash, tiny_llamas.tokens(1, 7), None, (5, 1, 1))

    assert max(worst_of(call) for step in steps for call in step) <= 1
    again = replay(eager, inputs, steps)
    assert all(torch.equal(first, second) for first, second in zip(logits, again, strict=True))


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "three beams": {"num_beams": 3},
    "two beams, two results": {"num_beams": 2, "num_return_sequences": 2},
    "a prompt in chunks": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("ours", [True, False], ids=["FlashCoreCache", "DynamicCache"])
@pytest.mark.parametrize("way", list(WAYS))
def test_generate_gives_the_tokens_of_eager_attention(way: str, ours: bool) -> None:
    """A left-padded batch of four; the models' logits differ by far more than rounding."""
    flash, eager = tiny_llamas.pair(tiny_llamas.config(4, 1, 16, num_hidden_layers=1))
    mask = left_padded()
    arguments = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, **WAYS[way]}
    cache = {"past_key_values": FlashCoreCache(flash.config, 16)} if ours else {}

    ids = tiny_llamas.tokens(4, 9) * mask
    assert torch.equal(flash.generate(ids, **arguments, **cache), eager.generate(ids, **arguments))


def test_a_conversation_goes_on_with_the_same_cache() -> None:
    """The second call is given all tokens, of which the cache holds all but the last of the first answer."""
    flash, eager = tiny_llamas.pair(tiny_llamas.config(4, 1, 16, num_hidden_layers=1))
    cache = FlashCoreCache(flash.config, 32)
    ids = tiny_llamas.tokens(1, 5)
    for turn in range(2):
        answer = flash.generate(ids, max_new_tokens=4, do_sample=False, past_key_values=cache)

        assert torch.equal(answer, eager.generate(ids, max_new_tokens=4, do_sample=False))
        assert cache.get_seq_length() == answer.shape[1] - 1
        ids = torch.cat([answer, tiny_llamas.tokens(1, 5, seed=turn + 1)], dim=1)


@pytest.mark.parametrize("how", ["assistant", "prompt lookup"])
def test_rejected_guesses_leave_no_trace(how: str) -> None:
    """Assisted generation crops the cache after every guess, and gives what greedy generation gives."""
    flash, eager = tiny_llamas.pair(tiny_llamas.config(4, 1, 16, num_hidden_layers=1))
    assistant, _ = tiny_llamas.pair(tiny_llamas.config(4, 1, 16, num_hidden_layers=1), seed=1)
    help_from = {"assistant_model": assistant} if how == "assistant" else {"prompt_lookup_num_tokens": 3}
    ids = tiny_llamas.tokens(1, 9)
    cache = FlashCoreCache(flash.config, 32)
    guessed = flash.generate(ids, max_new_tokens=12, do_sample=False, past_key_values=cache, **help_from)

    assert torch.equal(guessed, eager.generate(ids, max_new_tokens=12, do_sample=False))
    assert cache.get_seq_length() == guessed.shape[1] - 1
