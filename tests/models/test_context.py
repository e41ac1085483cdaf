"""How many tokens a model was made to read, whatever its configuration calls that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_fd.models.context import context_length
from support.architectures import config_of


@pytest.mark.parametrize(
    ("name", "entries", "length"),
    [
        ("gpt2", {"n_positions": 64, "n_ctx": 64}, 64),
        ("gpt2", {"n_positions": 64, "n_ctx": 1024}, 64),
        ("gpt_bigcode", {"n_positions": 64}, 64),
        ("llama", {"max_position_embeddings": 300}, 300),
        ("llama", {"max_position_embeddings": None}, None),
        ("qwen", {"max_position_embeddings": 32768, "seq_length": 8192}, 8192),
        ("llama", {"max_position_embeddings": 300, "max_seq_len": 200}, 200),
        ("llama", {"max_position_embeddings": None, "max_sequence_length": 200}, 200),
        ("llama", {"max_position_embeddings": None, "max_context_length": 200}, 200),
        ("llama", {"max_position_embeddings": 300, "n_ctx": None, "seq_length": -1}, 300),
    ],
)
def test_the_least_that_is_said_counts(
    tmp_path: Path, name: str, entries: dict[str, Any], length: int | None
) -> None:
    config = {**config_of(name), **entries}
    if name.startswith("gpt"):
        config.pop("max_position_embeddings", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert context_length(tmp_path) == length
