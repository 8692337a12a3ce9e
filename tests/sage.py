"""A second client library, written from docs/protocol.md alone, and what whole-program tests share.

Daemon starts a private sageattnd in a directory of its own. Client speaks the protocol. Buffer and
Tensor are client memory. reference() is attention in fp64. run() is a small test runner.
"""
import contextlib
import ctypes
import faulthandler
import fcntl
import importlib.util
import mmap
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback

import msgpack
import numpy as np

OPS = {"HELLO": 1, "REGISTER": 2, "UNREGISTER": 3, "SUBMIT": 4, "CANCEL": 5, "STATS": 6,
       "CLIENTS": 7, "PING": 8, "DRAIN": 9, "EVENT": 10, "WAITED": 11, "DONE": 32, "ERROR": 33,
       "LAUNCHED": 34}
OP_NAMES = {number: name for name, number in OPS.items()}
STATUSES = {"EINVAL": 1, "EUNSUPPORTED": 2, "ENOMEM": 3, "EWORKSPACE": 4, "EBUFFER": 5,
            "EBOUNDS": 6, "EHANDLE": 7, "EBUSY": 8, "EQUOTA": 9, "EDRAIN": 10, "EPROTO": 11,
            "EVERSION": 12, "EPERM": 13, "ENODAEMON": 14, "ELOST": 15, "ETIMEDOUT": 16,
            "ECANCELED": 17, "EDEVICE": 18, "EFORK": 19, "EINTERNAL": 20, "ESTARTED": 21,
            "ECAPTURE": 22}
STATUS_NAMES = {0: "OK", **{number: name for name, number in STATUSES.items()}}
DTYPES = {"f16": (1, 2), "bf16": (2, 2), "f32": (3, 4), "bool": (4, 1)}
PACKET_MAX = 65536
PAGE_BYTES, LANES, ENTRIES = 69632, 64, 64
EXIT_DEVICE_LOST = 70

BUILD = os.environ.get("SAGE_BUILDDIR", ".")
PROGRAM = os.path.join(BUILD, "sageattnd")


def _is_sanitized():
    if not os.path.exists(PROGRAM):
        return False
    with open(PROGRAM, "rb") as program:
        code = program.read()
    return b"__asan_init" in code or b"__tsan_init" in code


SANITIZED = _is_sanitized()


class Skip(Exception):
    """This machine cannot do it; the text says why."""


class SageError(Exception):
    def __init__(self, status, text):
        super().__init__(f"{STATUS_NAMES.get(status, status)}: {text}")
        self.status, self.text = status, text


class Closed(Exception):
    """The daemon closed the connection."""


def need_torch():
    """Go on in a python that has PyTorch: this one, or that of `./quickstart python`; or skip."""
    environment = os.path.join(BUILD, "python-env", "bin", "python")
    if SANITIZED:
        print("sanitized libraries cannot be loaded into python")
        sys.exit(77)
    if importlib.util.find_spec("torch"):
        return
    if os.path.exists(environment) and sys.executable != environment:
        os.execv(environment, [environment, *sys.argv])
    print("no PyTorch: ./quickstart python installs one")
    sys.exit(77)


def raises(kind, *words):
    """The block must raise that, with these words."""
    class Block:
        def __enter__(self):
            pass

        def __exit__(self, got, value, _):
            assert got is not None, f"wanted {kind.__name__}, but it was done"
            assert issubclass(got, kind), f"wanted {kind.__name__}, got {value!r}"
            for word in words:
                assert word in str(value), f"no '{word}' in '{value}'"
            return True
    return Block()


def until(condition, what, timeout=10.0):
    """Poll until condition() is true, and return its value."""
    end = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout} s: {what}")
        time.sleep(0.002)


# --- memory ---

def memfd(size, seals=fcntl.F_SEAL_SHRINK, data=None):
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if data:
        os.pwrite(fd, data, 0)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


