"""From start to exit: options, sockets, the service manager, draining, dying, being replaced."""
import os
import signal
import shutil
import socket
import stat
import subprocess
import tempfile
import time

import sage
from sage import Closed, Daemon, Manager, Problem, Skip, refused, until


def attempt(*flags, **env):
    """Run the program with flags to its end: exit status and output."""
    done = subprocess.run([sage.PROGRAM, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=sage.environment(**env), timeout=20, text=True)
    return done.returncode, done.stdout


def test_command_line():
    status, text = attempt("--version")
    assert status == 0 and text.startswith("sageattnd "), text
    status, text = attempt("--help")
    assert status == 0 and "--slot-bytes" in text and "--print-config" in text
    status, text = attempt("--slots=5", "--socket=/x/y", "--print-config")
    assert status == 0 and "slots = 5" in text and "socket = /x/y" in text
    for flag, word in (("--slots=0", "slots"), ("--slots=x", "slots"), ("--colour=1", "colour"),
                       ("--slots", "--slots"), ("slots=1", "slots=1"),
                       ("--log-level=loud", "log_level"),
                       ("--config=/nonexistent/f", "/nonexistent/f")):
        status, text = attempt("--socket=/x/y", flag)
        assert status == 2 and word in text, (flag, status, text)
    for flag, word in (("--backend=tpu", "tpu"), ("--slot-bytes=900P", "slot_bytes"),
                       ("--slot-bytes=1", "workspace"), ("--slot-bytes=200000G", "workspace")):
        status, text = attempt("--socket=/x/y", "--threads=1", "--backend=cpu", flag)
        assert status == (2 if word == "tpu" or flag == "--slot-bytes=900P" else 1), (flag, status)
        assert word in text, (flag, text)
    status, text = attempt("--socket=/x/y", "--backend=fault", "--fault=explode=1")
    assert status == 2 and "fault" in text and "explode" in text, text


def test_config_file():
    directory = tempfile.mkdtemp(prefix="sage")
    try:
        path = os.path.join(directory, "conf")
        with open(path, "w") as conf:
            conf.write("[sageattnd]\n# a comment\nslots = 2\nclient_jobs = 17\n")
        with Daemon(config=path, client_buffers=5) as daemon, daemon.client() as client:
            assert client.welcome["jobs"] == 17 and client.welcome["buffers"] == 5
            assert client.stats()["slots"] == 2
        with open(path, "a") as conf:
            conf.write("colour = blue\n")
        status, text = attempt(f"--config={path}")
        assert status == 2 and f"{path}:5" in text and "colour" in text, text
    finally:
        shutil.rmtree(directory)


def test_sockets():
    with Daemon() as daemon:
        status, text = attempt(f"--socket={daemon.path}", "--backend=cpu", "--threads=1")
        assert status == 1 and daemon.path in text and "another" in text, text
        daemon.client().close()
        with Daemon(directory=daemon.directory, socket=daemon.path + "2") as neighbour:
            assert daemon.client().welcome["boot"] != sage.Client(daemon.path + "2").welcome["boot"]
            neighbour.stop()
    with Daemon() as first:  # a killed daemon leaves its socket behind
        first.process.kill()
        first.wait()
        assert os.path.exists(first.path)
        with Daemon(directory=first.directory) as second:
            second.client().close()
            second.stop()
            assert not os.path.exists(first.path)
    directory = tempfile.mkdtemp(prefix="sage")
    try:
        path = os.path.join(directory, "file")
        open(path, "w").close()
        status, text = attempt(f"--socket={path}", "--backend=cpu", "--threads=1")
        assert status == 1 and "no socket" in text and os.path.exists(path), text
        status, text = attempt(f"--socket={directory}/{'x' * 120}", "--backend=cpu", "--threads=1")
        assert status == 1 and "socket" in text and "107" in text, text
    finally:
        shutil.rmtree(directory)


def drained(daemon, drain):
    """What runs is finished, what waits is left, what comes is refused; exit 0."""
    with daemon.client() as client, daemon.client() as other:
        p = Problem(client)
        runs = client.submit(p.attn, lane=0)
        waits = client.submit(p.attn, lane=1, ready=False)
        follows = client.submit(p.attn, lane=0)
        until(lambda: client.stats().get("running"), "the job to start")
        drain(client)
        until(lambda: client.stats()["state"] == "draining", "the drain")
        late = client.submit(p.attn, lane=2)
        for job, status in ((late, "EDRAIN"), (runs, None), (follows, None)):
            wanted = sage.STATUSES[status] if status else 0
            assert client.wait_done(job)["status"] == wanted, job
        p.check()
        for c in (client, other):
            try:
                while True:
                    c.receive()
            except Closed:
                pass
        assert not client.page.released(*waits)
        assert daemon.wait() == 0
        assert not os.path.exists(daemon.path)


def test_mode():
    """Who is let in by a group that is not there, or not the daemon's to give."""
    with Daemon(group="no-such-group") as daemon:
        assert stat.S_IMODE(os.stat(daemon.path).st_mode) == 0o600
    if os.getuid() == 0:
        with Daemon(group="root") as daemon:
            assert stat.S_IMODE(os.stat(daemon.path).st_mode) == 0o660


def test_sigterm():
    with Daemon(backend="fault", fault="delay_ms=1000") as daemon:
        drained(daemon, lambda client: os.kill(daemon.pid, signal.SIGTERM))


def test_sigterm_again():
    """One more signal ends it at once; the first one does not, though it drains already."""
    with Daemon(backend="fault", fault="delay_ms=1000") as daemon, daemon.client() as client:
        client.submit(Problem(client).attn)
        client.call("DRAIN")
        daemon.process.send_signal(signal.SIGTERM)
        until(lambda: client.stats()["state"] == "draining", "the drain")
        assert client.stats()["running"] == 1
        daemon.ends_with = (1,)
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.wait() == 1
        assert "event=aborted" in daemon.log()


def test_drain():
    with Daemon(backend="fault", fault="delay_ms=1000") as daemon:
        drained(daemon, lambda client: client.call("DRAIN"))


def as_nobody(daemon, what):
    """Let another user connect, and do something as that user in a process of its own."""
    if os.getuid() != 0:
        raise Skip("needs root, to be somebody else for a moment")
    os.chmod(daemon.directory, 0o755)
    os.chmod(daemon.path, 0o666)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setresuid(65534, 65534, 65534)
            what()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def test_drain_permission():
    with Daemon() as daemon:
        def drain():
            with daemon.client(page=False) as client, refused("EPERM"):
                client.call("DRAIN")

        as_nobody(daemon, drain)
        assert daemon.stats()["state"] == "running"


def test_priority_permission():
    """High priority is for root and the daemon's user, unless max_priority says otherwise."""
    with Daemon() as daemon:
        def ask():
            daemon.client(page=False, priority=1).close()
            with refused("EPERM", "max_priority"):
                daemon.client(page=False, priority=2)

        as_nobody(daemon, ask)
        daemon.client(page=False, priority=2).close()
    with Daemon(max_priority=2) as daemon:
        as_nobody(daemon, lambda: daemon.client(page=False, priority=2).close())


def test_stops_quickly():
    with Daemon() as daemon, daemon.client() as client:
        p = Problem(client)
        client.run(p.attn)
        client.submit(p.attn, ready=False)
        start = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - start < 4  # the least that anything waits for is 5 s


def test_device_lost():
    """A distinct exit status; jobs stay unreleased for the next daemon, which does them."""
    page = sage.Page()
    with Daemon(backend="fault", fault="lose=2") as daemon:
        client = daemon.client(page=page)
        p = Problem(client)
        client.run(p.attn)
        jobs = [client.submit(p.attn, lane=lane, ready=False) for lane in (0, 0, 5)]
        client.ping()  # it has them all before it can lose one
        for job in jobs:
            page.acquire(*job)
        assert daemon.wait() == sage.EXIT_DEVICE_LOST
        # which of the two lanes met the loss is open; the other may have gone on meanwhile
        assert not all(page.released(*job) for job in jobs)
        with Daemon(directory=daemon.directory) as successor:
            again = successor.client(page=page)
            assert again.welcome["boot"] != client.welcome["boot"]
            p = Problem(again)
            for lane, number in jobs:
                if not page.released(lane, number):
                    again.submit(p.attn, lane=lane, number=number, ready=False)
            for job in jobs:
                if not page.released(*job):
                    assert again.wait_done(job)["status"] == 0
            p.check()
            successor.stop()


def test_killed():
    """SIGKILL at any moment: the page goes to the next daemon, no job is lost or done in vain."""
    page = sage.Page()
    with Daemon(backend="fault", fault="delay_ms=100") as daemon:
        client = daemon.client(page=page)
        p = Problem(client)
        jobs = [client.submit(p.attn, lane=i % 3) for i in range(30)]
        client.wait_done(jobs[2])
        daemon.process.kill()
        daemon.wait()
        with Daemon(directory=daemon.directory) as successor:
            again = successor.client(page=page)
            p = Problem(again)
            left = [job for job in jobs if not page.released(*job)]
            assert 0 < len(left) < 30
            for lane, number in left:
                again.submit(p.attn, lane=lane, number=number, ready=False)
            for job in left:
                assert again.wait_done(job)["status"] == 0
            successor.stop()


def test_notify():
    directory = tempfile.mkdtemp(prefix="sage")
    try:
        manager = Manager(directory)
        env = {"NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": "2000000"}
        with Daemon(env=env, directory=directory) as daemon:
            assert f"MAINPID={daemon.pid}" in manager.wait_for("READY=1")
            assert "running" in manager.wait_for("STATUS=")
            manager.wait_for("WATCHDOG=1")
            start = time.monotonic()
            manager.wait_for("WATCHDOG=1")
            assert time.monotonic() - start < 2
            daemon.process.terminate()
            manager.wait_for("STOPPING=1")
            assert daemon.wait() == 0
    finally:
        shutil.rmtree(directory)


def lost(fault, reason, work, clients=1):
    """The daemon ends with its own status while work(daemon) goes on; it has said why, and whose
    `clients` connections there are. What work() returns stays connected."""
    directory = tempfile.mkdtemp(prefix="sage")
    try:
        manager = Manager(directory)
        with Daemon(env={"NOTIFY_SOCKET": manager.path}, directory=directory, backend="fault",
                    fault=fault) as daemon:
            _connected = work(daemon)
            attached = ", ".join([f"test ({os.getpid()})"] * clients)
            assert manager.wait_for("STATUS=device lost") == (
                f"STATUS=device lost: {reason}; attached: {attached}")
            assert daemon.wait() == sage.EXIT_DEVICE_LOST
            log = daemon.log()
            assert f'event=device_lost backend=fault reason="{reason}"' in log, log
            assert log.count("device_lost") == 1, log
            assert f'event=attached clients="{attached}"' in log, log
    finally:
        shutil.rmtree(directory)


def test_lost_by_piece():
    def work(daemon):
        client = daemon.client()
        client.submit(Problem(client).attn)
        return client

    lost("lose=1", "found by a piece of a job", work)


def test_lost_by_registration():
    """What was not done is not answered, whoever asked: the next daemon will do it."""
    def work(daemon):
        client, other = daemon.client(), daemon.client()
        p = Problem(other)
        held = other.submit(p.attn, ready=False)
        fd = sage.memfd(4096)
        first = client.send("PING", {})
        register = client.send("REGISTER", {"buffer": 1, "kind": 1, "size": 4096}, [fd])
        os.close(fd)
        told = []
        for c in (client, other):
            try:
                while True:
                    told.append((c, *c.receive()))
            except Closed:
                pass
        assert (client, "PING", first, {}) in told, told
        assert all(op == "PING" and seq < register for _, op, seq, _ in told), told
        assert not other.page.released(*held)

    lost("lose_map=2", "fault: lose_map=2", work, clients=2)


def test_lost_while_idle():
    def work(daemon):
        client = daemon.client()
        p = Problem(client)
        client.run(p.attn)
        held = client.submit(p.attn, ready=False)
        try:
            while True:
                client.receive()
        except Closed:
            assert not client.page.released(*held)

    lost("lose_idle=1500", "fault: lose_idle=1500", work)


def test_lost_at_start():
    status, text = attempt("--socket=/x/y", "--backend=fault", "--fault=lose_start=3",
                           "--threads=1", "--slot-bytes=8M")
    assert status == sage.EXIT_DEVICE_LOST, (status, text)
    assert "event=start_failed" in text and "device lost" in text, text


def test_idle_exit():
    with Daemon(idle_exit=1) as daemon:
        with daemon.client() as client:
            time.sleep(2)
            client.ping()
            start = time.monotonic()
        assert daemon.wait() == 0
        assert 0.5 < time.monotonic() - start < 6


def listening(connect):
    """What connect() makes; None while there is no socket, or one that does not listen yet."""
    try:
        return connect()
    except (FileNotFoundError, ConnectionRefusedError):
        return None


def test_socket_activation():
    if not shutil.which("systemd-socket-activate"):
        raise Skip("no systemd-socket-activate here")
    directory = tempfile.mkdtemp(prefix="sage")
    try:
        path = os.path.join(directory, "s")
        activate = ("systemd-socket-activate", "--seqpacket", "-l", path)
        with Daemon(argv0=activate, directory=directory, wait=False, idle_exit=1,
                    socket="/nonexistent/s") as daemon:
            with until(lambda: listening(daemon.client), "the socket") as client:
                p = Problem(client)
                client.run(p.attn)
                p.check()
                assert client.welcome["pid"] == daemon.pid
            assert daemon.wait() == 0
            assert os.path.exists(path), "the socket is the manager's, not ours to remove"
        with Daemon(argv0=("systemd-socket-activate", "-l", path + "2"), directory=directory,
                    wait=False) as daemon:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
                def connect():
                    stream.connect(path + "2")
                    return stream

                until(lambda: listening(connect), "the socket")
                assert daemon.wait() == 1, "a stream socket was taken"
            assert "SEQPACKET" in daemon.log()
            daemon.process.returncode = 0
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    sage.run(globals())
