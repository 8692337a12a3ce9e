#!/usr/bin/env python3
"""sageattnd --backend=cuda as a whole: clients in processes of their own, faults, leaks, MPS.

    gpu_daemon.py [TEST...]

Clients are this program again (--child NAME ARGUMENTS), for a fault may take a CUDA context with
it, and MPS is chosen by the environment. $SAGE_GPU_KILLS (200) and $SAGE_GPU_CYCLES (500) shorten
the leak tests.
"""
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

import sage
from gpu_client import (BOUNDS, Attn, Client, Cuda, Problem, VARIANTS, capture, synthetic, tensor,
                        torch_attn)
from sage import EXIT_DEVICE_LOST, Daemon, Skip, refused, until

KILLS = int(os.environ.get("SAGE_GPU_KILLS", 200))
CYCLES = int(os.environ.get("SAGE_GPU_CYCLES", 500))
SLACK = 16 << 20  # of free device memory between two measurements
NOBODY = 65534


# --- children: one function each; they print JSON, a line at a time ---

def say(**what):
    print(json.dumps(what), flush=True)


def child_probe():
    """Is there a GPU that this can be tested on?"""
    cuda = Cuda()
    say(free=cuda.memory()[0])


def child_free():
    say(free=Cuda().memory()[0])


def child_work(socket, name, what, seconds, variant="int8_fp16", uid=0):
    """Jobs one after the other for some seconds; stays connected until its input ends."""
    if uid:
        os.setgid(uid)
        os.setuid(uid)
    cuda = Cuda()
    arrays, causal = capture(what) if what != "synthetic" else (synthetic(8, 1024, 128, 1), True)
    problem, stream = Problem(cuda, *arrays, causal, variant), cuda.stream()
    client = Client(socket, name)
    client.enqueue(problem.attn, stream)
    cuda.sync(stream)
    say(ready=True)
    sys.stdin.readline()
    worst, jobs, end = 0.0, 0, time.monotonic() + seconds
    while time.monotonic() < end or jobs < 20:
        check = jobs % 50 == 0
        if check:
            problem.poison()
        client.enqueue(problem.attn, stream)
        jobs += 1
        if check or jobs % 16 == 0:
            cuda.sync(stream)
            client.stream_error(stream)
        if check:
            worst = max(worst, problem.error())
    cuda.sync(stream)
    problem.poison()
    client.enqueue(problem.attn, stream)
    cuda.sync(stream)
    worst = max(worst, problem.error())
    say(name=name, mode=client.mode(), jobs=jobs, error=worst, good=worst < BOUNDS[variant])
    sys.stdin.read()
    client.close()


def child_victim(socket, stage):
    """Says ready when it may be killed: before, during or after jobs, or in a kernel of its own."""
    cuda = Cuda()
    large = stage == "during"
    shape = (1, 32, 16384, 128) if large else (1, 4, 512, 64)
    size = 2 * int(np.prod(shape))
    base, stream, client = cuda.alloc(4 * size), cuda.stream(), Client(socket, "victim")
    t = [tensor(base + i * size, shape) for i in range(4)]
    attn = Attn(q=t[0], k=t[1], v=t[2], o=t[3], variant=VARIANTS["int8_fp16"], smooth_k=True,
                window_left=-1, window_right=-1)
    cuda.fill(base, 4 * size, stream)
    cuda.sync(stream)
    if stage != "before":
        client.enqueue(attn, stream)
    if stage in ("after", "own"):
        cuda.sync(stream)
    own = cuda.alloc(1 << 30) if stage == "own" else 0
    say(ready=True)
    while stage == "own":  # some 0.4 ms each
        for _ in range(64):
            cuda.fill(own, 1 << 30, stream)
        cuda.sync(stream)
    while stage in ("during", "busy"):
        client.enqueue(attn, stream)
    time.sleep(60)


def child_reuse(socket):
    """Frees memory that the daemon has mapped, gets the same address again, uses it at once."""
    cuda = Cuda()
    stream, client, same, address = cuda.stream(), Client(socket), 0, None
    for i in range(40):
        p = Problem(cuda, *synthetic(4, 256, 64, i), i % 2 == 0)
        same += p.base == address
        address = p.base
        p.poison()
        client.enqueue(p.attn, stream)
        cuda.sync(stream)
        p.check()
        cuda.free(p.base)
    say(rounds=40, same_address=same)


def child_cycles(socket, cycles):
    """Allocate, run, free; what the daemon has mapped goes away."""
    cuda = Cuda()
    stream, client = cuda.stream(), Client(socket)
    arrays = synthetic(2, 128, 64, 1)
    room = Problem(cuda, *arrays, False).size
    for i in range(cycles):
        base = cuda.alloc(((1 + i % 5) << 21) + room)
        p = Problem(cuda, *arrays, False, address=base)
        client.enqueue(p.attn, stream)
        cuda.sync(stream)
        if i % 100 == 0:
            p.check()
        cuda.free(base)
        if i % 10 == 9:
            client.trim()
    client.trim()
    say(cycles=cycles)
    sys.stdin.read()
    client.close()


