#!/usr/bin/env python3
"""The package sageattnd with PyTorch on the CPU: as an operator, in place of PyTorch's attention
and of sageattention, in transformers and diffusers, and over several ranks.

PyTorch is that of this python, or else of the environment that `./quickstart python` makes.
"""
import contextlib
import functools
import importlib.util
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings

import sage
from sage import raises

SRC = os.environ.get("SAGE_SRCDIR", ".")
PACKAGE = os.path.join(SRC, "client", "python")

sage.need_torch()
os.environ.setdefault("SAGEATTND_LIBRARY_PATH", os.path.abspath(os.path.join(sage.BUILD, ".libs")))
# Without compiled modules each of the many processes below would take seconds to start.
os.environ["PYTHONPYCACHEPREFIX"] = os.path.abspath(os.path.join(sage.BUILD, "python-cache"))
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ["PYTHONPATH"] = os.path.abspath(PACKAGE) + os.pathsep + os.environ.get("PYTHONPATH", "")
sys.path.insert(0, PACKAGE)

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import sageattnd
import sageattnd.integrations
import sageattnd.shim
from sageattnd import SageError, sageattn, sageattn_varlen
from sageattnd import scaled_dot_product_attention as ours

BOUNDS = {"auto": 0.03, "int8_fp16": 0.03, "int8_fp8": 0.06}  # relL1 against fp64
HALVES = (torch.float16, torch.bfloat16)


def inputs(b=2, hq=4, hkv=None, nq=100, nk=None, d=64, seed=1, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    hkv, nk = hkv or hq, nq if nk is None else nk
    return [torch.randn(s, generator=generator).to(dtype)
            for s in ((b, hq, nq, d), (b, hkv, nk, d), (b, hkv, nk, d))]


def nhd(t):
    return t.transpose(1, 2)


def error(o, wanted):
    return float((o.double() - wanted).abs().sum() / wanted.abs().sum())


def check(o, lse, q, k, v, variant="auto", **options):
    """o and lse of [B, H, N, D] against fp64."""
    wanted, wanted_lse = sage.reference(*(t.double().numpy() for t in (q, k, v)), **options)
    rel = error(o, torch.from_numpy(wanted))
    assert rel < BOUNDS[variant], f"relL1 {rel}"
    if lse is not None:
        off = np.abs(lse.numpy() - wanted_lse).max()
        assert lse.dtype == torch.float32 and off < 0.05, f"lse: off by {off}"


def same(a, b):
    """Of the same problem: every bit."""
    return all(torch.equal(x, y) for x, y in zip(a, b)) if isinstance(a, tuple) else \
        torch.equal(a, b)


# --- results ---

def test_accuracy():
    for i, (d, causal, variant) in enumerate((d, c, v) for d in (8, 64, 72, 128, 256)
                                             for c in (False, True)
                                             for v in ("int8_fp16", "int8_fp8")):
        q, k, v = inputs(hkv=(1, 2, 4)[i % 3], nq=50, nk=90, d=d, seed=i, dtype=HALVES[i % 2])
        o, lse = sageattn(q, k, v, is_causal=causal, return_lse=True, variant=variant)
        check(o, lse, q, k, v, variant, causal=causal)
        assert o.dtype == q.dtype and o.shape == q.shape
        o2, lse2 = sageattn(nhd(q), nhd(k), nhd(v), "NHD", causal, None, True, variant=variant)
        assert same((nhd(o2), lse2), (o, lse))


def test_views():
    """No copy of what can be read in place, and o in the order of q; the same results."""
    from sageattnd import _torch
    described, describe = [], _torch._describe
    _torch._describe = lambda t, layout: described.append(t) or describe(t, layout)
    try:
        views()
        fused = torch.randn(2, 50, 3, 4, 64, dtype=torch.bfloat16)
        del described[:]
        sageattn(*fused.unbind(2), "NHD")
        sageattn(*(nhd(t) for t in fused.unbind(2)))
    finally:
        _torch._describe = describe
    places = [t.data_ptr() for t in described if t is not None]
    assert [p - fused.data_ptr() for p in places if p in range(
        fused.data_ptr(), fused.data_ptr() + 2 * fused.numel())] == 2 * [0, 512, 1024], "copies"


def views():
    qkv = torch.randn(2, 50, 3, 4, 64, dtype=torch.bfloat16)
    q, k, v = qkv.unbind(2)
    wanted = sageattn(*(t.contiguous() for t in (q, k, v)), "NHD")
    assert same(sageattn(q, k, v, "NHD"), wanted)
    o = sageattn(nhd(q), nhd(k), nhd(v))
    assert same(nhd(o), wanted) and nhd(o).is_contiguous()
    turned = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in (q, k, v)]
    assert turned[0].stride(-1) != 1 and same(sageattn(*turned, "NHD"), wanted)
    one = k[:1].expand_as(k)
    assert same(sageattn(q, one, v, "NHD"), sageattn(q, one.clone(), v, "NHD"))
    before = [t.clone() for t in (q, k, v)]
    sageattn(q, k, v, "NHD")
    assert all(same(a, b) for a, b in zip(before, (q, k, v))), "inputs were written to"


def test_head_dim():
    for d in (1, 60, 77):
        q, k, v = inputs(d=d)
        o, lse = sageattn(q, k, v, return_lse=True)
        assert o.shape == q.shape
        check(o, lse, q, k, v)


def test_dtypes():
    """All are cast to bfloat16 if q is, else to float16, and o to q's type."""
    tensors = inputs(dtype=torch.float32)
    for kinds in itertools.product((torch.float32, *HALVES), repeat=3):
        case = [t.to(kind) for t, kind in zip(tensors, kinds)]
        kind = torch.bfloat16 if kinds[0] == torch.bfloat16 else torch.float16
        o = sageattn(*case)
        assert o.dtype == kinds[0] and same(o, sageattn(*(t.to(kind) for t in case)).to(o.dtype))