class Tensor:
    """Four dimensions in a Buffer; `array` is numpy's view of them (bf16: the bits, as uint16)."""

    def __init__(self, buffer, offset, dtype, shape, stride=None):
        self.buffer, self.offset, self.dtype, self.shape = buffer, offset, dtype, tuple(shape)
        if stride is None:
            stride = [1] * 4
            for i in (2, 1, 0):
                stride[i] = stride[i + 1] * max(shape[i + 1], 1)
        self.stride = tuple(stride)
        size = DTYPES[dtype][1]
        kind = {"f16": np.float16, "bf16": np.uint16, "f32": np.float32, "bool": np.uint8}[dtype]
        self.array = np.ndarray(self.shape, kind, buffer.map, offset, [size * s for s in stride])

    def set(self, values):
        if self.dtype == "bf16":
            bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
            values = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        self.array[...] = values
        return self

    def get(self):
        """The values in fp64."""
        if self.dtype == "bf16":
            return (self.array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return self.array.astype(np.float64)

    def wire(self):
        return {"dtype": DTYPES[self.dtype][0], "buffer": self.buffer.id, "offset": self.offset,
                "shape": list(self.shape), "stride": list(self.stride)}


class Buffer:
    """A registered memfd; tensors are cut off it from the front."""

    def __init__(self, client, size, number=None):
        self.client, self.size, self.used = client, size, 0
        self.id = number or client.next_id()
        fd = memfd(size)
        self.map = mmap.mmap(fd, size)
        try:
            client.call("REGISTER", {"buffer": self.id, "kind": 1, "size": size}, [fd])
        finally:
            os.close(fd)

    def tensor(self, dtype, shape):
        t = Tensor(self, self.used, dtype, shape)
        self.used += -(-t.array.size * DTYPES[dtype][1] // 64) * 64
        return t

    def unregister(self):
        self.client.call("UNREGISTER", {"buffer": self.id})


class Page:
    def __init__(self):
        self.fd = memfd(PAGE_BYTES)
        self.map = mmap.mmap(self.fd, PAGE_BYTES)
        self.words = memoryview(self.map).cast("I")  # an item is stored whole
        self.words[0:4] = memoryview(struct.pack("4I", 0x45474153, 1, LANES, ENTRIES)).cast("I")

    def __del__(self):
        os.close(self.fd)

    @staticmethod
    def _at(ring, lane, number):
        return (4096 + 1024 * lane + 256 * ring) // 4 + number % ENTRIES

    def acquire(self, lane, number):
        self.words[self._at(0, lane, number)] = number

    def released(self, lane, number):
        distance = self.words[self._at(1, lane, number)] - number & 0xFFFFFFFF
        return distance < 1 << 31

    def status(self, lane, number):
        return self.words[self._at(2, lane, number)]


# --- the protocol ---

class Client:
    def __init__(self, path, page=True, hello=True, timeout=20.0, **keys):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.seq = self.ids = 0
        self.numbers = [0] * LANES
        self.done = {}  # (lane, number) -> what DONE said
        self.page = page if isinstance(page, Page) else Page() if page else None
        try:
            self.socket.connect(path if isinstance(path, str) else path.path)
            self.socket.settimeout(timeout)  # now: it waits while the backlog is full
            if hello:
                self.hello(**keys)
        except BaseException:
            self.close()
            raise

    def hello(self, **keys):
        body = {"major": 1, "minor": 1, "pid": os.getpid(), "name": "test", "library": "sage.py",
                "page": self.page is not None}
        body.update(keys)
        self.welcome = self.call("HELLO", body, [self.page.fd] if self.page else [])
        return self.welcome

    def close(self):
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def next_id(self):
        self.ids += 1
        return self.ids

    def send_raw(self, data, fds=()):
        try:
            if fds:
                socket.send_fds(self.socket, [data], list(fds))
            else:
                self.socket.send(data)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Closed(str(error)) from None

    def send(self, op, body, fds=()):
        self.seq += 1
        self.send_raw(msgpack.packb([OPS.get(op, op), self.seq, body]), fds)
        return self.seq

    def receive(self):
        """The next packet: op, seq, body. DONE is noted on the way."""
        try:
            data = self.socket.recv(PACKET_MAX + 1)
        except ConnectionResetError:  # it had not read all; what it said before is still there
            data = self.socket.recv(PACKET_MAX + 1)
        if not data:
            raise Closed("end of file")
        op, seq, body = msgpack.unpackb(data)
        if OP_NAMES[op] == "DONE":
            for job in body["jobs"]:
                key = job["lane"], job["number"]
                assert key not in self.done, f"DONE twice: {key}"
                self.done[key] = job
        return OP_NAMES[op], seq, body

    def answer(self, seq):
        while True:
            op, got, body = self.receive()
            if op == "ERROR" and got in (seq, 0):
                raise SageError(body["status"], body["text"])
            if op not in ("DONE", "LAUNCHED") and got == seq:
                return body

    def call(self, op, body=None, fds=()):
        return self.answer(self.send(op, {} if body is None else body, fds))

    def stats(self):
        return self.call("STATS")

    def ping(self):
        self.call("PING")

    # --- jobs ---

    def submit(self, attn, lane=0, number=None, ready=True, **more):
        if number is None:
            self.numbers[lane] = number = (self.numbers[lane] + 1) & 0xFFFFFFFF
        if ready:
            self.page.acquire(lane, number)
        self.send("SUBMIT", {"lane": lane, "number": number, "attn": attn, **more})
        return lane, number

    def wait_done(self, job, timeout=20.0):
        """Until DONE names the job: its map. The page must agree."""
        end = time.monotonic() + timeout
        while job not in self.done:
            if time.monotonic() > end:
                raise AssertionError(f"job {job} is not over within {timeout} s")
            self.receive()
        assert self.page.released(*job), f"job {job} is DONE but not released"
        same = self.page.status(*job) == self.done[job]["status"]
        assert same, f"job {job}: page and DONE differ"
        return self.done[job]

    def run(self, attn, **more):
        """Submit and wait: 0, or raises SageError."""
        done = self.wait_done(self.submit(attn, **more))
        if done["status"]:
            raise SageError(done["status"], done.get("text", ""))
        return done


def describe(q, k, v, o, mask=None, lse=None, **options):
    """The `attn` map of a SUBMIT."""
    attn = {"q": q.wire(), "k": k.wire(), "v": v.wire(), "o": o.wire(), "scale": 0.0, "variant": 0,
            "smooth_k": True, "smooth_v": False, "causal": False, "diagonal": 0,
            "window_left": -1, "window_right": -1}
    if mask:
        attn["mask"] = mask.wire()
    if lse:
        attn["lse"] = lse.wire()
    attn.update(options)
    return attn


class Problem:
    """Random q, k, v and room for o in a buffer of their own."""

    def __init__(self, client, b=1, hq=2, hkv=None, nq=64, nk=None, d=64, dtype="f16", seed=1,
                 lse=False, mask=None, **options):
        hkv, nk = hkv or hq, nq if nk is None else nk
        rng = np.random.default_rng(seed)
        elements = 2 * b * (hq * nq + hkv * nk) * d
        size = 2 * elements + 4 * b * hq * nq + (mask.size * 4 if mask is not None else 0) + 4096
        self.buffer = Buffer(client, size)
        self.q = self.buffer.tensor(dtype, (b, hq, nq, d))
        self.k = self.buffer.tensor(dtype, (b, hkv, nk, d))
        self.v = self.buffer.tensor(dtype, (b, hkv, nk, d))
        self.o = self.buffer.tensor(dtype, (b, hq, nq, d))
        self.lse = self.buffer.tensor("f32", (b, hq, nq, 1)) if lse else None
        self.mask = None
        if mask is not None:
            kind = "bool" if mask.dtype == bool else "f32"
            self.mask = self.buffer.tensor(kind, mask.shape).set(mask)
        for t in (self.q, self.k, self.v):
            t.set(rng.standard_normal(t.shape))
        self.options = options
        self.attn = describe(self.q, self.k, self.v, self.o, self.mask, self.lse, **options)

    def check(self, rows=slice(None), keys=slice(None)):
        """o (and lse) against fp64."""
        mask = None
        if self.mask:
            mask = self.mask.array != 0 if self.mask.dtype == "bool" else self.mask.get()
        o, lse = reference(self.q.get()[:, :, rows], self.k.get()[:, :, keys],
                           self.v.get()[:, :, keys], mask=mask, **self.options)
        compare(self.o.get()[:, :, rows], o, "o")
        if self.lse:
            got = self.lse.get()[:, :, rows, 0]
            seen = np.isfinite(lse)
            assert np.array_equal(np.isneginf(got), ~seen), "lse: -inf in other places"
            worst = np.abs(got[seen] - lse[seen]).max(initial=0)
            assert worst < 0.05, f"lse: off by {worst}"


def reference(q, k, v, scale=0.0, causal=False, diagonal=0, window_left=-1, window_right=-1,
              mask=None, **_):
    """Attention in fp64: o and lse of q [B, Hq, Nq, D], k and v [B, Hkv, Nk, D]."""
    nq, nk, d = q.shape[2], k.shape[2], q.shape[3]
    share = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, share, 1), np.repeat(v, share, 1)
    score = q @ k.swapaxes(2, 3) * (scale or 1 / np.sqrt(d))
    middle = np.arange(nq)[:, None] + (nk - nq if diagonal else 0)
    key = np.arange(nk)[None, :]
    right = 0 if causal else window_right
    visible = np.ones((nq, nk), bool)
    if window_left >= 0:
        visible &= key >= middle - window_left
    if right >= 0:
        visible &= key <= middle + right
    score = np.where(visible, score, -np.inf)
    if mask is not None:
        score = np.where(mask, score, -np.inf) if mask.dtype == bool else score + mask
    top = np.max(score, -1, initial=-np.inf, keepdims=True)
    weight = np.exp(score - np.where(np.isfinite(top), top, 0))
    total = weight.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + top)[..., 0]
    return weight / np.where(total > 0, total, 1) @ v, lse


