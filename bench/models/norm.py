"""Root mean square normalisation (Zhang and Sennrich, arXiv:1910.07467) with any PyTorch 2.x."""
import torch
import torch.nn.functional as F
from torch import nn


def rms_norm(x, weight, eps=None):
    """x [..., n] by the root of the mean of its squares, times weight [n]. eps: that of x's type
    if None."""
    if hasattr(F, "rms_norm"):  # from 2.4 on, and one kernel
        return F.rms_norm(x, weight.shape, weight, eps)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps).to(x.dtype) * weight


class RMSNorm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x):
        return rms_norm(x, self.weight)
