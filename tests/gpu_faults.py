#!/usr/bin/env python3
"""The fault matrix: who notices what when client or daemon is killed, stopped or thrown out, on a
GPU.

    gpu_faults.py [--mps=no,yes] [--kills=1000] [--rows=TEXT] [--tsv=FILE] [--backend=cuda]

A daemon that is started again 0.2 s after it ended, as systemd would; a client in the state that
the row names; a witness that has small jobs computed all the time and looks at each result. A row
says who noticed and when (ms after the fault), what became of the other side's work, the error that
was reported, whether results were right, those of the witness with its longest wait, and what is
left in the daemon (descriptors, resident memory, mapped memory) and on the device when all is over.
In the end that many clients are killed at random moments, without MPS, 16 of them at a time. A row
fails where

  - without MPS anything but the victim's own jobs is touched, or something is left behind;
  - a killed daemon's successor is not ready 2 s after the kill, or a waiting client gets less than
    right results; without one, the client gets no SAGE_ELOST about retry_ms later;
  - under MPS a daemon that lost its device does not exit with 70, does not say why in STATUS and
    log, or is not ready 3 s after the last process that was affected has gone.

--rows runs those whose text contains TEXT. --backend=cpu tries the program where there is no GPU.
Exit status 0, 1, or 77 where there is nothing to test on.
"""
import argparse
import concurrent.futures
import contextlib
import os
import random
import re
import select
import shutil
import signal
import sys
import tempfile
import threading
import time

import gpu_daemon
import sage
from fault_client import child_client, child_meter, child_witness  # noqa: F401
from gpu_daemon import SLACK, Child
from sage import EXIT_DEVICE_LOST, Manager, Skip, until

RESTART_S = 0.2    # of systemd/sageattnd.service
STOPPED_S = 0.3
RETRY_MS = 60000   # of who is to survive everything
PATIENCE_MS = 700  # of who is not; and 1500 where kernels are to be loaded meanwhile
READY_S = {False: 2.0, True: 3.0}  # without MPS after the kill, with it after the last has gone
LOST_S = 1.0       # after which a witness that computes would have found out
RSS = 16 << 20     # more resident memory than that is a leak
ONCE = 16          # random victims at a time
SIX = ("idle", "registering", "held", "queued", "running", "waiting")
COLUMNS = ("mps", "victim", "fault", "state", "noticed_by", "noticed_ms", "streams", "streams_ms",
           "error", "results", "others", "others_worst_ms", "fds", "rss_kib", "mapped_bytes",
           "gpu_mib", "ready_ms", "verdict")


def hear(child, timeout=30.0):
    if not select.select([child.process.stdout], [], [], timeout)[0]:
        raise AssertionError(f"{child.name} hangs: it has said nothing for {timeout} s")
    return child.line()


def tell(child, what):
    with contextlib.suppress(BrokenPipeError):  # its last words are worth hearing
        child.process.stdin.write(what + "\n")
        child.process.stdin.flush()


def outcome(child, timeout=30.0):
    tell(child, "go")
    return hear(child, timeout)


