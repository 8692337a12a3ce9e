#!/usr/bin/env python3
"""The package sageattnd with numpy alone: against fp64, in this process and by a daemon."""
import ctypes
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading

import numpy as np

import sage
from sage import raises

if sage.SANITIZED:
    print("sanitized libraries cannot be loaded into python")
    sys.exit(77)
if "SAGE_WHEEL" not in os.environ:  # where one is installed, libraries and all
    os.environ.setdefault("SAGEATTND_LIBRARY_PATH", os.path.join(sage.BUILD, ".libs"))
    sys.path.insert(0, os.path.join(os.environ.get("SAGE_SRCDIR", "."), "client", "python"))

import sageattnd
from sageattnd import _client, _native, sageattn, sageattn_varlen

BOUNDS = {"auto": 0.03, "int8_fp16": 0.03, "int8_fp8": 0.06}  # relL1 against fp64


def inputs(b=2, hq=4, hkv=None, nq=100, nk=None, d=64, seed=1):
    rng = np.random.default_rng(seed)
    hkv, nk = hkv or hq, nk or nq
    return [rng.standard_normal(s, np.float32).astype(np.float16)
            for s in ((b, hq, nq, d), (b, hkv, nk, d), (b, hkv, nk, d))]


def nhd(a):
    return a.transpose(0, 2, 1, 3)


def check(o, lse, q, k, v, variant="auto", **options):
    """o and lse of [B, H, N, D] against fp64."""
    wanted, wanted_lse = sage.reference(*(a.astype(np.float64) for a in (q, k, v)), **options)
    error = np.abs(o - wanted).sum() / np.abs(wanted).sum()
    assert error < BOUNDS[variant], f"relL1 {error}"
    if lse is not None:
        assert lse.dtype == np.float32 and lse.shape == wanted_lse.shape
        seen = np.isfinite(wanted_lse)
        assert np.array_equal(np.isneginf(lse), ~seen)
        assert np.abs(lse[seen] - wanted_lse[seen]).max(initial=0) < 0.05


# --- what the package believes of the libraries ---

C = """
#include <sageclient.h>
#include <stddef.h>
#include <stdio.h>
#define A(f) printf("attn %zu\\n", offsetof(struct sage_attn, f));
#define T(f) printf("tensor %zu\\n", offsetof(struct sage_tensor, f));
int main(void)
{
    T(dtype) T(buffer) T(offset) T(data) T(shape) T(stride)
    A(q) A(k) A(v) A(o) A(mask) A(lse) A(scale) A(variant) A(smooth_k) A(smooth_v) A(rotate_qk)
    A(causal) A(diagonal) A(window_left) A(window_right) A(n_seqs) A(q_offsets) A(k_offsets)
    printf("size %zu %zu %zu %zu\\n", sizeof(struct sage_tensor), sizeof(struct sage_attn),
           sizeof(struct sage_connect_options), sizeof(struct sage_server));
    printf("numbers %d %d %d %d %d %d %d %d %d %d\\n", SAGE_F16, SAGE_BF16, SAGE_F32, SAGE_BOOL,
           SAGE_INT8_FP16, SAGE_INT8_FP8, SAGE_BOTTOM_RIGHT, SAGE_EUNSUPPORTED, SAGE_ECAPTURE,
           SAGE_MAX_SEQS);
}
"""


