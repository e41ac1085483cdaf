"""A model that is not what it was taken for is caught as it is loaded."""

import dataclasses

import pytest

from mlx_fd.config import ModelOptions
from mlx_fd.errors import UserError
from mlx_fd.feedback.pair import load_pair
from mlx_fd.models.backend import backend
from support import sweep
from support.architectures import VOCAB, make_architecture
from support.pairs import make_plan

backend()

import mlx.core as mx  # noqa: E402
from mlx_lm.generate import generate_step  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402

from mlx_fd.models.checking import check_model, check_recompute  # noqa: E402
from mlx_fd.models.conversation import Conversation, rewind  # noqa: E402
from mlx_fd.models.generation import generate  # noqa: E402
from mlx_fd.models.loading import load  # noqa: E402
from mlx_fd.models.logit_transform import DenseLogits  # noqa: E402
from mlx_fd.models.student import make_student  # noqa: E402
from mlx_fd.models.view import find_view  # noqa: E402
from mlx_fd.models.writing import GenerateOptions, Sampling  # noqa: E402
from mlx_fd.training.session import open_run  # noqa: E402

PROMPTS = ((5, 9, 3), tuple(range(20, 42)), (7, 8, 30, 31, 2))


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    """A small random model's directory, by its architecture."""
    folder = tmp_path_factory.mktemp("checked")

    def path_of(name, **overrides):
        path = folder / "-".join([name, *map(str, overrides.values())])
        return path if path.exists() else make_architecture(path, name, **overrides)

    return path_of


def changed(model, call):
    """The model with another ``__call__``, which is given its own."""
    kind = type(model)
    own = kind.__call__
    model.__class__ = type(
        kind.__name__, (kind,), {"__call__": lambda self, *a, **k: call(self, own, *a, **k)}
    )
    return model


def mixed_rows(at_size, with_cache):
    """A ``__call__`` that gives each row what is another's where a batch has some size."""

    def call(self, own, tokens, cache=None, *rest):
        out = own(self, tokens, cache, *rest)
        wrong = len(tokens) == at_size and (cache is not None) == with_cache
        return mx.roll(out, 1, axis=0) if wrong else out

    return call


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize(
    "name", ["llama", "granite", "gemma3", "qwen3_5", "mamba2", "muse_glimmer"]
)
def test_a_right_model_reads_and_writes_in_batches(directory, name, dtype):
    model, _ = load_model(directory(name))
    model.set_dtype(dtype)
    view, writes = check_model(find_view(model), VOCAB)
    assert view.batched and writes


# A batch of two fails loudly in a Gemma 2 with four key heads, and silently in one with two.
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("gemma2", {"num_key_value_heads": 2}),
        ("gemma2", {"num_key_value_heads": 4, "num_attention_heads": 8}),
        ("mamba", {}),
        ("jamba", {}),
        ("nemotron_h", {}),
        ("llama4", {}),
    ],
)
def test_a_model_that_mlx_lm_does_not_batch_right_is_written_alone(directory, name, overrides):
    loaded = load(directory(name, **overrides))
    assert not loaded.batched
    assert loaded.view.batched


def test_a_run_says_once_what_takes_longer(directory, tmp_path):
    expert, student = directory("gemma2", num_key_value_heads=2), directory("llama")
    said = []
    open_run(tmp_path / "run", make_plan(expert, student), said.append, new=True)
    assert [event.text for event in said if "at a time" in str(event)] == [
        f"{expert.name} is written one conversation at a time, which takes longer: in mlx-lm's "
        "batches its replies would be others"
    ]


