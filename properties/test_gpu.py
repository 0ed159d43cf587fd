"""What only a GPU can get wrong: graphs, streams, devices, races. Without CUDA there are no such laws."""

from __future__ import annotations

from hypothesis import given

from properties import callers, subjects
from properties import device as devices
from properties.assertions import assert_same_outputs
from properties.case import Case
from properties.checking import assert_no_findings
from properties.needs import asks
from properties.runner import run
from properties.strategies import cases
from properties.variants import one_call

if devices.current() == "cuda":
    import torch

    from properties.recording import repeated, replayed

    @asks("cache", "bits across runs")
    @given(case=cases(ops=("attention_with_kv_cache",), overflow=False))
    def test_a_replayed_graph_equals_the_call_it_recorded(case: Case) -> None:
        """Also with other lengths and other numbers in the same tensors."""
        case = one_call(case)
        if subjects.active().make_cache is not None and case.rows:
            for graph, eager in replayed(case, subjects.active()):
                assert_same_outputs([graph], [eager], "a replayed graph and an eager call")

    @asks("bits across runs")
    @given(case=cases())
    def test_a_side_stream_gives_the_same_bits(case: Case) -> None:
        side = run(case, callers.on_a_side_stream(subjects.active()))

        assert_same_outputs(side.outputs, run(case).outputs, "a side stream and the default one")
        assert_no_findings(side, ["append", "cache", "lengths", "inputs"])

    @asks("bits across runs")
    @given(case=cases())
    def test_two_streams_at_once_do_not_disturb_each_other(case: Case) -> None:
        crowded = run(case, callers.beside_another_stream(subjects.active()))

        assert_same_outputs(crowded.outputs, run(case).outputs, "a busy GPU and a quiet one")

    @asks("bits across runs")
    @given(case=cases(several_splits=True, ops=("attention_with_kv_cache",)))
    def test_a_thousand_repeats_give_one_set_of_bits(case: Case) -> None:
        for first, other in repeated(one_call(case), subjects.active(), 1000):
            assert_same_outputs([other], [first], "a repeated call and the first one")

    if torch.cuda.device_count() > 1:

        @asks("bits across runs")
        @given(case=cases(max_steps=2))
        def test_a_device_that_is_not_current_gives_the_same_bits(case: Case) -> None:
            other = run(case, callers.on_device(subjects.active(), "cuda:1"))

            assert_same_outputs(other.outputs, run(case).outputs, "cuda:1 and cuda:0")
