"""docs/protocol.md, the headers, tests/golden and tests/sage.py say the same."""
import os
import re

import msgpack

import sage
import seeds

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def read(*path):
    with open(os.path.join(ROOT, *path), encoding="utf-8") as text:
        return text.read()


DOC, PROTO = read("docs", "protocol.md"), read("proto", "proto.h")
HEADER = read("kernels", "sageattn.h")


def rows():
    """The cells of every row of every table."""
    for line in DOC.splitlines():
        if line.startswith("| "):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def block(text, name):
    """The lines of a list macro."""
    start = text.index(f"#define {name}(X)")
    return text[start:text.index("\n\n", start)]


def test_ops():
    ops = re.findall(r"X\((\w+), (\d+)\)", block(PROTO, "PROTO_OPS"))
    listed = {name: int(n) for name, n in ops}
    documented = {row[0]: int(row[1]) for row in rows() if row[0].isupper() and row[1].isdigit()}
    assert documented == listed == sage.OPS


def test_statuses():
    listed = {name: (int(n), retry == "1") for name, n, retry in
              re.findall(r"X\((SAGE_E\w+), (\d+), (\d)", block(HEADER, "SAGE_ERRORS"))}
    documented = {}
    for row in rows():
        for i in (0, 4):
            if len(row) > i + 2 and row[i + 1].startswith("SAGE_E"):
                documented[row[i + 1]] = (int(row[i]), row[i + 2] == "yes")
    assert documented == listed
    assert {"SAGE_" + name: n for name, n in sage.STATUSES.items()} == \
        {name: n for name, (n, _) in listed.items()}


def documented_keys():
    """Every word that stands in the first cell of a row, or in backquotes."""
    words = set(re.findall(r"`(\w+)`", DOC))
    for row in rows():
        words.update(re.findall(r"\w+", row[0]))
    return words


def keys(value):
    if isinstance(value, dict):
        for key, inside in value.items():
            yield key
            yield from keys(inside)
    elif isinstance(value, list):
        for inside in value:
            yield from keys(inside)


def test_golden():
    """The golden packets are readable without our code, and use no key that is not documented."""
    stats = set(re.findall(r"X\(\w+, (\w+),", block(PROTO, "PROTO_STATS")))
    known, seen = documented_keys() | stats, set()
    for name in sorted(os.listdir(seeds.GOLDEN)):
        data = seeds.golden(name)
        op, seq, body = msgpack.unpackb(data)
        assert op in sage.OP_NAMES and 0 <= seq < 2**32 and isinstance(body, dict), name
        unknown = set(keys(body)) - known
        assert not unknown, f"{name}: {unknown} not documented"
        seen.add(op)
    assert seen == set(sage.OP_NAMES)


def test_keys():
    """Every key of the codec's tables is documented."""
    fields = set(re.findall(r"(?:REQ|OPT|SUB|ARRAY)\(\w+, (\w+),", read("proto", "proto.c")))
    missing = fields - documented_keys() - {"member", "key"}
    assert len(fields) > 50 and not missing, missing


def test_numbers():
    for text, number in (("at most 65,536 bytes", sage.PACKET_MAX),
                         ("69,632 bytes", sage.PAGE_BYTES)):
        assert text in DOC and int(re.sub(r"\D", "", text)) == number
    for name, value in (("PROTO_PACKET_MAX", 65536), ("PROTO_DEPTH_MAX", 6), ("PROTO_FDS_MAX", 32),
                        ("PROTO_HANDLE_MAX", 64), ("CHUNKS_MAX", 8192), ("EVENTS_MAX", 256)):
        assert re.search(rf"{name} = {value}\b", PROTO), name
    assert re.search(r"nesting at most 6 deep", DOC) and "at most 32 descriptors" in DOC
    for text in ("at most 8,192 chunks", "at most 256 of them", "Protocol version **1.1**"):
        assert text in DOC, text


if __name__ == "__main__":
    sage.run(globals())
