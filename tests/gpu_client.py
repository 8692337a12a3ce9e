"""libsageclient and the CUDA driver through ctypes: what clients in gpu_daemon.py are made of."""
import ctypes
import os

import numpy as np

import sage

VARIANTS = {"auto": 0, "int8_fp16": 1, "int8_fp8": 2}
MODES = {0: "auto", 1: "sync", 2: "event", 3: "lane"}
# Largest relL1 against double precision: INT8 scores; rounding of P and V to e4m3 as well.
BOUNDS = {"int8_fp16": 0.03, "int8_fp8": 0.06}


class Tensor(ctypes.Structure):
    _fields_ = [("dtype", ctypes.c_int), ("buffer", ctypes.c_uint32), ("offset", ctypes.c_uint64),
                ("data", ctypes.c_void_p), ("shape", ctypes.c_int64 * 4),
                ("stride", ctypes.c_int64 * 4)]


class Attn(ctypes.Structure):
    _fields_ = [*((name, Tensor) for name in ("q", "k", "v", "o", "mask", "lse")),
                ("scale", ctypes.c_float), ("variant", ctypes.c_int), ("smooth_k", ctypes.c_bool),
                ("smooth_v", ctypes.c_bool), ("rotate_qk", ctypes.c_bool),
                ("causal", ctypes.c_bool), ("diagonal", ctypes.c_int),
                ("window_left", ctypes.c_int64), ("window_right", ctypes.c_int64),
                ("n_seqs", ctypes.c_int32), ("q_offsets", ctypes.c_void_p),
                ("k_offsets", ctypes.c_void_p)]


class Options(ctypes.Structure):
    _fields_ = [("socket", ctypes.c_char_p), ("name", ctypes.c_char_p), ("priority", ctypes.c_int),
                ("retry_ms", ctypes.c_int), ("gpu", ctypes.c_char_p), ("mode", ctypes.c_int),
                ("cache_bytes", ctypes.c_uint64)]


def tensor(address, shape, dtype=1):
    """Contiguous, at a device address."""
    stride = [1] * 4
    for i in (2, 1, 0):
        stride[i] = stride[i + 1] * max(shape[i + 1], 1)
    return Tensor(dtype, 0, 0, address, (ctypes.c_int64 * 4)(*shape), (ctypes.c_int64 * 4)(*stride))


def pointer(stream):
    """A stream may come as the number that PyTorch calls it by."""
    return ctypes.c_void_p(stream) if isinstance(stream, int) else stream