def test_structures():
    """The compiler lays out the structures as ctypes and struct do here."""
    src = os.environ.get("SAGE_SRCDIR", ".")
    if "SAGE_CC" not in os.environ:
        raise sage.Skip("no $SAGE_CC")
    with tempfile.TemporaryDirectory() as here:
        with open(os.path.join(here, "a.c"), "w") as file:
            file.write(C)
        program = os.path.join(here, "a")
        subprocess.run([*os.environ["SAGE_CC"].split(), f"-I{src}/client", f"-I{src}/kernels",
                        "-o", program, file.name], check=True)
        lines = subprocess.run([program], stdout=subprocess.PIPE, check=True,
                               universal_newlines=True).stdout.split("\n")

    def offsets(codes):
        """Of each code in a struct format: the size of what is before it, aligned for it."""
        return [struct.calcsize("@" + "".join(codes[:i]) + "0" + code[-1])
                for i, code in enumerate(codes)]
    tensor = offsets(["i", "I", "Q", "P", "4q", "4q"])
    whole = [struct.calcsize("@" + i * _native.TENSOR + "0q") for i in range(6)]
    rest = offsets([6 * _native.TENSOR, *"fi????iqqiPP"])[1:]
    assert _native.TENSOR == "iIQP4q4q" and _native.ATTN.format.endswith("fi????iqqiPP")
    assert lines[:6] == [f"tensor {n}" for n in tensor], lines
    assert lines[6:24] == [f"attn {n}" for n in whole + rest], lines
    sizes = [struct.calcsize(_native.TENSOR), _native.ATTN.size,
             ctypes.sizeof(_native.ConnectOptions), ctypes.sizeof(_native.Server)]
    assert lines[24] == "size {} {} {} {}".format(*sizes), lines
    n = _native
    assert lines[25].split()[1:] == [str(i) for i in (
        n.F16, n.BF16, n.F32, n.BOOL, n.VARIANTS["int8_fp16"], n.VARIANTS["int8_fp8"],
        n.DIAGONALS["bottom-right"], n.EUNSUPPORTED, n.ECAPTURE, n.MAX_SEQS)], lines


def test_place():
    """It is the installed wheel that is tested, where there is one."""
    assert sageattnd.__file__.startswith(os.environ.get("SAGE_WHEEL", "")), sageattnd.__file__
    sageattn(*inputs())
    used = {line.split()[-1] for line in open("/proc/self/maps") if "libsageattn.so" in line}
    folder = os.path.realpath(os.environ.get("SAGEATTND_LIBRARY_PATH") or _native.BUNDLED)
    assert [os.path.dirname(path) for path in used] == [folder], (used, folder)


def test_version():
    with open(os.path.join(sage.BUILD, "config.h")) as config:
        assert f'#define PACKAGE_VERSION "{sageattnd.__version__}"\n' in config.read()


# --- results ---

def test_accuracy():
    for i, (d, causal, variant) in enumerate((d, c, v) for d in (8, 40, 64, 72, 96, 128, 256)
                                             for c in (False, True)
                                             for v in ("int8_fp16", "int8_fp8")):
        q, k, v = inputs(hq=4, hkv=(1, 2, 4)[i % 3], nq=50, nk=90, d=d, seed=i)
        o, lse = sageattn(q, k, v, is_causal=causal, return_lse=True, variant=variant)
        check(o, lse, q, k, v, variant, causal=causal)
        o2, lse2 = sageattn(nhd(q), nhd(k), nhd(v), "NHD", causal, None, True, variant=variant)
        assert np.array_equal(nhd(o2), o) and np.array_equal(lse2, lse)
        assert o2.shape == nhd(q).shape and o2.dtype == q.dtype


def test_options():
    q, k, v = inputs(nq=60, nk=80)
    cases = (dict(sm_scale=0.3), dict(scale=0.3), dict(smooth_k=False),
             dict(rotate_qk=True), dict(diagonal="bottom-right"), dict(window=(5, 9)),
             dict(window=(-1, 3)), dict(enable_gqa=True), dict(dropout_p=0.0))
    for case in cases:
        reference = {"scale": case.get("sm_scale") or case.get("scale") or 0.0,
                     "diagonal": int(case.get("diagonal") == "bottom-right"),
                     "causal": "diagonal" in case}
        reference["window_left"], reference["window_right"] = case.get("window", (-1, -1))
        o, lse = sageattn(q, k, v, is_causal="diagonal" in case, return_lse=True, **case)
        check(o, lse, q, k, v, **reference)
    check(sageattn(q, k, v + np.float16(5), smooth_v=True), None, q, k, v + np.float16(5),
          "int8_fp8")


