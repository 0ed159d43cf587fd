"""The attention that transformers runs with attn_implementation="eager" or "sdpa", on its own caches."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from properties.capabilities import Capabilities, Policy
from properties.case import DTYPES
from properties.subjects.adapter import Adapter, Call, Result
from properties.subjects.torch_sdpa import TorchSDPA
from references.arithmetic_model import ArithmeticModel


def _offers(rollbacks: bool) -> Capabilities:
    """Only float32: 16-bit scores and weights are rounded to 16 bits, and for that no error budget is derived."""
    return Capabilities(
        dtypes=("float32",),
        ragged=False,
        padding=False,
        cache="functional",
        overflow=False,
        growth=False,
        peeks=False,
        forks=False,
        rollbacks=rollbacks,
        lse=False,
        tiles=False,
        empty=False,
        blind=False,
        policies={
            "causal alignment": Policy("the caller's: a mask is added to the scores", "observed"),
            "scale": Policy("the caller's", "observed"),
            "empty rows": Policy("the mean of all values: masks hold the smallest finite number", "observed"),
            "NaN in unread memory": Policy("in a masked key or value it reaches the output", "observed"),
        },
    )


class DynamicCacheEager(Adapter):
    """A cache that grows by concatenation and can be cropped."""

    name = "transformers-dynamic-cache"
    capabilities = _offers(rollbacks=True)
    requires: ClassVar[dict[str, str]] = {"transformers": "transformers"}

    def run(self, call: Call) -> Result:
        """Append, then attend to all that the cache returns."""
        from transformers.models.llama.modeling_llama import eager_attention_forward

        cache = self.continued(call)
        keys, values = cache.update(call.new_keys, call.new_values, 0)
        mask = self.added(call, keys.shape[2])
        module = SimpleNamespace(num_key_value_groups=call.group_size, training=False)
        out, _ = eager_attention_forward(module, call.query, keys, values, mask, scaling=call.scale)
        return Result(out.transpose(1, 2), buffers=(keys, values), state=cache)

    def continued(self, call: Call) -> Any:
        """The cache of the call before, cropped to the length that is meant; or a new one."""
        cache = self.fresh(call) if call.state is None else call.state
        held = cache.get_seq_length()
        length = call.seq_lens[0] if call.has_cache else 0
        if held > length:
            cache.crop(length - int(held))
        elif held < length and call.buffers is not None:
            keys, values = (buffer[:, :, :length] for buffer in call.buffers)
            cache.update(keys, values, 0)
        return cache

    def fresh(self, call: Call) -> Any:
        """An empty cache."""
        del call
        from transformers import DynamicCache

        return DynamicCache()

    def added(self, call: Call, slots: int) -> torch.Tensor | None:
        """The mask as transformers builds it: 0, or the smallest finite number; over all slots of the cache."""
        if call.mask is None and call.keys.shape[2] == slots:
            return None
        visible = call.keys.new_ones((1, 1, 1, call.keys.shape[2])).bool() if call.mask is None else call.mask
        hidden = torch.ones((*visible.shape[:3], slots), dtype=torch.bool, device=visible.device)
        hidden[..., : visible.shape[3]] = ~visible
        return call.query.new_zeros(hidden.shape).masked_fill(hidden, torch.finfo(call.query.dtype).min)


class StaticCacheEager(DynamicCacheEager):
    """A cache of fixed size, written in place once it exists."""

    name = "transformers-static-cache"
    capabilities = _offers(rollbacks=False)

    def fresh(self, call: Call) -> Any:
        """An empty cache of as many slots as the call allows."""
        from transformers import LlamaConfig, StaticCache

        slots = call.cache_max_len if call.has_cache else call.new_keys.shape[2]
        return StaticCache(config=LlamaConfig(num_hidden_layers=1), max_cache_len=slots)


class DynamicCacheSDPA(DynamicCacheEager):
    """A cache that grows by concatenation, and the attention that models have by default."""

    name = "transformers-sdpa"
    capabilities = replace(
        _offers(rollbacks=True),
        dtypes=DTYPES,
        policies={
            "causal alignment": Policy("the caller's: True in a mask is what a query sees", "observed"),
            "scale": Policy("the caller's", "observed"),
            "empty rows": Policy("0", "observed"),
        },
    )

    def run(self, call: Call) -> Result:
        """Append, then attend to all that the cache returns; without a mask where its own is the same."""
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        cache = self.continued(call)
        keys, values = cache.update(call.new_keys, call.new_values, 0)
        module = SimpleNamespace(num_key_value_groups=call.group_size, training=False)
        is_causal = call.is_causal and call.is_square
        mask = None if is_causal else call.mask
        out, _ = sdpa_attention_forward(module, call.query, keys, values, mask, scaling=call.scale, is_causal=is_causal)
        return Result(out.transpose(1, 2), buffers=(keys, values), state=cache)

    def model(self, device: str) -> ArithmeticModel:
        """PyTorch's, whatever backend it chooses."""
        return TorchSDPA().model(device)