class Cuda:
    """The driver, with device 0's primary context current on this thread."""

    def __init__(self):
        try:
            self.lib = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise sage.Skip(f"no CUDA driver: {error}") from None
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self("cuInit", 0)
        self("cuDeviceGet", ctypes.byref(device), 0)
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self("cuCtxSetCurrent", context)

    def __call__(self, name, *args):
        error = getattr(self.lib, name)(*args)
        if error:
            text = ctypes.c_char_p()
            self.lib.cuGetErrorString(error, ctypes.byref(text))
            raise RuntimeError(f"{name}: {error}: {(text.value or b'').decode()}")

    def alloc(self, size):
        address = ctypes.c_uint64()
        self("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value

    def free(self, address):
        self("cuMemFree_v2", ctypes.c_uint64(address))

    def put(self, address, array):
        array = np.ascontiguousarray(array)
        self("cuMemcpyHtoD_v2", ctypes.c_uint64(address), ctypes.c_void_p(array.ctypes.data),
             ctypes.c_size_t(array.nbytes))

    def get(self, address, shape, dtype=np.float16):
        array = np.empty(shape, dtype)
        self("cuMemcpyDtoH_v2", ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(address),
             ctypes.c_size_t(array.nbytes))
        return array

    def stream(self):
        stream = ctypes.c_void_p()
        self("cuStreamCreate", ctypes.byref(stream), 1)  # CU_STREAM_NON_BLOCKING
        return stream

    def sync(self, stream):
        self("cuStreamSynchronize", stream)

    def memory(self):
        """Bytes of device memory: free, total."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def fill(self, address, size, stream):
        self("cuMemsetD8Async", ctypes.c_uint64(address), ctypes.c_ubyte(1), ctypes.c_size_t(size),
             stream)

    def handle(self, address):
        handle = ctypes.create_string_buffer(64)
        self("cuIpcGetMemHandle", handle, ctypes.c_uint64(address))
        return handle.raw


class Client:
    """A connection of libsageclient."""

    def __init__(self, socket, name="gpu_daemon", retry_ms=0):
        self.lib = ctypes.CDLL(os.path.join(sage.BUILD, ".libs", "libsageclient.so"))
        self.lib.sage_last_error.restype = ctypes.c_char_p
        self.client = ctypes.c_void_p()
        options = Options(socket=socket.encode(), name=name.encode(), retry_ms=retry_ms)
        self.must(self.lib.sage_connect(ctypes.byref(options), ctypes.byref(self.client)))

    def must(self, status):
        if status:
            raise sage.SageError(-status, self.lib.sage_last_error().decode())

    def enqueue(self, attn, stream):
        self.must(self.lib.sage_attn_enqueue(self.client, ctypes.byref(attn), pointer(stream)))

    def submit_held(self, attn, lanes=1, jobs=1):
        """Jobs whose inputs are never going to be ready."""
        for _ in range(lanes):
            lane = ctypes.c_void_p()
            self.must(self.lib.sage_lane_create(self.client, ctypes.byref(lane)))
            for _ in range(jobs):
                job = (ctypes.c_void_p * 2)()
                self.must(self.lib.sage_attn_submit(lane, ctypes.byref(attn), 1, job))

    def stream_error(self, stream):
        self.must(self.lib.sage_stream_error(self.client, pointer(stream)))

    def trim(self):
        self.must(self.lib.sage_trim(self.client))

    def mode(self):
        return MODES[self.lib.sage_client_mode(self.client)]

    def close(self):
        self.lib.sage_disconnect(self.client)


class Problem:
    """q, k, v in fp16 and room for o, in one allocation on the device; only some rows of a large o
    are compared."""

    def __init__(self, cuda, q, k, v, causal, variant="int8_fp16", address=None, rows=slice(None)):
        self.cuda, self.arrays, self.causal, self.variant = cuda, (q, k, v), causal, variant
        self.rows = rows
        sizes = [-(-a.nbytes // 256) * 256 for a in (q, k, v, q)]
        self.size = sum(sizes)
        self.base = cuda.alloc(self.size) if address is None else address
        at = [self.base + sum(sizes[:i]) for i in range(4)]
        self.o = at[3]
        for where, array in zip(at, self.arrays):
            cuda.put(where, array)
        self.attn = Attn(q=tensor(at[0], q.shape), k=tensor(at[1], k.shape),
                         v=tensor(at[2], v.shape), o=tensor(at[3], q.shape),
                         variant=VARIANTS[variant], smooth_k=True, causal=causal, window_left=-1,
                         window_right=-1)
        self.wanted = None

    def poison(self):
        self.cuda.put(self.o, np.full(self.arrays[0].shape, np.nan, np.float16))

    def error(self):
        """relL1 of o; NaN where something was not written."""
        q, k, v = self.arrays
        if self.wanted is None:
            row, key = np.arange(q.shape[2])[self.rows, None], np.arange(k.shape[2])
            self.wanted, _ = sage.reference(q[:, :, self.rows].astype(np.float64),
                                            k.astype(np.float64), v.astype(np.float64),
                                            mask=key <= row if self.causal else None)
        o = self.cuda.get(self.o, q.shape)[:, :, self.rows].astype(np.float64)
        return float(np.abs(o - self.wanted).sum() / np.abs(self.wanted).sum())

    def check(self):
        error = self.error()
        assert error < BOUNDS[self.variant], f"relL1 {error}"
        return error


def synthetic(heads, n, d, seed, kv_heads=None):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((1, h, n, d), np.float32).astype(np.float16)
            for h in (heads, kv_heads or heads, kv_heads or heads)]


def capture(name):
    """A layer of a language model, and whether it is causal."""
    folder = os.path.join(os.environ.get("SAGE_SRCDIR", "."), "tests", "data")
    arrays = [np.load(os.path.join(folder, f"{name}-{t}.npy")) for t in "qkv"]
    return arrays, name.startswith("smollm2")


def torch_attn(q, k, v, o, variant="int8_fp16"):
    """Of dense fp16 tensors of PyTorch's."""
    t = [tensor(x.data_ptr(), tuple(x.shape)) for x in (q, k, v, o)]
    return Attn(q=t[0], k=t[1], v=t[2], o=t[3], variant=VARIANTS[variant], smooth_k=True,
                window_left=-1, window_right=-1)
