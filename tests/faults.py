"""Whatever a client gets wrong, it gets its error or loses its own connection; no other does."""
import contextlib
import fcntl
import os
import random
import select
import signal
import socket
import struct
import time

import msgpack

import sage
from sage import Closed, Daemon, Problem, memfd, refused


@contextlib.contextmanager
def served(**options):
    """A daemon with a client whose jobs must go on; in the end nothing of the others may be left."""
    with Daemon(**options) as daemon:
        fds = daemon.fds()
        with daemon.client() as witness:
            problem = Problem(witness)
            yield daemon, witness
            witness.run(problem.attn)
            problem.check()
        daemon.quiet(fds)


@contextlib.contextmanager
def violation(daemon, *words, page=True):
    """The block's client gets EPROTO with a text that has these words, and loses its connection."""
    with daemon.client(page=page) as client:
        try:
            with refused("EPROTO", *words):
                yield client
                while True:
                    op, seq, body = client.receive()
                    if op == "ERROR":
                        assert seq == 0
                        raise sage.SageError(body["status"], body["text"])
            client.receive()
        except Closed:
            return
    raise AssertionError(f"still connected after a violation: {words}")


def test_refused_jobs():
    with served() as (daemon, _), daemon.client() as client:
        p = Problem(client, nq=32, nk=48, d=64, lse=True)
        other = Problem(client)
        stale = Problem(client)
        stale.buffer.unregister()
        size = p.buffer.size
        attn = p.attn

        def tensor(name, **changes):
            return {**attn, name: {**attn[name], **changes}}

        cases = [
            ("EUNSUPPORTED", "q.dtype", tensor("q", dtype=3)),
            ("EUNSUPPORTED", "q.dtype", tensor("q", dtype=77)),
            ("EUNSUPPORTED", "v.dtype", tensor("v", dtype=2)),
            ("EUNSUPPORTED", "lse.dtype", tensor("lse", dtype=1)),
            ("EINVAL", "k.shape[0]", tensor("k", shape=[2, 2, 48, 64])),
            ("EINVAL", "v.shape[2]", tensor("v", shape=[1, 2, 47, 64])),
            ("EINVAL", "o.shape[1]", tensor("o", shape=[1, 1, 32, 64])),
            ("EINVAL", "q.shape[2]", tensor("q", shape=[1, 2, -1, 64])),
            ("EUNSUPPORTED", "head dimension", tensor("q", shape=[1, 2, 32, 63])),
            ("EINVAL", "heads", tensor("q", shape=[1, 3, 32, 64])),
            ("EINVAL", "k.shape[1]", tensor("k", shape=[1, 0, 48, 64])),
            ("EUNSUPPORTED", "q.stride[3]", tensor("q", stride=[4096, 2048, 64, 2])),
            ("EUNSUPPORTED", "k.stride[2]", tensor("k", stride=[4096, 2048, -64, 1])),
            ("EINVAL", "q: its extent", tensor("q", stride=[4096, 2**62, 64, 1])),
            ("EINVAL", "o.stride", tensor("o", stride=[4096, 0, 64, 1])),
            ("EINVAL", "q: its address", tensor("q", offset=1)),
            ("EINVAL", "o: overlaps q", {**attn, "o": attn["q"]}),
            ("EINVAL", "o: overlaps v", tensor("o", offset=attn["v"]["offset"] + 128)),
            ("EINVAL", "lse: overlaps", tensor("lse", offset=attn["o"]["offset"])),
            ("EBOUNDS", "q: reaches beyond", tensor("q", offset=size)),
            ("EBOUNDS", "lse: reaches beyond", tensor("lse", offset=size - 252)),
            ("EBOUNDS", "k: reaches beyond", tensor("k", stride=[4096, size, 64, 1])),
            ("EBOUNDS", "q: reaches beyond", tensor("q", offset=2**63)),
            ("EINVAL", "q.offset", tensor("q", offset=2**64 - 64)),
            ("EBUFFER", "k.buffer", tensor("k", buffer=stale.buffer.id)),
            ("EBUFFER", "o.buffer", tensor("o", buffer=0xFFFFFFFF)),
            ("EUNSUPPORTED", "attn.q.zero_point", tensor("q", zero_point=1)),
            ("EUNSUPPORTED", "attn.softcap", {**attn, "softcap": 30.0}),
            ("EINVAL", "variant", {**attn, "variant": 9}),
            ("EINVAL", "diagonal", {**attn, "diagonal": 2}),
            ("EINVAL", "scale", {**attn, "scale": -1.0}),
            ("EINVAL", "scale", {**attn, "scale": float("nan")}),
            ("EINVAL", "window_left", {**attn, "window_left": -2}),
            ("EUNSUPPORTED", "smooth_v", {**attn, "variant": 1, "smooth_v": True}),
        ]
        for status, word, changed in cases:
            with refused(status, word):
                client.run(changed)
        with refused("EUNSUPPORTED", "deadline"):
            client.run(attn, deadline=3)
        with refused("EUNSUPPORTED", "a?b: unknown key"):
            client.run({**attn, "a\nb": 1})
        client.run(attn)
        p.check()
        assert client.stats()["refused"] == len(cases) + 2
        assert other.buffer.id in (1, 2)


