"""Episodes that do not wait for each other come to what they come to in lockstep."""

import dataclasses
from collections import Counter

import pytest
from tokenizers import AddedToken

from mlx_fd.config import Config, override
from mlx_fd.feedback.asking import Group, ask_in_step
from mlx_fd.feedback.continuous import ask_continuously
from mlx_fd.feedback.episode import first_half, second_half
from mlx_fd.feedback.pair import load_pair, open_pair
from mlx_fd.feedback.turns import write_first_answer
from mlx_fd.models.metering import WRITING, metered
from mlx_fd.models.view import find_view
from mlx_fd.problems import load as load_problems
from support.architectures import make_architecture
from support.pairs import SMALL, make_dirs, make_plan
from support.thinkers import TEMPLATES
from support.tiny import make_model_dir, make_tokenizer

PROBLEMS = load_problems("gsm8k", "train").problems
MARKS = ("<think>", "</think>")
# Keys and values; some in a window that is full long before a prompt ends; a recurrence; and one
# that is written text by text.
KINDS = ("llama", "llama_sliding", "qwen3_next", "alone", "thinking", "thinking off")


def quiet(step, tokens):
    pass


def config_of(**changes):
    sizes = {"max_answer_tokens": 9, "max_feedback_tokens": 7, "max_merge_tokens": 5}
    return override(Config(), {**SMALL, **sizes, **changes}, "test")


def thinking_pair(folder, switch):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in MARKS])
    more = {"hidden": 16, "heads": 2, "kv_heads": 1, "intermediate": 32}
    more |= {"tokenizer": tokenizer, "chat_template": TEMPLATES["qwen3"].source}
    dirs = [make_model_dir(folder / f"{seed}", seed=seed, **more) for seed in (0, 1)]
    options = {"expert_thinking": switch, "student_thinking": switch, "max_thinking_tokens": 5}
    return open_pair(dataclasses.replace(make_plan(*dirs, **options), vocab=402))


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    folder, kind = tmp_path_factory.mktemp("pair"), request.param
    if kind.startswith("thinking"):
        return thinking_pair(folder, "off" if kind.endswith("off") else "on")
    dirs = [
        make_architecture(folder / f"{seed}", "llama" if kind == "alone" else kind, seed=seed)
        for seed in (1, 2)
    ]
    found = load_pair(*dirs, lora_rank=2)
    if kind != "alone":
        return found
    expert, student = (
        dataclasses.replace(one, batched=False) for one in (found.expert, found.student_lm)
    )
    return dataclasses.replace(found, expert=expert, student_lm=student)


def first_halves(pair, config, problems):
    options = config.generation
    return [
        first_half(pair, write_first_answer(pair, one, options), config, lambda *_: True)
        for one in problems
    ]


def episodes(pair, config, carry_on, problems):
    """Both halves of some episodes, the second ones beside the first ones of other problems."""
    half = len(problems) // 2
    one, other = problems[:half], problems[half:]
    (first,) = carry_on([first_halves(pair, config, one)])
    second = [second_half(pair, each.judged, config, again=True) for each in first]
    return carry_on([second, first_halves(pair, config, other)])


def in_step(groups):
    return [ask_in_step(works, lambda step: 7, quiet) for works in groups]


def continuously(places):
    def carry_on(groups):
        return ask_continuously([Group(works, lambda step: 7, quiet) for works in groups], places)

    return carry_on


def seen(conversation):
    cache = conversation.cache
    state = None if cache is None else [layer.offset for layer in cache if hasattr(layer, "offset")]
    mark = conversation.mark
    return conversation.tokens, state, mark and mark.length


def assert_usage(one, other):
    for name in ("tokens", "prefilled", "capped", "thoughts", "closed"):
        assert getattr(one, name) == getattr(other, name)
    assert one.seconds.keys() == other.seconds.keys()
    assert all(seconds > 0 for seconds in other.seconds.values())


