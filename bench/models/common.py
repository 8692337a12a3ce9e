"""What the programs here share: where things are, arguments, private daemons, tables.

To be imported first: where PyTorch or another module is missing, the program ends here, with 77.
"""
import argparse
import contextlib
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.dont_write_bytecode = True
sys.path[:0] = [HERE, os.path.join(ROOT, "tests")]
sys.path.append(os.path.join(ROOT, "client", "python"))  # one that is installed comes first

if "SAGE_BUILDDIR" not in os.environ:
    os.environ["SAGE_BUILDDIR"] = next(
        (place for place in (".", os.path.join(ROOT, "build"), ROOT)
         if os.path.exists(os.path.join(place, "sageattnd"))), ".")
os.environ.setdefault("SAGEATTND_LIBRARY_PATH", os.path.join(os.environ["SAGE_BUILDDIR"], ".libs"))


def skip(why):
    print(f"{os.path.basename(sys.argv[0])}: skipped: {why}")
    sys.exit(77)


try:
    import torch

    import gpu_daemon
    import sage
except ImportError as missing:
    skip(missing)


def need(device):
    if device == "cuda" and not torch.cuda.is_available():
        skip("no GPU that PyTorch can use")


def parser_of(doc):
    return argparse.ArgumentParser(description=doc,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def several(parser, option, text, allowed):
    """What a list on the command line names."""
    names = text.split(",")
    for name in names:
        if name not in allowed:
            parser.error(f"{option}: no {name!r} among {', '.join(allowed)}")
    return names


@contextlib.contextmanager
def environment(**more):
    """os.environ with more, for this process and those that it starts."""
    before = dict(os.environ)
    os.environ.update(more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def serving(device, **options):
    """A private daemon, which $SAGEATTND_SOCKET names in here; tests/sage.py's Daemon."""
    start = gpu_daemon.daemon if device == "cuda" else sage.Daemon
    if device == "cpu":
        options = {"threads": os.cpu_count(), "slot_bytes": "64M", **options}
    with start(**options) as daemon, environment(SAGEATTND_SOCKET=daemon.path):
        yield daemon
        if "sageattnd" in sys.modules:
            sys.modules["sageattnd"].close()


WIDTHS = {"shape": 12, "attention": 17, "contender": 16}


class Table:
    """Rows on standard output as they come, aligned, and as tab-separated values in a file."""

    def __init__(self, columns, path=None):
        self.columns = columns.split()
        self.file = open(path, "w") if path else None
        self.bad = 0
        self._put(self.columns)

    def _put(self, cells):
        widths = (max(WIDTHS.get(name, 9), len(name)) for name in self.columns)
        print(" ".join(str(cell).ljust(width) for cell, width in zip(cells, widths)), flush=True)
        if self.file:
            print(*cells, sep="\t", file=self.file, flush=True)

    def row(self, *cells, good=True):
        """good: None where there is no limit."""
        assert len(cells) == len(self.columns) - 1 and self.columns[-1] == "judged"
        self.bad += good is False
        self._put([*cells, {True: "ok", False: "MISSED", None: "-"}[good]])

    def status(self):
        """Exit status: 1 where a limit was missed."""
        if self.file:
            self.file.close()
        return 1 if self.bad else 0