def child_lies(socket):
    """Sizes, offsets and handles that are not true, in the raw protocol."""
    cuda = Cuda()
    size, freed = 4 << 20, cuda.alloc(8 << 20)
    base, gone = cuda.alloc(size), cuda.handle(freed)
    cuda.free(freed)
    arrays = synthetic(2, 128, 64, 1)
    step = arrays[0].nbytes
    for i, a in enumerate(arrays):
        cuda.put(base + i * step, a)
    client = sage.Client(socket)

    def register(number, handle, bytes_):
        return client.call("REGISTER", {"buffer": number, "kind": 2, "size": bytes_,
                                        "handle": handle})
    for what, status, handle, bytes_ in (
            ("more than there is", ("EBOUNDS",), cuda.handle(base), 1 << 40),
            ("2^63", ("EBOUNDS", "EINVAL"), cuda.handle(base), 1 << 63),
            ("no handle at all", ("EHANDLE",), os.urandom(64), size),
            ("a short handle", ("EHANDLE", "EINVAL"), cuda.handle(base)[:63], size),
            ("freed memory", ("EHANDLE",), gone, size)):
        try:
            register(1, handle, bytes_)
        except sage.SageError as error:
            wanted = [sage.STATUSES[s] for s in status]
            assert error.status in wanted, f"{what}: {error}"
        else:
            raise AssertionError(f"registered: {what}")
    found = register(2, cuda.handle(base), size)["size"]
    assert found >= size, found

    def wire(offset, stride=None):
        shape = list(arrays[0].shape)
        return {"dtype": 1, "buffer": 2, "offset": offset, "shape": shape,
                "stride": stride or [shape[1] * shape[2] * 64, shape[2] * 64, 64, 1]}
    attn = {"q": wire(0), "k": wire(step), "v": wire(2 * step), "o": wire(3 * step), "scale": 0.0,
            "variant": 1, "smooth_k": True, "smooth_v": False, "causal": False, "diagonal": 0,
            "window_left": -1, "window_right": -1}
    for name in "qkvo":
        for lie in (wire(found - step + 2), wire(found), wire(1 << 62),
                    wire(0, [0, found, 64, 1]), wire(0, [0, 1 << 40, 64, 1])):
            try: # what reaches beyond the buffer from its start may overlap an output first
                client.run({**attn, name: lie})
            except sage.SageError as error:
                assert "reaches beyond" in str(error) or "overlap" in str(error), error
            else:
                raise AssertionError(f"accepted: {name} {lie}")
    client.run(attn)
    o = cuda.get(base + 3 * step, arrays[0].shape).astype(np.float64)
    sage.compare(o, sage.reference(*(a.astype(np.float64) for a in arrays))[0], "o")
    say(good=True)


