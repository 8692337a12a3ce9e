"""Connections to daemons: one for each device of this process, made when first used."""
from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import sys
import threading

from . import _native
from ._native import SageError

CPU = -1  # the key of the connection to a daemon that computes on the CPU
STREAMS = 64  # as many as sage_stream_error() knows of
SHARE = 16  # of the device that the daemon may keep mapped while no job uses it: one part in


def _name() -> bytes:
    """What the daemon's statistics show."""
    script = os.path.basename(sys.argv[0]) if sys.argv and sys.argv[0] else ""
    return ascii(script if script not in ("", "-c", "-m") else "python").strip("'\"").encode()[:63]


class Connection:
    """A connection of libsageclient's; any thread may call anything. gpu: the UUID, or None for a
    daemon that computes on the CPU; memory: bytes of the device's."""

    def __init__(self, gpu: str | None, memory: int):
        self.lib = _native.client()
        self.handle = ctypes.c_void_p()
        self.cache_bytes = memory // SHARE
        options = _native.ConnectOptions(name=_name(), gpu=gpu.encode() if gpu else None)
        given = os.environ.get("SAGE_CACHE_BYTES")
        if given and given.isascii() and given.isdigit():
            self.cache_bytes = int(given)
        elif not given:  # what is no number the library refuses
            options.cache_bytes = self.cache_bytes
        self._must(self.lib.sage_connect(ctypes.byref(options), ctypes.byref(self.handle)))
        self.server = _native.Server()
        self._must(self.lib.sage_server_info(self.handle, ctypes.byref(self.server)))
        self.lock = threading.Lock()
        self.streams: dict[int, None] = {}  # the last used of which libsageclient keeps errors
        self.staging = threading.Lock()
        self.buffer, self.size = ctypes.c_void_p(), 0

    def _must(self, status: int) -> None:
        if status:
            raise SageError(status, self.lib.sage_last_error().decode())

    @property
    def backend(self) -> str:
        return self.server.backend.decode()

    def enqueue(self, problem: bytes, stream: int) -> None:
        """Compute as if by a kernel of the stream."""
        self.check_stream(stream)
        with self.lock:
            self.streams.pop(stream, None)
            self.streams[stream] = None
            if len(self.streams) > STREAMS:
                del self.streams[next(iter(self.streams))]
        self._must(self.lib.sage_attn_enqueue(self.handle, problem, stream))

    def check_stream(self, stream: int) -> None:
        """Raise the error of an earlier job of this stream that failed since it was last asked."""
        status = self.lib.sage_stream_error(self.handle, stream)
        if not status:
            return
        text = self.lib.sage_last_error().decode()
        if text.startswith("a job of this stream"):
            text = f"an earlier job of this stream failed, its output is undefined: {text}"
        raise SageError(status, text)

    def check(self) -> None:
        """check_stream() of all; the first error, after all were asked. A stream that the driver
        does not know (any more) is one, once."""
        with self.lock:
            streams = list(self.streams)
        first = None
        for stream in streams:
            try:
                self.check_stream(stream)
            except SageError as error:
                first = first or error
                if error.status == _native.EINVAL:
                    with self.lock:
                        self.streams.pop(stream, None)
        if first:
            raise first

    @contextlib.contextmanager
    def stage(self, size: int):
        """An address of `size` bytes that the daemon (CPU) maps too; for one user at a time. It
        stays as large as the largest so far."""
        with self.staging:
            if size > self.size:
                self.lib.sage_buffer_free(self.buffer)
                self.buffer, self.size = ctypes.c_void_p(), 0
                self._must(self.lib.sage_buffer_alloc(self.handle, size, ctypes.byref(self.buffer)))
                self.size = size
            yield self.lib.sage_buffer_data(self.buffer)

    def run(self, problem: bytes) -> None:
        """Compute and wait; tensors lie in stage()'s memory."""
        self._must(self.lib.sage_attn_run(self.handle, problem, None))

    def registered(self) -> int:
        """Bytes of the device that the daemon maps for this process: whole segments."""
        return self.lib.sage_registered_bytes(self.handle)

    def trim(self) -> None:
        self._must(self.lib.sage_trim(self.handle))

    def close(self) -> None:
        self.lib.sage_disconnect(self.handle)
        self.handle = None


_lock = threading.Lock()
_connections: dict[int, Connection] = {}
on_close: list = []  # what else has to be forgotten then


def connection(device: int, memory: int = 0) -> Connection:
    """That of a CUDA device of `memory` bytes by its number in this process, or of the CPU."""
    found = _connections.get(device)
    if found:
        return found
    with _lock:
        if device not in _connections:
            made = Connection(None if device == CPU else gpu_uuid(device), memory)
            if device == CPU and made.backend != "cpu":
                text = (f"the daemon computes on {made.server.device.decode()}, these tensors are "
                        "in the CPU's memory: name the socket of a daemon with --backend=cpu in "
                        "SAGEATTND_SOCKET")
                made.close()
                raise SageError(_native.EUNSUPPORTED, text)
            _connections[device] = made
        return _connections[device]


def made(device: int) -> Connection | None:
    """connection(), if there is one already."""
    return _connections.get(device)


def connections() -> dict[int, Connection]:
    with _lock:
        return dict(_connections)


def close() -> None:
    """Close all connections, while no other thread computes; waits for what streams still have to
    do. The next job connects, and mode "auto" looks for a daemon anew."""
    with _lock:
        while _connections:
            _connections.popitem()[1].close()
    for forget in on_close:
        forget()


def _fork_child() -> None:
    """The parent's connections cannot be used here; libsageclient has closed what they held."""
    global _lock
    _lock = threading.Lock()
    _connections.clear()


os.register_at_fork(after_in_child=_fork_child)


def _at_exit() -> None:
    """Daemon threads go on while Python ends, and may be in a call: then the kernel closes."""
    if threading.active_count() == 1:
        close()


atexit.register(_at_exit)


def gpu_uuid(device: int) -> str:
    """As nvidia-smi -L shows it; of a device by its number in this process."""
    cuda = ctypes.CDLL("libcuda.so.1")
    number, uuid = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    error = (cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(number), device)
             or cuda.cuDeviceGetUuid(uuid, number))
    if error:
        raise SageError(_native.EUNSUPPORTED,
                        f"CUDA driver error {error}: what is the UUID of device {device}?")
    text = bytes(uuid).hex()
    return "GPU-" + "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