def compare(got, wanted, name):
    assert np.isfinite(got).all(), f"{name}: not finite"
    a, b = got.ravel(), wanted.ravel()
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    cosine = a @ b / norm if norm else float(not a.any() and not b.any())
    assert cosine > 0.999, f"{name}: cosine {cosine}"


# --- a daemon of one's own ---

def _die_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def environment(**more):
    drop = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID")
    return {**{k: v for k, v in os.environ.items() if k not in drop}, **more}


class Daemon:
    """Options are keywords; env adds to the environment, argv0 is put before the command."""
    ends_with = 0, EXIT_DEVICE_LOST, -signal.SIGKILL  # where a test ends it

    def __init__(self, env=None, argv0=(), wait=True, directory=None, **options):
        self.own = directory is None
        self.directory = directory or tempfile.mkdtemp(prefix="sage")
        self.path = os.path.join(self.directory, "s")
        self.log_path = tempfile.mktemp(prefix="log", dir=self.directory)
        options = {"backend": "cpu", "threads": 1, "slot_bytes": "8M", "socket": self.path,
                   **options}
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen([*argv0, PROGRAM, *flags], stderr=log, stdout=log,
                                            stdin=subprocess.DEVNULL, env=environment(**env or {}),
                                            preexec_fn=_die_with_parent)
        self.pid = self.process.pid
        if wait:
            until(self.serves, "the daemon to listen", 30)

    def log(self):
        with open(self.log_path, errors="replace") as log:
            return log.read()

    def serves(self):
        if self.process.poll() is not None:
            raise AssertionError(f"daemon ended with {self.process.returncode}")
        return "event=ready" in self.log()

    def client(self, *args, **keys):
        return Client(self.path, *args, **keys)

    def fds(self):
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def rss(self):
        with open(f"/proc/{self.pid}/statm") as statm:
            return int(statm.read().split()[1]) * mmap.PAGESIZE

    def stats(self):
        with self.client(page=False) as client:
            return client.stats()

    def quiet(self, fds):
        """All that clients held is given back: descriptors, buffers, jobs."""
        def idle():
            s = self.stats()
            time.sleep(0.02)  # until it has noticed that this one is gone too
            gone = ("buffers", "mapped_bytes", "queued", "running", "slots_used")
            return self.fds() == fds and s["clients"] == 1 and not any(map(s.get, gone))
        until(idle, f"the daemon to be back at {fds} descriptors, has {self.fds()}: {self.stats()}")

    def wait(self, timeout=20):
        return self.process.wait(timeout)

    def stop(self):
        """SIGTERM; the exit status. Sanitizers make it non-zero."""
        if self.process.poll() is None:
            self.process.terminate()
        return self.wait()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            code = self.process.poll()
            if kind is None and code is None:
                code = self.stop()
                assert code == 0, f"daemon ended with {code}"
            elif kind is None:
                assert code in self.ends_with, f"daemon ended with {code}"
        except BaseException:
            kind = True
            raise
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            if kind:
                print(f"--- log of the daemon\n{self.log()[-6000:]}---", flush=True)
            if self.own:
                shutil.rmtree(self.directory, ignore_errors=True)


