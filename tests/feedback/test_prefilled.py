"""How often the models read what was said: once, whether their state can be cut back or not."""

import contextlib
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_fd.config import GenerationOptions, LossOptions
from mlx_fd.feedback.pair import load_pair
from mlx_fd.feedback.samples import sample_of
from mlx_fd.feedback.turns import (
    expert_feedback,
    expert_turn,
    first_answers,
    judge,
    student_feedback,
)
from mlx_fd.models.conversation import Conversation, prefill
from mlx_fd.models.generation import first_prompt, followup_prompt, generate
from mlx_fd.models.writing import GenerateOptions, sampling_for
from mlx_fd.problems import load as load_problems
from mlx_fd.problems.prompts import answer_prompt, critique_prompt
from mlx_fd.training.selfdistill import rollouts
from mlx_fd.training.selfdistill.methods import configured
from support import sweep
from support.architectures import WINDOW, make_architecture

# Keys and values; some of them in a window that is full long before a prompt ends; a recurrence.
KINDS = ("llama", "llama_sliding", "qwen3_next")
STEP = "student_feedback"
GREEDY = {"answer_temperature": 0.0, "student_temperature": 0.0, "expert_temperature": 0.0}
LIMITS = {"max_answer_tokens": 9, "max_feedback_tokens": 7, "max_merge_tokens": 5}
PROBLEMS = load_problems("gsm8k", "train").problems[:3]


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    expert = make_architecture(folder / "expert", request.param)
    student = make_architecture(folder / "student", request.param, seed=2)
    return load_pair(expert, student, lora_rank=2)


@contextlib.contextmanager
def counted(model):
    """Tokens that a model reads, several at a time, while this is open."""
    first, seen = model.layers[0], SimpleNamespace(tokens=0)
    call = type(first).__call__

    def counting(block, hidden, *args, **kwargs):
        if block is first and hidden.shape[1] > 1:
            seen.tokens += hidden.shape[0] * hidden.shape[1]
        return call(block, hidden, *args, **kwargs)

    type(first).__call__ = counting
    try:
        yield seen
    finally:
        type(first).__call__ = call


def say_nothing(*_):
    pass


def judged_by(pair, options, problems):
    answered = first_answers(pair, problems, options, 1, say_nothing)
    students = student_feedback(pair, answered, options, 2, say_nothing)
    experts = expert_feedback(pair, answered, options, 3, say_nothing)
    return judge(answered, students, dict(enumerate(experts)))


def test_an_episode_reads_everything_once(pair):
    options = GenerationOptions(**GREEDY, **LIMITS, answers_by="expert")
    request = followup_prompt(pair.expert, critique_prompt())
    with counted(pair.expert.model) as by_expert, counted(pair.student.model) as by_student:
        (judged,) = judged_by(pair, options, PROBLEMS[:1])
        sample = sample_of(pair, judged, LossOptions())
        on_policy = sample_of(pair, judged, LossOptions(), on_policy=True)
        sampling = sampling_for(options, "critique", 4)
        (turn,), _ = expert_turn(
            *(pair, "critique", [judged.conversation], [request]),
            *(sampling, say_nothing, GenerateOptions()),
        )
    answered = judged.answered
    written = (answered.answer.tokens, judged.expert.feedback.tokens, turn.tokens)
    needed = len(turn.conversation.tokens) - sum(map(len, written))
    needed += len(sample.target) + len(on_policy.target)
    assert needed > 3 * WINDOW
    assert needed - 8 <= by_expert.tokens <= 1.1 * needed
    assert len(answered.prompt) - 2 <= by_student.tokens <= 1.1 * len(answered.prompt)


def test_replies_and_what_is_read_of_them_are_those_of_reading_everything_again(pair):
    """A batch of three lengths, going on from states that were kept."""
    for one, alone in zip(
        judged_by(pair, GenerationOptions(**GREEDY, **LIMITS), PROBLEMS),
        judged_by(pair, GenerationOptions(**GREEDY, **LIMITS, sequential=True), PROBLEMS),
        strict=True,
    ):
        assert one.conversation.tokens == alone.conversation.tokens
        assert one.student.feedback.tokens == alone.student.feedback.tokens
        assert one.student.head_score == pytest.approx(alone.student.head_score, abs=1e-5)
        assert alone.conversation.cache is None
        kept = sample_of(pair, one, LossOptions()).expert
        again = sample_of(pair, alone, LossOptions()).expert
        assert (abs(kept.targets - again.targets).max() < 1e-3).item()
        assert all(
            (abs(a - b).max() < 1e-3).item() for a, b in zip(kept.pooled, again.pooled, strict=True)
        )


