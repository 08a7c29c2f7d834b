"""tilewright: fused Triton kernels for large language models, everywhere, explained.

Importing this package imports nothing else: neither torch nor Triton, no device is touched, no environment variable
read. Every name below is loaded at its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilewright import fusion, nn
    from tilewright.dispatch import use
    from tilewright.fusion.api import compile
    from tilewright.ops import explain, register
    from tilewright.ops.mhc.api import (
        mhc_expand,
        mhc_head,
        mhc_post,
        mhc_post_pre,
        mhc_pre,
        mhc_pre_broadcast,
        mhc_pre_delayed,
        mhc_recompute_layers,
    )
    from tilewright.ops.qk_norm_rope.api import qk_norm_rope
    from tilewright.ops.quant_fp8.api import (
        add_rms_norm_quant_fp8,
        dequant_fp8,
        quant_fp8,
        rms_norm_quant_fp8,
        rope_quant_fp8,
        scaled_mm_fp8,
        silu_mul_quant_fp8,
    )
    from tilewright.ops.quant_fp8.format import QuantFormat, QuantPolicy
    from tilewright.ops.rms_norm.api import add_rms_norm, rms_norm
    from tilewright.ops.rope.api import rope, rope_from_angles, rope_qk
    from tilewright.ops.rope.table import RopeTable, rope_table

__version__ = "0.1.0"

_HOME = {
    "add_rms_norm": "tilewright.ops.rms_norm.api",
    "add_rms_norm_quant_fp8": "tilewright.ops.quant_fp8.api",
    "compile": "tilewright.fusion.api",
    "dequant_fp8": "tilewright.ops.quant_fp8.api",
    "explain": "tilewright.ops",
    "mhc_expand": "tilewright.ops.mhc.api",
    "mhc_head": "tilewright.ops.mhc.api",
    "mhc_post": "tilewright.ops.mhc.api",
    "mhc_post_pre": "tilewright.ops.mhc.api",
    "mhc_pre": "tilewright.ops.mhc.api",
    "mhc_pre_broadcast": "tilewright.ops.mhc.api",
    "mhc_pre_delayed": "tilewright.ops.mhc.api",
    "mhc_recompute_layers": "tilewright.ops.mhc.api",
    "qk_norm_rope": "tilewright.ops.qk_norm_rope.api",
    "quant_fp8": "tilewright.ops.quant_fp8.api",
    "QuantFormat": "tilewright.ops.quant_fp8.format",
    "QuantPolicy": "tilewright.ops.quant_fp8.format",
    "register": "tilewright.ops",
    "rms_norm": "tilewright.ops.rms_norm.api",
    "rms_norm_quant_fp8": "tilewright.ops.quant_fp8.api",
    "rope": "tilewright.ops.rope.api",
    "rope_from_angles": "tilewright.ops.rope.api",
    "rope_qk": "tilewright.ops.rope.api",
    "rope_table": "tilewright.ops.rope.table",
    "RopeTable": "tilewright.ops.rope.table",
    "scaled_mm_fp8": "tilewright.ops.quant_fp8.api",
    "rope_quant_fp8": "tilewright.ops.quant_fp8.api",
    "silu_mul_quant_fp8": "tilewright.ops.quant_fp8.api",
    "use": "tilewright.dispatch",
}
_MODULES = ("fusion", "nn")

__all__ = [
    "QuantFormat",
    "QuantPolicy",
    "RopeTable",
    "__version__",
    "add_rms_norm",
    "add_rms_norm_quant_fp8",
    "compile",
    "dequant_fp8",
    "explain",
    "fusion",
    "mhc_expand",
    "mhc_head",
    "mhc_post",
    "mhc_post_pre",
    "mhc_pre",
    "mhc_pre_broadcast",
    "mhc_pre_delayed",
    "mhc_recompute_layers",
    "nn",
    "qk_norm_rope",
    "quant_fp8",
    "register",
    "rms_norm",
    "rms_norm_quant_fp8",
    "rope",
    "rope_from_angles",
    "rope_qk",
    "rope_quant_fp8",
    "rope_table",
    "scaled_mm_fp8",
    "silu_mul_quant_fp8",
    "use",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'tilewright' has no attribute '{name}'")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
