#!/usr/bin/env python3
"""sageattnd --backend=cuda between processes: throughput of large problems; how long others wait
for who is stopped, or registers and closes all the time; a dead MPS server.

    gpu_share.py [TEST...]

Latencies and ratios are printed, for they are the machine's; asserted is that nobody hangs.
"""
import contextlib
import ctypes
import os
import shutil
import signal
import sys
import tempfile
import threading
import time

import numpy as np

import sage
from gpu_client import BOUNDS, Client, Cuda, Problem, synthetic
from gpu_daemon import Child, again, daemon, idle, main, mps, run_child, sagectl, say, served
from sage import EXIT_DEVICE_LOST, Manager, until

# query heads, kv heads, tokens, head_dim, causal
LARGE = {"d64-causal-16k": (32, 8, 16384, 64, True), "d128-8k": (32, 32, 8192, 128, False)}
SECONDS = 3.0
HANGS = 2.0  # seconds; whoever waits for longer waits for somebody who was stopped
BUFFER = 2 << 20  # the least that a handle is for


# --- children ---

def large(cuda, kind, seed):
    """A problem that is checked on some of its rows; its operations as `sagectl` counts them."""
    hq, hkv, n, d, causal = LARGE[kind]
    rows = np.sort(np.random.default_rng(seed).choice(n, 8, replace=False))
    problem = Problem(cuda, *synthetic(hq, n, d, seed, hkv), causal, rows=rows)
    pairs = n * (n + 1) // 2 if causal else n * n
    return problem, 4.0 * hq * d * pairs


def child_large(socket, name, kind, seconds):
    """One problem again and again; stays connected until its input ends."""
    cuda = Cuda()
    problem, ops = large(cuda, kind, os.getpid())
    stream, client, jobs, worst = cuda.stream(), Client(socket, name), 0, 0.0

    def check():
        problem.poison()
        client.enqueue(problem.attn, stream)
        cuda.sync(stream)
        client.stream_error(stream)
        return max(worst, problem.error())
    worst = check()
    say(ready=True)
    sys.stdin.readline()
    start = time.monotonic()
    while time.monotonic() < start + seconds:
        client.enqueue(problem.attn, stream)
        jobs += 1
        if jobs % 4 == 0:
            cuda.sync(stream)
    cuda.sync(stream)
    took = time.monotonic() - start
    worst = check()
    say(name=name, mode=client.mode(), jobs=jobs, tops=jobs * ops / took / 1e12, error=worst)
    sys.stdin.read()
    client.close()


def child_alone(seconds):
    """The same problems in turns in one process, by libsageattn."""
    cuda = Cuda()
    lib = ctypes.CDLL(os.path.join(sage.BUILD, ".libs", "libsageattn.so"))
    lib.sage_attn_cuda_workspace.restype = ctypes.c_size_t
    why = ctypes.create_string_buffer(192)
    problems, stream = [large(cuda, kind, 1) for kind in LARGE], cuda.stream()
    bytes_ = max(lib.sage_attn_cuda_workspace(ctypes.byref(p.attn), None) for p, _ in problems)
    workspace, total = cuda.alloc(bytes_), 0.0

    def enqueue(problem):
        error = lib.sage_attn_cuda(ctypes.byref(problem.attn), None, ctypes.c_void_p(workspace),
                                   ctypes.c_size_t(bytes_), stream, why, ctypes.c_size_t(len(why)))
        assert error == 0, f"sage_attn_cuda: {error}: {why.value.decode()}"
    for problem, _ in problems:
        problem.poison()
        enqueue(problem)
        cuda.sync(stream)
        problem.check()
    start = time.monotonic()
    while time.monotonic() < start + seconds:
        for problem, ops in problems:
            enqueue(problem)
            total += ops
        cuda.sync(stream)
    say(tops=total / (time.monotonic() - start) / 1e12)


class Raw(sage.Client):
    """Speaks the protocol itself, so that each step can be timed."""

    def register(self, number, handle):
        return self.send("REGISTER", {"buffer": number, "kind": 2, "size": BUFFER,
                                      "handle": handle})

    def unregister(self, number):
        return self.send("UNREGISTER", {"buffer": number})

    def answers(self, requests):
        """Until all are answered, in any order; takes them out of the set."""
        while requests:
            op, seq, body = self.receive()
            if op == "ERROR":
                raise sage.SageError(body["status"], body["text"])
            requests.discard(seq)


