"""Problems with choices and with texts go through every command, as those with numbers do."""

import json
from functools import partial
from pathlib import Path

import pytest

from mlx_fd import open_student
from mlx_fd.config import override, preset
from mlx_fd.errors import UserError
from mlx_fd.evaluation.agreeing import Agreeing
from mlx_fd.evaluation.baselines.trials import Trial
from mlx_fd.problems import Problem, arithmetic, execution, load
from mlx_fd.problems.kinds import form_of
from mlx_fd.problems.parsing import parse_feedback
from mlx_fd.problems.prompts import answer_prompt
from mlx_fd.training.planning import plan_of
from mlx_fd.training.selfdistill.methods import configured
from support.shell import shell

mlx_fd = partial(shell, cwd=Path("/"))

SIZES = ["--batch-size", 2, "--probe-size", 2, "--seed", 1]
PROMPTS = ["--answer-kind", "none", "--problems"]
SHORT = ["--max-answer-tokens", 24, "--max-feedback-tokens", 24, "--max-merge-tokens", 16]
ONCE = ["--kd-steps", 1]


def choice(problem):
    value = int(problem.answer)
    return {"question": problem.question, "choices": [value + 1, value, value + 7], "answer": 1}


def text(problem):
    return {"question": f"{problem.question} Who?", "answer": ["Ann", "Anna"]}


def none(problem):
    return {"prompt": answer_prompt(problem.question)}


@pytest.fixture(scope="module")
def ungraded(tmp_path_factory):
    """A loop on prompts alone, and the file that they are in."""
    folder = tmp_path_factory.mktemp("none")
    rows = map(none, arithmetic.load("train").problems[:6])
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = mlx_fd("loop", "--preset", "tiny", "--no-solutions", *PROMPTS, folder / "p.jsonl",
                  "--episodes", 2, *SIZES, *SHORT, *ONCE, "--out", folder / "run")  # fmt: skip
    assert done.status == 0, done.err
    return folder / "run", folder / "p.jsonl", done.out


def test_without_gold_the_loop_goes_by_the_experts_verdict(ungraded):
    run, _, printed = ungraded
    summary = json.loads((run / "summary.json").read_text())
    rows = [json.loads(line) for line in (run / "episodes.jsonl").read_text().splitlines()]
    assert {row["correct_before"] for row in rows} == {row["correct_after"] for row in rows}
    assert {row["correct_after"] for row in rows} == {row["reference"] for row in rows} == {None}
    scores = [row["expert_feedback"]["written_score"] for row in rows]
    assert summary["verdicts"]["first_answers"]["right"] == sum(score > 0 for score in scores)
    assert summary["verdicts"]["first_answers"]["n"] == len(scores) == 2
    verdicts = summary["headroom"]["verdicts"]
    assert verdicts["expert"]["n"] == verdicts["student"]["n"] == 2
    assert summary["headroom"]["expert_right"] is None
    assert "without right answers: good by the expert's verdict" in printed
    assert "first answers right" not in printed
    report = mlx_fd("report", run)
    assert report.status == 0, report.err


