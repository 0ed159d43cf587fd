"""What is put under test: flashcore, the adapters of ``ADAPTERS``, and any other function or adapter.

A subject is named by its specification: "flashcore", the name of an adapter, or "package.module:name" for somebody
else's function with the signature of the contract, or class derived from ``properties.subjects.adapter.Adapter``.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

from properties import capabilities, device
from properties.capabilities import EVERYTHING, Capabilities
from properties.case import Case
from properties.needs import Need
from references.arithmetic_model import PERMISSIVE, ArithmeticModel
from references.tiling import Tiles, tiling

if TYPE_CHECKING:
    from properties.subjects.adapter import Adapter

DEFAULT = "flashcore"
VARIABLE = "PROPERTIES_SUBJECT"

# Adapters by the name their class has; nothing is imported before it is asked for.
ADAPTERS = {
    "onnx-reference": "properties.subjects.onnx_attention:OnnxReference",
    "onnxruntime-attention": "properties.subjects.onnx_attention:OnnxRuntimeAttention",
    "onnxruntime-past": "properties.subjects.onnx_attention:OnnxRuntimePast",
    "onnxruntime-gqa": "properties.subjects.onnxruntime_contrib:OnnxRuntimeGQA",
    "onnxruntime-mha": "properties.subjects.onnxruntime_contrib:OnnxRuntimeMHA",
    "openvino": "properties.subjects.openvino_sdpa:OpenVINO",
    "paddle": "properties.subjects.paddle_sdpa:Paddle",
    "tinygrad": "properties.subjects.tinygrad_sdpa:Tinygrad",
    "torch-sdpa": "properties.subjects.torch_sdpa:TorchSDPA",
    "torch-sdpa-math": "properties.subjects.torch_sdpa:Math",
    "torch-sdpa-flash": "properties.subjects.torch_sdpa:Flash",
    "torch-sdpa-flash-cuda": "properties.subjects.torch_sdpa:FlashCuda",
    "torch-sdpa-efficient": "properties.subjects.torch_sdpa:Efficient",
    "torch-sdpa-cudnn": "properties.subjects.torch_sdpa:Cudnn",
    "torch-varlen": "properties.subjects.torch_varlen:Varlen",
    "flag-gems-paged": "properties.subjects.flag_gems_attention:Paged",
    "flag-gems-varlen": "properties.subjects.flag_gems_attention:Varlen",
    "flashinfer": "properties.subjects.flashinfer_attention:FlashInfer",
    "xformers-splitk": "properties.subjects.xformers_splitk:SplitK",
    "flax-decode": "properties.subjects.flax_decode:FlaxDecode",
    "jax-xla": "properties.subjects.jax_attention:JaxAttention",
    "jax-cudnn": "properties.subjects.jax_attention:JaxCudnn",
    "keras-torch": "properties.subjects.keras_attention:KerasAttention",
    "mlx-cpu": "properties.subjects.mlx_attention:MlxAttention",
    "x-transformers": "properties.subjects.x_transformers:XTransformers",
    "torch-flex-eager": "properties.subjects.flex_attention:FlexEager",
    "torch-flex-compiled": "properties.subjects.flex_attention:FlexCompiled",
    "torch-flex-compiled-cpu": "properties.subjects.flex_attention:FlexCompiledCpu",
    "transformers-dynamic-cache": "properties.subjects.transformers_eager:DynamicCacheEager",
    "transformers-static-cache": "properties.subjects.transformers_eager:StaticCacheEager",
    "transformers-sdpa": "properties.subjects.transformers_eager:DynamicCacheSDPA",
}


class SubjectError(ValueError):
    """The specification does not name a function that can be called."""


# Tiles and splits of 16 keys, the smallest that tensor cores take, round most often: the largest budget.
UNKNOWN_BLOCK_N = 16


def _unforced(case: Case) -> AbstractContextManager[None]:
    del case
    return contextlib.nullcontext()


def _unknown_tiles(case: Case, q_len: int, cached: int, new: int) -> Tiles:
    del q_len
    block_n = case.block_n or UNKNOWN_BLOCK_N
    return tiling(cached, new, block_n, case.kv_split_size or block_n)


def permissive(device: str) -> ArithmeticModel:
    """The arithmetic of a kernel of which nothing is known."""
    del device
    return PERMISSIVE


@dataclass(frozen=True)
class Subject:
    """A kernel and what the suite must know about it.

    Attributes:
        spec: how the user names it.
        attention_with_kv_cache: signature of the contract.
        attention: the same; None if it has none.
        make_cache: (k_cache, v_cache, seq_lens) -> its cache object; None if it takes plain tuples only.
        overflow_error: what it raises when a row does not fit.
        allocators: modules whose ``empty(shape, dtype, device)`` makes everything the kernel writes, and whose
            ``unused(dtype, device)``, if there is one, what stands for pointers that a call does not follow.
        forced: context in which a case's split size is used.
        tiles: (case, q_len, cached, new) -> the tiles in which it visits the keys of one row, for the error budget.
        model: its arithmetic on "cpu" or "cuda".
        slow: whether a case takes seconds, as when a shape is compiled: cases are small on a GPU too, and one that runs
            for minutes is no hang yet.
        paths: contexts that force one of its kernels each, by name; on a correct one they agree.
        unsplit: context in which all keys of a row lie in one split, if it splits them otherwise.
        checks_arguments: it refuses every malformed argument.
        unseen: context in which the host may not look at lengths, as while a CUDA graph is recorded; then its caches'
            ``check()`` reports what the device found. None if it has no such calls.
        is_disturbed: it is called in another way than a case says (see ``properties.callers``).
        capabilities: what it offers.
        packages: what it needs beside PyTorch, as pip names it.
    """

    spec: str
    attention_with_kv_cache: Callable[..., Any]
    attention: Callable[..., Any] | None = None
    make_cache: Callable[..., Any] | None = None
    overflow_error: type[Exception] = RuntimeError
    allocators: tuple[ModuleType, ...] = ()
    forced: Callable[[Case], AbstractContextManager[Any]] = _unforced
    tiles: Callable[[Case, int, int, int], Tiles] = _unknown_tiles
    model: Callable[[str], ArithmeticModel] = permissive
    slow: bool = False
    paths: Mapping[str, Callable[[Case], AbstractContextManager[Any]]] = field(default_factory=dict)
    unsplit: Callable[[Case], AbstractContextManager[Any]] = _unforced
    checks_arguments: bool = False
    unseen: Callable[[], AbstractContextManager[Any]] | None = None
    is_disturbed: bool = False
    capabilities: Capabilities = EVERYTHING
    packages: tuple[str, ...] = ()

    def meets(self, need: Need, device: str) -> bool:
        """Whether a law that asks for this is owed: what it offers is, but what has to be declared."""
        match need:
            case "declared arithmetic":
                # Of an adapter's kernel only an outer bound is known, whatever its name.
                return self.capabilities.meets(need) and self.model(device) != PERMISSIVE
            case "checked arguments":
                return self.checks_arguments
            case "device checks":
                return self.unseen is not None
            case _:
                return self.capabilities.meets(need)


def load(spec: str) -> Subject:
    """The subject a specification names.

    Raises:
        SubjectError: it names nothing that can be called. One line.
    """
    if spec == DEFAULT:
        try:
            from properties.subjects.flashcore import subject
        except ImportError as error:
            raise SubjectError(f"--subject flashcore cannot be imported: {_one_line(error)}") from error
        return subject()
    from properties.subjects.adapter import Plain, as_subject

    found = find(spec)
    if isinstance(found, type):
        return as_subject(adapter_of(spec), spec)
    module = importlib.import_module(ADAPTERS.get(spec, spec).partition(":")[0])
    declared = getattr(module, "CAPABILITIES", None)
    if not _takes_a_cache(found):
        return as_subject(Plain(found, declared), spec)
    attention = getattr(module, "attention", None)
    offered = declared or Capabilities()
    if not callable(attention) and "attention" in offered.ops:
        offered = replace(offered, ops=("attention_with_kv_cache",))
    return Subject(
        spec=spec,
        attention_with_kv_cache=found,
        attention=attention if callable(attention) else None,
        make_cache=getattr(module, "KVCache", None),
        overflow_error=getattr(module, "CacheOverflowError", RuntimeError),
        allocators=(module,) if callable(getattr(module, "empty", None)) else (),
        slow=getattr(module, "SLOW", False) is True,
        capabilities=offered,
    )


def find(spec: str) -> Any:
    """The function or class of a specification other than the default.

    Raises:
        SubjectError: there is none. One line.
    """
    module_name, colon, name = ADAPTERS.get(spec, spec).partition(":")
    if not colon or not all(part.isidentifier() for part in [*module_name.split("."), name]):
        known = ", ".join([DEFAULT, *ADAPTERS])
        raise SubjectError(f"--subject must be package.module:name or one of {known}, got {spec!r}")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever somebody else's module raises, the user gets one line
        raise SubjectError(
            f"--subject {spec} cannot be imported: {type(error).__name__}: {_one_line(error)}"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        raise SubjectError(f"--subject must name a function or a class, got {spec!r}, and {module_name} has no {name}")
    return found


def _takes_a_cache(function: Callable[..., Any]) -> bool:
    """Whether it follows the contract; otherwise it is attention without a cache."""
    parameters = inspect.signature(function).parameters.values()
    return any(p.name == "past_key_value" or p.kind is p.VAR_KEYWORD for p in parameters)


def adapter_of(spec: str) -> Adapter:
    """The adapter that a specification names, ready to run here.

    Raises:
        SubjectError: there is none, or it cannot be used here. One line.
    """
    from properties.subjects.adapter import Adapter

    kind = find(spec)
    if not isinstance(kind, type) or not issubclass(kind, Adapter):
        raise SubjectError(f"{spec} must be an Adapter, or for --subject a function, and is none")
    missing = kind.missing()
    if missing:
        raise SubjectError(f"--subject {spec} needs {', '.join(missing)}: python -m pip install {' '.join(missing)}")
    here = device.current()
    if here not in kind.capabilities.devices:
        raise SubjectError(f"--subject {spec} runs on {' and '.join(kind.capabilities.devices)}, not on {here}")
    try:
        return kind()
    except Exception as error:  # whatever somebody else's package raises, the user gets one line
        raise SubjectError(f"--subject {spec} cannot be used: {type(error).__name__}: {_one_line(error)}") from error


def forced_to(subject: Subject, forced: Callable[[Case], AbstractContextManager[Any]]) -> Subject:
    """The subject with one of its ``paths`` forced."""
    return replace(subject, forced=forced, is_disturbed=True)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


_loaded: dict[str, Subject] = {}


def activate(spec: str) -> Subject:
    """Make a subject the one that laws are run on, in this process and those it starts."""
    subject = _loaded.setdefault(spec, load(spec)) if spec not in _loaded else _loaded[spec]
    os.environ[VARIABLE] = spec
    capabilities.use(subject.capabilities)
    return subject


def active() -> Subject:
    """The subject that laws are run on."""
    return activate(os.environ.get(VARIABLE, DEFAULT))
