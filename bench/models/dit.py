"""A small diffusion transformer over pixels, in plain PyTorch; attention is an argument.

It predicts noise - picture from (1 - t) * picture + t * noise (rectified flow: Liu et al.,
arXiv:2209.03003; the transformer: Peebles and Xie, arXiv:2212.09748), told t and which picture of
the training set to resemble.
"""
import torch
import torch.nn.functional as F
from torch import nn

from norm import RMSNorm

PATCH, HEAD_DIM = 4, 64


def rotation(side, device):
    """cos and sin [side * side, HEAD_DIM / 2]: half of the pairs turn with the row, half with the
    column, both from 0 to 64 over a picture of any size."""
    at = (torch.arange(side, device=device) + 0.5) * (64 / side)
    turns = 100.0 ** (-torch.arange(0, HEAD_DIM // 4, device=device) / (HEAD_DIM // 4))
    angle = at[:, None] * turns
    angle = torch.cat([angle.repeat_interleave(side, 0), angle.repeat(side, 1)], -1)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """x [B, H, N, D]: the pairs (i, i + D / 2) turn."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


def waves(t, width):
    """t [B], 0 to 1 -> [B, width]"""
    angle = 1000 * t[:, None] * 1e4 ** (-torch.arange(width // 2, device=t.device) * 2 / width)
    return torch.cat([angle.cos(), angle.sin()], -1)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = RMSNorm(HEAD_DIM), RMSNorm(HEAD_DIM)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, condition, turn, attend):
        width = x.shape[-1:]
        m = self.modulation(condition)[:, None].chunk(6, dim=-1)
        q, k, v = (self.qkv(F.layer_norm(x, width) * (1 + m[1]) + m[0])
                   .unflatten(-1, (3, -1, HEAD_DIM)).permute(2, 0, 3, 1, 4))
        q, k = rotate(self.q_norm(q).to(v), *turn), rotate(self.k_norm(k).to(v), *turn)
        x = x + m[2] * self.out(attend(q, k, v).transpose(1, 2).flatten(2))
        h = F.gelu(self.up(F.layer_norm(x, width) * (1 + m[4]) + m[3]), approximate="tanh")
        return x + m[5] * self.down(h)


class DiT(nn.Module):
    def __init__(self, width, depth, kinds):
        super().__init__()
        self.width = width
        self.patches, self.kind = nn.Linear(3 * PATCH**2, width), nn.Embedding(kinds, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.last = nn.Linear(width, 3 * PATCH**2)
        nn.init.zeros_(self.last.weight)

    def forward(self, x, t, kind, attend):
        """x [B, 3, S, S], t [B] of 0 to 1, kind [B] -> like x"""
        side = x.shape[-1] // PATCH
        h = self.patches(F.pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2))
        condition = F.silu(self.time(waves(t, self.width)) + self.kind(kind))
        turn = rotation(side, x.device)
        for block in self.blocks:
            h = block(h, condition, turn, attend)
        h = self.last(F.layer_norm(h, h.shape[-1:]))
        return F.pixel_shuffle(h.transpose(1, 2).unflatten(2, (side, side)), PATCH)


def crops(pictures, n, size, generator):
    """n random squares of uint8 [P, 3, H, W], of its shorter side down to two thirds of it, scaled
    to size -> [n, 3, size, size], -1 to 1, and which pictures they are of. Half are mirrored.
    generator: on the CPU."""
    count, _, height, width = pictures.shape
    draw = torch.rand(5, n, generator=generator).tolist()
    out, kinds = [], []
    for which, scale, top, left, mirror in zip(*draw):
        kind, edge = int(which * count), int(height * (2 + scale) / 3)
        y, x = int(top * (height - edge + 1)), int(left * (width - edge + 1))
        square = pictures[kind : kind + 1, :, y : y + edge, x : x + edge].float() / 127.5 - 1
        square = F.interpolate(square, (size, size), mode="bilinear", antialias=True)
        out.append(square.flip(-1) if mirror < 0.5 else square)
        kinds.append(kind)
    return torch.cat(out), torch.tensor(kinds, device=pictures.device)


def loss(model, x, kind, attend, generator):
    """Mean squared error at random times, more of them in the middle; generator: x's device's."""
    t = torch.sigmoid(torch.randn(len(x), generator=generator, device=x.device))
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    mixed = torch.lerp(x, noise, t[:, None, None, None])
    return F.mse_loss(model(mixed, t, kind, attend).float(), noise - x)


def sample(model, noise, kind, steps, attend):
    """Euler's method from noise (t = 1) to pictures (t = 0) -> like noise, in float32."""
    x = noise
    for i in range(steps, 0, -1):
        t = torch.full((len(x),), i / steps, device=x.device)
        x = x - model(x, t, kind, attend).float() / steps
    return x