def tiny(cuda, client):
    """The `attn` map of a job of a few microseconds, registered as buffer 1."""
    base, arrays = cuda.alloc(BUFFER), synthetic(2, 128, 64, 1)
    shape, step = arrays[0].shape, arrays[0].nbytes
    for i, array in enumerate(arrays):
        cuda.put(base + i * step, array)
    client.answer(client.register(1, cuda.handle(base)))
    stride = [shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1]
    attn = {name: {"dtype": 1, "buffer": 1, "offset": i * step, "shape": list(shape),
                   "stride": stride} for i, name in enumerate("qkvo")}
    return {**attn, "scale": 0.0, "variant": 1, "smooth_k": True, "smooth_v": False,
            "causal": False, "diagonal": 0, "window_left": -1, "window_right": -1}


def child_latency(socket, seconds):
    """Register, run, unregister; for each line of its input, what each of them took: worst, p99 and
    median in milliseconds."""
    cuda = Cuda()
    client = Raw(socket, timeout=120.0)
    attn, handle = tiny(cuda, client), cuda.handle(cuda.alloc(BUFFER))
    client.run(attn)
    say(ready=True)
    for _ in sys.stdin:
        times, end = {"register": [], "job": [], "unregister": []}, time.monotonic() + seconds
        while time.monotonic() < end:
            def timed(what, work):
                start = time.monotonic()
                work()
                times[what].append(1e3 * (time.monotonic() - start))
            timed("register", lambda: client.answer(client.register(2, handle)))
            for _ in range(8):
                timed("job", lambda: client.run(attn, prompt=True))
            timed("unregister", lambda: client.answer(client.unregister(2)))
        say(n=len(times["job"]), **{what: [max(t), *np.percentile(t, (99, 50))]
                                    for what, t in times.items()})


def child_stopped(socket, n):
    """Exports 2 n buffers, asks for n of them to be registered, and stops itself at once."""
    cuda = Cuda()
    client = Raw(socket)
    handles = [cuda.handle(cuda.alloc(BUFFER)) for _ in range(2 * n)]
    say(handles=[handle.hex() for handle in handles[n:]])
    requests = {client.register(1 + i, handle) for i, handle in enumerate(handles[:n])}
    os.kill(os.getpid(), signal.SIGSTOP)
    client.answers(requests)
    say(registered=n)


def child_churn(socket, n, seconds):
    """Registers n buffers and lets them go again, all the time."""
    cuda = Cuda()
    client = Raw(socket)
    handles = [cuda.handle(cuda.alloc(BUFFER)) for _ in range(n)]
    say(ready=True)
    sys.stdin.readline()
    rounds, end = 0, time.monotonic() + seconds
    while time.monotonic() < end or not rounds:
        client.answers({client.register(1 + i, handle) for i, handle in enumerate(handles)})
        client.answers({client.unregister(1 + i) for i in range(n)})
        rounds += 1
    say(rounds=rounds)


# --- large problems ---

def shared(env):
    alone = run_child("alone", SECONDS / 2, env=env)["tops"]
    with daemon(env) as d:
        children = [Child("large", d.path, f"{kind}-{i}", kind, SECONDS, env=env)
                    for i in range(2) for kind in LARGE]
        for child in children:
            child.line()
        before, start = sagectl(d, "stats", "--json"), time.monotonic()
        for child in children:
            child.go()
        time.sleep(SECONDS)
        after, took = sagectl(d, "stats", "--json"), time.monotonic() - start
        results = [child.line() for child in children]
        for r in results:
            print(f"    {r['name']:16} {r['mode']:6} {r['jobs']:5} jobs {r['tops']:7.1f} TOPS "
                  f"relL1 {r['error']:.5f}")
            assert r["error"] < BOUNDS["int8_fp16"], r
        for child in children:
            child.end()
        total = (after["ops"] - before["ops"]) / took / 1e12
        print(f"    all: {total:.1f} TOPS ({sum(r['tops'] for r in results):.1f} by their own "
              f"clocks, {after['tops']:.1f} while in slots); one process alone: {alone:.1f}; "
              f"ratio {total / alone:.3f}")
        assert after["failed"] == 0, after
        idle(d)


def test_shared():
    shared({})


def test_shared_mps():
    with mps(True) as env:
        shared(env)


# --- who waits for whom ---

