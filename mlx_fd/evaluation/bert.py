"""BERT in MLX (Devlin et al., 2019, arXiv 1810.04805), and how its checkpoints are read.

Everything is float32: these models are small, and their numbers are compared across machines.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from mlx_fd.errors import UserError
from mlx_fd.models.backend import backend
from mlx_fd.models.loading import check_weights
from mlx_fd.models.storage import read_json

_ACTIVATIONS = {"gelu": nn.gelu, "gelu_new": nn.gelu_approx, "relu": nn.relu}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
)
# From the names in checkpoints to ours; older checkpoints call a norm's weight gamma.
_RENAMED = tuple(
    (re.compile(pattern), renamed)
    for pattern, renamed in (
        (r"^bert\.", ""),
        (r"^embeddings\.word_embeddings", "words"),
        (r"^embeddings\.position_embeddings", "positions"),
        (r"^embeddings\.token_type_embeddings", "segments"),
        (r"^embeddings\.LayerNorm", "norm"),
        (r"^encoder\.layer\.", "layers."),
        (r"\.attention\.self\.", "."),
        (r"\.attention\.output\.dense", ".attended"),
        (r"\.attention\.output\.LayerNorm", ".attention_norm"),
        (r"\.intermediate\.dense", ".up"),
        (r"\.output\.dense", ".down"),
        (r"\.output\.LayerNorm", ".norm"),
        (r"^pooler\.dense", "pooler"),
        (r"gamma$", "weight"),
        (r"beta$", "bias"),
    )
)


class _Block(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        eps = config.get("layer_norm_eps", 1e-12)
        self.heads = config["num_attention_heads"]
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.attended = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self._activation = _ACTIVATIONS[config.get("hidden_act", "gelu")]

    def __call__(self, hidden: mx.array, mask: mx.array) -> mx.array:
        batch, length, width = hidden.shape

        def split(projected: mx.array) -> mx.array:
            return projected.reshape(batch, length, self.heads, -1).transpose(0, 2, 1, 3)

        mixed = mx.fast.scaled_dot_product_attention(
            *(split(project(hidden)) for project in (self.query, self.key, self.value)),
            scale=(width // self.heads) ** -0.5,
            mask=mask,
        )
        mixed = self.attended(mixed.transpose(0, 2, 1, 3).reshape(batch, length, width))
        hidden = self.attention_norm(hidden + mixed)
        out: mx.array = self.norm(hidden + self.down(self._activation(self.up(hidden))))
        return out


class Bert(nn.Module):
    """BERT's embeddings and blocks, and with ``labels`` a classifier over the first token.

    Args:
        config: the checkpoint's ``config.json``.
        labels: how many the classifier knows; 0: there is none.
    """

    def __init__(self, config: dict[str, Any], labels: int = 0):
        super().__init__()
        width = config["hidden_size"]
        self.words = nn.Embedding(config["vocab_size"], width)
        self.positions = nn.Embedding(config["max_position_embeddings"], width)
        self.segments = nn.Embedding(config.get("type_vocab_size", 2), width)
        self.norm = nn.LayerNorm(width, eps=config.get("layer_norm_eps", 1e-12))
        self.layers = [_Block(config) for _ in range(config["num_hidden_layers"])]
        if labels:
            self.pooler, self.classifier = nn.Linear(width, width), nn.Linear(width, labels)

    def __call__(self, tokens: mx.array, mask: mx.array, layers: int | None = None) -> mx.array:
        """Hidden states behind the first ``layers`` blocks, of all by default.

        Args:
            tokens: ids, (batch, length), one segment each.
            mask: true where there is a token and no padding, (batch, length).
            layers: from 0 (the embeddings) on.

        Returns:
            (batch, length, width); what it holds at padding means nothing.
        """
        hidden: mx.array = self.norm(
            self.words(tokens) + self.positions.weight[: tokens.shape[1]] + self.segments.weight[0]
        )
        for block in self.layers[:layers]:
            hidden = block(hidden, mask[:, None, None, :])
        return hidden

    def classify(self, tokens: mx.array, mask: mx.array) -> mx.array:
        """The classifier's logits, (batch, labels)."""
        logits: mx.array = self.classifier(mx.tanh(self.pooler(self(tokens, mask)[:, 0])))
        return logits


