"""Attention of PyTorch's tensors: one operator, so that torch.compile() takes it as it is."""
from __future__ import annotations

import ctypes
import functools

import torch
import torch.nn.functional as F
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

from . import _client, _daemon, _native
from ._native import Options, SageError

DTYPES = (torch.float16, torch.bfloat16)
MASKS = (*DTYPES, torch.float32, torch.bool)
CODES = dict(zip(MASKS, (_native.F16, _native.BF16, _native.F32, _native.BOOL)))
# torch.compiler has it since PyTorch 2.3, torch._utils before.
compiling = (getattr(getattr(torch, "compiler", None), "is_compiling", None)
             or getattr(torch._utils, "is_compiling", lambda: False))
UNIT = 64  # tensors in a daemon's buffer start at multiples of it


def _cast(q, k, v):
    """To one 16-bit type, as SageAttention 1.0.x has it: bfloat16 where q is, else float16."""
    if q.dtype == k.dtype == v.dtype and q.dtype in DTYPES:
        return q, k, v
    for field, t in (("q", q), ("k", k), ("v", v)):
        if t.dtype not in DTYPES and t.dtype != torch.float32:
            raise TypeError(f"{field}: dtype {t.dtype}: must be float16, bfloat16 or float32")
    kind = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float16
    return q.to(kind), k.to(kind), v.to(kind)


def repeats(t) -> bool:
    """Will what is computed of it now be repeated as it is, with other numbers?"""
    return compiling() or torch.jit.is_tracing() \
        or t.is_cuda and torch.cuda.is_current_stream_capturing()


def has_gradient(t) -> bool:
    """Would PyTorch want one of what is computed from it?"""
    if t.requires_grad and torch.is_grad_enabled():
        return True
    if compiling() or getattr(forward_ad, "_current_level", -1) < 0:
        return False
    inner = t
    while functorch.is_functorch_wrapped_tensor(inner):  # by torch.func, a level each
        if functorch.is_gradtrackingtensor(inner):
            return True
        inner = functorch.get_unwrapped(inner)
    return forward_ad.unpack_dual(inner).tangent is not None


def cut(key_lengths, b: int, nq: int, nk: int):
    """Offsets of two sequences for each batch, [2 B + 1]: one of all nq rows and key_lengths[b]
    keys, one of no rows and the other keys."""
    lengths = key_lengths
    if not isinstance(lengths, torch.Tensor):
        lengths = torch.tensor(lengths, device="cpu")
    if lengths.shape != (b,) or b and lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"key_lengths: {lengths.dtype} {tuple(lengths.shape)}: must be {b} "
                         "integers, one for each batch")
    if not compiling() and not torch.jit.is_tracing() and type(lengths) is torch.Tensor \
            and lengths.device.type == "cpu":
        return _cut_here(tuple(lengths.tolist()), nq, nk)
    return _cut(lengths, nq, nk)  # the library sees where they are out of range


@functools.lru_cache(16)
def _cut_here(lengths, nq: int, nk: int):
    """The same for every layer of a model, so it is kept."""
    if lengths and (min(lengths) < 0 or max(lengths) > nk):
        raise ValueError(f"key_lengths: from {min(lengths)} to {max(lengths)}: must be between 0 "
                         f"and {nk}")
    with torch.inference_mode(False):
        return _cut(torch.tensor(lengths, dtype=torch.int64, device="cpu"), nq, nk)


def _cut(lengths, nq: int, nk: int):
    def offsets(first, n):
        start = torch.arange(len(lengths) + 1, device=lengths.device) * n
        return torch.cat((torch.stack((start[:-1], start[:-1] + first), 1).flatten(), start[-1:]))
    return offsets(nq, nq), offsets(lengths.long(), nk)


def _mask(mask, q, k, layout: str):
    """Of four dimensions, the last of them whole and contiguous."""
    if mask.dtype not in MASKS:
        raise TypeError(f"attn_mask: dtype {mask.dtype}: must be bool, float16, bfloat16 or "
                        "float32")
    b, nq, hq, _ = q.shape if layout == "NHD" else q.transpose(1, 2).shape
    nk = k.shape[1 if layout == "NHD" else 2]
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(shape) > 4 or any(m not in (1, n) for m, n in zip(shape, (b, hq, nq, nk))):
        raise ValueError(f"attn_mask: shape {tuple(mask.shape)} cannot be broadcast to "
                         f"{(b, hq, nq, nk)}")
    mask = mask.reshape(shape).expand(*shape[:3], nk)
    return mask if mask.stride(-1) == 1 else mask.contiguous()