class Place:
    """A daemon, a client, a witness, and somebody who measures device memory."""

    def __init__(self, backend, with_mps, env):
        self.backend, self.mps, self.env = backend, with_mps, env
        self.directory = tempfile.mkdtemp(prefix="sage")
        self.path = os.path.join(self.directory, "s")
        self.manager, self.statuses = Manager(self.directory), []
        self.daemon, self.children, self.ends = None, {}, {}
        self.meter, self.mode = None, ""
        threading.Thread(target=self.listen, daemon=True).start()
        if backend == "cuda":  # not one of the MPS server's
            self.meter = Child("meter")
            hear(self.meter)

    def listen(self):
        """What the daemon tells its manager, lest it waits for somebody to read it."""
        with contextlib.suppress(OSError):
            while True:
                lines = self.manager.socket.recv(4096).decode().split("\n")
                self.statuses += [line for line in lines if line.startswith("STATUS=")]

    def close(self):
        self.clear()
        if self.meter:
            self.meter.kill()
        self.manager.socket.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def clear(self):
        """Away with them all."""
        for child in self.children.values():
            child.process.kill()
        self.children.clear()
        if self.daemon and self.daemon.process.poll() is None:
            self.daemon.process.kill()
            self.daemon.wait()

    # --- processes ---

    def start(self, limit=40.0):
        """As often as it takes: the time when it is ready."""
        end = time.monotonic() + limit
        while True:
            time.sleep(RESTART_S)
            options = {"slot_bytes": "256M"} if self.backend == "cuda" else {}
            self.daemon = sage.Daemon({**self.env, "NOTIFY_SOCKET": self.manager.path}, wait=False,
                                      directory=self.directory, backend=self.backend, **options)
            try:
                until(self.daemon.serves, "the daemon to be ready", limit)
                return time.monotonic()
            except AssertionError:
                self.daemon.process.kill()
                self.daemon.wait()
                if time.monotonic() > end:
                    raise

    def spawn(self, key, what, *args):
        child = self.children[key] = Child(what, self.path, self.backend, *args, env=self.env)

        def wait():
            child.process.wait()
            self.ends[child.process.pid] = time.monotonic()
        threading.Thread(target=wait, daemon=True).start()
        return child

    def ready(self):
        """Start who is missing; nothing is under way then."""
        if not self.daemon or self.daemon.process.poll() is not None:
            self.start()
        wanted = {"witness": (), "client": ("client", RETRY_MS)}
        for key in [k for k, c in self.children.items()
                    if k not in wanted or c.process.poll() is not None]:
            self.children.pop(key).process.kill()
        new = [self.spawn(key, key, *args) for key, args in wanted.items()
               if key not in self.children]
        for child in new:
            self.mode = hear(child, 60).get("mode", self.mode)
        until(lambda: self.daemon.stats()["clients"] == len(wanted) + 1, "the others to be gone")
        until(lambda: all(map(self.maps, self.children.values())),
              "those who have connected again to have their memory registered again")
        self.statuses.clear()
        outcome(self.children["witness"])

    def victim(self):
        child = self.spawn("victim", "client", "victim", RETRY_MS)
        hear(child)
        return child

    # --- looking ---

    def entry(self, child):
        """What `sagectl clients` shows of it."""
        with self.daemon.client(page=False) as client:
            return next((c for c in client.call("CLIENTS")["clients"]
                         if c["pid"] == child.process.pid), None)

    def maps(self, child):
        return (self.entry(child) or {}).get("mapped_bytes")

    def snapshot(self):
        mapped = self.daemon.stats().get("mapped_bytes", 0)
        time.sleep(0.02)  # until it has noticed that we are gone
        free = outcome(self.meter)["free"] if self.meter else 0
        return {"fds": self.daemon.fds(), "rss": self.daemon.rss(), "mapped": mapped,
                "used": -free}

    def back(self, base, row, timeout=5.0):
        """Nothing is left: not of who has gone, nor of what was under way."""
        end = time.monotonic() + timeout
        limits = {"fds": 0, "rss": RSS, "mapped": 0, "used": SLACK}
        while True:
            now = self.snapshot()
            more = {key: now[key] - base[key] for key in base}
            good = all(more[key] <= limits[key] for key in more)
            if good or time.monotonic() > end:
                break
            time.sleep(0.05)
        row.update(fds=more["fds"], rss_kib=more["rss"] >> 10, mapped_bytes=more["mapped"],
                   gpu_mib=round(more["used"] / 2**20, 1))
        assert good, f"not back where it was: {more}"

    def enter(self, child, state):
        """Get the client into the state, by the daemon's own account."""
        tell(child, state)
        said = hear(child)
        assert said.get("state") == state, f"{state}: {said}"
        key = {"held": "queued", "queued": "queued", "running": "running"}.get(state)
        if key:
            until(lambda: (self.entry(child) or {}).get(key), f"a job to be {key}", 2)
        return said

    def others(self, row):
        """The witness's results since ready()."""
        said = outcome(self.children["witness"])
        row["others"] = f"{said['jobs'] - said['wrong']} right, {said['wrong']} wrong"
        row["others_worst_ms"] = round(said["worst_ms"], 1)
        assert said["jobs"] and not said["wrong"] and not said["error"], f"the witness: {said}"

    def disconnected(self, child):
        """Why, once the daemon has said so."""
        found = re.findall(rf'event=disconnected client=\d+ pid={child.process.pid} .*'
                           r'reason="([^"]*)"', self.daemon.log())
        return found[0] if found else None

    def connected(self, child):
        return f" pid={child.process.pid} uid=" in self.daemon.log()

    def over(self, row, said, since):
        row.update(error=said["status"], streams_ms=round(1e3 * (said["at"] - since), 1),
                   results={True: "right", False: "WRONG", None: "-"}[said["right"]])


