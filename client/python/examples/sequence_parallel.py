#!/usr/bin/env python3
"""Attention over a sequence that is spread over the ranks, in two ways, checked against one rank.

    torchrun --nproc-per-node=2 sequence_parallel.py [--tokens=N] [--heads=H] [--dim=D]

Ring (Liu et al., arXiv:2310.01889): each rank keeps its queries, keys and values go round, and the
partial results are merged by their lse. Ulysses (Jacobs et al., arXiv:2309.14509): all-to-all
turns tokens/P of all heads into all tokens of heads/P, and back. Every rank computes on its own
GPU (NCCL), or on the CPU (gloo).
"""
import argparse
import os
import sys

import torch
import torch.distributed as dist

from sageattnd import sageattn

BOUND = 0.03  # relL1 against fp64
HELD = []  # gloo: see main()


def merge(o, lse, part, part_lse):
    """Two results of the same queries over disjoint keys; all float32, o [B, H, N, D], lse
    [B, H, N]. With s = log(e^a + e^b): o = e^(a - s) o_a + e^(b - s) o_b."""
    total = torch.logaddexp(lse, part_lse)
    weight = torch.exp(lse - total).nan_to_num(0)[..., None]  # no key seen yet: -inf - -inf
    part_weight = torch.exp(part_lse - total).nan_to_num(0)[..., None]
    return weight * o + part_weight * part, total


def rotate(tensors):
    """Send to the next rank, receive from the one before."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    received = [torch.empty_like(t) for t in tensors]
    work = [dist.P2POp(dist.isend, t, (rank + 1) % ranks) for t in tensors]
    work += [dist.P2POp(dist.irecv, t, (rank - 1) % ranks) for t in received]
    for request in dist.batch_isend_irecv(work):
        request.wait()
    return received


def ring_attention(q, k, v, is_causal=False):
    """q, k, v [B, H, N/P, D]: this rank's run of the tokens. o like q, lse [B, H, N/P]."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    o = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, device=q.device)
    k, v = k.contiguous(), v.contiguous()
    for step in range(ranks):
        owner = (rank - step) % ranks  # of the keys that are here now
        if not is_causal or owner <= rank:
            part, part_lse = sageattn(q, k, v, is_causal=is_causal and owner == rank,
                                      return_lse=True)
            o, lse = merge(o, lse, part.float(), part_lse)
        if step < ranks - 1:
            k, v = rotate((k, v))
    return o.to(q.dtype), lse


def all_to_all(t, scatter, gather):
    """Cut dimension `scatter` into one piece for each rank, join the received along `gather`."""
    ranks = dist.get_world_size()
    sent = torch.stack([c.contiguous() for c in t.chunk(ranks, scatter)])
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    if dist.get_backend() == "gloo":
        HELD.append((sent, received))
    return torch.cat(tuple(received), gather)


def ulysses_attention(q, k, v, is_causal=False):
    """q, k, v [B, H, N/P, D], H a multiple of P. o like q."""
    q, k, v = (all_to_all(t, 1, 2) for t in (q, k, v))
    return all_to_all(sageattn(q, k, v, is_causal=is_causal), 2, 1)


def reference(q, k, v, is_causal):
    """In fp64, head by head: o and lse."""
    score = q.double() @ k.double().transpose(2, 3) * q.shape[-1] ** -0.5
    if is_causal:
        n = q.shape[2]
        score = score.masked_fill(~torch.ones(n, n, dtype=torch.bool, device=q.device).tril(),
                                  -torch.inf)
    return score.softmax(-1) @ v.double(), score.logsumexp(-1)


def error(o, wanted):
    return float((o.double() - wanted).abs().sum() / wanted.abs().sum())


def compare(whole, is_causal):
    """Both ways, and one rank alone, with fp64: how far off the worst rank is of each."""
    rank, ranks, device = dist.get_rank(), dist.get_world_size(), whole[0].device
    mine = [t.chunk(ranks, 2)[rank] for t in whole]
    wanted, wanted_lse = (t.chunk(ranks, 2)[rank] for t in reference(*whole, is_causal))
    o, lse = ring_attention(*mine, is_causal)
    results = {"one rank": sageattn(*whole, is_causal=is_causal).chunk(ranks, 2)[rank],
               "ring": o, "ulysses": ulysses_attention(*mine, is_causal)}
    worst = torch.tensor([*(error(got, wanted) for got in results.values()),
                          float((lse - wanted_lse).abs().max())], device=device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    if rank == 0:
        print(f"{ranks} x {device.type}, {'causal' if is_causal else 'all keys'}: relL1 "
              + ", ".join(f"{name} {off:.4f}" for name, off in zip(results, worst))
              + f"; lse of ring off by {worst[-1]:.4f}", flush=True)
    return worst


def main():
    parser = argparse.ArgumentParser()
    for name, value in (("tokens", 1024), ("heads", 4), ("dim", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if args.tokens % ranks or args.heads % ranks:
        parser.error(f"--tokens and --heads must be multiples of the {ranks} ranks")
    gpus = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpus else "gloo")
    device = torch.device("cpu")
    if gpus:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    generator = torch.Generator().manual_seed(1)  # the same whole problem on every rank
    whole = [torch.randn(1, args.heads, args.tokens, args.dim, generator=generator,
                         dtype=torch.float32).to(device, torch.float16) for _ in range(3)]
    with torch.inference_mode():
        worst = [compare(whole, is_causal) for is_causal in (False, True)]
    # Each of gloo's two threads may still hold the tensors of what it did last. Were those not held
    # here, too, it would wait for Python's lock to free them, and PyTorch 2.1 waits for the threads
    # with that lock in hand.
    dist.destroy_process_group()
    return 0 if all((w < BOUND).all() for w in worst) else 1


if __name__ == "__main__":
    sys.exit(main())