def test_without_gold_judging_is_evaluated_by_the_expert(ungraded):
    run, file, _ = ungraded
    done = mlx_fd("eval", run, *PROMPTS, file, "--limit", 3, "--json")
    assert done.status == 0, done.err
    assert "has no right answers" in done.err
    solved, judged = json.loads(done.out)["sets"]
    assert {name for one in solved["systems"] for name in one["measures"]} == {"cut", "score"}
    lines = (run / "eval" / "fast" / "outputs.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["set"] == judged["name"]]
    assert [system["name"] for system in judged["systems"]] == ["student", "clear"]
    for system in judged["systems"]:
        own = [row for row in rows if row["system"] == system["name"]]
        said = [parse_feedback(row["turns"]["student_feedback"]).written_score for row in own]
        scores = [
            row["score"] if score is None else score for row, score in zip(own, said, strict=True)
        ]
        agreed = [
            (score > 0) == (row["expert_score"] > 0) for row, score in zip(own, scores, strict=True)
        ]
        found = system["measures"]["agreement"]
        assert (found["value"], found["n"]) == (sum(agreed) / 3, 3)
        gaps = [abs(row["score"] - row["expert_score"]) for row in own]
        assert system["measures"]["score_gap"]["value"] == pytest.approx(sum(gaps) / 3)


def test_a_student_agrees_by_the_score_in_its_text():
    """As in the loop; it was the head's sign, which says less."""
    turns = {"student_feedback": "Bad.\nFinal score: -0.8", "expert_feedback": "Final score: -1"}
    given = Trial(turns, "student_feedback", 0.6, {}, {}, {}, {}, ())
    problem = Problem("1", "Why?", "", "", "none")
    found = Agreeing("judging", [problem], ("student",)).row(problem, given, "auto")
    assert (found["final"], found["reference"], found["correct"]) == ("not good", "not good", True)
    [agreement, *_] = Agreeing("judging", [problem], ("student",)).measures(
        [[{**found, "score": given.score}]]
    )
    assert (agreement.name, agreement.values) == ("agreement", [1.0])


def test_without_gold_an_expert_is_distilled_all_the_same(ungraded, tmp_path):
    _, file, _ = ungraded
    out = tmp_path / "run"
    done = mlx_fd("distil", "--expert", "tiny", *PROMPTS, file, "--episodes", 4, *SIZES, *SHORT[:2],
                  "--probe-every", 1, "--out", out)  # fmt: skip
    assert done.status == 0, done.err
    summary = json.loads((out / "summary.json").read_text())
    assert summary["attempts"]["right"] is None and summary["attempts"]["n"] == 4
    assert summary["held_out"]["after"]["n"] == 0
    assert summary["updates"]["steps"] == 2
    assert summary["best_checkpoint"] == "000002"
    assert "none are known" in done.out and "%" not in done.out.split("trained on")[0]


def test_without_gold_a_model_learns_from_what_a_critic_says(ungraded, tmp_path):
    _, file, _ = ungraded
    method = ["--context", "feedback", "--critic", "tiny", "--model", "tiny-student"]
    done = mlx_fd("self-distill", *method, *PROMPTS, file, "--episodes", 2, *SIZES, *SHORT[:4],
                  "--out", tmp_path / "run")  # fmt: skip
    assert done.status == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "run/attempts.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and {row["correct"] for row in rows} == {None}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["attempts"]["right"] is None and summary["updates"]["steps"] == 1
    assert mlx_fd("report", tmp_path / "run").status == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "grpo"}, "--objective grpo rewards right answers"),
        ({"method": "sdpo"}, "--context sibling says which attempts are right"),
        ({"given": {"context": "feedback"}}, "where there is no --critic"),
        (
            {"given": {"policy_weight": 0.1, "num_generations": 2}},
            "--policy-weight adds a loss that rewards right answers",
        ),
        ({"given": {"gate": "ema", "context": "feedback", "critic": "tiny"}}, "--gate ema"),
        ({"method": "opsd-reference"}, "6 of the 6 problems drawn from"),
        ({"method": "sft"}, "--expert-answers all takes all"),
    ],
)
def test_what_needs_right_answers_is_refused_in_a_sentence(ungraded, options, said):
    _, file, _ = ungraded
    sizes = {"episodes": 4, "probe_size": 2, "answer_kind": "none", "problems": str(file)}
    config = configured(options.get("method", "custom"), sizes | options.get("given", {}))
    with pytest.raises(UserError, match=said):
        plan_of(config)


def test_the_loop_says_that_solutions_need_gold(ungraded):
    _, file, _ = ungraded
    sizes = {"episodes": 4, "probe_size": 2, "problems": str(file), "answer_kind": "none"}
    config = override(preset("tiny"), sizes, "test")
    assert any("not from solutions" in note for note in plan_of(config).notes)
    quiet = override(config, {"solutions": False}, "test")
    assert not any("solutions" in note for note in plan_of(quiet).notes)


