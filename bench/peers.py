"""Other attention kernels, each behind the same three lines: what bench_attn compares with.

A peer is a class with a `name`, `part` ("full": all that a call costs its user; "kernel": attention
alone on inputs that are quantised already) and call(q, k, v, causal), which returns a function that
does it once and returns o, or raises Unsupported. Its constructor imports what it needs; an
ImportError is the reason why it is skipped. q [B, Hq, N, D], k and v [B, Hkv, N, D], fp16.
"""
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


class SageAttention1:
    name, part = "sa1_triton", "full"

    def __init__(self):
        from sageattention import sageattn_qk_int8_pv_fp16_triton
        self.function = sageattn_qk_int8_pv_fp16_triton

    def call(self, q, k, v, causal):
        return lambda: self.function(q, k, v, tensor_layout="HND", is_causal=causal)


class SageAttention2(SageAttention1):
    name = "sa2_sm90"

    def __init__(self):
        from sageattention import sageattn_qk_int8_pv_fp8_cuda_sm90
        self.function = sageattn_qk_int8_pv_fp8_cuda_sm90


PEERS = [Cudnn, FlashAttention2, FlashAttention3, FlashAttention3Fp8, SageAttention1,
         SageAttention2]


def available():
    """Those that can be imported, and a list of (name, reason) of the others."""
    there, missing = [], []
    for peer in PEERS:
        try:
            there.append(peer())
        except ImportError as error:
            missing.append((peer.name, str(error)))
    return there, missing
