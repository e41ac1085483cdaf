"""What is found of a model is checked against what the model itself computes."""

import math

import pytest

from mlx_fd.errors import UserError
from mlx_fd.models.backend import backend
from support.architectures import config_of, make_architecture

backend()

import mlx.core as mx  # noqa: E402
from mlx import nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402

from mlx_fd.models.layer_kinds import build  # noqa: E402
from mlx_fd.models.logit_transform import DenseLogits, LinearLogits, LogitTransform  # noqa: E402
from mlx_fd.models.view import check_blocks, find_view  # noqa: E402

PLAIN = LogitTransform()
# Final hidden states, head, and what becomes of its product, read off mlx-lm's source.
EXPECTED = {
    "llama": ("model", "lm_head", PLAIN),
    "llama_tied": ("model", "model.embed_tokens", PLAIN),
    "granite": ("model", "model.embed_tokens", LogitTransform(0.25)),
    "minicpm": ("model", "lm_head", LogitTransform(0.25)),
    "falcon_h1": ("model", "model.embed_tokens", LogitTransform(0.125)),
    "muse_glimmer": ("model", "lm_head", LogitTransform(0.5, 10.0)),
    "gemma2": ("model", "model.embed_tokens", LogitTransform(1.0, 10.0)),
    "nanochat": ("transformer", "lm_head", LogitTransform(1.0, 15.0)),
    "gemma3": ("language_model.model", "language_model.lm_head", PLAIN),
    "gpt_oss": ("model", "lm_head", PLAIN),
    "deepseek_v2": ("model", "lm_head", PLAIN),
    "qwen3_5": ("language_model.model", "language_model.model.embed_tokens", PLAIN),
    "nemotron_h": ("backbone", "lm_head", PLAIN),
    "mamba2": ("backbone", "backbone.embeddings", PLAIN),
    "rwkv7": ("model", "lm_head", PLAIN),  # its blocks return tuples
    "llama4_text": ("model", "output", PLAIN),
    "gpt2": ("model", "model.wte", PLAIN),  # its blocks are in model.h
    "gpt_neox": ("model.final_layer_norm", "model.embed_out", PLAIN),
    "afm7": ("model", "model.embedding", PLAIN),  # its blocks are in two lists
}
TOKENS = mx.array([[7 * i % 380 for i in range(9)], [(5 * i + 3) % 380 for i in range(9)]])


@pytest.fixture(scope="session")
def opened(tmp_path_factory):
    """Opens a small random model by its architecture, anew each time."""
    folder = tmp_path_factory.mktemp("architectures")

    def open_model(name):
        path = folder / name
        if not path.exists():
            make_architecture(path, name)
        return load_model(path)[0]

    return open_model


def dotted(path):
    return ".".join(map(str, path))


def distance(a, b):
    return mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max().item()


@pytest.mark.parametrize("name", EXPECTED)
def test_the_parts_of_a_model_are_found(opened, name):
    model = opened(name)
    final, head, transform = EXPECTED[name]
    view = find_view(model)
    assert (dotted(view.final_path), dotted(view.head_path)) == (final, head)
    assert view.transform == transform
    assert len(view.blocks) == len(model.layers)
    assert all(a is b for a, b in zip(view.blocks, model.layers, strict=True))
    assert (view.width, view.rows) == (64, model(TOKENS).shape[-1])


@pytest.mark.parametrize("name", EXPECTED)
def test_hidden_states_make_the_models_own_logits(opened, name):
    model = opened(name)
    view = find_view(model)
    wanted = model(TOKENS)
    seen, logits = view.forward_with_logits(TOKENS)
    assert mx.array_equal(logits, wanted)
    assert len(seen.layers) == len(model.layers) + 1
    assert {layer.shape for layer in (*seen.layers, seen.final)} == {(2, 9, 64)}
    head = view.head
    assert isinstance(head, LinearLogits)
    product = head.module.as_linear if hasattr(head.module, "as_linear") else head.module
    assert distance(head.transform.apply(product(seen.final)), wanted) < 1e-4
    rows = view.logits(seen.final.reshape(-1, 64))
    assert distance(rows.reshape(wanted.shape), wanted) < 1e-5


def test_the_first_states_are_the_embeddings_and_each_is_the_next_blocks_input(opened):
    model = opened("llama")
    seen = find_view(model).forward(TOKENS)
    assert mx.array_equal(seen.layers[0], model.model.embed_tokens(TOKENS))
    for block, before, after in zip(model.layers, seen.layers, seen.layers[1:], strict=False):
        assert mx.array_equal(block(before, "causal"), after)
    assert mx.array_equal(model.model.norm(seen.layers[-1]), seen.final)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("name", ["granite", "muse_glimmer", "gemma2", "gemma3", "falcon_h1"])
def test_rounding_of_half_precision_hides_neither_scale_nor_cap(opened, name, dtype):
    model = opened(name)
    model.set_dtype(dtype)
    view = find_view(model)
    assert dotted(view.head_path) == EXPECTED[name][1]
    assert view.transform.soft_cap == EXPECTED[name][2].soft_cap
    assert math.isclose(view.transform.scale, EXPECTED[name][2].scale, rel_tol=1e-3)


@pytest.mark.parametrize("name", ["llama", "granite", "gemma2"])
def test_a_quantised_head_is_found(opened, name):
    model = opened(name)
    nn.quantize(model, group_size=32, bits=4)
    view = find_view(model)
    assert view.transform == EXPECTED[name][2]
    assert dotted(view.head_path) == EXPECTED[name][1]