def test_the_loop_says_that_programs_have_no_line_for_the_loss_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(execution, "_permission", execution._Permission(given=True))
    file = tmp_path / "p.jsonl"
    rows = [{"text": f"Add {k}.", "test_list": [f"assert add(1) == {k + 1}"]} for k in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"episodes": 4, "probe_size": 2, "problems": str(file), "exam_size": 0}
    config = override(preset("tiny"), {**sizes, "losses": ("lm", "answer")}, "test")
    assert any("the loss answer has nothing to learn" in note for note in plan_of(config).notes)
    quiet = override(config, {"losses": ("lm",)}, "test")
    assert not any("loss answer" in note for note in plan_of(quiet).notes)


@pytest.fixture(scope="module", params=[choice, text], ids=["choice", "text"])
def run(request, tmp_path_factory):
    """A loop on such problems, the folder it is in, and its kind."""
    folder = tmp_path_factory.mktemp("kinds")
    rows = map(request.param, arithmetic.load("train").problems[:6])
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = mlx_fd("loop", "--preset", "tiny", "--problems", folder / "p.jsonl", "--episodes", 2,
                  "--exam-size", 0, *SIZES, *SHORT, *ONCE, "--out", folder / "run")  # fmt: skip
    assert done.status == 0, done.err
    return folder, request.param


def test_rows_have_the_kinds_own_answers(run):
    folder, made = run
    rows = [
        json.loads(line) for line in (folder / "run" / "episodes.jsonl").read_text().splitlines()
    ]
    assert {row["reference"] for row in rows} == ({"B"} if made is choice else {"Ann"})
    for row in rows:
        assert row["correct_after"] == (row["final"]["final"] in ("B", "ann", "anna"))
        assert ("\nB. " in row["question"]) is (made is choice)
    manifest = json.loads((folder / "run" / "manifest.json").read_text())
    assert manifest["problems"]["kind"] == made.__name__


def test_the_judge_reads_what_the_student_was_trained_on(run):
    folder, _ = run
    (problem, *_) = load(str(folder / "p.jsonl")).problems
    judge = open_student(folder / "run")
    asked = judge.student_lm.tokenizer.decode(list(judge.requests([(problem.question, "B")])[0]))
    assert answer_prompt(problem.question, form_of(problem)) in asked


def test_they_are_evaluated_and_reported(run):
    folder, made = run
    few = ["--problems", folder / "p.jsonl", "--limit", 2, "--max-tokens", 24]
    done = mlx_fd("eval", folder / "run", *few, "--json")
    assert done.status == 0, done.err
    (found,) = json.loads(done.out)["sets"]
    measures = found["systems"][0]["measures"]
    assert measures["accuracy"]["n"] == 2 and "accuracy_strict" not in measures
    assert ("token_f1" in measures) is (made is text)
    outputs = (folder / "run" / "eval" / "fast" / "outputs.jsonl").read_text().splitlines()
    references = {row["reference"] for row in map(json.loads, outputs)}
    assert references == ({"B"} if made is choice else {"Ann"})
    done = mlx_fd("report", folder / "run")
    assert done.status == 0, done.err


@pytest.mark.parametrize("made", [choice, text])
@pytest.mark.parametrize(
    "command",
    [["distil", "--expert", "tiny"],
     ["self-distill", "--method", "grpo", "--model", "tiny-student", "--num-generations", 2]],
    ids=["distil", "self-distill"],
)  # fmt: skip
def test_a_model_that_solves_learns_from_them(command, made, tmp_path):
    file, out = tmp_path / "p.jsonl", tmp_path / "run"
    problems = map(made, arithmetic.load("train").problems[:6])
    file.write_text("".join(json.dumps(row) + "\n" for row in problems))
    done = mlx_fd(*command, "--problems", file, "--episodes", 2, *SIZES,
                  "--max-answer-tokens", 24, "--out", out)  # fmt: skip
    assert done.status == 0, done.err
    rows = [json.loads(line) for line in (out / "attempts.jsonl").read_text().splitlines()]
    assert {row["reference"] for row in rows} == ({"B"} if made is choice else {"Ann"})
    for row in rows:
        assert row["correct"] == (row["final"] in ("B", "ann", "anna"))
    assert json.loads((out / "summary.json").read_text())["held_out"]["after"]["n"] == 2
