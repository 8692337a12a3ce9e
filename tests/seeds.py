"""Seeds for the fuzz targets, from tests/golden: seeds.py fuzz_packet|fuzz_session DIRECTORY."""
import os
import sys

GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden")


def golden(name):
    with open(os.path.join(GOLDEN, name), encoding="utf-8") as text:
        return bytes.fromhex(" ".join(line.split("#")[0] for line in text))


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


if __name__ == "__main__":
    main(*sys.argv[1:])
