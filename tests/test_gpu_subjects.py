"""Adapters of kernels that need a GPU: what can be seen of them without one."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.nn.attention import SDPBackend

from properties import device, subjects
from properties.assertions import LawViolation
from properties.capabilities import NotOffered
from properties.case import Case, Row, Step
from properties.checking import check
from properties.subjects import SubjectError, flashinfer_attention
from properties.subjects.adapter import Adapter, as_subject
from properties.subjects.flag_gems_attention import Paged as FlagGemsPaged
from properties.subjects.flag_gems_attention import Varlen as FlagGemsVarlen
from properties.subjects.flashinfer_attention import FlashInfer
from properties.subjects.flex_attention import FlexCompiled, FlexCompiledCpu, FlexEager
from properties.subjects.torch_sdpa import Cudnn, FlashCuda
from properties.subjects.torch_varlen import Varlen
from properties.subjects.xformers_splitk import SplitK
from references.arithmetic_model import PERMISSIVE
from tests.command_line import properties

ON_A_GPU_ALONE = [name for name in subjects.ADAPTERS if subjects.find(name).capabilities.devices == ("cuda",)]
ALIKE = Case(
    (Row(5, (3, 1)), Row(5, (3, 1), 1)),
    (Step(), Step()),
    2,
    1,
    head_dim=32,
    dtype="float16",
    is_causal=True,
    start="tuple",
    capacity=40,
    values="normal",
)
RAGGED = replace(ALIKE, rows=(Row(13, (3, 1)), Row(0, (2, 1), 1), Row(17, (0, 1), 2)))


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is a GPU."""
    monkeypatch.setattr(device, "current", lambda: "cpu")


@pytest.mark.parametrize("name", ON_A_GPU_ALONE)
def test_without_a_gpu_it_is_refused_and_with_one_it_loads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = subjects.find(name).requires
    monkeypatch.setattr(subjects.find(name), "requires", {})
    with pytest.raises(SubjectError, match=f"--subject {name} runs on cuda, not on cpu"):
        subjects.load(name)

    monkeypatch.setattr(device, "current", lambda: "cuda")
    if not needs:
        assert subjects.load(name).spec == name


def test_verify_says_that_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = properties("verify", "--subject", "torch-sdpa-cudnn", "--device", "cuda", "-n", 1, folder=tmp_path)

    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("must be available, got cuda, and torch sees no CUDA device")
    assert "Traceback" not in done.stdout + done.stderr


def test_inputs_that_a_backend_refuses_are_no_verdict() -> None:
    """cuDNN has no kernel for a CPU."""
    with pytest.raises(NotOffered, match="what this backend does not take"):
        check(ALIKE, as_subject(Cudnn(), "cudnn"))


