"""SageAttention without compiling anything: on the GPU, on the CPU, or by the daemon sageattnd.

    from sageattnd import sageattn
    o = sageattn(q, k, v, is_causal=True)      # torch.Tensor or numpy.ndarray, [B, H, N, D]

sageattn, sageattn_varlen     attention; the calls of the package sageattention
scaled_dot_product_attention  PyTorch's, by these kernels; `with sdpa():` puts it in F's place
fallbacks                     what was left to PyTorch
check_errors                  did jobs fail that a daemon computes?
set_mode                      in this process or by a daemon
integrations, shim            for transformers, diffusers, and who imports sageattention
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import integrations
from ._api import (sageattn, sageattn_qk_int8_pv_fp8_cuda, sageattn_qk_int8_pv_fp8_cuda_sm90,
                   sageattn_qk_int8_pv_fp16_cuda, sageattn_qk_int8_pv_fp16_triton,
                   sageattn_varlen, set_mode)
from ._client import close
from ._native import SageError

__version__ = "0.1.0"
__all__ = ["SageError", "check_errors", "close", "fallbacks", "integrations", "sageattn",
           "sageattn_qk_int8_pv_fp16_cuda", "sageattn_qk_int8_pv_fp16_triton",
           "sageattn_qk_int8_pv_fp8_cuda", "sageattn_qk_int8_pv_fp8_cuda_sm90", "sageattn_varlen",
           "scaled_dot_product_attention", "sdpa", "set_mode"]

if TYPE_CHECKING:
    from ._daemon import check_errors as check_errors
    from ._sdpa import fallbacks as fallbacks
    from ._sdpa import scaled_dot_product_attention as scaled_dot_product_attention
    from ._sdpa import sdpa as sdpa


def __getattr__(name: str) -> Any:
    """What needs PyTorch is imported when it is first asked for: numpy does without."""
    if name == "check_errors":
        from ._daemon import check_errors
        return check_errors
    if name in ("fallbacks", "scaled_dot_product_attention", "sdpa"):
        import importlib
        return getattr(importlib.import_module("._sdpa", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
