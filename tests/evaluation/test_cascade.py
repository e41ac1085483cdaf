"""The cascade: curves by brute force, promises by simulation, the command as a user calls it."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
from scipy.optimize import isotonic_regression
from scipy.stats import binom

from mlx_fd.cli import cli
from mlx_fd.cli.terminal.cascade import summary
from mlx_fd.errors import UserError
from mlx_fd.evaluation.cascade import choice, confidence, curve, file, keeping
from mlx_fd.evaluation.cascade.outcome import Outcome
from mlx_fd.evaluation.cascade.scores import ANSWER, HEAD, answer_score
from mlx_fd.report.page import make_page
from mlx_fd.report.reading import read_runs
from mlx_fd.runs.records.parts import EstimateRow
from mlx_fd.runs.summary import wilson
from support.pages import check_charts
from support.serving import questions, tiny_run


def drawn(rng, n, *, levels=None, student=0.6, expert=0.9):
    """Problems of which a high score makes a right answer likelier."""
    scores = rng.uniform(-1, 1, n)
    if levels:
        scores = np.round(scores * levels) / levels
    right = rng.random(n) < student + (1 - student) * scores * 0.9
    return [
        Outcome(str(k), float(scores[k]), bool(right[k]), bool(rng.random() < expert), 5, 7 + k % 3)
        for k in range(n)
    ]


def passed(found, threshold):
    """Accuracy and expert tokens of a cascade, word by word."""
    right = [one.student if one.score >= threshold else one.expert for one in found]
    tokens = [0 if one.score >= threshold else one.expert_tokens for one in found]
    return np.mean(right), np.mean(tokens)


def test_a_curve_is_the_cascade_at_each_threshold():
    found = drawn(np.random.default_rng(0), 60)
    points = curve.curve(found)
    assert len(points) == 61
    for point in points[:-1]:
        accuracy, tokens = passed(found, point["threshold"])
        assert point["accuracy"] == pytest.approx(accuracy)
        assert point["expert_tokens"] == pytest.approx(tokens)
    last = points[-1]
    assert (last["passed_on"], last["threshold"]) == (1, None)
    assert last["accuracy"] == last["random"] == pytest.approx(np.mean([f.expert for f in found]))
    assert last["oracle"] == pytest.approx(last["accuracy"])


def test_an_oracle_is_the_best_of_all_choices_and_a_lottery_their_mean():
    found = drawn(np.random.default_rng(3), 9, expert=0.7)
    for k, point in enumerate(curve.curve(found)):
        accuracies = [
            np.mean(
                [one.expert if place in chosen else one.student for place, one in enumerate(found)]
            )
            for chosen in map(set, itertools.combinations(range(9), k))
        ]
        assert point["oracle"] == pytest.approx(max(accuracies))
        assert point["random"] == pytest.approx(np.mean(accuracies))


def test_equal_scores_are_a_lottery_whatever_their_order():
    rng = np.random.default_rng(1)
    found = drawn(rng, 80, levels=3)
    shuffled = [found[k] for k in rng.permutation(80)]
    one, other = curve.curve(found), curve.curve(shuffled)
    assert [p["accuracy"] for p in one] == pytest.approx([p["accuracy"] for p in other])
    same = [Outcome(f.id, 0.5, f.student, f.expert, 5, 7) for f in found]
    data = curve.columns(same)
    area = curve.above_random(data["score"], data["student"], data["expert"])
    assert area == pytest.approx(0, abs=1e-12)
    data = curve.columns(found)
    assert curve.above_random(data["score"], data["student"], data["expert"]) > 0.02


@pytest.mark.parametrize(("student", "expert"), [(True, True), (False, False), (True, False)])
def test_where_all_come_out_alike_an_interval_is_wilsons(student, expert):
    found = [Outcome(str(k), k / 40, student, expert, 5, 7) for k in range(40)]
    for threshold, passes in ((0.0, 0), (None, 40)):
        by = {row["name"]: row["accuracy"] for row in curve.systems(found, threshold)}
        right = 40 * (expert if passes else student)
        low, high = wilson(right, 40)
        for name in ("cascade", "random", "oracle"):
            expected = {"value": right / 40, "low": low, "high": high, "n": 40}
            assert by[name] == pytest.approx(expected)


@pytest.mark.parametrize(("kind", "target"), [("risk", 0.3), ("accuracy", 0.7), ("cost", 0.5)])
def test_promises_are_kept_on_other_problems(kind, target):
    """In 120 draws of 150 calibration problems a promise is broken in at most about 5 %."""
    rng, broken, set_ = np.random.default_rng(7), 0, 0
    whole = drawn(rng, 20_000)
    for _ in range(120):
        places = rng.integers(0, len(whole), 150)
        promise = choice.choose([whole[k] for k in places], HEAD, kind, target)
        if not promise["kept"] or promise["threshold"] is None:
            continue
        set_ += 1
        against, of = TRUTH[kind](promise["threshold"], whole)
        share = 1 - against / of if kind == "accuracy" else against / of
        broken += share < target if kind == "accuracy" else share > target
    assert set_ > 40
    # 5 % of 120 and three standard errors.
    assert broken <= 6 + 3 * np.sqrt(120 * 0.05 * 0.95)


def most_wrong(n, risk, level):
    """Of each number of answers up to n, how many may be wrong; -1: none can be kept."""
    places = np.arange(1, n + 1)
    below = binom.ppf(level, places, risk)
    return np.where(binom.cdf(below, places, risk) <= level, below, below - 1)


@pytest.mark.parametrize(
    ("wrong", "keeps"),
    [
        # The worst case: whatever is kept, a hair too much of it is wrong.
        (lambda u: np.full_like(u, 0.1001), 0.0),
        # The best 40 % may be kept, and not an answer more.
        (lambda u: np.where(u < 0.4, 0.1, 0.9), 0.0),
        (lambda u: 0.4 * u**1.5, 0.2),
    ],
)
@pytest.mark.parametrize("n", [120, 300])
def test_a_risk_is_broken_in_at_most_five_per_cent_of_calibrations(wrong, keeps, n):
    rng, risk, draws = np.random.default_rng(n), 0.1, 2000
    grid = wrong(np.linspace(0, 1, 200_001))
    true = np.cumsum(grid) / np.arange(1, len(grid) + 1)
    most = most_wrong(n, risk, keeping.level_of(n, risk))
    broken, shares = 0, []
    for _ in range(draws):
        u = np.sort(rng.random(n))
        passing = np.flatnonzero(np.cumsum(rng.random(n) < wrong(u)) <= most)
        share = u[passing[-1]] if len(passing) else 0.0
        shares.append(share)
        broken += share > 0 and true[int(share * 200_000)] > risk
    assert broken / draws <= 0.05 + 2.6 * np.sqrt(0.05 * 0.95 / draws)
    assert np.mean(shares) >= keeps * (n == 300)


def test_the_level_is_the_largest_at_which_a_walk_crosses_in_five_per_cent():
    """Every path of 14 steps, one by one."""
    n, risk = 14, 0.35
    paths = np.array(list(itertools.product((0, 1), repeat=n)))
    weights = np.prod(np.where(paths, risk, 1 - risk), axis=1)
    counts = np.cumsum(paths, axis=1)

    def crossing(level):
        return weights[(counts <= most_wrong(n, risk, level)).any(axis=1)].sum()

    level = keeping.level_of(n, risk)
    # Between two tails nothing changes; at the next one it does.
    tails = [binom.cdf(k, m, risk) for m in range(1, n + 1) for k in range(m)]
    assert crossing(level) <= 0.05 < crossing(min(tail for tail in tails if tail > level) + 1e-9)


def test_what_is_kept_is_the_lowest_score_that_passes():
    # The best 60 without an error, then every other one wrong.
    scores = np.linspace(1, 0, 200).tolist()
    right = [place < 60 or place % 2 == 0 for place in range(200)]
    kept = keeping.keep(scores, right, 0.1)
    most = most_wrong(200, 0.1, keeping.level_of(200, 0.1))
    passing = [m for m in range(1, 201) if right[:m].count(False) <= most[m - 1]]
    assert (kept.of, kept.wrong) == (passing[-1], right[: passing[-1]].count(False))
    assert kept.threshold == scores[kept.of - 1] and kept.of > 60
    # Equal scores are kept together, or not at all.
    assert keeping.keep([0.9] * 60 + [0.5] * 140, right, 0.1).of == 60
    assert keeping.keep([0.9] * 60, [False] * 60, 0.1) is None
    assert keeping.keep([], [], 0.1) is None


def test_what_would_do_is_said_where_nothing_can_be_kept():
    scores = np.linspace(1, 0, 100).tolist()
    right = [place % 15 != 3 for place in range(100)]
    promise = choice.choose(outcomes_of(scores, right), ANSWER, "risk", 0.1)
    assert promise["threshold"] is None and promise["kept"]
    least, needed = promise["least_risk"], promise["problems_needed"]
    assert keeping.keep(scores, right, least) is not None
    assert keeping.keep(scores, right, least - 0.01) is None
    times = needed // 100
    assert keeping.keep(scores * times, right * times, 0.1) is not None
    assert keeping.keep(scores * (times - 1), right * (times - 1), 0.1) is None
    # What is wrong too often stays so.
    halves = outcomes_of(scores, [place % 2 == 0 for place in range(100)])
    hopeless = choice.choose(halves, ANSWER, "risk", 0.1)
    assert hopeless["problems_needed"] is None and hopeless["least_risk"] > 0.5


def outcomes_of(scores, right):
    pairs = enumerate(zip(scores, right, strict=True))
    return [Outcome(str(k), score, ok, True, 5, 7) for k, (score, ok) in pairs]


def test_a_summary_says_what_came_of_a_promise():
    never = [place % 15 != 3 for place in range(100)]
    promise = choice.choose(outcomes_of(range(100), never), ANSWER, "risk", 0.1)
    said = summary(cascade_file(promise, against=0, of=0))
    assert "every request is passed on" in said and "0 of 0" not in said
    assert f"--risk {promise['least_risk']:.2f} can be promised on these problems" in said
    assert f"about {promise['problems_needed']} problems would do" in said
    kept = choice.choose(outcomes_of(range(100), [True] * 100), ANSWER, "risk", 0.1)
    assert "0.0% (0 of 40): kept" in summary(cascade_file(kept, against=0, of=40))
    assert "the student kept no answer" in summary(cascade_file(kept, against=0, of=0))


def cascade_file(promise, against, of):
    area = {"value": 0.0, "low": 0.0, "high": 0.0, "n": 100}
    measured = {"against": against, "of": of, "n": 100, "above_random": area}
    return {"promise": promise, "score": "answer", "calibration": measured, "evaluation": measured}


def known(kind):
    cache = {}

    def of(threshold, whole):
        if threshold not in cache:
            cache[threshold] = choice.observed(whole, kind, threshold)
        return cache[threshold]

    return of


TRUTH = {kind: known(kind) for kind in choice.PROMISES}


def test_thresholds_are_shares_of_a_scores_range():
    rng = np.random.default_rng(4)
    heads = drawn(rng, 800)
    answers = [dataclasses.replace(one, score=(1 + one.score) / 2) for one in heads]
    for kind, target in (("risk", 0.3), ("accuracy", 0.7), ("cost", 0.5)):
        head = choice.choose(heads, HEAD, kind, target)
        answer = choice.choose(answers, ANSWER, kind, target)
        assert answer["threshold"] == pytest.approx((1 + head["threshold"]) / 2)
        assert (answer["against"], answer["of"]) == (head["against"], head["of"])


def test_an_answer_is_scored_by_its_probability_and_not_where_it_was_cut_off():
    likely, less = answer_score([-0.1, -0.2], finished=True), answer_score([-2.0], finished=True)
    assert (likely, less) == (pytest.approx(1 / 1.3), pytest.approx(1 / 3))
    # Rounding can put a sum above 0.
    assert answer_score([1e-7], finished=True) == 1
    assert answer_score([-0.1], finished=False) == 0


def test_a_cost_passes_on_as_much_as_it_may_and_an_accuracy_as_little():
    found = drawn(np.random.default_rng(2), 1000)
    cost = choice.choose(found, HEAD, "cost", 0.5)
    assert 0.3 < cost["against"] / cost["of"] < 0.5
    accuracy = choice.choose(found, HEAD, "accuracy", 0.75)
    lower = choice.choose(found, HEAD, "accuracy", 0.65)
    assert lower["threshold"] < accuracy["threshold"]
    assert accuracy["bound"] >= 0.75
    assert choice.choose(found, HEAD, "accuracy", 0.99)["kept"] is False


def test_scores_mean_what_isotonic_regression_says():
    found = drawn(np.random.default_rng(5), 400)
    ordered = sorted(found, key=lambda one: one.score)
    bins = [ordered[k : k + 20] for k in range(0, 400, 20)]
    shares = [np.mean([one.student for one in part]) for part in bins]
    wanted = isotonic_regression(shares, weights=[len(part) for part in bins]).x
    steps = confidence.steps(found)
    for part, share in zip(bins, wanted, strict=True):
        assert confidence.confidence(steps, part[0].score) == pytest.approx(share)
    assert sum(step["n"] for step in steps) == 400
    assert confidence.confidence(steps, -1.0) == steps[0]["right"]


# ------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cascade")
    run = tiny_run(folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_FD_CACHE", str(folder / "cache"))
        call("calibrate", run, "--cost", "0.9", "--limit", "32", "--score", "head")
        yield run


def call(action, run, *options):
    cli(["cascade", action, str(run), *options], standalone_mode=False)


def test_calibrate_and_eval_write_what_they_measured(run, capsys):
    calibrated = file.read(run)
    assert calibrated["evaluation"] is None
    assert len(calibrated["ids"]) == 32
    by = {row["name"]: row for row in calibrated["calibration"]["systems"]}
    assert by["cascade"]["passed_on"] <= 0.9
    assert by["expert"]["accuracy"]["value"] > by["student"]["accuracy"]["value"]
    call("eval", run, "--limit", "8", "--json")
    found = json.loads(capsys.readouterr().out)
    measured = found["evaluation"]
    assert measured["n"] == 8
    assert found["promise"] == calibrated["promise"]
    [cascade] = [row for row in measured["systems"] if row["name"] == "cascade"]
    assert set(cascade["accuracy"]) == set(EstimateRow.__annotations__)
    assert measured["against"] == round(cascade["passed_on"] * 8)
    call("eval", run, "--limit", "8")
    assert "promise, with 95%" in capsys.readouterr().out
    assert (run / "cascade.svg").read_text().startswith("<svg")
    page = make_page(read_runs([run]))
    assert "When the student passes on" in page and check_charts(page) >= 1
    assert "Accuracy against the share passed on, held out" in page


def test_a_calibration_says_what_answers_were_scored_by(run, tmp_path, capsys):
    assert file.read(run)["score"] == "head"
    assert "a score (head) of at least" in make_page(read_runs([run]))
    other = shutil.copytree(run, tmp_path / "an other", symlinks=True)
    call("calibrate", other, "--cost", "0.9", "--limit", "24")
    assert file.read(other)["score"] == "answer"
    assert "a score (answer) of at least" in capsys.readouterr().out
    with pytest.raises(Exception, match="--score are for calibrate"):
        call("eval", other, "--score", "head")
    # A file of before, when only heads were known, does not say so.
    found = {key: value for key, value in file.read(other).items() if key != "score"}
    file.write(other, {**found, "format": 1})
    again = r"is of another version; mlx-fd cascade calibrate '.*/an other' with a promise"
    with pytest.raises(UserError, match=again):
        call("eval", other)
    call("calibrate", other, "--cost", "0.9", "--limit", "24")
    assert file.read(other)["format"] == 2
    # Another student's promise was shown as the run's.
    assert not any("cascade.json" in said for said in read_runs([other])[0].missing)
    best = other / "checkpoints" / "best"
    calibrated = best.resolve().name
    shutil.copytree(best, other / "checkpoints" / "000099")
    best.unlink()
    best.symlink_to("000099")
    assert any(
        f"cascade.json is of checkpoint {calibrated}, and the student is that of 000099" in said
        for said in read_runs([other])[0].missing
    )


def written(path, questions, answers, **columns):
    """A file of problems with ids from 0 on."""
    rows = [
        {"id": str(n), "question": question, "answer": answer, **columns}
        for n, (question, answer) in enumerate(zip(questions, answers, strict=True))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def copied(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copied", symlinks=True)


def evaluated(run, source, capsys):
    capsys.readouterr()
    call("eval", run, "--problems", source, "--json")
    measured = json.loads(capsys.readouterr().out)["evaluation"]
    return measured["n"], measured["left_out"]


def test_an_evaluation_leaves_out_the_calibrations_questions_whatever_their_ids(
    copied, tmp_path, capsys
):
    asked = questions(32)
    seen, unseen = asked[:28], asked[28:]
    calibrated = written(tmp_path / "seen.jsonl", seen, range(28))
    call("calibrate", copied, "--cost", "0.9", "--problems", str(calibrated))
    others = written(tmp_path / "others.jsonl", unseen, range(4))
    assert evaluated(copied, others, capsys) == (4, 0)
    again = [one.replace(" ", "  ") for one in reversed(seen)]
    mixed = written(tmp_path / "mixed.jsonl", [*unseen, *again], range(32))
    assert evaluated(copied, mixed, capsys) == (4, 28)
    call("eval", copied, "--problems", str(mixed))
    assert "left out, since the threshold was set on them: 28" in capsys.readouterr().out
    with pytest.raises(UserError, match="the calibration has used all 28 problems"):
        call("eval", copied, "--problems", str(calibrated))
    # To calibrate again was all the advice, which loses the calibration with the other expert.
    with pytest.raises(
        UserError, match=r"not hold for tiny-hard: .* another expert, tiny; add --expert tiny, or"
    ):
        call("eval", copied, "--expert", "tiny-hard")
    # A calibration of before knew ids alone, which tell nothing.
    older = {key: value for key, value in file.read(copied).items() if key != "questions"}
    file.write(copied, older)
    with pytest.raises(UserError, match=r"did not record the questions .*; calibrate again"):
        call("eval", copied)
    assert file.read(copied)["promise"] == older["promise"]  # which a server goes by


def test_only_the_kind_of_answers_that_was_learned_is_calibrated_on(copied, tmp_path, capsys):
    path = written(tmp_path / "names.jsonl", ["Who?", "And who?"], ["Ann", "Tom"])
    before = file.read(copied)
    for action, *promise in (("calibrate", "--cost", "0.9"), ("eval",)):
        with pytest.raises(UserError, match=r"of the kind text, .* learned .* the kind number"):
            call(action, copied, *promise, "--problems", str(path))
    nothing = tmp_path / "nothing.jsonl"
    nothing.write_text('{"question": "Who?"}\n')
    with pytest.raises(UserError, match="no right answers are known"):
        call("eval", copied, "--problems", str(nothing))
    bad = written(tmp_path / "bad.jsonl", questions(6), [1, 2, 3, 4, 5, "six or so"])
    with pytest.raises(UserError, match=r"bad\.jsonl:6"):
        call("eval", copied, "--problems", str(bad))
    assert file.read(copied) == before


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_answers_are_read_as_the_kind_that_was_learned(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_FD_CACHE", str(tmp_path / "cache"))
    names = written(tmp_path / "names.jsonl", map("Who is {}?".format, range(8)), ["Ann"] * 8)
    years = written(tmp_path / "years.jsonl", map("When was {}?".format, range(30)), [1900] * 30)
    of_text = tiny_run(tmp_path / "text", problems=str(names))
    call("calibrate", of_text, "--cost", "0.9", "--problems", str(years))
    assert len(file.read(of_text)["ids"]) == 30
    with pytest.raises(UserError, match=r"arithmetic: .* kind number, .* name --problems with"):
        call("calibrate", of_text, "--cost", "0.9", "--problems", "arithmetic")
    of_none = tiny_run(tmp_path / "none", problems=str(names), answer_kind="none")
    with pytest.raises(UserError, match=r"without right answers \(kind none\)"):
        call("calibrate", of_none, "--cost", "0.9", "--problems", str(years))


def test_what_there_is_to_know_of_the_problems_is_said(copied, tmp_path, capfd):
    asked = questions(24)
    path = written(tmp_path / "noted.jsonl", asked, range(24), mood="good")
    call("calibrate", copied, "--cost", "0.9", "--problems", str(path))
    said = " ".join(capfd.readouterr().err.split())
    assert said == f"warning: columns of {path} that are not read: 'mood'"
    of_file = tiny_run(tmp_path / "of file", problems=str(path))
    with pytest.raises(UserError):  # two problems are too few
        call("calibrate", of_file, "--cost", "0.1", "--limit", "2")
    said = " ".join(capfd.readouterr().err.split())
    assert f"the run learned from {path}, and what follows is on gsm8k" in said


def test_a_risk_that_cannot_be_promised_leaves_a_calibration_with_a_threshold(copied, capsys):
    path = copied / file.CASCADE
    before = path.read_text()
    with pytest.raises(
        UserError,
        match=r"--risk 0\.01: no threshold .* 24 problems: .* stays as it is, with its --cost 0\.9",
    ):
        call("calibrate", copied, "--risk", "0.01", "--limit", "24")
    assert path.read_text() == before
    # One that promises nothing, or is of another student, is not kept.
    path.unlink()
    for _ in range(2):
        call("calibrate", copied, "--risk", "0.01", "--limit", "24")
        assert file.read(copied)["promise"]["threshold"] is None
        assert "the student keeps no answer" in capsys.readouterr().out
        other = json.loads(before)
        other["models"]["adapter"]["sha256"] = "0" * 64
        file.write(copied, other)


def test_what_cannot_be_promised_is_said(run, tmp_path):
    with pytest.raises(UserError, match="no threshold surely keeps it"):
        call("calibrate", run, "--accuracy", "0.999", "--limit", "32")
    with pytest.raises(UserError, match="the run learned from these problems"):
        call("calibrate", run, "--risk", "0.1", "--split", "train")
    with pytest.raises(Exception, match="needs one of --risk, --accuracy and --cost"):
        call("calibrate", run)
    with pytest.raises(UserError, match=r"no calibration yet; .* calibrate '.*/an other' --risk"):
        call("eval", tiny_run(tmp_path / "an other"))
    path = run / file.CASCADE
    whole = path.read_text()
    try:
        path.write_text(whole.replace('"cost"', '"risk"', 1))
        with pytest.raises(UserError, match=r"calibrate .* makes it again"):
            call("eval", run)
    finally:
        path.write_text(whole)