# ---------------------------------------------------------------------------------------- loading


def load_model(path: Path, classifier: bool) -> tuple[Bert, dict[str, Any]]:
    """A BERT of a directory with config.json and model*.safetensors, in float32.

    Args:
        path: the directory.
        classifier: whether its sequence-classification head is loaded too; it must have one.

    Returns:
        The model, and its configuration.

    Raises:
        UserError: it is another architecture, or files are missing or damaged.
    """
    backend()
    config = read_json(path / "config.json")
    if config.get("model_type") != "bert":
        raise UserError(
            f"{path} is of type {config.get('model_type')!r}; only BERT encoders ('bert') are read"
        )
    for key in _SIZES:
        if not isinstance(config.get(key), int) or config[key] < 1:
            raise UserError(f"{path}/config.json has no {key}")
    if config["hidden_size"] % config["num_attention_heads"]:
        raise UserError(f"{path}/config.json: hidden_size is no multiple of num_attention_heads")
    if classifier and not _numbered(config.get("id2label", {"0": ""})):
        raise UserError(f"{path}/config.json: id2label does not number the labels from 0")
    for key, supported in (
        ("hidden_act", tuple(_ACTIVATIONS)),
        ("position_embedding_type", ("absolute",)),
    ):
        if config.get(key, supported[0]) not in supported:
            raise UserError(
                f"{path}/config.json: {key} {config[key]!r} is not {', '.join(supported)}"
            )
    model = Bert(config, len(label_names(config)) if classifier else 0)
    try:
        model.load_weights(_weights(path, model), strict=True)
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"the weights in {path} cannot be loaded: {error}") from error
    check_weights(path, model)
    return model, config


def _weights(path: Path, model: Bert) -> list[tuple[str, mx.array]]:
    """The arrays of the checkpoint that the model has a place for, under our names."""
    names = {name for name, _ in tree_flatten(model.parameters())}
    renamed: list[tuple[str, mx.array]] = []
    for file in sorted(path.glob("model*.safetensors")):
        arrays = mx.load(str(file))
        assert isinstance(arrays, dict)  # what safetensors hold
        renamed += [(_our_name(name), array) for name, array in arrays.items()]
    return [(name, array) for name, array in renamed if name in names]


def _our_name(name: str) -> str:
    for pattern, renamed in _RENAMED:
        name = pattern.sub(renamed, name)
    return name


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of tokenizer.json, or of vocab.txt where there is none.

    Raises:
        UserError: there is neither, or it cannot be read.
    """
    from tokenizers import BertWordPieceTokenizer, Tokenizer

    file, vocabulary = path / "tokenizer.json", path / "vocab.txt"
    try:
        if file.exists():
            tokenizer: Any = Tokenizer.from_file(str(file))
        elif vocabulary.exists():
            lowercase = read_json(path / "tokenizer_config.json").get("do_lower_case", True)
            tokenizer = BertWordPieceTokenizer(str(vocabulary), lowercase=bool(lowercase))
        else:
            raise UserError(f"{path} has no tokenizer.json and no vocab.txt")
    except UserError:
        raise
    except Exception as error:  # tokenizers raises the bare class
        raise UserError(f"the tokenizer in {path} cannot be read: {error}") from error
    # What a file says of truncation and padding belongs to the job that it was saved in.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _numbered(names: Any) -> bool:
    return isinstance(names, dict) and {*names} == {str(k) for k in range(len(names))} != set()


def label_names(config: dict[str, Any]) -> list[str]:
    """The labels of a classifier, in the order of its logits."""
    names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    return [str(names[key]) for key in sorted(names, key=int)]