def test_masks():
    q, k, v = inputs(nq=33, nk=65)
    for shape in ((2, 4, 33, 65), (33, 65), (2, 1, 1, 65), (4, 33, 1), (1, 65)):
        seen = torch.rand(shape) > 0.3
        added = torch.randn(shape)
        for mask in (seen, added, added.bfloat16()):
            o, lse = sageattn(q, k, v, attn_mask=mask, return_lse=True)
            full = mask.expand(2, 4, 33, 65)
            full = full.numpy() if mask.dtype == torch.bool else full.double().numpy()
            if lse.isfinite().all():
                check(o, lse, q, k, v, mask=full)
            assert same(nhd(sageattn(nhd(q), nhd(k), nhd(v), "NHD", attn_mask=mask)), o)


def test_varlen():
    q, k, v = (nhd(t)[0] for t in inputs(b=1, hkv=2, nq=90, nk=120))
    ends_q, ends_k = [0, 20, 90], [0, 50, 120]
    for kind in (torch.int32, torch.int64):
        cu = [torch.tensor(ends, dtype=kind) for ends in (ends_q, ends_k)]
        o, lse = sageattn_varlen(q, k, v, *cu, 70, 70, True, return_lse=True)
        assert o.shape == q.shape and lse.shape == (4, 90)
        for i in range(2):
            a, b = slice(*ends_q[i:i + 2]), slice(*ends_k[i:i + 2])
            one = [nhd(t[None]) for t in (q[a], k[b], v[b])]
            check(nhd(o[a][None]), lse[None, :, a], *one, causal=True)
    with raises(ValueError, "cu_seqlens_q", "70"):
        sageattn_varlen(q, k, v, *cu, 69, 70)
    with raises(ValueError, "cu_seqlens_k"):
        sageattn_varlen(q, k, v, cu[0], cu[1].float())
    with raises(ValueError, "cu_seqlens_k", "2^31"):
        sageattn_varlen(q, k, v, cu[0], cu[1] + (1 << 32))
    assert same(sageattn_varlen(q, k, v, ends_q, ends_k, is_causal=True), o)


LENGTHS = [90, 7, 0]


def lengths_mask(nk, lengths=tuple(LENGTHS)):
    """[B, 1, 1, Nk]: what key_lengths stand for."""
    return (torch.arange(nk) < torch.tensor(lengths)[:, None])[:, None, None]


def test_key_lengths():
    """As by a mask, whatever lies behind the lengths, in every layout; o as [B, N, H, D]."""
    mask = lengths_mask(90)
    for i, (causal, variant) in enumerate((c, v) for c in (False, True)
                                          for v in ("int8_fp16", "int8_fp8")):
        q, k, v = inputs(b=3, hkv=2, nq=33, nk=90, seed=i)
        seen = mask.expand(3, 4, 33, 90).numpy()
        exact = [t.clone() for t in (q, k, v)]
        for t in (k, v):
            t.masked_fill_(~mask.transpose(-1, -2), float("nan"))
        o, lse = sageattn(q, k, v, is_causal=causal, return_lse=True, variant=variant,
                          key_lengths=LENGTHS)
        assert o.shape == q.shape and nhd(o).is_contiguous() and not o[2].any()
        assert lse.shape == q.shape[:3] and bool(lse[2].isneginf().all())
        check(o[:2], lse[:2], *(t[:2] for t in exact), variant, causal=causal, mask=seen[:2])
        lengths = torch.tensor(LENGTHS, dtype=torch.int32)
        for turned in ([nhd(t) for t in (q, k, v)], [nhd(t).contiguous() for t in (q, k, v)]):
            again = sageattn(*turned, "NHD", causal, return_lse=True, variant=variant,
                             key_lengths=lengths)
            assert same((nhd(again[0]), again[1]), (o, lse))
    q, k, v = inputs()
    whole = sageattn(q, k, v, return_lse=True)
    assert same(sageattn(q, k, v, return_lse=True, key_lengths=[100, 100]), whole)
    none = sageattn(q, k[:, :, :0], v[:, :, :0], key_lengths=[0, 0])
    assert none.shape == q.shape and not none.any()
    assert sageattn(*(t[:0] for t in (q, k, v)), key_lengths=[]).shape == (0, 4, 100, 64)
    mask = lengths_mask(100, (60, 100))
    o = ours(q, k, v, mask, strict=True, key_lengths=[60, 100])
    assert same(o, sageattn(q, k, v, key_lengths=[60, 100])) and not same(o, ours(q, k, v, mask))
    f = [t.float() for t in (q, k, v)]  # left to PyTorch, which reads the mask
    assert same(ours(*f, mask, key_lengths=[60, 100]), F.scaled_dot_product_attention(*f, mask))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a trace makes constant: nothing of the lengths
        traced = torch.jit.trace(lambda q, k, v, n: sageattn(q, k, v, key_lengths=n),
                                 (q, k, v, torch.tensor([60, 100])), check_trace=False)
    other = torch.tensor([7, 90])
    assert same(traced(q, k, v, other), sageattn(q, k, v, key_lengths=other))
    for words, case in ((("from 60 to 101", "between 0 and 100"), dict(key_lengths=[60, 101])),
                        (("from -1",), dict(key_lengths=torch.tensor([3, -1]))),
                        (("2 integers",), dict(key_lengths=[60])),
                        (("2 integers",), dict(key_lengths=[60.0, 1.0])),
                        (("attn_mask",), dict(key_lengths=[1, 2], attn_mask=mask))):
        with raises(ValueError, *words):
            sageattn(q, k, v, **case)
    with raises(ValueError, "key_lengths", "attn_mask"):  # PyTorch would see all keys
        ours(q, k, v, key_lengths=[60, 100])
    with raises(ValueError, "k, v: 2 and 1 batches"):
        sageattn(q, k, v[:1], key_lengths=[1, 2])
    many = [t[:1, :, :1].expand(2049, -1, -1, -1) for t in (q, k, v)]
    full = torch.ones(2049, 1, 1, 1, dtype=torch.bool)
    assert same(ours(*many, full, key_lengths=[1] * 2049), ours(*many, full))
    with raises(ValueError, "2049 batches", "2048"):
        sageattn(*(t[:1, :, :1].expand(2049, -1, -1, -1) for t in (q, k, v)),
                 key_lengths=[1] * 2049)


