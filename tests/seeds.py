"""Seeds for the fuzz targets, from tests/golden: seeds.py fuzz_packet|fuzz_session DIRECTORY."""
import os
import sys

GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden")


def golden(name):
    with open(os.path.join(GOLDEN, name), encoding="utf-8") as text:
        return bytes.fromhex(" ".join(line.split("#")[0] for line in text))


def jobs():
    """Jobs that run, in the commands of fuzz_session.c: a zero stands for what is usual."""
    hello, turns = b"\5" + bytes(3), b"\3\xff"  # whatever comes first connects
    memory = bytes(6)

    def vmm(size, more=0):
        chunk = b"\xf0" + size.to_bytes(8, "big")
        return b"\0\310\3\0\0\310\0\0" + chunk + bytes([more, 0, 0])

    def submit(options=0, event=b"\0"):
        return b"\x0a" + bytes([4, 64 | options, 0, 0, 0]) + event + bytes(1 + 4 * 8 + 3)

    def event(number, what):
        return b"\6" + bytes(4) + bytes([number, number]) + bytes([what]) + b"\0"

    yield hello + memory + turns + submit() + 2 * turns + submit(8) + submit(128) + 4 * turns
    yield hello + vmm(65536) + turns + submit() + 3 * turns
    yield hello + vmm(4096, 1) + b"\5" + vmm(61440) + turns + submit() + 3 * turns
    yield (hello + memory + event(1, 4) + turns + 2 * submit(event=b"\310\1") + 3 * turns +
           event(2, 5) + event(3, 5) + turns)


def main(target, directory):
    os.makedirs(directory, exist_ok=True)
    for name in sorted(os.listdir(GOLDEN)):
        data = golden(name)
        if target == "fuzz_session":  # the command "raw packet", its length, and a turn of the loop
            data = b"\0\0" + len(data).to_bytes(2, "little") + data + b"\3"
        with open(os.path.join(directory, name.removesuffix(".hex")), "wb") as seed:
            seed.write(data)
    if target == "fuzz_session":  # each of the commands, with zeros and with ones
        for i in range(10):
            for fill in (b"\0", b"\1", b"\x11", b"\xff"):
                with open(os.path.join(directory, f"command{i}{fill.hex()}"), "wb") as seed:
                    seed.write(b"\5\1" + bytes([i]) + fill * 24 + b"\3\2\0\0\3")
        for i, data in enumerate(jobs()):
            with open(os.path.join(directory, f"job{i}"), "wb") as seed:
                seed.write(data)


if __name__ == "__main__":
    main(*sys.argv[1:])