def attention(q, k, v, mask, q_offsets, k_offsets, max_q, max_k, layout: str, options: Options,
              with_lse: bool, mode: str):
    """o like q, and lse (float32) or None."""
    for field, t in (("q", q), ("k", k), ("v", v), ("attn_mask", mask)):
        if t is None:
            continue
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{field}: {type(t).__name__}: must be a torch.Tensor or, like the "
                            "others, a numpy.ndarray")
        if t.device != q.device:
            raise ValueError(f"{field}: on {t.device}, but q is on {q.device}")
        if has_gradient(t):
            raise RuntimeError(f"{field} requires a gradient, and there is none: call this under "
                               "torch.no_grad() or torch.inference_mode(), or detach() it (as "
                               "one has to where it has a forward derivative)")
    if q.device.type not in ("cuda", "cpu", "meta"):
        raise TypeError(f"q: on {q.device}: must be on cuda or cpu")
    kind, width = q.dtype, q.shape[-1]
    q, k, v = _cast(q, k, v)
    if width % 8:
        pad = (0, -width % 8)
        q, k, v = F.pad(q, pad), F.pad(k, pad), F.pad(v, pad)
    if mask is not None:
        mask = _mask(mask, q, k, layout)
    if q_offsets is not None:
        q_offsets, k_offsets = torch.as_tensor(q_offsets), torch.as_tensor(k_offsets)
    o, lse = _operator(q, k, v, mask, q_offsets, k_offsets, max_q, max_k, layout, *options,
                       with_lse, mode)
    if width % 8:
        o = o[..., :width]
    return o if o.dtype == kind else o.to(kind), lse if with_lse else None


# --- the operator ---

SCHEMA = ("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? q_offsets, "
          "Tensor? k_offsets, int? max_q, int? max_k, str layout, bool causal, float scale, "
          "int variant, bool smooth_k, bool smooth_v, bool rotate_qk, int diagonal, "
          "int window_left, int window_right, bool with_lse, str mode) -> (Tensor, Tensor)")


def _usable(t):
    """The tensor itself where the kernels can read it in place."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _outputs(q, layout: str, with_lse: bool):
    """o with q's order of dimensions, and lse (of no elements where it is not wanted)."""
    shape = (0,)
    if with_lse:
        shape = q.shape[:3] if layout == "HND" else (
            q.shape[0], q.shape[2], q.shape[1]) if layout == "NHD" else (q.shape[1], q.shape[0])
    return torch.empty_like(q), q.new_empty(shape, dtype=torch.float32)


def _fake(q, k, v, mask, q_offsets, k_offsets, max_q, max_k, layout, causal, scale, variant,
          smooth_k, smooth_v, rotate_qk, diagonal, window_left, window_right, with_lse, mode):
    return _outputs(_usable(q), layout, with_lse)


def _describe(t, layout: str):
    """The twelve numbers of a struct sage_tensor."""
    if t is None:
        return _native.ABSENT
    if layout == "HND":
        return (CODES[t.dtype], 0, 0, t.data_ptr(), *t.shape, *t.stride())
    if layout == "NHD":
        (b, n, h, d), (sb, sn, sh, sd) = t.shape, t.stride()
        return (CODES[t.dtype], 0, 0, t.data_ptr(), b, h, n, d, sb, sh, sn, sd)
    (n, h, d), (sn, sh, sd) = t.shape, t.stride()
    return (CODES[t.dtype], 0, 0, t.data_ptr(), 1, h, n, d, 0, sh, sn, sd)


def _offsets(offsets, field: str, longest):
    if offsets.dim() != 1 or offsets.dtype not in (torch.int32, torch.int64) or not len(offsets):
        raise ValueError(f"{field}: must be a row of int32 or int64, [sequences + 1]")
    if offsets.is_cuda and torch.cuda.is_current_stream_capturing():
        raise SageError(_native.ECAPTURE, f"{field}: a graph cannot hold the lengths of sequences")
    offsets = offsets.to("cpu", torch.int64)
    if int(offsets.min()) < 0 or int(offsets.max()) >= 1 << 31:
        raise ValueError(f"{field}: must be between 0 and 2^31 - 1")
    if longest is not None and len(offsets) > 1:
        longest_here = int((offsets[1:] - offsets[:-1]).max())
        if longest_here > longest:
            raise ValueError(f"{field}: a sequence has {longest_here} tokens, max_seqlen says "
                             f"{longest}")
    return offsets.to(torch.int32).contiguous()


