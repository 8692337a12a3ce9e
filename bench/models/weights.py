"""Weights of the models as `prepare` writes them: an .npz file, cut into parts of PART_BYTES.

An entry is a tensor's raw blocks as the model's publisher quantised them; the entry "about" is
JSON: {"tensors": {name: [kind, shape]}, ...}. Kinds and their numbers are GGUF's (ggml-common.h).
"""
import io
import json
import math
import os
import sys

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(
    os.path.abspath(__file__)))), "tests", "data"))

import capture  # noqa: E402

PART_BYTES = 40 << 20
F32, F16, Q8_0 = 0, 1, 8


def decode_f16(blocks):
    return blocks["x"].astype(np.float32)


def decode_q5_0(blocks):
    """32 values: x = d * (q - 16); the fifth bits lie in `h`, the first value's lowest."""
    high = np.unpackbits(blocks["h"], axis=1, bitorder="little")
    low = np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], axis=1)
    return ((low | high << 4).astype(np.float32) - 16) * blocks["d"].astype(np.float32)[:, None]


def decode_q4_k(blocks):
    """8 runs of 32 values: x = d * scale * q - dmin * least; `s` packs eight 6-bit scales, leasts.

    Bytes 0-3 and 4-7 of s hold the first four scales and leasts, and in their two top bits the top
    bits of the last four, whose low halves are the nibbles of bytes 8-11.
    """
    s = blocks["s"]
    scale = np.concatenate([s[:, :4] & 63, (s[:, 8:] & 15) | (s[:, :4] >> 6) << 4], axis=1)
    least = np.concatenate([s[:, 4:8] & 63, s[:, 8:] >> 4 | (s[:, 4:8] >> 6) << 4], axis=1)
    q = blocks["q"].reshape(-1, 4, 1, 32)
    q = np.concatenate([q & 15, q >> 4], axis=2).reshape(-1, 8, 32)
    d, dmin = (blocks[name].astype(np.float32)[:, None, None] for name in ("d", "dmin"))
    return d * scale[:, :, None] * q - dmin * least[:, :, None]


def decode_q6_k(blocks):
    """16 runs of 16 values: x = d * scale * (q - 32); four low bits in `l`, two high bits in `h`.

    Half of the block at a time: 128 values are four rows of 32, row r with nibble r // 2 of the 64
    bytes of l (row r % 2 of them) and bits 2r, 2r + 1 of the 32 bytes of h.
    """
    low = blocks["l"].reshape(-1, 2, 1, 2, 32)
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    high = blocks["h"].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    q = (low | high << 4).astype(np.float32).reshape(-1, 16, 16) - 32
    return blocks["d"].astype(np.float32)[:, None, None] * blocks["scale"][:, :, None] * q


# tensor type -> (decoder, values in a block, layout of a block)
KINDS = capture.QUANTS | {
    F16: (decode_f16, 1, np.dtype([("x", "<f2")])),
    6: (decode_q5_0, 32, np.dtype([("d", "<f2"), ("h", "u1", 4), ("q", "u1", 16)])),
    12: (decode_q4_k, 256, np.dtype([("d", "<f2"), ("dmin", "<f2"), ("s", "u1", 12),
                                     ("q", "u1", 128)])),
    14: (decode_q6_k, 256, np.dtype([("l", "u1", 128), ("h", "u1", 64), ("scale", "i1", 16),
                                     ("d", "<f2")])),
}


def save(folder, name, tensors, **about):
    """tensors: {name: (kind, shape, raw bytes)}; about: anything that JSON can hold."""
    about["tensors"] = {key: [kind, list(shape)] for key, (kind, shape, _) in tensors.items()}
    file = io.BytesIO()
    np.savez(file, about=np.frombuffer(json.dumps(about).encode(), np.uint8),
             **{key: np.frombuffer(raw, np.uint8) for key, (_, _, raw) in tensors.items()})
    data = file.getbuffer()
    for i in range(0, len(data), PART_BYTES):
        with open(os.path.join(folder, f"{name}.npz.{i // PART_BYTES}"), "wb") as part:
            part.write(data[i : i + PART_BYTES])


class Weights:
    """`about` and tensors of a model in a folder that `prepare` filled."""

    def __init__(self, folder, name):
        parts = []
        while os.path.exists(path := os.path.join(folder, f"{name}.npz.{len(parts)}")):
            with open(path, "rb") as part:
                parts.append(part.read())
        if not parts:
            sys.exit(f"no {name}.npz.0 in {folder}: bench/models/prepare makes it")
        self.file = np.load(io.BytesIO(b"".join(parts)))
        self.about = json.loads(bytes(self.file["about"]))

    def __getitem__(self, name):
        """float32, of its shape."""
        kind, shape = self.about["tensors"][name]
        decode, _, block = KINDS[kind]
        return decode(self.file[name].view(block)).reshape(shape)

    def torch(self, device, dtype):
        """{name: tensor}, all of them."""
        import torch
        return {name: torch.from_numpy(self[name]).to(device, dtype)
                for name in self.about["tensors"]}


def from_gguf(gguf, rows=()):
    """{name: (kind, shape, raw bytes)} of a capture.Gguf; rows: {name: the rows to keep}."""
    tensors = {}
    for name, (dims, kind, offset) in gguf.index.items():
        _, values, block = KINDS[kind]
        shape = dims[::-1]
        start, size = gguf.data + offset, math.prod(shape) // values * block.itemsize
        raw = gguf.raw[start : start + size]
        if name in rows:
            raw = raw.reshape(shape[0], -1)[rows[name]]
            shape = [len(raw), *shape[1:]]
        tensors[name] = kind, shape, raw.tobytes()
    return tensors
