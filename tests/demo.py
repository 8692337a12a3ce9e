"""The main job, as an application would do it: a private sageattnd, four client processes at once,
each running other layers of real language models and checking every row against double precision;
then the daemon's own figures; then a clean shutdown. On the GPU where there is one, else on the
CPU. Exit status 1 when anything is worse than its bound."""

import os
import subprocess
import sys
import tempfile
import time

BUILD = os.environ["SAGE_BUILDDIR"]
DATA = os.path.join(os.environ["SAGE_SRCDIR"], "tests", "data")

CLIENTS = [
    ["smollm2-l00", "minilm-l00"],
    ["smollm2-l02"],
    ["smollm2-l18"],
    ["smollm2-l29", "minilm-l05"],
]

HEAD = (f"{'layer':12} {'heads':5} {'n':>5} {'dim':>4}  {'mask':6} {'variant':9} {'cosine':>9} "
        f"{'relL1':>8} {'bound':>6} {'ms/job':>8}")


def program(name):
    return os.path.join(BUILD, name)


def start_daemon(directory):
    """Start a daemon of our own and wait until it answers."""
    socket = os.path.join(directory, "sageattnd.sock")
    daemon = subprocess.Popen([program("sageattnd"), f"--socket={socket}", "--backend=auto",
                               "--log-level=warning"])
    for _ in range(600):  # a GPU takes a while to warm up
        if daemon.poll() is not None:
            sys.exit(f"demo: sageattnd ended with status {daemon.returncode}")
        health = subprocess.run([program("sagectl"), "-s", socket, "health"], capture_output=True)
        if health.returncode == 0:
            return daemon, socket
        time.sleep(0.1)
    sys.exit("demo: sageattnd does not answer")


def backend(socket):
    """What the daemon says of itself: the last line is its own."""
    version = subprocess.run([program("sagectl"), "-s", socket, "version"], capture_output=True,
                             text=True, check=True)
    return version.stdout.splitlines()[-1]


def read_table(client):
    """Its rows, until it waits for its standard input to end or exits."""
    rows = []
    expected = 2 * (len(client.args) - 3)
    while len(rows) < expected:
        line = client.stdout.readline()
        if not line:
            break
        rows.append(line.rstrip())
    return rows


def main():
    with tempfile.TemporaryDirectory(prefix="sageattnd-demo-") as directory:
        daemon, socket = start_daemon(directory)
        print(f"{backend(socket)}\n{len(CLIENTS)} client processes, each with layers of its own:\n")
        clients = [subprocess.Popen([program("tests/demo_client"), socket, DATA, *layers],
                                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                   for layers in CLIENTS]
        print(HEAD)
        for client in clients:
            for row in read_table(client):
                print(row)
        print("\nsagectl stats:\n", flush=True)
        stats = subprocess.run([program("sagectl"), "-s", socket, "stats"]).returncode
        for client in clients:
            client.stdin.close()
        failed = [c.args[3:] for c in clients if c.wait(timeout=60) != 0]
        daemon.terminate()
        status = daemon.wait(timeout=60)
        print(f"\nsageattnd stopped with status {status}")
    if failed:
        sys.exit(f"demo: FAILED: clients {failed}")
    if stats or status:
        sys.exit("demo: FAILED")
    print("demo: every result is within its bound")


if __name__ == "__main__":
    main()
