#!/usr/bin/python3
"""sage_attn_cpu() against attention in numpy (fp32, its BLAS), same shapes and threads, same run.

    attn_vs_numpy.py [path to attn_cpu] [threads]

Prints milliseconds for a call and the ratio (ours / numpy's); fails above 10. The ratio means
little where numpy has the reference BLAS: the name of the BLAS is printed.
"""

import os
import statistics
import subprocess
import sys
import time

PROGRAM = sys.argv[1] if len(sys.argv) > 1 else "./attn_cpu"
THREADS = int(sys.argv[2]) if len(sys.argv) > 2 else len(os.sched_getaffinity(0))
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(THREADS)

import numpy as np  # noqa: E402  (reads the variables above)

HEADS, TOKENS, CALLS, LIMIT = 4, 2048, 5, 10


def blas():
    """The BLAS that this process has mapped, or "reference BLAS or none"."""
    with open("/proc/self/maps") as maps:
        names = {os.path.basename(line.split()[-1]) for line in maps if "blas" in line}
    optimised = sorted(name for name in names if "openblas" in name or "mkl" in name)
    return optimised[0] if optimised else "reference BLAS"


def attention(q, k, v):
    for head in range(len(q)):
        s = q[head] @ k[head].T
        s *= 1 / np.sqrt(q.shape[2])
        s -= s.max(axis=1, keepdims=True)
        np.exp(s, out=s)
        yield (s @ v[head]) / s.sum(axis=1, keepdims=True)


def numpy_seconds(dim):
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((HEADS, TOKENS, dim), dtype=np.float32) for _ in range(3))
    times = []
    for _ in range(CALLS + 1):
        start = time.perf_counter()
        list(attention(q, k, v))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main():
    worst = 0
    print(f"# {HEADS} heads, {TOKENS} tokens, {THREADS} threads; numpy {np.__version__}, {blas()}")
    print("head_dim\tvariant\tcausal\tours_ms\tnumpy_ms\tratio")
    for dim in (64, 128):
        theirs = numpy_seconds(dim)
        args = [PROGRAM, *map(str, (HEADS, TOKENS, dim, THREADS, CALLS))]
        done = subprocess.run(args, check=True, capture_output=True, text=True)
        for line in done.stdout.splitlines():
            variant, causal, seconds = line.split()
            ratio = float(seconds) / theirs
            worst = max(worst, ratio)
            print(dim, variant, "yes" if causal == "1" else "no", f"{float(seconds) * 1e3:.1f}",
                  f"{theirs * 1e3:.1f}", f"{ratio:.2f}", sep="\t")
    return worst > LIMIT


if __name__ == "__main__":
    sys.exit(main())
