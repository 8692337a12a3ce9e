"""In place of torch.nn.functional.scaled_dot_product_attention."""
from __future__ import annotations

import contextlib
import logging
import os
import threading
from typing import Any, Iterator, Optional, Sequence

import torch
import torch.nn.functional as F

from . import _daemon, _native, _torch

log = logging.getLogger("sageattnd")
MAX_HEAD_DIM = 256  # SAGE_MAX_HEAD_DIM
PYTORCH = tuple(map(int, torch.__version__.split(".")[:2]))
pytorch = torch._C._nn.scaled_dot_product_attention  # F's, whoever has put another one there

_lock = threading.Lock()
_fallbacks: dict[str, int] = {}
_blocks: list = []  # of sdpa(), in the order in which they were entered
_before = F.scaled_dot_product_attention  # what there was before the first of them


def _fork_child() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_fork_child)


class Unsupported(ValueError):
    """With strict=True: what scaled_dot_product_attention() would have left to PyTorch."""


def fallbacks() -> dict[str, int]:
    """How many calls were left to PyTorch, by reason. Calls in code that torch.compile() has
    compiled are not counted."""
    with _lock:
        return dict(_fallbacks)


def _autocast(device: str) -> Optional[torch.dtype]:
    """What torch.autocast() casts to there, for it knows PyTorch's function; or None."""
    if hasattr(torch, "get_autocast_dtype"):  # PyTorch 2.4 and newer
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if device == "cuda" and torch.is_autocast_enabled():
        return torch.get_autocast_gpu_dtype()
    return None  # before, it did not know it on the CPU


def _older(device: torch.device, capability: tuple[int, int]) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < capability


def _why_not(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa,
             variant) -> Optional[str]:
    """None, or why the kernels cannot do it (or PyTorch itself refuses it)."""
    tensors = (q, k, v) if attn_mask is None else (q, k, v, attn_mask)
    if any(t.is_nested for t in tensors):
        return "nested tensor"
    if dropout_p:
        return "dropout"
    if any(map(_torch.has_gradient, tensors)):
        return "gradient"
    if q.device.type not in ("cuda", "cpu") or any(t.device != q.device for t in tensors):
        return f"device {q.device.type}"
    if q.dtype not in _torch.DTYPES or not q.dtype == k.dtype == v.dtype:
        return f"dtype {q.dtype}".replace("torch.", "")
    if q.dim() not in (3, 4) or not q.dim() == k.dim() == v.dim():
        return "number of dimensions"
    if q.shape[-1] == 0:
        return "head_dim 0"
    if q.shape[-3] == 0:
        return "no heads"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head_dim above {MAX_HEAD_DIM}"
    if not q.shape[-1] == k.shape[-1] == v.shape[-1]:
        return "head_dim differs"
    same_heads = q.shape[-3] == k.shape[-3]
    if k.shape[:-1] != v.shape[:-1] or q.dim() == 4 and q.shape[0] != k.shape[0]:
        return "shapes differ"
    if not same_heads and not (enable_gqa and q.shape[-3] % max(k.shape[-3], 1) == 0):
        return "heads differ"
    if attn_mask is not None and (is_causal or attn_mask.dtype not in _torch.MASKS
                                  or attn_mask.dim() > q.dim()):
        return "attn_mask"
    if scale is not None and not 1e-38 < scale < 3e38:
        return "scale"
    if not _torch.compiling() and _older(q.device, (8, 0)):
        return "compute capability below 8.0"
    if not _torch.compiling() and variant == "int8_fp8" and _older(q.device, (8, 9)):
        return "int8_fp8 and compute capability below 8.9"
    return None


def _fall_back(reason: str) -> None:
    with _lock:
        first = reason not in _fallbacks
        _fallbacks[reason] = _fallbacks.get(reason, 0) + 1
    if first:
        log.warning("scaled_dot_product_attention: left to PyTorch: %s (said once; "
                    "sageattnd.fallbacks() counts)", reason)


def _as_they_say(tensors, dropout_p, is_causal, scale, enable_gqa, strict) -> Any:
    """Some of the tensors say themselves what this function is for them, as biases of
    torch.nn.attention do. They know it as F's, and may call that, which need not be ours."""
    if F.scaled_dot_product_attention not in (scaled_dot_product_attention, *_blocks):
        kinds = {type(t).__name__ for t in tensors if torch.overrides.has_torch_function((t,))}
        reason = f"__torch_function__ of {', '.join(sorted(kinds))}"
        if strict:
            raise Unsupported(f"scaled_dot_product_attention: left to PyTorch: {reason}")
        _fall_back(reason)
    more = {"enable_gqa": True} if enable_gqa else {}
    return torch.overrides.handle_torch_function(
        F.scaled_dot_product_attention, tensors, *tensors, dropout_p=dropout_p,
        is_causal=is_causal, scale=scale, **more)


