"""The two libraries through ctypes: how they are found, a problem as bytes, their errors."""
from __future__ import annotations

import ctypes
import ctypes.util
import functools
import os
import struct
import threading
from typing import NamedTuple

NONE, F16, BF16, F32, BOOL = range(5)  # enum sage_dtype
VARIANTS = {"auto": 0, "int8_fp16": 1, "int8_fp8": 2}
DIAGONALS = {"top-left": 0, "bottom-right": 1}
UNLIMITED = -1
MAX_SEQS = 4096  # SAGE_MAX_SEQS
SONAME = {"attn": "libsageattn.so.0", "client": "libsageclient.so.0"}
EINVAL, EUNSUPPORTED, ENOMEM, ECAPTURE = -1, -2, -3, -22
BUNDLED = os.path.dirname(os.path.abspath(__file__))  # a wheel brings the libraries

# struct sage_attn of sageattn.h; tests/python_numpy.py compares it with the compiler's idea.
TENSOR = "iIQP4q4q"  # dtype, buffer, offset, data, shape, stride
ATTN = struct.Struct("@" + 6 * TENSOR + "fi????iqqiPP")
ABSENT = (NONE,) + 11 * (0,)


class SageError(RuntimeError):
    """A library refused or failed.

    Attributes: ``status`` (negative, as in sageattn.h), ``name`` ("SAGE_EINVAL"), ``retryable``
    (may the same call succeed later, unchanged?).
    """

    def __init__(self, status: int, text: str = ""):
        lib = attn()
        self.status = status
        self.name = lib.sage_errname(status).decode()
        self.retryable = bool(lib.sage_retryable(status))
        self.text = text
        super().__init__(f"{self.name}: {text or lib.sage_strerror(status).decode()}")

    def __reduce__(self):
        return SageError, (self.status, self.text)


class Options(NamedTuple):
    """What a problem is besides its tensors; the names are sageattn.h's."""

    causal: bool
    scale: float
    variant: int
    smooth_k: bool
    smooth_v: bool
    rotate_qk: bool
    diagonal: int
    window_left: int
    window_right: int


def same_length(q_offsets, k_offsets) -> None:
    """ValueError where they are not of as many sequences."""
    if len(q_offsets) != len(k_offsets):
        raise ValueError(f"cu_seqlens_k: length {len(k_offsets)}, cu_seqlens_q has "
                         f"{len(q_offsets)}")


def pack(q, k, v, o, mask, lse, options: Options, q_offsets=0, k_offsets=0, n_seqs=0) -> bytes:
    """struct sage_attn. Tensors are twelve numbers each, see TENSOR; offsets are addresses."""
    p = options
    return ATTN.pack(*q, *k, *v, *o, *mask, *lse, p.scale, p.variant, p.smooth_k, p.smooth_v,
                     p.rotate_qk, p.causal, p.diagonal, p.window_left, p.window_right, n_seqs,
                     q_offsets, k_offsets)


# --- loading ---

def _load(which: str) -> ctypes.CDLL:
    name, folder = SONAME[which], os.environ.get("SAGEATTND_LIBRARY_PATH")
    bundled = os.path.join(BUNDLED, name)
    try:
        if folder:
            return ctypes.CDLL(os.path.join(folder, name))
        return ctypes.CDLL(bundled if os.path.exists(bundled) else name)
    except OSError as error:
        if folder:
            raise ImportError(f"{error} (SAGEATTND_LIBRARY_PATH is {folder})") from None
        raise ImportError(f"{error}: not in {BUNDLED} (a wheel brings it), and the dynamic linker "
                          f"does not know it: run ldconfig, or set SAGEATTND_LIBRARY_PATH to its "
                          "directory") from None


def _declare(lib: ctypes.CDLL, **calls) -> ctypes.CDLL:
    for name, (result, *arguments) in calls.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


_INT, _SIZE, _TEXT, _POINTER = ctypes.c_int, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_void_p


@functools.lru_cache(None)
def attn() -> ctypes.CDLL:
    """libsageattn. A struct sage_attn is passed as bytes: nobody writes to it."""
    return _declare(
        _load("attn"), sage_strerror=(_TEXT, _INT), sage_errname=(_TEXT, _INT),
        sage_retryable=(ctypes.c_bool, _INT), sage_attn_check=(_INT, _TEXT, _TEXT, _SIZE),
        sage_attn_ops=(ctypes.c_double, _TEXT, _POINTER),
        sage_attn_workspace=(_SIZE, _TEXT, _POINTER),
        sage_attn_cuda_workspace=(_SIZE, _TEXT, _POINTER), sage_cpu_create=(_POINTER, _INT),
        sage_attn_cpu=(_INT, _POINTER, _TEXT, _POINTER, _POINTER, _SIZE),
        sage_attn_cuda=(_INT, _TEXT, _POINTER, _POINTER, _SIZE, _POINTER, _TEXT, _SIZE))


