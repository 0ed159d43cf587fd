"""Models of one ONNX node, made for arrays at hand and kept by their types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Inputs = Mapping[str, NDArray[Any] | None]


def signature(inputs: Inputs, attributes: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a model depends on: which inputs there are, their types and ranks, and the attributes."""
    kinds = tuple((name, None if array is None else (array.dtype.str, array.ndim)) for name, array in inputs.items())
    return kinds, tuple(sorted(attributes.items()))


def model(op: str, domain: str, opset: int, inputs: Inputs, outputs: list[str], **attributes: Any) -> Any:
    """A model of one node, its sizes open.

    Args:
        op, domain, opset: the operator; another domain has opset 1 beside ``opset`` of ONNX.
        inputs: in the order of the operator; None where one is left out.
        outputs: names, "" where one is left out; all have the type of the first input.
        attributes: of the node.
    """
    from onnx import helper

    def kind(array: NDArray[Any]) -> int:
        return int(helper.np_dtype_to_tensor_dtype(array.dtype))

    given = {name: array for name, array in inputs.items() if array is not None}
    names = [name if name in given else "" for name in inputs]
    while names[-1] == "":
        names.pop()
    values = [
        helper.make_tensor_value_info(name, kind(array), [f"{name}{axis}" for axis in range(array.ndim)])
        for name, array in given.items()
    ]
    first = kind(next(iter(given.values())))
    results = [helper.make_tensor_value_info(name, first, None) for name in outputs if name]
    node = helper.make_node(op, names, outputs, domain=domain, **attributes)
    opsets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    graph = helper.make_graph([node], "node", values, results)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


class Session:
    """ONNX Runtime on one thread of the CPU, a session for each kind of node."""

    def __init__(self, op: str, domain: str = "", opset: int = 24) -> None:
        """Run nodes of one operator."""
        self._operator = op, domain, opset
        self._sessions: dict[Any, Any] = {}

    def run(self, inputs: Inputs, outputs: list[str], **attributes: Any) -> list[NDArray[Any]]:
        """The named outputs; what ONNX Runtime raises, it raises."""
        import onnxruntime

        key = signature(inputs, attributes), tuple(outputs)
        if key not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            options.log_severity_level = 4
            made = model(*self._operator, inputs, outputs, **attributes).SerializeToString()
            self._sessions[key] = onnxruntime.InferenceSession(made, options, providers=["CPUExecutionProvider"])
        given = {name: np.ascontiguousarray(array) for name, array in inputs.items() if array is not None}
        results: list[NDArray[Any]] = self._sessions[key].run([name for name in outputs if name], given)
        return results
