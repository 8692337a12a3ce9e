"""In place of torch.nn.functional.scaled_dot_product_attention."""
from __future__ import annotations

import contextlib
import functools
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
_blocks: list[_Block] = []  # of sdpa(), in the order in which they were entered


def _fork_child() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_fork_child)


class _Block:
    """Of sdpa(): what stood there before it."""

    over = False

    def __init__(self, before: Any) -> None:
        self.before = before


_no_block = _Block(None)


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


def _kinds(tensors) -> list[type]:
    """Of those whose type has a __torch_function__: it says itself what PyTorch's are for it."""
    return [type(t) for t in tensors if torch.overrides.has_torch_function((t,))]


def _is_plain(kind: type) -> bool:
    """Says no more than that what comes out is of that type, too; or is no tensor (a tracer's)."""
    default = torch.Tensor.__torch_function__.__func__
    return not issubclass(kind, torch.Tensor) \
        or getattr(kind.__torch_function__, "__func__", None) is default


def _known_as(public, tensors) -> Any:
    """The function that is to be shown to those who are asked first, as PyTorch asks them: modes,
    and types that know it as public(), as F's, or as PyTorch's. None: nobody."""
    if _torch.compiling() or not torch.overrides.has_torch_function(tensors):
        return None
    if torch._C._len_torch_function_stack():
        return public()
    kinds = _kinds(tensors)
    if any(kind.__module__ == "torch.nn.attention.bias" for kind in kinds):
        return F.scaled_dot_product_attention
    return public() if all(map(_is_plain, kinds)) else pytorch


def _given(scale, enable_gqa) -> dict[str, Any]:
    """What not every version of PyTorch's function takes, if it is there."""
    given = {} if scale is None else {"scale": scale}
    return {**given, "enable_gqa": True} if enable_gqa else given


def _attention(public, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
               strict, rotate_qk, variant, mode, key_lengths=None) -> Any:
    """scaled_dot_product_attention(), known to others as public()."""
    tensors = query, key, value, attn_mask
    known_as, reason, kind = _known_as(public, tensors), None, None
    if known_as is pytorch:
        names = {kind.__name__ for kind in _kinds(tensors)}
        reason = f"__torch_function__ of {', '.join(sorted(names))}"
    elif known_as is not None:
        return torch.overrides.handle_torch_function(
            known_as, tensors, *tensors, dropout_p=dropout_p, is_causal=is_causal,
            **_given(scale, enable_gqa))
    elif query.device.type in ("cuda", "cpu"):
        kind = _autocast(query.device.type)
    if kind is not None:
        query, key, value = (t if t.dtype == torch.float64 else t.to(kind)
                             for t in (query, key, value))
    if key_lengths is not None and attn_mask is None:
        raise ValueError("key_lengths: wants an attn_mask of the same meaning, for PyTorch's "
                         "function")
    reason = reason or _why_not(query, key, value, attn_mask, dropout_p, is_causal, scale,
                                enable_gqa, variant)
    if reason is not None:
        if strict:
            raise Unsupported(f"scaled_dot_product_attention: the kernels cannot do it: {reason}")
        if not _torch.compiling():
            _fall_back(reason)
            if query.is_cuda:
                _daemon.check_stream(query.device.index)
        knows_gqa = PYTORCH >= (2, 5)
        if enable_gqa and not knows_gqa \
                and query.dim() > 2 and key.dim() > 2 and value.dim() > 2:
            key, value = (t.repeat_interleave(query.shape[-3] // max(t.shape[-3], 1), -3)
                          for t in (key, value))
        return pytorch(query, key, value, attn_mask, dropout_p, is_causal,
                       **_given(scale, enable_gqa and knows_gqa))
    if query.shape[-3] == 0:  # PyTorch's own divides by the heads, in some versions
        return torch.empty_like(query)
    from ._api import sageattn
    if key_lengths is not None and 2 * query.shape[0] <= _native.MAX_SEQS:
        return sageattn(query, key, value, "HND", is_causal, scale, rotate_qk=rotate_qk,
                        variant=variant, mode=mode, key_lengths=key_lengths)
    if query.dim() == 4:
        return sageattn(query, key, value, "HND", is_causal, scale, attn_mask=attn_mask,
                        rotate_qk=rotate_qk, variant=variant, mode=mode)
    return sageattn(query[None], key[None], value[None], "HND", is_causal, scale,
                    attn_mask=attn_mask, rotate_qk=rotate_qk, variant=variant, mode=mode)[0]


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
    256, GPUs before compute capability 8.0 (int8_fp8: 8.9), other devices, tensors that broadcast,
    tensors of a type with a __torch_function__ of its own. strict=True raises Unsupported instead.
    (A bias of torch.nn.attention calls what stands in F for this function, without the arguments
    that are only ours. Code that torch.compile() has compiled does not look for compute
    capability 8.0 and 8.9, where it raises, nor for types: it reads all as plain tensors.)
    """
    def public() -> Any:
        of_call = functools.partial(scaled_dot_product_attention, strict=strict,
                                    rotate_qk=rotate_qk, variant=variant, mode=mode,
                                    key_lengths=key_lengths)
        return functools.update_wrapper(of_call, scaled_dot_product_attention)

    return _attention(public, query, key, value, attn_mask, dropout_p, is_causal, scale,
                      enable_gqa, strict, rotate_qk, variant, mode, key_lengths)


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
        if block.over:  # who has put another one there has put this one back, too late
            return block.before(query, key, value, attn_mask, dropout_p, is_causal,
                                **_given(scale, enable_gqa))
        return _attention(lambda: ours, query, key, value, attn_mask, dropout_p, is_causal, scale,
                          enable_gqa, strict, rotate_qk, variant, mode)

    with _lock:
        before = F.scaled_dot_product_attention
        while getattr(before, "block_of_sageattnd", _no_block).over:
            before = before.block_of_sageattnd.before
        block = ours.block_of_sageattnd = _Block(before)  # type: ignore[attr-defined]
        F.scaled_dot_product_attention = ours
        _blocks.append(block)
    try:
        yield
    finally:  # blocks of several threads may end in any order
        with _lock:
            _blocks.remove(block)
            after = [other for other in _blocks if other.before is ours]
            for other in after:
                other.before = block.before
            if F.scaled_dot_product_attention is ours:
                F.scaled_dot_product_attention = block.before
            elif not after:
                log.warning("sdpa: F.scaled_dot_product_attention was replaced within the block, "
                            "and stays so")
            block.over = True
