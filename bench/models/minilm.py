"""all-MiniLM-L6-v2 in plain PyTorch: sentences to unit vectors; attention is an argument."""
import torch
import torch.nn.functional as F

LAYERS, HEADS, D = 6, 12, 32


class MiniLM:
    def __init__(self, weights, device, dtype):
        self.w = weights.torch(device, dtype)

    def linear(self, x, name):
        return F.linear(x, self.w[name + ".weight"], self.w[name + ".bias"])

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.w[name + ".weight"], self.w[name + ".bias"],
                            1e-12)

    def embed(self, ids, lengths, attend):
        """ids [B, N], lengths of the B sentences; behind them they are filled up -> [B, 384], of
        length 1"""
        visible = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
        visible = visible.to(ids.device)
        n, at = ids.shape[1], "embeddings.{}_embeddings.weight".format
        x = self.w[at("word")][ids] + self.w[at("position")][:n] + self.w[at("token_type")][0]
        x = self.norm(x, "embeddings.LayerNorm")
        for layer in range(LAYERS):
            at = f"encoder.layer.{layer}."
            q, k, v = (self.linear(x, f"{at}attention.self.{name}")
                       .unflatten(-1, (HEADS, D)).transpose(1, 2)
                       for name in ("query", "key", "value"))
            o = attend(q, k, v, mask=visible[:, None, None, :], key_lengths=lengths)
            o = o.transpose(1, 2).flatten(2)
            x = self.norm(x + self.linear(o, at + "attention.output.dense"),
                          at + "attention.output.LayerNorm")
            h = F.gelu(self.linear(x, at + "intermediate.dense"))
            x = self.norm(x + self.linear(h, at + "output.dense"), at + "output.LayerNorm")
        x = x.float() * visible[:, :, None]
        return F.normalize(x.sum(1) / visible.sum(1, keepdim=True), dim=-1)


def batch(sentences, device):
    """Token lists -> ids [B, N], filled up with 0, and their lengths."""
    lengths = list(map(len, sentences))
    ids = torch.zeros(len(sentences), max(lengths), dtype=torch.long, device=device)
    for row, tokens in zip(ids, sentences):
        row[: len(tokens)] = torch.tensor(tokens)
    return ids, lengths