def test_refused():
    q, k, v = inputs()
    for kind, word, case in (
            (TypeError, "k: dtype torch.float64", (q, k.double(), v)),
            (ValueError, "q: shape", (q[0], k, v)),
            (TypeError, "v: ndarray", (q, k, v.float().numpy())),
            (ValueError, "attn_mask: on meta", (q, k, v, "HND", False, None, False, True,
                                                torch.ones(1, device="meta", dtype=torch.bool))),
            (ValueError, "k: shape (2, 4, 100, 62): D must be 61",
             (q[..., :61], k[..., :62], v[..., :61])),
            (SageError, "head", inputs(d=264)),
            (SageError, "k", (q, k[:, :3], v[:, :3]))):
        with raises(kind, word):
            sageattn(*case)
    with raises(ValueError, "attn_mask", "scaled_dot_product_attention"):
        sageattn(q, k, v, torch.ones(100, 100, dtype=torch.bool))


def test_gradient():
    """There is none: said, rather than a tensor that silently has no history."""
    q, k, v = inputs()
    k.requires_grad_()
    with raises(RuntimeError, "k requires a gradient", "no_grad"):
        sageattn(q, k, v)
    for without in (torch.no_grad(), torch.inference_mode()):
        with without:
            o = sageattn(q, k, v)
            assert not o.requires_grad and same(o, sageattn(q, k.detach(), v))
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(k.detach(), torch.ones_like(k))
        with raises(RuntimeError, "k requires a gradient"):
            sageattn(q, dual, v)
        with raises(ValueError, "gradient"):
            ours(q, dual, v, strict=True)
    if hasattr(torch, "func"):
        m, x = torch.ones(10, 10).bool(), torch.randn(1, 2, 2, 10, 16)

        def tangent(attention):
            try:
                return torch.func.jvp(torch.vmap(lambda t: attention(t, t, t, m)), (x,), (x,))[1]
            except NotImplementedError as refusal:  # by newer versions
                return torch.tensor(list(str(refusal).encode()))
        assert torch.allclose(tangent(ours), tangent(F.scaled_dot_product_attention))

        def outer(y):
            return torch.func.jvp(lambda z: sageattn(y, y, y) + z, (q,), (q,))[0]
        with raises(RuntimeError, "requires a gradient"):
            torch.func.jvp(outer, (q,), (q,))


# --- as an operator ---

def test_compile():
    """Whole graphs, equal to eager mode, also with sizes that change."""
    q, k, v = inputs()
    mask = torch.rand(100, 100) > 0.5
    cu = torch.tensor([0, 40, 100], dtype=torch.int32)

    def block(q, k, v):
        o = sageattn(2 * q, k, v, is_causal=True)
        return nhd(o).flatten(2) + 1

    def layouts(q, k, v):
        return sageattn(nhd(q), nhd(k), nhd(v), "NHD", return_lse=True, variant="int8_fp8")

    def padded(q, k, v):
        return sageattn(q[..., :60], k[..., :60], v[..., :60], attn_mask=mask)

    def varlen(q, k, v):
        return sageattn_varlen(*(nhd(t)[0] for t in (q, k, v)), cu, cu, 60, 60)

    def lengths(q, k, v):
        return sageattn(q, k, v, key_lengths=[60, 100]) + sageattn(q, k, v, key_lengths=cu[:2])

    def attention(q, k, v):
        return ours(q, k, v, is_causal=True) + F.scaled_dot_product_attention(q, k, v)

    for function in (block, layouts, padded, varlen, lengths, attention):
        with sageattnd.sdpa(strict=True), torch.inference_mode():
            compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
            assert same(compiled(q, k, v), function(q, k, v)), function.__name__
    dynamic = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (64, 100, 37):
        assert same(dynamic(*inputs(nq=n)), block(*inputs(nq=n)))


def test_meta():
    """Shapes, dtypes and strides without data, as the operator gives them with data."""
    for layout in ("HND", "NHD"):
        for t in (inputs(), [nhd(t) for t in inputs()]):
            o, lse = sageattn(*(x.to("meta") for x in t), layout, return_lse=True)
            real_o, real_lse = sageattn(*t, layout, return_lse=True)
            for a, b in ((o, real_o), (lse, real_lse)):
                assert a.is_meta and a.shape == b.shape and a.dtype == b.dtype
                assert a.stride() == b.stride()


