"""What a process of `perplexity` does: a language model over windows of a text."""
import os

import torch
import torch.nn.functional as F

from attention import Probe, attention, in_dtype, sdpa, settle
from gemma3 import Gemma3
from smollm2 import SmolLM2
from weights import Weights

# Gemma's activations are too large for float16.
MODELS = {"smollm2": (SmolLM2, torch.float16), "gemma3": (Gemma3, torch.bfloat16)}
ROWS = 1024  # of logits at a time: as many times a vocabulary in float32


class Worker:
    """One model in this process. On a GPU it computes in 16 bits; on a CPU attention alone does."""

    def __init__(self, data, model, device, processes):
        torch.set_num_threads(max(1, os.cpu_count() // processes))
        self.device, (self.make, self.half) = device, MODELS[model]
        self.weights, self.models = Weights(data, model), {}
        meta = self.weights.about["meta"]
        first = meta["tokenizer.ggml.add_bos_token"]
        self.first = [meta["tokenizer.ggml.bos_token_id"]] if first else []

    def model(self, dtype):
        if dtype not in self.models:
            self.models[dtype] = self.make(self.weights, self.device, dtype)
        return self.models[dtype]

    def prepare(self, name, mode):
        """The model and attention `name`; "float32": all of it in float32, by PyTorch."""
        if name == "float32":
            return self.model(torch.float32), sdpa()
        attend = attention(name, mode)
        if self.device == "cuda":
            return self.model(self.half), attend
        return self.model(torch.float32), in_dtype(attend, self.half)

    def ids(self, text, start, n):
        tokens = self.weights.about["tokens"][text][start : start + n - len(self.first)]
        return torch.tensor(self.first + tokens, device=self.device)[None]

    def score(self, window, name, mode):
        """Of each token but the first: loss in nats, and which token was thought likeliest."""
        model, attend = self.prepare(name, mode)
        ids, losses, top = self.ids(*window), [], []
        hidden = model.hidden(ids, attend)[0, :-1]
        for h, target in zip(hidden.split(ROWS), ids[0, 1:].split(ROWS)):
            logits = model.logits(h)
            losses.append(F.cross_entropy(logits, target, reduction="none"))
            top.append(logits.argmax(-1))
        settle()
        return torch.cat(losses).cpu().numpy(), torch.cat(top).cpu().numpy()

    def layers(self, window, name, mode):
        """Cosine of each layer's attention to "sdpa", on the inputs that "sdpa" leads to."""
        model, reference = self.prepare("sdpa", mode)
        probe = Probe(reference, self.prepare(name, mode)[1])
        model.hidden(self.ids(*window), probe)
        settle()
        return probe.cosines


arguments = worker = None


def start(*args):
    """What a process of a pool begins with; one that failed here would be replaced for ever."""
    global arguments
    arguments = args


@torch.inference_mode()
def call(what, *args):
    """A method of this process's Worker."""
    global worker
    worker = worker or Worker(*arguments)
    return getattr(worker, what)(*args)
