"""Parts of the server by themselves: lanes, texts that stop, who may come in."""

import asyncio
import contextlib
import dataclasses

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator

from mlx_fd.errors import UserError
from mlx_fd.models.conversation import Conversation
from mlx_fd.models.generation import first_prompt
from mlx_fd.models.lanes import Job, open_lane
from mlx_fd.models.loading import Draft, load
from mlx_fd.models.resolve import resolve
from mlx_fd.models.thinking import Thinking
from mlx_fd.models.writing import Sampling
from mlx_fd.problems.prompts import answer_prompt
from mlx_fd.problems.thoughts import FAMILIES
from mlx_fd.serve.errors import ApiError
from mlx_fd.serve.exchange import Exchange
from mlx_fd.serve.limits import Admission, Limits, is_loopback, same_key
from mlx_fd.serve.running import _listen
from mlx_fd.serve.text import ReplyText
from support.serving import questions


@pytest.fixture(scope="module")
def loaded():
    return load(resolve("tiny-student"))


def jobs(loaded):
    prompts = [first_prompt(loaded, answer_prompt(one)) for one in questions(4)]
    drawn = [Sampling(64), Sampling(24, 0.9, seed=5), Sampling(9, 1.0, 1.1, 7, 0.95, 20)]
    return [
        Job(Conversation(), prompt, drawn[place % 3], keep=place == 0)
        for place, prompt in enumerate(prompts)
    ]


def written(lane, wanted):
    """What a lane writes of some jobs, of which each joins a step after the one before it."""
    left, numbers, found = list(wanted), [], {}
    while left or len([one for one in found.values() if one[-1][1]]) < len(wanted):
        if left:
            numbers.append(lane.add(left.pop(0)))
        for step in lane.step():
            found.setdefault(step.number, []).append((step.token, step.ended, step.cache))
    return [[one[:2] for one in found[number]] for number in numbers], found[numbers[0]][-1][2]


def test_one_by_one_writes_what_a_running_batch_does(loaded):
    together = open_lane(loaded, 3)
    alone = open_lane(dataclasses.replace(loaded, batched=False), 3)
    assert type(alone) is not type(together)
    (many, cache), (one, kept) = written(together, jobs(loaded)), written(alone, jobs(loaded))
    assert many == one
    assert {steps[-1][1] for steps in many} == {"stop", "length"}
    # The state after the first job is that of its prompt and its text.
    length = len(jobs(loaded)[0].prompt) + len(many[0])
    assert [layer.offset for layer in cache] == [layer.offset for layer in kept]
    assert {layer.offset for layer in kept} == {length}


def test_with_a_draft_a_lane_writes_the_same(loaded):
    """One text at a time; who leaves in the middle leaves nothing behind."""
    expert = dataclasses.replace(load(resolve("tiny")), tokenizer=loaded.tokenizer)
    drafted = open_lane(dataclasses.replace(expert, draft=Draft(loaded, 4)), 3)
    wanted = jobs(expert)
    number = drafted.add(wanted[1])
    assert sum(len(drafted.step()) for _ in range(3)) == 3
    drafted.drop(number)
    (plain, cache), (found, kept) = written(open_lane(expert, 3), wanted), written(drafted, wanted)
    assert found == plain
    assert [layer.offset for layer in kept] == [layer.offset for layer in cache]
    drafted.add(wanted[0])
    steps = [step for _ in plain[0] for step in drafted.step()]
    assert 0.5 * len(steps) < sum(step.accepted for step in steps) < len(steps)


def test_log_probabilities_are_those_of_a_whole_reading(loaded):
    wanted = [
        dataclasses.replace(job, logprobs=place != 1) for place, job in enumerate(jobs(loaded))
    ]
    lanes = [open_lane(loaded, 3), open_lane(dataclasses.replace(loaded, batched=False), 3)]
    for lane in lanes:
        numbers, found = [lane.add(job) for job in wanted], {}
        while len([one for one in found.values() if one[-1].ended]) < len(wanted):
            for step in lane.step():
                found.setdefault(step.number, []).append(step)
        assert all(step.logprob is None for step in found[numbers[1]])
        # The third one is drawn with a penalty, which changes the probabilities.
        for number, job in ((numbers[0], wanted[0]), (numbers[3], wanted[3])):
            tokens = [step.token for step in found[number]]
            logits = loaded.model(mx.array([*job.prompt, *tokens])[None])[0, len(job.prompt) - 1 :]
            rows = np.array(logits[:-1, : loaded.vocab].astype(mx.float32), dtype=np.float64)
            truth = rows[range(len(tokens)), tokens] - np.log(np.exp(rows).sum(-1))
            values = [step.logprob.item() for step in found[number]]
            assert values == pytest.approx(truth, abs=2e-4)


@pytest.mark.parametrize("running", [0, 1, 3])
def test_who_joins_has_a_first_token_a_step_sooner_than_in_bare_generation(loaded, running):
    """An engine takes orders between two steps: one more at most, and what the queue takes."""
    prompts = [first_prompt(loaded, answer_prompt(one)) for one in questions(running + 1)]
    lane = open_lane(loaded, 8)
    bare = BatchGenerator(loaded.model, completion_batch_size=8, prefill_batch_size=8)

    def insert(prompt):
        return bare.insert([list(prompt)], max_tokens=[48])[0]

    def add(prompt):
        return lane.add(Job(Conversation(), prompt, Sampling(48), logprobs=True))

    def first(number, step):
        return next(count for count in range(1, 50) if number in step())

    ways = [
        (insert, lambda: [one.uid for one in bare.next()[1]]),
        (add, lambda: [one.number for one in lane.step()]),
    ]
    steps = []
    for begin, step in ways:
        for prompt in prompts[:running]:
            begin(prompt)
        for _ in range(5 if running else 0):
            step()
        steps.append(first(begin(prompts[-1]), step))
    bare.close()
    assert steps[1] < steps[0] < 5