class ConnectOptions(ctypes.Structure):
    """struct sage_connect_options"""

    _fields_ = [("socket", _TEXT), ("name", _TEXT), ("priority", _INT), ("retry_ms", _INT),
                ("gpu", _TEXT), ("mode", _INT), ("cache_bytes", ctypes.c_uint64)]


class Server(ctypes.Structure):
    """struct sage_server"""

    _fields_ = [("version", ctypes.c_char * 64), ("backend", ctypes.c_char * 64),
                ("device", ctypes.c_char * 64), ("uuid", ctypes.c_char * 64),
                ("pid", ctypes.c_uint64), ("jobs", ctypes.c_uint32), ("buffers", ctypes.c_uint32),
                ("bytes", ctypes.c_uint64)]


@functools.lru_cache(None)
def client() -> ctypes.CDLL:
    """libsageclient."""
    pp = ctypes.POINTER(_POINTER)
    return _declare(
        _load("client"), sage_last_error=(_TEXT,),
        sage_connect=(_INT, ctypes.POINTER(ConnectOptions), pp), sage_disconnect=(None, _POINTER),
        sage_server_info=(_INT, _POINTER, ctypes.POINTER(Server)),
        sage_buffer_alloc=(_INT, _POINTER, _SIZE, pp), sage_buffer_data=(_POINTER, _POINTER),
        sage_buffer_free=(_INT, _POINTER), sage_attn_run=(_INT, _POINTER, _TEXT, _POINTER),
        sage_attn_enqueue=(_INT, _POINTER, _TEXT, _POINTER),
        sage_stream_error=(_INT, _POINTER, _POINTER), sage_trim=(_INT, _POINTER),
        sage_registered_bytes=(ctypes.c_uint64, _POINTER),
        sage_client_mode=(_INT, _POINTER))


# --- computing in this process ---

_thread = threading.local()


def _why() -> ctypes.Array:
    """This thread's place for the text of an error."""
    try:
        return _thread.why
    except AttributeError:
        _thread.why = ctypes.create_string_buffer(256)
        return _thread.why


def check(problem: bytes) -> None:
    """Raise SageError, naming the field, unless the problem is legal."""
    if attn().sage_attn_check(problem, None, 0):
        why = _why()
        status = attn().sage_attn_check(problem, why, len(why))
        raise SageError(status, why.value.decode())


def cuda_workspace(problem: bytes) -> int:
    return attn().sage_attn_cuda_workspace(problem, None)


def cuda_run(problem: bytes, workspace: int, size: int, stream: int) -> None:
    """Enqueue on a stream of the current device; the problem has passed check()."""
    why = _why()
    status = attn().sage_attn_cuda(problem, None, workspace, size, stream, why, len(why))
    if status:
        raise SageError(status, why.value.decode())


class _Pool:
    """The CPU threads of this process: made when first used, and anew in a fork child."""

    def __init__(self):
        self.lock = threading.Lock()
        self.handle = None

    def run(self, problem: bytes, workspace: int, size: int) -> int:
        with self.lock:
            if not self.handle:
                self.handle = attn().sage_cpu_create(_threads())
            if not self.handle:
                raise SageError(ENOMEM, "the CPU's threads")
            return attn().sage_attn_cpu(self.handle, problem, None, workspace, size)


def _threads() -> int:
    """$OMP_NUM_THREADS as other CPU kernels of the process read it; 0: one for each processor."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdigit() else 0


_pool = _Pool()


def _fork_child() -> None:
    global _pool
    _pool = _Pool()  # threads do not survive a fork, and the lock may be another thread's


os.register_at_fork(after_in_child=_fork_child)

ALIGNMENT = 64  # of a workspace on the CPU


def cpu_workspace(problem: bytes) -> int:
    return attn().sage_attn_workspace(problem, None)


def cpu_run(problem: bytes, workspace: int, size: int) -> None:
    """Compute; the problem has passed check(). workspace: an address, a multiple of ALIGNMENT."""
    status = _pool.run(problem, workspace, size)
    if status:
        raise SageError(status)
