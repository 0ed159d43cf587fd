"""PyTorch's FlexAttention, not compiled, compiled for CUDA and compiled for a CPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from properties.capabilities import Policy, Topic
from properties.subjects.adapter import Adapter, Call, Result
from properties.subjects.torch_sdpa import CAPABILITIES

_DOCS = "https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html"
_DOCUMENTED: dict[Topic, Policy] = {
    "causal alignment": Policy("the caller's: a mask is a function of both indices", "documented", _DOCS),
    "scale": Policy("any number; 1/sqrt(head_dim) by default", "documented", _DOCS, is_ours=True),
}


class FlexEager(Adapter):
    """Uncompiled: matrix products and a softmax over all scores.

    Only in float32: it rounds 16-bit scores to 16 bits, and for that no error budget is derived.
    """

    name = "torch-flex-eager"
    slow = True
    capabilities = replace(
        CAPABILITIES,
        dtypes=("float32",),
        empty=False,
        lse=True,
        policies={
            **_DOCUMENTED,
            "empty rows": Policy("0 and -inf", "observed", is_ours=True),
            "NaN in unread memory": Policy("in a masked value it reaches the output, in a key not", "observed"),
        },
    )

    def __init__(self) -> None:
        """Use the function as it is."""
        self.attend: Callable[..., Any] = flex_attention

    def sees(self, call: Call) -> Callable[..., torch.Tensor]:
        """Whether query i of row b sees key j: a function of (b, head, i, j), tensors of integers."""
        assert call.mask is not None
        mask = call.mask.expand(call.query.shape[0], -1, -1, -1)
        return lambda b, _, i, j: mask[b, 0, i, j]

    def run(self, call: Call) -> Result:
        """Give it the mask of the call, if one is needed."""
        batch, slots, device = call.query.shape[0], call.keys.shape[2], str(call.query.device)
        block_mask = None
        if not call.is_full:
            block_mask = create_block_mask(self.sees(call), batch, None, call.q_len, slots, device=device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is not compiled
            result = self.attend(
                call.query,
                call.keys,
                call.values,
                block_mask=block_mask,
                scale=call.scale,
                enable_gqa=call.group_size > 1,
                return_aux=AuxRequest(lse=True) if self.capabilities.lse else None,
            )
        if not self.capabilities.lse:
            return Result(result)
        out, aux = result
        return Result(out, aux.lse)


class FlexCompiled(FlexEager):
    """Compiled for CUDA: a Triton kernel, for each pair of numbers of heads another, in seconds.

    What it is offered is limited so that few are compiled: one head_dim, two sizes of groups, small cases.
    """

    name = "torch-flex-compiled"
    capabilities = replace(
        FlexEager.capabilities,
        dtypes=("float16", "bfloat16"),
        head_dims=(64,),
        groups=(1, 4),
        devices=("cuda",),
        policies=_DOCUMENTED,
    )

    def __init__(self) -> None:
        """Have it compiled for all lengths at once, and for as many numbers of heads as there are."""
        # Beyond its limit the compiler leaves the function as it is, which is another kernel.
        torch._dynamo.config.recompile_limit = 1 << 20
        torch._dynamo.config.accumulated_recompile_limit = 1 << 20
        # Processes of its own would outlive a worker that is killed.
        torch._inductor.config.compile_threads = 1
        self.attend = torch.compile(flex_attention, dynamic=True, fullgraph=True)


class FlexCompiledCpu(FlexCompiled):
    """Compiled for a CPU: a kernel in C++, in some six seconds for each pair of numbers of heads and dtype.

    It returns no log-sum-exps: NotImplementedError in 2.13. The mask is computed from lengths, not read from a tensor
    as elsewhere: with that most kernels do not compile, the finding torch-flex-cpu-dynamic-mask-does-not-compile.
    """

    name = "torch-flex-compiled-cpu"
    capabilities = replace(
        FlexCompiled.capabilities,
        dtypes=("float32", "float16", "bfloat16"),
        lse=False,
        devices=("cpu",),
    )

    def sees(self, call: Call) -> Callable[..., torch.Tensor]:
        """As the mask of the call."""
        queries = call.new_lens if call.is_causal else (1,) * len(call.new_lens)
        kv_lens, real = torch.tensor(call.kv_lens), torch.tensor(queries)
        return lambda b, _, i, j: j <= (kv_lens[b] - 1 - (real[b] - 1 - i).clamp_min(0)).clamp_min(0)