def test_masks():
    q, k, v = inputs(nq=33, nk=65)
    rng = np.random.default_rng(5)
    for shape in ((2, 4, 33, 65), (33, 65), (1, 1, 33, 65), (2, 1, 1, 65), (4, 33, 1), (1, 65)):
        seen = rng.random(shape) > 0.3
        added = rng.standard_normal(shape).astype(np.float32)
        for mask in (seen, added, added.astype(np.float16)):
            o, lse = sageattn(q, k, v, attn_mask=mask, return_lse=True)
            full = np.broadcast_to(mask, (2, 4, 33, 65))
            check(o, lse, q, k, v, mask=full if mask.dtype == bool else full.astype(np.float64))
            assert np.array_equal(nhd(sageattn(nhd(q), nhd(k), nhd(v), "NHD", attn_mask=mask)), o)


def test_dtypes():
    """float32 is cast to the type of the others, and o back."""
    q, k, v = inputs()
    wanted = sageattn(q, k, v)
    f = np.float32
    for case in ((q.astype(f), k, v), (q, k.astype(f), v), [a.astype(f) for a in (q, k, v)]):
        o = sageattn(*case)
        assert o.dtype == case[0].dtype and np.array_equal(o, wanted)


def test_head_dim():
    """One that is no multiple of 8 is padded, with the scale of what it was."""
    for d in (1, 3, 60, 77):
        q, k, v = inputs(d=d)
        o, lse = sageattn(q, k, v, return_lse=True)
        assert o.shape == q.shape
        check(o, lse, q, k, v)


def test_views():
    """Slices of a fused QKV, and what has to be copied: the results of contiguous tensors."""
    rng = np.random.default_rng(3)
    qkv = rng.standard_normal((2, 50, 3, 4, 64)).astype(np.float16)
    q, k, v = (qkv[:, :, i] for i in range(3))
    wanted = sageattn(*(np.ascontiguousarray(a) for a in (q, k, v)), "NHD")
    assert np.array_equal(sageattn(q, k, v, "NHD"), wanted)
    backwards = [np.ascontiguousarray(a[:, ::-1])[:, ::-1] for a in (q, k, v)]
    assert np.array_equal(sageattn(*backwards, "NHD"), wanted)
    columns = [np.asfortranarray(a) for a in (q, k, v)]
    assert np.array_equal(sageattn(*columns, "NHD"), wanted)
    first = sageattn(nhd(q), nhd(k), nhd(v))  # what is NHD in memory comes back as NHD
    assert nhd(first).flags.c_contiguous and np.array_equal(nhd(first), wanted)
    one = np.broadcast_to(k[:1], k.shape)
    assert np.array_equal(sageattn(q, one, v, "NHD"), sageattn(q, one.copy(), v, "NHD"))


def test_varlen():
    q, k, v = inputs(b=1, hq=4, hkv=2, nq=90, nk=120)
    q, k, v = (nhd(a)[0] for a in (q, k, v))
    ends_q, ends_k = [0, 20, 20, 90], [0, 50, 55, 120]
    for causal in (False, True):
        o, lse = sageattn_varlen(q, k, v, np.array(ends_q), np.array(ends_k, np.int32), 70, 65,
                                 causal, return_lse=True)
        assert o.shape == q.shape and lse.shape == (4, 90)
        for i in range(3):
            a, b = slice(*ends_q[i:i + 2]), slice(*ends_k[i:i + 2])
            if a.start < a.stop:
                one = [nhd(t[None]) for t in (q[a], k[b], v[b])]
                check(nhd(o[a][None]), lse[None, :, a], *one, causal=causal)