@pytest.mark.parametrize("name", ["llama", "gemma2", "llama4", "mamba", "nemotron_h", "qwen3_5"])
def test_two_turns_are_those_of_each_conversation_alone(directory, name):
    """Greedily, as mlx-lm writes each of them from its tokens."""
    loaded = load(directory(name))
    loaded.tokenizer.eos_token_ids = {VOCAB - 1}
    sampling = Sampling(7)
    first = generate(loaded, [Conversation()] * 3, PROMPTS, sampling)
    second = generate(loaded, [turn.conversation for turn in first], PROMPTS[::-1], sampling)

    def alone(tokens):
        steps = generate_step(
            mx.array(tokens),
            loaded.model,
            max_tokens=7,
            sampler=lambda logprobs: mx.argmax(logprobs[..., : loaded.vocab], axis=-1),
        )
        written = [token for token, _ in steps]
        end = written.index(VOCAB - 1) + 1 if VOCAB - 1 in written else 7
        return tuple(written[:end])

    for turn, prompt in zip(first, PROMPTS, strict=True):
        assert turn.tokens == alone(prompt)
    for turn, old, prompt in zip(second, first, PROMPTS[::-1], strict=True):
        assert turn.tokens == alone([*old.conversation.tokens, *prompt])
        assert turn.prefilled == len(prompt)


@pytest.mark.parametrize("name", ["llama", "qwen3_5"])
def test_alone_is_as_in_a_batch(directory, name):
    """Texts, log-probabilities, penalties, caches and marks, where a model can do both."""
    both = load(directory(name))
    sampling = Sampling(6, repetition_penalty=1.3)
    options = GenerateOptions(logprobs=True, mark=True)
    counted = []
    for loaded in (both, dataclasses.replace(both, batched=False)):
        ticks = []
        options = dataclasses.replace(options, on_token=ticks.append)
        first = generate(loaded, [Conversation()] * 3, PROMPTS, sampling, options)
        again = [
            rewind(turn.conversation, len(p) - 1) for turn, p in zip(first, PROMPTS, strict=True)
        ]
        assert all(one.cache is not None for one in again)
        ends = [prompt[-1:] for prompt in PROMPTS]
        second = generate(loaded, [turn.conversation for turn in first], PROMPTS, sampling, options)
        third = generate(loaded, again, ends, sampling, options)
        counted.append(((*first, *second, *third), sum(ticks)))
    (batch, ticks), (alone, ticks_alone) = counted
    assert ticks == ticks_alone
    for a, b in zip(batch, alone, strict=True):
        assert (a.tokens, a.finished, a.prefilled) == (b.tokens, b.finished, b.prefilled)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert [turn.tokens for turn in alone[6:]] == [turn.tokens for turn in alone[:3]]


def test_drawn_tokens_alone_are_those_of_their_seed(directory):
    loaded = dataclasses.replace(load(directory("llama")), batched=False)
    sampling = Sampling(12, temperature=1.0, seed=4)
    one, two = (generate(loaded, [Conversation()] * 3, PROMPTS, sampling) for _ in range(2))
    assert [turn.tokens for turn in one] == [turn.tokens for turn in two]
    other = generate(loaded, [Conversation()] * 3, PROMPTS, dataclasses.replace(sampling, seed=5))
    assert [turn.tokens for turn in one] != [turn.tokens for turn in other]


def test_a_head_that_is_scaled_after_the_fact_is_caught(directory):
    model, _ = load_model(directory("llama"))
    view = find_view(model)
    check_model(view, VOCAB)
    changed(model, lambda self, own, *a, **k: own(self, *a, **k) * 1.25)
    with pytest.raises(UserError, match="not what its head makes of its hidden states"):
        check_model(view, VOCAB)


@pytest.mark.parametrize("size", [2, 4])
def test_batching_that_is_broken_by_hand_is_caught(directory, size):
    """At two rows, and where there are as many rows as key heads."""
    path = directory("llama", num_key_value_heads=4, num_attention_heads=4)
    model = changed(load_model(path)[0], mixed_rows(size, with_cache=True))
    view, writes = check_model(find_view(model), VOCAB)
    assert view.batched and not writes


