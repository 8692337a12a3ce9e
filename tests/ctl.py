"""sagectl as a whole: bench, top and doctor on the CPU backend; what goes wrong is said."""
import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time

import sage
from sage import Daemon, Problem, until

SAGECTL = os.path.join(sage.BUILD, "sagectl")
TINY = ("-q", "2", "-n", "16", "-d", "16")


def start(daemon, *args, **more):
    path = daemon if isinstance(daemon, str) else daemon.path
    return subprocess.Popen([SAGECTL, "-s", path, *args], stdin=subprocess.DEVNULL, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=sage.environment(), **more)


def end(process, code=0):
    """What it wrote, once it has ended with this exit status."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, f"{process.args}: {process.returncode}\n{out}\n{err}"
    return out if code == 0 else out + err


def sagectl(daemon, *args, code=0):
    return end(start(daemon, *args), code)


# --- bench ---

def test_bench():
    """Rows add up, and are what the daemon counted."""
    with Daemon() as daemon:
        said = json.loads(sagectl(daemon, "bench", "-p", "3", "-i", "2", "-t", "0.3", "-j", *TINY))
        assert said["backend"] == said["mode"] == "cpu" and said["processes"] == 3, said
        rows, total = said["clients"], said["all"]
        assert len(rows) == 3 and all(r["jobs"] > 0 for r in rows), rows
        assert sum(r["jobs"] for r in rows) == total["jobs"]
        assert abs(sum(r["share"] for r in rows) - 1) < 1e-6
        for r in [*rows, total]:
            ops = 4 * 2 * 16 * 16 * 16 * r["jobs_per_second"]
            assert abs(r["tops"] * 1e12 / ops - 1) < 1e-6, r
            for times in (r["latency_us"], r["submit_us"]):
                assert 0 < times["p50"] <= times["p99"] <= times["p999"], r
            assert r["run_us"] > 0
        for r in rows:
            assert r["rows_checked"] == 2 * 32 and 0 < r["relative_error"] < 0.05, r
            assert r["drift"] < 0.05
        stats = daemon.stats()
        assert stats["done"] == total["jobs"] + 3, stats  # each client's first is not measured


def test_bench_shapes():
    with Daemon() as daemon:
        for shape in ("-q 4 -k 2 -n 50 -m 70 -d 72 -e bf16 -v int8_fp8 -c -i 63",
                      "-n 1 -m 300 -d 128 -v int8_fp16 -i 1", "-b 3 -n 40 -m 10 -d 8 -c",
                      "-n 257 -d 256 -e bf16 -p 2"):
            said = sagectl(daemon, "bench", "-t", "0.05", *shape.split())
            assert re.search(r"(?m)^all +[1-9]", said) and "rows off by" in said, said


def test_bench_usage():
    with Daemon() as daemon:
        for args, words in (("-p 0", "from 1"), ("-p 1.5", "integer"), ("-i 64", "63"),
                            ("-v fast", "int8_fp8"), ("-e f32", "bf16"), ("-d 7", "multiple of 8"),
                            ("-q 8 -k 3", "multiple"), ("-n 99999999 -q 9999999", "terabyte"),
                            ("-t 0", "0.01"), ("more", "usage"), ("--shape", "usage")):
            said = sagectl(daemon, "bench", *args.split(), code=64)
            assert words in said, f"{args}: {said}"
        assert not daemon.stats().get("accepted")
        # the daemon's own limits are said by it
        said = sagectl(daemon, "bench", "-q", "1", "-n", "8", "-m", "200000", "-d", "256", code=1)
        assert "slot_bytes" in said, said
    assert "no daemon" in sagectl("/nonexistent/s", "bench", code=1)


def children(process):
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as stat:
            if int(stat.read().rsplit(")", 1)[1].split()[1]) == process.pid:
                found.append(int(pid))
    return found


def working(daemon, n):
    """The clients of a bench, once all of them have jobs behind them that count."""
    def look():
        with daemon.client(page=False) as client:
            rows = [c for c in client.call("CLIENTS")["clients"] if c["name"].startswith("bench")]
            return rows if len(rows) == n and all(c["done"] > 5 for c in rows) else None
    return until(look, "the clients to work", 30)


def test_bench_wrong_results():
    """The inputs are not those of the first job any more: nobody says that results are right."""
    with Daemon() as daemon:
        process = start(daemon, "bench", "-t", "2", *TINY)
        pid = working(daemon, 1)[0]["pid"]
        spoiled = 0
        for fd in os.listdir(f"/proc/{pid}/fd"):
            path = f"/proc/{pid}/fd/{fd}"
            if "memfd:" in os.readlink(path) and os.stat(path).st_size != sage.PAGE_BYTES:
                with open(path, "r+b") as memory:
                    memory.write(bytes(os.stat(path).st_size))
                spoiled += 1
        assert spoiled == 1
        assert "wrong results" in end(process, 1)


def test_bench_failures():
    with Daemon(backend="fault", fault="fail=9") as daemon:
        said = sagectl(daemon, "bench", "-t", "20", *TINY, code=1)
        assert "client 0" in said and "EINTERNAL" in said, said
    with Daemon() as daemon:
        process = start(daemon, "bench", "-p", "2", "-t", "20", *TINY)
        os.kill(working(daemon, 2)[1]["pid"], signal.SIGKILL)
        assert "killed by signal 9" in end(process, 1)


def test_bench_interrupt():
    """What was measured until then is reported, and no client stays."""
    with Daemon() as daemon:
        for how in (signal.SIGINT, signal.SIGTERM):
            process = start(daemon, "bench", "-p", "2", "-t", "600", "-j", *TINY)
            working(daemon, 2)
            assert len(children(process)) == 2
            process.send_signal(how)
            assert json.loads(end(process))["all"]["jobs"] > 0
        process = start(daemon, "bench", "-p", "2", "-t", "600", *TINY)
        working(daemon, 2)
        process.kill()
        process.communicate(timeout=60)
        until(lambda: daemon.stats()["clients"] == 1, "the clients to go", 20)


# --- top ---

def table(frame):
    """The rows of a frame by name."""
    lines = frame.splitlines()
    at = next(i for i, line in enumerate(lines) if "JOBS/S" in line)
    rows = [re.split(r"  +", line.strip()) for line in lines[at + 1:] if line.strip()]
    assert lines[at].split()[:3] == ["PID", "USER", "NAME"], lines[at]
    return {row[1] if " " in row[0] else row[2]: row for row in rows}


def test_top():
    with Daemon(backend="fault", fault="delay_ms=20", slots=1) as daemon, \
            daemon.client(name="busy") as busy, daemon.client(name="idle"):
        p = Problem(busy)
        jobs = [busy.submit(p.attn, lane=lane) for lane in range(6)]
        for job in jobs:
            busy.wait_done(job)
        held = busy.submit(p.attn, ready=False)
        busy.ping()
        first, second = sagectl(daemon, "top", "-c", "2", "-i", "0.3").split("\n\nsageattnd ")
        assert second.count("MiB") == 1 and "running for" in second
        rows = table(first)
        assert {"busy", "idle", "sagectl"} <= rows.keys(), first
        head = first.splitlines()[1]
        assert float(re.search(r"([0-9.]+) jobs/s", head)[1]) > 0, head
        words = " ".join(rows["busy"])
        assert " cpu " in words and "100.0%" in words and " ms " in words, words
        assert words.split()[7] == "1", words  # queued
        busy.page.acquire(*held)
        busy.wait_done(held)
        clients = {c["name"]: c for c in json.loads(sagectl(daemon, "clients", "-j"))}
        # six at once on one slot: the last waited for five that took 20 ms each
        assert 1e5 <= clients["busy"]["queue_p99_us"] and not clients["idle"]["queue_p99_us"]
    assert "no daemon" in sagectl(daemon.path, "top", "-c", "1", code=1)
    sagectl(daemon.path, "top", "-i", "0", code=64)
    sagectl(daemon.path, "top", "-c", "x", code=64)


def test_top_goes_on():
    """Over a restart of the daemon; the frames between say why there is nothing to see."""
    with Daemon() as first:
        process = start(first, "top", "-i", "0.05")
        assert first.path and "sageattnd" in process.stdout.readline()
        first.stop()
        line = ""
        while "no daemon" not in line:
            line = process.stdout.readline()
            assert line, "it ended"
        with Daemon(directory=first.directory) as second:
            while f"pid {second.pid}," not in line:
                line = process.stdout.readline()
                assert line, "it ended"
            process.terminate()
            process.communicate(timeout=60)
            assert process.returncode == 0
            second.stop()


class Terminal:
    """sagectl top on a terminal of its own."""

    def __init__(self, daemon, *args):
        self.screen, inside = pty.openpty()
        self.inside, self.seen = inside, b""
        self.resize(24, 200)
        self.cooked = termios.tcgetattr(inside)
        self.process = subprocess.Popen([SAGECTL, "-s", daemon.path, "top", *args], stdin=inside,
                                        stdout=inside, stderr=inside, env=sage.environment(),
                                        preexec_fn=self._own)

    @staticmethod
    def _own():
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def resize(self, rows, columns):
        fcntl.ioctl(self.inside, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def read(self, word):
        """All until the word comes."""
        self.seen = b""
        end_at = time.monotonic() + 20
        while word not in self.seen:
            left = end_at - time.monotonic()
            assert left > 0 and select.select([self.screen], [], [], left)[0], self.seen
            self.seen += os.read(self.screen, 65536)
        return self.seen

    def quit(self, key):
        os.write(self.screen, key)
        self.read(b"\033[?1049l")
        assert self.process.wait(20) == 0
        assert termios.tcgetattr(self.inside) == self.cooked, "the terminal is not as it was"
        os.close(self.screen)
        os.close(self.inside)


def test_top_terminal():
    with Daemon() as daemon, daemon.client(name="x" * 60):
        top = Terminal(daemon, "-i", "600")
        first = top.read(b"\033[J")
        assert b"\033[?1049h" in first and b"MAPPED" in first
        top.resize(3, 20)  # shown again at once, and no more than fits
        frame = top.read(b"\033[J").split(b"\033[H")[-1]
        lines = frame.replace(b"\033[K", b"").replace(b"\033[J", b"").split(b"\r\n")
        assert len(lines) == 3 and all(len(line) <= 20 for line in lines), frame
        top.quit(b"q")
        top = Terminal(daemon, "-i", "0.05")
        for _ in range(3):
            top.read(b"\033[J")
        top.quit(b"\003")  # Ctrl-C
        top = Terminal(daemon, "-i", "600")
        top.read(b"\033[J")
        os.write(top.screen, b"\032")  # Ctrl-Z
        top.read(b"\033[?1049l")
        until(lambda: os.waitpid(top.process.pid, os.WUNTRACED | os.WNOHANG)[0], "it to stop")
        top.process.send_signal(signal.SIGCONT)
        assert b"\033[?1049h" in top.read(b"\033[J")
        top.quit(b"q")


# --- doctor ---

def checks(daemon, code=0):
    process = start(daemon, "doctor", "-j")
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and not err, (out, err)
    return {c["check"]: c for c in json.loads(out)}


def test_doctor():
    with Daemon() as daemon:
        said = checks(daemon)
        assert list(said) == ["memfd", "socket", "daemon", "version", "ping", "gpu", "namespaces",
                              "int8_fp16", "int8_fp8", "handoff"], list(said)
        wrong = [c for c in said.values() if c["result"] != "PASS" or c["remedy"]]
        # a busy machine, or one with a GPU, may get a warning
        assert all(c["result"] == "WARN" and c["check"] in ("gpu", "ping", "handoff") and
                   c["remedy"] for c in wrong), wrong
        assert said["handoff"]["handoff_us"] > 0 and said["handoff"]["tokens"] >= 0, said["handoff"]
        text = sagectl(daemon, "doctor")
        assert [line.split()[1] for line in text.splitlines() if line[0] != " "] == list(said)
    assert checks("/nonexistent/s", 1)["socket"]["result"] == "FAIL"


def test_doctor_finds():
    with Daemon(backend="fault", fault="fail=1") as daemon:
        said = checks(daemon, 1)
        assert said["namespaces"]["result"] == "FAIL" and "EINTERNAL" in said["namespaces"]["text"]
        assert list(said)[-1] == "namespaces", "nothing comes of what is behind"
    with Daemon(client_bytes=4096) as daemon:
        said = checks(daemon, 1)
        assert "sageattnd.conf" in list(said.values())[-1]["remedy"], said
    with Daemon() as daemon:
        os.chmod(daemon.path, 0o666)
        assert checks(daemon)["socket"]["result"] == "WARN"
    with Daemon(backend="fault", fault="delay_ms=500") as daemon, daemon.client() as client:
        client.submit(Problem(client).attn)
        client.call("DRAIN")
        assert checks(daemon)["daemon"]["result"] == "WARN"
        assert daemon.wait() == 0


if __name__ == "__main__":
    sage.run(globals())