def scaled_dot_product_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                                 attn_mask: Optional[torch.Tensor] = None, dropout_p: float = 0.0,
                                 is_causal: bool = False, scale: Optional[float] = None,
                                 enable_gqa: bool = False, *, strict: bool = False,
                                 rotate_qk: bool = False, variant: str = "auto",
                                 mode: Optional[str] = None,
                                 key_lengths: Optional[Sequence[int]] = None) -> torch.Tensor:
    """F.scaled_dot_product_attention: its arguments, its meaning, its result up to the error of
    the quantisation (and a row that sees no key is 0).

    query [B, Hq, Nq, D] or [Hq, Nq, D], key and value [.., Hkv, Nk, D]; attn_mask broadcastable to
    [B, Hq, Nq, Nk]; see sageattn() for rotate_qk, variant and mode. key_lengths, for a
    query of four dimensions: how many keys each batch sees, as sageattn() has it, where attn_mask
    says just that; the kernels then do without the mask, and PyTorch's function has it. Returns o
    like query.

    What the kernels cannot do is left to PyTorch, with a warning for each reason, and counted:
    see fallbacks(). That is dropout, gradients, dtypes other than float16 and bfloat16, D above
    256, GPUs before compute capability 8.0, other devices, tensors that broadcast. strict=True
    raises Unsupported instead.
    """
    tensors = query, key, value, attn_mask
    if not _torch.compiling() and torch.overrides.has_torch_function(tensors):
        return _as_they_say(tensors, dropout_p, is_causal, scale, enable_gqa, strict)
    kind = _autocast(query.device.type) if query.device.type in ("cuda", "cpu") else None
    if kind is not None:
        query, key, value = (t if t.dtype == torch.float64 else t.to(kind)
                             for t in (query, key, value))
    if key_lengths is not None and attn_mask is None:
        raise ValueError("key_lengths: wants an attn_mask of the same meaning, for PyTorch's "
                         "function")
    reason = _why_not(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
                      variant)
    if reason is not None:
        if strict:
            raise Unsupported(f"scaled_dot_product_attention: the kernels cannot do it: {reason}")
        if not _torch.compiling():
            _fall_back(reason)
            if query.is_cuda:
                _daemon.check_stream(query.device.index)
        more = {} if scale is None else {"scale": scale}
        if enable_gqa and PYTORCH >= (2, 5):
            more["enable_gqa"] = True
        elif enable_gqa and query.dim() > 2 and key.dim() > 2 and value.dim() > 2:
            key, value = (t.repeat_interleave(query.shape[-3] // max(t.shape[-3], 1), -3)
                          for t in (key, value))
        return pytorch(query, key, value, attn_mask, dropout_p, is_causal, **more)
    from ._api import sageattn
    if key_lengths is not None and 2 * query.shape[0] <= _native.MAX_SEQS:
        return sageattn(query, key, value, "HND", is_causal, scale, rotate_qk=rotate_qk,
                        variant=variant, mode=mode, key_lengths=key_lengths)
    if query.dim() == 4:
        return sageattn(query, key, value, "HND", is_causal, scale, attn_mask=attn_mask,
                        rotate_qk=rotate_qk, variant=variant, mode=mode)
    return sageattn(query[None], key[None], value[None], "HND", is_causal, scale,
                    attn_mask=attn_mask, rotate_qk=rotate_qk, variant=variant, mode=mode)[0]


@contextlib.contextmanager
def sdpa(strict: bool = False, variant: str = "auto", mode: Optional[str] = None,
         rotate_qk: bool = False) -> Iterator[None]:
    """Within the block, of all threads, F.scaled_dot_product_attention is ours.

        with sageattnd.sdpa():
            image = pipeline(prompt)

    Arguments as in scaled_dot_product_attention(). Code that holds PyTorch's function under a
    name of its own (from torch.nn.functional import ...) is not reached. Nor is what
    torch.compile() has compiled before: compile and call it within one block.
    """

    def ours(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
             enable_gqa=False) -> Any:
        return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal,
                                            scale, enable_gqa, strict=strict,
                                            rotate_qk=rotate_qk, variant=variant, mode=mode)

    global _before
    with _lock:
        if not _blocks:
            _before = F.scaled_dot_product_attention
        _blocks.append(ours)
        F.scaled_dot_product_attention = ours
    try:
        yield
    finally:  # blocks of several threads may end in any order
        with _lock:
            last = _blocks[-1]
            _blocks.remove(ours)
            if F.scaled_dot_product_attention is last:
                F.scaled_dot_product_attention = _blocks[-1] if _blocks else _before
            else:
                log.warning("sdpa: F.scaled_dot_product_attention was replaced within the block, "
                            "and stays so")
