"""Jobs on a GPU that its daemon may compute: which ones, their errors, the memory they leave."""
from __future__ import annotations

import functools
import logging
import math
import statistics
import threading
import time
from typing import NamedTuple, Optional

import torch

from . import _client, _native
from ._native import SageError

log = logging.getLogger("sageattnd")

WELL_ABOVE = 10  # a job that takes so many hand-offs is made slower by a tenth at most
TRIES = 9
AGAIN_S = 10  # after what may be otherwise soon


class Choice(NamedTuple):
    """connection: None where this process computes by itself; least: operations of the smallest
    job for the daemon; until: when to look again, by time.monotonic()."""

    connection: Optional[_client.Connection]
    least: float
    until: float = math.inf


_lock = threading.Lock()
_choices: dict[int, Choice] = {}
_client.on_close.append(_choices.clear)


def choose(problem: bytes, device: int, mode: str) -> Optional[_client.Connection]:
    """The connection by which to compute this problem, or None: this process itself. `device` is
    the current one."""
    if mode == "inproc":
        return None
    capturing = torch.cuda.is_current_stream_capturing()
    if mode == "daemon":
        if capturing:
            raise SageError(_native.ECAPTURE, "mode: 'daemon': a graph cannot be captured with it, "
                                              "for a daemon has to be told at each run")
        return _connect(device)
    if capturing:
        return None
    choice = _choices.get(device)
    if not choice or choice.until < time.monotonic():
        with _lock:
            if _choices.get(device) is choice:
                _choices[device] = _look(device)
            choice = _choices[device]
    if not choice.connection or _native.attn().sage_attn_ops(problem, None) < choice.least:
        return None
    return _connect(device)


@functools.lru_cache(None)
def _memory(device: int) -> int:
    return torch.cuda.get_device_properties(device).total_memory


def _connect(device: int) -> _client.Connection:
    connection = _client.connection(device, _memory(device))
    _trim_with_empty_cache()
    return connection


def _look(device: int) -> Choice:
    try:
        connection = _connect(device)
        handoff, rate = _measure(connection, device)
    except (SageError, ImportError, torch.cuda.OutOfMemoryError) as error:
        known = isinstance(error, SageError) and error.name == "SAGE_ENODAEMON"
        log.log(logging.INFO if known else logging.WARNING,
                "cuda:%d: attention in this process, not by a daemon: %s", device, error)
        full = isinstance(error, torch.cuda.OutOfMemoryError)
        return Choice(None, 0.0, time.monotonic() + AGAIN_S if full else math.inf)
    if rate is None:
        log.info("cuda:%d: attention in this process for %d s: others keep the GPU too busy to "
                 "measure a hand-off, %.0f us now", device, AGAIN_S, handoff * 1e6)
        return Choice(None, 0.0, time.monotonic() + AGAIN_S)
    least = WELL_ABOVE * handoff * rate
    log.info("cuda:%d: jobs above %.2g ms (%.3g operations) go to the daemon, process %d: a "
             "hand-off takes %.0f us", device, WELL_ABOVE * handoff * 1e3, least,
             connection.server.pid, handoff * 1e6)
    return Choice(connection, least)


def _measure(connection: _client.Connection, device: int) -> tuple[float, Optional[float]]:
    """Seconds from here to the daemon and back with the smallest job; operations a second, None
    where a job of some 1 ms takes hardly longer, for both wait for others."""
    place = torch.device("cuda", device)
    stream = torch.cuda.Stream(place)

    def seconds(tokens: int):
        """Of a job on an idle stream, and its operations."""
        with torch.cuda.stream(stream):
            qkvo = [torch.zeros((1, 1, tokens, 64), dtype=torch.float16, device=place)
                    for _ in range(4)]
        numbers = [(_native.F16, 0, 0, t.data_ptr(), *t.shape, *t.stride()) for t in qkvo]
        options = _native.Options(False, 0.0, 1, True, False, False, 0, -1, -1)
        problem = _native.pack(*numbers, _native.ABSENT, _native.ABSENT, options)
        took = []
        for _ in range(TRIES):
            stream.synchronize()
            start = time.perf_counter()
            connection.enqueue(problem, stream.cuda_stream)
            stream.synchronize()
            took.append(time.perf_counter() - start)
        connection.check_stream(stream.cuda_stream)
        return statistics.median(took), _native.attn().sage_attn_ops(problem, None)

    handoff, _ = seconds(64)
    whole, ops = seconds(32768)  # a millisecond of an H100, and 16 MiB
    return handoff, ops / (whole - handoff) if whole > 2 * handoff else None


# --- errors ---

def check_stream(device: int) -> None:
    """This process is about to compute with what is on the device's current stream: an earlier job
    there that a daemon had may have failed."""
    connection = _client.made(device)
    if not connection:
        return
    with torch.cuda.device(device):  # a default stream is 0 on each device
        if torch.cuda.is_current_stream_capturing():
            return
        stream = torch.cuda.current_stream().cuda_stream
        if stream in connection.streams:
            connection.check_stream(stream)


def check_errors() -> None:
    """Wait for the GPUs that daemons have computed on for this process, and raise SageError for
    the first job that failed since it was last asked. Its output, and that of those after it on
    its stream, are undefined."""
    for device, connection in _client.connections().items():
        if device == _client.CPU:
            continue  # its errors are those of the call
        with torch.cuda.device(device):  # of the default stream only the context says whose
            torch.cuda.synchronize()
            connection.check()


# --- memory ---

def _trim_with_empty_cache() -> None:
    """From the first connection on torch.cuda.empty_cache() tells the daemons, too."""
    wrapped = torch.cuda.empty_cache
    if getattr(wrapped, "sageattnd", False):
        return

    def empty_cache() -> None:
        wrapped()
        for device, connection in _client.connections().items():
            if device != _client.CPU:
                connection.trim()

    empty_cache.__doc__, empty_cache.sageattnd = wrapped.__doc__, True
    torch.cuda.empty_cache = torch.cuda.memory.empty_cache = empty_cache
