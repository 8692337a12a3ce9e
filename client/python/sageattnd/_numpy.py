"""Attention of numpy arrays: on the CPU, in this process or by a daemon that computes there."""
from __future__ import annotations

import ctypes
import functools

import numpy as np

from . import _client, _native
from ._native import Options

# bfloat16 is ml_dtypes'; numpy has none of its own.
CODES = {"float16": _native.F16, "bfloat16": _native.BF16, "float32": _native.F32,
         "bool": _native.BOOL}
HALVES = (_native.F16, _native.BF16)
AXES = {"HND": (0, 1, 2, 3), "NHD": (0, 2, 1, 3)}
UNIT = 64  # tensors in a daemon's buffer start at multiples of it


@functools.lru_cache(None)
def _code(dtype: np.dtype) -> int:
    """The enum sage_dtype; NONE for others, such as those of the other byte order. Asking a dtype
    for its name takes microseconds."""
    return CODES.get(dtype.name, _native.NONE) if dtype.isnative else _native.NONE


def _cast(q, k, v):
    """To one 16-bit type, as SageAttention 1.0.x has it: bfloat16 where q is, else float16."""
    for field, a in (("q", q), ("k", k), ("v", v)):
        if not isinstance(a, np.ndarray):
            raise TypeError(f"{field}: {type(a).__name__}: must be a numpy.ndarray, like q")
        if _code(a.dtype) not in (*HALVES, _native.F32):
            raise TypeError(f"{field}: dtype {a.dtype}: must be float16, bfloat16 or float32, "
                            "in the byte order of this machine")
    kind = q.dtype if _code(q.dtype) == _native.BF16 else np.float16
    return [a.astype(kind, copy=False) for a in (q, k, v)]


def _usable(a: np.ndarray) -> np.ndarray:
    """The array itself where the kernels can read it in place."""
    size, strides = a.itemsize, a.strides
    if strides[-1] == size and all(s >= 0 and s % size == 0 for s in strides):
        return a
    return np.ascontiguousarray(a)


def _four(a: np.ndarray, layout: str) -> np.ndarray:
    """A view as [B, H, N, D]."""
    return a[None].transpose(0, 2, 1, 3) if layout == "THD" else a.transpose(AXES[layout])


def _mask(mask, q, k) -> np.ndarray | None:
    if mask is None:
        return None
    if not isinstance(mask, np.ndarray):
        raise TypeError(f"attn_mask: {type(mask).__name__}: must be a numpy.ndarray, like q")
    if not _code(mask.dtype):
        raise TypeError(f"attn_mask: dtype {mask.dtype}: must be bool, float16, bfloat16 or "
                        "float32, in the byte order of this machine")
    wanted = (*q.shape[:3], k.shape[2])
    shape = (1,) * (4 - mask.ndim) + mask.shape
    if len(shape) > 4 or any(m not in (1, n) for m, n in zip(shape, wanted)):
        raise ValueError(f"attn_mask: shape {mask.shape} cannot be broadcast to {wanted}")
    return _usable(np.broadcast_to(mask.reshape(shape), (*shape[:3], wanted[3])))