def test_fake():
    """What was traced without data leaves nothing behind."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    q, k, v = inputs(nk=31)
    for lengths in ([7, 31], [30, 0]):
        with FakeTensorMode() as fake:
            o = sageattn(*map(fake.from_tensor, (q, k, v)), key_lengths=lengths)
            assert o.shape == q.shape and o.dtype == q.dtype
        o = sageattn(q, k, v, key_lengths=lengths)
        assert same(o, sageattn(q, k, v, key_lengths=torch.tensor(lengths)))


def test_opcheck():
    if not hasattr(torch.library, "opcheck"):
        raise sage.Skip("PyTorch before 2.4 has no torch.library.opcheck")
    q, k, v = inputs()
    torch.library.opcheck(torch.ops.sageattnd.attention.default, (
        q, k, v, None, None, None, None, None, "HND", True, 0.1, 1, True, False, True, 0, -1, -1,
        True, "inproc"))


def test_threads():
    t = inputs()
    wanted, wrong = sageattn(*t), []

    def work():
        try:
            wrong.extend("differs" for _ in range(50) if not same(sageattn(*t), wanted))
        except BaseException as error:
            wrong.append(error)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_daemon():
    """Also by a daemon, with every kind of tensor; the same bits."""
    q, k, v = inputs(hkv=2)
    cu = torch.tensor([0, 40, 100])
    with sage.Daemon() as daemon:
        os.environ["SAGEATTND_SOCKET"] = daemon.path
        for case in (dict(), dict(return_lse=True, is_causal=True),
                     dict(attn_mask=torch.rand(100, 100) > 0.5), dict(attn_mask=torch.randn(100))):
            wanted = sageattn(q, k, v, mode="inproc", **case)
            assert same(sageattn(q, k, v, mode="daemon", **case), wanted), case
            o = sageattn(nhd(q), nhd(k), nhd(v), "NHD", mode="daemon", **case)
            assert same(nhd(o[0] if isinstance(o, tuple) else o),
                        wanted[0] if isinstance(wanted, tuple) else wanted)
        flat = [nhd(t)[0] for t in (q, k, v)]
        assert same(sageattn_varlen(*flat, cu, cu, mode="daemon"), sageattn_varlen(*flat, cu, cu))
        assert same(sageattn(q, k, v, key_lengths=[9, 100], mode="daemon"),
                    sageattn(q, k, v, key_lengths=[9, 100]))
        assert not sageattn(q, k[:, :, :0], v[:, :, :0], mode="daemon").any()
        sage.until(lambda: daemon.stats()["done"] == 11, "11 jobs of the daemon")
        sageattnd.check_errors()
        sageattnd.close()


# --- in place of PyTorch's ---

class Named:
    """A connection's place, where there is no GPU."""

    def __init__(self, streams=()):
        self.streams, self.server, self.asked = streams, Named, []

    pid = 1

    def check_stream(self, stream):
        self.asked.append(stream)


def test_choice():
    """mode="auto": a GPU that was too busy to measure a hand-off on is looked at again later. And
    where this process computes by itself it asks for the errors of the stream's earlier jobs."""
    from unittest import mock

    from sageattnd import _client, _daemon, _native
    there, now, measures = Named([5]), [100.0], [(1e-3, None), (1e-5, 1e12)]
    shape = (_native.F16, 0, 0, 0, 1, 1, 4096, 64, 0, 0, 64, 1)  # 4.3e9 operations
    problem = _native.pack(*4 * [shape], _native.ABSENT, _native.ABSENT,
                           _native.Options(False, 0.0, 1, True, False, False, 0, -1, -1))
    capturing, current = [False], Named()
    with mock.patch.object(_daemon, "_connect", lambda device: there), \
            mock.patch.object(_daemon, "_measure", lambda *_: measures.pop(0)), \
            mock.patch.object(_daemon.time, "monotonic", lambda: now[0]), \
            mock.patch.dict(_daemon._choices), mock.patch.dict(_client._connections, {7: there}), \
            mock.patch.object(torch.cuda, "device", lambda device: contextlib.nullcontext()), \
            mock.patch.object(torch.cuda, "current_stream", lambda: current), \
            mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: capturing[0]):
        for wanted, later in ((None, 9), (None, 2), (there, 1e6), (there, 0)):
            assert _daemon.choose(problem, 7, "auto") is wanted, now
            now[0] += later
        assert not measures
        for device, current.cuda_stream, capturing[0] in (
                (7, 5, False), (7, 6, False), (8, 5, False), (7, 5, True)):
            _daemon.check_stream(device)
    assert there.asked == [5]


def test_streams_gone():
    """One that the driver does not know any more is said once; the others are asked, too."""
    from sageattnd import _client, _native
    connection = _client.Connection.__new__(_client.Connection)
    connection.lock, connection.streams, asked = threading.Lock(), {1: None, 2: None}, []

    def check_stream(stream):
        asked.append(stream)
        if stream == 1:
            raise SageError(_native.EINVAL, "stream: the driver refused it")

    connection.check_stream = check_stream
    with raises(SageError, "SAGE_EINVAL", "stream"):
        connection.check()
    connection.check()
    assert asked == [1, 2, 2]


def test_sdpa():
    """PyTorch's meaning of each argument."""
    q, k, v = inputs(nq=66, nk=70)
    one = [t[0] for t in (q, k, v)]
    before = sageattnd.fallbacks()
    for tensors, case in (((q, k, v), {}), ((q, k, v), dict(is_causal=True)),
                          ((q, k, v), dict(scale=0.2)), (one, dict(is_causal=True)),
                          ((q, k, v), dict(attn_mask=torch.randn(2, 4, 66, 70).bfloat16())),
                          ((q, k, v), dict(attn_mask=torch.rand(66, 70) > 0.3)),
                          (one, dict(attn_mask=torch.rand(66, 70) > 0.3)),
                          ([t[..., :36] for t in (q, k, v)], {})):
        mask = case.get("attn_mask")
        exact = {**case, "attn_mask": mask.double()} if mask is not None and \
            mask.is_floating_point() else case
        wanted = F.scaled_dot_product_attention(*(t.double() for t in tensors), **exact)
        o = ours(*tensors, strict=True, **case)
        assert o.shape == wanted.shape and error(o, wanted) < BOUNDS["auto"], case
    turned = ours(q, k, v, strict=True, rotate_qk=True)
    assert same(turned, sageattn(q, k, v, rotate_qk=True)) and not same(turned, sageattn(q, k, v))
    assert sageattnd.fallbacks() == before