@pytest.mark.parametrize("group_size", [1, 3])
def test_a_causal_call_without_a_mask_is_aligned_with_the_last_key(
    group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FlashCuda, "backends", (SDPBackend.MATH,))

    assert 0 < check(replace(ALIKE, group_size=group_size), as_subject(FlashCuda(), "flash")).out < 1


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """One row, [tokens, heads, head_dim] each, and its log-sum-exps [tokens, heads]; what sees no key is garbage."""
    q, k, v = (x.float().transpose(0, 1) for x in (query, key, value))
    k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
    logits = q @ k.mT * scale
    if is_causal:
        logits = logits.masked_fill(torch.ones_like(logits).triu(1 + k.shape[1] - q.shape[1]) > 0, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(0, 1).to(query.dtype), logits.logsumexp(-1).T


def attend_packed(
    query: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    ends_q: torch.Tensor,
    scale: float,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows one after the other."""
    rows = torch.split(query, ends_q.diff().tolist())
    results = [attend(q, k, v, scale, is_causal) for q, k, v in zip(rows, keys, values, strict=True)]
    outs, sums = zip(*results, strict=True)
    return torch.cat(outs), torch.cat(sums)


def in_pages(pages: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """[length, heads, head_dim], what pages in the order of a table hold."""
    return pages[table[: -(-length // pages.shape[1])].long()].flatten(0, 1)[:length]


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends_q: torch.Tensor,
    ends_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any,
    scale: float,
    window_size: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's."""
    assert return_aux.lse
    assert (max_q, max_k) == (int(ends_q.diff().max()), int(ends_k.diff().max()))
    keys, values = (list(torch.split(x, ends_k.diff().tolist())) for x in (key, value))
    out, lse = attend_packed(query, keys, values, ends_q, scale, window_size == (-1, 0))
    return out, lse.T


def flash_attn_varlen_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
    """FlagGems'."""
    assert options["return_softmax_lse"]
    if "block_table" in options:
        lengths = options["seqused_k"].tolist()
        keys, values = (
            [in_pages(x, row, n) for row, n in zip(options["block_table"], lengths, strict=True)] for x in (k, v)
        )
    else:
        lengths = options["cu_seqlens_k"].diff().tolist()
        keys, values = (list(torch.split(x, lengths)) for x in (k, v))
    assert options["max_seqlen_k"] == max(lengths)
    assert options["max_seqlen_q"] == int(options["cu_seqlens_q"].diff().max())
    out, lse = attend_packed(q, keys, values, options["cu_seqlens_q"], options["softmax_scale"], options["causal"])
    return out, lse.T


class PagedWrapper:
    """FlashInfer's, for decoding and for prompts; one of them for all calls."""

    def __init__(self, workspace: torch.Tensor, layout: str, *, backend: str) -> None:
        assert (len(workspace), layout, backend) == (128 << 20, "NHD", "fa2")

    def run(self, query: torch.Tensor, cache: Any, *, return_lse: bool) -> Any:
        assert return_lse
        tables = torch.split(self.table, self.ends_pages.diff().tolist())
        lengths = [16 * max(len(t) - 1, 0) + int(n) for t, n in zip(tables, self.last, strict=True)]
        keys, values = ([in_pages(x, t, n) for t, n in zip(tables, lengths, strict=True)] for x in cache)
        out, lse = attend_packed(query, keys, values, self.ends_q, self.scale, self.is_causal)
        return out, lse / math.log(2)

    def plan_for(self, ends_q: torch.Tensor, cache: Any, is_causal: bool, sm_scale: float) -> None:
        self.ends_q, self.is_causal, self.scale = ends_q, is_causal, sm_scale
        self.ends_pages, self.table, self.last = cache


class PrefillWrapper(PagedWrapper):
    def plan(
        self, ends_q: torch.Tensor, *args: Any, causal: bool, sm_scale: float, q_data_type: Any, kv_data_type: Any
    ) -> None:
        assert q_data_type == kv_data_type
        self.plan_for(ends_q, args[:3], causal, sm_scale)


class DecodeWrapper(PagedWrapper):
    def plan(self, *args: Any, sm_scale: float, q_data_type: Any, kv_data_type: Any) -> None:
        assert q_data_type == kv_data_type
        self.plan_for(torch.arange(len(args[0])), args[:3], False, sm_scale)


class Blocks:
    """xformers' mask of rows that have keys of one length, used up to another."""

    is_causal = False

    def __init__(self, queries: list[int], padding: int, used: tuple[int, ...]) -> None:
        self.queries, self.padding, self.used = queries, padding, used

    @classmethod
    def from_seqlens(cls, queries: list[int], padding: int, used: tuple[int, ...], device: torch.device) -> Blocks:
        assert device.type == "cpu"
        return cls(queries, padding, used)


class CausalBlocks(Blocks):
    is_causal = True


def memory_efficient_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Blocks | None, *, scale: float, op: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """xformers': [rows, tokens, kv heads, group, head_dim], in which keys of a group are one."""
    assert op == "split-k"
    heads = query.shape[2:4]
    q, k, v = (x.flatten(2, 3) for x in (query, key, value))
    if bias is None:
        rows = [attend(*row, scale, False) for row in zip(q, k, v, strict=True)]
        outs, sums = (torch.stack(x) for x in zip(*rows, strict=True))
        return outs.view(query.shape), sums.mT.reshape(len(q), *heads, -1)
    assert len(q) == len(k) == 1
    ends = torch.tensor([0, *bias.queries]).cumsum(0)
    keys, values = (
        [row[:n] for row, n in zip(torch.split(x[0], bias.padding), bias.used, strict=True)] for x in (k, v)
    )
    out, lse = attend_packed(q[0], keys, values, ends, scale, bias.is_causal)
    return out.view(query.shape), lse.T.reshape(1, *heads, -1)


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for what they import."""
    biases = {"BlockDiagonalPaddedKeysMask": Blocks, "BlockDiagonalCausalWithOffsetPaddedKeysMask": CausalBlocks}
    fmha = SimpleNamespace(
        attn_bias=SimpleNamespace(**biases),
        memory_efficient_attention_forward_requires_grad=memory_efficient_attention,
        triton_splitk=SimpleNamespace(FwOp="split-k"),
    )
    for name, module in {
        "flag_gems": SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func),
        "flashinfer": SimpleNamespace(
            BatchDecodeWithPagedKVCacheWrapper=DecodeWrapper, BatchPrefillWithPagedKVCacheWrapper=PrefillWrapper
        ),
        "xformers": SimpleNamespace(_has_cpp_library=True),
        "xformers.ops": SimpleNamespace(fmha=fmha),
    }.items():
        monkeypatch.setitem(sys.modules, name, cast(Any, module))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(flashinfer_attention, "_workspace", lambda: torch.empty(128 << 20, dtype=torch.uint8))


@pytest.mark.usefixtures("foreign")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kernel", [Varlen, FlagGemsVarlen, FlagGemsPaged, FlashInfer, SplitK])
def test_rows_are_given_as_the_kernel_wants_them(kernel: type[Adapter], is_causal: bool) -> None:
    """In a way that what it returns is right."""
    offered = kernel.capabilities
    rows = replace(RAGGED, is_causal=is_causal, head_dim=64)
    if not offered.padding:
        rows = replace(rows, rows=(Row(13, (3, 1)), Row(0, (3, 1), 1), Row(17, (3, 1), 2)))
    plain = Case((Row(17, (4,)), Row(17, (4,), 1)), op="attention", head_dim=64, dtype="float16", values="normal")
    for case in (replace(ALIKE, head_dim=64, is_causal=is_causal), rows, replace(plain, is_causal=is_causal)):
        for group_size in {1, 3} & set(offered.groups):
            used = check(replace(case, group_size=group_size), as_subject(kernel(), kernel.name))
            assert 0 < used.out < 1
            assert 0 < used.lse < 1


def attend_by_rounded_weights(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``attend``; the row sum adds weights in the format of the query."""
    q, k, v = (x.float().transpose(0, 1) for x in (query, key, value))
    logits = q @ k.mT * scale
    if is_causal:
        logits = logits.masked_fill(torch.ones_like(logits).triu(1 + k.shape[1] - q.shape[1]) > 0, -torch.inf)
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).exp().to(query.dtype).float()
    row_sum = weights.sum(-1, keepdim=True)
    return (weights @ v / row_sum).transpose(0, 1).to(query.dtype), (top + row_sum.log())[..., 0].T


@pytest.mark.usefixtures("foreign")
def test_a_row_sum_of_rounded_weights_is_the_arithmetic_of_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the budget of a kernel of which nothing is known, and within the one that it declares."""
    monkeypatch.setattr("tests.test_gpu_subjects.attend", attend_by_rounded_weights)
    case = replace(RAGGED, head_dim=64, dtype="bfloat16")

    assert 0 < check(case, as_subject(FlashInfer(), "flashinfer")).lse < 1
    monkeypatch.setattr(FlashInfer, "model", Adapter.model)
    with pytest.raises(LawViolation, match="lse exceeds its error budget"):
        check(case, as_subject(FlashInfer(), "flashinfer"))


def attend_in_parts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, is_causal: bool, attend: Any = attend
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``attend``; parts of 128 keys, whose outputs are rounded as the result is."""
    parts = zip(torch.split(key, 128), torch.split(value, 128), strict=True)
    outs, sums = zip(*(attend(query, k, v, scale, is_causal) for k, v in parts), strict=True)
    shares = torch.stack(sums).softmax(0)[..., None]
    return (torch.stack(outs).float() * shares).sum(0).to(query.dtype), torch.stack(sums).logsumexp(0)


@pytest.mark.usefixtures("foreign")
def test_parts_in_the_format_of_the_output_are_the_arithmetic_of_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest row that it splits; in the format of the work they would break the budget, as on an H100."""
    monkeypatch.setattr("tests.test_gpu_subjects.attend", attend_in_parts)
    case = Case(
        (Row(128, (1,)),), (Step(),), head_dim=64, dtype="float16", start="tuple", capacity=129, values="large_values"
    )

    assert 0 < check(case, as_subject(FlashInfer(), "flashinfer")).out < 1
    whole = replace(PERMISSIVE, row_sum_from_p=True)
    monkeypatch.setattr(FlashInfer, "model", lambda *_: whole)
    with pytest.raises(LawViolation, match=r"3 of 64 elements\n.*d=3]: expected -0x1.6ac53ep\+15, got -0x1.6bp\+15"):
        check(case, as_subject(FlashInfer(), "flashinfer"))


@pytest.mark.usefixtures("foreign")
def test_what_split_k_refuses_by_its_documents_is_no_verdict() -> None:
    prompt = Case((Row(0, (17,)),), (Step(),), dtype="float16", head_dim=32)

    assert check(prompt, as_subject(SplitK(), "split-k")).out < 1
    with pytest.raises(NotOffered, match="causal calls of more than 16 queries"):
        check(replace(prompt, is_causal=True), as_subject(SplitK(), "split-k"))


@pytest.mark.usefixtures("foreign")
def test_split_k_without_its_extension_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """xformers would refuse every call: no verdict on the kernel."""
    monkeypatch.setattr("xformers._has_cpp_library", False)

    with pytest.raises(SubjectError, match="built for another PyTorch or CUDA"):
        SplitK()


@pytest.mark.parametrize("kind", [FlexCompiled, FlexCompiledCpu])
@pytest.mark.parametrize("is_causal", [True, False])
def test_a_compiled_function_gets_what_the_eager_one_gets(
    kind: type[FlexCompiled], is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced for any lengths and run uncompiled: 16-bit scores are rounded then, so in float32."""
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend="eager"))
    has_lse = kind.capabilities.lse
    monkeypatch.setattr(kind, "capabilities", replace(FlexEager.capabilities, lse=has_lse))

    used = check(replace(RAGGED, dtype="float32", group_size=3, is_causal=is_causal), as_subject(kind(), "flex"))
    assert 0 < used.out < 1
    assert (0 < used.lse < 1) == has_lse
