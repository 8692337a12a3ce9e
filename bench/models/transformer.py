"""One transformer block of known video and image models, random weights; attention is an argument.

As in the models' published code: modulated layer norms, q and k normalised, rotary embedding,
attention over all tokens, MLP; text and image tokens with weights of their own where the model has
them so; cross-attention to text. Plain PyTorch, nothing compiled.
"""
import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import nn

from norm import RMSNorm


@dataclasses.dataclass(frozen=True)
class Shape:
    tokens: tuple  # of each kind of token that has weights of its own
    heads: int
    head_dim: int
    mlp: int  # width
    rotary: bool
    cross: int = 0  # tokens of text that a second attention sees


# CogVideoX-2b, 49 frames of 720 x 480: 226 of text and 13 x 30 x 45. Flux.1, 1024 x 1024, a double
# block: 512 of text and 64 x 64. Wan2.1 1.3B, 81 frames of 832 x 480: 21 x 30 x 52.
SHAPES = {
    "cogvideox-2b": Shape((17776,), 30, 64, 7680, False),
    "flux": Shape((512, 4096), 24, 128, 12288, True),
    "wan-1.3b": Shape((32760,), 12, 128, 8960, True, 512),
}


class Stream(nn.Module):
    """The weights of one kind of token."""

    def __init__(self, width, mlp):
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, mlp), nn.Linear(mlp, width)


class Cross(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)


class Block(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape, width = shape, shape.heads * shape.head_dim
        self.streams = nn.ModuleList(Stream(width, shape.mlp) for _ in shape.tokens)
        self.cross = Cross(width) if shape.cross else None
        self.q_norm, self.k_norm = (RMSNorm(shape.head_dim) for _ in range(2))
        for p in self.parameters():
            nn.init.normal_(p, std=0.02)

    def inputs(self, like):
        """Tokens of each kind [1, N, width], condition [1, width], text [1, cross, width] and
        rotation, cosines and sines [N, head_dim / 2] or None."""
        shape, width = self.shape, self.shape.heads * self.shape.head_dim
        angle = torch.rand(sum(shape.tokens), shape.head_dim // 2, device=like.device) * 6.28
        normal = functools.partial(torch.randn, device=like.device, dtype=like.dtype)
        return ([normal(1, n, width) for n in shape.tokens], normal(1, width),
                normal(1, shape.cross, width),
                (angle.cos(), angle.sin()) if shape.rotary else None)

    def heads(self, x):
        """[1, N, width] -> [1, heads, N, head_dim], a view"""
        return x.unflatten(-1, (self.shape.heads, -1)).transpose(1, 2)

    def rotate(self, x, rotation):
        if rotation is None:
            return x
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = rotation
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)

    def attention(self, parts, rotation, attend):
        """parts: qkv [1, N, 3 * width] of each stream -> [1, N, width] of each"""
        q, k, v = (self.heads(x) for x in torch.cat(parts, 1).chunk(3, dim=-1))
        q, k = self.rotate(self.q_norm(q), rotation), self.rotate(self.k_norm(k), rotation)
        return attend(q, k, v).transpose(1, 2).flatten(2).split(self.shape.tokens, 1)

    def forward(self, xs, condition, text, rotation, attend, attend_text):
        width = xs[0].shape[-1:]
        mods = [s.modulation(F.silu(condition))[:, None].chunk(6, dim=-1) for s in self.streams]
        parts = [s.qkv(F.layer_norm(x, width) * (1 + m[1]) + m[0])
                 for s, x, m in zip(self.streams, xs, mods)]
        os = self.attention(parts, rotation, attend)
        xs = [x + m[2] * s.out(o) for s, x, m, o in zip(self.streams, xs, mods, os)]
        if self.cross:
            k, v = (self.heads(t) for t in self.cross.kv(text).chunk(2, dim=-1))
            o = attend_text(self.q_norm(self.heads(self.cross.q(xs[0]))), self.k_norm(k), v)
            xs = [xs[0] + self.cross.out(o.transpose(1, 2).flatten(2))]
        hs = [F.gelu(s.up(F.layer_norm(x, width) * (1 + m[4]) + m[3]), approximate="tanh")
              for s, x, m in zip(self.streams, xs, mods)]
        return [x + m[5] * s.down(h) for s, x, m, h in zip(self.streams, xs, mods, hs)]