class Log:
    """What is logged within the block."""

    def __enter__(self):
        import logging
        self.lines, log = [], self
        self.handler = logging.Handler()
        self.handler.emit = lambda record: log.lines.append(record.getMessage())
        logging.getLogger("sageattnd").addHandler(self.handler)
        return self.lines

    def __exit__(self, *_):
        import logging
        logging.getLogger("sageattnd").removeHandler(self.handler)


def test_fallbacks():
    """What the kernels cannot do is PyTorch's, bit for bit, counted, and said once."""
    q, k, v = inputs()
    f = [t.float() for t in (q, k, v)]
    wide = inputs(d=264)
    for reason, tensors, case in (
            ("dropout", (q, k, v), dict(dropout_p=0.5)),
            ("gradient", [q, k.clone().requires_grad_(), v], {}),
            ("dtype float32", f, {}), ("dtype float64", [t.double() for t in f], {}),
            ("head_dim above 256", wide, {}), ("head_dim differs", (q, k, v[..., :32]), {}),
            ("number of dimensions", [t[:, None] for t in (q, k, v)], {}),
            ("attn_mask", (q, k, v), dict(attn_mask=torch.zeros(100, 100), is_causal=True)),
            ("scale", (q, k, v), dict(scale=-0.1)), ("scale", (q, k, v), dict(scale=1e-39)),
            ("heads differ", (q, k[:, :1], v[:, :1]), {})):
        count = sageattnd.fallbacks().get(reason, 0)
        with Log() as lines:
            for _ in range(2):
                torch.manual_seed(7)
                try:
                    o = ours(*tensors, **case)
                except RuntimeError as refusal:
                    o = refusal
                torch.manual_seed(7)
                try:
                    wanted = F.scaled_dot_product_attention(*tensors, **case)
                except RuntimeError as refusal:
                    wanted = refusal
                assert str(o) == str(wanted) if isinstance(wanted, Exception) else same(o, wanted)
        assert sageattnd.fallbacks()[reason] == count + 2, reason
        assert len(lines) == (1 if count == 0 else 0) and all(reason in line for line in lines)
        with raises(ValueError, reason):
            ours(*tensors, strict=True, **case)


def test_no_heads():
    """PyTorch's own divides by them, in some versions."""
    q, k, v = (t[:, :0] for t in inputs(nk=70))
    assert ours(q, k, v, strict=True).shape == q.shape
    assert ours(q[0], k[0], v[0], strict=True).shape == q[0].shape


def test_fallback_gqa():
    """Also by a PyTorch whose function has no enable_gqa."""
    q, k, v = (t.float() for t in inputs(hkv=2))
    wanted = F.scaled_dot_product_attention(q, *(t.repeat_interleave(2, 1) for t in (k, v)))
    assert torch.allclose(ours(q, k, v, enable_gqa=True), wanted, atol=1e-5)


