"""Kernels as operators of PyTorch: ``torch.ops.<namespace>.<name>``, with a fake and a CPU implementation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tilewright.errors import ArgumentError
from tilewright.npu.operator import Operator, define
from tilewright.npu.profiles import DEFAULT_PROFILE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tilewright.npu.kernel import JitFunction

DEFAULT_NAMESPACE = "tilewright_npu"

_libraries: dict[str, Any] = {}
_registered: dict[tuple[str, str], Operator] = {}


def register(
    kernel: JitFunction,
    *,
    outputs: Mapping[str, str] | None = None,
    name: str | None = None,
    namespace: str = DEFAULT_NAMESPACE,
    constexprs: Mapping[str, str | int] | None = None,
    align: Sequence[str] = (),
    host_layout: str | Sequence[int] = (),
    profile: str = DEFAULT_PROFILE,
) -> Operator:
    """Make a kernel an operator of PyTorch.

    The operator takes the kernel's tensors in their order, without the outputs, which it allocates and returns. What
    the kernel loads and stores (a cache) is changed in place, and the operator's schema says so, so that
    ``torch.compile`` may reorder nothing across it. Data may have 16 bits: the kernel sees float32, and what it changed
    is stored in the tensor's own dtype. There are no gradients: a tensor that requires one is refused.

    Args:
        kernel: the kernel.
        outputs: which input each output is like, as ``{"output": "query"}`` (default: the first one that the kernel
            gives the same shape).
        name: the operator's name (default: the kernel's).
        namespace: where it is registered.
        constexprs: how constexprs are computed that no tensor's shape tells, as Python over the operator's tensors:
            ``{"WINDOW": "kv_cache.shape[4]"}``, or their values.
        align: inputs whose last dimension is padded with zeros to a multiple of 64 before the kernel sees them, as the
            device wants it; outputs keep theirs. The kernel must give the same with zeros there: it may multiply
            matrices over that dimension, and not reduce it.
        host_layout: which tensors stay in the host's layout, by position among the operator's arguments: ``"1:2:3"``.
        profile: the compiler's release.

    Returns:
        The operator; it is callable itself, and has what the generated device file needs.

    Raises:
        NpuKernelError: the kernel breaks rules of the profile.
        ArgumentError: outputs or constexprs do not fit the kernel, or another kernel has that name already.

    Example:
        >>> import torch
        >>> from tilewright.npu.kernels import OPERATORS
        >>> OPERATORS["flash_causal_attention_naive_decode"].schema
        '(Tensor query, Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor qk_scale, ... dummy) -> Tensor'
    """
    operator = define(
        kernel,
        name=name,
        outputs=outputs,
        constexprs=constexprs,
        align=align,
        host_layout=host_layout,
        profile=profile,
    )
    for argument, text in (("name", operator.name), ("namespace", namespace)):
        if not text.isidentifier():
            raise ArgumentError("register", argument, f"got {text!r}, expected an identifier")
    key = (namespace, operator.name)
    if key in _registered:
        if _registered[key] == operator:
            return _registered[key]
        raise ArgumentError("register", "name", f"{namespace}::{operator.name} is another kernel's already")
    library = _libraries.get(namespace)
    if library is None:
        library = _libraries[namespace] = torch.library.Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(operator.name + operator.schema)
    library.impl(operator.name, operator, "CPU")
    torch.library.register_fake(f"{namespace}::{operator.name}", operator.fake, lib=library)
    _registered[key] = operator
    return operator
