"""What the integration refuses, in the words it refuses it with, and that it then writes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    StaticCache,
)

from flashcore import CacheOverflowError
from flashcore.integrations.transformers import FlashCoreCache, flashcore_attention
from flashcore.integrations.transformers_padding import visible_tokens
from properties import device as devices
from tests import tiny_llamas

CONFIG = tiny_llamas.config(4, 2, 16)


@pytest.fixture(scope="module")
def flash() -> Any:
    return tiny_llamas.pair(CONFIG)[0]


def forward(model: Any, ids: Any = None, **arguments: Any) -> Any:
    with torch.no_grad():
        return model(tiny_llamas.tokens(2, 4) if ids is None else ids, **arguments)


def mask_of(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, device=devices.current())


def refused(error: type[Exception], text: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == text


def test_padding_inside_a_sequence(flash: Any) -> None:
    cache = FlashCoreCache(CONFIG, 8)

    refused(
        ValueError,
        "attention_mask must mark the new tokens of a row as one block, with padding on its left or right, "
        "got padding inside the sequence of row 1 at column 2",
        lambda: forward(flash, attention_mask=mask_of([0, 1, 1, 0], [0, 1, 0, 1]), past_key_values=cache),
    )
    assert cache.get_seq_length() == 0
    forward(flash, attention_mask=mask_of([0, 1, 1, 0], [0, 1, 1, 1]), past_key_values=cache)
    refused(
        ValueError,
        "attention_mask must mark the new tokens of a row as one block, with padding on its left or right, "
        "got padding inside the sequence of row 0 at column 5",
        lambda: forward(
            flash,
            attention_mask=mask_of([0, 1, 1, 0, 1, 0, 1, 0], [0, 1, 1, 1, 1, 1, 1, 1]),
            past_key_values=cache,
        ),
    )


@pytest.mark.parametrize("mask", [None, [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]], [[1, 0, 1, 1, 1], [1, 1, 1, 1, 1]]])
def test_a_mask_that_contradicts_what_was_cached(flash: Any, mask: Any) -> None:
    cache = FlashCoreCache(CONFIG, 8)
    forward(flash, attention_mask=mask_of([0, 1, 1, 1], [1, 1, 1, 1]), past_key_values=cache)

    refused(
        ValueError,
        "attention_mask must mark the same padding as in earlier calls with this cache, got another mask for cached "
        "tokens: what was padding then was not stored",
        lambda: forward(
            flash,
            tiny_llamas.tokens(2, 1),
            attention_mask=None if mask is None else mask_of(*mask),
            past_key_values=cache,
        ),
    )
    assert cache.get_seq_length() == 4


def test_masks_that_no_length_expresses(flash: Any) -> None:
    custom = torch.ones(2, 1, 4, 4, dtype=torch.bool, device=devices.current())
    refused(
        NotImplementedError,
        "attention_mask must be [batch, columns] and pass through the model, which turns it into lengths, "
        "got a custom mask of shape [2, 1, 4, 4] in an attention layer",
        lambda: forward(flash, attention_mask=custom),
    )
    refused(
        NotImplementedError,
        "flashcore attends causally to whole sequences; a packed batch (position_ids that restart within a row), "
        "a bidirectional or another custom mask is not supported",
        lambda: forward(flash, position_ids=mask_of([0, 1, 0, 1], [0, 1, 2, 3]), use_cache=False),
    )
    refused(
        ValueError,
        "attention_mask must cover the cached and the new tokens, [batch, columns] = [2, 4], got [2, 3]",
        lambda: forward(flash, attention_mask=mask_of([1, 1, 1], [1, 1, 1]), past_key_values=FlashCoreCache(CONFIG)),
    )


def test_a_layer_called_without_its_models_mask(flash: Any) -> None:
    query, key = (torch.randn(1, heads, 4, 16, device=devices.current()) for heads in (4, 2))
    refused(
        NotImplementedError,
        "attention_mask must be [batch, columns] and pass through the model, which turns it into lengths, "
        "got None in an attention layer",
        lambda: flashcore_attention(flash.model.layers[0].self_attn, query, key, key, None),
    )


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "sliding_window": ({"sliding_window": 8}, "sliding-window attention, got sliding_window=8"),
    "softcap": ({"softcap": 50.0}, "soft-capped logits, got softcap=50.0"),
    "s_aux": ({"s_aux": torch.zeros(4)}, "attention sinks, got s_aux=a tensor of shape [4]"),
    "output_attentions": (
        {"output_attentions": True},
        "output_attentions (the weights are never formed), got output_attentions=True",
    ),
    "is_causal": ({"is_causal": False}, "the argument is_causal of this model's attention, got is_causal=False"),
    "unknown": ({"position_bias": 1}, "the argument position_bias of this model's attention, got position_bias=1"),
}


@pytest.mark.parametrize("name", list(UNSUPPORTED))
def test_arguments_that_ask_for_more(name: str) -> None:
    arguments, feature = UNSUPPORTED[name]
    query, key = (torch.randn(1, heads, 4, 16, device=devices.current()) for heads in (4, 2))
    visible = visible_tokens(1, 4, 4)
    module = torch.nn.Module()

    refused(
        NotImplementedError,
        f"flashcore does not support {feature}",
        lambda: flashcore_attention(module, query, key, key, visible, **arguments),
    )
    unset: dict[str, Any] = dict.fromkeys(arguments)
    flashcore_attention(module, query, key, key, visible, use_cache=True, **unset)


def test_dropout() -> None:
    query, key = (torch.randn(1, heads, 4, 16, device=devices.current()) for heads in (4, 2))
    refused(
        NotImplementedError,
        "flashcore is forward only and has no dropout, got attention dropout 0.1",
        lambda: flashcore_attention(torch.nn.Module(), query, key, key, visible_tokens(1, 4, 4), dropout=0.1),
    )


def test_models_with_other_attention() -> None:
    """They are refused by the name of the feature, with any cache."""
    mistral = tiny_llamas.config(4, 2, 16, kind=MistralConfig, sliding_window=8)
    gemma = tiny_llamas.config(4, 2, 16, kind=Gemma2Config, layer_types=["full_attention"] * 2)
    oss = tiny_llamas.config(4, 2, 16, kind=GptOssConfig, layer_types=["full_attention"] * 2, num_local_experts=2)
    for made, model_class, text in (
        (mistral, MistralForCausalLM, "sliding-window attention (sliding_window=8) is not supported"),
        (gemma, Gemma2ForCausalLM, "flashcore attends causally to whole sequences; sliding-window attention"),
        (oss, GptOssForCausalLM, "flashcore attends causally to whole sequences; sliding-window attention"),
    ):
        model, _ = tiny_llamas.pair(made, model_class=model_class)
        with pytest.raises(NotImplementedError) as caught:
            forward(model)
        assert text in str(caught.value)


def test_caches_of_models_with_other_attention() -> None:
    refused(
        NotImplementedError,
        "flashcore attends to whole sequences; sliding_window=8 is not supported",
        lambda: FlashCoreCache(tiny_llamas.config(4, 2, 16, kind=MistralConfig, sliding_window=8)),
    )
    refused(
        NotImplementedError,
        "flashcore caches full_attention layers only, got sliding_attention",
        lambda: FlashCoreCache(
            tiny_llamas.config(4, 2, 16, kind=Qwen2Config, layer_types=["full_attention", "sliding_attention"])
        ),
    )


def test_latent_attention() -> None:
    latent = tiny_llamas.config(
        4, 4, 8, kind=DeepseekV3Config, num_hidden_layers=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    refused(
        NotImplementedError,
        "flashcore does not support multi-head latent attention, got kv_lora_rank=8",
        lambda: FlashCoreCache(latent),
    )
    model, _ = tiny_llamas.pair(latent, model_class=DeepseekV3ForCausalLM)
    refused(
        NotImplementedError,
        "flashcore does not support separate head sizes for keys and values, as multi-head latent attention has, "
        "got 16 and 8",
        lambda: forward(model),
    )


@pytest.mark.parametrize(("limit", "error"), [(0, ValueError), (-1, ValueError), (True, TypeError), (8.0, TypeError)])
def test_a_limit_that_is_none(limit: Any, error: type[Exception]) -> None:
    need = "an int" if error is TypeError else "at least 1"
    refused(error, f"max_cache_len must be {need}, got {limit!r}", lambda: FlashCoreCache(CONFIG, limit))


def test_a_cache_of_another_model(flash: Any) -> None:
    used = FlashCoreCache(CONFIG, 8)
    forward(tiny_llamas.pair(CONFIG, seed=1)[0], past_key_values=used)
    fewer_layers = FlashCoreCache(tiny_llamas.config(4, 2, 16, num_hidden_layers=1), 8)
    other_heads = FlashCoreCache(tiny_llamas.config(4, 4, 16), 8)
    start = "past_key_values must be a cache of this model"

    refused(
        ValueError,
        f"{start}, got one that another model has filled; reset() it, or make a new one",
        lambda: forward(flash, past_key_values=used),
    )
    refused(
        ValueError,
        f"{start}, got one of 1 layers for its layer 1",
        lambda: forward(flash, past_key_values=fewer_layers),
    )
    refused(
        ValueError,
        f"{start}: it was made for [num_kv_heads, head_dim] = [4, 16], got keys with [2, 16]",
        lambda: forward(flash, past_key_values=other_heads),
    )


def test_a_cache_of_another_batch_or_an_unfinished_pass(flash: Any) -> None:
    cache = FlashCoreCache(CONFIG, 8)
    forward(flash, past_key_values=cache)
    here = devices.current() + (":0" if devices.current() == "cuda" else "")

    refused(
        ValueError,
        f"past_key_values must be a cache of this batch: it holds 2 rows of torch.float32 on {here}, got 3 rows of "
        f"torch.float32 on {here}; reset() it, or make a new one",
        lambda: forward(flash, tiny_llamas.tokens(3, 1), past_key_values=cache),
    )
    cache.layers[1].crop(-1)
    refused(
        ValueError,
        "past_key_values must hold the same tokens in every layer, got 3 in this layer and 4 in the first: an earlier "
        "forward pass did not finish; crop() or reset() the cache",
        lambda: forward(flash, tiny_llamas.tokens(2, 1), past_key_values=cache),
    )


def test_a_cache_that_is_full(flash: Any) -> None:
    """Real tokens count; nothing of the call that does not fit is kept."""
    cache = FlashCoreCache(CONFIG, 5)
    mask = mask_of([1, 1, 1, 1], [0, 0, 1, 1])
    forward(flash, attention_mask=mask, past_key_values=cache)
    longer = torch.cat([mask, torch.ones_like(mask[:, :2])], dim=1)

    with pytest.raises(CacheOverflowError, match=r"row 0 holds 4 tokens and 2 new ones do not fit in cache_max_len=5"):
        forward(flash, tiny_llamas.tokens(2, 2), attention_mask=longer, past_key_values=cache)
    assert cache.get_seq_length() == 4
    forward(flash, tiny_llamas.tokens(2, 1), attention_mask=longer[:, :5], past_key_values=cache)


@pytest.mark.parametrize(("count", "held"), [(1, 4), (-5, 4)])
def test_cropping_what_is_not_there(flash: Any, count: int, held: int) -> None:
    cache = FlashCoreCache(CONFIG, 8)
    forward(flash, past_key_values=cache)

    refused(
        ValueError,
        f"tokens_to_remove must be a negative count of at most {held} cached tokens, or 0, got {count}",
        lambda: cache.crop(count),
    )
    cache.crop(-held)


def test_caches_that_hand_over_something_else(flash: Any) -> None:
    with pytest.raises(NotImplementedError, match="static and sliding caches are not supported"):
        forward(flash, past_key_values=StaticCache(config=flash.config, max_cache_len=8))
    forward(flash, past_key_values=DynamicCache(config=flash.config))


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_our_cache_with_another_attention(name: str) -> None:
    _, eager = tiny_llamas.pair(CONFIG)
    eager.set_attn_implementation(name)

    with pytest.raises(
        TypeError, match='FlashCoreCache must be used with attn_implementation="flashcore", got another'
    ):
        forward(eager, past_key_values=FlashCoreCache(CONFIG, 8))


def test_training(flash: Any) -> None:
    with pytest.raises(ValueError, match="q must not require grad while grad is enabled"):
        flash(tiny_llamas.tokens(2, 4))


def test_a_dtype_without_kernels() -> None:
    flash, _ = tiny_llamas.pair(CONFIG)
    with pytest.raises(TypeError, match=r"q must be float16, bfloat16 or float32, got torch\.float64"):
        forward(flash.double())


SCRIPT = """
import torch
from tests import tiny_llamas
from flashcore.integrations.transformers import FlashCoreCache
made = tiny_llamas.config(4, 2, 16)
flash = tiny_llamas.pair(made)[0].cpu()
for cache in ({}, {"past_key_values": FlashCoreCache(made)}):
    try:
        flash.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, **cache)
    except RuntimeError as error:
        print(error)
"""


def test_the_cpu_without_the_interpreter() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = "from properties import device\ndevice.choose = lambda requested='auto': 'cpu'\n" + SCRIPT
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert len(told) == 2
    assert all(
        "must be on a CUDA device unless Triton's interpreter is on, got cpu; to run on the CPU set" in t for t in told
    )