def test_the_states_of_score_heads_are_those_that_the_text_was_written_from(pair):
    """Three lengths, and turns that end at different steps; against reading all of it again."""
    loaded = pair.student_lm
    prompts = [sweep.tokens_of(length, length) for length in (31, 9, 18)]
    wanted = []
    for count in (1, 7):
        for reuse in (True, False):
            turns = generate(
                loaded,
                [Conversation()] * len(prompts),
                prompts,
                sampling_for(GenerationOptions(**GREEDY, max_feedback_tokens=count), STEP, 0),
                GenerateOptions(reuse=reuse, keep=False, states=True),
            )
            wanted += [(*one, reuse) for one in zip(prompts, turns, strict=True)]
    assert {len(turn.tokens) for _, turn, _ in wanted} >= {1, 7}
    for prompt, turn, _ in wanted:
        whole = (*prompt, *turn.tokens[:-1])
        final = loaded.view.forward(mx.array([whole])).final[0]
        first, last = turn.states
        assert (abs(first - final[len(prompt) - 1]).max() < 1e-4).item()
        assert (abs(last - final[-1]).max() < 1e-4).item()


def test_a_student_writes_with_lora_within_its_weights(pair):
    """The texts and states are those of LoRA beside them, and afterwards it is there again."""
    loaded, model = pair.student_lm, pair.student.model
    shapes = {name: value.shape for name, value in tree_flatten(model.trainable_parameters())}
    drawn = [(name, mx.random.normal(shape) * 0.1) for name, shape in shapes.items()]
    before = tree_flatten(model.trainable_parameters())
    model.load_weights(drawn, strict=False)
    (turn,) = generate(
        *(loaded, [Conversation()], [sweep.tokens_of(20, 5)]),
        *(
            sampling_for(GenerationOptions(**GREEDY, **LIMITS), STEP, 0),
            GenerateOptions(states=True),
        ),
    )
    assert dict(tree_flatten(model.trainable_parameters())).keys() == shapes.keys()
    whole = mx.array([(*sweep.tokens_of(20, 5), *turn.tokens[:-1])])
    final, logits = loaded.view.forward_with_logits(whole)
    assert (abs(final.final[0, -1] - turn.states[1]).max() < 1e-3).item()
    assert logits[0, 19:, : loaded.vocab].argmax(axis=-1).tolist() == list(turn.tokens)
    model.load_weights(before, strict=False)


def test_a_batch_of_attempts_reads_each_question_once(pair):
    config = configured(
        "grpo", {**LIMITS, "num_generations": 4, "generation_batch_size": 3, "critic": "truth"}
    )
    loaded = pair.student_lm
    with counted(loaded.model) as seen:
        groups, prefilled = rollouts.sample_rollouts(loaded, PROBLEMS[:2], config, lambda n: 5 + n)
    prompts = [first_prompt(loaded, answer_prompt(p.question)) for p in PROBLEMS[:2]]
    needed = sum(map(len, prompts))
    assert prefilled == needed
    assert needed - 4 <= seen.tokens <= 1.1 * needed
    written = [attempt.tokens for group in groups for attempt in group]
    rows = [0, 0, 0, 0, 1, 1, 1, 1]
    for number, begin in enumerate(range(0, 8, 3)):
        chunk = rows[begin : begin + 3]
        again = generate(
            loaded,
            [Conversation()] * len(chunk),
            [prompts[row] for row in chunk],
            rollouts.rollout_sampling(config, 5 + number),
            GenerateOptions(keep=False),
        )
        assert [turn.tokens for turn in again] == written[begin : begin + 3]


def test_a_kept_state_is_a_value(pair):
    """What goes on from it leaves it as it was."""
    loaded = pair.expert
    _, before = prefill(loaded, Conversation(), sweep.tokens_of(40, 1))
    first, second = (
        generate(loaded, [before], [sweep.tokens_of(9, 2)], rollouts.Sampling(6))[0]
        for _ in range(2)
    )
    whole = (*before.tokens, *sweep.tokens_of(9, 2))
    assert first.tokens == second.tokens == tuple(sweep.greedy(loaded, whole, first))