def test_key_lengths():
    """As by a mask, whatever lies behind the lengths; of transposed arrays, too."""
    lengths = [90, 7, 0]
    mask = (np.arange(90) < np.array(lengths)[:, None])[:, None, None]
    q, k, v = inputs(b=3, hkv=2, nq=33, nk=90)
    exact = [a.copy() for a in (q, k, v)]
    for a in (k, v):
        np.putmask(a, np.broadcast_to(~mask.swapaxes(2, 3), a.shape), np.nan)
    for causal in (False, True):
        o, lse = sageattn(q, k, v, is_causal=causal, return_lse=True, key_lengths=lengths)
        check(o, lse, *exact, causal=causal, mask=np.broadcast_to(mask, (3, 4, 33, 90)))
        turned = sageattn(nhd(q), nhd(k), nhd(v), "NHD", causal, key_lengths=np.array(lengths))
        assert np.array_equal(nhd(turned), o)
    assert not sageattn(q, k[:, :, :0], v[:, :, :0], key_lengths=[0, 0, 0]).any()
    for words, case in ((("from 0 to 91", "between 0 and 90"), [91, 7, 0]),
                        (("from -1",), [-1, 7, 0]), (("3 integers",), [1, 2]),
                        (("3 integers",), [1.0, 2.0, 3.0])):
        with raises(ValueError, "key_lengths", *words):
            sageattn(q, k, v, key_lengths=case)


def test_edges():
    """No keys, no queries, rows that see nothing."""
    q, k, v = inputs(nq=10, nk=20)
    o, lse = sageattn(q, k[:, :, :0], v[:, :, :0], return_lse=True)
    assert not o.any() and np.isneginf(lse).all()
    assert sageattn(q[:, :, :0], k, v).shape == (2, 4, 0, 64)
    seen = np.ones((10, 20), bool)
    seen[3] = False
    o, lse = sageattn(q, k, v, attn_mask=seen, return_lse=True)
    check(o, lse, q, k, v, mask=seen)
    assert not o[:, :, 3].any()


# --- what is refused ---

def test_refused():
    q, k, v = inputs()
    cases = (
        (ValueError, "tensor_layout", dict(tensor_layout="BHSD")),
        (ValueError, "attn_mask", dict(tensor_layout=np.ones((100, 100), bool))),
        (ValueError, "dropout_p", dict(dropout_p=0.1)),
        (ValueError, "sm_scale", dict(sm_scale=-1.0)),
        (ValueError, "sm_scale", dict(sm_scale=0.0)),
        (ValueError, "scale", dict(sm_scale=1.0, scale=2.0)),
        (ValueError, "variant", dict(variant="fp4")),
        (ValueError, "diagonal", dict(diagonal="left")),
        (ValueError, "mode", dict(mode="gpu")),
        (ValueError, "attn_mask", dict(attn_mask=np.ones((3, 100), bool))),
        (TypeError, "attn_mask", dict(attn_mask=np.ones((100, 100)))),
        (TypeError, "unknown", dict(unknown=1)),
        (sageattnd.SageError, "smooth_v", dict(smooth_v=True, variant="int8_fp16")),
        (sageattnd.SageError, "window_left", dict(window=(-5, 0))),
    )
    for error, word, case in cases:
        with raises(error, word):
            sageattn(q, k, v, **case)
    tensors = (
        (TypeError, "k: dtype float64", (q, k.astype(np.float64), v)),
        (ValueError, "q: shape", (q[0], k, v)),
        (sageattnd.SageError, "v", (q, k, v[:, :, :50])),
        (sageattnd.SageError, "k", (q, k[:, :3], v[:, :3])),
        (sageattnd.SageError, "head", inputs(d=264)),
    )
    for error, word, case in tensors:
        with raises(error, word):
            sageattn(*case)
    with raises(ValueError, "enable_gqa"):
        sageattn(q, k[:, :2], v[:, :2], enable_gqa=False)
    q, k, v = (nhd(a)[0] for a in (q, k, v))
    for word, case in (("cu_seqlens_q", ([0.0, 100.0], [0, 100])),
                       ("cu_seqlens_q", ([0, 100], [0, 100], 99)),
                       ("cu_seqlens_k", ([0, 100], [0, 50, 100])),
                       ("cu_seqlens_k", ([0, 100], [0, (1 << 32) + 100]))):
        with raises(ValueError, word):
            sageattn_varlen(q, k, v, *case)
    with raises(sageattnd.SageError, "q_offsets"):
        sageattn_varlen(q, k, v, [0, 99], [0, 100])


