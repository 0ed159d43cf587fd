"""One cell of a benchmark: its inputs, the float64 result, the peers, and what becomes of a wrong or failing one."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks import peers as adaptors
from benchmarks.ceilings import Ceilings
from benchmarks.clock import Clock
from benchmarks.contest import Bench, WrongResult, checked
from benchmarks.inputs import Problem, attend, make_appending, make_problem, poisoned, share_of_budget
from benchmarks.peers import Peer, PeerError, Selection, Unsupported, select
from benchmarks.report import Results, Row
from benchmarks.shapes import Shape
from flashcore.fast import buffers
from references.attention import attention, visible_keys
from tests.tensors import DEVICE

# -- inputs and the float64 result -------------------------------------------------------------------------------

SMALL = Shape(2, 6, 2, 16, 40, "float32")


@pytest.mark.parametrize(
    "shape", [SMALL, dataclasses.replace(SMALL, q_len=7, is_causal=True), dataclasses.replace(SMALL, q_len=7)]
)
def test_the_float64_result_is_the_oracles(shape: Shape) -> None:
    problem = make_problem(shape, str(DEVICE), 0)
    reference = attend(problem)

    for b in range(shape.batch):
        numbers = [t[b].double().cpu().numpy() for t in (problem.query, problem.key, problem.value)]
        out, _ = attention(*numbers, is_causal=shape.is_causal, scale=shape.head_dim**-0.5)
        np.testing.assert_allclose(reference.out[b].cpu().numpy(), out, rtol=1e-12, atol=1e-13)


def test_appending_and_peers_see_the_same_numbers_in_ragged_rows() -> None:
    shape = dataclasses.replace(SMALL, dtype="float16")
    made = make_appending(shape, str(DEVICE), 0, [3, 40])
    reference = attend(made.problem)
    with poisoned():
        out = made.call()

    assert checked(reference, out) <= reference.limit
    assert made.cache.seq_lens.tolist() == [2, 39]
    drawn = make_problem(shape, str(DEVICE), 0)
    assert torch.equal(made.problem.key, drawn.key)
    assert torch.equal(made.problem.value, drawn.value)
    query, key, value = made.problem.query[:1], made.problem.key[:1, :, :3], made.problem.value[:1, :, :3]
    alone = attend(Problem(query, key, value, is_causal=False))
    np.testing.assert_allclose(alone.out.cpu().numpy(), reference.out[:1].cpu().numpy(), rtol=1e-12)


def test_an_error_beyond_rounding_or_anything_unwritten_is_a_wrong_result() -> None:
    shape = Shape(2, 2, 2, 16, 256, "float16")
    problem = make_problem(shape, str(DEVICE), 0)
    reference = attend(problem)
    right = reference.out.half()
    without_last_key = attend(dataclasses.replace(problem, key=problem.key[:, :, :-1], value=problem.value[:, :, :-1]))

    assert checked(reference, right) < reference.limit / 2
    with pytest.raises(WrongResult, match="relative error"):
        checked(reference, without_last_key.out.half())
    unwritten = right.clone()
    unwritten[1, 1, 0, 3] = torch.nan
    assert reference.error(unwritten) == math.inf
    assert reference.error(right[:, :1]) == math.inf


@pytest.mark.parametrize("shape", [Shape(1, 2, 1, 16, 40), Shape(1, 2, 2, 16, 24, q_len=24, is_causal=True)])
def test_the_derived_budget_tells_right_from_wrong(shape: Shape) -> None:
    problem = make_problem(shape, str(DEVICE), 0)
    reference = attend(problem)
    right = reference.out.half()
    wrong = right.clone()
    wrong[0, 0, -1, 0] += 0.01

    share = share_of_budget(shape, problem, reference, right)
    assert share is not None
    assert 0 < share <= 1
    assert (share_of_budget(shape, problem, reference, wrong) or 0) > 1
    assert share_of_budget(dataclasses.replace(shape, kv_len=1 << 20), problem, reference, right) is None


def test_poison_ends_with_its_block() -> None:
    plain = buffers.empty
    with poisoned():
        assert bool(buffers.empty([3], torch.float16, DEVICE).isnan().all())
        assert buffers.empty([2], torch.int32, DEVICE).tolist() == [-1, -1]
    assert buffers.empty is plain


# -- peers and cells ---------------------------------------------------------------------------------------------


def test_peers_are_chosen_by_name_and_absent_ones_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    auto = select("auto")

    assert {"cudnn", "flash", "efficient", "flex"} <= {peer.name for peer in auto.peers}
    assert "flashinfer" in auto.absent
    assert "flex" not in {peer.name for peer in auto.for_cell(compiling=False)}
    named = select("flex,flash,flex")
    assert [peer.name for peer in named.for_cell(compiling=False)] == ["flex", "flash"]
    assert select("none").peers == ()
    with pytest.raises(PeerError, match=r"^--peers must be auto, none or a list of cudnn, .*, got 'cuddn'$"):
        select("cudnn,cuddn")


def bench(*peers: Peer, seconds: float | None = None, path: Path | None = None) -> Bench:
    """A run that times nothing in earnest."""
    clock = Clock(seconds, iter([0.0] + [100.0] * 1000).__next__)
    chosen = Selection(peers, {}, named=True)
    return Bench("cpu", True, clock, chosen, Ceilings(3.0, 3.0, 700.0), Results({}), path)


def right(problems: Any) -> list[Any]:
    """A peer that is right."""
    return [lambda p=p: attend(p).out.to(p.query.dtype) for p in problems]


def wrong(problems: Any) -> list[Any]:
    """A peer that is wrong."""
    return [lambda p=p: torch.zeros_like(p.query) for p in problems]


def unable(problems: Any) -> list[Any]:
    """A peer that cannot."""
    raise Unsupported(f"only {len(problems)} wishes")


def failing(problems: Any) -> list[Any]:
    """A peer that fails."""
    raise RuntimeError(f"no kernel\nfor {len(problems)}")


def test_peers_that_are_wrong_or_fail_are_named_with_the_reason_and_not_timed() -> None:
    shape = Shape(1, 2, 1, 16, 40)
    problem = make_problem(shape, "cpu", 0)
    made = bench(Peer("right", right), Peer("wrong", wrong), Peer("unable", unable), Peer("failing", failing))
    found = made.attention_row("decode", shape.name, shape, right([problem]), [problem])

    assert list(found.peers) == ["right"]
    assert found.refused["wrong"].startswith("wrong result, not timed: relative error 1.00e+00")
    assert found.refused["unable"] == "only 1 wishes"
    assert found.refused["failing"] == "RuntimeError: no kernel for 1"
    assert found.us is not None
    assert found.fraction_of_copy == pytest.approx(shape.bytes() / found.us / 1e6 / 3.0)


def test_our_own_wrong_result_is_a_row_without_a_time() -> None:
    shape = Shape(1, 2, 1, 16, 40)
    problem = make_problem(shape, "cpu", 0)
    made = bench()
    made.cell("decode", "x", lambda: made.attention_row("decode", "x", shape, wrong([problem]), [problem]))

    assert made.results.rows[0].us is None
    assert "WRONG" in made.results.rows[0].notes["remark"]
    assert made.wrong[0].startswith("decode x: relative error")


def done(us: float = 1.0) -> Row:
    """A cell that works."""
    return Row("decode", "good", us, 1, 0.5, {})


def test_cells_without_time_or_memory_or_that_fail_are_listed(tmp_path: Path) -> None:
    late, tight = bench(seconds=50.0, path=tmp_path / "r.json"), bench()
    late.cell("decode", "late", done)
    tight.cell("decode", "large", done, needs_bytes=1 << 60)
    tight.cell("decode", "broken", lambda: done(1 / 0))
    tight.cell("decode", "good", done)

    assert [cell["case"] for cell in late.results.not_run] == ["late"]
    assert "no time left" in late.results.not_run[0]["reason"]
    assert [cell["reason"].split(":")[0] for cell in tight.results.not_run] == ["no memory", "ZeroDivisionError"]
    assert len(tight.results.rows) == 1
    assert Results.load(tmp_path / "r.json").not_run == late.results.not_run


# -- what each peer is handed ------------------------------------------------------------------------------------


def paged(*_: Any, use_tensor_cores: bool) -> Any:
    """FlashInfer's wrapper for decode from pages [pages, heads, page_size, head_dim], as its documentation has it."""
    del use_tensor_cores
    planned: list[Any] = []

    def run(query: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        indptr, indices, last, _, _, _, page = planned
        out = torch.zeros_like(query)
        for b in range(query.shape[0]):
            mine = indices[indptr[b] : indptr[b + 1]].long()
            length = (len(mine) - 1) * page + int(last[b])
            key, value = (t[mine].transpose(0, 1).flatten(1, 2)[:, :length] for t in cache)
            whole = attend(Problem(query[b : b + 1, :, None], key[None], value[None], is_causal=False))
            out[b] = whole.out[0, :, 0].to(query.dtype)
        return out

    return SimpleNamespace(plan=lambda *arguments, **_: planned.extend(arguments), run=run)


def with_kvcache(query: Tensor, key: Tensor, value: Tensor, *, cache_seqlens: Tensor | None, causal: bool) -> Tensor:
    """FlashAttention's function for tensors [batch, tokens, heads, head_dim]."""
    heads_first = [t.transpose(1, 2) for t in (query, key, value)]
    problem = Problem(heads_first[0], heads_first[1], heads_first[2], causal, cache_seqlens)
    return attend(problem, checked=1 << 20).out.to(query.dtype).transpose(1, 2)


def memory_efficient(query: Tensor, key: Tensor, value: Tensor, *, attn_bias: Any) -> Tensor:
    """The function of xformers for [batch, tokens, heads, head_dim], or [batch, tokens, groups, heads, head_dim]."""
    flat = [t.flatten(2, -2).transpose(1, 2) for t in (query, key, value)]
    problem = Problem(flat[0], flat[1], flat[2], attn_bias is not None)
    return attend(problem, checked=1 << 20).out.to(query.dtype).transpose(1, 2).reshape(query.shape)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for packages that need a GPU: slow and right, and taking what their documentation says they take."""
    bias = SimpleNamespace(LowerTriangularFromBottomRightMask=object)
    contents: dict[str, dict[str, Any]] = {
        "flashinfer": {"BatchDecodeWithPagedKVCacheWrapper": paged},
        "flash_attn_interface": {"flash_attn_with_kvcache": with_kvcache},
        "xformers": {},
        "xformers.ops": {
            "memory_efficient_attention": memory_efficient,
            "fmha": SimpleNamespace(attn_bias=bias),
        },
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    # Uncompiled, it computes the same.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


DENSE = Shape(2, 4, 2, 16, 48, "float16")
PROMPT = Shape(1, 2, 2, 16, 32, "float16", q_len=32, is_causal=True)
CHUNK = Shape(1, 2, 2, 16, 48, "float16", q_len=16, is_causal=True)


@pytest.mark.usefixtures("packages")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", ["dense", "ragged", "prompt", "chunk"])
@pytest.mark.parametrize("name", ["math", "flex", "flashinfer", "fa3", "xformers"])
def test_a_peer_is_handed_the_problem_in_its_own_layout(name: str, kind: str) -> None:
    """PyTorch's plain backend stands for the others, which take the same arguments."""
    problem = make_problem({"prompt": PROMPT, "chunk": CHUNK}.get(kind, DENSE), "cpu", 0)
    if kind == "ragged":
        problem = dataclasses.replace(problem, kv_lens=torch.tensor([5, 48]))
    known = {peer.name: peer.prepare for peer in adaptors.PEERS}
    prepare = adaptors._sdpa(SDPBackend.MATH) if name == "math" else known[name]
    if (name, kind) in {("flashinfer", "prompt"), ("flashinfer", "chunk"), ("xformers", "ragged")}:
        with pytest.raises(Unsupported):
            prepare([problem])
        return
    reference = attend(problem)

    assert checked(reference, prepare([problem])[0]()) <= reference.limit


def test_a_mask_shows_what_the_reference_sees() -> None:
    """cuDNN has no bottom-right causal mask to switch on, so it is given one."""
    chunk = adaptors._additive_mask(make_problem(CHUNK, "cpu", 0))
    dense = make_problem(DENSE, "cpu", 0)
    ragged = adaptors._additive_mask(dataclasses.replace(dense, kv_lens=torch.tensor([5, 48])))

    assert chunk is not None
    assert np.array_equal(chunk[0, 0].isfinite().numpy(), visible_keys(CHUNK.q_len, CHUNK.kv_len, True))
    assert ragged is not None
    assert ragged.isfinite().sum(dim=-1).flatten().tolist() == [5, 48]
    assert adaptors._additive_mask(dense) is None


def test_lengths_of_their_own_and_a_causal_mask_do_not_go_together() -> None:
    problem = make_problem(PROMPT, "cpu", 0)
    with pytest.raises(ValueError, match=r"^is_causal must be False where rows have lengths of their own, got True$"):
        dataclasses.replace(problem, kv_lens=torch.tensor([5]))
