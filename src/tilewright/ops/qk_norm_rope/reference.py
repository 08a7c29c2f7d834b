"""The definition: RMSNorm of each head, rounded, and then rotary embedding, each by its own definition."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tilewright.ops.qk_norm_rope.call import rope_inputs
from tilewright.ops.rms_norm import call as norm
from tilewright.ops.rms_norm.reference import rms_norm
from tilewright.ops.rope.reference import rotate

if TYPE_CHECKING:
    from tilewright.ops.qk_norm_rope.call import Inputs, Outputs, QkNormRopeCall


def qk_norm_rope(call: QkNormRopeCall, inputs: Inputs, offset: int, outputs: Outputs) -> None:
    """Write ``rope_qk(rms_norm(q, q_weight), rms_norm(k, k_weight))`` into ``outputs``."""
    q, _ = rms_norm(call.q_norm, norm.Inputs(inputs.q, None, inputs.q_weight))
    k, _ = rms_norm(call.k_norm, norm.Inputs(inputs.k, None, inputs.k_weight))
    rotate(call.rotation, rope_inputs(inputs._replace(q=q, k=k)), offset, outputs)
