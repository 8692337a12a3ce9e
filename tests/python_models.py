#!/usr/bin/env python3
"""The programs of bench/models on the CPU, at small sizes, and the models against what is known.

PyTorch is that of this python, or else of the environment that `./quickstart python` makes. What
needs weights looks for them in $SAGE_MODELS, else in build/models, where that puts them, too.
"""
import csv
import os
import re
import subprocess
import sys
import tempfile

import sage

SRC = os.path.abspath(os.environ.get("SAGE_SRCDIR", "."))
PROGRAMS = os.path.join(SRC, "bench", "models")
DATA = os.environ.get("SAGE_MODELS", os.path.join(sage.BUILD, "models"))

sage.need_torch()
sys.path[:0] = [PROGRAMS, os.path.join(SRC, "client", "python")]

import numpy as np
import torch

import common  # noqa: F401: it says where the libraries are
from attention import Probe, attention, in_dtype, sdpa
from minilm import MiniLM, batch
from smollm2 import SmolLM2
from weights import Weights

# What a CPU with other clients has left; more threads than processors spin at each other's cost.
ENV = {"OMP_NUM_THREADS": "1"}


def run(program, *args, code=0):
    """What it prints. `code`: the exit status that it must have."""
    done = subprocess.run([sys.executable, os.path.join(PROGRAMS, program), *args],
                          capture_output=True, text=True, timeout=300,
                          env={**sage.environment(**ENV), "PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == code, \
        f"{program}: exit status {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def weights(name):
    if not os.path.exists(os.path.join(DATA, f"{name}.npz.0")):
        raise sage.Skip(f"no {name}.npz.0 in {DATA}: see the head of this file")
    return Weights(DATA, name)


# --- the models ---

def test_smollm2_like_captured():
    """q, k and v of four layers are those that tests/data/capture.py computed with numpy."""
    w = weights("smollm2")
    n, calls = 300, []

    def attend(q, k, v, causal):
        calls.append((q, k, v))
        return sdpa()(q, k, v, causal=causal)
    with torch.inference_mode():
        SmolLM2(w, "cpu", torch.float32).hidden(torch.tensor([w.about["captured"][:n]]), attend)
    assert len(calls) == 30
    for layer in (0, 2, 18, 29):
        for letter, got in zip("qkv", calls[layer]):
            path = os.path.join(SRC, "tests", "data", f"smollm2-l{layer:02d}-{letter}.npy")
            wanted = np.load(path)[:, :, :n].astype(np.float32)
            off = np.abs(got.numpy() - wanted).max() / np.abs(wanted).max()
            assert off < 1e-3, f"layer {layer}, {letter}: off by {off}"


def test_minilm_like_documented():
    w = weights("minilm")
    ids, lengths = batch(w.about["documented"], "cpu")
    with torch.inference_mode():
        e = MiniLM(w, "cpu", torch.float32).embed(ids, lengths, sdpa())
    similar = (e @ e.T)[[0, 0, 1], [1, 2, 2]]
    off = (similar - torch.tensor([0.6660, 0.1046, 0.1411])).abs().max()
    assert off < 1e-3, f"similarities {similar.tolist()}"


def test_probe_tells_layers():
    """A layer whose attention is wrong shows, and only that one."""
    q = torch.randn(1, 2, 50, 64, generator=torch.Generator().manual_seed(1))
    calls = iter(range(3))
    probe = Probe(sdpa(), lambda *a: -sdpa()(*a) if next(calls) == 1 else sdpa()(*a))
    assert all(torch.equal(probe(q, q, q), sdpa()(q, q, q)) for _ in range(3))
    assert [round(c, 5) for c in probe.cosines] == [1, -1, 1], probe.cosines


def test_sdpa_window():
    """Row i of a window of 7 sees keys i - 6 to i."""
    q, k, v = torch.randn(3, 1, 2, 40, 64, generator=torch.Generator().manual_seed(1)).double()
    got = in_dtype(sdpa(), torch.float64)(q, k, v, causal=True, window=7)
    wanted, _ = sage.reference(*(t.numpy() for t in (q, k, v)), causal=True, window_left=6)
    assert np.abs(got.numpy() - wanted).max() < 1e-9


# --- the programs ---

def test_rotation():
    """With channels that stick out a much smaller error."""
    q, k, v = torch.randn(3, 1, 2, 300, 64, generator=torch.Generator().manual_seed(1)).half()
    q[..., 5] *= 30
    k[..., 6] *= 30
    exact = sdpa()(q.double(), k.double(), v.double())

    def error(attend, *args):
        return float((attend(*args).double() - exact).abs().sum() / exact.abs().sum())
    plain, turned = (error(attention(name), q, k, v) for name in ("int8_fp16", "int8_fp16_rotated"))
    assert turned < plain / 2, (plain, turned)


def test_perplexity():
    weights("smollm2")
    with tempfile.TemporaryDirectory() as folder:
        tsv = os.path.join(folder, "t")
        said = run("perplexity", "--contexts=256", "--tokens=512", f"--tsv={tsv}", DATA)
        table = {row["attention"]: row for row in rows(tsv)}
    clients = re.findall(r"daemon: pid \d+: (\d+) jobs done, 0 failed", said)
    # Two variants, a window each: its score and its layers; of these one pass of 30 is ours.
    assert list(map(int, clients)) == [120, 120], said
    assert 20 < float(table["float32"]["perplexity"]) < 80, said
    for variant in ("int8_fp16", "int8_fp8"):
        assert table[variant]["judged"] == "ok" and table[variant]["mode"] == "daemon", said
        assert 0.998 < float(table[variant]["cosine_least"]) < 1, said
        assert 90 < float(table[variant]["same_top_percent"]) <= 100, said
        assert float(table[variant]["perplexity"]) != float(table["sdpa"]["perplexity"]), said


def test_perplexity_gemma():
    """Head dimension 256, one kv head, a sliding window. 250 MB of packages: not fetched for tests,
    see `prepare --only=gemma3`."""
    weights("gemma3")
    with tempfile.TemporaryDirectory() as folder:
        tsv = os.path.join(folder, "t")
        said = run("perplexity", "--model=gemma3", "--contexts=768", "--tokens=1536",
                   "--attention=int8_fp16_rotated,int8_fp8_rotated", f"--tsv={tsv}", DATA)
        table = {row["attention"]: row for row in rows(tsv)}
    assert 10 < float(table["float32"]["perplexity"]) < 100, said
    for variant in ("int8_fp16_rotated", "int8_fp8_rotated"):
        assert table[variant]["judged"] == "ok" and table[variant]["mode"] == "daemon", said
        assert 0.99 < float(table[variant]["cosine_least"]) < 1, said


def test_embeddings():
    weights("minilm")
    with tempfile.TemporaryDirectory() as folder:
        tsv = os.path.join(folder, "t")
        said = run("embeddings", "--mode=inproc", f"--tsv={tsv}", DATA)
        table = rows(tsv)
    assert [(row["attention"], row["keys"]) for row in table] == [
        ("float32", "mask"), ("int8_fp16", "mask"), ("int8_fp16", "lengths"), ("int8_fp8", "mask"),
        ("int8_fp8", "lengths")], said
    assert table[0]["same_neighbour"] == "200" and table[0]["judged"] == "-", said
    assert float(table[0]["cosine_least"]) > 0.99999, said
    for row in table[1:]:
        assert row["judged"] == "ok" and row["sentences"] == "200", said
        assert float(row["cosine_least"]) > 0.99999, said


def test_blocks():
    with tempfile.TemporaryDirectory() as folder:
        tsv = os.path.join(folder, "t")
        said = run("blocks", "--device=cpu", "--shapes=flux,wan-1.3b", "--tokens-divided-by=64",
                   "--calls=1", f"--tsv={tsv}")
        table = rows(tsv)
    assert len(table) == 10, said
    for row in table:
        assert row["judged"] == "ok", said
        assert 0 < float(row["attention_ms"]) < float(row["block_ms"]), said


def test_diffusion():
    """On pictures of two colours each."""
    colours = np.random.default_rng(1).integers(0, 256, (6, 2, 1, 3))
    left = (np.arange(96) < 48)[None, :, None]
    pictures = np.where(left, colours[:, :1], colours[:, 1:]).repeat(64, 1).astype(np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(os.path.join(folder, "pictures.npz"), pictures=pictures.reshape(6, 64, 96, 3))
        said = run("diffusion", "--device=cpu", "--seconds=10", "--size=32", "--width=64",
                   "--depth=2", "--batch=8", "--images=4", "--steps=10", folder, folder)
        table = rows(os.path.join(folder, "diffusion.tsv"))
        with open(os.path.join(folder, "diffusion.png"), "rb") as png:
            head = png.read(24)
    losses = [float(loss) for loss in re.findall(r"loss ([0-9.]+)", said)]
    assert losses[1] < min(losses[0], 1), said
    assert [row["attention"] for row in table] == ["sdpa", "int8_fp16", "int8_fp8"], said
    assert float(table[1]["psnr_worst"]) > 45 and float(table[2]["psnr_worst"]) > 40, said
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and head[16:] == bytes((0, 0, 0, 64, 0, 0, 0, 48)), head


def test_refusals():
    """Each names what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        assert "int4" in run("perplexity", "--attention=int4", folder, code=2)
        assert "nix" in run("blocks", "--shapes=nix", code=2)
        assert "--width" in run("diffusion", "--width=100", folder, folder, code=2)
        assert f"no smollm2.npz.0 in {folder}" in run("perplexity", folder, code=1)
        assert "no pictures.npz" in run("diffusion", "--device=cpu", folder, folder, code=1)
        assert "no step nix" in run("gpu", "nix", folder, folder, code=2)


if __name__ == "__main__":
    sage.run(globals())