@pytest.mark.parametrize("size", [2, 4])
def test_texts_are_read_one_by_one_where_a_batch_mixes_them_up(directory, size):
    path = directory("llama", num_key_value_heads=4, num_attention_heads=4)
    model = load_model(path)[0]
    right = find_view(model)
    tokens = mx.array([[11 * row + column for column in range(6)] for row in range(size)])
    wanted = right.forward(tokens)
    changed(model.model, mixed_rows(size, with_cache=False))
    view, writes = check_model(find_view(model), VOCAB)
    assert writes and not view.batched
    assert not mx.allclose(right.forward(tokens).final, wanted.final, atol=1e-2)
    seen = view.forward(tokens)
    for ours, theirs in zip(
        (*seen.layers, seen.final), (*wanted.layers, wanted.final), strict=True
    ):
        assert mx.allclose(ours, theirs, atol=1e-4)


def test_a_model_that_forgets_its_cache_is_refused(directory):
    model, _ = load_model(directory("llama"))
    changed(model, lambda self, own, tokens, cache=None: own(self, tokens))
    with pytest.raises(UserError, match="other logits where a text is read in pieces"):
        check_model(find_view(model), VOCAB)


def test_a_refusal_names_the_directory(directory):
    path = directory("iquestloopcoder")
    with pytest.raises(UserError, match=str(path)):
        load(path)


def test_keys_that_layers_share_are_there_whenever_a_text_is_read(directory):
    """Without a cache mlx-lm's Gemma 3n gives other logits than it writes with."""
    loaded = load(directory("gemma3n"))
    tokens = mx.array([[(29 * place + 5) % 380 for place in range(40)]])
    written = loaded.model(tokens, cache=make_prompt_cache(loaded.model))
    assert mx.abs(written - loaded.model(tokens)).max().item() > 1
    assert loaded.view.needs_cache
    made = loaded.view.forward_with_logits(tokens)[1]
    assert mx.abs(made - written).max().item() < 1e-3
    assert not load(directory("gemma4")).view.needs_cache


def test_a_block_that_is_asked_for_its_kind_has_it_while_it_is_watched(directory):
    """OLMo Hybrid chooses a block's mask by isinstance."""
    loaded = load(directory("olmo_hybrid"))
    tokens = mx.array([[(29 * place + 5) % 380 for place in range(40)]])
    made = loaded.view.forward_with_logits(tokens)[1]
    assert mx.abs(made - loaded.model(tokens)).max().item() < 1e-3


def test_recomputing_that_would_teach_something_else_is_refused(directory):
    for name in ("llama", "gemma4", "qwen3_5", "gemma3n", "afm7"):
        check_recompute(load(directory(name)).view)
    model, _ = load_model(directory("llama"))
    left, last = [], model.layers[-1]

    def leave(self, own, hidden, *args, **kwargs):
        out = own(self, hidden, *args, **kwargs)
        left.append(out)
        return out + left[0] if self is last else out

    for block in model.layers:
        changed(block, leave)

    def forget(self, own, *args, **kwargs):
        left.clear()
        return own(self, *args, **kwargs)

    view = find_view(changed(model, forget))
    with pytest.raises(UserError, match="--grad-checkpoint would teach"):
        check_recompute(view)


def test_logits_that_only_the_model_can_make_are_learned_from(directory):
    """Neither a scale nor a cap: losses and gradient are those of the model's own logits."""
    pair = load_pair(directory("llama"), directory("llama", seed=2), lora_rank=2)
    for model in (pair.expert.model, pair.student.model):
        changed(model, lambda self, own, *a, **k: own(self, *a, **k) ** 3 / 9)
    views = [find_view(model) for model in (pair.expert.model, pair.student.model)]
    assert all(isinstance(view.head, DenseLogits) for view in views)
    pair.student.view = views[1]
    pair = dataclasses.replace(
        pair,
        expert=dataclasses.replace(pair.expert, view=views[0]),
        student_lm=dataclasses.replace(pair.student_lm, view=views[1]),
    )
    sweep.check_gradient(pair, sweep.samples_of(pair))
    with pytest.raises(UserError, match="--train full needs a head that is one linear layer"):
        make_student(views[1], 64, ModelOptions(train="full"), 0)
