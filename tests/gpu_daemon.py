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
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

import sage
from gpu_client import BOUNDS, Attn, Client, Cuda, Problem, VARIANTS, capture, synthetic, tensor
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
        t = [tensor(x.data_ptr(), tuple(x.shape)) for x in (q, k, v, o)]
        attn = Attn(q=t[0], k=t[1], v=t[2], o=t[3], variant=VARIANTS["int8_fp16"], smooth_k=True,
                    window_left=-1, window_right=-1)
        client.enqueue(attn, torch.cuda.current_stream().cuda_stream)
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


# --- processes ---

class Child:
    def __init__(self, name, *args, env=None):
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(sys.argv[0]), "--child", name, json.dumps(args)],
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
    several({"SAGE_MODE": "event"})


def test_several_sync():
    several({})


def test_several_mps():
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
