"""For vLLM: graph fusion of its operators, and hyper-connections under its names and argument orders.

:func:`register_fusion` tells graph fusion what vLLM's own operators mean, and :func:`fusion_pass` makes a pass that
vLLM takes::

    from tilewright.integrations import vllm

    vllm.register_fusion()
    model = torch.compile(model, options=tilewright.fusion.options())  # or tilewright.compile(model)

The rest are hyper-connections, as functions and as operators.

vLLM calls these operations ``torch.ops.vllm.mhc_pre_tilelang`` and the like. :func:`register` adds operators with the
same arguments, defaults and results beside them, so that an engine switches by name::

    from tilewright.integrations import vllm

    vllm.register()
    post_mix, comb_mix, layer_input = torch.ops.vllm.mhc_pre_tilewright(residual, fn, ...)  # was mhc_pre_tilelang

The functions need no vLLM, and nothing here imports it. What differs from vLLM:

- ``n_splits`` and ``tile_n`` are accepted and ignored, as they are there: vLLM replaces them before their first use.
- Any number of streams from 1 to 8, any hidden size, any leading dimensions, no tokens, and streams in float16 and
  float32; results have the dtype of the streams, which in vLLM is bfloat16.
- ``norm_weight`` keeps its dtype; vLLM rounds it to bfloat16. ``norm_eps`` is not looked at without it.
- The mixes of :func:`mhc_fused_post_pre` are those of the streams that it returns. vLLM computes them from the streams
  before their rounding where there are at most 16 tokens.
- :func:`mhc_pre_broadcast` is an operator too, and ``norm_weight`` and ``fn_broadcast`` may be left out.

The operators are for inference: where a gradient would be recorded they raise. The functions differentiate as those
that they call.
"""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Any

import torch

import tilewright
from tilewright.errors import ArgumentError
from tilewright.ops.mhc.call import MAX_STREAMS

if TYPE_CHECKING:
    from collections.abc import Callable

    from tilewright.fusion.api import Numerics

    Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def mhc_pre(
    residual: torch.Tensor,
    fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    rms_eps: float,
    hc_pre_eps: float,
    hc_sinkhorn_eps: float,
    hc_post_mult_value: float,
    sinkhorn_repeat: int,
    n_splits: int = 1,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
) -> Three:
    """:func:`tilewright.mhc_pre` as vLLM's ``mhc_pre_tilelang``.

    Args:
        residual: the streams, ``[..., n, H]``.
        fn: ``[n * (n + 2), n * H]`` float32.
        hc_scale: ``[3]`` float32.
        hc_base: ``[n * (n + 2)]`` float32.
        rms_eps: of the streams' norm.
        hc_pre_eps: ``pre_eps``.
        hc_sinkhorn_eps: ``sinkhorn_eps``.
        hc_post_mult_value: ``post_mult``.
        sinkhorn_repeat: ``sinkhorn_iters``.
        n_splits: ignored.
        norm_weight: of the norm of the layer's input, ``[H]``; None for no norm.
        norm_eps: of that norm.

    Returns:
        ``(post_mix [..., n, 1], comb_mix [..., n, n], layer_input [..., H])``, the mixes float32.

    Example:
        >>> import torch
        >>> from tilewright.integrations import vllm
        >>> residual, fn = torch.ones(3, 2, 8), torch.zeros(8, 16)
        >>> post, comb, y = vllm.mhc_pre(residual, fn, torch.ones(3), torch.zeros(8), 1e-6, 0.0, 1e-6, 2.0, 20)
        >>> post.shape, comb.shape, y[0, 0]
        (torch.Size([3, 2, 1]), torch.Size([3, 2, 2]), tensor(1.))
    """
    options = _options(rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat)
    results = tilewright.mhc_pre(residual, fn, hc_scale, hc_base, **options, **_norm(norm_weight, norm_eps))
    return results.post_mix, results.comb_mix, results.layer_input


def mhc_post(
    x: torch.Tensor, residual: torch.Tensor, post_layer_mix: torch.Tensor, comb_res_mix: torch.Tensor
) -> torch.Tensor:
    """:func:`tilewright.mhc_post` as vLLM's ``mhc_post_tilelang``.

    Args:
        x: the layer's output, ``[..., H]``.
        residual: the streams, ``[..., n, H]``.
        post_layer_mix: ``[..., n, 1]`` or ``[..., n]`` float32.
        comb_res_mix: ``[..., n, n]`` float32.

    Returns:
        The new streams, ``[..., n, H]``.
    """
    return tilewright.mhc_post(x, residual, post_layer_mix, comb_res_mix)


