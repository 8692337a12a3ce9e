"""Gemma 3 270M in plain PyTorch, from the weights of its GGUF file; attention is an argument.

Head dimension 256, four query heads and one kv head; five of six layers see 512 tokens back.
"""
import torch
import torch.nn.functional as F

from norm import rms_norm
from smollm2 import rotations

LENGTH = 32768  # tokens that it was trained for
EVERY = 6  # the last of so many layers sees everything (not in the file's table)
LOCAL_BASE = 10000.0  # of the other layers' rotation (not in the file's table)


def rotate(x, cos, sin):
    """x [B, H, N, D]: the pairs (i, i + D / 2) turn."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class Gemma3:
    def __init__(self, weights, device, dtype):
        self.w, meta = weights.torch(device, dtype), weights.about["meta"]
        self.layers = meta["gemma3.block_count"]
        self.heads = meta["gemma3.attention.head_count"]
        self.kv_heads = meta["gemma3.attention.head_count_kv"]
        self.d = meta["gemma3.attention.key_length"]
        self.base = meta["gemma3.rope.freq_base"]
        self.window = meta["gemma3.attention.sliding_window"]
        self.eps = meta["gemma3.attention.layer_norm_rms_epsilon"]

    def norm(self, x, name):
        weight = self.w[name + ".weight"]  # GGUF has added the 1 to it
        return rms_norm(x.float(), weight.float(), self.eps).to(x.dtype)

    def linear(self, x, name):
        return F.linear(x, self.w[name + ".weight"])

    def split(self, x, heads):
        """[B, N, heads * d] -> [B, heads, N, d]"""
        return x.unflatten(-1, (heads, self.d)).transpose(1, 2)

    def hidden(self, ids, attend):
        """ids [B, N] -> the last hidden state [B, N, 640]"""
        x = F.embedding(ids, self.w["token_embd.weight"])
        x = x * torch.tensor(x.shape[-1] ** 0.5, dtype=x.dtype)
        everywhere = rotations(ids.shape[1], self.d, self.base, ids.device)
        nearby = rotations(ids.shape[1], self.d, LOCAL_BASE, ids.device)
        for layer in range(self.layers):
            at, whole = f"blk.{layer}.", (layer + 1) % EVERY == 0
            turn = everywhere if whole else nearby
            h = self.norm(x, at + "attn_norm")
            q = self.norm(self.split(self.linear(h, at + "attn_q"), self.heads), at + "attn_q_norm")
            k = self.norm(self.split(self.linear(h, at + "attn_k"), self.kv_heads),
                          at + "attn_k_norm")
            v = self.split(self.linear(h, at + "attn_v"), self.kv_heads)
            o = attend(rotate(q, *turn), rotate(k, *turn), v, causal=True,
                       window=0 if whole else self.window)
            o = self.linear(o.transpose(1, 2).flatten(2), at + "attn_output")
            x = x + self.norm(o, at + "post_attention_norm")
            h = self.norm(x, at + "ffn_norm")
            h = F.gelu(self.linear(h, at + "ffn_gate"), approximate="tanh") * \
                self.linear(h, at + "ffn_up")
            x = x + self.norm(self.linear(h, at + "ffn_down"), at + "post_ffw_norm")
        return self.norm(x, "output_norm")

    def logits(self, hidden):
        return self.linear(hidden, "token_embd").float()