def is_right(said):
    assert said["status"] == "OK" and said["right"], f"the client: {said}"


# --- rows ---

def client_stopped(place, row, state):
    child, base = place.children["client"], place.snapshot()
    place.enter(child, state)
    os.kill(child.process.pid, signal.SIGSTOP)
    time.sleep(STOPPED_S)
    left = place.entry(child)
    os.kill(child.process.pid, signal.SIGCONT)
    since = time.monotonic()
    said = outcome(child)
    place.over(row, said, since)
    row.update(noticed_by="nobody", streams=f"goes on; {left['running']} jobs ran while stopped")
    assert not place.disconnected(child), "the daemon threw it out"
    is_right(said)
    place.others(row)
    place.back(base, row)


def daemon_stopped(place, row, state):
    child, base = place.children["client"], place.snapshot()
    place.enter(child, state)
    place.daemon.process.send_signal(signal.SIGSTOP)
    time.sleep(STOPPED_S)
    place.daemon.process.send_signal(signal.SIGCONT)
    since = time.monotonic()
    said = outcome(child)
    place.over(row, said, since)
    row.update(noticed_by="nobody", streams="client's wait, go on")
    is_right(said)
    place.others(row)
    place.back(base, row)


def affected_gone(place, since):
    """Whoever has lost its context ends, by itself or by us: the time when the last had."""
    witness = place.children["witness"]
    with contextlib.suppress(AssertionError):
        until(lambda: witness.process.poll() is not None, "the witness to end", 3)
    for child in place.children.values():
        child.process.kill()
    pids = [child.process.pid for child in place.children.values()]
    until(lambda: all(pid in place.ends for pid in pids), "the affected to end")
    place.children.clear()
    return max(since, *(place.ends[pid] for pid in pids))


def in_time(place, row, ready, since):
    row["ready_ms"] = round(1e3 * (ready - since))
    limit = READY_S[place.mps]
    assert ready - since <= limit, f"ready after {ready - since:.1f} s, not {limit}"


def new_clients(place, row):
    place.ready()
    time.sleep(0.1)
    place.others(row)


def rest(place):
    """The witness computes nothing until it is asked for its outcome."""
    tell(place.children["witness"], "rest")
    hear(place.children["witness"])


def daemon_killed(place, row, state):
    child, base = place.children["client"], place.snapshot()
    # Or a kernel for it would be the one that is killed.
    resting = place.mps and state in ("idle", "registering", "held")
    if resting:
        rest(place)
    place.enter(child, state)
    place.daemon.process.kill()
    since = time.monotonic()
    place.daemon.wait()
    tell(child, "go")  # so that it finds out if it has lost its context
    ready = place.start()
    until(lambda: child.process.poll() is not None or place.connected(child), "the client", 30)
    row["noticed_ms"] = round(1e3 * (time.monotonic() - since))
    said = hear(child, 60)
    place.over(row, said, since)
    if said["status"] == "CUDA" or place.children["witness"].process.poll() is not None:
        row.update(noticed_by="all", streams="contexts lost", error=said["text"] or said["status"])
        assert place.mps, f"the client: {said}"
        # It may have been ready before the last had gone, or have had to wait for that.
        in_time(place, row, ready, min(ready, affected_gone(place, since)))
        new_clients(place, row)
        return
    row.update(noticed_by="client, reconnects", streams="client's wait, go on")
    in_time(place, row, ready, since)
    is_right(said)
    if resting:
        outcome(place.children["witness"])
        time.sleep(0.1)
    place.others(row)
    place.back(base, row)


def unreplaced(place, row, state):
    """No successor before retry_ms is over."""
    patience, base = PATIENCE_MS + 800 * (state == "lazy"), place.snapshot()
    child = place.spawn("patient", "client", "patient", patience)
    hear(child)
    if place.mps:
        rest(place)
    place.enter(child, state)
    place.daemon.process.kill()
    since = time.monotonic()
    place.daemon.wait()
    said = outcome(child)
    place.over(row, said, since)
    row.update(noticed_by="client, fails them", noticed_ms=row["streams_ms"],
               streams="client's go on")
    if said["loading_ms"]:
        row["streams"] += f"; loading took {said['loading_ms']:.0f} ms"
    late = 1e3 * (said["at"] - since) - patience
    place.start()
    assert said["status"] == "ELOST" and -100 < late < 1000, f"{late:.0f} ms late: {said}"
    place.enter(child, "idle")
    is_right(outcome(child))
    child.end()
    if place.mps:
        outcome(place.children["witness"])
        time.sleep(0.1)
    place.others(row)
    place.back(base, row)


