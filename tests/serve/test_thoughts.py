"""A server's models that think: the thought beside the reply, never in it."""

from __future__ import annotations

import asyncio
import dataclasses
import json

import openai
import pytest

from mlx_fd.cli import cli
from mlx_fd.errors import UserError
from mlx_fd.evaluation.cascade.scores import ANSWER, answer_score
from mlx_fd.evaluation.target import Models, open_target
from mlx_fd.feedback.judge import Judge, ModelRef, locate_model, open_student
from mlx_fd.models.conversation import Conversation
from mlx_fd.models.generation import first_prompt, generate
from mlx_fd.models.lanes import Job
from mlx_fd.models.loading import with_thinking
from mlx_fd.models.writing import GenerateOptions, Sampling
from mlx_fd.problems.prompts import answer_prompt
from mlx_fd.serve.calibration import rule_of
from mlx_fd.serve.engine import Engine
from mlx_fd.serve.errors import ApiError
from mlx_fd.serve.limits import Limits
from mlx_fd.serve.models import Served, Thoughts, open_served
from mlx_fd.serve.prompts import ask_chat
from mlx_fd.serve.reloading import renewed
from mlx_fd.serve.schema import Switch, chat_request
from mlx_fd.serve.service import Options
from mlx_fd.serve.speaking import Speaking
from mlx_fd.serve.switching import switched
from support.serving import ask, serving
from support.thinkers import TEMPLATES, Line, random_thinkers, scripted
from support.trained import make_run

ASK = "What is 1 + 2?"
LINES = {
    "complete": Line("It is 3.", "Say 7."),
    "number in it": Line("Score: 0.5\n#### 3", "Score: -1\n#### 8"),
    "empty": Line("It is 3.", ""),
    "too long": Line("It is 3.", "Well", ends=False),
    "all": Line("It is 3.", "Well.", stops=True),
}
ON = {"student_thinking": "on", "expert_thinking": "on", "max_thinking_tokens": 5}
MARKS = ("<think>", "</think>")


def served_of(loaded) -> Served:
    return Served(Judge(ModelRef(loaded.path), loaded, None), None, None, {"student": None})


async def spoken(loaded, job, thinking=None):
    """Pieces of the thought, of the reply, and the whole."""
    engine = Engine(2)
    await engine.start(lambda: served_of(loaded))
    try:
        speaking = Speaking(engine, thinking or loaded.thinking, "student", job)
        thoughts = [piece async for piece in speaking.thoughts()]
        pieces = [piece async for piece in speaking.pieces()]
        return thoughts, pieces, await speaking.written()
    finally:
        await engine.stop()


@pytest.mark.parametrize("kind", LINES)
@pytest.mark.parametrize("name", sorted(name for name, kind in TEMPLATES.items() if not kind.odd))
def test_a_server_writes_thought_and_reply_as_a_run_does(tmp_path, name, kind):
    loaded = scripted(tmp_path, name, {ASK: LINES[kind]}, on=True, limit=20)
    prompt, sampling = first_prompt(loaded, ASK), Sampling(40)
    [turn] = generate(loaded, [Conversation()], [prompt], sampling, GenerateOptions(logprobs=True))
    job = Job(Conversation(), prompt, sampling, streams=True, logprobs=True)
    thoughts, pieces, written = asyncio.run(spoken(loaded, job))
    assert (written.text, written.thought) == (turn.text, turn.thought)
    assert (written.tokens, written.opening) == (turn.tokens, turn.opening)
    assert written.drawn == turn.written
    assert written.logprobs == pytest.approx(turn.logprobs, abs=1e-5)
    assert "".join(thoughts).strip() == turn.thought and "".join(pieces) == turn.text
    assert written.reason == "stop"
    if kind == "all":
        assert not pieces and turn.thought


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("name", sorted(name for name, kind in TEMPLATES.items() if not kind.odd))
def test_a_request_turns_thinking_on_and_off(tmp_path, name, on):
    """Beside others that think as the server has it: as a run whose models think like that."""
    loaded = scripted(tmp_path, name, {ASK: LINES["complete"]}, on=not on, limit=20)
    asked = switched(loaded, "student", Switch(on))
    prompt, sampling = first_prompt(asked, ASK), Sampling(40)
    [turn] = generate(asked, [Conversation()], [prompt], sampling, GenerateOptions())
    _, _, written = asyncio.run(
        spoken(loaded, Job(Conversation(), prompt, sampling), asked.thinking)
    )
    assert (written.text, written.thought) == (turn.text, turn.thought)
    assert bool(written.thought) == on