def test_foreign_buffer():
    """Ids belong to the connection."""
    with served() as (daemon, _), daemon.client() as one, daemon.client() as two:
        two.next_id()
        mine, theirs = Problem(one), Problem(two)
        with refused("EBUFFER", "q.buffer"):
            one.run(theirs.attn)
        with refused("EBUFFER"):
            one.call("UNREGISTER", {"buffer": theirs.buffer.id})
        one.run(mine.attn)
        two.run(theirs.attn)


def test_register():
    with served(client_bytes="1M") as (daemon, _), daemon.client() as client:
        def register(fd, size=4096, buffer=9, kind=1):
            try:
                return client.call("REGISTER", {"buffer": buffer, "kind": kind, "size": size},
                                   [] if fd is None else [fd])
            finally:
                if fd is not None:
                    os.close(fd)

        with refused("EHANDLE", "none came"):
            register(None)
        with refused("EHANDLE", "sealed"):
            register(memfd(4096, seals=0))
        with refused("EHANDLE", "sealed"):
            register(memfd(4096, seals=fcntl.F_SEAL_GROW))
        with refused("EHANDLE", "memfd"):
            register(os.open("/dev/null", os.O_RDWR))
        with refused("EHANDLE", "memfd"):
            register(os.open(sage.__file__, os.O_RDONLY))
        with refused("EHANDLE", "memfd"):
            register(os.pipe()[0])
        with refused("EHANDLE", "writing"):
            register(memfd(4096, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE))
        with refused("EHANDLE", "empty"):
            register(memfd(0))
        with refused("EBOUNDS", "size"):
            register(memfd(4096), size=4097)
        with refused("EBOUNDS", "size"):
            register(memfd(4096), size=2**64 - 1)
        with refused("EINVAL", "size"):
            register(memfd(4096), size=0)
        with refused("EINVAL", "buffer"):
            register(memfd(4096), buffer=0)
        for kind in (0, 2, 3, 4, 2**32 - 1):
            with refused("EUNSUPPORTED" if kind > 3 or not kind else "EPROTO", "kind"), \
                    daemon.client() as other:
                fd = memfd(4096)
                try:
                    other.call("REGISTER", {"buffer": 9, "kind": kind, "size": 4096}, [fd])
                finally:
                    os.close(fd)
        for more in ({"kind": 2, "handle": bytes(64)}, {"kind": 3}):
            with refused("EUNSUPPORTED", "kind"):
                client.call("REGISTER", {"buffer": 9, "kind": 1, "size": 4096, **more})
        for more in ({"handle": bytes(64)}, {"chunks": [4096]}, {"more": True}):
            fd = memfd(4096)
            with refused("EINVAL", next(iter(more))):
                client.call("REGISTER", {"buffer": 9, "kind": 1, "size": 4096, **more}, [fd])
            os.close(fd)
        with refused("EQUOTA", "size"):
            register(memfd(2 << 20))
        with refused("EBUFFER"):
            client.call("UNREGISTER", {"buffer": 9})
        assert register(memfd(5000)) == {"buffer": 9, "size": 5000}
        with refused("EINVAL", "registered already"):
            register(memfd(4096))
        shrunk = memfd(8192, seals=0)
        os.ftruncate(shrunk, 100)
        fcntl.fcntl(shrunk, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        with refused("EBOUNDS", "size"):
            register(shrunk, buffer=10)
        client.call("UNREGISTER", {"buffer": 9})
        with refused("EBUFFER"):
            client.call("UNREGISTER", {"buffer": 9})


def test_unregister_in_use():
    """Refused to new jobs at once, answered when the last job is over."""
    with served(backend="fault", fault="delay_ms=100") as (daemon, _), daemon.client() as client:
        p = Problem(client)
        job = client.submit(p.attn)
        seq = client.send("UNREGISTER", {"buffer": p.buffer.id})
        late = client.submit(p.attn)
        client.answer(seq)
        assert client.page.released(*job)
        assert client.wait_done(job)["status"] == 0
        assert client.wait_done(late)["status"] == sage.STATUSES["EBUFFER"]
        p.check()
        sage.Buffer(client, 4096, number=p.buffer.id)


def test_events():
    """There are none on the CPU; every way to ask for one is told so."""
    with served() as (daemon, _), daemon.client() as client:
        assert client.welcome["modes"] == 1
        with refused("EUNSUPPORTED", "events"):
            client.call("EVENT", {"event": 1, "handle": bytes(64)})
        with refused("EINVAL", "event: 7"):
            client.call("WAITED", {"event": 7})
        p = Problem(client)
        done = client.wait_done(client.submit(p.attn, event=1))
        assert done["status"] == sage.STATUSES["EHANDLE"] and "event: 1" in done["text"]
        client.run(p.attn, event=0, staged=4096)
        assert client.stats()["staged_bytes"] == 4096
        assert client.call("CLIENTS")["clients"][-1]["mode"] == "cpu"


def test_unknown_requests():
    with served() as (daemon, _), daemon.client() as client:
        for op in (0, 12, 32, 33, 34, 255, 2**32 - 1):
            with refused("EUNSUPPORTED", "op", str(op)):
                client.call(op)
        client.call("PING", {"colour": "blue"})  # keys of other requests are ignored
        client.call("CLIENTS", {"after": 0, "sort": [1, 2, {"x": None}]})


def test_violations():
    hello = {"major": 1, "minor": 0, "pid": 1, "name": "x", "library": "y", "page": False}
    with served() as (daemon, _):
        with violation(daemon, "HELLO twice") as client:
            client.send("HELLO", hello)
        with violation(daemon, "after: must be an integer") as client:
            client.send("CLIENTS", {"after": "x"})
        with violation(daemon, "buffer: missing") as client:
            client.send("UNREGISTER", {})
        with violation(daemon, "none") as client:
            client.send("PING", {}, [client.page.fd])
        with violation(daemon, "descriptor") as client:
            client.send("REGISTER", {"buffer": 1, "kind": 1, "size": 1}, [client.page.fd] * 2)
        with violation(daemon, "descriptor") as client:
            client.send("REGISTER", {"buffer": 1, "kind": 1, "size": 1}, [client.page.fd] * 30)
        with violation(daemon, "attn.q.shape") as client:
            p = Problem(client)
            client.submit({**p.attn, "q": {**p.attn["q"], "shape": [1, 2, 3]}})
        with violation(daemon, "attn.k: missing") as client:
            p = Problem(client)
            client.submit({k: v for k, v in p.attn.items() if k != "k"})
        with violation(daemon, "lane") as client:
            p = Problem(client)
            client.send("SUBMIT", {"lane": 64, "number": 1, "attn": p.attn})
        with violation(daemon, "lane") as client:  # an unknown key does not excuse it
            p = Problem(client)
            client.send("SUBMIT", {"new": 1, "lane": "0", "number": 1, "attn": p.attn})
        with violation(daemon, "number") as client:
            p = Problem(client)
            client.submit(p.attn, number=1, ready=False)
            client.submit(p.attn, number=66)
        with violation(daemon, "no session page", page=False) as client:
            p = Problem(client)
            client.send("SUBMIT", {"lane": 0, "number": 1, "attn": p.attn})


def test_hello():
    good = {"major": 1, "minor": 0, "pid": 1, "name": "x", "library": "y", "page": False}
    with served() as (daemon, _):
        def hello(status, word, fd=None, **changes):
            with daemon.client(hello=False, page=False) as client, refused(status, word):
                client.call("HELLO", {**good, **changes}, [] if fd is None else [fd])
        hello("EVERSION", "protocol 1", major=2)
        hello("EPROTO", "priority", priority=3)
        hello("EPROTO", "page", page=True)
        hello("EPROTO", "announced", fd=0)
        hello("EPROTO", "name: control", name="a\nb")
        hello("EPROTO", "name: control", name="\x7f")
        hello("EPROTO", "name: control", name="\x9bm")
        hello("EPROTO", "name: over 63", name="x" * 64)
        hello("EPROTO", "library", library=5)
        for size, seals in ((sage.PAGE_BYTES, 0), (4096, fcntl.F_SEAL_SHRINK),
                            (sage.PAGE_BYTES, fcntl.F_SEAL_SHRINK)):
            fd = memfd(size, seals)
            hello("EPROTO", "page", fd=fd, page=True)
            os.close(fd)
        with daemon.client(minor=7, page=False) as client:  # a newer minor version is welcome
            assert client.welcome["minor"] == 1
        with daemon.client(hello=False) as client, refused("EPROTO", "HELLO"):
            client.ping()


def packets():
    """Packets that are none; all but one."""
    good = msgpack.packb([8, 1, {}])
    submit = msgpack.packb([4, 1, {"lane": 0, "number": 1, "attn": {"q": {"shape": [1, 2, 3, 4]}}}])
    yield from (submit[:i] for i in range(1, len(submit), 7))
    yield good + b"\0"
    yield b"\xdd\xff\xff\xff\xff" + b"\0" * 100  # an array of 2^32 - 1
    yield b"\xdf\x7f\xff\xff\xff" + b"\0" * 60000
    yield b"\x93\x08\x01\xde\xff\xff" + b"\0" * 60000
    yield b"\x93\x08\x01\xc6\xff\xff\xff\xff"  # a bin of 4 GiB
    yield b"\x93" * 21845 + b"\0" * 40000  # arrays in arrays
    yield b"\x81\x00" * 30000 + b"\0"
    yield b"\xc1"
    yield msgpack.packb([8, 1, msgpack.ExtType(5, b"abcd")])
    yield msgpack.packb([8, 1])
    yield msgpack.packb([8, -1, {}])
    yield msgpack.packb([8, 2**32, {}])
    yield msgpack.packb([8, 1, []])
    yield msgpack.packb({"op": 8})
    yield msgpack.packb([8, 1, {}, 0])
    yield b"\x93\x08\x01" + b"\x91" * 9 + b"\0"
    yield b"x" * 65536
    yield b"x" * 65537
    yield b"x" * 200000


def test_packets():
    with served() as (daemon, _):
        for data in packets():
            try:
                with violation(daemon) as client:
                    client.send_raw(data)
            except Exception as error:
                raise AssertionError(f"{len(data)} bytes, {data[:40]}") from error
        with daemon.client() as client:
            client.send_raw(b"")  # looks like an end of file
            try:
                client.receive()
            except Closed:
                pass


def test_random_packets():
    rng = random.Random(os.environ.get("SAGE_TEST_SEED", "5"))
    with served() as (daemon, _):
        with daemon.client() as client:
            p = Problem(client)
            seeds = [msgpack.packb([4, 1, {"lane": 0, "number": 1, "attn": p.attn}]),
                     msgpack.packb([2, 1, {"buffer": 5, "kind": 1, "size": 4096}]),
                     msgpack.packb([5, 1, {"lane": 0, "number": 1}])]
        end = time.monotonic() + 4
        while time.monotonic() < end:
            with daemon.client() as client:
                try:
                    for _ in range(20):
                        data = bytearray(rng.choice(seeds))
                        for _ in range(rng.randrange(4)):
                            data[rng.randrange(len(data))] = rng.randrange(256)
                        if data[1] == sage.OPS["DRAIN"]:
                            continue
                        fds = [client.page.fd] * rng.choice((0, 0, 0, 1, 1, 2))
                        client.send_raw(bytes(data), fds)
                    client.socket.settimeout(0.02)
                    while True:
                        client.receive()
                except (Closed, TimeoutError):
                    pass


def test_scribbled_page():
    """Random words all over the page, while jobs run: only their owner suffers."""
    rng = random.Random(11)
    with served() as (daemon, witness), daemon.client() as client:
        p, calm = Problem(client), Problem(witness)
        for round_ in range(30):
            jobs = [client.submit(p.attn, lane=rng.randrange(8), ready=False) for _ in range(8)]
            for _ in range(3000):
                client.page.words[rng.randrange(len(client.page.words))] = rng.randrange(2**32)
            for lane, number in jobs:
                client.page.acquire(lane, number)
            witness.run(calm.attn)
            client.call("PING")
        calm.check()


def test_does_not_read():
    """64 KiB of answers waiting: not heard any more; dropped after backlog_ms."""
    with served(backlog_ms=2000) as (daemon, witness):
        deaf = daemon.client()
        deaf.socket.setblocking(False)

        room = select.poll()
        room.register(deaf.socket, select.POLLOUT)

        def shout():
            for _ in range(100000):
                try:
                    deaf.send("STATS", {})
                except BlockingIOError:
                    if not room.poll(200):
                        return True
            return False

        start = time.monotonic()
        assert shout(), "the daemon goes on reading what it cannot answer"
        rss = daemon.rss()
        quiet = time.monotonic()
        deaf.socket.shutdown(socket.SHUT_WR)  # must not keep the daemon busy either
        before = cpu_time(daemon)
        while witness.stats()["clients"] > 1:
            assert time.monotonic() < quiet + 20, "never dropped"
            time.sleep(0.05)
        assert time.monotonic() - start > 1.9, "dropped too early"
        assert cpu_time(daemon) - before < 0.5 * (time.monotonic() - quiet), "busy with the deaf"
        assert daemon.rss() - rss < 32 << 20
        assert witness.stats()["clients_dropped"] == 1
        deaf.close()


def cpu_time(daemon):
    with open(f"/proc/{daemon.pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_slow_reader():
    """One that reads late gets every answer."""
    with served() as (daemon, _), daemon.client() as client:
        sent = []
        client.socket.setblocking(False)
        try:
            for _ in range(3000):
                sent.append(client.send("STATS", {}))
        except BlockingIOError:
            client.seq -= 1
        client.socket.settimeout(20)
        assert [client.receive()[1] for _ in sent] == sent


def test_credits():
    with served(client_jobs=3, client_buffers=2) as (daemon, _), daemon.client() as client:
        assert client.welcome["jobs"] == 3 and client.welcome["buffers"] == 2
        p = Problem(client)
        jobs = [client.submit(p.attn, lane=i, ready=False) for i in range(3)]
        with refused("EBUSY", "limit is 3"):
            client.run(p.attn, lane=9)
        client.page.acquire(*jobs[1])
        client.wait_done(jobs[1])
        client.run(p.attn, lane=9)
        second = Problem(client)
        with refused("EQUOTA", "limit is 2"):
            Problem(client)
        second.buffer.unregister()
        Problem(client)


def test_user_jobs():
    """One user's clients together, also who says that it is a stream's: there are none here."""
    with served(user_jobs=2) as (daemon, _), daemon.client() as one, daemon.client() as two:
        held = [one.submit(Problem(one).attn, lane=i, ready=False) for i in range(2)]
        p = Problem(two)
        for streamed in (False, True):
            with refused("EBUSY", "of this user", "limit is 2"):
                two.run(p.attn, streamed=streamed)
        one.page.acquire(*held[0])
        one.wait_done(held[0])
        two.run(p.attn)


def test_connections():
    with served(max_clients=6, user_clients=4) as (daemon, _):
        crowd = [daemon.client(page=False) for _ in range(3)]
        with refused("EQUOTA", "user_clients"):
            daemon.client(hello=False).answer(0)
        crowd.pop().close()
        sage.until(lambda: crowd[0].stats()["clients"] == 3, "a place")
        daemon.client(page=False).close()
        for client in crowd:
            client.close()
    with served(max_clients=3) as (daemon, _):
        crowd = [daemon.client(page=False) for _ in range(2)]
        with refused("EQUOTA", "max_clients"):
            daemon.client(hello=False).answer(0)
        for client in crowd:
            client.close()


def test_user_bytes():
    with served(client_bytes="1M", user_bytes="1536K") as (daemon, _), \
            daemon.client() as one, daemon.client() as two:
        sage.Buffer(one, 1 << 20)
        with refused("EQUOTA", "one client"):
            sage.Buffer(one, 4096)
        with refused("EQUOTA", "one user"):
            sage.Buffer(two, 1 << 20)
        sage.Buffer(two, 64 << 10)


def lingering(listener, peers):
    """A socket whose close() takes a minute, or until its end in `peers` is closed."""
    s = socket.create_connection(listener.getsockname())
    peers.append(listener.accept()[0])
    s.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            s.send(bytes(4096))
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
    return s


@contextlib.contextmanager
def nobody():
    """As another user, where this one can be: it says whether."""
    other = os.geteuid() == 0
    if other:
        os.seteuid(65534)
    try:
        yield other
    finally:
        if other:
            os.seteuid(0)


def state(daemon):
    with open(f"/proc/{daemon.pid}/stat") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0]


def threads(daemon):
    return len(os.listdir(f"/proc/{daemon.pid}/task"))


def test_slow_close():
    """Descriptors whose close() takes long cost no thread each, nor all descriptors, nor the loop."""
    peers = []
    with Daemon(argv0=("prlimit", "--nofile=1024:1024"), group="") as daemon, \
            socket.socket() as listener, daemon.client() as witness, open(os.devnull) as null:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        os.chmod(daemon.directory, 0o755)
        os.chmod(daemon.path, 0o666)
        Problem(witness)  # starts the threads that there are always
        fds, before = daemon.fds(), threads(daemon)
        with nobody() as other:
            attacker = daemon.client(page=False)

        def refuse(client, packets, more=0):
            """Packets with a slow descriptor, and more. The daemon stops, so that its close() of
            them is the last; that also interrupts those that it is at."""
            daemon.process.send_signal(signal.SIGSTOP)
            sage.until(lambda: state(daemon) == "T", "the daemon to stop")
            sent = []
            for _ in range(packets):
                with lingering(listener, peers) as slow:
                    sent.append(client.send("REGISTER", {"buffer": 1, "kind": 9, "size": 4096},
                                            [null.fileno()] * more + [slow.fileno()]))
            daemon.process.send_signal(signal.SIGCONT)
            for seq in sent:
                with refused("EUNSUPPORTED", "kind"):
                    client.answer(seq)

        def prompt():
            start = time.monotonic()
            witness.ping()
            assert time.monotonic() - start < 1, "the loop waits for a close()"

        def unheard(client, packets):
            """It sends these behind something bad, while the daemon is stopped."""
            daemon.process.send_signal(signal.SIGSTOP)
            sage.until(lambda: state(daemon) == "T", "the daemon to stop")
            with lingering(listener, peers) as slow:
                client.send_raw(b"bad")
                for data, fds in packets:
                    client.send_raw(data, fds and [null.fileno()] * (fds - 1) + [slow.fileno()])
            daemon.process.send_signal(signal.SIGCONT)
            client.close()
            prompt()

        unheard(daemon.client(page=False), [(b"more than there is room for", 200)])
        sage.until(lambda: threads(daemon) > before, "a close() that takes long")
        prompt()
        for peer in peers:
            peer.close()
        peers.clear()
        sage.until(lambda: threads(daemon) <= before, "these to be closed")
        idle = daemon.fds()
        for _ in range(3):  # what it has not received does not take long
            unheard(daemon.client(page=False), [(b"x", 0)] * 8 + [(b"", 1)])
        sage.until(lambda: daemon.fds() <= idle and threads(daemon) <= before, "their end")
        refuse(attacker, 20)
        prompt()
        assert threads(daemon) <= before + 4, f"{before} threads, then {threads(daemon)}"
        assert daemon.fds() > fds + 10, "close() does not take long: this tests nothing"
        refuse(attacker, 22, 31)
        assert 600 < daemon.fds() < 800, f"{daemon.fds()} descriptors of 1,024"
        assert threads(daemon) <= before + 4
        with refused("EQUOTA", "descriptors"):
            attacker.ping()
        attacker.close()
        with nobody(), refused("EQUOTA", "descriptors"):
            daemon.client(hello=False).answer(0)
        held = daemon.fds()
        with nobody():
            for _ in range(400):  # its sockets do not wait behind what it sent
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s, \
                        contextlib.suppress(ConnectionError):  # it may have been rejected
                    s.connect(daemon.path)
                    s.send(b"x")
        prompt()
        assert daemon.fds() < held + 100, f"{held} descriptors, then {daemon.fds()}"
        if other:  # whom the attacker's limits do not touch
            prompt()
            Problem(witness)
            refuse(witness, 1)
            daemon.client().close()
            greedy = daemon.client(page=False)  # two may not take what is left together
            refuse(greedy, 6, 31)
            with refused("EQUOTA", "descriptors"):
                greedy.ping()
            greedy.close()
        for peer in peers:
            peer.close()
        witness.close()
        sage.until(lambda: daemon.fds() < fds and threads(daemon) <= before, "all to be closed")
        with nobody():
            daemon.client(page=False).close()


def test_failed_piece():
    """A job that fails while it runs ends with its status; the next one is served."""
    with Daemon(backend="fault", fault="fail=2") as daemon, daemon.client() as client:
        p = Problem(client)
        client.run(p.attn)
        with refused("EINTERNAL"):
            client.run(p.attn)
        client.run(p.attn)
        stats = client.stats()
        assert stats["done"] == 2 and stats["failed"] == 1


if __name__ == "__main__":
    sage.run(globals())