@pytest.mark.parametrize("scale", [1 / 6, 0.7, 12.0, 0.0123, -2.0])
@pytest.mark.parametrize("cap", [None, 30.0, 7.3, 100.0])
def test_any_scale_and_cap_is_found(opened, scale, cap):
    model = opened("llama")
    kind = type(model)

    class Changed(kind):
        def __call__(self, *args, **kwargs):
            return LogitTransform(scale, cap).apply(super().__call__(*args, **kwargs))

    model.__class__ = Changed
    transform = find_view(model).transform
    assert math.isclose(transform.scale, scale, rel_tol=1e-5)
    assert transform.soft_cap == cap


def test_what_is_no_scale_and_no_cap_is_left_to_the_model(opened):
    model = opened("llama")
    kind = type(model)

    class Bent(kind):
        def __call__(self, *args, **kwargs):
            logits = super().__call__(*args, **kwargs)
            logits[..., 5] = -float("inf")
            return logits * mx.abs(logits)

    model.__class__ = Bent
    view = find_view(model)
    head = view.head
    assert isinstance(head, DenseLogits)
    assert head.rows == view.rows
    wanted = model(TOKENS)
    made = head.call(view.forward(TOKENS).final.reshape(-1, 64)).reshape(wanted.shape)
    assert mx.array_equal(made[..., 5], wanted[..., 5])
    assert mx.array_equal(made, wanted)


def test_a_biased_head_whose_product_alone_is_scaled_is_left_to_the_model(opened):
    model = opened("llama")
    model.lm_head.bias = mx.random.normal(model.lm_head.weight.shape[:1])
    assert find_view(model).transform == PLAIN
    kind = type(model)

    class Unbiased(kind):
        def __call__(self, *args, **kwargs):
            bias = self.lm_head.bias
            return (super().__call__(*args, **kwargs) - bias) / 4 + bias

    model.__class__ = Unbiased
    assert isinstance(find_view(model).head, DenseLogits)


def test_a_head_with_the_embeddings_numbers_is_told_from_them(opened):
    """Where both are learned they part."""
    model = opened("llama")
    model.lm_head.weight = mx.array(model.model.embed_tokens.weight)
    assert find_view(model).head_path == ("lm_head",)
    tied = opened("llama_tied")
    tied.lm_head = nn.Linear(64, tied.model.embed_tokens.weight.shape[0], bias=False)
    tied.lm_head.weight = mx.array(tied.model.embed_tokens.weight)
    assert find_view(tied).head_path == ("model", "embed_tokens")


def test_finding_leaves_the_model_and_the_random_numbers_alone(opened):
    model = opened("qwen3_5")
    before = [name for name, _ in tree_flatten(model.parameters())]
    blocks = [id(block) for block in model.layers]
    mx.random.seed(3)
    wanted = mx.random.normal((4,))
    mx.random.seed(3)
    find_view(model)
    assert mx.array_equal(mx.random.normal((4,)), wanted)
    assert [name for name, _ in tree_flatten(model.parameters())] == before
    assert [id(block) for block in model.layers] == blocks


def test_gradients_are_those_of_the_models_own_logits(opened):
    model = opened("granite")
    view = find_view(model)

    def by_view(params):
        model.update(params)
        return (
            view.transform.apply(
                model.model.embed_tokens.as_linear(view.forward(TOKENS, recompute=True).final)
            )
            .square()
            .sum()
        )

    def by_model(params):
        model.update(params)
        return model(TOKENS).square().sum()

    ours, theirs = (dict(tree_flatten(mx.grad(f)(model.parameters()))) for f in (by_view, by_model))
    for name, grad in theirs.items():
        assert distance(ours[name], grad) <= 1e-3 * mx.abs(grad).max().item(), name


@pytest.mark.parametrize("name", EXPECTED)
def test_blocks_are_checked_without_a_weight(name):
    """At a size that no machine here could hold: nothing is computed."""
    sizes = {} if "text_config" in config_of(name) else {"vocab_size": 10**9}
    model = build({**config_of(name), **sizes})
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    check_blocks(model)
    assert mx.get_peak_memory() - before < 1e6


def test_what_shapes_show_is_refused_without_a_weight():
    with pytest.raises(UserError, match="iquestloopcoder models: their blocks are not run one"):
        check_blocks(build(config_of("iquestloopcoder")))


@pytest.mark.parametrize("name", ["llama", "afm7", "gemma3n", "gemma4", "rwkv7", "qwen3_5"])
def test_blocks_run_again_give_the_same_gradient(opened, name):
    """Also where later blocks read what earlier ones left in a cache, or returned beside."""
    model = opened(name)
    view = find_view(model)

    def gradient(recompute):
        def loss(params):
            model.update(params)
            return view.forward(TOKENS, recompute=recompute).final.square().sum()

        return dict(tree_flatten(mx.grad(loss)(model.trainable_parameters())))

    once, again = gradient(False), gradient(True)
    assert any(mx.abs(grad).max().item() > 0 for grad in once.values())
    for key, grad in once.items():
        assert distance(again[key], grad) <= 1e-4 * (1 + mx.abs(grad).max().item()), key


def test_blocks_that_do_not_run_one_after_the_other_are_refused(opened):
    with pytest.raises(UserError, match="iquestloopcoder models: their blocks"):
        find_view(opened("iquestloopcoder"))
