"""What the public functions of FP8 quantisation return."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Quantized(NamedTuple):
    """FP8 values and the scales by which they are multiplied back.

    Attributes:
        values: of the format's FP8 dtype, contiguous.
        scales: ``[..., groups]`` in the format's dtype and layout; four to an int32 where they are packed; the given
            scale, where one was given.
    """

    values: torch.Tensor
    scales: torch.Tensor


class NormQuantized(NamedTuple):
    """A quantised RMSNorm.

    Attributes:
        values: as in :class:`Quantized`.
        scales: as in :class:`Quantized`.
        norm: the norm in the dtype of ``x``, contiguous; None unless it was asked for.
        also: the further quantisations, in the order of the formats.
    """

    values: torch.Tensor
    scales: torch.Tensor
    norm: torch.Tensor | None
    also: tuple[Quantized, ...]


class AddNormQuantized(NamedTuple):
    """A quantised RMSNorm of a sum.

    Attributes:
        values: as in :class:`Quantized`.
        scales: as in :class:`Quantized`.
        residual: the sum, in the dtype of ``residual``.
        norm: the norm in the dtype of ``x``, contiguous; None unless it was asked for.
        also: the further quantisations, in the order of the formats.
    """

    values: torch.Tensor
    scales: torch.Tensor
    residual: torch.Tensor
    norm: torch.Tensor | None
    also: tuple[Quantized, ...]


class ActivationQuantized(NamedTuple):
    """A quantised activation.

    Attributes:
        values: as in :class:`Quantized`.
        scales: as in :class:`Quantized`.
        activation: in the dtype of ``x``, contiguous; None unless it was asked for.
        also: the further quantisations, in the order of the formats.
    """

    values: torch.Tensor
    scales: torch.Tensor
    activation: torch.Tensor | None
    also: tuple[Quantized, ...]


class RotationQuantized(NamedTuple):
    """A quantised rotation.

    Attributes:
        values: as in :class:`Quantized`.
        scales: as in :class:`Quantized`.
        rotated: in the dtype of ``x``, contiguous; None unless it was asked for.
        also: the further quantisations, in the order of the formats.
    """

    values: torch.Tensor
    scales: torch.Tensor
    rotated: torch.Tensor | None
    also: tuple[Quantized, ...]
