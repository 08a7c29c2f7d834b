"""Tables of cosines and sines, built from float64 angles.

An fp32 angle ``position * inverse_frequency`` is off by 6e-2 at position one million; the float64 product rounded once,
after the cosine, is exact to fp32 everywhere. The scalings change the inverse frequencies, and with some an attention
factor multiplies the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from tilewright.errors import ArgumentError, DTypeError
from tilewright.ops.rope.call import INDEX_DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable

    Scaling = Mapping[str, Any]


class RopeTable(NamedTuple):
    """Cosines and sines, each ``[positions, rotary_dim / 2]``."""

    cos: torch.Tensor
    sin: torch.Tensor


def rope_table(
    head_dim: int,
    positions: int | torch.Tensor,
    *,
    base: float = 10000.0,
    scaling: Scaling | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> RopeTable:
    """Build the cosine and sine tables of rotary embedding.

    ``cos[p, i] = factor * cos(p * inv_freq[i])`` with ``inv_freq[i] = base ** (-2 i / head_dim)`` (Su et al.,
    "RoFormer", arXiv:2104.09864), computed in float64 and rounded once to ``dtype``.

    Args:
        head_dim: number of rotated features, even; with partial rotary embedding the rotary dimension.
        positions: how many positions, from 0; or the positions themselves, an integer tensor ``[positions]``.
        base: the base of the frequencies (theta).
        scaling: how the frequencies are changed for long contexts: a mapping with ``rope_type`` and that type's own
            entries, the names being those of the Hugging Face ``rope_scaling`` configuration:

            - ``"default"``: not at all.
            - ``"linear"``: ``factor``. Position interpolation (arXiv:2306.15595).
            - ``"dynamic"``: ``factor``, ``original_max_position_embeddings``, and ``seq_len`` (by default the number
              of positions). NTK-aware base growth with the length.
            - ``"yarn"``: ``factor``, ``original_max_position_embeddings``, optional ``beta_fast`` 32,
              ``beta_slow`` 1, ``mscale``, ``mscale_all_dim``, ``attention_factor``, ``truncate`` True
              (arXiv:2309.00071).
            - ``"llama3"``: ``factor``, ``low_freq_factor``, ``high_freq_factor``,
              ``original_max_position_embeddings``.
            - ``"longrope"``: ``short_factor``, ``long_factor`` (lists of ``head_dim / 2``),
              ``original_max_position_embeddings``, optional ``factor``, ``attention_factor``, ``short_mscale``,
              ``long_mscale``, and ``seq_len`` (by default the number of positions), which decides between short and
              long (arXiv:2402.13753).
        dtype: of the tables: float32 or float64, or a 16-bit float for kernels that want one.
        device: where the tables lie; by default on the device of ``positions``, else on torch's default device.

    Returns:
        ``RopeTable(cos, sin)``, each ``[positions, head_dim / 2]``.

    Raises:
        ArgumentError: an odd ``head_dim``, negative ``positions``, a base that is not positive, an unknown scaling or
            one whose entries are missing, unknown or out of range.
        DTypeError: ``dtype`` is no floating-point dtype.

    Example:
        >>> import tilewright
        >>> cos, sin = tilewright.rope_table(64, 4096, base=500000.0, scaling={"rope_type": "linear", "factor": 2.0})
        >>> cos.shape
        torch.Size([4096, 32])
    """
    if not isinstance(head_dim, int) or head_dim < 2 or head_dim % 2:
        raise ArgumentError("rope_table", "head_dim", f"got {head_dim}; expected an even number of at least 2")
    if not base > 0 or not math.isfinite(base):
        raise ArgumentError("rope_table", "base", f"got {base}; expected a positive number")
    if not dtype.is_floating_point:
        raise DTypeError("rope_table", "dtype", f"got {dtype}; expected a floating-point dtype")
    position = _positions(positions, device)
    if scaling is not None and not isinstance(scaling, Mapping):
        raise ArgumentError("rope_table", "scaling", f"got {scaling!r}; expected a mapping with 'rope_type'")
    inverse_frequency, factor = _scaled(head_dim, base, dict(scaling or {}), positions)
    angle = position.double()[:, None] * torch.tensor(inverse_frequency, dtype=torch.float64, device=position.device)
    return RopeTable((torch.cos(angle) * factor).to(dtype), (torch.sin(angle) * factor).to(dtype))


def _positions(positions: int | torch.Tensor, device: torch.device | str | None) -> torch.Tensor:
    if isinstance(positions, torch.Tensor):
        if positions.dim() != 1 or positions.dtype not in (torch.int8, torch.int16, *INDEX_DTYPES):
            raise ArgumentError(
                "rope_table",
                "positions",
                f"got {positions.dtype} {tuple(positions.shape)}; expected integers [positions]",
            )
        return positions.to(device=device)
    if isinstance(positions, bool) or not isinstance(positions, int) or positions < 0:
        raise ArgumentError("rope_table", "positions", f"got {positions}; expected an int of at least 0")
    return torch.arange(positions, device=device)


def _inverse_frequencies(head_dim: int, base: float) -> list[float]:
    return [base ** (-2.0 * i / head_dim) for i in range(head_dim // 2)]


# What configurations keep beside a scaling's own entries.
_NOT_SCALING = ("rope_theta", "partial_rotary_factor", "max_position_embeddings", "mrope_section", "mrope_interleaved")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class _Entries:
    """The entries of a scaling, each taken once, so that one left over is an error."""

    def __init__(self, scaling: dict[str, Any], rope_type: str) -> None:
        self._left = scaling
        self._type = rope_type

    def error(self, message: str) -> ArgumentError:
        return ArgumentError("rope_table", "scaling", f"type '{self._type}': {message}")

    def number(
        self, name: str, default: float | None = None, *, least: float | None = None, above: float | None = None
    ) -> float:
        value = self._left.pop(name, default)
        if value is None:
            raise self.error(f"needs '{name}'")
        if not _is_number(value):
            raise self.error(f"'{name}' is {value!r}; expected a number")
        if least is not None and value < least:
            raise self.error(f"'{name}' is {value}; expected at least {least:g}")
        if above is not None and value <= above:
            raise self.error(f"'{name}' is {value}; expected more than {above:g}")
        return float(value)

    def optional(self, name: str, *, above: float | None = None) -> float | None:
        if self._left.get(name) is None:
            self._left.pop(name, None)
            return None
        return self.number(name, above=above)

    def factors(self, name: str, length: int) -> list[float]:
        value = self._left.pop(name, None)
        if (
            not isinstance(value, list | tuple)
            or len(value) != length
            or not all(_is_number(f) and f > 0 for f in value)
        ):
            raise self.error(f"needs '{name}', a list of {length} positive numbers")
        return [float(f) for f in value]

    def flag(self, name: str, default: bool) -> bool:
        value = self._left.pop(name, default)
        if not isinstance(value, bool):
            raise self.error(f"'{name}' is {value!r}; expected True or False")
        return value

    def finish(self) -> None:
        if self._left:
            raise self.error(f"does not know {', '.join(map(repr, self._left))}")


def _scaled(
    head_dim: int, base: float, scaling: dict[str, Any], positions: int | torch.Tensor
) -> tuple[list[float], float]:
    """Inverse frequencies and the factor of the table."""
    rope_type = scaling.pop("rope_type", scaling.pop("type", "default"))
    for name in _NOT_SCALING:
        scaling.pop(name, None)
    if not isinstance(rope_type, str) or rope_type not in _SCALINGS:
        known = ", ".join(_SCALINGS)
        raise ArgumentError("rope_table", "scaling", f"got rope_type {rope_type!r}; expected one of {known}")
    entries = _Entries(scaling, rope_type)
    scaled = _SCALINGS[rope_type](head_dim, base, entries, positions)
    entries.finish()
    return scaled


def _length(positions: int | torch.Tensor) -> int:
    """How long a sequence the positions make; of a tensor this reads the values."""
    if isinstance(positions, int):
        return positions
    return int(positions.max()) + 1 if positions.numel() else 0


def _default(head_dim: int, base: float, entries: _Entries, positions: int | torch.Tensor) -> tuple[list[float], float]:
    return _inverse_frequencies(head_dim, base), 1.0


def _linear(head_dim: int, base: float, entries: _Entries, positions: int | torch.Tensor) -> tuple[list[float], float]:
    factor = entries.number("factor", least=1.0)
    return [f / factor for f in _inverse_frequencies(head_dim, base)], 1.0


def _dynamic(head_dim: int, base: float, entries: _Entries, positions: int | torch.Tensor) -> tuple[list[float], float]:
    factor = entries.number("factor", least=1.0)
    original = entries.number("original_max_position_embeddings", least=1)
    seq_len = max(entries.optional("seq_len") or _length(positions), original)
    if head_dim > 2:
        base *= (factor * seq_len / original - (factor - 1)) ** (head_dim / (head_dim - 2))
    return _inverse_frequencies(head_dim, base), 1.0


def _yarn(head_dim: int, base: float, entries: _Entries, positions: int | torch.Tensor) -> tuple[list[float], float]:
    factor = entries.number("factor", least=1.0)
    original = entries.number("original_max_position_embeddings", least=1)
    beta_fast, beta_slow = entries.number("beta_fast", 32.0, above=0), entries.number("beta_slow", 1.0, above=0)
    if base <= 1:
        raise ArgumentError("rope_table", "base", f"got {base}; scaling 'yarn' needs more than 1")
    mscale, mscale_all_dim = entries.optional("mscale"), entries.optional("mscale_all_dim")
    attention_factor = entries.optional("attention_factor")
    truncate = entries.flag("truncate", True)

    def pair_with(rotations: float) -> float:
        """The pair that turns so many times within the original length, as a real number."""
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_with(beta_fast), pair_with(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    frequencies = []
    for i, frequency in enumerate(_inverse_frequencies(head_dim, base)):
        interpolated = min(1.0, max(0.0, (i - low) / (high - low)))
        frequencies.append(frequency * (1 - interpolated) + frequency / factor * interpolated)

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0

    if attention_factor is None:
        if mscale and mscale_all_dim:
            attention_factor = magnitude(mscale) / magnitude(mscale_all_dim)
        else:
            attention_factor = magnitude(1.0)
    return frequencies, attention_factor


def _llama3(head_dim: int, base: float, entries: _Entries, positions: int | torch.Tensor) -> tuple[list[float], float]:
    factor = entries.number("factor", least=1.0)
    low, high = entries.number("low_freq_factor"), entries.number("high_freq_factor")
    original = entries.number("original_max_position_embeddings", least=1)
    if high <= low:
        raise entries.error(f"'high_freq_factor' is {high}; expected more than 'low_freq_factor', {low}")
    frequencies = []
    for frequency in _inverse_frequencies(head_dim, base):
        turns = original * frequency / (2 * math.pi)
        kept = min(1.0, max(0.0, (turns - low) / (high - low)))
        frequencies.append(frequency * kept + frequency / factor * (1 - kept))
    return frequencies, 1.0


def _longrope(
    head_dim: int, base: float, entries: _Entries, positions: int | torch.Tensor
) -> tuple[list[float], float]:
    original = entries.number("original_max_position_embeddings", above=1)
    short, long = entries.factors("short_factor", head_dim // 2), entries.factors("long_factor", head_dim // 2)
    is_long = (entries.optional("seq_len") or _length(positions)) > original
    factor, attention_factor = entries.optional("factor"), entries.optional("attention_factor")
    own = {"short_mscale": entries.optional("short_mscale"), "long_mscale": entries.optional("long_mscale")}
    chosen = own["long_mscale" if is_long else "short_mscale"]
    if chosen is not None:
        attention_factor = chosen
    if attention_factor is None:
        if factor is None:
            raise entries.error("needs 'factor' or 'attention_factor'")
        attention_factor = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    pairs = zip(_inverse_frequencies(head_dim, base), long if is_long else short, strict=True)
    return [frequency / each for frequency, each in pairs], attention_factor


_SCALINGS: dict[str, Callable[[int, float, _Entries, int | torch.Tensor], tuple[list[float], float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
