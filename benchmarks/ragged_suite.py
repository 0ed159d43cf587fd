"""Rows of different lengths in one batch: against masks, block masks, and against doing all the padded work."""

from __future__ import annotations

from functools import partial

from benchmarks.contest import Bench
from benchmarks.inputs import Problem, attend, make_appending
from benchmarks.peers import Peer
from benchmarks.report import Row
from benchmarks.shapes import Shape, interpreted_decode, ragged_lengths, ragged_shapes, rotations

# Dense kernels that say what the padded batch would cost.
PADDED = ("cudnn", "flash")
COMPILED_DTYPE = "bfloat16"


def run(bench: Bench) -> None:
    """Every cell that fits."""
    tiny = [(shape, "bimodal") for shape in interpreted_decode()[:1]]
    for shape, distribution in ragged_shapes(bench.quick) if bench.on_gpu else tiny:
        kv_lens = ragged_lengths(distribution, shape.batch, shape.kv_len)
        bench.cell(
            "ragged",
            f"{shape.name} {distribution}",
            partial(row_of, bench, shape, distribution, kv_lens),
            needs_bytes=int(1.2 * _sets(bench, shape, kv_lens) * shape.kv_bytes()) + (4 << 30) if bench.on_gpu else 0,
        )


def _sets(bench: Bench, shape: Shape, kv_lens: list[int]) -> int:
    return rotations(shape.kv_bytes(kv_lens), bench.l2_bytes, most=24)


def row_of(bench: Bench, shape: Shape, distribution: str, kv_lens: list[int]) -> Row:
    """Ours reads the lengths from the cache; bytes are those of valid slots only."""
    sets = [make_appending(shape, bench.device, seed, kv_lens) for seed in range(_sets(bench, shape, kv_lens))]
    problems = [made.problem for made in sets]
    row = bench.attention_row(
        "ragged",
        f"{shape.name} {distribution}",
        shape,
        [made.call for made in sets],
        problems,
        num_bytes=shape.kv_bytes(kv_lens),
        compiling=shape.dtype == COMPILED_DTYPE and not bench.quick,
        skip=_cannot_mask,
    )
    dense = [Problem(p.query, p.key, p.value, False) for p in problems[:3]]
    reference = attend(dense[0])
    for peer in bench.selection.peers:
        if peer.name in PADDED:
            name = f"padded {peer.name}"
            reason = bench.add_peer(row, name, peer, dense, reference)
            if reason is not None:
                row.refused[name] = reason
    row.notes["valid_share"] = sum(kv_lens) / (shape.batch * shape.kv_len)
    return row


def _cannot_mask(peer: Peer) -> str | None:
    return "takes no mask" if peer.name == "flash" else None
