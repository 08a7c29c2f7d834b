"""What plans the Triton kernels of hyper-connections.

A call that computes mixes takes two launches: the product with the mixing weights (:mod:`.kernels_mix`), then all that
needs it (:mod:`.kernels_finish`); a third before them where many tokens make it pay to split the weights first; and one
more where the streams are made by the ``post`` of the layer before. What few tokens take and what many take is compiled
at the first call for either, so that no later one has to wait.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from tilewright.dispatch.launch import BoundKernel, check_programs
from tilewright.ops.mhc.call import OPERATIONS, RECOMPUTE, Planner, PostCall, PostInputs
from tilewright.ops.mhc.kernels_finish import finish_kernel
from tilewright.ops.mhc.kernels_mix import mix_kernel, pack_kernel
from tilewright.ops.mhc.kernels_post import plan_post
from tilewright.ops.mhc.launch import (
    BLOCK_H,
    EIGHTHS,
    MIX_TOKENS,
    PACK_BLOCK,
    FinishBlock,
    MixBlock,
    finish_block,
    is_few,
    mix_block,
    padded,
    padded_mixes,
)
from tilewright.platforms import facts

if TYPE_CHECKING:
    from tilewright.ops.mhc.call import (
        CollapseCall,
        CollapseInputs,
        PostGradInputs,
        PreCall,
        PreGradients,
        PreGradInputs,
        PreInputs,
        PreOutputs,
        Runner,
        Tensors,
    )
    from tilewright.platforms import DeviceFacts


def plan_pre(call: PreCall, inputs: PreInputs, outputs: PreOutputs) -> Runner:
    """Prepare the launches for tensors of this metadata; the tensors themselves are not kept."""
    if call.n_tokens == 0:
        return lambda tensors: None
    device = facts(inputs.residual.device)
    post = None
    if call.kind == "post_pre":
        x, post_mix, comb_mix, streams = inputs.x, inputs.post_mix, inputs.comb_mix, outputs.residual
        assert x is not None
        assert post_mix is not None
        assert comb_mix is not None
        assert streams is not None
        sizes = PostCall(call.n_tokens, call.n_streams, call.n_cols, call.dtype)
        post = plan_post(sizes, PostInputs(x, inputs.residual, post_mix, comb_mix), (streams,))
        inputs = inputs._replace(residual=streams)
    launches = _Launches.of(call, inputs, device, few=is_few(call.n_tokens, device))
    other = _Launches.of(call, inputs, device, few=not is_few(call.n_tokens, device)) if device.kind != "cpu" else None
    stored = outputs.mixes is not None

    def run(tensors: Tensors) -> None:
        nonlocal other
        residual, fn, scale, base, norm_weight, given, x, post_mix, comb_mix, *results = tensors
        assert residual is not None
        y, pre, post_out, comb_out, residual_out, mixes, rstd, scalings = results
        if not stored:
            mixes = residual.new_empty((call.n_tokens, call.n_mixes), dtype=torch.float32)
            rstd = residual.new_empty((call.n_tokens,), dtype=torch.float32)
        if post is not None:
            post((x, residual, post_mix, comb_mix, residual_out))
            residual, residual_out = residual_out, None
        given = given if call.kind == "delayed" else None
        rest = (scale, base, given, norm_weight, y, pre, post_out, comb_out, residual_out, mixes, rstd, scalings)
        pending, other = other, None  # another thread may come along
        if pending is not None:
            pending.run(residual, fn, rest, compile_only=True)
        launches.run(residual, fn, rest)

    return run


class _Launches(NamedTuple):
    """The launches from streams to results."""

    call: PreCall
    block: MixBlock
    pack: BoundKernel | None
    mix: BoundKernel
    finish: BoundKernel

    @classmethod
    def of(cls, call: PreCall, inputs: PreInputs, device: DeviceFacts, *, few: bool) -> _Launches:
        """Those that few tokens take, or many."""
        block = mix_block(
            call.n_tokens, call.n_cols, inputs.residual.shape[1], call.n_mixes, call.dtype.itemsize, device,
            few=few, invariant=call.options.batch_invariant,
        )  # fmt: skip
        overlaps = few and device.dependent_launch
        return cls(
            call,
            block,
            _plan_pack(call, inputs, block) if block.packed else None,
            _plan_mix(call, inputs, block, overlaps=overlaps),
            _plan_finish(call, inputs, block, device, few=few, overlaps=overlaps),
        )

    def run(self, residual: Any, fn: Any, rest: Tensors, *, compile_only: bool = False) -> None:
        """Launch, or only compile.

        Args:
            residual: the streams, [T, S, H].
            fn: the weights.
            rest: what the last kernel takes after streams and partial sums.
            compile_only: launch nothing.
        """
        call, block = self.call, self.block
        partial = residual.new_empty((block.n_splits, call.n_tokens, block.mixes), dtype=torch.float32)
        kernels: list[tuple[BoundKernel, Tensors]] = []
        if self.pack is not None:
            packed = residual.new_empty((2, block.mixes, residual.shape[1], padded(call.n_cols)), dtype=torch.bfloat16)
            kernels.append((self.pack, (fn, packed)))
            fn = packed
        kernels += [(self.mix, (residual, fn, partial)), (self.finish, (residual, partial, *rest))]
        for kernel, tensors in kernels:
            if compile_only:
                kernel.compile(tensors)
            else:
                kernel(tensors)


def _plan_pack(call: PreCall, inputs: PreInputs, block: MixBlock) -> BoundKernel:
    n_sources, width = inputs.residual.shape[1], padded(call.n_cols)
    programs = block.mixes * -(-n_sources * width // PACK_BLOCK)
    tail = (n_sources, call.n_cols, width, call.n_mixes, block.mixes, PACK_BLOCK)
    return BoundKernel(pack_kernel, programs, inputs.fn.device, tail, {"num_warps": 4})


def _plan_mix(call: PreCall, inputs: PreInputs, block: MixBlock, *, overlaps: bool) -> BoundKernel:
    residual = inputs.residual
    tail = (
        *residual.stride()[:2],
        call.n_tokens,
        block.n_splits,
        residual.shape[1],
        call.n_cols,
        padded(call.n_cols),
        call.n_mixes,
        block.mixes,
        block.packed,
        1 if call.dtype == torch.float32 else 2,
        block.tokens,
        BLOCK_H,
        EIGHTHS,
        block.stages,
        overlaps,
    )
    programs = check_programs(block.programs(call.n_tokens), OPERATIONS[call.kind], "residual")
    return BoundKernel(mix_kernel, programs, residual.device, tail, block.options())


def _plan_finish(
    call: PreCall, inputs: PreInputs, mix: MixBlock, device: DeviceFacts, *, few: bool, overlaps: bool
) -> BoundKernel:
    options, residual = call.options, inputs.residual
    n_sources = residual.shape[1]
    block = finish_block(call.n_tokens, call.n_cols, n_sources, mix.mixes, call.dtype.itemsize, device, few=few)
    constants = (
        call.n_mixes,
        mix.mixes,
        float(options.rms_eps),
        float(options.pre_eps),
        float(options.sinkhorn_eps),
        float(options.post_mult),
        1 if call.kind == "head" else options.sinkhorn_iters,
        float(options.norm_eps),
        call.collapses_first,
    )
    # Streams that the kernel before the product has written are there: the product has waited for it.
    wait = "partials" if overlaps else "none"
    n_mix_programs = -(-call.n_tokens // block.mix_tokens_each)
    return _bound_finish(
        block, residual.device, residual.stride()[:2], (call.n_tokens, mix.n_splits, n_mix_programs),
        (call.n_streams, n_sources, call.n_cols), constants, wait, OPERATIONS[call.kind],
    )  # fmt: skip


def _bound_finish(
    block: FinishBlock,
    place: torch.device,
    strides: tuple[int, ...],
    counts: tuple[int, int, int],
    sizes: tuple[int, int, int],
    constants: tuple[Any, ...],
    wait: str,
    operation: str,
) -> BoundKernel:
    n_tokens, _, n_mix_programs = counts
    rows = block.rows
    tail = (
        *strides, *counts, block.mix_tokens_each, *sizes, *constants,
        MIX_TOKENS, block.mix_block, block.splits, rows.rows, rows.chunk, block.resident, wait,
    )  # fmt: skip
    programs = check_programs(n_mix_programs + rows.programs(n_tokens), operation, "residual")
    options = block.options(facts(place))
    if wait != "none":
        options["launch_pdl"] = True
    return BoundKernel(finish_kernel, programs, place, tail, options)


def plan_collapse(call: CollapseCall, inputs: CollapseInputs, outputs: Tensors) -> Runner:
    """Prepare the launch of a collapse alone: the same kernel without programs for gates."""
    if call.n_tokens == 0:
        return lambda tensors: None
    residual = inputs.residual
    device = facts(residual.device)
    n, mixes = call.n_streams, padded_mixes(call.n_streams)
    block = finish_block(call.n_tokens, call.n_cols, n, mixes, call.dtype.itemsize, device, few=False)
    constants = (n, mixes, 0.0, 0.0, 0.0, 0.0, 1, float(call.norm_eps), False)
    kernel = _bound_finish(
        block, residual.device, residual.stride()[:2], (call.n_tokens, 0, 0), (n, n, call.n_cols), constants,
        "none", RECOMPUTE,
    )  # fmt: skip

    def run(tensors: Tensors) -> None:
        residual, pre_mix, norm_weight, y = tensors
        kernel((residual, None, None, None, pre_mix, norm_weight, y, *(None,) * 7))

    return run


def _plan_pre_backward(call: PreCall, inputs: PreGradInputs, outputs: PreGradients) -> Runner:
    from tilewright.ops.mhc.kernels_backward import plan_pre_backward  # at its first use

    return plan_pre_backward(call, inputs, outputs)


def _plan_post_backward(call: PostCall, inputs: PostGradInputs, outputs: Tensors) -> Runner:
    from tilewright.ops.mhc.kernels_post_backward import plan_post_backward  # at its first use

    return plan_post_backward(call, inputs, outputs)


PLANNER = Planner(plan_pre, _plan_pre_backward, plan_post, _plan_post_backward, plan_collapse)