def child_torch(socket, megabytes):
    """Tensors of PyTorch's allocator, as $PYTORCH_CUDA_ALLOC_CONF has it, against its own fp64."""
    import torch
    client, worst = Client(socket), 0.0
    for i, share in enumerate((1, 4, 16)):
        n = max(64, (megabytes << 20) // share // (8 * 64 * 2) // 64 * 64)
        n = min(n, 65536)
        q, k, v = (torch.randn(1, 8, n, 64, device="cuda", dtype=torch.float16) for _ in range(3))
        o = torch.full_like(q, float("nan"))
        client.enqueue(torch_attn(q, k, v, o), torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        rows = torch.arange(0, n, max(1, n // 64), device="cuda")
        scores = q[:, :, rows].double() @ k.double().transpose(2, 3) / 8
        wanted = scores.softmax(-1) @ v.double()
        error = ((o[:, :, rows].double() - wanted).abs().sum() / wanted.abs().sum()).item()
        assert error < BOUNDS["int8_fp16"], f"tensor {i}: relL1 {error}"
        worst = max(worst, error)
        del q, k, v, o, scores, wanted
        if i % 2:
            torch.cuda.empty_cache()
    say(error=worst, mode=client.mode(), config=os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""))


# --- lanes: children with PyTorch, whose kernels surround the daemon's ---

SLEEP_CYCLES = 600_000_000  # some 0.35 s of torch.cuda._sleep() on an H100


def torch_problem(torch, n=1024, heads=8, d=64):
    """q, k, v, and room for o."""
    return [torch.randn(1, heads, n, d, device="cuda", dtype=torch.float16) for _ in range(3)] + \
        [torch.full((1, heads, n, d), float("nan"), device="cuda", dtype=torch.float16)]


def near(torch, o, q, k, v):
    """relL1 to double precision."""
    wanted = (q.double() @ k.double().transpose(2, 3) / q.shape[3] ** 0.5).softmax(-1) @ v.double()
    return ((o.double() - wanted).abs().sum() / wanted.abs().sum()).item()


def own_stream(torch, cuda):
    """PyTorch's own come from a pool of 32, and may be the same."""
    return torch.cuda.ExternalStream(cuda.stream().value)


def child_chain(socket, which):
    """Kernel, attention, kernel on one stream; the calls return long before the first is over."""
    import torch
    torch.zeros(1, device="cuda")
    client, cuda = Client(socket, "chain"), Cuda()
    stream = {"own": lambda: own_stream(torch, cuda), "legacy": torch.cuda.default_stream,
              "per_thread": lambda: torch.cuda.ExternalStream(2)}[which]()
    source, k, v, o = torch_problem(torch)
    q, late = torch.zeros_like(source), torch.zeros_like(source)
    attn = torch_attn(q, k, v, o)

    def once(cycles):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(cycles)
            torch.mul(source, 1.0, out=q)
            start = time.monotonic()
            client.enqueue(attn, stream.cuda_stream)
            took = time.monotonic() - start
            torch.mul(o, 1.0, out=late)
        return took
    torch.cuda.synchronize()
    once(1000)  # what is loaded late is loaded, and the memory registered
    stream.synchronize()
    client.stream_error(stream.cuda_stream)
    q.zero_(), late.zero_(), o.fill_(float("nan"))
    torch.cuda.synchronize()
    took = once(SLEEP_CYCLES)
    done = stream.query()
    stream.synchronize()
    client.stream_error(stream.cuda_stream)
    error = near(torch, late, source, k, v)
    if which == "own":
        graph = torch.cuda.CUDAGraph()
        with refused("ECAPTURE"), torch.cuda.graph(graph):
            torch.mul(source, 1.0, out=q)
            with refused("ECAPTURE"):
                client.stream_error(torch.cuda.current_stream().cuda_stream)
            client.enqueue(attn, torch.cuda.current_stream().cuda_stream)
        once(1000)
        stream.synchronize()
        client.stream_error(stream.cuda_stream)
    say(took_us=took * 1e6, done=done, error=error, mode=client.mode())
    client.close()


def child_streams(socket, n):
    """n streams, each of which goes on with the result of the one before."""
    import torch
    torch.zeros(1, device="cuda")
    client, cuda = Client(socket, "streams"), Cuda()
    streams = [own_stream(torch, cuda) for _ in range(n)]
    problems = [torch_problem(torch, 256) for _ in range(n)]
    attns = [torch_attn(*p) for p in problems]
    wanted = []
    for i, (q, _, _, o) in enumerate(problems):
        if i:
            torch.mul(problems[i - 1][3], 1.0, out=q)
        torch.cuda.synchronize()
        client.enqueue(attns[i], 0)
        torch.cuda.synchronize()
        client.stream_error(0)
        wanted.append(o.clone())
    wrong, queued = 0, []
    for _ in range(3):
        for i, (q, _, _, o) in enumerate(problems):
            o.fill_(float("nan"))
            if i:
                q.zero_()
        torch.cuda.synchronize()
        event = None
        start = time.monotonic()
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if event:
                    stream.wait_event(event)
                    torch.mul(problems[i - 1][3], 1.0, out=problems[i][0])
                else:
                    torch.cuda._sleep(SLEEP_CYCLES)
                client.enqueue(attns[i], stream.cuda_stream)
                event = torch.cuda.Event()
                event.record(stream)
        queued.append((time.monotonic() - start) * 1e3)
        torch.cuda.synchronize()
        for i, stream in enumerate(streams):
            client.stream_error(stream.cuda_stream)
            wrong += not torch.equal(problems[i][3], wanted[i])
    say(wrong=wrong, queued_ms=queued, mode=client.mode())
    client.close()


def child_paces(socket, links):
    """A chain whose links change q, at once or after 0.3 ms, by turns of sixteen."""
    import torch
    torch.zeros(1, device="cuda")
    client, cuda = Client(socket, "paces"), Cuda()
    stream = own_stream(torch, cuda)
    source, k, v, o = torch_problem(torch)
    q = torch.zeros_like(source)
    attn = torch_attn(q, k, v, o)
    results = [torch.zeros_like(o) for _ in range(links)]
    factors = [1 + i / links for i in range(links)]
    wanted = []
    for factor in factors:
        torch.mul(source, factor, out=q)
        torch.cuda.synchronize()
        client.enqueue(attn, stream.cuda_stream)
        torch.cuda.synchronize()
        client.stream_error(stream.cuda_stream)
        wanted.append(o.clone())
    for _ in range(3):
        o.fill_(float("nan"))
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for i, factor in enumerate(factors):
                if i // 16 % 2:
                    torch.cuda._sleep(SLEEP_CYCLES // 1000)
                torch.mul(source, factor, out=q)
                client.enqueue(attn, stream.cuda_stream)
                torch.mul(o, 1.0, out=results[i])
        stream.synchronize()
        client.stream_error(stream.cuda_stream)
        wrong = [i for i in range(links) if not torch.equal(results[i], wanted[i])]
        if wrong:
            break
    say(wrong=wrong, mode=client.mode(), error=near(torch, wanted[0], source, k, v))
    client.close()


def child_flood(socket, jobs):
    """More jobs than a lane has entries, behind a kernel that takes its time."""
    import torch
    torch.zeros(1, device="cuda")
    client, cuda = Client(socket, "flood"), Cuda()
    stream, (q, k, v, o) = own_stream(torch, cuda), torch_problem(torch, 256)
    attn = torch_attn(q, k, v, o)
    client.enqueue(attn, stream.cuda_stream)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
    start = time.monotonic()
    for i in range(jobs):
        client.enqueue(attn, stream.cuda_stream)
        if i == 62:
            full = time.monotonic() - start
    took = time.monotonic() - start
    stream.synchronize()
    client.stream_error(stream.cuda_stream)
    say(full_ms=full * 1e3, took_ms=took * 1e3, error=near(torch, o, q, k, v))
    client.close()


def child_refused(socket):
    """The daemon refuses what no slot can hold: the stream goes on, and says so when asked."""
    import torch
    torch.zeros(1, device="cuda")
    client, stream = Client(socket, "refused"), torch.cuda.default_stream().cuda_stream
    good = torch_problem(torch, 256)
    bad = torch_problem(torch, 262144, 1, 128)
    for _ in range(2):
        client.enqueue(torch_attn(*bad), stream)
        client.enqueue(torch_attn(*good), stream)
        torch.cuda.synchronize()
        with refused("EQUOTA"):
            client.stream_error(stream)
        client.stream_error(stream)  # told once
        error = near(torch, good[3], *good[:3])
        assert error < BOUNDS["int8_fp16"], error
    say(error=error)
    client.close()


def few_descriptors():
    """32 more than there are: less than the chunks that expandable segments give here."""
    soft = max(int(fd) for fd in os.listdir("/proc/self/fd")) + 32
    resource.setrlimit(resource.RLIMIT_NOFILE,
                       (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return soft


def child_waiting(socket, retry_ms, lost):
    """Streams wait for jobs while something happens to the daemon; results, or errors if `lost`."""
    import torch
    torch.zeros(1, device="cuda")
    soft = few_descriptors()
    client, cuda = Client(socket, "waiting", retry_ms), Cuda()
    streams = [own_stream(torch, cuda) for _ in range(6)]
    problems = [torch_problem(torch, 4096, 32, 128) for _ in streams]
    attns = [torch_attn(*p) for p in problems]
    wanted = []
    for attn, stream, p in zip(attns, streams, problems):
        client.enqueue(attn, stream.cuda_stream)
        torch.cuda.synchronize()
        wanted.append(p[3].clone())
        p[3].fill_(float("nan"))
    torch.cuda.synchronize()
    late = [torch.zeros_like(w) for w in wanted]
    torch.mul(wanted[0], 1.0, out=late[0])  # what is loaded late is loaded
    torch.cuda._sleep(1000)
    late[0].zero_()
    torch.cuda.synchronize()
    for i, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            if i % 2:
                torch.cuda._sleep(SLEEP_CYCLES)
            for _ in range(8):
                client.enqueue(attns[i], stream.cuda_stream)
            torch.mul(problems[i][3], 1.0, out=late[i])
    kept = sum(int(fd) >= soft for fd in os.listdir("/proc/self/fd"))
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == soft
    say(queued=True)
    start, statuses, wrong = time.monotonic(), [], 0
    for i, stream in enumerate(streams):
        stream.synchronize()
        try:
            client.stream_error(stream.cuda_stream)
            statuses.append("OK")
            wrong += not torch.equal(late[i], wanted[i])
        except sage.SageError as error:
            statuses.append(sage.STATUS_NAMES[error.status])
    seconds = time.monotonic() - start
    if not lost:
        assert statuses == ["OK"] * len(streams), statuses
    say(statuses=statuses, wrong=wrong, seconds=seconds, mode=client.mode(), kept=kept)
    client.close()


def child_silent(socket):
    """63 jobs on each of 4 lanes whose inputs are never ready."""
    cuda = Cuda()
    p, client = Problem(cuda, *synthetic(4, 256, 64, 1), False), Client(socket, "silent")
    client.submit_held(p.attn, 4, 63)
    say(ready=True)
    sys.stdin.read()
    client.close()


def child_latency(socket, jobs):
    """How long small jobs take, and registering memory does: median and worst but one in 100."""
    cuda = Cuda()
    stream, client, times, mapped = cuda.stream(), Client(socket, "latency"), [], []
    p = Problem(cuda, *synthetic(4, 256, 64, 1), False)
    client.enqueue(p.attn, stream)
    cuda.sync(stream)
    for i in range(jobs):
        start = time.monotonic()
        client.enqueue(p.attn, stream)
        cuda.sync(stream)
        times.append(time.monotonic() - start)
        if i % 20 == 0:
            other = Problem(cuda, *p.arrays, False)
            start = time.monotonic()
            client.enqueue(other.attn, stream)
            cuda.sync(stream)
            mapped.append(time.monotonic() - start)
            cuda.free(other.base)
            client.trim()
    client.stream_error(stream)
    p.check()
    times.sort()
    mapped.sort()
    say(median_ms=times[len(times) // 2] * 1e3, p99_ms=times[len(times) * 99 // 100] * 1e3,
        register_ms=mapped[len(mapped) // 2] * 1e3)
    client.close()


# --- processes ---

class Child:
    """A process with child_NAME() of the program, or of this module."""

    def __init__(self, name, *args, env=None):
        own = hasattr(sys.modules["__main__"], "child_" + name)
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(sys.argv[0] if own else __file__), "--child", name,
             json.dumps(args)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=sage.environment(**env or {}), preexec_fn=sage._die_with_parent)

    def line(self):
        """The next that it says."""
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.process.wait()
        errors = self.process.stderr.read()
        if self.process.returncode == 77:
            raise Skip(errors.strip().splitlines()[-1])
        raise AssertionError(f"{self.name} ended with {self.process.returncode}: {errors[-2000:]}")

    def go(self):
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def end(self):
        """Close its input and let it end; 0 or what is wrong."""
        _, errors = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, \
            f"{self.name} ended with {self.process.returncode}: {errors[-2000:]}"

    def kill(self):
        self.process.kill()
        self.process.communicate()


def run_child(name, *args, env=None):
    child = Child(name, *args, env=env)
    said = child.line()
    child.end()
    return said


def daemon(env=None, **options):
    return Daemon(**{"backend": "cuda", "slot_bytes": "256M", "env": env, **options})


@contextlib.contextmanager
def mps(wanted):
    """The environment of an MPS server of our own, for several users; without: an empty one."""
    if not wanted:
        yield {}
        return
    control = shutil.which("nvidia-cuda-mps-control")
    if not control:
        raise Skip("no nvidia-cuda-mps-control")
    folder = tempfile.mkdtemp(prefix="sagemps")
    os.chmod(folder, 0o755)
    env = {"CUDA_MPS_PIPE_DIRECTORY": os.path.join(folder, "pipe"),
           "CUDA_MPS_LOG_DIRECTORY": os.path.join(folder, "log")}
    for path in env.values():
        os.mkdir(path)
        os.chmod(path, 0o777)
    with open(os.path.join(folder, "out"), "w") as out:
        server = subprocess.Popen([control, "-f", *(["-M"] if os.getuid() == 0 else [])],
                                  env=sage.environment(**env), stdout=out, stderr=out,
                                  stdin=subprocess.DEVNULL)
    try:
        time.sleep(1)
        if server.poll() is not None:
            with open(os.path.join(folder, "out")) as out:
                raise Skip(f"nvidia-cuda-mps-control: {out.read().strip()[-200:]}")
        try:
            run_child("probe", env=env)
        except AssertionError as error:
            raise Skip(f"no CUDA under MPS: {str(error)[-200:]}") from None
        yield env
    finally:
        if server.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run([control], input="quit -t 2\n", env=sage.environment(**env),
                               text=True, capture_output=True, timeout=15)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(10)
        if server.poll() is None:
            server.terminate()
            server.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


def sagectl(d, *args):
    done = subprocess.run([os.path.join(sage.BUILD, "sagectl"), "-s", d.path, *args], check=True,
                          capture_output=True, text=True, timeout=120)
    return json.loads(done.stdout)


def idle(d):
    """Nothing of clients that are gone is left in the daemon."""
    def gone():
        s = d.stats()
        return s["clients"] == 1 and not any(map(s.get, ("buffers", "mapped_bytes", "queued",
                                                         "running", "slots_used")))
    until(gone, f"the daemon to be idle: {d.stats()}", 20)


# --- several clients ---

def several(env, uid=0, seconds=3):
    work = [("smollm2-l00", "int8_fp16"), ("smollm2-l18", "int8_fp8"),
            ("synthetic", "int8_fp16"), ("synthetic", "int8_fp8")]
    with daemon(env) as d:
        if uid:
            os.chmod(d.directory, 0o755)
            os.chmod(d.path, 0o666)
        children = [Child("work", d.path, f"{what}-{variant}", what, seconds, variant, uid, env=env)
                    for what, variant in work]
        for child in children:
            child.line()
        for child in children:
            child.go()
        results = [child.line() for child in children]
        table = {c["name"]: c for c in sagectl(d, "clients", "--json")}
        stats = sagectl(d, "stats", "--json")
        for child in children:
            child.end()
        for r in results:
            c = table[r["name"]]
            tops = c["ops"] / c["run_ns"] / 1e3 if c["run_ns"] else 0
            print(f"    {r['name']:24} {c['mode'] or r['mode']:6} {r['jobs']:6} jobs "
                  f"{tops:7.1f} TOPS relL1 {r['error']:.5f}")
            assert r["good"], r
            assert tops > 0, c
            assert c["failed"] == 0, c
        print(f"    all: {json.dumps(stats.get('tops'))} TOPS, {stats.get('done')} jobs")
        idle(d)


def test_several():
    several({})


def test_several_event():
    several({"SAGE_MODE": "event"})


def test_several_sync():
    several({"SAGE_MODE": "sync"})


def test_several_mps():
    with mps(True) as env:
        several(env)


def test_several_event_mps():
    with mps(True) as env:
        several({**env, "SAGE_MODE": "event"})


def test_users():
    if os.getuid():
        raise Skip("daemon and clients under different users: wants root")
    several({}, NOBODY, 1)


def test_users_mps():
    if os.getuid():
        raise Skip("daemon and clients under different users: wants root")
    with mps(True) as env:
        several(env, NOBODY, 1)


# --- sagectl ---

def looked_at(env):
    """doctor finds nothing wrong; bench has right results from several clients."""
    with daemon(env) as d, patched(env):
        checks = {c["check"]: c for c in sagectl(d, "doctor", "--json")}
        for name in ("driver", "gpu", "mps", "staging", "memory", "namespaces", "int8_fp16",
                     "handoff", "mode"):
            print(f"    {checks[name]['result']} {name:10} {checks[name]['text']}")
        assert checks["handoff"]["handoff_us"] > 0
        for n in (64, 4096):
            said = sagectl(d, "bench", "--json", "-p", "3", "-t", "2", "-n", str(n), "-d", "128")
            total, shares = said["all"], [round(c["share"], 2) for c in said["clients"]]
            print(f"    {said['mode']}: 3 clients, {n} tokens: {total['jobs_per_second']:.0f} "
                  f"jobs/s, {total['tops']:.1f} TOPS, shares {shares}, us: {total['latency_us']}")
            assert all(c["jobs"] > 0 for c in said["clients"]), said
        idle(d)
        return checks


def falls_back(calls, mode):
    """Where the driver has not all of its calls the next mode is taken, and doctor says so."""
    env = {"LD_PRELOAD": os.path.join(sage.BUILD, "tests", ".libs", "no_call.so"), "NO_CALL": calls}
    with daemon() as d:
        work = Child("work", d.path, "witness", "synthetic", 0, env=env)
        work.line()
        work.go()
        result = work.line()
        assert result["good"] and result["mode"] == mode, result
        assert [c["mode"] for c in sagectl(d, "clients", "--json")
                if c["name"] == "witness"] == [mode]
        work.end()
        with patched(env):
            said = {c["check"]: c for c in sagectl(d, "doctor", "--json")}["mode"]
        print(f"    without {calls}: {said['result']} {said['text']}")
        assert said["result"] == "WARN" and said["text"].startswith(mode + ":"), said
        assert calls.split(",")[0] in said["text"], said
        idle(d)


def test_falls_back_to_events():
    falls_back("cuMemHostRegister", "event")
    falls_back("cuStreamBatchMemOp", "event")


def test_falls_back_to_sync():
    falls_back("cuMemHostRegister,cuIpcGetEventHandle", "sync")


@contextlib.contextmanager
def patched(env):
    """The same for what is started here."""
    before = dict(os.environ)
    os.environ.update(env)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_sagectl():
    looked_at({})


def test_sagectl_mps():
    with mps(True) as env:
        checks = looked_at(env)
        assert checks["mps"]["result"] == "PASS", checks["mps"]


# --- faults ---

def killed(d, stage, env):
    victim = Child("victim", d.path, stage, env=env)
    victim.line()
    time.sleep(random.uniform(0, 0.03))
    victim.kill()
    time.sleep(0.3)


def again(d, env):
    """A daemon that lost its device: it has said so, and a new one works before long."""
    code = d.wait()
    assert code == EXIT_DEVICE_LOST, f"daemon ended with {code}"
    end = time.monotonic() + 30
    while True:
        try:
            return daemon(env, directory=d.directory)
        except AssertionError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def served(d, env):
    work = Child("work", d.path, "witness", "smollm2-l00", 0, env=env)
    work.line()
    work.go()
    result = work.line()
    work.end()
    assert result["good"], result


def test_killed():
    with daemon() as d:
        witness = Child("work", d.path, "witness", "synthetic", 0)
        witness.line()
        for stage in ("before", "during", "after", "own", "during"):
            killed(d, stage, {})
            assert d.process.poll() is None, f"killed {stage} its job: the daemon is gone"
        witness.go()
        result = witness.line()
        assert result["good"], result
        witness.end()
        idle(d)


def test_killed_mps():
    with mps(True) as env, contextlib.ExitStack() as stack:
        d = stack.enter_context(daemon(env))
        for stage in ("before", "after", "during", "own"):
            killed(d, stage, env)
            time.sleep(1)
            lost = d.process.poll() is not None
            if not lost:
                try:
                    served(d, env)
                except AssertionError:  # it finds out by the next job at the latest
                    lost = until(lambda: d.process.poll() is not None, "the daemon to end", 15)
            print(f"    killed {stage}: {'device lost, exit 70' if lost else 'nothing lost'}")
            if lost:
                d = stack.enter_context(again(d, env))
                served(d, env)


def test_reuse():
    with daemon() as d:
        said = run_child("reuse", d.path)
        print(f"    {said['same_address']} of {said['rounds']} at the same address")
        assert said["same_address"], "never got the same address: nothing was tested"
        idle(d)


def test_lies():
    with daemon() as d:
        run_child("lies", d.path)
        served(d, {})
        idle(d)


def torch_tensors(config, megabytes):
    try:
        subprocess.run([sys.executable, "-c", "import torch"], check=True, capture_output=True)
    except subprocess.CalledProcessError:
        raise Skip("no PyTorch") from None
    with daemon(slot_bytes="1G") as d:
        said = run_child("torch", d.path, megabytes, env={"PYTORCH_CUDA_ALLOC_CONF": config})
        staged = d.stats().get("staged_bytes", 0) # what is 0 does not travel
        print(f"    {config}: mode {said['mode']}, relL1 {said['error']:.5f}, "
              f"{staged} bytes staged")
        idle(d)
        return staged


def test_torch():
    assert torch_tensors("backend:native", 64) == 0


def test_expandable_segments():
    torch_tensors("expandable_segments:True", 64)


def test_cuda_malloc_async():
    assert torch_tensors("backend:cudaMallocAsync", 64) > 0, "nothing was staged"


# --- lanes ---

def need_torch():
    try:
        subprocess.run([sys.executable, "-c", "import torch"], check=True, capture_output=True)
    except subprocess.CalledProcessError:
        raise Skip("no PyTorch") from None


def lanes(env):
    need_torch()
    with daemon(env) as d:
        for which in ("own", "legacy", "per_thread"):
            said = run_child("chain", d.path, which, env=env)
            print(f"    chain, {which} stream: mode {said['mode']}, relL1 {said['error']:.5f}, "
                  f"queued in {said['took_us']:.0f} us")
            assert said["mode"] == "lane", said
            assert not said["done"], "the stream was over when the call returned: it waited"
            assert said["took_us"] < 50000, said
            assert said["error"] < BOUNDS["int8_fp16"], said
        said = run_child("streams", d.path, 40, env=env)
        print(f"    40 streams: {said}")
        assert said["wrong"] == 0 and said["mode"] == "lane", said
        said = run_child("flood", d.path, 300, env=env)
        print(f"    300 jobs on a stream: {said}")
        assert said["error"] < BOUNDS["int8_fp16"], said
        assert said["full_ms"] < 200, f"63 jobs fit a lane, and yet the call waited: {said}"
        assert said["took_ms"] > 200, f"it did not wait with a full lane: {said}"
        assert "event=bell" not in d.log(), "streams cannot store words"
        idle(d)
    with daemon(env, slot_bytes="16M") as d:
        print(f"    refused: {run_child('refused', d.path, env=env)}")


def test_ahead_mps():
    """Jobs that are started before their inputs are ready wait for these, or are started again."""
    need_torch()
    with mps(True) as env, daemon(env) as d:
        said = run_child("paces", d.path, 200, env=env)
        stats = d.stats()
        ahead, missed = stats.get("ahead", 0), stats.get("missed", 0)
        print(f"    {said}, {ahead} ahead, {missed} of them in vain")
        assert not said["wrong"] and said["error"] < BOUNDS["int8_fp16"], said
        assert stats["done"] == stats["accepted"] and ahead > missed > 0, stats
        idle(d)


def test_lanes():
    lanes({})


def test_lanes_mps():
    with mps(True) as env:
        lanes(env)


def waiting(env, retry_ms, what):
    """Jobs in flight and queued; what(d) does something to the daemon, then is its successor."""
    with contextlib.ExitStack() as stack:
        d = stack.enter_context(daemon(env, slot_bytes="256M"))
        child = Child("waiting", d.path, retry_ms, what is kill, env=env)
        child.line()
        time.sleep(0.01)
        what(d, stack, env)
        said = child.line()
        child.end()
        print(f"    {what.__name__}: {said}")
        assert said["mode"] == "lane", said
        return said


def restart(d, stack, env):
    d.process.kill()
    d.process.wait()
    stack.enter_context(daemon(env, directory=d.directory, slot_bytes="256M"))


def drain(d, stack, env):
    assert d.stop() == 0
    stack.enter_context(daemon(env, directory=d.directory, slot_bytes="256M"))


def stop(d, _stack, _env):
    d.process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    d.process.send_signal(signal.SIGCONT)


def kill(d, _stack, _env):
    d.process.kill()
    d.process.wait()


def restarts(env):
    need_torch()
    for what in (restart, drain, stop):
        said = waiting(env, 30000, what)
        assert said["wrong"] == 0, f"{what.__name__}: {said}"
    chunks = {**env, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    said = waiting(chunks, 30000, restart)
    assert said["wrong"] == 0 and said["kept"] > 32, f"with memory in chunks: {said}"
    said = waiting(env, 700, kill)
    assert said["wrong"] == 0, f"told to be right, and is not: {said}"
    assert "ELOST" in said["statuses"] and set(said["statuses"]) <= {"ELOST", "OK"}, said
    assert said["seconds"] < 10, said


def test_restart():
    restarts({})


def test_restart_mps():
    """Under MPS a daemon that is killed in its kernel may take its clients' contexts with it."""
    need_torch()
    with mps(True) as env:
        for what in (drain, stop):
            said = waiting(env, 30000, what)
            assert said["wrong"] == 0, f"{what.__name__}: {said}"


def silent(env):
    with daemon(env) as d:
        before = run_child("latency", d.path, 400, env=env)
        children = [Child("silent", d.path, env=env) for _ in range(2)]
        for child in children:
            child.line()
        after = run_child("latency", d.path, 400, env=env)
        for child in children:
            child.end()
        print(f"    alone: {before}; beside two that never signal: {after}")
        for name in before:
            assert after[name] < before[name] + 5, name
        idle(d)


def test_silent():
    silent({})


def test_silent_mps():
    with mps(True) as env:
        silent(env)


# --- leaks ---

def free_memory():
    return run_child("free")["free"]


def unchanged(before, what):
    end = time.monotonic() + 10
    while (lost := before - free_memory()) > SLACK and time.monotonic() < end:
        time.sleep(0.5)
    print(f"    {what}: {lost / 2**20:+.1f} MiB of device memory")
    assert lost <= SLACK, f"{what}: {lost} bytes of device memory are gone"


def cycle(d, cycles):
    child = Child("cycles", d.path, cycles)
    child.line()
    stats = d.stats()
    assert stats.get("buffers", 0) <= 1, f"after {cycles} cycles: {stats}"
    child.end()
    idle(d)


def test_cycles():
    with daemon() as d:
        cycle(d, 20)
        before, fds = free_memory(), d.fds()
        cycle(d, CYCLES)
        unchanged(before, f"{CYCLES} times registered and freed")
        assert d.fds() == fds, f"{d.fds()} descriptors, not {fds}"


def kill_some(d, n):
    """n victims, 8 at a time, each killed while its jobs run."""
    for start in range(0, n, 8):
        victims = [Child("victim", d.path, random.choice(("busy", "busy", "before", "after")))
                   for _ in range(min(8, n - start))]
        for victim in victims:
            victim.line()
            time.sleep(random.uniform(0, 0.01))
            victim.process.send_signal(signal.SIGKILL)
        for victim in victims:
            victim.kill()
    idle(d)


def test_kills():
    with daemon() as d:
        kill_some(d, 8)
        before, fds = free_memory(), d.fds()
        kill_some(d, KILLS)
        unchanged(before, f"{KILLS} clients killed")
        assert d.fds() == fds, f"{d.fds()} descriptors, not {fds}"
        served(d, {})


def main(tests):
    """The children and tests of a module's globals()."""
    if sys.argv[1:2] == ["--child"]:
        try:
            tests["child_" + sys.argv[2]](*json.loads(sys.argv[3]))
        except Skip as skip:
            print(skip, file=sys.stderr)
            sys.exit(77)
        return
    try:
        run_child("probe")
    except (Skip, AssertionError) as error:
        name, why = os.path.basename(sys.argv[0]), str(error).strip().splitlines()[-1]
        print(f"{name}: skipped, no GPU: {why}")
        sys.exit(77)
    sage.run(tests, 900)


if __name__ == "__main__":
    main(globals())
