"""Tiny random model directories that mlx-lm opens like any other, for tests without a network."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from mlx_fd.models.backend import backend

backend()

import mlx.core as mx  # noqa: E402
import pytest  # noqa: E402
from mlx import nn  # noqa: E402
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402
from mlx_lm.models import llama, qwen2  # noqa: E402

from mlx_fd.models.resolve import resolve  # noqa: E402

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Transformers gives every qwen2 model this normaliser and split, whatever its tokenizer.json says;
# having them here too makes the tokens the same for both architectures.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CORPUS = [
    "Tom has 3 apples and buys 5 more apples. How many apples does Tom have now?",
    "The answer is 8. First add 3 and 5, then check that the sum is right.",
    "Feedback: the second step is wrong, because 12 - 4 is 8 and not 7. Score: -0.5",
    "Feedback: every step of the answer is correct. Score: 1.0",
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many in May.",
    "You are a careful teacher. Judge the answer of the student and give feedback.",
] * 4


def make_tokenizer(vocab_size: int = 400, whole: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE tokenizer with ChatML tokens at its end, the same on every call.

    Args:
        vocab_size: tokens in all.
        whole: texts that are one token each.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=vocab_size - len(SPECIAL) - len(whole),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in whole])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return tokenizer


def write_tokenizer(
    path: Path,
    tokenizer: Tokenizer,
    *,
    eos: str = "<|im_end|>",
    chat_template: str | None = CHAT_TEMPLATE,
) -> None:
    """Write tokenizer.json and tokenizer_config.json as transformers reads them."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def make_model_dir(
    path: Path,
    *,
    arch: str = "llama",
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate: int = 128,
    vocab_size: int | None = None,
    tie: bool = True,
    seed: int = 0,
    quantize: tuple[int, int] | None = None,
    dtype: str = "float32",
    tokenizer: Tokenizer | None = None,
    eos: str = "<|im_end|>",
    chat_template: str | None = CHAT_TEMPLATE,
    **overrides: Any,
) -> Path:
    """Write a random-weight llama or qwen2 directory with a working chat tokenizer.

    Args:
        path: the directory to write (made where missing).
        arch: ``"llama"`` or ``"qwen2"`` (biases on q, k and v).
        hidden: width; a multiple of ``heads``, and of the group size when quantised.
        layers: number of blocks.
        heads: attention heads.
        kv_heads: key/value heads; divides ``heads``.
        intermediate: width of the MLP.
        vocab_size: rows of the embedding; may exceed the tokenizer's tokens (a padded
            vocabulary). ``None``: as many as the tokenizer has.
        tie: whether the embedding is the head too.
        seed: seed of the weights.
        quantize: (bits, group size) of affine quantisation, or ``None``.
        dtype: of the weights (of the scales, when quantised).
        tokenizer: another tokenizer than ``make_tokenizer()``.
        eos: the token that ends a turn.
        chat_template: the chat template; ``None`` leaves it out, as a base model does.
        **overrides: further entries of config.json (``rope_theta``, ``max_position_embeddings``).

    Returns:
        ``path``.
    """
    tokenizer = tokenizer or make_tokenizer()
    write_tokenizer(path, tokenizer, eos=eos, chat_template=chat_template)
    config: dict[str, Any] = {
        "model_type": arch,
        "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[arch]],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocab_size or tokenizer.get_vocab_size(),
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": tie,
        "eos_token_id": tokenizer.token_to_id(eos),
        **overrides,
    }
    module = {"llama": llama, "qwen2": qwen2}[arch]
    model = module.Model(module.ModelArgs.from_dict(config))
    rng = np.random.default_rng(seed)
    weights = []
    for name, value in tree_flatten(model.parameters()):
        # Norms stay near one and matrices keep their inputs' scale, so activations are like a
        # trained model's; nothing is exactly 0 or 1, so a weight in the wrong place shows.
        noise = rng.standard_normal(value.shape)
        if "norm" in name:
            noise = 1 + 0.1 * noise
        else:
            noise *= value.shape[-1] ** -0.5 if value.ndim == 2 else 0.1
        weights.append((name, mx.array(noise.astype(np.float32)).astype(getattr(mx, dtype))))
    model.update(tree_unflatten(weights))
    if quantize:
        bits, group_size = quantize
        nn.quantize(model, group_size=group_size, bits=bits)
        config["quantization"] = {"group_size": group_size, "bits": bits, "mode": "affine"}
        config["quantization_config"] = config["quantization"]
    (path / "config.json").write_text(json.dumps(config, indent=1))
    mx.save_safetensors(
        str(path / "model.safetensors"),
        dict(tree_flatten(model.parameters())),
        metadata={"format": "mlx"},
    )
    return path


def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of SmolLM2-135M-Instruct, converted once in a test session."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the session's; a worker has its own in it
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_FD_CACHE", str(folder / "mlx-fd"))
        return resolve("smollm2-135m")
