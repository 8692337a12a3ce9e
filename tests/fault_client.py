"""Clients that gpu_faults.py kills, stops and throws out: they put themselves into a state, say so,
and tell in the end what they got. On a GPU or, to try the program, on the CPU."""
import contextlib
import ctypes
import os
import select
import socket
import stat
import time

import numpy as np

import sage
from gpu_client import BOUNDS, VARIANTS, Attn, Client, Cuda, tensor
from gpu_daemon import say

OUTPUTS = 8  # streams, each with an output of its own
CHAIN = 48  # jobs on one stream: some 0.1 s on an H100
TAIL = 4096  # bytes of each job's output that are kept
OWN = 1 << 30  # bytes that a kernel of the client's own writes, some 0.4 ms
# backend -> heads, tokens, head_dim
LARGE = {"cuda": (32, 8192, 128), "cpu": (4, 1024, 64)}
SMALL = {"cuda": (4, 1024, 64), "cpu": (2, 64, 64)}


class Job(ctypes.Structure):
    _fields_ = [("lane", ctypes.c_void_p), ("number", ctypes.c_uint32)]


class Work:
    """One problem whose heads are all alike, with several outputs: right are those whose heads have
    the bits of the first run, which is compared with fp64."""

    def __init__(self, backend, path, name, retry_ms, small):
        heads, n, d = (SMALL if small else LARGE)[backend]
        self.shape, self.path = (1, heads, n, d), path
        self.head, self.size = 2 * n * d, 2 * heads * n * d
        self.client = Client(path, name, retry_ms)
        self.base = self.allocate((3 + OUTPUTS) * self.size + CHAIN * TAIL)
        self.kept = self.base + (3 + OUTPUTS) * self.size
        self.loading_ms = None
        self.tails = 0  # of the last queue() on one stream
        rng = np.random.default_rng(1)
        head = [rng.standard_normal((n, d), np.float32).astype(np.float16) for _ in range(3)]
        for i, array in enumerate(head):
            self.put(self.base + i * self.size, np.tile(array, (heads, 1)))
        self.attns = [self.describe(self.base, i) for i in range(OUTPUTS)]
        self.prepare()
        self.queue(1, 1)
        self.sync()
        self.wanted = self.get(self.base + 3 * self.size, (n, d))
        rows = slice(0, None, n // 8)
        q, k, v = (a.astype(np.float64)[None, None] for a in head)
        exact = sage.reference(q[:, :, rows], k, v)[0][0, 0]
        error = np.abs(self.wanted[rows] - exact).sum() / np.abs(exact).sum()
        assert error < BOUNDS["int8_fp16"], f"relL1 {error}"
        assert self.right(), "the first job is not the same in all heads"

    def describe(self, base, output):
        at = [base + i * self.size for i in (0, 1, 2, 3 + output)]
        q, k, v, o = (tensor(address, self.shape) for address in at)
        return Attn(q=q, k=k, v=v, o=o, variant=VARIANTS["int8_fp16"], smooth_k=True,
                    window_left=-1, window_right=-1)

    def prepare(self):
        """Whatever is wanted before the first job."""

    def probe(self):
        """RuntimeError, where there is a context and it is lost."""

    def right(self):
        """Has all that was queued last been computed, without fault?"""
        tail = self.wanted.reshape(-1)[-TAIL // 2:].tobytes()
        kept = self.get(self.kept, (self.tails, TAIL // 2)) if self.tails else ()
        same = all(one.tobytes() == tail for one in kept)
        for i in range(self.used):
            for head in (0, self.shape[1] - 1):
                at = self.base + (3 + i) * self.size + head * self.head
                same &= self.get(at, self.wanted.shape).tobytes() == self.wanted.tobytes()
        return same

    def connection(self):
        """A copy of the descriptor that the library talks to the daemon with."""
        for fd in map(int, os.listdir("/proc/self/fd")):
            with contextlib.suppress(OSError):  # it is the listing's own, or not connected
                if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                    continue
                found = socket.socket(fileno=os.dup(fd))
                if found.family == socket.AF_UNIX and found.getpeername() == self.path:
                    return found
                found.close()
        raise AssertionError("the library has no connection?")


class GpuWork(Work):
    """Each job between kernels of the client's: one that spoils its output, one that keeps the end
    of it."""

    def __init__(self, *args):
        self.cuda = Cuda()
        super().__init__(*args)

    def allocate(self, size):
        return self.cuda.alloc(size)

    def put(self, address, array):
        self.cuda.put(address, array)

    def get(self, address, shape):
        return self.cuda.get(address, shape)

    def prepare(self):
        cuda = self.cuda
        self.streams = [cuda.stream() for _ in range(OUTPUTS)]
        host = ctypes.c_void_p()
        cuda("cuMemHostAlloc", ctypes.byref(host), ctypes.c_size_t(4096), 3)  # portable, mapped
        self.word, self.holds = ctypes.c_uint32.from_address(host.value), 0
        self.word.value, self.word_at = 0, ctypes.c_uint64()
        cuda("cuMemHostGetDevicePointer_v2", ctypes.byref(self.word_at), host, 0)
        for stream in self.streams[1:]:  # a lane for each, and whatever CUDA does the first time
            self.client.enqueue(self.attns[0], stream)
            cuda.sync(stream)

    def hold(self):
        """The first stream waits until let_go()."""
        self.holds += 1
        self.cuda("cuStreamWaitValue32_v2", self.streams[0], self.word_at,
                  ctypes.c_uint32(self.holds), 0)  # GEQ

    def let_go(self):
        self.word.value = self.holds

    def queue(self, streams, jobs):
        self.used, self.tails = streams, jobs if streams == 1 else 0
        for i, stream in enumerate(self.streams[:streams]):
            o = self.base + (3 + i) * self.size
            for n in range(jobs):
                self.cuda("cuMemsetD8Async", ctypes.c_uint64(o), ctypes.c_ubyte(255),
                          ctypes.c_size_t(self.size), stream)  # NaN
                self.client.enqueue(self.attns[i], stream)
                if self.tails:
                    self.cuda("cuMemcpyDtoDAsync_v2", ctypes.c_uint64(self.kept + n * TAIL),
                              ctypes.c_uint64(o + self.size - TAIL), ctypes.c_size_t(TAIL), stream)

    def sync(self):
        for stream in self.streams[:self.used]:
            self.cuda.sync(stream)
        for stream in self.streams[:self.used]:
            self.client.stream_error(stream)

    def churn(self):
        """New memory, a job in it, and away with it."""
        base = self.cuda.alloc(self.size * 4)
        self.client.enqueue(self.describe(base, 0), self.streams[0])
        self.cuda.sync(self.streams[0])
        self.client.stream_error(self.streams[0])
        self.cuda.free(base)
        self.client.trim()

    def own(self, memory):
        for _ in range(64):
            self.cuda.fill(memory, OWN, self.streams[1])
        self.cuda.sync(self.streams[1])

    def probe(self):
        self.cuda.memory()  # of a lost context every call fails

    def lazy(self):
        """A first kernel of libsageattn in this process, behind what its stream waits for."""
        why = ctypes.create_string_buffer(256)
        start = time.monotonic()
        error = self.lib.sage_attn_cuda(
            ctypes.byref(self.attns[1]), None, ctypes.c_void_p(self.workspace),
            ctypes.c_size_t(self.bytes), self.streams[0], why, ctypes.c_size_t(len(why)))
        assert error == 0, f"sage_attn_cuda: {error}: {why.value.decode()}"
        self.loading_ms = 1e3 * (time.monotonic() - start)

    def before_lazy(self):
        self.lib = ctypes.CDLL(os.path.join(sage.BUILD, ".libs", "libsageattn.so"))
        self.lib.sage_attn_cuda_workspace.restype = ctypes.c_size_t
        self.bytes = self.lib.sage_attn_cuda_workspace(ctypes.byref(self.attns[1]), None)
        self.workspace = self.cuda.alloc(self.bytes + 1)


class CpuWork(Work):
    def allocate(self, size):
        lib = self.client.lib
        lib.sage_buffer_data.restype = ctypes.c_void_p
        lib.sage_wait.argtypes = [Job, ctypes.c_int]
        lib.sage_ready.argtypes = [Job]
        return lib.sage_buffer_data(self.buffer(size))

    def buffer(self, size):
        buffer = ctypes.c_void_p()
        self.client.must(self.client.lib.sage_buffer_alloc(
            self.client.client, ctypes.c_size_t(size), ctypes.byref(buffer)))
        return buffer

    def array(self, address, shape):
        size = 2 * int(np.prod(shape))
        memory = (ctypes.c_char * size).from_address(address)
        return np.frombuffer(memory, np.float16).reshape(shape)

    def put(self, address, array):
        self.array(address, array.shape)[...] = array

    def get(self, address, shape):
        return self.array(address, shape).copy()

    def prepare(self):
        self.lanes, self.jobs, self.flags = [], [], 0
        for _ in range(OUTPUTS):
            lane = ctypes.c_void_p()
            self.client.must(self.client.lib.sage_lane_create(self.client.client,
                                                              ctypes.byref(lane)))
            self.lanes.append(lane)

    def hold(self):
        self.flags = 1  # SAGE_HELD

    def let_go(self):
        self.flags = 0
        for job in self.jobs:
            self.client.must(self.client.lib.sage_ready(job))

    def submit(self, lane, attn):
        self.jobs.append(Job())
        self.client.must(self.client.lib.sage_attn_submit(lane, ctypes.byref(attn), self.flags,
                                                          ctypes.byref(self.jobs[-1])))

    def queue(self, streams, jobs):
        self.used, self.jobs = streams, []
        for i in range(streams):
            self.array(self.base + (3 + i) * self.size, self.shape)[...] = np.nan
            for _ in range(jobs):
                self.submit(self.lanes[i], self.attns[i])

    def sync(self):
        statuses = [self.client.lib.sage_wait(job, -1) for job in self.jobs]
        failed = [job for job, status in zip(self.jobs, statuses) if status]
        if failed:
            self.client.must(self.client.lib.sage_wait(failed[0], 0))

    def churn(self):
        buffer = self.buffer(4 * self.size)
        self.jobs = []
        self.submit(self.lanes[0],
                    self.describe(self.client.lib.sage_buffer_data(buffer), 0))
        self.sync()
        self.client.must(self.client.lib.sage_buffer_free(buffer))


WORKS = {"cuda": GpuWork, "cpu": CpuWork}


# --- what the parent says: a line at a time, and it awaits an answer to each ---

class Ear:
    heard = True

    def told(self, timeout=0):
        """Has the parent said to go on?"""
        self.heard = self.heard or bool(select.select([0], [], [], timeout)[0])
        return self.heard

    def line(self):
        """What it said; empty at the end."""
        self.told(None)
        self.heard = False
        return os.read(0, 64).decode().strip()


# --- states: up to the first `yield` the client gets into it ---

def idle(work, ear):
    yield
    ear.told(None)
    work.queue(1, 1)
    work.sync()


def registering(work, ear):
    yield
    while not ear.told():
        work.churn()
    work.queue(1, 1)
    work.sync()


def held(work, ear):
    """The inputs are not ready: acquire is not reached."""
    work.hold()
    work.queue(1, 4)
    yield
    ear.told(None)
    work.let_go()
    work.sync()


def queued(work, _):
    """More streams than slots."""
    work.queue(OUTPUTS, 8)
    yield
    work.sync()


def running(work, _):
    work.queue(1, CHAIN)
    yield
    work.sync()


def waiting(work, ear):
    """One job after the other, the CPU in a wait for its release."""
    work.queue(1, 1)
    yield
    work.sync()
    while not ear.told():
        work.queue(1, 1)
        work.sync()


def own(work, ear):
    """A kernel of the client's runs."""
    memory = work.cuda.alloc(OWN)
    yield
    while not ear.told():
        work.own(memory)
    work.cuda.free(memory)
    work.queue(1, 1)
    work.sync()


def lazy(work, ear):
    """A kernel that has to be loaded yet is launched behind a job that nobody is going to do."""
    work.before_lazy()
    yield
    ear.told(None)
    work.queue(1, 4)
    work.lazy()
    work.sync()


def thrown_out(work, _):
    """With work pending, a packet that is none."""
    work.queue(1, CHAIN)
    with work.connection() as connection:
        connection.send(b"\xc1")
    yield
    work.sync()


def forked(work, _):
    """A child keeps the connection and lives on."""
    work.queue(1, CHAIN)
    connection = work.connection()
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    connection.close()
    yield child
    work.sync()


STATES = {f.__name__: f for f in (idle, registering, held, queued, running, waiting, own, lazy,
                                  thrown_out, forked)}


def play(work, ear, state):
    """What it came to; a CUDA context that is gone takes the process along."""
    status, text, right = "OK", "", None
    try:
        try:
            steps = STATES[state](work, ear)
            say(state=state, child=next(steps))
            for _ in steps:
                pass
            over = time.monotonic()
            right = work.right()
        except sage.SageError as error:
            over, text = time.monotonic(), error.text
            status = sage.STATUS_NAMES[error.status]
            work.probe()
    except RuntimeError as error:
        say(status="CUDA", text=str(error), right=None, at=time.monotonic())
        os._exit(3)
    ear.line()
    say(status=status, text=text, right=right, at=over, loading_ms=work.loading_ms)


def child_client(path, backend, name, retry_ms, small=False):
    work, ear = WORKS[backend](backend, path, name, retry_ms, small), Ear()
    ear.heard = False
    say(mode=work.client.mode())
    while state := ear.line():
        play(work, ear, state)
    work.client.close()


def child_witness(path, backend):
    """One small job after the other, each looked at; for each line ("rest": and pause until the
    next) how many, how many were wrong, the longest, the last error."""
    work, ear = WORKS[backend](backend, path, "witness", 60000, True), Ear()
    ear.heard = False
    say(ready=True)
    line = "go"
    while line:
        jobs, wrong, worst, error = 0, 0, 0.0, ""
        while line == "go" and not (jobs and ear.told()):
            start = time.monotonic()
            try:
                try:
                    work.queue(1, 1)
                    work.sync()
                    wrong += not work.right()
                except sage.SageError as failed:
                    error = str(failed)
                    work.probe()
                    if ear.told(0.001):
                        break
            except RuntimeError:  # its context is lost
                os._exit(3)
            jobs += 1
            worst = max(worst, time.monotonic() - start)
        line = ear.line()
        if line:
            say(jobs=jobs, wrong=wrong, worst_ms=1e3 * worst, error=error)
    work.client.close()


def child_meter():
    """For each line, the free bytes of the device."""
    cuda = Cuda()
    say(ready=True)
    while os.read(0, 64):
        say(free=cuda.memory()[0])
