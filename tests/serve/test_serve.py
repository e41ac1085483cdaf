"""``mlx-fd serve`` as its clients see it: OpenAI's, many at once, and ill ones."""

import asyncio
import collections
import itertools
import json
import os
import re
import signal
import time

import openai
import pytest

from mlx_fd.cli import cli
from mlx_fd.errors import UserError
from mlx_fd.evaluation.target import Models, open_target
from mlx_fd.feedback.judge import Judge, locate_model
from mlx_fd.feedback.turns import answer
from mlx_fd.problems import Problem
from mlx_fd.serve.models import open_served
from support.serving import (
    KEY,
    ask,
    attack,
    exchange,
    in_parallel,
    post,
    questions,
    serving,
    tiny_run,
)

MOST_BYTES = 65536
GET_HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    # As its preset has it: the score is read behind the student's own feedback.
    return tiny_run(tmp_path_factory.mktemp("serve") / "run", score_at="own")


@pytest.fixture(scope="module")
def pair(run):
    return Models(open_target(str(run), "tiny")).pair


@pytest.fixture(scope="module")
def judge(run, pair):
    return Judge(locate_model(str(run)), pair.student_lm, pair.student)


@pytest.fixture(scope="module")
def judged(pair, judge):
    """Questions, the student's answers to them, and its scores of those."""
    asked = questions(24)
    students = written(pair, "student", asked)
    truths = judge.judge(zip(asked, students, strict=True), max_tokens=112)
    return asked, students, [truth.head_score for truth in truths]


@pytest.fixture(scope="module")
def threshold(judged):
    """A threshold that half of the answers are below, and none is near."""
    scores = sorted(judged[2])
    gaps = [(b - a, (a + b) / 2) for a, b in itertools.pairwise(scores[8:16])]
    return max(gaps)[1]


@pytest.fixture(scope="module")
def server(run, threshold):
    options = ("--expert", "tiny", "--max-body", str(MOST_BYTES), "--read-timeout", "1")
    with serving(
        run.parent, run, *options, "--score", "head", "--threshold", str(threshold)
    ) as found:
        yield found


def written(pair, who, asked):
    """What mlx-fd itself lets a model answer, without the server."""
    loaded = pair.expert if who == "expert" else pair.student_lm
    problems = [Problem(str(place), text, "", "0") for place, text in enumerate(asked)]
    options = open_target("tiny", None).config.generation
    found = answer(loaded, problems, options, 0, lambda step, count: None, temperature=0.0)
    return [one.answer.text for one in found]


def test_many_at_once_lose_and_mix_nothing(server, pair):
    asked = questions(40)
    found = asyncio.run(in_parallel(server, asked, model="expert"))
    assert found == written(pair, "expert", asked)
    assert len(set(found)) > 35


def test_the_cascade_asks_the_expert_where_the_student_scores_low(server, pair, judged, threshold):
    asked, students, scores = judged

    async def all_of():
        async with server.client() as client:
            raw = client.chat.completions.with_raw_response
            chat = [[{"role": "user", "content": one}] for one in asked]
            return await asyncio.gather(
                *(raw.create(model="cascade", messages=one) for one in chat)
            )

    experts, replies = written(pair, "expert", asked), asyncio.run(all_of())
    by = []
    for reply, student, expert, score in zip(replies, students, experts, scores, strict=True):
        said, ours = reply.parse(), reply.parse().mlx_fd
        assert ours["score"] == pytest.approx(score, abs=1e-3)
        by.append("student" if score >= threshold else "expert")
        assert ours["answered_by"] == reply.headers["x-mlx-fd-answered-by"] == by[-1]
        assert said.choices[0].message.content == (student if by[-1] == "student" else expert)
        assert ours["student_tokens"] > 0
        assert (ours["expert_tokens"] > 0) is (by[-1] == "expert")
    assert set(by) == {"student", "expert"}


@pytest.mark.parametrize("model", ["cascade", "student", "expert"])
def test_a_stream_says_what_the_whole_reply_says(server, model):
    [question] = questions(1)

    async def both():
        async with server.client() as client:
            whole = await ask(client, question, model=model)
            stream = await ask(
                client, question, model=model, stream=True, stream_options={"include_usage": True}
            )
            return whole, [chunk async for chunk in stream]

    whole, chunks = asyncio.run(both())
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert chunks[0].mlx_fd["answered_by"] == whole.mlx_fd["answered_by"]
    assert chunks[-1].usage == whole.usage
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    if whole.mlx_fd["answered_by"] != "student" or model == "student":
        assert len(pieces) > 10


