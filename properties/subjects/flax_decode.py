"""flax.nnx.MultiHeadAttention decoding one token at a time, with identities for projections."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from properties.capabilities import Capabilities, Policy
from properties.subjects.adapter import Adapter, Call, Result

_DOCS = "https://flax.readthedocs.io/en/latest/api_reference/flax.nnx/nn/attention.html#flax.nnx.MultiHeadAttention"


class FlaxDecode(Adapter):
    """Its cache has one index for all rows; a new token is compiled for each shape, so cases are small."""

    name = "flax-decode"
    requires: ClassVar[dict[str, str]] = {"flax": "flax"}
    slow = True
    capabilities = Capabilities(
        ops=("attention_with_kv_cache",),
        masks=(True,),  # A token sees itself and what was cached.
        scales="default",
        ragged=False,
        padding=False,
        cache="functional",
        overflow=False,
        growth=False,
        peeks=False,
        lse=False,
        tiles=False,
        empty=False,
        devices=("cpu",),
        policies={
            "causal alignment": Policy("bottom-right, by its cache index", "documented", _DOCS, is_ours=True),
            "scale": Policy("1/sqrt(head_dim)", "observed"),
            "empty rows": Policy("there are none", "observed"),
            "NaN in unread memory": Policy("a slot past the index that is NaN makes its row NaN", "observed"),
            "bits across runs": Policy("the same on a CPU", "observed"),
        },
    )

    def run(self, call: Call) -> Result:
        """Fill the cache with what is there and feed the new tokens."""
        import jax.numpy as jnp
        import numpy as np
        from flax import nnx

        dtype = jnp.dtype(str(call.query.dtype).removeprefix("torch."))
        batch, num_q_heads, q_len, head_dim = call.query.shape
        num_kv_heads, cached = call.new_keys.shape[1], call.seq_lens[0]

        def array(tensor: torch.Tensor) -> Any:
            return jnp.asarray(tensor.transpose(1, 2).float().numpy()).astype(dtype)

        layer = nnx.MultiHeadAttention(
            num_heads=num_q_heads,
            in_features=num_q_heads * head_dim,
            in_kv_features=num_kv_heads * head_dim,
            num_kv_heads=num_kv_heads,
            use_bias=False,
            decode=True,
            dtype=dtype,
            param_dtype=dtype,
            rngs=nnx.Rngs(0),
        )
        for projection in (layer.query, layer.key, layer.value, layer.out):
            shape = projection.kernel.shape
            features = num_q_heads * head_dim if projection in (layer.query, layer.out) else num_kv_heads * head_dim
            projection.kernel[...] = jnp.eye(features, dtype=dtype).reshape(shape)
        layer.init_cache((batch, call.kv_lens[0], 1), dtype)
        if call.buffers is not None:
            for slots, buffer in zip((layer.cached_key, layer.cached_value), call.buffers, strict=True):
                slots[...] = slots[...].at[:, :cached].set(array(buffer[:, :, :cached]))
        layer.cache_index[...] = jnp.int32(cached)

        tokens = [array(each).reshape(batch, q_len, -1) for each in (call.query, call.new_keys, call.new_values)]
        # Documented to be ignored while decoding; flax 0.12.8 hides all keys but the first then.
        outs = [layer(*(each[:, i : i + 1] for each in tokens), is_causal=True) for i in range(q_len)]

        def tensor(value: Any) -> torch.Tensor:
            heads = value.reshape(batch, value.shape[1], -1, head_dim).astype(jnp.float32)
            return torch.tensor(np.asarray(heads)).transpose(1, 2).to(call.query.dtype)

        buffers = (tensor(layer.cached_key[...]), tensor(layer.cached_value[...]))
        return Result(tensor(jnp.concatenate(outs, axis=1)), buffers=buffers)