class Manager:
    """The service manager's end of sd_notify."""

    def __init__(self, directory):
        self.path = os.path.join(directory, "notify")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)

    def wait_for(self, word, timeout=10):
        end = time.monotonic() + timeout
        seen = []
        while (left := end - time.monotonic()) > 0:
            self.socket.settimeout(left)
            with contextlib.suppress(TimeoutError):
                seen.append(self.socket.recv(4096).decode())
                if any(line.startswith(word) for line in seen[-1].split("\n")):
                    return seen[-1]
        raise AssertionError(f"no {word} in {seen}")


# --- running tests ---

@contextlib.contextmanager
def refused(status, *words):
    """The block must raise SageError with this status, and a text that has these words."""
    try:
        yield
    except SageError as error:
        assert error.status == STATUSES[status], f"wanted {status}, got {error}"
        for word in words:
            assert word in error.text, f"no '{word}' in '{error.text}'"
        return
    raise AssertionError(f"wanted {status}, but it was done")


def run(tests, limit=120):
    """Run every test_* of the caller's globals(), or those named on the command line; each may take
    `limit` seconds."""
    names = sys.argv[1:] or [n for n in tests if n.startswith("test_")]
    failed = skipped = 0
    for name in names:
        start = time.monotonic()
        faulthandler.dump_traceback_later(limit, exit=True)
        try:
            tests[name]()
            result = "ok"
        except Skip as skip:
            result, skipped = f"skipped: {skip}", skipped + 1
        except Exception:
            traceback.print_exc()
            result, failed = "FAILED", failed + 1
        print(f"{name}: {result} ({time.monotonic() - start:.1f} s)", flush=True)
    sys.exit(1 if failed else 77 if skipped == len(names) else 0)