def test_upstream_names():
    """The functions that name a kernel: the variant, upstream's values, no others."""
    q, k, v = inputs()
    for name, variant in (("fp16_triton", "int8_fp16"), ("fp16_cuda", "int8_fp16"),
                          ("fp8_cuda", "int8_fp8"), ("fp8_cuda_sm90", "int8_fp8")):
        function = getattr(sageattnd, f"sageattn_qk_int8_pv_{name}")
        assert np.array_equal(function(q, k, v, is_causal=True),
                              sageattn(q, k, v, is_causal=True, variant=variant))
    assert np.array_equal(
        sageattnd.sageattn_qk_int8_pv_fp16_cuda(q, k, v, pv_accum_dtype="fp16+fp32"),
        sageattn(q, k, v, variant="int8_fp16"))
    with raises(ValueError, "pv_accum_dtype"):
        sageattnd.sageattn_qk_int8_pv_fp8_cuda_sm90(q, k, v, pv_accum_dtype="fp16")
    with raises(ValueError, "qk_quant_gran"):
        sageattnd.sageattn_qk_int8_pv_fp8_cuda(q, k, v, qk_quant_gran="per_tensor")
    with raises(ValueError, "quantization_backend"):
        sageattnd.sageattn_qk_int8_pv_fp16_triton(q, k, v, quantization_backend="hip")


# --- a daemon ---

