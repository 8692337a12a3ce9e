#!/usr/bin/env python3
"""The package sageattnd with PyTorch on a GPU: in this process and by a daemon, streams, graphs,
torch.compile(), allocators, memory that is nearly full, fork, threads, errors, two processes.

    gpu_python.py [TEST...]

Each test is a process of its own or two, for PyTorch's allocator is chosen by the environment.
"""
import contextlib
import os
import shutil
import sys
import sysconfig
import threading
import time

import sage
from gpu_daemon import Child, daemon, main, run_child, say

SLEEP_CYCLES = 600_000_000  # some 0.35 s of torch.cuda._sleep() on an H100


def package(socket=None):
    """PyTorch, sageattnd and what the tests on the CPU have."""
    import importlib.util
    if not importlib.util.find_spec("torch"):
        raise sage.Skip("no PyTorch")
    if socket:
        os.environ["SAGEATTND_SOCKET"] = socket
    import python_torch
    import torch
    torch.cuda.init()
    return torch, python_torch.sageattnd, python_torch


def cuda(tensors):
    return [t.cuda() for t in tensors]


def near(torch, o, q, k, v, causal=False):
    """relL1 to double precision."""
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q.double(), *(t.double().repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v)),
        is_causal=causal)
    return ((o.double() - wanted).abs().sum() / wanted.abs().sum()).item()


