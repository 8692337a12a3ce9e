"""Hooks into other packages; none of them is imported before its function is called."""
from __future__ import annotations

import sys
from typing import Any, Callable, Optional


def transformers(name: str = "sageattnd", *, strict: bool = False, rotate_qk: bool = True,
                 variant: str = "auto", mode: Optional[str] = None) -> None:
    """Register the attention under `name`:

        sageattnd.integrations.transformers()
        model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="sageattnd")

    It is scaled_dot_product_attention(), with its fallbacks and arguments, but q and k are rotated:
    in language models channels stick out. It takes the masks that transformers makes for "sdpa".
    Of an encoder's batch whose sentences are filled up at their ends it takes the lengths instead
    (transformers 5.0 and newer). Models whose attention is more than that (softcap, s_aux,
    position_bias) get a ValueError that names it. Wants a transformers that has AttentionInterface.
    """
    from transformers import AttentionInterface

    from ._sdpa import scaled_dot_product_attention

    def forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0,
                is_causal=None, **more):
        """query [B, Hq, Nq, D], key and value [B, Hkv, Nk, D] -> [B, Nq, Hq, D], no weights."""
        for field in ("softcap", "s_aux", "position_bias"):
            if more.get(field) is not None:
                raise ValueError(f"{field}: this attention does not have it: load the model with "
                                 "another attn_implementation")
        lengths = _noted_lengths(attention_mask, key)
        if attention_mask is not None:
            attention_mask = attention_mask[..., :key.shape[-2]]
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        is_causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
        o = scaled_dot_product_attention(query, key, value, attention_mask, dropout, is_causal,
                                         scaling, query.shape[1] != key.shape[1], strict=strict,
                                         rotate_qk=rotate_qk, variant=variant, mode=mode,
                                         key_lengths=lengths)
        return o.transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, forward)
    try:
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    except ImportError:  # before 4.53 models make masks by themselves
        return
    AttentionMaskInterface.register(name, _noting_lengths(sdpa_mask))


def _noting_lengths(make: Callable) -> Callable:
    """transformers' sdpa_mask(), with lengths noted on masks that say no more: for the layers, so
    that the GPU is waited for once. transformers itself has just waited to see whether anything is
    masked at all."""
    try:
        from transformers.masking_utils import bidirectional_mask_function
    except ImportError:  # before 5.0
        return make
    import torch

    from ._native import MAX_SEQS
    from ._torch import repeats

    def mask(*args: Any, **keys: Any) -> Any:
        tokens = keys.get("attention_mask")  # bool [B, Nk]: False where a sentence is filled up
        if type(tokens) is not torch.Tensor or repeats(tokens) \
                or keys.get("mask_function") is not bidirectional_mask_function:
            return make(*args, **keys)  # numbers are not to be looked at, or there are none
        with torch.inference_mode(False):  # so that the mask counts changes
            made = make(*args, **keys)
            if made is not None and len(made) <= MAX_SEQS // 2 \
                    and tokens.shape == (len(made), made.shape[-1]):
                counts = tokens.sum(-1, keepdim=True)
                places = torch.arange(made.shape[-1], device=counts.device)
                plain = (tokens == (places < counts)).all()
                told = torch.cat((counts.flatten(), plain[None])).cpu()
                if told[-1]:
                    made.sageattnd_lengths = made._version, told[:-1]
        return made
    return mask


def _noted_lengths(mask: Any, key: Any) -> Any:
    """What was noted, on this very tensor, for these keys, unless it was written to since then."""
    from ._torch import repeats

    if mask is None or repeats(mask) or not hasattr(mask, "sageattnd_lengths"):
        return None  # or they would be those of every mask that comes after it
    version, lengths = mask.sageattnd_lengths
    meant = mask._version == version and mask.shape[0] == key.shape[0] \
        and mask.shape[-1] == key.shape[-2]
    return lengths if meant else None


def diffusers() -> None:
    """Let diffusers find these functions where it looks for sageattention's:

        sageattnd.integrations.diffusers()       # before diffusers is imported
        from diffusers import DiffusionPipeline
        pipeline.transformer.set_attention_backend("sage")

    Its list of backends is closed, so the name is upstream's: "sage", "sage_varlen" and those of
    single kernels. Wants diffusers 0.35 or newer; for older ones, or for models that attend by
    F.scaled_dot_product_attention, there is sageattnd.sdpa(). RuntimeError where diffusers has
    been imported, for it has looked by then.
    """
    from . import shim

    if "diffusers" in sys.modules:
        raise RuntimeError("diffusers has been imported, and has looked for sageattention: call "
                           "sageattnd.integrations.diffusers() before that")
    shim.install()
    from diffusers.models import attention_dispatch

    if not attention_dispatch._CAN_USE_SAGE_ATTN:
        raise RuntimeError("this diffusers does not take sageattention "
                           f"{shim.VERSION} for its backend \"sage\"")
