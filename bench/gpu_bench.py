"""What bench_handoff and bench_tenants share: the program that both start, what it says, a
process's CPU time, limits."""
import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
                                "tests"))
sys.dont_write_bytecode = True

import gpu_daemon  # noqa: E402
import sage  # noqa: E402


def program():
    for path in ("bench/.libs/handoff_gpu", "bench/handoff_gpu"):
        if os.path.exists(os.path.join(sage.BUILD, path)):
            return os.path.join(sage.BUILD, path)
    raise sage.Skip(f"no bench/handoff_gpu in {sage.BUILD}: configure --with-cuda, then "
                    "make check TESTS=")


def why_not():
    """None, or why there is nothing to measure."""
    try:
        program()
        gpu_daemon.run_child("probe")
    except (sage.Skip, AssertionError) as error:
        return str(error).strip().splitlines()[-1]
    return None


def figures(text):
    return dict(line.split("\t") for line in text.splitlines())


def cpu_seconds(pid):
    """Of all threads of a process, by its clock: see clock_getcpuclockid(3)."""
    return time.clock_gettime(~pid << 3 | 2)


def verdict(value, limit, at_least=False):
    if limit is None:
        return ""
    good = value >= limit if at_least else value <= limit
    return f"{'ok' if good else 'MISSED'} (limit {limit})"
