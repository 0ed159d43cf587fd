"""x_transformers.attend.Attend, without its flash path."""

from __future__ import annotations

from typing import ClassVar

import torch

from properties.capabilities import Capabilities, Policy
from properties.subjects.adapter import Adapter, Call


class XTransformers(Adapter):
    """Nothing about it is documented but its signature."""

    name = "x-transformers"
    requires: ClassVar[dict[str, str]] = {"x-transformers": "x_transformers"}
    capabilities = Capabilities(
        cache="none",
        overflow=False,
        lse=False,
        tiles=False,
        empty=False,
        blind=False,
        policies={
            "causal alignment": Policy("bottom-right; off for one query", "observed"),
            "scale": Policy("1/sqrt(dim_head) by default", "observed"),
            "empty rows": Policy("0 by its mask, the mean of all values by mask and causality together", "observed"),
            "NaN in unread memory": Policy("a masked value that is NaN makes its row NaN", "observed"),
            "visible NaN": Policy("reaches what sees it", "observed"),
            "bits across runs": Policy("the same on a CPU", "observed"),
        },
    )

    def run(self, call: Call) -> torch.Tensor:
        """Use its own causal mask where rows are alike, else one made for the call; its groups have another order."""
        from x_transformers.attend import Attend

        alike = set(call.new_lens) <= {call.q_len} and set(call.kv_lens) <= {call.keys.shape[2]}
        is_causal = call.is_causal and alike
        attend = Attend(causal=is_causal, heads=call.query.shape[1], scale=call.scale)
        mask = None if is_causal else call.mask
        out: torch.Tensor = attend(call.query, call.repeated(call.keys), call.repeated(call.values), mask=mask)[0]
        return out