def _describe(a: np.ndarray | None):
    """The twelve numbers of a struct sage_tensor."""
    if a is None:
        return _native.ABSENT
    address = a.__array_interface__["data"][0]
    strides = (s // a.itemsize for s in a.strides) if a.size else (1, 1, 1, 1)  # numpy: 0 then
    return (_code(a.dtype), 0, 0, address, *a.shape, *strides)


def _offsets(values, field: str, longest) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 1 or values.dtype.kind not in "iu" or not len(values):
        raise ValueError(f"{field}: must be a row of integers, [sequences + 1]")
    if values.min() < 0 or values.max() >= 1 << 31:
        raise ValueError(f"{field}: must be between 0 and 2^31 - 1")
    longest_here = int(np.diff(values).max(initial=0))
    if longest is not None and longest_here > longest:
        raise ValueError(f"{field}: a sequence has {longest_here} tokens, max_seqlen says "
                         f"{longest}")
    return np.ascontiguousarray(values, np.int32)


def cut(key_lengths, b: int, nq: int, nk: int):
    """Offsets of two sequences for each batch, [2 B + 1]: one of all nq rows and key_lengths[b]
    keys, one of no rows and the other keys."""
    lengths = np.asarray(key_lengths)
    if lengths.shape != (b,) or b and lengths.dtype.kind not in "iu":
        raise ValueError(f"key_lengths: {lengths.dtype} {lengths.shape}: must be {b} integers, one "
                         "for each batch")
    if b and (lengths.min() < 0 or lengths.max() > nk):
        raise ValueError(f"key_lengths: from {lengths.min()} to {lengths.max()}: must be between 0 "
                         f"and {nk}")

    def offsets(first, n):
        start = np.arange(b + 1) * n
        return np.append(np.stack((start[:-1], start[:-1] + first), 1), start[-1])
    return offsets(nq, nq), offsets(lengths.astype(np.int64), nk)


def attention(q, k, v, mask, q_offsets, k_offsets, max_q, max_k, layout: str, options: Options,
              with_lse: bool, mode: str):
    """o like q, and lse (float32) or None."""
    kind, width = q.dtype, q.shape[-1]
    q, k, v = (_four(a, layout) for a in _cast(q, k, v))
    if width % 8:
        pad = [(0, 0)] * 3 + [(0, -width % 8)]
        q, k, v = (np.pad(a, pad) for a in (q, k, v))
    q, k, v, mask = _usable(q), _usable(k), _usable(v), _mask(mask, q, k)
    o = np.empty_like(q)  # keeps the order of q's axes
    lse = np.empty((*q.shape[:3], 1), np.float32) if with_lse else None
    offsets = ()
    if q_offsets is not None:
        q_offsets = _offsets(q_offsets, "cu_seqlens_q", max_q)
        k_offsets = _offsets(k_offsets, "cu_seqlens_k", max_k)
        _native.same_length(q_offsets, k_offsets)
        offsets = (q_offsets.ctypes.data, k_offsets.ctypes.data, len(q_offsets) - 1)
    run = _in_daemon if mode == "daemon" else _in_process
    run((q, k, v, o, mask, lse), options, offsets)
    o = o[..., :width].transpose(AXES["HND" if layout == "HND" else "NHD"])
    o = (o[0] if layout == "THD" else o).astype(kind, copy=False)
    return o, None if lse is None else lse[0, ..., 0] if layout == "THD" else lse[..., 0]


def _in_process(tensors, options: Options, offsets) -> None:
    problem = _native.pack(*map(_describe, tensors), options, *offsets)
    _native.check(problem)
    size = _native.cpu_workspace(problem)
    workspace = np.empty(size + _native.ALIGNMENT, np.uint8)
    address = workspace.__array_interface__["data"][0]
    _native.cpu_run(problem, address + -address % _native.ALIGNMENT, size)


def _in_daemon(tensors, options: Options, offsets) -> None:
    """By way of memory that the daemon maps: q, k, v and mask go there, o and lse come back."""
    connection = _client.connection(_client.CPU)
    at, size = [], 0
    for a in tensors:
        at.append(size)
        size += 0 if a is None else -(-a.size * a.itemsize // UNIT) * UNIT
    with connection.stage(max(size, 1)) as base:
        memory = (ctypes.c_char * size).from_address(base)
        there = [None if a is None else np.ndarray(a.shape, a.dtype, memory, offset)
                 for a, offset in zip(tensors, at)]
        problem = _native.pack(*map(_describe, there), options, *offsets)
        _native.check(problem)
        for i in (0, 1, 2, 4):
            if tensors[i] is not None:
                there[i][...] = tensors[i]
        connection.run(problem)
        tensors[3][...] = there[3]
        if tensors[5] is not None:
            tensors[5][...] = there[5]