def test_a_text_that_leaves_is_written_no_further(loaded):
    for batched in (True, False):
        lane = open_lane(dataclasses.replace(loaded, batched=batched), 1)
        first, second = (lane.add(job) for job in jobs(loaded)[:2])
        while not [step for step in lane.step() if step.number == first]:
            continue
        lane.drop(first)
        lane.drop(first)
        steps = []
        while not steps or steps[-1].ended is None:
            steps += lane.step()
        assert {step.number for step in steps} == {second}
        assert lane.step() == []


def said(loaded, text, stops=()):
    """The pieces of a text as they are shown while its tokens come."""
    reply, pieces = ReplyText(loaded, stops), []
    for token in loaded.tokenizer.encode(text, add_special_tokens=False):
        pieces.append(reply.add(token))
        if reply.stopped:
            break
    return [*pieces, reply.end()], reply.stopped


def test_a_text_ends_before_its_stop_and_nothing_of_that_is_shown(loaded):
    text = "Step 1: <<4+5=9>>9\n#### 9"
    assert said(loaded, text) == said(loaded, text, ["zzz"])
    assert "".join(said(loaded, text)[0]) == text
    for stop in (">>", "\n####", "9\n", "S"):
        pieces, stopped = said(loaded, text, ["never", stop])
        assert ("".join(pieces), stopped) == (text.partition(stop)[0], True)
    # A stop that only begins is shown after all.
    pieces, stopped = said(loaded, text, ["#### 9 and more"])
    assert ("".join(pieces), stopped) == (text, False)


def test_thoughts_are_not_shown(loaded):
    names = [field.name for field in dataclasses.fields(Thinking)]
    made = {name: () if name.endswith("ids") else -1 for name in names}
    made |= {"family": FAMILIES[0], "on": False, "limit": 0, "tail": "", "closed": ""}
    thinking = dataclasses.replace(loaded, thinking=Thinking(**made))
    reply, shown = ReplyText(thinking, ()), []
    for piece in ("4 ", "<th", "ink>no ", "</thi", "nk>+ 5"):
        shown.append(reply._shown(piece))
    assert "".join(shown) + reply.end() == "4 + 5"


def test_who_comes_while_weights_are_taken_waits_and_who_is_in_finishes():
    async def run():
        admission, order = Admission(Limits(places=2, queue=1)), []

        async def request(name, seconds):
            async with admission.enter():
                order.append(f"{name} begins")
                await asyncio.sleep(seconds)
                order.append(f"{name} ends")

        async def reload():
            async with admission.alone():
                order.append("alone")
                await asyncio.sleep(0.02)

        first = asyncio.ensure_future(request("first", 0.05))
        await asyncio.sleep(0)
        taking = asyncio.ensure_future(reload())
        await asyncio.sleep(0)
        late = [asyncio.ensure_future(request("late", 0)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as full:
            await request("none", 0)
        late[1].cancel()
        await asyncio.gather(first, taking, late[0])
        assert full.value.status == 429
        assert admission.inside == admission.running == 0
        return order

    assert asyncio.run(run()) == [
        *("first begins", "first ends", "alone", "late begins", "late ends")
    ]


@pytest.mark.parametrize(
    ("host", "own"),
    [
        *(("127.0.0.1", True), ("127.8.8.8", True), ("localhost", True), ("[::1]", True)),
        *(("0.0.0.0", False), ("", False), ("localhost.evil.example", False), ("::", False)),
        *(("127.0.0.1.evil.example", False), ("192.168.0.2", False)),
    ],
)
def test_only_this_machine_is_this_machine(host, own):
    assert is_loopback(host) is own


def test_two_servers_have_not_one_port_while_they_open_their_models():
    with contextlib.closing(_listen("127.0.0.1", 0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: cannot listen there"):
            _listen("127.0.0.1", port)


@pytest.mark.parametrize("reads", [True, False])
def test_a_stream_that_breaks_off_is_noted_as_that(reads):
    """It began with status 200; what ended it is what the log and the metrics have.

    A client that reads no more gets no error, and the request ends all the same.
    """
    sent, note = [], {"status": None, "error": None}

    async def work(reply):
        await reply.events({})
        await reply.event("a")
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message)
        if not reads and len(sent) > 1:
            await asyncio.Event().wait()

    async def receive():
        await asyncio.Event().wait()

    async def ended():
        async with asyncio.timeout(20):
            await Exchange(work, 0.01)({"mlx_fd": note}, receive, send)

    asyncio.run(ended())
    assert (note["status"], note["error"]) == (504, "timeout")
    assert sent[0]["status"] == 200
    assert b'"code": "timeout"' in sent[-2 if reads else -1]["body"]


def test_a_key_is_the_key():
    assert same_key("a" * 20, "a" * 20)
    assert not same_key("a" * 19, "a" * 20)
    assert not same_key("\xe9" * 20, "a" * 20)
