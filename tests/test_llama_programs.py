"""The programs for real weights and for decode times, as far as they run without weights and without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.benchmark_llama import IMPLEMENTATIONS, Decoder, build
from properties import device as devices
from properties.llama import weights


@pytest.fixture(scope="module")
def tiny() -> Any:
    return build("tiny", torch.float32, devices.current(), None)


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "flex_attention"])
def test_a_timed_step_leaves_the_cache_as_it_was(tiny: Any, implementation: str) -> None:
    """Each step is the same one, of the same model whatever attends."""
    with torch.no_grad():
        decoder = Decoder(tiny, implementation, 17, 20)
        first = decoder.step()

        assert torch.equal(decoder.step(), first)
        assert int(decoder.cache.get_seq_length()) == 17
        torch.testing.assert_close(first, Decoder(tiny, "eager", 17, 20).step())


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(weights.WeightsError) as caught:
        weights.find(tmp_path)
    assert str(caught.value) == f"weights must be a GGUF file, got {tmp_path}"