def mhc_fused_post_pre(
    x: torch.Tensor,
    residual: torch.Tensor,
    post_layer_mix: torch.Tensor,
    comb_res_mix: torch.Tensor,
    fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    rms_eps: float,
    hc_pre_eps: float,
    hc_sinkhorn_eps: float,
    hc_post_mult_value: float,
    sinkhorn_repeat: int,
    n_splits: int = 1,
    tile_n: int = 1,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
) -> Four:
    """:func:`tilewright.mhc_post_pre` as vLLM's ``mhc_fused_post_pre_tilelang``.

    Args:
        x: as in :func:`mhc_post`.
        residual: as in :func:`mhc_post`.
        post_layer_mix: as in :func:`mhc_post`.
        comb_res_mix: as in :func:`mhc_post`.
        fn: the next layer's, as in :func:`mhc_pre`.
        hc_scale: as in :func:`mhc_pre`.
        hc_base: as in :func:`mhc_pre`.
        rms_eps: as in :func:`mhc_pre`.
        hc_pre_eps: as in :func:`mhc_pre`.
        hc_sinkhorn_eps: as in :func:`mhc_pre`.
        hc_post_mult_value: as in :func:`mhc_pre`.
        sinkhorn_repeat: as in :func:`mhc_pre`.
        n_splits: ignored.
        tile_n: ignored.
        norm_weight: as in :func:`mhc_pre`.
        norm_eps: as in :func:`mhc_pre`.

    Returns:
        ``(residual, post_mix, comb_mix, layer_input)``, the new streams first.
    """
    options = _options(rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat)
    options |= _norm(norm_weight, norm_eps)
    results = tilewright.mhc_post_pre(
        x, residual, post_layer_mix, comb_res_mix, fn, hc_scale, hc_base, return_pre_mix=False, **options
    )
    return results.residual, results.post_mix, results.comb_mix, results.layer_input


def mhc_pre_delayed(
    residual: torch.Tensor,
    fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    rms_eps: float,
    hc_pre_eps: float,
    hc_sinkhorn_eps: float,
    hc_post_mult_value: float,
    sinkhorn_repeat: int,
    pre_mix: torch.Tensor | None = None,
    x: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
) -> Four:
    """:func:`tilewright.mhc_pre_delayed` as vLLM's ``mhc_pre_delayed_tilelang``.

    Args:
        residual: as in :func:`mhc_pre`.
        fn: as in :func:`mhc_pre`; with ``x`` ``[n * (n + 2), H]``.
        hc_scale: as in :func:`mhc_pre`.
        hc_base: as in :func:`mhc_pre`.
        rms_eps: as in :func:`mhc_pre`.
        hc_pre_eps: as in :func:`mhc_pre`.
        hc_sinkhorn_eps: as in :func:`mhc_pre`.
        hc_post_mult_value: as in :func:`mhc_pre`.
        sinkhorn_repeat: as in :func:`mhc_pre`.
        pre_mix: what the streams are collapsed with, ``[..., n]`` float32; None for the first stream.
        x: ``[..., H]``, of which all streams are copies.
        norm_weight: as in :func:`mhc_pre`.
        norm_eps: as in :func:`mhc_pre`.

    Returns:
        ``(post_mix, comb_mix, layer_input, pre_mix)``, the last ``[..., n]``, for the next layer.
    """
    options = _options(rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat)
    norm = _norm(norm_weight, norm_eps)
    results = tilewright.mhc_pre_delayed(residual, fn, hc_scale, hc_base, pre_mix=pre_mix, x=x, **options, **norm)
    return results.post_mix, results.comb_mix, results.layer_input, results.pre_mix


