"""Other attention kernels, each behind the same three lines: what bench_attn compares with.

A peer is a class with a `name`, `part` ("full": all that a call costs its user; "kernel": attention
alone on inputs that are quantised already) and call(q, k, v, causal), which returns a function that
does it once and returns o, or raises Unsupported. Its constructor imports what it needs; an
ImportError is the reason why it is skipped. q [B, Hq, N, D], k and v [B, Hkv, N, D], fp16 or bf16,
all read only: several contenders share them. What Python finds is compared: a folder on PYTHONPATH
with the package, and for SageAttention its .dist-info, which tells the version, will do.
"""
import importlib.metadata
import importlib.util
import sys

import torch
import torch.nn.functional as F


class Unsupported(Exception):
    """Not this shape; the text says why."""


class Sdpa:
    """PyTorch's scaled_dot_product_attention, held to one backend."""
    part, backend = "full", None

    def __init__(self):
        from torch.nn.attention import SDPBackend, sdpa_kernel
        self.hold = lambda: sdpa_kernel(getattr(SDPBackend, self.backend))

    def call(self, q, k, v, causal):
        share = q.shape[1] // k.shape[1]
        ways = [(k, v, {})]
        if share > 1:  # where a backend knows no GQA its user repeats K and V: not timed
            ways = [(k, v, {"enable_gqa": True}),
                    (k.repeat_interleave(share, 1), v.repeat_interleave(share, 1), {})]
        for keys, values, options in ways:
            def once(keys=keys, values=values, options=options):
                with self.hold():
                    return F.scaled_dot_product_attention(q, keys, values, is_causal=causal,
                                                          **options)
            try:
                once()
                return once
            except RuntimeError as error:
                why = str(error).splitlines()[0]
        raise Unsupported(why)


class Cudnn(Sdpa):
    name, backend = "cudnn", "CUDNN_ATTENTION"


class FlashAttention2(Sdpa):
    name, backend = "fa2", "FLASH_ATTENTION"


class FlashAttention3:
    name, part = "fa3_fp16", "full"

    def __init__(self):
        from flash_attn_interface import flash_attn_func
        self.function = flash_attn_func

    def call(self, q, k, v, causal):
        q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))

        def once():
            o = self.function(q, k, v, causal=causal)
            return (o[0] if isinstance(o, tuple) else o).transpose(1, 2)
        return once


class FlashAttention3Fp8(FlashAttention3):
    name, part = "fa3_fp8", "kernel"

    def call(self, q, k, v, causal):
        return super().call(*(t.to(torch.float8_e4m3fn) for t in (q, k, v)), causal)


def sageattention(major):
    """The package `sageattention` of that major version. 1 and 2 share the name: each is imported
    under one of its own, so that both can be contenders in one process."""
    name = f"sageattention{major}"
    if name in sys.modules:
        return sys.modules[name]
    for found in importlib.metadata.distributions(name="sageattention"):
        place = found.locate_file("sageattention")
        if found.version.split(".")[0] != str(major) or not (place / "__init__.py").exists():
            continue
        spec = importlib.util.spec_from_file_location(name, place / "__init__.py",
                                                      submodule_search_locations=[str(place)])
        package = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(package)
        except BaseException:
            del sys.modules[name]
            raise
        return package
    raise ImportError(f"no sageattention {major}.x")


class SageAttention1:
    name, part = "sa1_triton", "full"

    def __init__(self):
        self.core = sageattention(1).core

    def call(self, q, k, v, causal):
        k = k.clone()  # it subtracts K's mean in place
        return lambda: self.core.sageattn(q, k, v, tensor_layout="HND", is_causal=causal)


class SageAttention1Kernel(SageAttention1):
    part = "kernel"

    def call(self, q, k, v, causal):
        quantised = self.core.per_block_int8(q, k - k.mean(2, keepdim=True), tensor_layout="HND")
        q8, q_scale, k8, k_scale = quantised
        v = v.to(torch.float16)
        attn = self.core.attn_true if causal else self.core.attn_false
        return lambda: attn(q8, k8, v, q_scale, k_scale, tensor_layout="HND",
                            output_dtype=q.dtype)


class SageAttention2:
    name, part = "sa2_sm90", "full"

    def __init__(self):
        self.core = sageattention(2).core
        # The package itself does not say why its kernel could not be loaded.
        self.sm90 = importlib.import_module("sageattention2.sm90_compile")

    def call(self, q, k, v, causal):
        return lambda: self.core.sageattn_qk_int8_pv_fp8_cuda_sm90(q, k, v, tensor_layout="HND",
                                                                   is_causal=causal)


class SageAttention2Kernel(SageAttention2):
    part = "kernel"

    def call(self, q, k, v, causal):
        """As in sageattn_qk_int8_pv_fp8_cuda_sm90 with its defaults: a scale for each thread's
        share of 64 queries or 128 keys, and one for each channel of V."""
        q8, q_scale, k8, k_scale = self.core.per_thread_int8_triton(
            q, k, k.mean(2, keepdim=True), tensor_layout="HND", BLKQ=64, WARPQ=16, BLKK=128,
            WARPK=128)
        v = F.pad(v, (0, 0, 0, -v.shape[2] % 128))
        v8, v_scale, _ = self.core.per_channel_fp8(v, tensor_layout="HND", smooth_v=False)
        o = torch.empty_like(q)
        hnd, per_thread, no_lse = 1, 3, 0

        def once():
            self.sm90.qk_int8_sv_f8_accum_f32_fuse_v_scale_attn_inst_buf(
                q8, k8, v8, o, q_scale, k_scale, v_scale, hnd, int(causal), per_thread,
                q.shape[3] ** -0.5, no_lse)
            return o
        return once


PEERS = [Cudnn, FlashAttention2, FlashAttention3, FlashAttention3Fp8, SageAttention1,
         SageAttention1Kernel, SageAttention2, SageAttention2Kernel]


def available():
    """Those that can be imported, and a list of (name, reason) of the others."""
    there, missing = [], {}
    for peer in PEERS:
        try:
            there.append(peer())
        except ImportError as error:
            missing[peer.name] = str(error)
    return there, list(missing.items())
