"""Adapters of kernels that need a GPU: what can be seen of them without one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from properties import device, subjects
from properties.capabilities import NotOffered
from properties.case import Case, Row, Step
from properties.checking import check
from properties.subjects import SubjectError
from properties.subjects.adapter import as_subject
from properties.subjects.flex_attention import FlexCompiled, FlexEager
from properties.subjects.torch_sdpa import Cudnn, FlashCuda
from properties.subjects.torch_varlen import Varlen
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
RAGGED = replace(ALIKE, rows=(Row(5, (3, 1)), Row(0, (2, 1), 1), Row(17, (0, 1), 2)))


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
    """Attention over packed rows, one after the other."""
    assert return_aux.lse
    assert (max_q, max_k) == (int(ends_q.diff().max()), int(ends_k.diff().max()))
    outs, sums = [], []
    for b in range(len(ends_q) - 1):
        queries, keys = slice(*ends_q[b : b + 2].tolist()), slice(*ends_k[b : b + 2].tolist())
        q, k, v = (x.float().transpose(0, 1) for x in (query[queries], key[keys], value[keys]))
        logits = q @ k.mT * scale
        if window_size == (-1, 0):
            logits = logits.masked_fill(torch.ones_like(logits).triu(1 + k.shape[1] - q.shape[1]) > 0, -torch.inf)
        outs.append((logits.softmax(-1) @ v).transpose(0, 1).to(query.dtype))
        sums.append(logits.logsumexp(-1))
    return torch.cat(outs), torch.cat(sums, dim=1)


@pytest.mark.parametrize("is_causal", [False, True])
def test_rows_are_packed_and_unpacked(is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)

    for case in (ALIKE, RAGGED):
        used = check(replace(case, is_causal=is_causal), as_subject(Varlen(), "varlen"))
        assert 0 < used.out < 1
        assert 0 < used.lse < 1


def test_a_compiled_function_gets_what_the_eager_one_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced for any lengths and run uncompiled: 16-bit scores are rounded then, so in float32."""
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(FlexCompiled, "capabilities", FlexEager.capabilities)

    used = check(replace(RAGGED, dtype="float32", group_size=3), as_subject(FlexCompiled(), "flex"))
    assert 0 < used.out < 1
    assert 0 < used.lse < 1
