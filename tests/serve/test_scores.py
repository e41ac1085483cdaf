"""What the cascade serves is what was calibrated: the same scores, the same who answers."""

import asyncio
import dataclasses

import pytest

from mlx_fd import problems
from mlx_fd.cli import cli
from mlx_fd.errors import UserError
from mlx_fd.evaluation import running, suites
from mlx_fd.evaluation.cache import Cache
from mlx_fd.evaluation.cascade import file
from mlx_fd.evaluation.cascade.outcomes import outcomes
from mlx_fd.evaluation.cascade.scores import ANSWER, HEAD, SCORES
from mlx_fd.evaluation.target import open_target
from mlx_fd.export.exporter import export
from mlx_fd.export.form import Form
from mlx_fd.feedback.judge import locate_model, open_student
from mlx_fd.models.conversation import Conversation
from mlx_fd.models.writing import Sampling
from mlx_fd.problems.kinds import KINDS
from mlx_fd.serve.calibration import calibration_of, rule_of
from mlx_fd.serve.engine import Engine, Written
from mlx_fd.serve.judging import judge
from mlx_fd.serve.limits import Admission, Limits
from mlx_fd.serve.logs import Log
from mlx_fd.serve.metrics import Metrics
from mlx_fd.serve.models import open_served
from mlx_fd.serve.prompts import ask_chat
from mlx_fd.serve.routes.feedback import content_of
from mlx_fd.serve.rule import Rule, decided, unmeasured
from mlx_fd.serve.schema import ChatRequest, Common
from mlx_fd.serve.service import Options, Service
from support.serving import ask, questions, serving, tiny_run
from support.trained import make_run