def mhc_pre_broadcast(
    residual: torch.Tensor,
    fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    rms_eps: float,
    hc_pre_eps: float,
    hc_sinkhorn_eps: float,
    hc_post_mult_value: float,
    sinkhorn_repeat: int,
    n_splits: int = 1,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    fn_broadcast: torch.Tensor | None = None,
) -> Four:
    """:func:`tilewright.mhc_pre_broadcast` as vLLM's ``mhc_pre_broadcast_tilelang``.

    Args:
        residual: ``[..., H]``, of which all streams are copies.
        fn: ``[n * (n + 2), n * H]`` float32; not read where ``fn_broadcast`` is given.
        hc_scale: as in :func:`mhc_pre`.
        hc_base: as in :func:`mhc_pre`.
        rms_eps: as in :func:`mhc_pre`.
        hc_pre_eps: as in :func:`mhc_pre`.
        hc_sinkhorn_eps: as in :func:`mhc_pre`.
        hc_post_mult_value: as in :func:`mhc_pre`.
        sinkhorn_repeat: as in :func:`mhc_pre`.
        n_splits: ignored.
        norm_weight: as in :func:`mhc_pre`.
        norm_eps: as in :func:`mhc_pre`.
        fn_broadcast: the sum of ``fn`` over the streams, ``[n * (n + 2), H]`` float32; None to compute it in this call.

    Returns:
        ``(residual, post_mix, comb_mix, layer_input)``, the streams ``[..., n, H]`` first.
    """
    options = _options(rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value, sinkhorn_repeat)
    if fn_broadcast is None:
        fn_broadcast = fn.reshape(fn.shape[0], -1, residual.shape[-1]).sum(1)
    norm = _norm(norm_weight, norm_eps)
    results = tilewright.mhc_pre_broadcast(residual, fn_broadcast, hc_scale, hc_base, **options, **norm)
    return results.residual, results.post_mix, results.comb_mix, results.layer_input


def hc_head(
    hs_flat: torch.Tensor,
    fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    rms_eps: float,
    hc_eps: float,
) -> torch.Tensor:
    """:func:`tilewright.mhc_head` as vLLM's ``hc_head_fused_kernel_tilelang``.

    Args:
        hs_flat: the streams, ``[..., n, H]``.
        fn: ``[n, n * H]`` float32.
        hc_scale: ``[1]`` float32.
        hc_base: ``[n]`` float32.
        rms_eps: of the streams' norm.
        hc_eps: ``eps``.

    Returns:
        ``[..., H]``.
    """
    return tilewright.mhc_head(hs_flat, fn, hc_scale, hc_base, rms_eps=rms_eps, eps=hc_eps)


def hc_head_out(
    hs_flat: torch.Tensor,
    fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    out: torch.Tensor,
    hidden_size: int,
    rms_eps: float,
    hc_eps: float,
    hc_mult: int,
) -> None:
    """The same as vLLM's ``hc_head_triton``: the result is copied into ``out``, ``[..., H]``.

    Args:
        hs_flat: as in :func:`hc_head`.
        fn: as in :func:`hc_head`.
        hc_scale: as in :func:`hc_head`.
        hc_base: as in :func:`hc_head`.
        out: where the result goes.
        hidden_size: ignored; it is the streams'.
        rms_eps: as in :func:`hc_head`.
        hc_eps: as in :func:`hc_head`.
        hc_mult: ignored; it is the streams'.

    Raises:
        ArgumentError: ``out`` has another shape.
    """
    if out.shape != (*hs_flat.shape[:-2], hs_flat.shape[-1]):
        expected = [*hs_flat.shape[:-2], hs_flat.shape[-1]]
        raise ArgumentError("hc_head_out", "out", f"got shape {tuple(out.shape)}; expected {expected}")
    out.copy_(hc_head(hs_flat, fn, hc_scale, hc_base, rms_eps, hc_eps))


def hc_collapse(x: torch.Tensor, pre_mix: torch.Tensor) -> torch.Tensor:
    """The sum of streams times their mix, rounded once, as vLLM's ``hc_collapse_triton``.

    Args:
        x: the streams, ``[..., n, H]``.
        pre_mix: ``[..., n]`` float32.

    Returns:
        ``[..., H]``. Not differentiable.
    """
    # One layer, whose output is not given: its other mixes are not read.
    comb_mix = pre_mix.unsqueeze(-1).expand(*pre_mix.shape, pre_mix.shape[-1])
    return tilewright.mhc_recompute_layers(x, [], [pre_mix], [pre_mix], [comb_mix]).layer_inputs[0]


def _options(
    rms_eps: float, pre_eps: float, sinkhorn_eps: float, post_mult: float, sinkhorn_iters: int
) -> dict[str, Any]:
    return {
        "rms_eps": rms_eps,
        "pre_eps": pre_eps,
        "sinkhorn_eps": sinkhorn_eps,
        "post_mult": post_mult,
        "sinkhorn_iters": sinkhorn_iters,
    }


