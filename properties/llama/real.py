"""One run with real weights in one dtype: greedy texts, error budgets layer by layer, ties, and perplexity."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from flashcore.integrations.transformers import NAME, FlashCoreCache
from properties.guards import torch_dtype
from properties.llama import weights
from properties.llama.capture import LayerCall, capturing
from properties.llama.extremes import Extremes
from properties.llama.propagation import bound, exact_logits, in_float64, replayed_logits
from properties.llama.replay import replay

Float64Array = NDArray[np.float64]


@dataclass(eq=False)
class Continued:
    """A greedy continuation: what was fed in each forward pass, and the logits of its last column."""

    inputs: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        """The tokens chosen."""
        return [int(step.argmax()) for step in self.logits]

    @property
    def scores(self) -> Float64Array:
        """[steps, vocabulary] in float64."""
        return torch.stack(self.logits).double().cpu().numpy()


def continue_greedily(model: Any, ids: Tensor, tokens: int, cache: Any) -> Continued:
    """Feed a prompt [1, columns] and then the most likely token, until ``tokens`` are chosen; no token ends it."""
    made = Continued()
    with torch.no_grad():
        for _ in range(tokens):
            made.inputs.append(ids)
            made.logits.append(model(ids, past_key_values=cache).logits[0, -1])
            ids = made.logits[-1].argmax().reshape(1, 1)
    return made


class RealRun:
    """The run.

    Attributes:
        record: what was found, for JSON.

    Args:
        file: the weights.
        dtype: of the model.
        device: "cpu" or "cuda".
        tokens: greedy tokens a prompt.
        deadline: on the monotonic clock; no prompt is begun after it.
        extremes: collects float32 problems.
    """

    def __init__(self, file: Path, dtype: str, device: str, tokens: int, deadline: float, extremes: Extremes) -> None:
        """Load the weights once for each implementation."""
        self.dtype, self.tokens, self.deadline, self.extremes = dtype, tokens, deadline, extremes
        self.flash = weights.load(file, torch_dtype(dtype), device, NAME)
        self.eager = weights.load(file, torch_dtype(dtype), device, "eager")
        self.exact = in_float64(self.eager)
        self.tokenizer = weights.tokenizer(file)
        self.device = device
        self.num_layers = self.flash.config.num_hidden_layers
        self.worst = np.zeros(self.num_layers)
        self.holds = True
        self.record: dict[str, Any] = {"dtype": dtype, "tokens": tokens, "texts": [], "failures": []}

    def report(self) -> bool:
        """Print everything; whether all of it holds."""
        print(f"\n{self.dtype}: SmolLM2-135M-Instruct, {self.tokens} greedy tokens a prompt", flush=True)
        for number, prompt in enumerate(weights.PROMPTS):
            if time.monotonic() > self.deadline:
                print(f"prompts not run for lack of time: {len(weights.PROMPTS) - number}")
                break
            self.compare(prompt)
        self.perplexity()
        print("worst error / budget by layer:", " ".join(f"{worst:.3f}" for worst in self.worst))
        self.record["worst_by_layer"] = self.worst.round(4).tolist()
        return self.holds

    def note(self, what: str, holds: bool) -> None:
        """Print one verdict."""
        if not holds:
            self.holds = False
            self.record["failures"].append(what)
        print(f"  {'holds' if holds else 'FAILS'}: {what}", flush=True)

    def compare(self, prompt: str) -> None:
        """One prompt with both implementations."""
        began = time.monotonic()
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"].to(self.device)
        cache = FlashCoreCache(self.flash.config, ids.shape[1] + self.tokens)
        with capturing() as captured:
            flash = continue_greedily(self.flash, ids, self.tokens, cache)
        eager = continue_greedily(self.eager, ids, self.tokens, DynamicCache(config=self.eager.config))
        steps = captured.steps(self.num_layers)
        print(f"\nprompt: {prompt!r} ({time.monotonic() - began:.0f} s)")
        texts = {name: self.tokenizer.decode(run.tokens) for name, run in (("flashcore", flash), ("eager", eager))}
        print(f"  flashcore: {texts['flashcore']!r}")
        print(f"  eager:     {texts['eager']!r}")
        self.check_layers(steps, prompt)
        self.check_replay(flash.inputs, steps, lambda logits: [step[0, -1] for step in logits], flash.logits)
        self.record["texts"].append({"prompt": prompt, **texts, **self.check_tokens(flash, eager, steps)})

    def check_layers(self, steps: list[list[LayerCall]], source: str) -> None:
        """Every attention output within its budget."""
        worst = 0.0
        for step in steps:
            for call in step:
                exact, allowed = call.expected(0)
                ratios = np.abs(call.outs[0] - exact) / allowed
                self.worst[call.layer] = max(self.worst[call.layer], ratios.max())
                worst = max(worst, float(ratios.max()))
                if self.dtype == "float32":
                    self.extremes.look(call, ratios, f"SmolLM2-135M-Instruct on {source!r}")
        count = sum(len(step) for step in steps)
        self.note(f"each of {count} attention calls is within its error budget, worst {worst:.3f} of it", worst <= 1)

    def check_replay(self, inputs: list[Tensor], steps: list[list[LayerCall]], pick: Any, logits: list[Tensor]) -> None:
        """All but the attention is the library's, bit for bit."""
        try:
            again = pick(replay(self.eager, [{"input_ids": ids} for ids in inputs], steps))
            same = all(torch.equal(one, other) for one, other in zip(logits, again, strict=True))
            self.note("with these attention outputs the library's own model gives the same bits", same)
        except AssertionError as error:
            self.note(str(error), False)

    def check_tokens(self, flash: Continued, eager: Continued, steps: list[list[LayerCall]]) -> dict[str, Any]:
        """The same text; tokens may differ only where eager attention is further from float64 than they are apart."""
        ids = torch.cat(flash.inputs, dim=1)
        first = flash.inputs[0].shape[1] - 1
        exact = exact_logits(self.exact, ids)[first:].cpu().numpy()
        replayed = replayed_logits(self.exact, ids, steps)[first:].cpu().numpy()
        alike = [a == b for a, b in zip(flash.tokens, eager.tokens, strict=True)]
        common = len(alike) if all(alike) else alike.index(False) + 1  # both saw the same tokens so far
        top = np.partition(exact, -2, axis=1)
        margin = top[:, -1] - top[:, -2]
        errors = [np.abs(run.scores[:common] - exact[:common]).max(axis=1) for run in (flash, eager)]
        ties = int((margin[:common] <= 2 * np.maximum(*errors)).sum())
        print(
            f"  logits off from float64: flashcore {errors[0].max():.1e}, eager {errors[1].max():.1e}, "
            f"by flashcore's attention alone {np.abs(replayed - exact).max():.1e}"
        )
        print(f"  ties: {ties} of {common} steps; smallest margin {margin[:common].min():.2e}")
        if all(alike):
            self.note(f"the same {common} tokens", True)
        close = int(margin[:common].argmin()) if all(alike) else common - 1
        pair = exact[close].argsort()[-2:].tolist() if all(alike) else [eager.tokens[close], flash.tokens[close]]

        def lead(logits: Any) -> Any:
            return logits[..., pair[1]] - logits[..., pair[0]]

        found = bound(self.exact, ids, steps, lambda logits: lead(logits[first + close])[None])
        words, holds = found.verdict(float(lead(flash.scores[close])))
        self.note(f"closest decision, step {close}: two logits {found.exact[0]:.2e} apart, {words}", holds)
        if not all(alike):
            doubt = 2 * float(errors[1][close])
            words = f"where eager attention cannot tell logits within {doubt:.2e}"
            self.note(f"tokens differ from step {close} on, {words}", abs(found.exact[0]) <= doubt)
        return {
            "same_tokens": sum(alike[:common]),
            "ties": ties,
            "smallest_margin": float(margin[:common].min()),
            "logits_off": {"flashcore": float(errors[0].max()), "eager": float(errors[1].max())},
        }

    def perplexity(self) -> None:
        """Mean negative log-likelihood of a fixed text, with its propagated bound."""
        ids = self.tokenizer(weights.TEXT, return_tensors="pt")["input_ids"].to(self.device)

        def loss(logits: Tensor) -> Tensor:
            return torch.nn.functional.cross_entropy(logits[:-1].double(), ids[0, 1:])[None]

        with capturing() as captured, torch.no_grad():
            flash = self.flash(ids, past_key_values=FlashCoreCache(self.flash.config, ids.shape[1])).logits
            eager = self.eager(ids, use_cache=False).logits
        steps = captured.steps(self.num_layers)
        print(f"\nperplexity of a text of {ids.shape[1]} tokens")
        self.check_layers(steps, "the fixed text")
        self.check_replay([ids], steps, lambda logits: logits, [flash])
        found = bound(self.exact, ids, steps, loss)
        ours, theirs = float(loss(flash[0])[0]), float(loss(eager[0])[0])
        exact = np.exp(found.exact[0])
        print(f"  perplexity: flashcore {np.exp(ours):.9f}, eager {np.exp(theirs):.9f}, float64 {exact:.9f}")
        self.record["perplexity"] = {
            "flashcore": float(np.exp(ours)),
            "eager": float(np.exp(theirs)),
            "float64": float(exact),
        }
        words, holds = found.verdict(ours)
        self.note(f"its logarithm is {words}", holds)
