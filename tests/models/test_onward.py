"""Endings that are read on from a batch's beginnings, against whole texts that are read alone."""

import pytest

from mlx_fd.models.backend import backend
from support.architectures import make_architecture

backend()

import mlx.core as mx  # noqa: E402
from mlx import nn  # noqa: E402
from mlx.utils import tree_flatten, tree_map  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402

from mlx_fd.config import ModelOptions  # noqa: E402
from mlx_fd.models.lora import put_lora  # noqa: E402
from mlx_fd.models.merging import merged  # noqa: E402
from mlx_fd.models.onward import go_on, goes_on, keeping  # noqa: E402
from mlx_fd.models.view import find_view  # noqa: E402

BATCH = mx.array([[(37 * k + 11 * row) % 380 for k in range(20)] for row in range(3)])


def opened(folder, name):
    make_architecture(folder / name, name)
    return find_view(load_model(folder / name)[0])


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "olmo2"])
def test_endings_have_the_states_that_they_have_in_whole_texts(tmp_path, name):
    view = opened(tmp_path, name)
    assert goes_on(view)
    kept = keeping(view)
    seen = view.forward(BATCH, kept)
    assert mx.allclose(seen.final, view.forward(BATCH).final, rtol=0, atol=1e-5)
    rows, lengths = [2, 0, 0, 1], [19, 1, 8, 20]
    tails = mx.array([[(29 * k + 5 * row) % 380 for k in range(7)] for row in range(4)])
    made = go_on(view, kept, mx.array(rows), mx.array(lengths), tails)
    for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        text = mx.concatenate([BATCH[row, :length], tails[place]])[None]
        assert mx.allclose(made[place], view.forward(text).final[0, length:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["mamba2", "gpt_oss", "gemma3"])
def test_recurrences_and_windows_read_whole_texts(tmp_path, name):
    assert not goes_on(opened(tmp_path, name))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_lora_within_the_weights_has_the_gradient_of_lora(tmp_path, dropout):
    view = opened(tmp_path, "llama")
    put_lora(view.model, ModelOptions(lora_rank=16, lora_dropout=dropout))
    numbers = tree_map(
        lambda array: 0.1 * mx.random.normal(array.shape, key=mx.random.key(array.size)),
        view.model.trainable_parameters(),
    )
    view.model.update(numbers)

    def loss(tokens):
        return mx.square(view.forward(tokens).final).mean()

    def within(tokens):
        with merged(view.model):
            inside.append(type(view.blocks[0].self_attn.q_proj).__name__)
            return loss(tokens)

    inside = []
    (plain, gradient), (value, other) = (
        nn.value_and_grad(view.model, function)(BATCH) for function in (loss, within)
    )
    assert inside == ["LoRALinear" if dropout else "_Merged"]
    assert value.item() == pytest.approx(plain.item(), rel=1e-5)
    pairs = zip(tree_flatten(gradient), tree_flatten(other), strict=True)
    for (name, expected), (_, found) in pairs:
        assert mx.linalg.norm(found - expected) <= 1e-5 * mx.linalg.norm(expected), name