def assert_judged(one, other):
    assert one.answered.answer == other.answered.answer
    assert one.student.feedback == other.student.feedback
    assert one.student.solves_alike == other.student.solves_alike
    for name in ("head_score", "logprob"):
        wanted = getattr(one.student, name)
        assert getattr(other.student, name) == pytest.approx(wanted, abs=2e-3)
    assert one.expert.feedback == other.expert.feedback
    assert seen(one.conversation) == seen(other.conversation)
    assert_usage(one.usage, other.usage)


def test_greedy_texts_scores_and_states_are_those_of_lockstep(pair):
    config = config_of(answers_by="student")
    wanted = episodes(pair, config, in_step, PROBLEMS[:4])
    found = episodes(pair, config, continuously(3), PROBLEMS[:4])
    for one, other in zip(wanted[0], found[0], strict=True):
        assert_judged(one.judged, other.judged)
        assert (one.merged, one.revised, one.critique) == (
            *(other.merged, other.revised),
            other.critique,
        )
        assert one.final == other.final and one.score == pytest.approx(other.score, abs=1e-3)
        assert_usage(one.usage, other.usage)
    for one, other in zip(wanted[1], found[1], strict=True):
        assert one.outcome == other.outcome
        assert_judged(one.judged, other.judged)


def test_what_is_drawn_depends_on_the_seed_and_on_nobody_beside_it(pair):
    config = config_of(
        answer_temperature=1.0,
        student_temperature=0.8,
        expert_temperature=0.6,
        own_solutions=3,
        max_disagreement=0.1,
    )
    (many,) = continuously(8)([first_halves(pair, config, PROBLEMS[:3])])
    # The others are no longer there, and nobody writes beside the first one.
    (few,) = continuously(1)([first_halves(pair, config, PROBLEMS[:1])])
    assert_judged(many[0].judged, few[0].judged)
    other = Group(first_halves(pair, config, PROBLEMS[:3]), lambda step: 8, quiet)
    (again,) = ask_continuously([other], 8)
    for one, another in zip(many, again, strict=True):
        assert one.judged.answered.answer != another.judged.answered.answer


def test_texts_of_many_lengths_take_fewer_steps(tmp_path):
    """Three times as many problems as places: nearly each place of each step has a text."""
    pair = open_pair(make_plan(*make_dirs(tmp_path, layers=(1, 1))))
    # One token in a dozen ends a turn, so the turns end at many different steps.
    for loaded in (pair.expert, pair.student_lm):
        loaded.tokenizer._eos_token_ids = set(range(0, 400, 12))
    sizes = dict.fromkeys(("max_answer_tokens", "max_feedback_tokens", "max_merge_tokens"), 30)
    drawn = {f"{who}_temperature": 1.0 for who in ("answer", "expert", "student")}
    config = config_of(answers_by="student", max_disagreement=0.0, **sizes, **drawn)
    views = {"expert": find_view(pair.expert.model), "student": pair.student.view}
    shares = []
    for carry_on in (
        lambda works, *rest: [
            one for at in (0, 8, 16) for one in ask_in_step(works[at : at + 8], *rest)
        ],
        lambda works, *rest: ask_continuously([Group(works, *rest)], 8)[0],
    ):
        counts, written = Counter(), Counter()

        def on_tokens(step, tokens, counts=counts):
            counts[step] += tokens

        with metered(views) as meter:
            works = first_halves(pair, config, PROBLEMS[:24])
            first = carry_on(works, len, on_tokens)
        for one in first:
            written.update(one.judged.usage.tokens)
        assert counts == written
        steps = sum(meter.steps[WRITING, who] for who in views)
        shares.append(8 * steps / written.total())
        # A text takes a place in one step more than it has tokens.
        assert sum(meter.written[WRITING, who] for who in views) == written.total() + 3 * 24
    lockstep, continuous = shares
    assert continuous < 1.5
    assert lockstep > 2