def _run(q, k, v, mask, q_offsets, k_offsets, max_q, max_k, layout, causal, scale, variant,
         smooth_k, smooth_v, rotate_qk, diagonal, window_left, window_right, with_lse, mode):
    q, k, v = _usable(q), _usable(k), _usable(v)
    o, lse = _outputs(q, layout, with_lse)
    options = Options(causal, scale, variant, smooth_k, smooth_v, rotate_qk, diagonal,
                      window_left, window_right)
    more = ()
    if q_offsets is not None:
        q_offsets = _offsets(q_offsets, "cu_seqlens_q", max_q)
        k_offsets = _offsets(k_offsets, "cu_seqlens_k", max_k)
        _native.same_length(q_offsets, k_offsets)
        more = (q_offsets.data_ptr(), k_offsets.data_ptr(), len(q_offsets) - 1)
    rows = None
    if with_lse:  # [B, Hq, Nq, 1]
        rows = lse[None, ..., None] if layout == "THD" else lse[..., None]

    def problem(q, k, v, o, mask, rows):
        packed = _native.pack(_describe(q, layout), _describe(k, layout), _describe(v, layout),
                              _describe(o, layout), _describe(mask, "HND"),
                              _describe(rows, "HND"), options, *more)
        _native.check(packed)
        return packed

    tensors = (q, k, v, o, mask, rows)
    if q.is_cuda:
        _on_cuda(problem(*tensors), tensors, mode)
    elif mode == "daemon":
        _in_cpu_daemon(tensors, problem)
    else:
        _on_cpu(problem(*tensors))
    return o, lse


def _on_cuda(problem: bytes, tensors, mode: str) -> None:
    device = tensors[0].device
    if torch.cuda.current_device() != device.index:
        with torch.cuda.device(device):
            return _on_cuda(problem, tensors, mode)
    stream = torch.cuda.current_stream()
    connection = _daemon.choose(problem, device.index, mode)
    if not connection:
        _daemon.check_stream(device.index)
        size = _native.cuda_workspace(problem)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        return _native.cuda_run(problem, workspace.data_ptr(), size, stream.cuda_stream)
    connection.enqueue(problem, stream.cuda_stream)
    tensor_bytes = sum(t.numel() * t.element_size() for t in tensors if t is not None)
    if max(tensor_bytes, connection.registered()) > connection.cache_bytes:
        # PyTorch's allocator frees and asks again when memory runs out, all at once: by then the
        # daemon must not hold what was freed, whole segments of the allocator.
        stream.synchronize()
        connection.trim()


def _on_cpu(problem: bytes) -> None:
    size = _native.cpu_workspace(problem)
    workspace = torch.empty(size + _native.ALIGNMENT, dtype=torch.uint8, device="cpu")
    address = workspace.data_ptr()
    _native.cpu_run(problem, address + -address % _native.ALIGNMENT, size)


def _in_cpu_daemon(tensors, problem) -> None:
    """By way of memory that the daemon maps: q, k, v and mask go there, o and lse come back."""
    connection = _client.connection(_client.CPU)
    at, size = [], 0
    for t in tensors:
        at.append(size)
        size += 0 if t is None else -(-t.numel() * t.element_size() // UNIT) * UNIT
    with connection.stage(max(size, UNIT)) as base:
        memory = torch.frombuffer((ctypes.c_char * max(size, UNIT)).from_address(base),
                                  dtype=torch.uint8)

        def there(t, offset):
            end = offset + t.numel() * t.element_size()
            return memory[offset:end].view(t.dtype).view(t.shape)

        views = [None if t is None else there(t, offset) for t, offset in zip(tensors, at)]
        packed = problem(*views)
        for i in (0, 1, 2, 4):
            if tensors[i] is not None:
                views[i].copy_(tensors[i])
        connection.run(packed)
        tensors[3].copy_(views[3])
        if tensors[5] is not None:
            tensors[5].copy_(views[5])


def _define():
    library = torch.library.Library("sageattnd", "DEF")
    tags = [getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "needs_fixed_stride_order")
            if hasattr(torch.Tag, name)]
    try:
        library.define(SCHEMA, tags=tags)
    except TypeError:  # before PyTorch 2.2
        library.define(SCHEMA)
    for key in ("CPU", "CUDA"):
        library.impl("attention", _run, key)
    if hasattr(torch.library, "register_fake"):
        torch.library.register_fake("sageattnd::attention", _fake, lib=library)
    else:  # before PyTorch 2.4
        library.impl("attention", _fake, "Meta")
    return library, torch.ops.sageattnd.attention.default


_library, _operator = _define()