def test_stop_texts_seeds_and_limits_mean_what_they_mean_elsewhere(server):
    [question] = questions(1)

    async def several():
        async with server.client() as client:
            plain = await ask(client, question)
            stopped = await ask(client, question, stop=["\n", "zzz"])
            short = await ask(client, question, max_tokens=3)
            drawn = [
                await ask(client, question, temperature=1.0, top_p=0.99, seed=seed, max_tokens=40)
                for seed in (1, 1, 2, 3, 4)
            ]
            beside = await asyncio.gather(
                *(
                    ask(client, question, temperature=1.0, top_p=0.99, seed=1, max_tokens=40)
                    for _ in range(3)
                )
            )
            return plain, stopped, short, drawn, beside

    plain, stopped, short, drawn, beside = asyncio.run(several())
    text = plain.choices[0].message.content
    assert stopped.choices[0].message.content == text.partition("\n")[0]
    assert stopped.choices[0].finish_reason == "stop"
    assert short.choices[0].finish_reason == "length"
    assert short.usage.completion_tokens == 3
    texts = [one.choices[0].message.content for one in drawn]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1
    assert {one.choices[0].message.content for one in beside} == {texts[0]}


def test_completions_write_on_without_a_chat(server):
    async def one():
        async with server.client() as client:
            return await client.completions.create(
                model="expert", prompt="Step 1: <<4+5=", max_tokens=2
            )

    assert asyncio.run(one()).choices[0].text.startswith("9")


def test_feedback_is_what_the_judge_says(server, judge):
    asked = questions(3)
    answers = ["Step 1: <<1+1=3>>3\n#### 3", "#### 5", "Step 1: <<2+2=4>>4\n#### 4"]
    items = list(zip(asked, answers, strict=True))
    truths = judge.judge(items)

    async def request():
        async with server.client() as client:
            body = {"items": [{"problem": p, "answer": a} for p, a in items]}
            several = await client.post("/feedback", cast_to=object, body=body)
            single = {"problem": items[0][0], "answer": items[0][1]}
            # Null is a field that is not set, whether this server knows it or not.
            bare = {**single, "text": False, "seed": None, "n": None, "verbosity": None}
            return (
                several,
                await client.post("/feedback", cast_to=object, body=single),
                await client.post("/feedback", cast_to=object, body=bare),
            )

    several, single, bare = asyncio.run(request())
    wrong = json.dumps({"model": "expert", "problem": asked[0], "answer": "x"}).encode()
    refused = asyncio.run(exchange(server.port, post("/v1/feedback", wrong)))
    assert b"Feedback is the student's; leave 'model' out." in refused
    for found, truth in zip(several["data"], truths, strict=True):
        assert found["feedback"] == truth.text
        assert found["written_score"] == truth.written_score
        assert found["score"] == pytest.approx(truth.head_score, abs=1e-3)
    assert {**single, "score": 0} == {**several["data"][0], "score": 0}
    # The head reads behind the feedback, which is written, but was not asked for.
    left = {name: value for name, value in single.items() if name != "feedback"}
    assert {**bare, "score": 0} == {**left, "score": 0}
    assert bare["score"] == pytest.approx(single["score"], abs=1e-3)
    assert any(one["first_wrong_step"] is not None for one in several["data"])


TEXT_PART = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}
TOOL = {"type": "function", "function": {"name": "sum", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"tools": [TOOL]}, 400, "Tools are not supported"),
        ({"model": "gpt-5"}, 404, "does not exist"),
        ({"temperature": 3}, 400, "from 0 to 2"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 100_000}, 400, "max_tokens"),
        ({"n": 2}, 400, "n must be 1"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, 400, "leave one out"),
        ({"logprobs": False, "top_logprobs": 2}, 400, "leave 'top_logprobs' out"),
        ({"extra_body": {"user": 5}}, 400, "This value of 'user'"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"stop": ["a"] * 5}, 400, "stop"),
        ({"extra_body": {"colour": "red"}}, 400, "Unrecognized request argument supplied: colour"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "last message"),
        ({"messages": [{"role": "user", "content": "how " * 3000}]}, 400, "tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "'text'"),
        # What means nothing beside the messages means something else within one.
        ({"messages": [{"role": "user", "content": "x", "n": 1}]}, 400, "messages[0].n"),
        (
            {"messages": [{"role": "user", "content": [{**TEXT_PART, "detail": "high"}]}]},
            400,
            "messages[0].content[0].detail",
        ),
        ({"messages": [{"role": "user", "content": "x", "n": None}]}, 400, "messages[0].n"),
        ({"extra_body": {"mlx_fd": {"user": "x"}}}, 400, "mlx_fd.user"),
        ({"extra_body": {"mlx_fd": {"user": None}}}, 400, "mlx_fd.user"),
    ],
)
def test_what_is_not_supported_is_refused_clearly(server, change, status, says):
    async def one():
        async with server.client() as client:
            given = {"model": "student", "messages": [{"role": "user", "content": "x"}], **change}
            await client.chat.completions.create(**given)

    with pytest.raises(openai.APIStatusError, match=re.escape(says)) as caught:
        asyncio.run(one())
    assert caught.value.status_code == status
    assert caught.value.body["type"] == "invalid_request_error"