def device_lost(place, row, since):
    """By a client of the same MPS server."""
    daemon = place.daemon
    row.update(noticed_by="daemon, all", noticed_ms=round(1e3 * (time.monotonic() - since), 1),
               streams="contexts lost")
    assert place.mps, f"the daemon is gone: {daemon.process.returncode}"
    code, log = daemon.wait(), daemon.log()
    assert code == EXIT_DEVICE_LOST, f"the daemon ended with {code}"
    reason = re.search(r'event=device_lost .*reason="([^"]*)"', log)
    assert reason, f"the log does not say why: {log[-500:]}"
    row["error"] = reason.group(1)
    until(lambda: any(s.startswith("STATUS=device lost: ") for s in place.statuses),
          "the status", 2)
    gone = affected_gone(place, since)
    in_time(place, row, place.start(), gone)
    new_clients(place, row)


def client_killed(place, row, state):
    base = place.snapshot()
    victim = place.victim()
    said = place.enter(victim, state)
    os.kill(victim.process.pid, signal.SIGKILL)
    since = time.monotonic()
    ended = place.daemon.process.poll
    why = until(lambda: place.disconnected(victim) or ended() is not None and "lost", "a notice")
    row.update(noticed_by="daemon", noticed_ms=round(1e3 * (time.monotonic() - since), 1),
               error=why, results="-", streams="daemon's finish their pieces, let go")
    if said["child"]:
        os.kill(said["child"], 0)  # it has been there all the time
        os.kill(said["child"], signal.SIGKILL)
    with contextlib.suppress(OSError, sage.Closed):  # the daemon may be about to end
        until(lambda: ended() is not None or
              place.daemon.stats().get("mapped_bytes", 0) <= base["mapped"], "its memory")
        row["streams_ms"] = round(1e3 * (time.monotonic() - since), 1)
    with contextlib.suppress(AssertionError):
        until(lambda: ended() is not None, "the daemon to end", LOST_S * place.mps)
    if ended() is not None:
        device_lost(place, row, since)
        return
    victim.kill()
    place.others(row)
    place.back(base, row)


def thrown_out(place, row, state):
    base = place.snapshot()
    victim = place.victim()
    place.enter(victim, state)
    since = time.monotonic()
    why = until(lambda: place.disconnected(victim), "the daemon to throw it out")
    row.update(noticed_by="daemon", noticed_ms=round(1e3 * (time.monotonic() - since), 1),
               streams="client's go on")
    said = outcome(victim)
    place.over(row, said, since)
    assert said["status"] == "ELOST" and why in said["text"], f"'{why}', but the client: {said}"
    place.enter(victim, "idle")
    is_right(outcome(victim))
    victim.end()
    place.others(row)
    place.back(base, row)


def kill_one(place, i):
    """A client is started, gets into some state and is killed a moment later."""
    pid, key = place.daemon.pid, f"victim {i}"
    victim = place.spawn(key, "client", "victim", RETRY_MS, True)
    hear(victim, 60)
    tell(victim, random.choice(SIX + ("own",) * (place.backend == "cuda")))
    hear(victim, 60)
    time.sleep(random.uniform(0, 0.01))
    victim.kill()
    del place.children[key]
    assert place.daemon.process.poll() is None and place.daemon.pid == pid, "the daemon is gone"


def random_kills(place, row, n):
    """ONCE of them at a time, each in a thread: CUDA contexts take long to make and to tear down,
    which others' need not wait for."""
    def kill(count):
        threads = concurrent.futures.ThreadPoolExecutor(ONCE)
        try:
            list(threads.map(lambda i: kill_one(place, i), range(count)))
        finally:
            threads.shutdown(cancel_futures=True)
    kill(ONCE)  # what grows the first time has grown
    until(lambda: place.daemon.stats()["clients"] == 3, "the daemon to have noticed")
    base, start = place.snapshot(), time.monotonic()
    kill(n)
    rate = n / (time.monotonic() - start)
    row.update(noticed_by="daemon", results="-",
               streams=f"daemon's finish their pieces, let go; {rate:.1f} a second")
    place.others(row)
    place.back(base, row, 20)


