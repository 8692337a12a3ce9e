"""What people call: the functions of the sageattention package, and what they mean here."""
from __future__ import annotations

import operator
import os
from typing import Any, Optional, Sequence, Tuple, TypeVar, Union

from . import _native
from ._native import Options

try:
    from numpy import ndarray
except ImportError:  # PyTorch does without
    ndarray = ()

T = TypeVar("T")  # torch.Tensor or numpy.ndarray

MODES = ("auto", "inproc", "daemon")
NO_ARRAYS = (type(None), list, tuple, int, float)
GRANULARITIES = ("per_thread", "per_warp")  # ours are finer: 16 keys and one row of q


def _one_of(field: str, value: Any, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{field}: {value!r}: must be one of {', '.join(map(repr, allowed))}")


def default_mode() -> str:
    """$SAGEATTND_RUN, else "auto"."""
    mode = os.environ.get("SAGEATTND_RUN") or "auto"
    _one_of("SAGEATTND_RUN", mode, MODES)
    return mode


_mode = default_mode()


def set_mode(mode: str) -> None:
    """Where calls compute that do not say: "auto", "inproc" or "daemon"; see sageattn()."""
    global _mode
    _one_of("mode", mode, MODES)
    _mode = mode


def _check_dimensions(q, k, v, layout: str) -> None:
    for field, t in (("q", q), ("k", k), ("v", v)):
        if isinstance(t, NO_ARRAYS):
            raise TypeError(f"{field}: {type(t).__name__}: must be a tensor or numpy.ndarray")
        if len(t.shape) != len(layout if layout == "THD" else "BHND"):
            raise ValueError(f"{field}: shape {tuple(t.shape)}: must have "
                             f"{'3 dimensions' if layout == 'THD' else '4 dimensions, ' + layout}")
        if t.shape[-1] != q.shape[-1]:
            raise ValueError(f"{field}: shape {tuple(t.shape)}: D must be {q.shape[-1]}, like q's")


def _attention(q, k, v, layout, is_causal, sm_scale, return_lse, smooth_k, attn_mask, dropout_p,
               scale, enable_gqa, smooth_v, rotate_qk, variant, window, diagonal, mode,
               q_offsets=None, k_offsets=None, max_q=None, max_k=None):
    mode = _mode if mode is None else mode
    _one_of("mode", mode, MODES)
    _one_of("variant", variant, _native.VARIANTS)
    _one_of("diagonal", diagonal, _native.DIAGONALS)
    if dropout_p:
        raise ValueError(f"dropout_p: {dropout_p}: must be 0: there is no dropout")
    if sm_scale is not None and scale is not None and sm_scale != scale:
        raise ValueError(f"scale: {scale}, but sm_scale is {sm_scale}: give one of them")
    sm_scale = scale if sm_scale is None else sm_scale
    if sm_scale is not None and not 1e-38 < sm_scale < 3e38:
        raise ValueError(f"sm_scale: {sm_scale}: must be above 0, and a number of float32")
    _check_dimensions(q, k, v, layout)
    axis = 1 if layout in ("HND", "THD") else 2
    if enable_gqa is False and q.shape[axis] != k.shape[axis]:
        raise ValueError(f"enable_gqa: False, but q has {q.shape[axis]} heads and k "
                         f"{k.shape[axis]}")
    if sm_scale is None:  # 0 stands for 1/sqrt(D), but D may have to be padded
        sm_scale = q.shape[-1] ** -0.5 if q.shape[-1] % 8 else 0.0
    left, right = (-1, -1) if window is None else map(operator.index, window)
    options = Options(bool(is_causal), float(sm_scale), _native.VARIANTS[variant],
                      bool(smooth_k), bool(smooth_v), bool(rotate_qk), _native.DIAGONALS[diagonal],
                      int(left), int(right))
    if isinstance(q, ndarray):
        from ._numpy import attention
    else:
        from ._torch import attention
    o, lse = attention(q, k, v, attn_mask, q_offsets, k_offsets, max_q, max_k, layout, options,
                       bool(return_lse), mode)
    return (o, lse) if return_lse else o


def sageattn(q: T, k: T, v: T, tensor_layout: str = "HND", is_causal: bool = False,
             sm_scale: Optional[float] = None, return_lse: bool = False, smooth_k: bool = True,
             attn_mask: Optional[T] = None, *, dropout_p: float = 0.0,
             scale: Optional[float] = None, enable_gqa: Optional[bool] = None,
             smooth_v: bool = False, rotate_qk: bool = False, variant: str = "auto",
             window: Optional[Tuple[int, int]] = None, diagonal: str = "top-left",
             mode: Optional[str] = None, key_lengths: Union[Sequence[int], T, None] = None) -> Any:
    """softmax(sm_scale * Q K^T + mask) V with Q and K in INT8 (SageAttention, arXiv:2410.02367;
    with variant "int8_fp8" SageAttention2, arXiv:2411.10958).

    Arguments
      q             [B, Hq, Nq, D] ("HND") or [B, Nq, Hq, D] ("NHD"), torch.Tensor or numpy.ndarray
      k, v          [B, Hkv, Nk, D] or [B, Nk, Hkv, D]; Hq is a multiple of Hkv. Any strides; only
                    where the last dimension is not contiguous the tensor is copied.
                    float16 or bfloat16. Where one is float32, or they differ, all are cast: to
                    bfloat16 if q is that, else to float16. D up to 256; one that is no multiple
                    of 8 is padded by a copy.
      is_causal     query i sees keys 0..i (with "bottom-right": 0..i + Nk - Nq)
      sm_scale      above 0; None: 1/sqrt(D). `scale` is another name for it.
      return_lse    also return log sum exp of each row's scores
      smooth_k      subtract K's mean over the tokens first (of many, over a sample of them);
                    exact for o and lse
      attn_mask     broadcastable to [B, Hq, Nq, Nk] in either layout: bool (True: visible), or
                    float16, bfloat16 or float32 that is added to the scores
      smooth_v      "int8_fp8" only: subtract V's mean and add it back
      rotate_qk     multiply each 8 channels of q and k by a Hadamard matrix before they become
                    INT8 (QuaRot, arXiv:2404.00456): the same scores, and smaller errors where
                    channels stick out, as they do in language models. Takes 0.3 to 2 % more time.
      variant       "int8_fp16", "int8_fp8", or "auto": the former, unless smooth_v asks for the
                    latter
      window        (left, right): query i sees keys i - left .. i + right; -1: unlimited
      diagonal      where i = 0 lies: "top-left" (as in PyTorch) or "bottom-right"
                    (FlashAttention)
      mode          "inproc": in this process. "daemon": by sageattnd. "auto": by the daemon that
                    serves this GPU for jobs that take ten times the hand-off or longer, else in
                    this process. None: what set_mode() said, else $SAGEATTND_RUN, else "auto"
      key_lengths   [B] integers: batch b sees its first key_lengths[b] keys, as by a mask over what
                    fills up sentences of different lengths, and is a problem of its own (K's mean,
                    "bottom-right"). No mask is read, and the other keys cost next to nothing.
                    q, k and v are copied unless they lie in memory as [B, N, H, D]; o does. A list,
                    or better a tensor on the CPU; one on the GPU is waited for. B up to 2048, no
                    attn_mask besides.
      dropout_p, enable_gqa   as F.scaled_dot_product_attention has them: dropout must be 0, and
                    enable_gqa=False refuses Hq != Hkv

    Returns o, like q in shape, dtype, device and order of dimensions in memory; with return_lse
    (o, lse), lse float32 [B, Hq, Nq]. A row that sees no key is 0, its lse -inf.

    On CUDA the job takes its place in the current stream, as a kernel would; tensors may be freed
    as with any PyTorch operation. Any thread may call. There is no gradient: a tensor that
    requires one is refused while gradients are recorded, and one that has a forward derivative.

    Raises ValueError or TypeError for an argument, SageError with the library's reason. In mode
    "daemon" an earlier job of the stream that failed is reported by the next call and by
    check_errors().
    """
    if not isinstance(tensor_layout, str) or tensor_layout not in ("HND", "NHD"):
        shown = tensor_layout if isinstance(tensor_layout, str) else type(tensor_layout).__name__
        raise ValueError(f"tensor_layout: {shown!r}: must be 'HND' or 'NHD'. "
                         "(F.scaled_dot_product_attention has attn_mask in this place: "
                         "sageattnd.scaled_dot_product_attention takes it)")
    if key_lengths is not None:
        return _of_lengths(key_lengths, q, k, v, tensor_layout, is_causal, sm_scale, return_lse,
                           smooth_k, attn_mask, dropout_p, scale, enable_gqa, smooth_v, rotate_qk,
                           variant, window, diagonal, mode)
    return _attention(q, k, v, tensor_layout, is_causal, sm_scale, return_lse, smooth_k, attn_mask,
                      dropout_p, scale, enable_gqa, smooth_v, rotate_qk, variant, window, diagonal,
                      mode)


def _of_lengths(key_lengths, q, k, v, layout, is_causal, sm_scale, return_lse, smooth_k, attn_mask,
                *more):
    """The batches as sequences, where they lie: one of all rows of a batch and the keys that they
    see, and one of no rows and the keys behind these."""
    if attn_mask is not None:
        raise ValueError("attn_mask: must be None where there are key_lengths")
    _check_dimensions(q, k, v, layout)
    q, k, v = [t.swapaxes(1, 2) if layout == "HND" else t for t in (q, k, v)]
    (b, nq), nk = q.shape[:2], k.shape[1]
    if k.shape[:2] != (b, nk) or v.shape[:2] != (b, nk):
        raise ValueError(f"k, v: {k.shape[0]} and {v.shape[0]} batches of {nk} and {v.shape[1]} "
                         f"keys: must be {b} batches, like q, and as many keys")
    if 2 * b > _native.MAX_SEQS:
        raise ValueError(f"key_lengths: {b} batches: must be at most {_native.MAX_SEQS // 2}")
    if isinstance(q, ndarray):
        from ._numpy import cut
    else:
        from ._torch import cut
    offsets = cut(key_lengths, b, nq, nk)
    q, k, v = [t.reshape(t.shape[0] * t.shape[1], *t.shape[2:]) for t in (q, k, v)]
    result = _attention(q, k, v, "THD", is_causal, sm_scale, return_lse, smooth_k, None, *more,
                        *offsets)
    o, lse = result if return_lse else (result, None)
    o = o.reshape(b, nq, *o.shape[1:])
    o = o.swapaxes(1, 2) if layout == "HND" else o
    return (o, lse.reshape(len(lse), b, nq).swapaxes(0, 1)) if return_lse else o


def sageattn_varlen(q: T, k: T, v: T, cu_seqlens_q: T, cu_seqlens_k: T,
                    max_seqlen_q: Optional[int] = None, max_seqlen_k: Optional[int] = None,
                    is_causal: bool = False, sm_scale: Optional[float] = None,
                    smooth_k: bool = True, *, return_lse: bool = False, smooth_v: bool = False,
                    rotate_qk: bool = False, variant: str = "auto",
                    window: Optional[Tuple[int, int]] = None, diagonal: str = "top-left",
                    mode: Optional[str] = None) -> Any:
    """sageattn() for sequences of different lengths, one after the other.

    Arguments
      q             [Tq, Hq, D]; k, v [Tk, Hkv, D]: the tokens of all sequences
      cu_seqlens_q, cu_seqlens_k   [sequences + 1], integers: sequence s has queries
                    cu_seqlens_q[s] up to cu_seqlens_q[s + 1]. On the CPU rather than on the GPU:
                    the library wants them there, and a copy waits for the stream.
      max_seqlen_q, max_seqlen_k   not needed; where given, a longer sequence is refused
    The others as in sageattn(); K's mean is each sequence's own.

    Returns o like q; with return_lse (o, lse), lse float32 [Hq, Tq].
    """
    return _attention(q, k, v, "THD", is_causal, sm_scale, return_lse, smooth_k, None, 0.0, None,
                      None, smooth_v, rotate_qk, variant, window, diagonal, mode, cu_seqlens_q,
                      cu_seqlens_k, max_seqlen_q, max_seqlen_k)


# --- upstream's functions that name a kernel ---

def sageattn_qk_int8_pv_fp16_triton(q: T, k: T, v: T, tensor_layout: str = "HND",
                                    quantization_backend: str = "triton", is_causal: bool = False,
                                    attn_mask: Optional[T] = None,
                                    sm_scale: Optional[float] = None, smooth_k: bool = True,
                                    return_lse: bool = False, **more: Any) -> Any:
    """sageattn(variant="int8_fp16"). quantization_backend: upstream's values; no difference."""
    _one_of("quantization_backend", quantization_backend, ("triton", "cuda"))
    return sageattn(q, k, v, tensor_layout, is_causal, sm_scale, return_lse, smooth_k, attn_mask,
                    variant="int8_fp16", **more)


def sageattn_qk_int8_pv_fp16_cuda(q: T, k: T, v: T, tensor_layout: str = "HND",
                                  is_causal: bool = False, qk_quant_gran: str = "per_thread",
                                  sm_scale: Optional[float] = None, pv_accum_dtype: str = "fp32",
                                  smooth_k: bool = True, smooth_v: bool = False,
                                  return_lse: bool = False, **more: Any) -> Any:
    """sageattn(variant="int8_fp16"). qk_quant_gran, pv_accum_dtype: upstream's values; scales are
    as fine as the finest of them, and sums in fp32, whatever they say."""
    _one_of("qk_quant_gran", qk_quant_gran, GRANULARITIES)
    _one_of("pv_accum_dtype", pv_accum_dtype, ("fp32", "fp16", "fp16+fp32"))
    return sageattn(q, k, v, tensor_layout, is_causal, sm_scale, return_lse, smooth_k,
                    smooth_v=smooth_v, variant="int8_fp16", **more)


def sageattn_qk_int8_pv_fp8_cuda(q: T, k: T, v: T, tensor_layout: str = "HND",
                                 is_causal: bool = False, qk_quant_gran: str = "per_thread",
                                 sm_scale: Optional[float] = None,
                                 pv_accum_dtype: str = "fp32+fp16", smooth_k: bool = True,
                                 smooth_v: bool = False, return_lse: bool = False,
                                 **more: Any) -> Any:
    """sageattn(variant="int8_fp8"). qk_quant_gran, pv_accum_dtype: upstream's values; scales are
    as fine as the finest of them, and sums in fp32, whatever they say."""
    _one_of("qk_quant_gran", qk_quant_gran, GRANULARITIES)
    _one_of("pv_accum_dtype", pv_accum_dtype, ("fp32", "fp32+fp16", "fp32+fp32"))
    return sageattn(q, k, v, tensor_layout, is_causal, sm_scale, return_lse, smooth_k,
                    smooth_v=smooth_v, variant="int8_fp8", **more)


def sageattn_qk_int8_pv_fp8_cuda_sm90(q: T, k: T, v: T, tensor_layout: str = "HND",
                                      is_causal: bool = False, qk_quant_gran: str = "per_thread",
                                      sm_scale: Optional[float] = None,
                                      pv_accum_dtype: str = "fp32+fp32", smooth_k: bool = True,
                                      return_lse: bool = False, **more: Any) -> Any:
    """sageattn(variant="int8_fp8"), not on Hopper alone. qk_quant_gran, pv_accum_dtype: as in
    sageattn_qk_int8_pv_fp8_cuda()."""
    return sageattn_qk_int8_pv_fp8_cuda(q, k, v, tensor_layout, is_causal, qk_quant_gran, sm_scale,
                                        pv_accum_dtype, smooth_k, False, return_lse, **more)
