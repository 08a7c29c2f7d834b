"""How a tensor is quantised to FP8: formats, and the policies in which production kernels differ."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from tilewright.errors import ArgumentError, DTypeError
from tilewright.platforms import facts

GROUP_SIZES = (128, 64, 32, None)
SCALE_FORMATS = ("fp32", "ue8m0", "ue8m0_fp32", "ue8m0_packed")
SCALE_LAYOUTS = ("row", "column", "tma_aligned")
APPLICATIONS = ("divide", "reciprocal")
MIN_SCALE = 2.0**-126
"""The smallest normal float32 number: its reciprocal is still finite."""
MAX_FLOOR = 2.0**125
MIN_MAXIMUM = 16.0
"""Keeps the scale of the largest float32 numbers below 2^126, so that its reciprocal is a normal number; so does the
largest floor."""

DTYPES = {
    "e4m3fn": torch.float8_e4m3fn,
    "e4m3fnuz": torch.float8_e4m3fnuz,
    "e5m2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class QuantPolicy:
    """The places in which production kernels differ, and what a kernel of ours does there.

    With ``amax`` the largest magnitude of a group, in float32, every step rounded to nearest even::

        scale = max(max(amax, amax_floor) / maximum, scale_floor)
        scale = 2^ceil(log2(max(scale, ue8m0_floor)))            for the ue8m0 formats only
        value = fp8(clamp(x / scale, -maximum, maximum))         or x * (1 / scale)

    Attributes:
        amax_floor: the least ``amax``.
        scale_floor: the least scale. Some floor must keep scales at or above 2^-126.
        ue8m0_floor: another floor of the scale, where it is rounded up to a power of two.
        apply: ``"divide"`` by the scale, or multiply by its ``"reciprocal"``, which is rounded first.
        round_input: quantise a norm (or an activation) as it would be returned, rounded to its dtype, rather than the
            float32 value before that rounding.
        maximum: what the largest magnitude is mapped to; None for the format's own: 448 for e4m3fn, 57344 for e5m2,
            ``fnuz_maximum`` for e4m3fnuz.
        fnuz_maximum: that of e4m3fnuz. The format holds 240; vLLM found that scaling to it costs accuracy.
    """

    amax_floor: float = 0.0
    scale_floor: float = MIN_SCALE
    ue8m0_floor: float = 0.0
    apply: str = "divide"
    round_input: bool = True
    maximum: float | None = None
    fnuz_maximum: float = 224.0

    def maximum_of(self, dtype: torch.dtype) -> float:
        """What the largest magnitude of a group is mapped to."""
        if self.maximum is not None:
            return self.maximum
        return self.fnuz_maximum if dtype == torch.float8_e4m3fnuz else torch.finfo(dtype).max


_VLLM_FLOOR = 1.0 / 512.0
"""vLLM's scale floor is 1 / (maximum * 512): what a group of this amax gets."""

POLICIES = {
    "exact": QuantPolicy(),
    "vllm_native": QuantPolicy(amax_floor=_VLLM_FLOOR, scale_floor=0.0),
    "vllm_native_per_token": QuantPolicy(amax_floor=_VLLM_FLOOR, scale_floor=0.0, apply="reciprocal"),
    "vllm_cuda": QuantPolicy(amax_floor=1e-10, scale_floor=0.0, ue8m0_floor=1e-10),
    "vllm_fused": QuantPolicy(amax_floor=_VLLM_FLOOR, scale_floor=0.0),
    "aiter": QuantPolicy(amax_floor=1e-10, scale_floor=0.0, apply="reciprocal", round_input=False, fnuz_maximum=240.0),
    "deep_gemm": QuantPolicy(amax_floor=1e-4, scale_floor=0.0, apply="reciprocal"),
}
"""What known kernels do, by name; this family's README says where each was read and shows how their bytes differ."""