def _norm(weight: torch.Tensor | None, eps: float) -> dict[str, Any]:
    """VLLM's layers pass an eps of zero where there is no norm."""
    return {} if weight is None else {"norm_weight": weight, "norm_eps": eps}


# Results for torch.compile, from metadata alone.


def _mixes(like: torch.Tensor, lead: tuple[int, ...], n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        like.new_empty((*lead, n, 1), dtype=torch.float32),
        like.new_empty((*lead, n, n), dtype=torch.float32),
    )


def _fake_mhc_pre(residual: torch.Tensor, *_: Any, **__: Any) -> Three:
    *lead, n, h = residual.shape
    return *_mixes(residual, tuple(lead), n), residual.new_empty((*lead, h))


def _fake_mhc_post(x: torch.Tensor, residual: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return residual.new_empty(residual.shape)


def _fake_mhc_fused_post_pre(x: torch.Tensor, residual: torch.Tensor, *_: Any, **__: Any) -> Four:
    return residual.new_empty(residual.shape), *_fake_mhc_pre(residual)


def _fake_mhc_pre_delayed(residual: torch.Tensor, *_: Any, **__: Any) -> Four:
    return *_fake_mhc_pre(residual), residual.new_empty(residual.shape[:-1], dtype=torch.float32)


def _fake_mhc_pre_broadcast(residual: torch.Tensor, fn: torch.Tensor, *_: Any, **__: Any) -> Four:
    *lead, h = residual.shape
    n = next(n for n in range(1, MAX_STREAMS + 1) if n * (n + 2) == fn.shape[0])  # as many rows as `fn_broadcast` has
    streams = residual.new_empty((*lead, n, h))
    return streams, *_fake_mhc_pre(streams)


def _fake_collapse(streams: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return streams.new_empty((*streams.shape[:-2], streams.shape[-1]))


def _fake_nothing(*_: Any, **__: Any) -> None:
    return None


_PRE = (
    "Tensor fn, Tensor hc_scale, Tensor hc_base, float rms_eps, float hc_pre_eps, float hc_sinkhorn_eps, "
    "float hc_post_mult_value, SymInt sinkhorn_repeat"
)
_NORM = "Tensor? norm_weight=None, float norm_eps=1e-06"
_POST = "Tensor x, Tensor residual, Tensor post_layer_mix, Tensor comb_res_mix"
_HEAD = "Tensor hs_flat, Tensor fn, Tensor hc_scale, Tensor hc_base"
_THREE, _FOUR = "(Tensor, Tensor, Tensor)", "(Tensor, Tensor, Tensor, Tensor)"

OPERATORS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "mhc_pre": (f"(Tensor residual, {_PRE}, SymInt n_splits=1, {_NORM}) -> {_THREE}", mhc_pre, _fake_mhc_pre),
    "mhc_post": (f"({_POST}) -> Tensor", mhc_post, _fake_mhc_post),
    "mhc_fused_post_pre": (
        f"({_POST}, {_PRE}, SymInt n_splits=1, SymInt tile_n=1, {_NORM}) -> {_FOUR}",
        mhc_fused_post_pre,
        _fake_mhc_fused_post_pre,
    ),
    "mhc_pre_delayed": (
        f"(Tensor residual, {_PRE}, Tensor? pre_mix=None, Tensor? x=None, {_NORM}) -> {_FOUR}",
        mhc_pre_delayed,
        _fake_mhc_pre_delayed,
    ),
    "mhc_pre_broadcast": (
        f"(Tensor residual, {_PRE}, SymInt n_splits=1, {_NORM}, Tensor? fn_broadcast=None) -> {_FOUR}",
        mhc_pre_broadcast,
        _fake_mhc_pre_broadcast,
    ),
    "hc_head": (f"({_HEAD}, float rms_eps, float hc_eps) -> Tensor", hc_head, _fake_collapse),
    "hc_head_out": (
        f"({_HEAD}, Tensor(a!) out, SymInt hidden_size, float rms_eps, float hc_eps, SymInt hc_mult) -> ()",
        hc_head_out,
        _fake_nothing,
    ),
    "hc_collapse": ("(Tensor x, Tensor pre_mix) -> Tensor", hc_collapse, _fake_collapse),
}
"""Each operator's schema without its name, what computes it, and its fake."""

_LIBRARIES: dict[tuple[str, str], Any] = {}
"""What has been registered. An operator lives as long as its library."""

_REGISTERING = Lock()


def register(namespace: str = "vllm", suffix: str = "_tilewright") -> tuple[str, ...]:
    """Register the functions of this module as operators of torch; a second time, nothing happens.

    Args:
        namespace: where they go: ``torch.ops.<namespace>``.
        suffix: what follows each name: ``"_tilewright"`` makes ``mhc_pre`` ``mhc_pre_tilewright``.

    Returns:
        Their full names, such as ``"vllm::mhc_pre_tilewright"``.

    Raises:
        ArgumentError: there is an operator of such a name already; then none is registered.

    Example:
        >>> from tilewright.integrations import vllm
        >>> vllm.register()[0]
        'vllm::mhc_pre_tilewright'
    """
    names = tuple(f"{namespace}::{name}{suffix}" for name in OPERATORS)
    with _REGISTERING:
        if (namespace, suffix) in _LIBRARIES:
            return names
        for name in OPERATORS:
            if hasattr(getattr(torch.ops, namespace), name + suffix):
                raise ArgumentError("register", "suffix", f"torch.ops.{namespace}.{name}{suffix} exists already")
        library: Any = torch.library.Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
        for name, (schema, function, fake) in OPERATORS.items():
            full = name + suffix
            library.define(full + schema)
            library.impl(full, function, "CompositeExplicitAutograd")
            torch.library.register_fake(f"{namespace}::{full}", fake, lib=library)
            library.impl(full, _no_gradient(getattr(getattr(torch.ops, namespace), full).default), "Autograd")
        _LIBRARIES[namespace, suffix] = library
    return names


def _no_gradient(operator: Any) -> Callable[..., Any]:
    """The operators' autograd kernel: nothing to record, or a clear refusal."""
    names = [argument.name for argument in operator._schema.arguments]

    def run(*args: Any) -> Any:
        for name, value in zip(names, args, strict=False):
            if torch.is_grad_enabled() and isinstance(value, torch.Tensor) and value.requires_grad:
                message = "requires a gradient, but the operator has none; call the function, or use torch.no_grad()"
                raise ArgumentError(str(operator), name, message)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    return run


def register_fusion() -> None:
    """Tell graph fusion what vLLM's own operators mean; a second time, nothing happens.

    From then on rules see ``torch.ops.vllm_ir.*``, ``torch.ops._C.*`` inside ``auto_functionalized`` of either kind,
    and those of ``torch.ops.vllm.*`` that quantise or normalise: norms alone and of a sum, gated SiLU, and quantisation
    to FP8 by a given scale, per token and in groups. What a call does that no public function does is in the report, as
    a refusal with its reason. Nothing is imported from vLLM, which need not be installed.

    ``tilewright.fusion.remove_adapter("vllm")`` takes it back.

    Raises:
        ArgumentError: there is another adapter called "vllm".

    Example:
        >>> import tilewright.fusion
        >>> from tilewright.integrations import vllm
        >>> vllm.register_fusion()
        >>> tilewright.fusion.remove_adapter("vllm")
    """
    from tilewright.integrations.vllm_fusion.register import register

    register()


def fusion_pass(*, verify: bool = False, numerics: Numerics = "strict") -> Any:
    """Graph fusion as a pass for vLLM's own compilation, with :func:`register_fusion` done.

    vLLM wants an ``InductorPass`` of its own in ``inductor_compile_config["post_grad_custom_post_pass"]`` and runs it
    behind its own passes, before it lowers ``vllm_ir`` (``vllm/compilation/backends.py``, ``configure_post_pass``;
    ``vllm/compilation/passes/pass_manager.py``)::

        from tilewright.integrations.vllm import fusion_pass

        config = {"inductor_compile_config": {"post_grad_custom_post_pass": fusion_pass()}}
        config["pass_config"] = {"fuse_norm_quant": False, "fuse_act_quant": False}  # which would come first
        llm = vllm.LLM(model, compilation_config=config)

    Where vLLM compiles in another process the pass is made anew there, and its report is there as well.

    Args:
        verify: as in :func:`tilewright.compile`.
        numerics: as in :func:`tilewright.compile`.

    Returns:
        The pass; ``tilewright.fusion.report_of({"post_grad_custom_post_pass": it})`` is its report.

    Raises:
        ArgumentError: an option that is not known.
        MissingDependencyError: vLLM's ``InductorPass`` cannot be imported.
    """
    from tilewright.integrations.vllm_fusion.register import fusion_pass as make

    return make(verify=verify, numerics=numerics)