def test_autocast():
    if not hasattr(torch, "get_autocast_dtype"):
        raise sage.Skip("PyTorch before 2.4 does not cast for it on the CPU")
    q, k, v = inputs(dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for tensors in ((q, k, v), [t.float() for t in (q, k, v)]):
            o, wanted = ours(*tensors, strict=True), F.scaled_dot_product_attention(*tensors)
            assert o.dtype == wanted.dtype == torch.bfloat16
            assert error(o, wanted.double()) < BOUNDS["auto"]


class UpperLeft(torch.Tensor):
    """A bias that is no tensor of numbers, as PyTorch's torch.nn.attention.bias.CausalBias."""

    __module__ = "torch.nn.attention.bias"

    @classmethod
    def __torch_function__(cls, function, types, args=(), keys=None):
        if function is not F.scaled_dot_product_attention:
            raise NotImplementedError
        return F.scaled_dot_product_attention(*args[:3], None, **{**keys, "is_causal": True})


class Twice(torch.Tensor):
    """Knows PyTorch's functions, as its nested tensors do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), keys=None):
        with torch._C.DisableTorchFunctionSubclass() if hasattr(
                torch._C, "DisableTorchFunctionSubclass") else torch._C.DisableTorchFunction():
            o = function(*args, **(keys or {}))
        return 2 * o if function is PYTORCH else o


class Own(torch.Tensor):
    """Without one: it is what comes out, too."""


PYTORCH = F.scaled_dot_product_attention


def test_torch_function():
    """Who has a meaning of its own keeps it, by PyTorch's function, which is said; a bias in a
    block by ours."""
    q, k, v = inputs()
    bias = UpperLeft(100, 100)
    with sageattnd.sdpa(strict=True):
        o = F.scaled_dot_product_attention(q, k, v, bias)
        assert same(o, sageattn(q, k, v, is_causal=True))
        own = F.scaled_dot_product_attention(q.as_subclass(Own), k, v)
        assert type(own) is Own and same(own.as_subclass(torch.Tensor), sageattn(q, k, v))
        with raises(ValueError, "__torch_function__ of Twice"):
            F.scaled_dot_product_attention(q.as_subclass(Twice), k, v)
    own = ours(q.as_subclass(Own), k, v, rotate_qk=True)
    assert same(own.as_subclass(torch.Tensor), sageattn(q, k, v, rotate_qk=True))
    with raises(ValueError, "dtype float32"):
        ours(q.float().as_subclass(Own), k.float(), v.float(), strict=True)
    with sageattnd.sdpa():
        assert same(F.scaled_dot_product_attention(q.as_subclass(Twice), k, v),
                    2 * PYTORCH(q, k, v))
    with sageattnd.sdpa():
        late = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = lambda *args, **keys: late(*args, **keys)
        o = F.scaled_dot_product_attention(q, k, v, bias)
        assert same(o, sageattn(q, k, v, is_causal=True))
    F.scaled_dot_product_attention = PYTORCH
    assert same(ours(q, k, v, bias), PYTORCH(q, k, v, is_causal=True))
    assert sageattnd.fallbacks()["__torch_function__ of UpperLeft"] == 1
    with raises(ValueError, "__torch_function__ of UpperLeft"):
        ours(q, k, v, bias, strict=True)


def test_modes():
    """A mode, as default devices are, says nothing of the tensors."""
    q, k, v = inputs()
    with torch.device("cpu"), sageattnd.sdpa(strict=True):
        assert same(ours(q, k, v, strict=True, rotate_qk=True), sageattn(q, k, v, rotate_qk=True))
        assert same(F.scaled_dot_product_attention(q, k, v), sageattn(q, k, v))
        own = ours(q.as_subclass(Own), k, v, strict=True)
        assert type(own) is Own and same(own.as_subclass(torch.Tensor), sageattn(q, k, v))

    class Sharded(torch.overrides.TorchFunctionMode):
        seen = 0

        def __torch_function__(self, function, types, args=(), keys=None):
            Sharded.seen += function is F.scaled_dot_product_attention
            return function(*args, **(keys or {}))

    with Sharded(), sageattnd.sdpa(strict=True):
        assert same(F.scaled_dot_product_attention(q, k, v), sageattn(q, k, v))
    assert Sharded.seen == 1
    with sageattnd.sdpa(strict=True):
        graph = torch.fx.symbolic_trace(lambda q, k, v: F.scaled_dot_product_attention(q, k, v))
        assert same(graph(q, k, v), sageattn(q, k, v))


def test_nested():
    rows = [torch.randn(n, 32) for n in (5, 9)]
    try:
        x = torch.nested.nested_tensor(rows, layout=torch.jagged)
        x = x.unflatten(-1, (2, 16)).transpose(1, 2)
        wanted = PYTORCH(x, x, x)
    except (RuntimeError, AttributeError, TypeError) as reason:
        raise sage.Skip(f"not by this PyTorch: {reason}")
    with sageattnd.sdpa():
        o = F.scaled_dot_product_attention(x, x, x)
    assert type(o) is type(wanted) and same(o.values(), wanted.values())


def test_sdpa_context():
    q, k, v = inputs()
    before = F.scaled_dot_product_attention
    with sageattnd.sdpa(variant="int8_fp8"):
        assert same(F.scaled_dot_product_attention(q, k, v), sageattn(q, k, v, variant="int8_fp8"))
        with sageattnd.sdpa(strict=True, rotate_qk=True):
            assert same(F.scaled_dot_product_attention(q, k, v), sageattn(q, k, v, rotate_qk=True))
            with raises(ValueError, "dtype float32"):
                F.scaled_dot_product_attention(q.float(), k.float(), v.float())
        f = [t.float() for t in (q, k, v)]
        assert same(F.scaled_dot_product_attention(*f), before(*f))
    assert F.scaled_dot_product_attention is before
    with Log() as lines, sageattnd.sdpa():
        F.scaled_dot_product_attention = other = functools.partial(before)
    assert F.scaled_dot_product_attention is other and "replaced" in lines[0]
    with sageattnd.sdpa():
        pass
    assert F.scaled_dot_product_attention is other
    F.scaled_dot_product_attention = before
    with sageattnd.sdpa(strict=True):
        late = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = other
        with sageattnd.sdpa():
            pass
        assert F.scaled_dot_product_attention is other
    F.scaled_dot_product_attention = late  # by who found it there, too late
    assert same(F.scaled_dot_product_attention(*f), before(*f))
    F.scaled_dot_product_attention = before
    for _ in range(1000):  # they do not become a chain
        with sageattnd.sdpa():
            late = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = late
    assert same(F.scaled_dot_product_attention(*f), before(*f))
    F.scaled_dot_product_attention = before
    first, second = sageattnd.sdpa(), sageattnd.sdpa(strict=True)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with raises(ValueError, "dtype float32"):
        F.scaled_dot_product_attention(*f)
    second.__exit__(None, None, None)
    assert F.scaled_dot_product_attention is before
    try:
        with sageattnd.sdpa():
            raise KeyError
    except KeyError:
        pass
    assert F.scaled_dot_product_attention is before
    attention = torch.nn.MultiheadAttention(64, 4, batch_first=True).bfloat16()
    x = torch.randn(2, 50, 64).bfloat16()
    with torch.no_grad():
        wanted = attention(x, x, x, need_weights=False)[0]
        # in training mode: the fused path of eval() would not call F
        with sageattnd.sdpa(strict=True):
            o = attention(x, x, x, need_weights=False)[0]
    assert not same(o, wanted) and error(o, wanted.double()) < 0.05, error(o, wanted.double())


# --- in place of sageattention ---

def test_shim():
    """Not by accident; then as programs look for it: by import, specification, version."""
    import importlib.metadata
    assert importlib.util.find_spec("sageattention") is None
    sageattnd.shim.install()
    sageattnd.shim.install()
    try:
        import inspect
        import sageattention
        from sageattention import sageattn as theirs
        from sageattention.core import sageattn_varlen as varlen
        assert theirs is sageattn and varlen is sageattn_varlen
        assert importlib.util.find_spec("sageattention") is not None
        assert importlib.metadata.version("sageattention") == sageattention.__version__ == "2.2.0"
        assert importlib.metadata.version("numpy") == np.__version__
        assert "attn_mask" in inspect.signature(theirs).parameters
        for name in sageattnd.shim.NAMES:
            assert callable(getattr(sageattention, name))
    finally:
        sageattnd.shim.uninstall()
    assert importlib.util.find_spec("sageattention") is None
    sys.modules["sageattention"] = real = type(sys)("sageattention")
    real.__spec__ = importlib.machinery.ModuleSpec("sageattention", None)
    with raises(RuntimeError, "replace=True"):
        sageattnd.shim.install()
    sageattnd.shim.install(replace=True)
    sageattnd.shim.uninstall()


def test_upstream_calls():
    """Every call of SageAttention's README (1.0.6 and 2.2.0) and examples, and those of ComfyUI, as
    written there."""
    sageattnd.shim.install()
    try:
        calls()
    finally:
        sageattnd.shim.uninstall()


def calls():
    from functools import partial

    import sageattention
    from sageattention import sageattn, sageattn_qk_int8_pv_fp16_cuda
    from sageattention import sageattn_qk_int8_pv_fp16_triton, sageattn_qk_int8_pv_fp8_cuda
    from sageattention import sageattn_qk_int8_pv_fp8_cuda_sm90, sageattn_varlen
    from sageattention.fa3_wrapper import fa3, fa3_fp8
    q, k, v = inputs()
    flat, cu = [nhd(t).flatten(0, 1) for t in (q, k, v)], torch.tensor([0, 100, 200])
    scale, pytorch = 0.125, F.scaled_dot_product_attention
    results = [
        (sageattn(q, k, v, tensor_layout="HND", is_causal=False, smooth_k=True), 0),
        (sageattn(q, k, v, tensor_layout="HND", is_causal=False), 0),
        (sageattn(q, k, v, is_causal=True), 1),
        (sageattn(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False), 0),
        (sageattn(q, k, v, is_causal=False, tensor_layout="HND", sm_scale=None, smooth_k=False), 0),
        (nhd(sageattn(nhd(q), nhd(k), nhd(v), attn_mask=None, dropout_p=0.0, is_causal=False,
                      tensor_layout="NHD")), 0),
        (sageattn(q, k, v, attn_mask=torch.zeros(2, 1, 1, 100).bfloat16(), is_causal=False,
                  tensor_layout="HND"), 0),
        (sageattn(q=q, k=k, v=v, tensor_layout="HND", is_causal=True, sm_scale=scale,
                  return_lse=True)[0], 1),
        (sageattn_qk_int8_pv_fp16_cuda(q, k, v, tensor_layout="HND", is_causal=True,
                                       qk_quant_gran="per_warp", pv_accum_dtype="fp32"), 1),
        (sageattn_qk_int8_pv_fp16_triton(q, k, v, tensor_layout="HND", is_causal=False,
                                         quantization_backend="cuda"), 0),
        (sageattn_qk_int8_pv_fp8_cuda(q, k, v, tensor_layout="HND", is_causal=True,
                                      qk_quant_gran="per_thread", pv_accum_dtype="fp32+fp16"), 1),
        (sageattn_qk_int8_pv_fp8_cuda_sm90(q, k, v, tensor_layout="HND", is_causal=False,
                                           sm_scale=scale, pv_accum_dtype="fp32+fp32"), 0),
        (nhd(sageattn_varlen(*flat, cu, cu, 100, 100, is_causal=True).unflatten(0, (2, 100))), 1)]
    few = sageattn(q[:, :, :7], k, v, is_causal=False)  # a model's attention to a prompt
    assert error(few, pytorch(q[:, :, :7].double(), k.double(), v.double())) < BOUNDS["int8_fp8"]
    for other in (fa3, fa3_fp8):
        with raises(NotImplementedError, "fa3_wrapper", "FlashAttention-3"):
            other(q, k, v, is_causal=False)
    try:
        F.scaled_dot_product_attention = sageattn
        with sageattnd.sdpa():  # what it leaves to PyTorch goes there, not to what F had
            assert F.scaled_dot_product_attention(*(t.double() for t in (q, k, v))).isfinite().all()
        results.append((F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0,
                                                       is_causal=False), 0))
        for function, pv in ((sageattention.sageattn_qk_int8_pv_fp16_cuda, "fp32"),
                             (sageattention.sageattn_qk_int8_pv_fp8_cuda, "fp32+fp32")):
            F.scaled_dot_product_attention = partial(function, pv_accum_dtype=pv)
            results.append((F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0,
                                                           is_causal=False), 0))
    finally:
        F.scaled_dot_product_attention = pytorch
    wanted = [pytorch(q.double(), k.double(), v.double(), is_causal=c) for c in (False, True)]
    for i, (o, causal) in enumerate(results):
        assert error(o, wanted[causal]) < BOUNDS["int8_fp8"], f"call {i}"


# --- in other packages ---

def needs(*packages):
    for package in packages:
        if not importlib.util.find_spec(package):
            raise sage.Skip(f"no {package}")


def test_transformers():
    """A small language model: logits, and what it generates after a padded prompt."""
    needs("transformers")
    import transformers
    sageattnd.integrations.transformers(strict=True)
    torch.manual_seed(1)
    config = transformers.LlamaConfig(vocab_size=128, hidden_size=256, intermediate_size=256,
                                      num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, max_position_embeddings=128)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    tokens = torch.randint(128, (2, 20))
    seen = torch.ones_like(tokens)
    seen[0, :5] = 0
    logits, answers = {}, {}
    with torch.no_grad():
        for name in ("sdpa", "sageattnd"):
            model.config._attn_implementation = name  # set_attn_implementation(), from 4.54 on
            whole = model(tokens).logits
            padded = model(tokens, attention_mask=seen).logits
            assert not torch.equal(padded[0, -1], whole[0, -1]), "the mask is not seen"
            logits[name] = torch.cat((whole, padded[:, 5:]), 1)
            answers[name] = model.generate(tokens, attention_mask=seen, max_new_tokens=8,
                                           do_sample=False, pad_token_id=0)
    rel = error(logits["sageattnd"], logits["sdpa"].double())
    assert not torch.equal(logits["sageattnd"], logits["sdpa"]) and rel < 0.02, rel
    assert answers["sageattnd"].shape == answers["sdpa"].shape
    q, k, v = inputs()
    forward = transformers.AttentionInterface()["sageattnd"]
    o = forward(torch.nn.Module(), q, k, v, None, is_causal=False)[0]
    assert same(o.transpose(1, 2), sageattn(q, k, v, rotate_qk=True))


def test_transformers_lengths():
    """An encoder's batch that is filled up at the ends is computed by lengths; others by mask."""
    needs("transformers")
    import transformers
    from transformers import masking_utils
    if not hasattr(masking_utils, "bidirectional_mask_function"):
        raise sage.Skip("transformers before 5.0 makes encoders' masks elsewhere")
    sageattnd.integrations.transformers(strict=True)
    torch.manual_seed(1)
    model = transformers.BertModel(transformers.BertConfig(
        vocab_size=128, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=64)).to(torch.bfloat16).eval()
    tokens, seen = torch.randint(128, (3, 40)), torch.ones(3, 40, dtype=torch.long)
    seen[0, 30:] = seen[1, 4:] = 0
    holes = seen.clone()
    holes[0, 3] = 0
    lengths = []

    def spy(query, key, value, mask, *args, key_lengths, **keys):
        lengths.append(None if key_lengths is None else key_lengths.tolist())
        return ours(query, key, value, mask, *args, key_lengths=key_lengths, **keys)

    def changed(query, key, value, mask, *args, **keys):
        mask[0, :, :, 0] = False  # as a model might: the note is void in the second layer
        return spy(query, key, value, mask, *args, **keys)
    module = sys.modules["sageattnd._sdpa"]
    for without in (torch.no_grad, torch.inference_mode):
        for mask, wanted, function in ((seen, [[30, 4, 40]] * 2, spy), (holes, [None] * 2, spy),
                                       (torch.ones_like(seen), [None] * 2, spy),
                                       (seen, [[30, 4, 40], None], changed)):
            module.scaled_dot_product_attention = function
            try:
                sageattnd.integrations.transformers(strict=True)
            finally:
                module.scaled_dot_product_attention = ours
            results, lengths[:] = {}, []
            with without():
                for name in ("sdpa", "sageattnd"):
                    model.set_attn_implementation(name)
                    results[name] = model(tokens, attention_mask=mask).last_hidden_state
            assert lengths == wanted, lengths
            rel = error(results["sageattnd"], results["sdpa"].double())
            assert function is changed or 0 < rel < 0.02, rel


def test_noted_lengths():
    """Of a mask, not of every one that comes after it in what is traced."""
    mask, key = torch.ones(2, 1, 7, 9).bool(), torch.randn(2, 4, 9, 16)
    mask.sageattnd_lengths = mask._version, torch.tensor([5, 9])
    noted = []

    def look(key):
        noted.append(sageattnd.integrations._noted_lengths(mask, key))
        return key + 1

    look(key)
    torch.jit.trace(look, key, check_trace=False)
    mask[0] = False
    look(key)
    assert noted[0] is not None and noted[1:] == [None, None]


DIFFUSERS = """
import sageattnd, torch
sageattnd.integrations.diffusers()
from diffusers.models import attention_dispatch as d
q, k, v = (torch.randn(2, 50, 4, 64).bfloat16() for _ in range(3))
wanted = torch.nn.functional.scaled_dot_product_attention(
    *(t.transpose(1, 2).double() for t in (q, k, v))).transpose(1, 2)
for name in ("sage", "sage_varlen", "_sage_qk_int8_pv_fp16_triton"):
    with d.attention_backend(name):
        o = d.dispatch_attention_fn(q, k, v)
    error = float((o - wanted).abs().sum() / wanted.abs().sum())
    assert o.shape == q.shape and 0.001 < error < 0.03, (name, error)
try:
    sageattnd.integrations.diffusers()
except RuntimeError as error:
    print(error)
"""


def test_diffusers():
    needs("diffusers")
    done = subprocess.run([sys.executable, "-c", DIFFUSERS], universal_newlines=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0 and "has been imported" in done.stdout, done.stdout


RANKS_SECONDS = 200


def test_ranks():
    """The example: ring and Ulysses attention on two ranks, in the environment that torchrun makes.

    Its store is open before they start: torchrun picks a port, closes it, and has a rank open it.
    """
    example, ranks = os.path.join(PACKAGE, "examples", "sequence_parallel.py"), 2
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1",
           "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": str(store.port), "WORLD_SIZE": str(ranks),
           "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    with tempfile.TemporaryFile("w+") as log:
        processes = [subprocess.Popen([sys.executable, example, "--tokens=512"], stdout=log,
                                      stderr=subprocess.STDOUT,
                                      env={**env, "RANK": str(i), "LOCAL_RANK": str(i)})
                     for i in range(ranks)]

        end = time.monotonic() + RANKS_SECONDS
        codes = [None]
        while None in codes and not any(codes) and time.monotonic() < end:
            time.sleep(0.05)  # until all have ended, or one has failed: the others wait for it
            codes = [p.poll() for p in processes]
        for process in processes:
            process.send_signal(signal.SIGABRT)  # who still runs says where
            process.wait()
        log.seek(0)
        said = log.read()
    assert codes == [0] * ranks and "causal: relL1" in said, \
        f"exit statuses {codes}; None: not within {RANKS_SECONDS} s. They said:\n{said}"


def test_documents():
    """The Python of README.md and docs/python.md runs, block after block."""
    needs("transformers", "diffusers")
    for name, least in (("README.md", 1), ("docs/python.md", 6)):
        with open(os.path.join(SRC, name)) as page:
            blocks = [b.split("```")[0] for b in page.read().split("```python\n")[1:]]
        assert len(blocks) >= least, name
        done = subprocess.run([sys.executable, "-c", "\n".join(blocks)], universal_newlines=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, f"{name}: {done.stdout}"


if __name__ == "__main__":
    os.environ.pop("SAGEATTND_RUN", None)
    sage.run(globals(), limit=300)
