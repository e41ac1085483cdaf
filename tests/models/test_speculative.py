"""A draft changes how many steps a text takes, and nothing in it."""

import dataclasses
import math

import mlx.core as mx
import pytest

from mlx_fd import problems
from mlx_fd.errors import UserError
from mlx_fd.models.conversation import Conversation, without_repeated_eos
from mlx_fd.models.generation import first_prompt, followup_prompt, generate
from mlx_fd.models.loading import Draft, load
from mlx_fd.models.metering import WRITING, metered
from mlx_fd.models.resolve import resolve
from mlx_fd.models.speculative import check_draft
from mlx_fd.models.writing import GenerateOptions, Sampling, Text, write
from mlx_fd.problems.kinds import form_of
from mlx_fd.problems.prompts import answer_prompt
from support.architectures import make_architecture
from support.draws import ALL
from support.tiny import make_model_dir

ALONE = GenerateOptions(reuse=False)
GREEDY = Sampling(48)


@pytest.fixture(scope="module")
def expert():
    return load(resolve("tiny"))


@pytest.fixture(scope="module")
def student(expert):
    """The tiny student, which reads the expert's tokens."""
    return dataclasses.replace(load(resolve("tiny-student")), tokenizer=expert.tokenizer)


@pytest.fixture(scope="module")
def prompts(expert):
    found = problems.load("arithmetic", "test").problems[: 40 if ALL else 4]
    return [first_prompt(expert, answer_prompt(one.question, form_of(one))) for one in found]


def with_draft(loaded, draft, tokens=4):
    return dataclasses.replace(loaded, draft=Draft(draft, tokens))


def turns_of(loaded, prompts, sampling, options=ALONE):
    return generate(loaded, [Conversation()] * len(prompts), prompts, sampling, options)


def tokens_of(turns):
    return [turn.tokens for turn in turns]


@pytest.mark.parametrize(("tokens", "penalty"), [(1, 1.0), (4, 1.0), (9, 1.0), (4, 1.3)])
def test_greedy_texts_are_the_same_token_for_token(expert, student, prompts, tokens, penalty):
    sampling = Sampling(48, repetition_penalty=penalty)
    plain = turns_of(expert, prompts, sampling)
    drafted = turns_of(with_draft(expert, student, tokens), prompts, sampling)
    assert tokens_of(drafted) == tokens_of(plain)
    assert [one.finished for one in drafted] == [one.finished for one in plain]
    assert [one.text for one in drafted] == [one.text for one in plain]
    assert all(one.accepted is None for one in plain)
    assert all(0 < one.accepted < one.written for one in drafted)


@pytest.mark.parametrize("most", range(1, 8))
def test_no_text_is_longer_than_it_may_be(expert, student, prompts, most):
    found = turns_of(with_draft(expert, student, 3), prompts[:2], Sampling(most))
    assert tokens_of(found) == tokens_of(turns_of(expert, prompts[:2], Sampling(most)))
    assert {len(one.tokens) for one in found} == {most}
    assert all(one.accepted <= most - math.ceil(most / 4) for one in found)


@pytest.mark.parametrize("place", range(6))
def test_a_text_ends_at_any_place_of_what_was_proposed(expert, student, prompts, place):
    """The cache that is kept holds what was written, and nothing that was proposed beyond it."""
    [whole] = turns_of(expert, prompts[:1], GREEDY)
    ends = frozenset(whole.tokens[place : place + 1])
    first = whole.tokens.index(whole.tokens[place])
    loaded = with_draft(expert, student)
    [turn] = write(loaded, [Text(Conversation(), prompts[0], GREEDY, GenerateOptions(), ends)])
    assert turn.tokens == whole.tokens[: first + 1]
    assert turn.finished and turn.accepted <= len(turn.tokens)
    tokens = (*prompts[0], *turn.tokens)
    assert turn.conversation.tokens == tokens
    assert {layer.offset for layer in turn.conversation.cache} == {len(tokens)}
    [last] = [layer.keys[..., : len(tokens), :] for layer in turn.conversation.cache[-1:]]
    fresh = generate(expert, [Conversation()], [tokens], Sampling(1))[0].conversation.cache[-1]
    assert mx.allclose(last, fresh.keys[..., : len(tokens), :], atol=1e-4)


def test_a_conversation_goes_on_from_what_is_kept(expert, student, prompts):
    loaded, before, plainly = with_draft(expert, student), Conversation(), Conversation()
    for text in (None, "Are you sure?", "Why?"):
        request = prompts[0] if text is None else followup_prompt(expert, text)
        kept = [layer.offset for layer in before.cache or ()]
        [turn] = generate(loaded, [before], [without_repeated_eos(before, request)], GREEDY)
        assert [layer.offset for layer in before.cache or ()] == kept
        [plain] = generate(expert, [plainly], [without_repeated_eos(plainly, request)], GREEDY)
        assert (turn.tokens, turn.prefilled) == (plain.tokens, plain.prefilled)
        assert turn.accepted is not None
        before, plainly = turn.conversation, plain.conversation
    assert {layer.offset for layer in before.cache} == {len(before.tokens)}


