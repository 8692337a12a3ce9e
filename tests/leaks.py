"""Clients that die, stop or leave a child behind: nobody else notices, nothing stays behind."""
import os
import signal
import time

import sage
from sage import Daemon, Problem, until


class Child:
    """A client process of its own; act(client, problem, say) runs in it."""

    def __init__(self, daemon, act):
        self.read, write = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(write)
            return
        status = 1
        try:
            with daemon.client(name="child") as client:
                act(client, Problem(client), lambda text: os.write(write, text))
            status = 0
        finally:
            os._exit(status)

    def says(self):
        return os.read(self.read, 16)

    def end(self, number=signal.SIGKILL):
        os.kill(self.pid, number)
        os.close(self.read)
        return os.waitpid(self.pid, 0)[1]


def held(client, problem, say):
    for lane in range(5):
        client.submit(problem.attn, lane=lane, ready=False)
    client.ping()
    say(b"go")
    signal.pause()


def queued(client, problem, say):
    for lane in range(40):
        client.submit(problem.attn, lane=lane)
    say(b"go")
    signal.pause()


def running(client, problem, say):
    def busy():
        stats = client.stats()
        if not stats.get("running") and not stats.get("queued"):  # over before we could look
            for lane in range(40):
                client.submit(problem.attn, lane=lane)
        return stats.get("running")

    until(busy, "a job to run")
    say(b"go")
    signal.pause()


def registering(client, problem, say):
    fd = sage.memfd(1 << 20)
    for number in range(100, 120):
        client.send("REGISTER", {"buffer": number, "kind": 1, "size": 1}, [fd])
    say(b"go")
    signal.pause()


def test_killed():
    """200 clients killed while waiting, queued, running or registering."""
    with Daemon(backend="fault", fault="delay_ms=1", slots=2) as daemon:
        fds = daemon.fds()
        with daemon.client() as witness:
            problem = Problem(witness)
            for i in range(200):
                child = Child(daemon, (held, queued, running, registering)[i % 4])
                assert child.says() == b"go"
                if i % 8 < 4:
                    time.sleep(0.001 * (i % 5))
                child.end()
                if i == 20:
                    rss = daemon.rss()
                if i % 20 == 0:
                    witness.run(problem.attn)
                    problem.check()
            witness.run(problem.attn)
            problem.check()
            stats = witness.stats()
        daemon.quiet(fds)
        grown = daemon.rss() - rss
        # A sanitizer keeps freed memory for a while.
        assert grown < ((96 if sage.SANITIZED else 6) << 20), f"grown by {grown} bytes"
        assert stats["dropped"] > 200 and stats["clients_total"] >= 201


def test_killed_between_pieces():
    """A job that holds a slot between its pieces goes without leaving the slot held."""
    with Daemon(quantum_us=100, slots=2) as daemon, daemon.client() as witness:
        small = Problem(witness, hq=1, nq=16)
        for i in range(12):
            long = daemon.client()
            problem = Problem(long, hq=1, nq=6000, d=64)
            long.submit(problem.attn)
            for _ in range(3):
                witness.run(small.attn)
            time.sleep(0.003 * i)
            long.close()
        with daemon.client() as other:  # the slot is free for another that needs one
            problem = Problem(other, hq=1, nq=1500)
            other.run(problem.attn)
            problem.check()


def stopping(client, problem, say):
    while True:
        client.run(problem.attn)
        say(b".")


def test_stopped_client():
    """SIGSTOP: the others go on; SIGCONT: it goes on itself."""
    with Daemon() as daemon, daemon.client() as witness:
        problem = Problem(witness)
        child = Child(daemon, stopping)
        assert child.says()
        os.kill(child.pid, signal.SIGSTOP)
        os.waitpid(child.pid, os.WUNTRACED)
        for _ in range(50):
            witness.run(problem.attn)
        os.set_blocking(child.read, False)
        try:
            while child.says():
                pass
        except BlockingIOError:
            pass
        os.set_blocking(child.read, True)
        os.kill(child.pid, signal.SIGCONT)
        assert child.says()
        child.end()


def test_stopped_daemon():
    with Daemon() as daemon, daemon.client() as client:
        problem = Problem(client)
        client.run(problem.attn)
        os.kill(daemon.pid, signal.SIGSTOP)
        job = client.submit(problem.attn)
        time.sleep(0.2)
        assert not client.page.released(*job)
        os.kill(daemon.pid, signal.SIGCONT)
        assert client.wait_done(job)["status"] == 0


def leaving_a_child(client, problem, say):
    client.submit(problem.attn, ready=False)
    client.ping()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        signal.pause()
        os._exit(0)
    say(b"%d" % child)
    signal.pause()


def test_fork_child_keeps_socket():
    """The process is gone, the socket is not: its pidfd tells."""
    with Daemon() as daemon:
        fds = daemon.fds()
        child = Child(daemon, leaving_a_child)
        grandchild = int(child.says())
        assert daemon.stats()["clients"] == 2
        child.end()
        try:
            daemon.quiet(fds)
            os.kill(grandchild, 0)  # it is still there, and so is its copy of the socket
        finally:
            os.kill(grandchild, signal.SIGKILL)


def test_connections_come_and_go():
    with Daemon() as daemon:
        fds = daemon.fds()
        for i in range(500):
            if i == 100:
                rss = daemon.rss()
            with daemon.client(hello=i % 3 != 0, page=i % 2 == 0) as client:
                if i % 3 == 1:
                    client.send("STATS", {})
        daemon.quiet(fds)
        assert daemon.rss() - rss < ((64 if sage.SANITIZED else 4) << 20)


if __name__ == "__main__":
    sage.run(globals())
