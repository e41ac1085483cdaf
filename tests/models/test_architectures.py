"""Every architecture of mlx-lm that a person may bring, as a small random model."""

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model

from mlx_fd.config import ModelOptions
from mlx_fd.feedback.pair import load_pair
from support import sweep
from support.architectures import ARCHITECTURES, VOCAB, make_architecture

TOKENS = mx.array([[(7 * place + 3) % 380 for place in range(40)]])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_mlx_lm_opens_it_and_its_logits_are_far_from_flat(name, tmp_path):
    model, _ = load_model(make_architecture(tmp_path, name), lazy=True)
    logits = model(TOKENS)[0].astype(mx.float32)
    assert logits.shape == (40, VOCAB)
    spread = mx.sqrt(mx.var(logits, axis=-1)).min().item()
    assert 0.3 < spread < 10


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_right(name, tmp_path):
    expert = make_architecture(tmp_path / "expert", name)
    student = make_architecture(tmp_path / "student", name, seed=2)
    pair = load_pair(expert, student, lora_rank=2)
    sweep.check_generation(pair.expert)
    sweep.check_gradient(pair)
    sweep.check_update(pair)
    sweep.check_export(pair, tmp_path, ModelOptions(lora_rank=2))