@pytest.mark.parametrize(
    ("batched", "more"),
    [
        (True, {}),
        (True, {"top_p": 0.9, "top_k": 20}),
        (True, {"repetition_penalty": 1.2}),
        (False, {"repetition_penalty": 1.2}),
    ],
)
def test_one_seed_is_one_text_with_a_draft_or_without(expert, student, prompts, batched, more):
    """The second text depends on how many random numbers the first one took."""
    alone = dataclasses.replace(expert, batched=batched)
    sampling = Sampling(24, 3.0, seed=7, **more)
    plain = turns_of(alone, prompts[:2], sampling)
    drafted = turns_of(with_draft(alone, student), prompts[:2], sampling)
    assert tokens_of(drafted) == tokens_of(plain)
    assert sum(turn.accepted for turn in drafted) > 0
    other = dataclasses.replace(sampling, seed=8)
    assert tokens_of(turns_of(with_draft(alone, student), prompts[:2], other)) != tokens_of(plain)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_writer_accepts_all_that_it_proposes_itself(expert, prompts, temperature):
    """Drawn by lot, too: both take the same random numbers."""
    sampling = Sampling(48, temperature, seed=3)
    with metered({"expert": expert.view}) as meter:
        drafted = turns_of(with_draft(expert, expert), prompts, sampling)
    assert tokens_of(drafted) == tokens_of(turns_of(expert, prompts, sampling))
    for turn in drafted:
        # Each step of five tokens has one that nobody proposed, but a last one that was cut off.
        assert turn.written - turn.accepted in (turn.written // 5, math.ceil(turn.written / 5))
    # A draft's step for each proposed token, and one for each five that are tried.
    blocks = sum(math.ceil(turn.written / 5) for turn in drafted)
    assert meter.steps[WRITING, "expert"] <= 5 * blocks
    # Both of them read the prompts.
    assert meter.read[WRITING, "expert"] == 2 * sum(len(prompt) - 1 for prompt in prompts)


def test_a_draft_that_knows_nothing_is_rarely_accepted(tmp_path):
    sizes = {"layers": 2, "hidden": 32, "heads": 2, "kv_heads": 1}
    one, two = (load(make_model_dir(tmp_path / str(seed), seed=seed, **sizes)) for seed in (0, 5))
    texts = [first_prompt(one, text) for text in ("How many apples?", "Tom has 3.", "Why?")]
    plain = turns_of(one, texts, Sampling(40, 1.0, seed=1))
    drafted = turns_of(with_draft(one, two), texts, Sampling(40, 1.0, seed=1))
    assert tokens_of(drafted) == tokens_of(plain)
    assert sum(turn.accepted for turn in drafted) < 0.3 * sum(turn.written for turn in drafted)


def test_fewer_steps_of_the_writer_and_what_the_draft_did_are_counted(expert, student, prompts):
    views = {"expert": expert.view, "student": student.view}
    with metered(views) as meter:
        drafted = turns_of(with_draft(expert, student), prompts, GREEDY)
    written, accepted = (
        sum(getattr(turn, name) for turn in drafted) for name in ("written", "accepted")
    )
    steps = meter.steps[WRITING, "expert"]
    assert written - accepted <= steps <= written - accepted + len(prompts) < 0.6 * written
    read = sum(len(prompt) - 1 for prompt in prompts)
    assert meter.read[WRITING, "expert"] == meter.read[WRITING, "student"] == read
    proposed = meter.written[WRITING, "expert"] - steps
    assert accepted <= proposed == meter.steps[WRITING, "student"] <= 4 * steps


def test_log_probabilities_are_the_writers(expert, student, prompts):
    options = dataclasses.replace(ALONE, logprobs=True)
    sampling = Sampling(40, 0.9, 1.1, seed=2)
    plain = turns_of(expert, prompts[:3], sampling, options)
    drafted = turns_of(with_draft(expert, student), prompts[:3], sampling, options)
    for one, two in zip(plain, drafted, strict=True):
        assert one.tokens == two.tokens
        assert two.logprobs == pytest.approx(one.logprobs, abs=1e-4)


def test_texts_that_are_written_together_need_no_draft(expert, student, prompts):
    together = turns_of(with_draft(expert, student), prompts, GREEDY, GenerateOptions())
    assert all(turn.accepted is None for turn in together)
    # Where hidden states are wanted, they are those of single steps.
    states = GenerateOptions(states=True)
    [turn] = turns_of(with_draft(expert, student), prompts[:1], GREEDY, states)
    assert turn.accepted is None and len(turn.states) == 2


@pytest.mark.parametrize("name", ["qwen3_next", "mamba2", "gemma3_text"])
@pytest.mark.parametrize("side", ["writer", "draft"])
def test_where_nothing_can_be_taken_back_texts_are_written_as_ever(
    expert, student, prompts, name, side, tmp_path
):
    folder = make_architecture(tmp_path / name, name)
    other = dataclasses.replace(load(folder), tokenizer=expert.tokenizer)
    writer, draft = (other, student) if side == "writer" else (expert, other)
    plain = turns_of(writer, prompts[:2], Sampling(12))
    drafted = turns_of(with_draft(writer, draft), prompts[:2], Sampling(12))
    assert tokens_of(drafted) == tokens_of(plain)
    # The texts are longer than this Gemma's windows.
    assert all(turn.accepted is None for turn in drafted)
    pair = (folder, resolve("tiny-student")) if side == "writer" else (resolve("tiny"), folder)
    if name == "gemma3_text":
        check_draft(*pair)
        short = prompts[0][:5]
        assert turns_of(with_draft(writer, draft), [short], Sampling(9))[0].accepted is not None
    else:
        with pytest.raises(UserError, match=f"layers of {folder} keep no earlier state"):
            check_draft(*pair)


def test_a_sliding_window_that_is_not_full_is_cut_back(expert, prompts, tmp_path):
    gemma = load(make_architecture(tmp_path / "gemma", "gemma3_text"))
    texts = [prompt[:4] for prompt in prompts[:4]]
    plain = turns_of(gemma, texts, Sampling(14))
    drafted = turns_of(with_draft(gemma, expert, 3), texts, Sampling(14))
    assert tokens_of(drafted) == tokens_of(plain)
    assert all(turn.accepted is not None for turn in drafted)