def test_daemon():
    """The same as in this process, from several threads at once; a successor is found."""
    q, k, v = inputs(hkv=2)
    mask = np.random.default_rng(1).random((100, 100)) > 0.5
    wanted, wanted_lse = sageattn(q, k, v, attn_mask=mask, return_lse=True, mode="inproc")
    flat = [nhd(a)[0] for a in (q, k, v)]

    def jobs(failures):
        try:
            for _ in range(20):
                o, lse = sageattn(q, k, v, attn_mask=mask, return_lse=True, mode="daemon")
                assert np.array_equal(o, wanted) and np.array_equal(lse, wanted_lse)
        except BaseException as error:
            failures.append(error)
            raise

    def together():
        failures = []
        threads = [threading.Thread(target=jobs, args=(failures,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures

    with tempfile.TemporaryDirectory() as directory:
        with sage.Daemon(directory=directory) as daemon:
            os.environ["SAGEATTND_SOCKET"] = daemon.path
            together()
            assert np.array_equal(sageattn_varlen(*flat, [0, 40, 100], [0, 70, 100], mode="daemon"),
                                  sageattn_varlen(*flat, [0, 40, 100], [0, 70, 100], mode="inproc"))
            assert not sageattn(q, k[:, :, :0], v[:, :, :0], mode="daemon").any()
            sage.until(lambda: daemon.stats()["done"] == 82, "82 jobs of the daemon")
            assert len(_client.connections()) == 1 and daemon.stats()["clients"] == 2
        with sage.Daemon(directory=directory) as daemon:
            together()
            sage.until(lambda: daemon.stats()["done"] == 80, "80 jobs of the successor")
            sageattnd.close()
            sage.until(lambda: daemon.stats()["clients"] == 1, "the connection to be closed")
            jobs([])
            sageattnd.close()


def test_fork():
    """A child connects by itself, also computes by itself, and the parent goes on."""
    q, k, v = inputs()
    with sage.Daemon() as daemon:
        os.environ["SAGEATTND_SOCKET"] = daemon.path
        wanted = sageattn(q, k, v, mode="inproc")
        assert np.array_equal(sageattn(q, k, v, mode="daemon"), wanted)
        child = os.fork()
        if not child:
            same = [np.array_equal(sageattn(q, k, v, mode=mode), wanted)
                    for mode in ("daemon", "inproc")]
            os._exit(0 if all(same) and daemon.stats()["clients"] == 3 else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert np.array_equal(sageattn(q, k, v, mode="daemon"), wanted)
        sageattnd.close()


def test_no_daemon():
    q, k, v = inputs()
    os.environ["SAGEATTND_SOCKET"] = "/nonexistent/socket"
    with raises(sageattnd.SageError, "SAGE_ENODAEMON", "/nonexistent/socket"):
        sageattn(q, k, v, mode="daemon")
    try:
        sageattn(q, k, v, mode="daemon")
    except sageattnd.SageError as error:
        assert error.name == "SAGE_ENODAEMON" and error.retryable and error.status == -14
    sageattn(q, k, v)  # auto: on the CPU this process itself
    sageattnd.set_mode("daemon")
    with raises(sageattnd.SageError, "SAGE_ENODAEMON"):
        sageattn(q, k, v)
    sageattn(q, k, v, mode="inproc")
    sageattnd.set_mode("auto")


def python(code, **env):
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **env},
                          universal_newlines=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_environment():
    """Where it computes, and where the libraries are; a wrong value is said, not passed over."""
    path = f"import sys; sys.path[:0] = {sys.path!r}\n"
    code = path + "import numpy, sageattnd; a = numpy.zeros((1, 1, 8, 8), 'f2'); " \
                  "sageattnd.sageattn(a, a, a); print('torch' in sys.modules)"
    assert python(code).stdout == "False\n", python(code).stdout
    for env, words in ((dict(SAGEATTND_RUN="gpu"), "SAGEATTND_RUN"),
                       (dict(SAGEATTND_RUN="daemon", SAGEATTND_SOCKET="/nonexistent/socket"),
                        "SAGE_ENODAEMON"),
                       (dict(SAGEATTND_LIBRARY_PATH="/nonexistent"), "/nonexistent")):
        done = python(code, **env)
        assert done.returncode and words in done.stdout, done.stdout


def test_which_daemon():
    """Asked for a GPU: who cannot be asked is named, rather than that there is none."""
    code = f"import sys; sys.path[:0] = {sys.path!r}\n" \
           "from sageattnd import _client; _client.Connection('GPU-1', 0)"
    with tempfile.TemporaryDirectory() as directory, socket.socket(
            socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        env = dict(SAGEATTND_SOCKET="", XDG_RUNTIME_DIR=directory)
        assert "SAGE_ENODAEMON: gpu: no daemon has GPU-1" in python(code, **env).stdout
        listener.bind(os.path.join(directory, "sageattnd.sock"))
        listener.listen()
        threading.Thread(target=lambda: listener.accept()[0].send(b"\xc1")).start()
        assert "SAGE_EPROTO" in python(code, **env).stdout


AT_EXIT = """
import threading, numpy, sageattnd
def work():
    while True:
        sageattnd.sageattn(*numpy.ones((3, 1, 2, 64, 64), numpy.float16), mode="daemon")
        done.set()
done = threading.Event()
threading.Thread(target=work, daemon=True).start()
assert done.wait(60)
"""


def test_exit():
    """A process may end while a daemon thread of its computes."""
    path = f"import sys; sys.path[:0] = {sys.path!r}\n"
    with sage.Daemon() as daemon:
        for _ in range(5):
            done = python(path + AT_EXIT, SAGEATTND_SOCKET=daemon.path)
            assert done.returncode == 0, f"{done.returncode}: {done.stdout}"
        sage.until(lambda: daemon.stats()["clients"] == 1, "the clients to be gone")


if __name__ == "__main__":
    os.environ.pop("SAGEATTND_RUN", None)
    sage.run(globals())
