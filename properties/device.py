"""Where kernels run: CUDA if there is one, Triton's interpreter on the CPU otherwise.

``choose`` must be called before anything imports Triton: the interpreter is chosen by an environment variable
that Triton reads when kernels are decorated.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from functools import lru_cache

DEVICES = ("auto", "cpu", "cuda")


class DeviceError(RuntimeError):
    """The device asked for is not there."""


def choose(requested: str = "auto") -> str:
    """Decide between "cuda" and "cpu" and prepare the environment for it.

    Args:
        requested: "auto", "cpu" or "cuda". With "auto", TRITON_INTERPRET=1 in the environment means "cpu".

    Raises:
        DeviceError: CUDA was asked for and is not available, or Triton was imported too early.
    """
    import torch

    interpreted = os.environ.get("TRITON_INTERPRET", "") not in ("", "0")
    if requested == "cuda":
        if not torch.cuda.is_available():
            raise DeviceError("device must be available, got cuda, and torch sees no CUDA device")
        if interpreted:
            raise DeviceError("TRITON_INTERPRET must be unset for device cuda, got 1")
        return "cuda"
    if requested == "auto" and torch.cuda.is_available() and not interpreted:
        return "cuda"
    if not interpreted:
        if "triton" in sys.modules:
            raise DeviceError("TRITON_INTERPRET must be set before triton is imported; set it in the environment")
        os.environ["TRITON_INTERPRET"] = "1"
    return "cpu"


@lru_cache(maxsize=1)
def current() -> str:
    """The device in use: decided once a process."""
    return choose()


def describe(device: str, packages: Sequence[str] = ()) -> str:
    """The device and the versions that matter, in one line."""
    if device == "cuda":
        import torch

        major, minor = torch.cuda.get_device_capability()
        what = f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    else:
        what = f"Triton's interpreter on {os.cpu_count()} CPU cores"
    return f"{what}; " + ", ".join(f"{name} {version}" for name, version in versions(packages).items())


def versions(packages: Sequence[str] = ()) -> dict[str, str]:
    """Versions of everything that can change a result, and of some packages more, named as pip does."""
    found = {"python": platform.python_version()}
    more = [package.partition("[")[0] for package in packages]  # mlx[cpu] is mlx
    for name in (*more, "torch", "triton", "numpy", "hypothesis"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