def measure(child, when):
    child.go()
    times = child.line()
    print(f"    {when:24} {times.pop('n'):6} jobs; worst, p99, median in ms: " + "; ".join(
        f"{what} {worst:.2f} {p99:.2f} {median:.2f}"
        for what, (worst, p99, median) in times.items()))
    worst = max(t[0] for t in times.values())
    assert worst < 1e3 * HANGS, f"{when}: somebody waited for {worst:.0f} ms"


def is_stopped(pid):
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0] == "T"


def stopped(env):
    """Handles of a process that is stopped are opened: does anybody else wait for that?"""
    with daemon(env) as d, Raw(d.path, page=False, timeout=60.0) as client:
        other = Child("latency", d.path, 1.5, env=env)
        other.line()
        measure(other, "before")
        victim = Child("stopped", d.path, 8, env=env)
        handles = [bytes.fromhex(handle) for handle in victim.line()["handles"]]
        until(lambda: is_stopped(victim.process.pid), "the process to be stopped")
        go_on = threading.Timer(15, os.kill, (victim.process.pid, signal.SIGCONT))
        go_on.start()  # lest everybody waits for it for ever
        requests = {client.register(1 + i, handle) for i, handle in enumerate(handles)}
        try:
            measure(other, "its owner is stopped")
            client.socket.settimeout(1)
            with contextlib.suppress(TimeoutError):
                client.answers(requests)
        finally:
            go_on.cancel()
            os.kill(victim.process.pid, signal.SIGCONT)
        opened = len(handles) - len(requests)
        print(f"    {opened} of {len(handles)} handles of the stopped process were opened")
        client.socket.settimeout(60)
        client.answers(requests)
        assert victim.line()["registered"] == 8
        measure(other, "after")
        victim.end()
        other.end()
        client.close()
        idle(d)


def test_stopped():
    stopped({})


def test_stopped_mps():
    with mps(True) as env:
        stopped(env)


def closing(env):
    with daemon(env) as d:
        other, churn = (Child("latency", d.path, 1.5, env=env),
                        Child("churn", d.path, 64, 2.5, env=env))
        other.line()
        churn.line()
        measure(other, "before")
        churn.go()
        time.sleep(0.3)
        measure(other, "64 buffers come and go")
        print(f"    {churn.line()['rounds']} times")
        churn.end()
        other.end()
        idle(d)


def test_closing():
    closing({})


def test_closing_mps():
    with mps(True) as env:
        closing(env)


# --- the MPS server ---

def servers(env):
    """Pids of the MPS servers that the control daemon of `env` has started."""
    mark = f"CUDA_MPS_PIPE_DIRECTORY={env['CUDA_MPS_PIPE_DIRECTORY']}".encode()
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/cmdline", "rb") as command:
                is_server = b"nvidia-cuda-mps-server" in command.read()
            with open(f"/proc/{pid}/environ", "rb") as environ:
                if is_server and mark in environ.read().split(b"\0"):
                    found.append(int(pid))
    return found


def test_mps_server_killed():
    """While nothing runs: the daemon finds out, by itself or by the next job, and says why."""
    directory = tempfile.mkdtemp(prefix="sage")
    heard = []
    with mps(True) as env, contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        manager = Manager(directory)
        threading.Thread(target=lambda: heard.append(manager.wait_for("STATUS=device lost", 300)),
                         daemon=True).start()
        d = stack.enter_context(daemon({**env, "NOTIFY_SOCKET": manager.path}))
        served(d, env)
        idle(d)
        pids = servers(env)
        assert len(pids) == 1, f"MPS servers of this test: {pids}"
        os.kill(pids[0], signal.SIGKILL)
        start, by = time.monotonic(), "by itself"
        try:
            until(lambda: d.process.poll() is not None, "the daemon to end", 5)
        except AssertionError:
            by = "by the next job"
            work = Child("work", d.path, "next", "smollm2-l00", 0, env=env)
            try:  # under the new server, which the control daemon starts for it
                until(lambda: d.process.poll() is not None, "the daemon to end", 150)
            finally:
                work.kill()
        assert d.wait() == EXIT_DEVICE_LOST
        until(lambda: heard, "the status", 5)
        print(f"    noticed {by}, {time.monotonic() - start:.1f} s after the server's death: "
              f"{heard[0]}")
        served(stack.enter_context(again(d, env)), env)


if __name__ == "__main__":
    main(globals())