def matrix(backend, with_mps):
    cuda = backend == "cuda"
    own = ("own",) * cuda
    no_successor = ("held", *("running",) * (not with_mps), *("lazy",) * cuda)
    for victim, fault, states, play in (
            ("client", "SIGSTOP", SIX + own, client_stopped),
            ("daemon", "SIGSTOP", SIX, daemon_stopped),
            ("daemon", "SIGKILL", SIX, daemon_killed),
            ("daemon", "SIGKILL for good", no_successor, unreplaced),
            ("client", "SIGKILL", SIX, client_killed),
            ("client", "protocol error", ("thrown_out",), thrown_out),
            ("client", "SIGKILL, fork lives", ("forked",), client_killed),
            ("client", "SIGKILL", own, client_killed)):  # the last: it may take all along
        for state in states:
            yield victim, fault, state, play


# --- the table ---

def show(row, tsv):
    if tsv:
        print(*(row.get(c, "") for c in COLUMNS), sep="\t", file=tsv, flush=True)

    def ms(key):
        return f" {row[key]} ms" if row.get(key, "") != "" else ""
    left = "{} {} {} {}".format(*(row.get(c, "-") for c in COLUMNS[12:16]))
    ready = f"; ready{ms('ready_ms')}" if "ready_ms" in row else ""
    print(f"{row['mps']:3} {row['victim']:6} {row['fault']:19} {row['state']:11} "
          f"{row.get('noticed_by', '-') + ms('noticed_ms'):24} "
          f"{row.get('streams', '-') + ms('streams_ms') + ready:58} "
          f"{row.get('error', '-')[:30]:30} {row.get('results', '-'):5} "
          f"{row.get('others', '-') + ms('others_worst_ms'):34} {left:16} {row['verdict']}",
          flush=True)


def run_row(place, names, play, arguments, tsv):
    row = dict(zip(COLUMNS, names))
    try:
        place.ready()
        play(place, row, *arguments)
        row["verdict"] = "ok"
    except Exception as error:  # whatever it was: the other rows are of interest, too
        row["verdict"] = f"FAIL: {type(error).__name__}: {error}".replace("\n", " ")[:400]
        if place.daemon:
            print(f"--- log of the daemon\n{place.daemon.log()[-1500:]}---", flush=True)
        place.clear()
    show(row, tsv)
    return row["verdict"] == "ok"


def run_place(place, args, tsv):
    good = True
    yes = "yes" if place.mps else "no"
    place.ready()
    print(f"MPS {yes}, mode {place.mode}", flush=True)
    for victim, fault, state, play in matrix(place.backend, place.mps):
        names = yes, victim, fault, state
        if args.rows in " ".join(names):
            good &= run_row(place, names, play, (state,), tsv)
    names = yes, "client", "SIGKILL at random", str(args.kills)
    if args.kills and not place.mps and args.rows in " ".join(names):
        good &= run_row(place, names, random_kills, (args.kills,), tsv)
    return good


def main():
    if sys.argv[1:2] == ["--child"]:
        gpu_daemon.main(globals())
        return 0
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--mps", default="no,yes")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--rows", default="")
    parser.add_argument("--tsv")
    parser.add_argument("--backend", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args()
    if args.backend == "cpu":
        args.mps = "no"
    else:
        try:
            gpu_daemon.run_child("probe")
        except (Skip, AssertionError) as error:
            print(f"gpu_faults.py: skipped, no GPU: {str(error).strip().splitlines()[-1]}")
            return 77
    tsv = open(args.tsv, "w") if args.tsv else None
    if tsv:
        print(*COLUMNS, sep="\t", file=tsv, flush=True)
    print("MPS victim fault state; who noticed; streams; error; results; others; more descriptors, "
          "KiB resident, bytes mapped, MiB of the device than before; verdict")
    good, start = True, time.monotonic()
    for with_mps in (name == "yes" for name in args.mps.split(",")):
        try:
            with gpu_daemon.mps(with_mps) as env, \
                    contextlib.closing(Place(args.backend, with_mps, env)) as place:
                good &= run_place(place, args, tsv)
        except Skip as why:
            print(f"MPS {'yes' if with_mps else 'no'}: skipped: {why}")
    print(f"gpu_faults.py: {'all as required' if good else 'FAILED: see the last column'}, "
          f"{time.monotonic() - start:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
