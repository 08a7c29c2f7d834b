"""Where vLLM's own norms round: measured on the operator that is there, once for each device and dtype.

``torch.ops._C.rms_norm`` and ``fused_add_rms_norm`` have changed it more than once under one name and schema: before
the weight multiplies up to v0.19 and from v0.23 on, after it in between and in later kernels again
(``csrc/libtorch_stable/layernorm_kernels.cu``, ``csrc/cpu/layernorm.cpp``). That the sum is rounded before its norm is
called a fault. So nothing is assumed: the operator is given a few rows, and what it makes of them tells the forms.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch._ops import OpOverload

_ROWS, _COLS, _EPS = 16, 512, 1e-6
_ALIKE = 0.99
"""Share of equal numbers that counts as the same form. Forms differ in every fifth number or so, and an inverse root
that is off by its last bit changes one in thousands."""

_NAMES = {"input": "x", "x_residual": "residual", "epsilon": "eps", "variance_epsilon": "eps"}

Rounding = tuple[str, str]
"""``cast`` and ``residual_rounding`` of :func:`tilewright.add_rms_norm`."""


@lru_cache(maxsize=64)
def measured(operator: OpOverload, device: torch.device, dtype: torch.dtype) -> Rounding | None:
    """What a norm of vLLM's does, by what it computes.

    Args:
        operator: a norm that writes ``result`` or its ``input``, or returns it, first if there are several; its other
            arguments are called as in :data:`_NAMES`.
        device: where it is run, on 16 rows of 512 numbers.
        dtype: of its arguments. In float32 all forms are one.

    Returns:
        ``cast`` and ``residual_rounding``, the latter "rounded" where there is no residual; None if the operator cannot
        be run there or computes something else.
    """
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), unset_fake_temporarily(), torch.no_grad():
        x, residual, weight = _data(dtype)
        names = {_NAMES.get(argument.name, argument.name): argument.name for argument in operator._schema.arguments}
        given = {"x": x, "residual": residual, "weight": weight}
        tensors = {names[name]: tensor.to(device, copy=True) for name, tensor in given.items() if name in names}
        written = tensors[names["x"]]
        if "result" in names:
            written = tensors["result"] = torch.empty_like(written)
        try:
            returned = operator(**tensors, **{names["eps"]: _EPS})
            made = returned[0] if isinstance(returned, tuple) else returned
            got = (written if made is None else made).cpu()
        except Exception:  # whatever it is, nothing is known of the operator then
            return None
        added, scaled = residual if "residual" in names else None, weight if "weight" in names else None
        alike = {form: _alike(got, make(x, added, scaled)) for form, make in _forms(added is not None).items()}
    form = max(alike, key=alike.__getitem__)  # the first of equals
    return form if alike[form] >= _ALIKE else None


def _data(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    x, residual = (torch.randn(_ROWS, _COLS, generator=generator).to(dtype) for _ in range(2))
    return x, residual, (torch.rand(_COLS, generator=generator) + 0.5).to(dtype)


def _forms(with_residual: bool) -> dict[Rounding, Callable[..., torch.Tensor]]:
    """Every form, with a function of x, the residual or None, and the weight or None."""

    def form(cast: str, rounding: str) -> Callable[..., torch.Tensor]:
        def norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None) -> torch.Tensor:
            z = x.float() if residual is None else x.float() + residual.float()
            if rounding == "rounded":
                z = z.to(x.dtype).float()
            y = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + _EPS)
            if cast == "before_weight":
                y = y.to(x.dtype).float()
            return (y if weight is None else y * weight.float()).to(x.dtype)

        return norm

    roundings = ("rounded", "exact") if with_residual else ("rounded",)
    return {
        (cast, rounding): form(cast, rounding) for cast in ("before_weight", "after_weight") for rounding in roundings
    }


def _alike(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got == expected).double().mean())