LIMIT = 24


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A run with a calibration, and what came of its problems."""
    folder = tmp_path_factory.mktemp("scores")
    run = tiny_run(folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_FD_CACHE", str(folder / "cache"))
        command = ["cascade", "calibrate", str(run), "--cost", "0.8", "--limit", str(LIMIT)]
        cli([*command, "--quiet"], standalone_mode=False)
        target = open_target(str(run), None)
        cache = Cache(folder / "cache" / "eval")
        bench = running.make_bench(target, suites.Options(), cache, lambda step, tokens: None)
        drawn = problems.load("arithmetic", "test").problems[:LIMIT]
        made = outcomes(bench, drawn, ANSWER, lambda step, done, count: None)
        yield run, drawn, made


def test_an_exported_student_is_served_with_its_score_head(tmp_path):
    run = make_run(tmp_path / "run", "tiny-student", score_at="own")
    form = Form(format="mlx", dtype="float32", parity_problems=0)
    export(str(run), tmp_path / "student", form, progress=lambda *_: None)
    asked = [("2 + 3?", "#### 6")]
    (wanted,) = open_student(run).judge(asked, max_tokens=16)
    for expert in (None, "tiny"):
        served = open_served(str(tmp_path / "student"), expert)
        assert served.scores and served.form == KINDS["number"].form
        (found,) = served.judge.judge(asked, max_tokens=16)
        assert found.text == wanted.text
        assert found.head_score == pytest.approx(wanted.head_score, abs=1e-5)


def test_a_server_scores_and_passes_on_as_the_calibration_did(calibrated):
    run, drawn, made = calibrated
    threshold = file.read(run)["promise"]["threshold"]

    async def all_of(server):
        async with server.client() as client:
            return await asyncio.gather(
                *(ask(client, one.question, model="cascade") for one in drawn)
            )

    async def otherwise(server):
        """The first question, asked in ways that the calibration did not measure."""
        verbatim, short = {"extra_body": {"mlx_fd": {"verbatim": True}}}, {"max_tokens": 3}
        given = (verbatim, {"temperature": 1.0, "seed": 1}, {"stop": ["\n"]}, short)
        async with server.client() as client:
            return [await ask(client, drawn[0].question, model="cascade", **one) for one in given]

    with serving(run.parent, run, "--expert", "tiny") as server:
        replies = [reply.mlx_fd for reply in asyncio.run(all_of(server))]
        others = [reply.mlx_fd for reply in asyncio.run(otherwise(server))]
    reasons = ("in the form of the training", "at a temperature", "a stop text", "64 tokens")
    for other, says in zip(others, reasons, strict=True):
        assert (other["confidence"], other["threshold"]) == (None, threshold)
        assert other["score"] is not None
        assert "; it was not set for " in other["reason"] and says in other["reason"]
    for reply, one in zip(replies, made, strict=True):
        assert reply["score"] == pytest.approx(one.score, abs=2e-4)
        assert reply["scored_by"] == "answer"
        assert reply["threshold"] == threshold
        assert reply["student_tokens"] == one.student_tokens
        assert reply["answered_by"] == ("expert" if one.score < threshold else "student")
        assert 0 <= reply["confidence"] <= 1
    passed_on = sum(reply["answered_by"] == "expert" for reply in replies)
    assert passed_on == file.read(run)["promise"]["against"]
    assert 0 < passed_on < LIMIT


def test_a_reply_has_a_confidence_where_one_was_measured():
    rule = Rule(ANSWER, 0.5, lambda score: 0.9, "calibrated", 8)
    whole = Written("#### 4", (1, 2), "stop", Conversation(), 0, 0.0)
    long = dataclasses.replace(whole, tokens=(1,) * 9)
    at_its_limit = dataclasses.replace(whole, tokens=(1,) * 8, reason="length")
    short = dataclasses.replace(whole, reason="length")
    likeliest = Sampling(8)

    def says(sampling, answer, *, in_form=True):
        return unmeasured(rule, sampling, answer, in_form=in_form)

    assert says(likeliest, whole) == says(Sampling(2), whole) == says(Sampling(9), whole) == ""
    assert says(likeliest, at_its_limit) == ""
    assert says(likeliest, whole, in_form=False)
    assert says(Sampling(8, temperature=0.1), whole) and says(Sampling(8, 0.0, 1.1), whole)
    assert says(likeliest, dataclasses.replace(whole, cut=True))
    assert says(Sampling(2), short) and says(Sampling(9), long)


def test_a_feedback_has_a_confidence_where_one_was_measured(tmp_path):
    """The head's score is one of the calibration's where it reads what it read there."""
    run = tiny_run(tmp_path / "run", score_at="own")
    [problem] = questions(1)
    rule = Rule(HEAD, 0.5, lambda score: 0.9, "calibrated", 64)

    async def judged():
        engine = Engine(2)
        served = await engine.start(lambda: open_served(str(run), None))
        parts = (Options(str(run)), engine, served, rule, Metrics(), Log())
        service = Service(*parts, Admission(Limits()))
        try:
            [prompt] = served.judge.requests([(problem, "#### 5")])
            wanted = [Sampling(112), Sampling(112, 1.0, seed=1), Sampling(3), Sampling(500)]
            found = [await judge(service, prompt, one, text=True) for one in wanted]
            return [content_of(service, one, text=True)["confidence"] for one in found]
        finally:
            await engine.stop()

    assert asyncio.run(judged()) == [0.9, None, None, 0.9]


def test_a_start_says_where_the_calibration_is_of_longer_replies(calibrated):
    run, _, _ = calibrated
    served, options = open_served(str(run), None), Options(str(run))
    assert rule_of(options, served).source == "calibrated, cost 0.8"
    short = rule_of(dataclasses.replace(options, limits=Limits(max_tokens=63)), served)
    assert short.source.endswith("but on longer replies: up to 64 tokens, here --max-tokens 63")
    assert short.confidence is not None


def test_a_calibration_made_with_another_score_is_refused(calibrated):
    run, _, _ = calibrated
    ref, options = locate_model(str(run)), Options(str(run), "tiny")
    assert calibration_of(options, ref)["score"] == "answer"
    assert calibration_of(dataclasses.replace(options, score="answer"), ref) is not None
    other = dataclasses.replace(options, score="head")
    with pytest.raises(UserError, match="was calibrated with --score answer, and a threshold"):
        calibration_of(other, ref)
    alone = Options("tiny-student")
    for given in ({"threshold": 0.5}, {"score": "answer"}):
        with pytest.raises(UserError, match="no expert to pass requests on to; add --expert"):
            rule_of(dataclasses.replace(alone, **given), open_served("tiny-student", None))
    # Who names a threshold names what it is of.
    assert calibration_of(dataclasses.replace(other, threshold=0.1), ref) is not None
    plain = locate_model("tiny-student")
    with pytest.raises(UserError, match="no trained score head; take --score answer"):
        calibration_of(other, plain)
    assert set(SCORES) == {"answer", "head"}


def test_a_threshold_before_a_calibration_says_of_which_score_it_is(tmp_path):
    """It was the head's, where the student has one; a calibration's default is the answer's."""
    run = make_run(tmp_path / "run", "tiny-student")
    ref, options = locate_model(str(run)), Options(str(run), "tiny")
    assert calibration_of(options, ref) is None
    assert rule_of(options, open_served(str(run), "tiny")).threshold is None  # all is passed on
    with pytest.raises(UserError, match="--score answer or --score head"):
        calibration_of(dataclasses.replace(options, threshold=0.1), ref)
    named = dataclasses.replace(options, threshold=0.1, score="head")
    assert calibration_of(named, ref) is None
    assert rule_of(named, open_served(str(run), "tiny")).threshold == 0.1


def test_a_plain_student_has_a_cascade_where_there_is_an_expert():
    served = open_served("tiny-student", "tiny")
    assert served.names == ("cascade", "student", "expert")
    assert dataclasses.replace(served, expert=None).names == ("student",)
    options = Options("tiny-student", "tiny")
    rule = rule_of(options, served)
    assert (rule.score, rule.threshold) == (ANSWER, None)
    written = Written("#### 4", (1, 2), "stop", Conversation(), 0, 0.0, (-0.5, -0.5))
    passed_on = decided(rule, 0.99, written, has_expert=True)
    assert (passed_on.by, passed_on.scored_by) == ("expert", "answer")
    assert "it is not calibrated, and no --threshold is given" in passed_on.reason
    named = rule_of(dataclasses.replace(options, threshold=0.5), served)
    assert decided(named, 0.5, written, has_expert=True).by == "student"
    assert decided(named, 0.49, written, has_expert=True).by == "expert"
    request = ChatRequest(
        Common("cascade", Sampling(64), (), stream=False, usage=False), (("user", "2 + 2?"),), None
    )
    asked = ask_chat(served, request, Limits(), verbatim=False, judges=False)
    assert set(asked.prompts) == {"student", "expert"}
