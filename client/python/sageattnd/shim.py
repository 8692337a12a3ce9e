"""A stand-in for the package `sageattention`, for programs that import it by name.

    import sageattnd.shim
    sageattnd.shim.install()       # before the program's own imports
    from sageattention import sageattn

Nothing is importable as `sageattention` before install() was called.
"""
from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types

from . import _api

# The release whose calls these are: programs compare it.
VERSION = "2.2.0"
NAMES = ("sageattn", "sageattn_varlen", "sageattn_qk_int8_pv_fp16_triton",
         "sageattn_qk_int8_pv_fp16_cuda", "sageattn_qk_int8_pv_fp8_cuda",
         "sageattn_qk_int8_pv_fp8_cuda_sm90")
MODULES = ("core", "fa3_wrapper")  # of the package; examples import the latter, whatever they call


class _Distribution(importlib.metadata.Distribution):
    """What importlib.metadata.version("sageattention") reads."""

    def read_text(self, filename):
        if filename == "METADATA":
            return f"Metadata-Version: 2.1\nName: sageattention\nVersion: {VERSION}\n"
        return "sageattention\n" if filename == "top_level.txt" else None

    def locate_file(self, path):
        return path


class _Finder(importlib.metadata.DistributionFinder):
    def find_spec(self, name, path=None, target=None):
        return None  # the modules are in sys.modules

    def find_distributions(self, context=importlib.metadata.DistributionFinder.Context()):
        if context.name in (None, "sageattention"):
            yield _Distribution()


_finder = _Finder()


def fa3(*_: object, **__: object) -> None:
    """What upstream's fa3_wrapper hands to FlashAttention-3: refused, it is another package's."""
    raise NotImplementedError("sageattention.fa3_wrapper: FlashAttention-3 is not part of "
                              "sageattnd: call flash_attn_interface itself")


def _module(name: str) -> types.ModuleType:
    module = types.ModuleType(name, __doc__)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin=__file__,
                                                     is_package=name == "sageattention")
    module.__version__ = VERSION
    module.__dict__.update({n: getattr(_api, n) for n in NAMES})
    return module


def install(replace: bool = False) -> types.ModuleType:
    """Let `import sageattention` (and its `core` and `fa3_wrapper`) find these functions, and
    return the module. Where a real sageattention is installed this raises RuntimeError unless
    `replace`."""
    there = sys.modules.get("sageattention")
    if there is not None and there.__spec__ and there.__spec__.origin == __file__:
        return there
    if not replace and (there is not None or importlib.util.find_spec("sageattention")):
        raise RuntimeError("sageattention is installed: install(replace=True) hides it")
    package = _module("sageattention")
    package.core = _module("sageattention.core")
    package.fa3_wrapper = _module("sageattention.fa3_wrapper")
    package.fa3_wrapper.fa3 = package.fa3_wrapper.fa3_fp8 = fa3
    package.__path__ = []
    sys.modules["sageattention"] = package
    sys.modules.update({f"sageattention.{name}": getattr(package, name) for name in MODULES})
    sys.meta_path.insert(0, _finder)
    return package


def uninstall() -> None:
    """Undo install()."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
        for name in ("sageattention", *(f"sageattention.{module}" for module in MODULES)):
            sys.modules.pop(name, None)