def test_ill_requests_get_clear_errors_and_leave_nothing_behind(server):
    async def rounds():
        await attack(server, 40, 0, MOST_BYTES)
        before = server.memory(), server.files()
        outcome = await attack(server, 60, 1, MOST_BYTES)
        return before, outcome

    before, outcome = asyncio.run(rounds())
    assert outcome.faults == []
    assert {400, 401, 413, 415} <= set(outcome.statuses)
    deadline = time.monotonic() + 20
    while b'"inside": 0' not in asyncio.run(exchange(server.port, GET_HEALTH)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert server.files() <= before[1] + 2
    assert server.memory() < before[0] + (48 << 20)
    asked = questions(3)
    assert len(asyncio.run(in_parallel(server, asked))) == 3


def metrics(server):
    """What ``/metrics`` says: a number for each name with its labels."""
    get = f"GET /metrics HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    found = asyncio.run(exchange(server.port, f"{get}Connection: close\r\n\r\n".encode())).decode()
    lines = found.partition("\r\n\r\n")[2].splitlines()
    rows = [line.rpartition(" ") for line in lines if line and not line.startswith("#")]
    return collections.Counter({name: float(value) for name, _, value in rows})


def wrote(found, who):
    return found[f'mlx_fd_tokens_total{{kind="written",model="{who}"}}']


def answers(found):
    return sum(value for name, value in found.items() if name.startswith("mlx_fd_answers_total"))


def test_logs_have_no_texts_and_metrics_add_up(server):
    asked, before = questions(2), metrics(server)

    async def all_of():
        async with server.client() as client:
            return await asyncio.gather(*(ask(client, one, model="cascade") for one in asked))

    replies = asyncio.run(all_of())
    said = [reply.mlx_fd for reply in replies]
    for line in [server.line(reply._request_id) for reply in replies]:
        assert line["path"] == "/v1/chat/completions"
        assert line["answered_by"] in ("student", "expert")
    assert asked[0] not in server.log.read_text()
    after = metrics(server)
    # With the feedback that the student writes for its score.
    for who in ("student", "expert"):
        assert wrote(after, who) - wrote(before, who) == sum(one[f"{who}_tokens"] for one in said)
    assert min(one["student_tokens"] for one in said) > 64
    assert answers(after) - answers(before) == 2
    assert after["mlx_fd_score_count"] - before["mlx_fd_score_count"] == 2


def test_what_nobody_waits_for_and_feedback_are_in_the_metrics(server):
    [question], before = questions(1), metrics(server)

    async def leave():
        async with server.client() as client:
            long = {"temperature": 2.0, "seed": 0, "max_tokens": 1000, "stream": True}
            stream = await ask(client, question, **long)
            seen = [await anext(stream) for _ in range(8)]
            await stream.close()
            return len(seen)

    seen, deadline = asyncio.run(leave()), time.monotonic() + 20
    while wrote(left := metrics(server), "student") - wrote(before, "student") < seen - 1:
        assert time.monotonic() < deadline
    assert answers(left) == answers(before)  # it was not answered
    gone = next(line for line in reversed(server.lines()) if line["status"] == 499)
    assert (gone["model"], gone["answered_by"]) == ("student", "student")

    async def judged():
        async with server.client() as client:
            body = {"problem": question, "answer": "#### 5", "max_tokens": 5}
            await client.post("/feedback", cast_to=object, body=body)

    asyncio.run(judged())
    assert wrote(metrics(server), "student") - wrote(left, "student") == 5


def test_a_log_line_says_why_a_request_was_refused(server):
    """Also where its body could be read, and of a field that stands there twice."""
    twice = b'{"model": "student", "max_tokens": 2, "max_tokens": 3}'
    errors = {
        twice: (400, "invalid_value"),
        b'{"model": "student"}': (400, "missing_required_parameter"),
    }
    for body, error in errors.items():
        found = asyncio.run(exchange(server.port, post("/v1/chat/completions", body)))
        assert (b"'max_tokens' twice" in found) == (body == twice)
        [number] = re.findall(r"x-request-id: (\w+)", found.decode())
        line = server.line(number)
        assert (line["status"], line["error"]) == error


def test_with_a_draft_the_expert_says_the_same(run, tmp_path):
    """Greedy, drawn by lot and cut off; several ask at once, and it writes one text at a time."""
    asked = questions(3)
    alike = [{}, {"temperature": 1.5, "seed": 3}, {"max_tokens": 7}]
    found = []
    for options in ((), ("--speculate", "4")):
        with serving(tmp_path, run, "--expert", "tiny", *options) as server:
            said = [in_parallel(server, asked, model="expert", **more) for more in alike]
            found.append([asyncio.run(one) for one in said])
            counted = metrics(server)
        accepted = counted['mlx_fd_tokens_total{kind="accepted",model="expert"}']
        assert (accepted > 0) == bool(options)
    assert found[0] == found[1]
    assert 0.3 < accepted / wrote(counted, "expert") < 0.81
    with pytest.raises(UserError, match="nobody to propose tokens to; add --expert"):
        open_served(str(run), None, speculate=4)


def refuse_web_pages(server):
    """A page in a browser on this machine cannot use a server without a key."""
    body = json.dumps({"problem": "x", "answer": "y"}).encode()
    other = post("/v1/feedback", body).replace(b"Host: localhost", b"Host: evil.example")
    assert b" 403 " in asyncio.run(exchange(server.port, other))[:16]
    kind = "Content-Type: text/plain"
    form = post("/v1/feedback", body, kind, f"Content-Length: {len(body)}")
    assert b" 415 " in asyncio.run(exchange(server.port, form))[:16]


def test_a_full_server_says_when_to_come_again_and_a_term_lets_it_finish(tmp_path):
    """One server that is full, loses clients, and is then asked to stop under load."""
    [question] = questions(1)
    run = tiny_run(tmp_path / "run", score_at="prompt")
    options = ("--batch-size", "1", "--queue", "3")
    with serving(tmp_path, run, *options, key="") as server:
        refuse_web_pages(server)

        async def health():
            return await exchange(server.port, GET_HEALTH)

        async def until(said):
            deadline = time.monotonic() + 60
            while said not in await health():
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)

        async def busy():
            async with server.client() as client:
                # Almost random at this temperature: these do not end soon by themselves.
                long = {"temperature": 2.0, "max_tokens": 400, "stream": True}
                streams = [await ask(client, question, seed=seed, **long) for seed in range(4)]
                with pytest.raises(openai.RateLimitError) as full:
                    await ask(client, question)
                wait = int(full.value.response.headers["retry-after"])
                for stream in (streams[0], streams[2]):  # who runs and who waits: both leave
                    await stream.close()
                await until(b'"inside": 2')
                last = asyncio.ensure_future(ask(client, question, model="cascade"))
                await until(b'"inside": 3')
                os.kill(server.process.pid, signal.SIGTERM)
                await until(b" 503 ")
                with pytest.raises(openai.InternalServerError, match="shutting down") as refused:
                    await ask(client, question)
                rest = [[chunk async for chunk in streams[place]] for place in (1, 3)]
                return wait, refused.value.status_code, rest, await last

        wait, refused, rest, last = asyncio.run(busy())
        assert 1 <= wait <= 60
        assert refused == 503
        reasons = [chunks[-1].choices[0].finish_reason for chunks in rest]
        assert set(reasons) <= {"stop", "length"}
        assert last.choices[0].finish_reason == "stop"
        assert -1 < last.mlx_fd["score"] < 1
        server.process.join(20)
        assert server.process.exitcode == 0
        assert {line["event"] for line in server.lines()} == {"request", "stopping"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--host", "0.0.0.0"), "set an API key"),
        (("--api-key-file", "short"), "at least 16"),
        (("--keep-most", "5"), "no effect without --keep"),
    ],
)
def test_options_that_would_do_other_than_they_seem_are_refused(
    tmp_path, monkeypatch, options, says
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLX_FD_API_KEY", raising=False)
    (tmp_path / "short").write_text("abc\n")
    with pytest.raises(UserError, match=says):
        cli(["serve", "--student", "tiny-student", *options], standalone_mode=False)