def cost(torch, work, n=300):
    """Microseconds that a call takes of this thread; the stream never has more than 30 to do."""
    times = []
    for i in range(n):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
        if i % 30 == 29:
            torch.cuda.synchronize()
    return sorted(times)[n // 2] * 1e6


# --- children ---

def problems(torch, s, t, mode):
    """Every kind of call against fp64; the results, the same every time."""
    torch.manual_seed(1)
    results = []
    for i, (d, variant) in enumerate((d, v) for d in (64, 72, 128, 256)
                                     for v in ("int8_fp16", "int8_fp8")):
        q, k, v = t.inputs(hkv=2, nq=150, nk=300, d=d, seed=i, dtype=t.HALVES[i % 2])
        g = cuda((q, k, v))
        for causal in (False, True):
            o, lse = s.sageattn(*g, is_causal=causal, return_lse=True, variant=variant, mode=mode)
            t.check(o.cpu(), lse.cpu(), q, k, v, variant, causal=causal)
            turned = s.sageattn(*(x.transpose(1, 2) for x in g), "NHD", causal, variant=variant,
                                mode=mode)
            assert torch.equal(turned.transpose(1, 2), o)
            results.append(o)
    q, k, v = t.inputs(nq=150, nk=300)
    g = cuda((q, k, v))
    for mask in (torch.rand(150, 300) > 0.3, torch.randn(2, 1, 150, 300)):
        o = s.sageattn(*g, attn_mask=mask.cuda(), mode=mode)
        full = mask.expand(2, 4, 150, 300)
        t.check(o.cpu(), None, q, k, v,
                mask=full.numpy() if mask.dtype == torch.bool else full.double().numpy())
        results.append(o)
    flat = [x.transpose(1, 2).flatten(0, 1) for x in g]
    cu = [torch.tensor([0, n, 2 * n], device="cuda", dtype=torch.int32) for n in (150, 300)]
    o = s.sageattn_varlen(*flat, *cu, 150, 300, mode=mode)
    results.append(o.unflatten(0, (2, 150)).transpose(1, 2))
    t.check(results[-1].cpu(), None, q, k, v)
    for nq, bound in ((59, 0.004), (150, 0.03)):  # few rows are not quantised
        q, k, v = t.inputs(b=3, nq=nq, nk=90, d=32)
        seen = t.lengths_mask(90)
        wanted = torch.nn.functional.scaled_dot_product_attention(
            *(x.double() for x in (q, k, v)), seen).nan_to_num()
        for x in (k, v):
            x.masked_fill_(~seen.transpose(-1, -2), float("nan"))
        o = s.sageattn(*cuda((q, k, v)), key_lengths=t.LENGTHS, mode=mode)
        assert t.error(o.cpu(), wanted) < bound
        results.append(o)
    qkv = torch.randn(2, 200, 3, 4, 64, device="cuda", dtype=torch.float16)
    fused = qkv.unbind(2)
    o = s.sageattn(*fused, "NHD", mode=mode)
    assert torch.equal(o, s.sageattn(*(x.contiguous() for x in fused), "NHD", mode=mode))
    o = s.sageattn(*(x[..., :60].float() for x in fused), "NHD", mode=mode)
    assert o.dtype == torch.float32 and o.shape[-1] == 60
    return results


def stream_order(torch, s, mode):
    """The job takes its place in the current stream, and memory is reused as PyTorch does it."""
    source, k, v = (torch.randn(1, 8, 2048, 64, device="cuda", dtype=torch.float16)
                    for _ in range(3))
    wanted = s.sageattn(source, k, v, mode=mode)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    for _ in range(3):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SLEEP_CYCLES // 4)
            outs = []
            for _ in range(20):  # q, o and workspaces go, and come again, while the stream waits
                q = torch.full_like(source, float("nan"))
                q.copy_(source)
                outs.append(s.sageattn(q, k, v, mode=mode) * 1)
                del q
        stream.synchronize()
        assert all(torch.equal(o, wanted) for o in outs)


def child_inproc():
    torch, s, t = package()
    problems(torch, s, t, "inproc")
    stream_order(torch, s, "inproc")
    q, k, v = (torch.randn(1, 8, 1024, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    o = s.sageattn(q, k, v)  # auto, and there is no daemon

    graph, static = torch.cuda.CUDAGraph(), torch.empty_like(o)
    with torch.cuda.graph(graph):
        static.copy_(s.sageattn(q, k, v))
    for seed in range(3):
        q.copy_(torch.randn_like(q))
        graph.replay()
        assert torch.equal(static, s.sageattn(q, k, v)), "a graph's result differs"

    before = s.fallbacks()
    with s.sdpa():
        f = torch.nn.functional.scaled_dot_product_attention
        assert torch.equal(f(q, k, v, is_causal=True), s.sageattn(q, k, v, is_causal=True))
        with torch.autocast("cuda", torch.float16):
            assert torch.equal(f(q.float(), k.float(), v.float()), s.sageattn(q, k, v))
        assert s.fallbacks() == before
        f(q.float(), k.float(), v.float())
        f(q, k, v, dropout_p=0.1)
    assert s.fallbacks()["dtype float32"] and s.fallbacks()["dropout"]
    with t.raises(s.SageError, "SAGE_ENODAEMON"):
        s.sageattn(q, k, v, mode="daemon")
    x = [torch.randn(1, 1, 64, 64, device="cuda", dtype=torch.float16) for _ in range(3)]
    with torch.inference_mode():
        say(torch=torch.__version__, call_us=cost(torch, lambda: s.sageattn(*x)),
            sdpa_us=cost(torch, lambda: torch.nn.functional.scaled_dot_product_attention(*x)))


def child_compile():
    """A block as one graph, by the real backend where there is a compiler for it."""
    torch, s, t = package()
    include = sysconfig.get_path("include")
    backend = "inductor" if (shutil.which("gcc") or shutil.which("cc")) and os.path.exists(
        os.path.join(include, "Python.h")) else "aot_eager"

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = torch.nn.Linear(256, 768), torch.nn.Linear(256, 256)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 64)).unbind(2)
            o = s.sageattn(q, k, v, "NHD", is_causal=True)
            p = torch.nn.functional.scaled_dot_product_attention(
                *(y.transpose(1, 2) for y in (q, k, v)))
            o = torch.nn.functional.gelu(o) + p.transpose(1, 2)
            return x + self.out(o.flatten(2))

    torch.manual_seed(1)
    block = Block().cuda().half()
    with torch.inference_mode(), s.sdpa(strict=True):
        compiled = torch.compile(block, fullgraph=True, backend=backend)
        for n in (256, 512, 384):
            x = torch.randn(2, n, 256, device="cuda", dtype=torch.float16)
            a, b = compiled(x), block(x)
            error = ((a - b).abs().sum() / b.abs().sum()).item()
            assert error < 0.01, f"{backend}, {n} tokens: off by {error}"
    say(backend=backend)


def child_daemon(socket):
    torch, s, t = package(socket)
    here = problems(torch, s, t, "inproc")
    there = problems(torch, s, t, "daemon")
    worst = max(((a.float() - b.float()).abs().sum() / a.float().abs().sum()).item()
                for a, b in zip(here, there))
    assert worst < 0.001, f"daemon and process differ by {worst}"
    stream_order(torch, s, "daemon")
    q, k, v = (torch.randn(1, 8, 1024, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    wanted = s.sageattn(q, k, v, mode="daemon")

    graph, static = torch.cuda.CUDAGraph(), torch.empty_like(wanted)
    with torch.cuda.graph(graph):
        with t.raises(s.SageError, "SAGE_ECAPTURE", "mode: 'daemon'"):
            s.sageattn(q, k, v, mode="daemon")
        static.copy_(wanted)
    graph.replay()
    assert torch.equal(static, wanted), "the refusal spoilt the graph"

    wrong = []

    def work():
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(30):
                    if not torch.equal(s.sageattn(q, k, v, mode="daemon"), wanted):
                        wrong.append("another result")
        except BaseException as error:
            wrong.append(error)
    torch.cuda.synchronize()
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, f"{len(wrong)} of 240 differ"

    child = os.fork()
    if not child:  # no CUDA here, but the CPU, and no connection of the parent's
        import numpy as np
        a = np.ones((1, 2, 16, 64), np.float16)
        good = not s._client.connections() and (s.sageattn(a, a, a) == 1).all()
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0, "the fork child"
    assert torch.equal(s.sageattn(q, k, v, mode="daemon"), wanted)
    s.check_errors()
    x = [torch.randn(1, 1, 64, 64, device="cuda", dtype=torch.float16) for _ in range(3)]
    with torch.inference_mode():
        say(call_us=cost(torch, lambda: s.sageattn(*x, mode="daemon")), differ=worst)
    sys.stdin.readline()

    big = torch.randn(1, 8, 65536, 64, device="cuda", dtype=torch.float16)  # 64 MiB
    s.sageattn(big[:, :, :64], big, big, mode="daemon")
    torch.cuda.synchronize()
    say(registered=True)
    sys.stdin.readline()
    del big
    torch.cuda.empty_cache()
    say(emptied=True)
    sys.stdin.readline()

    torch.cuda.current_stream().synchronize()
    side = torch.cuda.Stream()
    for stream in (side, torch.cuda.current_stream()):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SLEEP_CYCLES)
            s.sageattn(q, k, v, mode="daemon")
    say(waiting=True)  # now the daemon is killed, and does not come back
    start = time.monotonic()
    side.synchronize()
    with torch.cuda.stream(side):  # who computes in this process is told, too, once
        with t.raises(s.SageError, "SAGE_ELOST"):
            s.sageattn(q, k, v, mode="inproc")
        s.sageattn(q, k, v, mode="inproc")
    with t.raises(s.SageError, "SAGE_ELOST"):
        s.check_errors()
    s.check_errors()  # said once
    with t.raises(s.SageError):
        s.sageattn(q, k, v, mode="daemon")
    assert torch.isfinite(s.sageattn(q, k, v, mode="inproc")).all()
    say(lost_after=time.monotonic() - start)
    os._exit(0)  # nobody is there to say goodbye to


def child_auto(socket):
    """Small jobs here, large ones there."""
    import logging
    lines = []
    logging.getLogger("sageattnd").setLevel(logging.INFO)
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("sageattnd").addHandler(handler)
    torch, s, t = package(socket)
    small = [torch.randn(1, 1, 64, 64, device="cuda", dtype=torch.float16) for _ in range(3)]
    large = [torch.randn(1, 32, 16384, 128, device="cuda", dtype=torch.float16) for _ in range(3)]
    s.sageattn(*small)
    say(lines=lines)
    for tensors in (small, large):
        sys.stdin.readline()
        o = [s.sageattn(*tensors) for _ in range(5)]
        torch.cuda.synchronize()
        say(finite=all(bool(torch.isfinite(x).all()) for x in o))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # in this process, whatever the size
        s.sageattn(*large)
    graph.replay()
    torch.cuda.synchronize()
    s.check_errors()
    assert len(lines) == 1, lines
    say(good=True)


def child_fill(socket, share, attention, rounds):
    """`share` of the free memory in tensors of ever other sizes, up to `attention` of it those of
    a job: what was freed must not be held by the daemon when PyTorch asks for memory."""
    torch, s, t = package(socket)
    free, total = torch.cuda.mem_get_info()
    row = 16 * 256 * 64 * 2  # bytes of one of a batch
    peak = 0.0
    for i in range(rounds):
        part = attention * (1.0, 0.45, 0.05, 0.8, 0.3, 0.95)[i % 6] * (1 - i / 100)
        rest = torch.empty(int((share - part) * free), dtype=torch.uint8, device="cuda")
        b = int(part * free / 4 / row)
        q, k, v = (torch.empty(b, 16, 256, 64, device="cuda", dtype=torch.float16)
                   for _ in range(3))
        for x in (q, k, v):
            x.normal_()
        o = s.sageattn(q, k, v, mode="daemon")
        s.check_errors()  # rather what the daemon says than a wrong result
        sample = slice(b - 2, b)
        error = near(torch, o[sample], q[sample], k[sample], v[sample])
        assert error < t.BOUNDS["auto"], f"round {i}, batch {b}: relL1 {error}"
        peak = max(peak, torch.cuda.memory_allocated() / total)
        del rest, q, k, v, o, x
    if torch.cuda.get_allocator_backend() == "native":
        torch.cuda.empty_cache()
        large = torch.empty(int(0.5 * free), dtype=torch.uint8, device="cuda")
        del large  # small tensors get its place: the daemon maps all of that
        q, k, v = (torch.randn(1, 16, 4096, 64, device="cuda", dtype=torch.float16)
                   for _ in range(3))
        s.sageattn(q, k, v, mode="daemon")
        del q, k, v
        torch.empty(int(share * free), dtype=torch.uint8, device="cuda")
    say(peak=peak, gib=total / 2**30, allocator=torch.cuda.get_allocator_backend(),
        retries=torch.cuda.memory_stats().get("num_alloc_retries", -1))


def child_pair(socket, seed):
    torch, s, t = package(socket)
    torch.manual_seed(seed)
    q, k, v = (torch.randn(1, 8, 4096, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    s.sageattn(q, k, v, mode="daemon")
    torch.cuda.synchronize()
    say(ready=True)
    sys.stdin.readline()
    worst = 0.0
    for _ in range(20):
        outs = [s.sageattn(q, k, v, is_causal=True, mode="daemon") for _ in range(20)]
        worst = max(worst, near(torch, outs[-1], q, k, v, True))
        assert all(torch.equal(o, outs[0]) for o in outs)
    s.check_errors()
    say(error=worst)


# --- tests ---

NOWHERE = {"SAGEATTND_SOCKET": "/nonexistent/socket"}


def test_inproc():
    said = run_child("inproc", env=NOWHERE)
    print(f"    PyTorch {said['torch']}: a call takes {said['call_us']:.1f} us of the CPU, "
          f"PyTorch's own {said['sdpa_us']:.1f} us")


def test_compile():
    print(f"    {run_child('compile', env=NOWHERE)['backend']}")


def mapped(d):
    return d.stats()["mapped_bytes"]


def test_daemon():
    with daemon() as d:
        child = Child("daemon", d.path)
        said = child.line()
        print(f"    a call takes {said['call_us']:.1f} us; results differ from in-process by "
              f"{said['differ']:.6f}")
        before = mapped(d)
        child.go()
        child.line()
        with_big = mapped(d)
        assert with_big >= before + (64 << 20), f"mapped: {before}, then {with_big}"
        child.go()
        child.line()
        assert mapped(d) <= with_big - (64 << 20), "torch.cuda.empty_cache() left it mapped"
        child.go()
        child.line()
        d.process.kill()
        d.process.wait()
        print(f"    daemon killed: told after {child.line()['lost_after']:.1f} s")
        with contextlib.suppress(AssertionError):
            child.end()


def test_auto():
    with daemon() as d:
        child = Child("auto", d.path)
        print("    " + child.line()["lines"][0])

        def jobs(wanted):
            before = d.stats()["done"]
            child.go()
            assert child.line()["finite"]
            sage.until(lambda: d.stats()["done"] >= before + wanted, f"{wanted} jobs of the daemon")
            time.sleep(0.1)
            assert d.stats()["done"] == before + wanted, "other jobs went to the daemon, too"
        jobs(0)  # the small ones
        jobs(5)  # the large ones
        assert child.line()["good"]
        child.end()


def fill(attention, rounds, config):
    # PyTorch's segments may be nearly all of the device, and each is mapped as a whole.
    with daemon(client_bytes="1024G", user_bytes="1024G") as d:
        try:
            said = run_child("fill", d.path, 0.87, attention, rounds, env={
                "PYTORCH_CUDA_ALLOC_CONF": config, "PYTORCH_ALLOC_CONF": config})
        except AssertionError:
            print(f"    the daemon's statistics: {d.stats()}")
            raise
        staged = d.stats().get("staged_bytes", 0)
        print(f"    {said['allocator']} {config or '-'}: {said['peak']:.0%} of {said['gib']:.0f} "
              f"GiB, {rounds} rounds, {staged / 2**30:.1f} GiB staged, {said['retries']} retries "
              "of PyTorch's")
        assert (staged > 0) == (said["allocator"] == "cudaMallocAsync"), f"{staged} bytes staged"


def test_fill():
    fill(0.4, 12, "")


def test_fill_expandable():
    fill(0.4, 12, "expandable_segments:True")


def test_fill_async():
    """Memory that cannot be shared is copied: there has to be room for two jobs more."""
    fill(0.04, 12, "backend:cudaMallocAsync")


def test_pair():
    with daemon() as d:
        children = [Child("pair", d.path, seed) for seed in (1, 2)]
        for child in children:
            child.line()
        for child in children:
            child.go()
        for child in children:
            print(f"    relL1 {child.line()['error']:.4f}")
            child.end()


if __name__ == "__main__":
    main(globals())
