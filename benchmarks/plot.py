"""Time against kv_len, with the roofline drawn in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.shapes import bytes_floor_us

if TYPE_CHECKING:
    from benchmarks.report import Results, Row

PANELS = 6
COLOURS = {"cudnn": "C1", "flash": "C2", "efficient": "C3", "flex": "C4", "fa3": "C5", "flashinfer": "C6",
           "xformers": "C7"}  # fmt: skip


class PlotError(ValueError):
    """Nothing can be drawn. One line."""


def check(path: Path) -> None:
    """Find out before an hour of measuring that a plot cannot be made.

    Raises:
        PlotError: not the name of a PNG file, or no matplotlib.
    """
    if path.suffix != ".png":
        raise PlotError(f"--plot must name a .png file, got {path}")
    try:
        import matplotlib  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise PlotError(f"--plot needs matplotlib (pip install 'flashcore[plot]'): {error}") from None


def series(results: Results) -> dict[str, list[Row]]:
    """Rows of one query a row, by everything but their length; longest series first, at most a page of them."""
    groups: dict[str, list[Row]] = {}
    for row in results.rows:
        if row.suite not in ("decode", "seed") or not row.us or row.shape.get("q_len") != 1:
            continue
        s = row.shape
        sizes = f"batch {s['batch']}, heads {s['num_q_heads']}:{s['num_kv_heads']}, head_dim {s['head_dim']}"
        groups.setdefault(f"{sizes}, {s['dtype']}", []).append(row)
    for name, rows in groups.items():
        by_length = {row.shape["kv_len"]: row for row in rows}
        groups[name] = [by_length[n] for n in sorted(by_length)]
    names = sorted(groups, key=lambda name: -len(groups[name]))
    return {name: groups[name] for name in names[:PANELS]}


def draw(results: Results, path: Path) -> None:
    """Write the plot.

    Raises:
        PlotError: there is nothing to draw.
    """
    check(path)
    groups = series(results)
    if not groups:
        raise PlotError("there must be rows of the suites decode or seed to draw, got none")
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    header = results.header
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5 * columns, 3.6 * lines), squeeze=False,
                                layout="constrained")  # fmt: skip
    for axis in axes.flat[len(groups) :]:
        axis.axis("off")
    for axis, (name, rows) in zip(axes.flat, groups.items(), strict=False):
        _panel(axis, rows, header["copy_tb_s"])
        axis.set_title(name, fontsize=9)
    axes[0][0].legend(fontsize=8)
    merit = "" if header["figure_of_merit"] else " - no figure of merit"
    title = f"A decode step on {header['gpu']}{merit}; roofline: K and V at {header['copy_tb_s']:.2f} TB/s"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _panel(axis: Any, rows: list[Row], copy_tb_s: float) -> None:
    lengths = [row.shape["kv_len"] for row in rows]
    floors = [bytes_floor_us(row.bytes, copy_tb_s) for row in rows]
    axis.plot(lengths, floors, color="black", linewidth=1, linestyle="--", label="roofline")
    axis.fill_between(lengths, floors, [min(floors) / 4] * len(floors), color="black", alpha=0.06, linewidth=0)
    for peer in dict.fromkeys(name for row in rows for name in row.peers):
        points = [(n, row.peers[peer]) for n, row in zip(lengths, rows, strict=True) if peer in row.peers]
        axis.plot(*zip(*points, strict=True), color=COLOURS.get(peer), marker=".", linewidth=1, label=peer)
    axis.plot(lengths, [row.us for row in rows], color="C0", marker="o", markersize=4, linewidth=2, label="flashcore")
    axis.set(xscale="log", yscale="log", xlabel="kv_len", ylabel="us")
    axis.set_xticks(lengths, [str(n) for n in lengths], fontsize=7)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
