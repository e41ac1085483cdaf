"""A tiny BERT with random weights, and BERT's equations once more in float64 numpy."""

import json
import math

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

CONFIG = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": 24,
    "intermediate_size": 40,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 16,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "type_vocab_size": 2,
}
WORDS = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "dog", "sat", "ran", "on", "mat", "##s"),
    *("a", "step", "is", "wrong", "right", "hat", "."),
)


ACTIVATIONS = {
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_new": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
}


def weights(rng, config, labels=0):
    """Random arrays under the names of Hugging Face's checkpoints."""
    d, inner = config["hidden_size"], config["intermediate_size"]
    found = {}

    def linear(name, out, into):
        found[f"{name}.weight"] = rng.normal(0, 0.3, (out, into))
        found[f"{name}.bias"] = rng.normal(0, 0.1, out)

    def norm(name):
        found[f"{name}.weight"] = rng.normal(1, 0.1, d)
        found[f"{name}.bias"] = rng.normal(0, 0.1, d)

    for name, rows in (
        ("word", config["vocab_size"]),
        ("position", config["max_position_embeddings"]),
        ("token_type", config["type_vocab_size"]),
    ):
        found[f"embeddings.{name}_embeddings.weight"] = rng.normal(0, 1, (rows, d))
    norm("embeddings.LayerNorm")
    for k in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{k}"
        for part in ("query", "key", "value"):
            linear(f"{layer}.attention.self.{part}", d, d)
        linear(f"{layer}.attention.output.dense", d, d)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", inner, d)
        linear(f"{layer}.output.dense", d, inner)
        norm(f"{layer}.output.LayerNorm")
    linear("pooler.dense", d, d)
    if labels:
        linear("classifier", labels, d)
    return {name: array.astype(np.float32) for name, array in found.items()}


def reference(w, config, ids, layers=None):
    """Hidden states of one text behind ``layers`` blocks, (tokens, width)."""
    w = {name: array.astype(np.float64) for name, array in w.items()}
    d, heads = config["hidden_size"], config["num_attention_heads"]

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config["layer_norm_eps"])
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["embeddings.word_embeddings.weight"][ids]
    x = x + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm("embeddings.LayerNorm", x + w["embeddings.token_type_embeddings.weight"][0])
    for k in range(config["num_hidden_layers"] if layers is None else layers):
        layer = f"encoder.layer.{k}"
        parameter_group = f"{layer}.attention.self"
        q, key, value = (
            linear(f"{parameter_group}.{name}", x) for name in ("query", "key", "value")
        )
        mixed = np.zeros_like(x)
        for head in range(heads):
            part = slice(head * d // heads, (head + 1) * d // heads)
            scores = q[:, part] @ key[:, part].T / math.sqrt(d / heads)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[:, part] = scores / scores.sum(-1, keepdims=True) @ value[:, part]
        x = norm(
            f"{layer}.attention.output.LayerNorm",
            x + linear(f"{layer}.attention.output.dense", mixed),
        )
        inner = ACTIVATIONS[config["hidden_act"]](linear(f"{layer}.intermediate.dense", x))
        x = norm(f"{layer}.output.LayerNorm", x + linear(f"{layer}.output.dense", inner))
    return x


def write(path, seed=0, labels=0, changes=None, vocabulary_only=False):
    """A directory as on the hub; returns the arrays and the configuration."""
    config = {**CONFIG, "vocab_size": len(WORDS), **(changes or {})}
    arrays = weights(np.random.default_rng(seed), config, labels)
    path.mkdir(parents=True, exist_ok=True)
    save_file(arrays, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    if vocabulary_only:
        (path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
        return arrays, config
    tokenizer = Tokenizer(
        models.WordPiece({word: k for k, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.decoder = decoders.WordPiece()
    # As in the files of sentence encoders: they are of no concern to us.
    tokenizer.enable_truncation(6)
    tokenizer.enable_padding()
    tokenizer.save(str(path / "tokenizer.json"))
    return arrays, config
