"""Checks of a caller's input that are missing: what should raise is computed, or written, all the same."""

from __future__ import annotations

from properties.mutants.mutant import VALIDATION, WRAPPER, Edit, Mutant

LAWS = ("whatever_was_called_before",)


def _unchecked(id_: str, what: str, file: str, anchor: str, replacement: str = "") -> Mutant:
    return Mutant(id_, "VALID", f"{what} is accepted", "a call with it", (Edit(file, anchor, replacement),), LAWS)


MUTANTS = (
    _unchecked("F300", "a negative length", VALIDATION, "if not 0 <= value <= upper:", "if not value <= upper:"),
    _unchecked("F301", "a length beyond the capacity", VALIDATION, "if not 0 <= value <= upper:", "if not 0 <= value:"),
    _unchecked(
        "F302", "a scale that is not finite", VALIDATION, "if not math.isfinite(qk_scale):", "if math.isnan(qk_scale):"
    ),
    _unchecked(
        "F303", "a tile that is no power of two", VALIDATION, "if value not in (16, 32, 64, 128, 256):", "if value < 1:"
    ),
    _unchecked(
        "F304",
        "an expanded cache",
        VALIDATION,
        "if any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True)):",
        "if value.numel() < 0:",
    ),
    _unchecked(
        "F305", "a wrong number of heads", VALIDATION, "if value is not None and (isinstance(value, bool)", "if (False"
    ),
    _unchecked(
        "F306",
        "an odd number of query heads",
        VALIDATION,
        "num_q_heads < 1 or num_q_heads % num_kv_heads != 0",
        "num_q_heads < num_kv_heads",
    ),
    _unchecked(
        "F307",
        "a value of another shape",
        WRAPPER,
        '    validation.check_shape("value", value, key.shape, "of key")\n',
        '    validation.check_shape("value", value, [*key.shape[:2], *value.shape[2:3], key.shape[3]], "of key")\n',
    ),
    _unchecked(
        "F308", "an int for a bool", VALIDATION, "if not isinstance(value, bool):", "if not isinstance(value, int):"
    ),
    _unchecked(
        "F309",
        "an input that requires grad",
        VALIDATION,
        "if value.requires_grad and torch.is_grad_enabled():",
        "if value.requires_grad and not torch.is_grad_enabled():",
    ),
    _unchecked(
        "F310",
        "a tensor of another dtype",
        VALIDATION,
        "if value.dtype != reference.dtype:",
        "if value.dtype.itemsize != reference.dtype.itemsize:",
    ),
    _unchecked(
        "F311",
        "lengths of another integer",
        VALIDATION,
        "if value.dtype not in (torch.int32, torch.int64):",
        "if value.is_floating_point():",
    ),
)
