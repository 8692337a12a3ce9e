"""Attention as the models here call it, by PyTorch or by sageattnd: the one place that knows both.

attend(q, k, v, causal=False, window=0, mask=None, key_lengths=None, scale=None) -> o like q
    q [B, Hq, N, D], k and v [B, Hkv, N, D], Hq a multiple of Hkv; any strides.
    window: with causal, row i sees keys i - window + 1 to i; 0: all up to i.
    mask: bool [B, 1, 1, N], True where a key is visible. key_lengths: the same as a list, for who
    can make use of it: how many keys each batch sees. scale: 1/sqrt(D) if None.
"""
import contextlib
import functools
import sys

import torch
import torch.nn.functional as F

SDPA = {"sdpa": None, "cudnn": "CUDNN_ATTENTION", "fa2": "FLASH_ATTENTION", "math": "MATH",
        "efficient": "EFFICIENT_ATTENTION"}
VARIANTS = ("int8_fp16", "int8_fp8")
ROTATED = "_rotated"  # behind a variant's name
# PyTorch before has neither GQA nor, on the CPU, products of binary16.
IS_NEW = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 5)


@functools.cache
def band(n, window, device):
    """bool [n, n]: row i sees keys i - window + 1 to i."""
    return torch.ones(n, n, dtype=torch.bool, device=device).tril().triu(1 - window)


def hold(backend):
    """PyTorch's attention held to one of its backends: from 2.3 on."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    return sdpa_kernel(getattr(SDPBackend, backend))


def sdpa(backend=None):
    """PyTorch's own, by one of its backends, or by the one that it picks."""
    def attend(q, k, v, causal=False, window=0, mask=None, key_lengths=None, scale=None):
        if window and window < q.shape[2]:
            causal, mask = False, band(q.shape[2], window, q.device)
        options, share, dtype = {}, q.shape[1] // k.shape[1], q.dtype
        if dtype == torch.float16 and not IS_NEW and not q.is_cuda:
            q, k, v = q.float(), k.float(), v.float()
        if share > 1 and IS_NEW:
            options["enable_gqa"] = True
        elif share > 1:
            k, v = (x.repeat_interleave(share, 1) for x in (k, v))
        with hold(backend) if backend else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale,
                                                  **options).to(dtype)
    return attend


def attention(name, mode="inproc"):
    """name: of SDPA or of VARIANTS, the latter also with ROTATED behind; mode: for VARIANTS,
    "inproc" or "daemon" ($SAGEATTND_SOCKET).

    What our kernels cannot do is an error here, never PyTorch's work. A job that a daemon failed
    to do after the call is reported by settle().
    """
    if name in SDPA:
        return sdpa(SDPA[name])
    variant = name.removesuffix(ROTATED)
    if variant not in VARIANTS:
        raise ValueError(f"attention {name}: not among {', '.join([*SDPA, *VARIANTS])}")
    from sageattnd import sageattn

    def attend(q, k, v, causal=False, window=0, mask=None, key_lengths=None, scale=None):
        return sageattn(q, k, v, is_causal=causal, sm_scale=scale, variant=variant,
                        rotate_qk=name.endswith(ROTATED),
                        attn_mask=mask if key_lengths is None else None, key_lengths=key_lengths,
                        window=(window - 1, 0) if window else None, mode=mode)
    return attend


def settle():
    """Wait for what daemons compute for this process, and raise for what they could not."""
    if "sageattnd" in sys.modules:
        sys.modules["sageattnd"].check_errors()


def masked(attend):
    """With the mask, though the lengths are known."""
    def by_mask(q, k, v, key_lengths=None, **keys):
        return attend(q, k, v, **keys)
    return by_mask


def in_dtype(attend, dtype):
    """For a model that computes in float32: attention's inputs and output in 16 bits."""
    def rounded(q, k, v, **keys):
        return attend(q.to(dtype), k.to(dtype), v.to(dtype), **keys).to(q.dtype)
    return rounded


class Probe:
    """Gives the model what `reference` says, and notes how close `other` comes on the same inputs.

    .cosines: one for each call, over all of o.
    """

    def __init__(self, reference, other):
        self.reference, self.other, self.cosines = reference, other, []

    def __call__(self, *args, **keys):
        o = self.reference(*args, **keys)
        pair = (x.double().flatten() for x in (o, self.other(*args, **keys)))
        self.cosines.append(F.cosine_similarity(*pair, dim=0).item())
        return o