@pytest.mark.parametrize(
    ("said", "switch"),
    [
        ({}, Switch()),
        ({"chat_template_kwargs": {}}, Switch()),
        ({"chat_template_kwargs": {"enable_thinking": False}}, Switch(False)),
        ({"chat_template_kwargs": {"thinking": True}}, Switch(True)),
        ({"reasoning_effort": "none"}, Switch(False, by_effort=True)),
        ({"reasoning_effort": "high"}, Switch(True, "high", by_effort=True)),
    ],
)
def test_what_a_request_says_of_thinking(said, switch):
    body = {"model": "student", "messages": [{"role": "user", "content": "How many?"}], **said}
    assert chat_request(body, Limits(), 8).switch == switch


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"chat_template_kwargs": {"enable_thinking": "no"}}, "must be true or false"),
        ({"chat_template_kwargs": {"style": 1}}, "supplied: chat_template_kwargs.style"),
        ({"chat_template_kwargs": True}, "must be a JSON object"),
        ({"reasoning_effort": "much"}, "must be one of none, minimal, low"),
        ({"reasoning_effort": "low", "chat_template_kwargs": {"thinking": False}}, "says both"),
    ],
)
def test_what_a_request_cannot_say_of_thinking(said, message):
    body = {"model": "student", "messages": [{"role": "user", "content": "How many?"}], **said}
    with pytest.raises(ApiError, match=message):
        chat_request(body, Limits(), 8)


def test_a_template_that_does_not_understand_the_switch_refuses_it(tmp_path):
    off = scripted(tmp_path, "qwen3", {ASK: LINES["complete"]}, on=False, limit=20)
    with pytest.raises(ApiError, match="chat template knows no 'reasoning_effort'"):
        switched(off, "student", Switch(True, "low", by_effort=True))
    plain = dataclasses.replace(off, thinking=None)
    with pytest.raises(ApiError, match="The expert does not think; leave 'chat_template_kwargs'"):
        switched(plain, "expert", Switch(False))
    odd = scripted(tmp_path / "odd", "odd", {ASK: LINES["complete"]}, on=False)
    for on, how in ((True, "on"), (False, "off")):
        with pytest.raises(ApiError, match=f"does not let a request turn thinking {how}"):
            switched(odd, "student", Switch(on))
    # One that knows an effort is told it.
    source = off.template.source + "{{ reasoning_effort }}"
    told = dataclasses.replace(off, template=dataclasses.replace(off.template, source=source))
    told = switched(told, "student", Switch(True, "low", by_effort=True))
    assert told.template.render([ASK]).endswith("low") and told.thinking.on


def test_who_shall_not_think_says_nothing_of_it(tmp_path):
    loaded = scripted(tmp_path, "qwen3", {ASK: LINES["complete"]}, on=False)
    job = Job(Conversation(), first_prompt(loaded, ASK), Sampling(40), streams=True)
    thoughts, pieces, written = asyncio.run(spoken(loaded, job))
    assert (thoughts, "".join(pieces), written.thought) == ([], "It is 3.", "")
    thinking = with_thinking(loaded, on=True, limit=8)
    odd = Job(Conversation(), first_prompt(thinking, ASK)[:-2], Sampling(4))
    with pytest.raises(ApiError, match="no place for a thought"):
        asyncio.run(spoken(thinking, odd))


