"""How a kernel computes: a declared record of formats, accumulators and elementary errors.

What differs between kernels and devices is stated here and enters the error budget; it is never covered by
loosening a tolerance. A kernel whose insides are unknown is given the most permissive record of its class.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from references.rounding import FORMATS, Format, Mode, as_format


@dataclass(frozen=True)
class ArithmeticModel:
    """The arithmetic of one kernel on one device.

    Relative errors are bounds on ``|computed - exact| / |exact|`` of a single operation.

    Attributes:
        name: how reports call it.
        provenance: where the numbers come from, and whether they were measured.
        work_format: format of everything that is not an input, P, a partial or the output.
        accumulator: how 16-bit dot products are summed. "ieee": one rounding to nearest an addition, in
            any order. "fused": a tensor core adds ``fused_products`` products and its accumulator at once:
            all are aligned to the largest exponent, cut after ``fused_fraction_bits`` fractional bits,
            summed exactly and truncated to the work format. Float32 operands are summed the "ieee" way,
            unless they are cut to tfloat32.
        fused_products: K, products of one fused step.
        fused_fraction_bits: F.
        carried: whether the accumulator of the P.V product goes through the dot product of the next tile
            (acc = dot(p, v, acc)) or each tile's dot product is added to it.
        tf32: float32 operands are cut to tfloat32 before they are multiplied.
        scale_into_query: the query is multiplied by the scale and rounded to the input format beforehand.
        scale_error: relative error of the constant scale * log2(e) as the kernel holds it.
        contraction: multiply and add may be contracted into one rounding. This removes roundings, but the
            largest weight may then differ from 1.
        exp2_error: relative error of exp2, the rounding included. exp2(0) is exactly 1.
        exp2_flushes: results of exp2 below the smallest normal number may become zero.
        log2_error: of log2: relative to 1 + abs(log2), because some devices promise only an absolute error
            near 1.
        division_error: relative error of a quotient, the rounding to the work format included.
        flush_to_zero: subnormal results of the work format may become zero.
        p_format: format of P in the P.V product; None: the input format.
        p_rounding: how P is rounded to it.
        row_sum_from_p: the row sum adds the rounded P, not the exponentials before rounding.
        output_rounding: how the quotient is rounded to the output format, which is the input format.
        merge: how splits are combined. "max": unnormalised (acc, m, l) partials rescaled to the common
            maximum, in order or at once. "grouped": the same in groups of ``tiling.MERGE_GROUP`` splits, then the
            groups, as flashcore's kernels do. "lse": normalised partial outputs weighted by their stored
            log-sum-exp. "lse twice": so in groups of any splits, then the groups.
        partial_format: format of the stored partial outputs; None: the input format.
    """

    name: str
    provenance: str
    work_format: str = "float32"
    accumulator: Literal["ieee", "fused"] = "ieee"
    fused_products: int = 1
    fused_fraction_bits: int = 24
    carried: bool = False
    tf32: bool = False
    scale_into_query: bool = False
    scale_error: float = 3 * 2.0**-24
    contraction: bool = False
    exp2_error: float = 2.5 * 2.0**-23
    exp2_flushes: bool = False
    log2_error: float = 2.0**-22
    division_error: float = 2.0**-24
    flush_to_zero: bool = False
    p_format: str | None = None
    p_rounding: Mode = "nearest"
    row_sum_from_p: bool = False
    output_rounding: Mode = "nearest"
    merge: Literal["max", "grouped", "lse", "lse twice"] = "max"
    partial_format: str | None = "float32"

    def __post_init__(self) -> None:
        """Refuse what no derivation covers."""
        for field in ("work_format", "partial_format", "p_format"):
            name = getattr(self, field)
            if name not in FORMATS and not (field in _OPTIONAL and name is None):
                raise ValueError(f"{field} must be one of {', '.join(FORMATS)}, got {name!r}")
        for field, allowed in _CHOICES.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be one of {', '.join(allowed)}, got {getattr(self, field)!r}")
        for field in ("scale_error", "exp2_error", "log2_error", "division_error"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} must be in [0, 1), got {getattr(self, field)!r}")
        if self.fused_products < 1:
            raise ValueError(f"fused_products must be at least 1, got {self.fused_products}")

    @property
    def work(self) -> Format:
        """The work format."""
        return as_format(self.work_format)

    def format_of_p(self, fmt: Format | str) -> Format:
        """The format of P for inputs in ``fmt``."""
        return as_format(self.p_format or fmt)

    def format_of_partials(self, fmt: Format | str) -> Format:
        """The format of stored partial outputs for inputs in ``fmt``."""
        return as_format(self.partial_format or fmt)

    @property
    def stores_of_lse(self) -> int:
        """How often a normalised partial output and its log-sum-exp are stored and merged."""
        return {"lse": 1, "lse twice": 2}.get(self.merge, 0)

    def fused_step_error(self) -> float:
        """Error of one fused step relative to the sum of the magnitudes it adds up.

        K products and the accumulator each lose less than ``2**-F`` of the largest of them, and truncating
        their sum to the work format loses less than one unit in its last place.
        """
        alignment = (self.fused_products + 1) * 2.0**-self.fused_fraction_bits
        return (1 + alignment) * (1 + self.work.unit_roundoff("toward_zero")) - 1

    def to_json(self) -> str:
        """One JSON object, floats exact in hexadecimal."""
        fields = {k: v.hex() if isinstance(v, float) else v for k, v in dataclasses.asdict(self).items()}
        return json.dumps(fields, indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> ArithmeticModel:
        """The inverse of ``to_json``; refuses missing and unknown fields and values of another type."""
        stored: Any = json.loads(text)
        if not isinstance(stored, dict):
            raise ValueError(f"an arithmetic model must be a JSON object, got {type(stored).__name__}")
        fields = {f.name: f for f in dataclasses.fields(ArithmeticModel)}
        if stored.keys() != fields.keys():
            raise ValueError(f"an arithmetic model must have the fields {sorted(fields)}, got {sorted(stored)}")
        values: dict[str, Any] = {}
        for name, value in stored.items():
            # The declared types are strings, because annotations are not evaluated in this module.
            kind = _TYPES.get(str(fields[name].type), str)
            if kind is float and isinstance(value, str):
                value = float.fromhex(value)
            if type(value) is not kind and not (name in _OPTIONAL and value is None):
                raise ValueError(f"{name} must be {kind.__name__}, got {value!r}")
            values[name] = value
        return ArithmeticModel(**values)


_TYPES: dict[str, type] = {"bool": bool, "int": int, "float": float}

_OPTIONAL = ("p_format", "partial_format")

_CHOICES: dict[str, tuple[str, ...]] = {
    "accumulator": ("ieee", "fused"),
    "p_rounding": ("nearest", "toward_zero"),
    "output_rounding": ("nearest", "toward_zero"),
    "merge": ("max", "grouped", "lse", "lse twice"),
}

INTERPRETER = ArithmeticModel(
    name="interpreter",
    provenance=(
        "Triton's CPU interpreter: every operation is a NumPy operation in float32. exp2 and log2: the bound "
        "of 4 ulp that NumPy states for its vector routines; sums and dot products in any order."
    ),
    exp2_error=4.5 * 2.0**-23,
    log2_error=4.5 * 2.0**-23,
    merge="grouped",
)

_NVIDIA = ArithmeticModel(
    name="NVIDIA",
    provenance="",
    accumulator="fused",
    carried=True,
    contraction=True,
    # ex2.approx: 2 ulp; lg2.approx: 2**-22; div.full: 2 ulp; half an ulp more for the correctly rounded
    # value they are stated against. Subnormal results of ex2.approx.ftz are flushed.
    exp2_error=2.5 * 2.0**-23,
    exp2_flushes=True,
    log2_error=2.0**-22,
    division_error=2.5 * 2.0**-23,
    flush_to_zero=True,
    merge="grouped",
)

AMPERE = dataclasses.replace(
    _NVIDIA,
    name="Ampere",
    provenance=(
        "K and F: Fasi et al. 2021 and the bit-accurate model of Xie et al. 2025 (arXiv 2511.10909). "
        "Elementary functions: PTX ISA. Not measured here."
    ),
    fused_products=8,
    fused_fraction_bits=24,
)

HOPPER = dataclasses.replace(
    _NVIDIA,
    name="Hopper",
    provenance=(
        "K and F: Khattak and Mikaitis 2025 (arXiv 2512.07004) and Xie et al. 2025 (arXiv 2511.10909). "
        "Elementary functions: PTX ISA. Not measured here."
    ),
    fused_products=16,
    fused_fraction_bits=25,
)

BLACKWELL = dataclasses.replace(
    HOPPER,
    name="Blackwell",
    provenance=(
        "K and F for 16-bit inputs as on Hopper: Xie et al. 2025 (arXiv 2511.10909, their model of B200). "
        "Elementary functions: PTX ISA. Not measured here."
    ),
)

PERMISSIVE = dataclasses.replace(
    _NVIDIA,
    name="permissive",
    provenance=(
        "For a kernel whose insides are unknown: Volta's accumulator (Fasi et al. 2021), the least accurate "
        "of its class; P truncated; splits merged through stored log-sum-exps; exp2 by a short polynomial."
    ),
    fused_products=4,
    fused_fraction_bits=23,
    exp2_error=2.0**-20,
    log2_error=2.0**-20,
    p_rounding="toward_zero",
    merge="lse",
)

REFERENCE = ArithmeticModel(
    name="float64 reference",
    provenance=(
        "references.attention: NumPy in float64, the scale applied to the score without log2(e), exp and log "
        "within one ulp, one tile, one quotient an output."
    ),
    work_format="float64",
    scale_error=0.0,
    exp2_error=2.0**-52,
    log2_error=2.0**-52,
    division_error=2.0**-53,
)
