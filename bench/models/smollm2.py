"""SmolLM2-135M in plain PyTorch, from the weights of its GGUF file; attention is an argument."""
import torch
import torch.nn.functional as F

from norm import rms_norm

LENGTH = 8192  # tokens that it was trained for


def rotations(n, d, base, device):
    """cos and sin [n, d / 2] of position * base ** (-2i / d), float32."""
    turns = float(base) ** (-torch.arange(0, d, 2, device=device, dtype=torch.float64) / d)
    angle = torch.arange(n, device=device, dtype=torch.float64)[:, None] * turns
    return angle.cos().float(), angle.sin().float()


def rotate(x, cos, sin):
    """x [B, H, N, D]: the pairs (2i, 2i + 1) turn, as GGUF orders the rows of llama models."""
    a, b = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


class SmolLM2:
    def __init__(self, weights, device, dtype):
        self.w, meta = weights.torch(device, dtype), weights.about["meta"]
        self.layers = meta["llama.block_count"]
        self.heads = meta["llama.attention.head_count"]
        self.kv_heads = meta["llama.attention.head_count_kv"]
        self.d = meta["llama.rope.dimension_count"]
        self.base = meta["llama.rope.freq_base"]
        self.eps = meta["llama.attention.layer_norm_rms_epsilon"]

    def norm(self, x, name):
        weight = self.w[name + ".weight"]
        return rms_norm(x.float(), weight.float(), self.eps).to(x.dtype)

    def linear(self, x, name):
        return F.linear(x, self.w[name + ".weight"])

    def split(self, x, heads):
        """[B, N, heads * d] -> [B, heads, N, d]"""
        return x.unflatten(-1, (heads, self.d)).transpose(1, 2)

    def hidden(self, ids, attend):
        """ids [B, N] -> the last hidden state [B, N, 576]"""
        x = F.embedding(ids, self.w["token_embd.weight"])
        cos, sin = rotations(ids.shape[1], self.d, self.base, ids.device)
        for layer in range(self.layers):
            at = f"blk.{layer}."
            h = self.norm(x, at + "attn_norm")
            q = rotate(self.split(self.linear(h, at + "attn_q"), self.heads), cos, sin)
            k = rotate(self.split(self.linear(h, at + "attn_k"), self.kv_heads), cos, sin)
            v = self.split(self.linear(h, at + "attn_v"), self.kv_heads)
            o = attend(q, k, v, causal=True)
            x = x + self.linear(o.transpose(1, 2).flatten(2), at + "attn_output")
            h = self.norm(x, at + "ffn_norm")
            h = F.silu(self.linear(h, at + "ffn_gate")) * self.linear(h, at + "ffn_up")
            x = x + self.linear(h, at + "ffn_down")
        return self.norm(x, "output_norm")

    def logits(self, hidden):
        return self.linear(hidden, "token_embd").float()