@dataclass(frozen=True)
class QuantFormat:
    """One quantisation of a tensor, as the fusions take several of them.

    Attributes:
        group_size: how many neighbours along the last dimension share a scale: 128, 64, 32, or None for the whole row
            (per token). The last group of a row may be shorter.
        scale_format: ``"fp32"``; ``"ue8m0"``, powers of two as ``torch.float8_e8m0fnu``; ``"ue8m0_fp32"``, the same
            numbers as float32; ``"ue8m0_packed"``, four exponents in an int32, the first group's lowest, as DeepGEMM
            takes them.
        scale_layout: ``"row"``: the scales of a row lie together; ``"column"``: those of a group's column do;
            ``"tma_aligned"``: likewise, each column padded to a multiple of 16 bytes. Packed scales are
            ``"tma_aligned"``.
        dtype: ``torch.float8_e4m3fn``, ``torch.float8_e4m3fnuz`` or ``torch.float8_e5m2``; None for the platform's own.
        policy: the arithmetic, or the name of a preset in :data:`POLICIES`.
    """

    group_size: int | None = 128
    scale_format: str = "fp32"
    scale_layout: str = "row"
    dtype: torch.dtype | None = None
    policy: QuantPolicy | str = "exact"

    @property
    def is_packed(self) -> bool:
        """Whether four scales share an int32."""
        return self.scale_format == "ue8m0_packed"

    @property
    def rounds_up(self) -> bool:
        """Whether scales are powers of two."""
        return self.scale_format != "fp32"

    @property
    def arithmetic(self) -> QuantPolicy:
        """The policy itself, of a checked format."""
        return POLICIES[self.policy] if isinstance(self.policy, str) else self.policy

    def groups(self, n_cols: int) -> int:
        """How many scales a row of so many columns has."""
        return 1 if self.group_size is None else -(-n_cols // self.group_size)


def checked(given: QuantFormat, device: torch.device, operation: str, name: str = "") -> QuantFormat:
    """A valid format with its dtype filled in.

    Args:
        given: the format.
        device: whose own FP8 dtype is taken where the format names none.
        operation: for messages.
        name: the argument that holds the format; by default its fields are arguments themselves.

    Raises:
        ArgumentError: a field has a value that cannot be.
        DTypeError: a field has the wrong type, or the dtype is no FP8 dtype that is accepted.
    """
    if not isinstance(given, QuantFormat):
        raise DTypeError(operation, name, f"got {type(given).__name__}; expected QuantFormat")
    if isinstance(given.group_size, bool) or not isinstance(given.group_size, int | None):
        raise DTypeError(operation, name or "group_size", f"got {given.group_size!r}; expected an int or None")
    for field, known in (
        ("group_size", GROUP_SIZES),
        ("scale_format", SCALE_FORMATS),
        ("scale_layout", SCALE_LAYOUTS),
    ):
        value = getattr(given, field)
        if value not in known:
            expected = ", ".join(map(str, known))
            message = f"{field} is {value!r}" if name else f"got {value!r}"
            raise ArgumentError(operation, name or field, f"{message}; expected one of {expected}")
    if given.is_packed and given.scale_layout != "tma_aligned":
        message = "packed scales need scale_layout 'tma_aligned', the layout that DeepGEMM reads"
        raise ArgumentError(operation, name or "scale_layout", message)
    dtype = DTYPES[facts(device).fp8] if given.dtype is None else given.dtype
    if dtype not in DTYPES.values():
        expected = ", ".join(map(str, DTYPES.values()))
        raise DTypeError(operation, name or "dtype", f"got {given.dtype!r}; expected one of {expected}")
    _check_policy(given.policy, dtype, operation, name or "policy")
    return QuantFormat(given.group_size, given.scale_format, given.scale_layout, dtype, given.policy)


def _check_policy(policy: Any, dtype: torch.dtype, operation: str, name: str) -> None:
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ArgumentError(operation, name, f"no policy is called {policy!r}; there are: {', '.join(POLICIES)}")
        policy = POLICIES[policy]
    if not isinstance(policy, QuantPolicy):
        raise DTypeError(operation, name, f"got {type(policy).__name__}; expected QuantPolicy or a preset's name")
    for field in fields(QuantPolicy):
        value = getattr(policy, field.name)
        if field.name == "apply":
            fits = value in APPLICATIONS
        elif field.name == "round_input":
            fits = isinstance(value, bool)
        else:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            fits = (value is None and field.name == "maximum") or (number and 0 <= value < float("inf"))
        if not fits:
            raise ArgumentError(operation, name, f"{field.name} is {value!r}, which cannot be")
    maximum = policy.maximum_of(dtype)
    largest = torch.finfo(dtype).max
    if not MIN_MAXIMUM <= maximum <= largest:
        raise ArgumentError(operation, name, f"has maximum {maximum}, not {MIN_MAXIMUM} to {largest:g}, for {dtype}")
    if max(policy.amax_floor / maximum, policy.scale_floor, policy.ue8m0_floor) > MAX_FLOOR:
        raise ArgumentError(operation, name, f"has a floor above {MAX_FLOOR:.3g}: the reciprocal of its scale vanishes")
    if max(policy.amax_floor / maximum, policy.scale_floor) < MIN_SCALE:
        message = "has no floor that keeps scales at or above 2^-126, which a group of zeros needs: give scale_floor"
        raise ArgumentError(operation, name, message)


def encoded(given: QuantFormat) -> str:
    """A checked format as text, for the registered operators."""
    policy = given.arithmetic
    numbers = (policy.amax_floor, policy.scale_floor, policy.ue8m0_floor, policy.maximum, policy.fnuz_maximum)
    assert given.dtype is not None
    parts = (
        str(given.group_size), given.scale_format, given.scale_layout, str(given.dtype).removeprefix("torch."),
        policy.apply, str(policy.round_input), *("None" if n is None else float(n).hex() for n in numbers),
    )  # fmt: skip
    return " ".join(parts)


def decoded(text: str) -> QuantFormat:
    """The format of :func:`encoded`."""
    group_size, scale_format, scale_layout, dtype, apply, round_input, *numbers = text.split()
    amax_floor, scale_floor, ue8m0_floor, maximum, fnuz_maximum = (
        None if n == "None" else float.fromhex(n) for n in numbers
    )
    policy = QuantPolicy(
        amax_floor=amax_floor or 0.0,
        scale_floor=scale_floor or 0.0,
        ue8m0_floor=ue8m0_floor or 0.0,
        apply=apply,
        round_input=round_input == "True",
        maximum=maximum,
        fnuz_maximum=fnuz_maximum or 0.0,
    )
    size = None if group_size == "None" else int(group_size)
    return QuantFormat(size, scale_format, scale_layout, getattr(torch, dtype), policy)