# --------------------------------------------------------------------------------- the server


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a pair that thinks, with random weights."""
    folder = tmp_path_factory.mktemp("thoughts")
    _, student = random_thinkers(folder)
    given = {"max_answer_tokens": 8, "max_feedback_tokens": 6, "score_at": "own", **ON}
    return make_run(folder / "run", student, **given)


QUESTIONS = ("Tom has 8 apples.", "Ann has 2 pens and buys 3.", "How many?")


def test_clients_get_the_thought_beside_the_content(run):
    pair = Models(open_target(str(run), None)).pair
    prompts = [first_prompt(pair.expert, answer_prompt(one)) for one in QUESTIONS]
    turns = {
        who: generate(
            loaded,
            [Conversation()] * 3,
            prompts,
            Sampling(8),
            GenerateOptions(logprobs=True),
        )
        for who, loaded in (("student", pair.student_lm), ("expert", pair.expert))
    }
    head = open_student(run).judge([("How many?", "#### 3")], max_tokens=6)[0]
    options = ("--score", "answer", "--threshold", "0.0", "--expert", str(pair.expert.path))

    async def asked(server, **more):
        async with server.client() as client:
            return await asyncio.gather(*(ask(client, one, **more) for one in QUESTIONS))

    async def streamed(server, **more):
        found = {"reasoning_content": "", "content": ""}
        order = []
        async with server.client() as client:
            async for event in await ask(client, QUESTIONS[0], stream=True, **more):
                delta = event.choices[0].delta.model_dump()
                for name in found:
                    if piece := delta.get(name):
                        found[name] += piece
                        order.append(name)
        return found, order

    async def refused(server):
        async with server.client() as client:
            with pytest.raises(openai.BadRequestError) as error:
                await ask(client, QUESTIONS[0], model="student", reasoning_effort="low")
            return error.value

    async def judged(server):
        async with server.client() as client:
            body = {"problem": "How many?", "answer": "#### 3", "max_tokens": 6}
            return json.loads(await client.post("/feedback", body=body, cast_to=str))

    off = {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}
    with serving(run.parent, run, *options) as server:
        silent = asyncio.run(asked(server, model="cascade", **off))
        low = asyncio.run(refused(server))
        replies = {who: asyncio.run(asked(server, model=who)) for who in turns}
        cascade = asyncio.run(asked(server, model="cascade"))
        pieces = {who: asyncio.run(streamed(server, model=who)) for who in (*turns, "cascade")}
        feedback = asyncio.run(judged(server))
        metrics = server.lines()
    for who, expected in turns.items():
        for reply, turn in zip(replies[who], expected, strict=True):
            message = reply.choices[0].message
            assert message.reasoning_content == turn.thought
            assert message.content.strip() == turn.text
            assert not any(mark in message.content for mark in MARKS)
            assert reply.usage.completion_tokens == turn.written
            details = reply.usage.completion_tokens_details
            assert details.reasoning_tokens == turn.written - len(turn.tokens)
        first, (found, order) = expected[0], pieces[who]
        assert found["reasoning_content"].strip() == first.thought
        assert found["content"].strip() == first.text
        assert order == sorted(order, reverse=True)  # the thought before the content
    # It is scored without its thought.
    for reply, turn in zip(cascade, turns["student"], strict=True):
        score = answer_score(turn.logprobs, finished=turn.finished)
        assert reply.mlx_fd["score"] == pytest.approx(score, abs=1e-4)
        assert reply.choices[0].message.reasoning_content == turn.thought
    for reply in silent:
        assert "reasoning_content" not in reply.choices[0].message.model_dump()
        assert "as this request wants it" in reply.mlx_fd["reason"]
    assert not any("as this request" in reply.mlx_fd["reason"] for reply in cascade)
    assert low.param == "reasoning_effort" and "knows no 'reasoning_effort'" in low.message
    assert pieces["cascade"][0]["reasoning_content"].strip() == turns["student"][0].thought
    assert feedback["thought"] == head.thought and feedback["feedback"] == head.text
    assert feedback["score"] == pytest.approx(head.head_score, abs=2e-4)
    assert [row["status"] for row in metrics if row.get("status", 200) != 200] == [400]


def test_a_head_reads_the_answer_without_its_thought(run):
    judge = open_student(run)
    prompts = [first_prompt(judge.student_lm, answer_prompt(one)) for one in QUESTIONS]
    turns = generate(judge.student_lm, [Conversation()] * 3, prompts, Sampling(8))
    requests = [
        judge.own_request(prompt, turn.tokens) for prompt, turn in zip(prompts, turns, strict=True)
    ]
    expected = judge.scores(requests, 6)

    async def asked(server):
        async with server.client() as client:
            return await asyncio.gather(*(ask(client, q, model="cascade") for q in QUESTIONS))

    with serving(run.parent, run, "--score", "head") as server:
        replies = asyncio.run(asked(server))
    assert [reply.mlx_fd["score"] for reply in replies] == pytest.approx(expected, abs=2e-4)


def test_options_say_who_thinks(run):
    assert open_served(str(run), None).student.thinking.on
    off = open_served(str(run), None, Thoughts(student="off"))
    assert not off.student.thinking.on
    short = open_served(str(run), None, Thoughts(limit=3))
    assert short.student.thinking.limit == 3
    # New weights are those of a student that thinks alike.
    options = Options(str(run), thoughts=Thoughts(limit=3))
    assert renewed(short, str(run), options).student.thinking.limit == 3
    with pytest.raises(UserError, match="thinks otherwise; restart"):
        renewed(off, str(run), options)
    plain = random_thinkers(run.parent / "plain")[1]
    assert not open_served(str(plain), None).student.thinking.on
    assert open_served(str(plain), None, Thoughts(student="on")).student.thinking.on
    with pytest.raises(UserError, match="does not think: neither its chat template"):
        open_served("tiny-student", None, Thoughts(student="on"))
    with pytest.raises(UserError, match="--expert-thinking off: there is no expert"):
        open_served("tiny-student", None, Thoughts(expert="off"))


def test_a_calibration_is_of_models_that_think_as_they_did(run):
    arguments = ["calibrate", str(run), "--cost", "0.9", "--limit", "12", "--quiet"]
    cli(["cascade", *arguments], standalone_mode=False)
    served = open_served(str(run), None)
    assert rule_of(Options(str(run)), served).source == "calibrated, cost 0.9"
    other = rule_of(Options(str(run), thoughts=Thoughts(student="off")), served)
    assert "think otherwise than in the run" in other.source and other.confidence is None
    assert other.score is ANSWER


def test_a_thought_has_to_fit_into_the_context(run):
    served = open_served(str(run), None, Thoughts(limit=4000))
    body = {"model": "student", "messages": [{"role": "user", "content": "How many?"}]}
    request = chat_request(body, Limits(), 8)
    with pytest.raises(ApiError, match="of a thought the student reads at most"):
        ask_chat(served, request, Limits(), verbatim=False, judges=False)
    assert locate_model(str(run)).thinking.limit == 5
