"""Critics side by side: best of N, votes on ProcessBench, shots, tokens, forgetting."""

import json
from pathlib import Path

import numpy as np
import pytest

from mlx_fd.errors import UserError
from mlx_fd.evaluation import running, suites
from mlx_fd.evaluation.cache import Cache
from mlx_fd.evaluation.following import INSTRUCTIONS
from mlx_fd.evaluation.processbench import f1, predicted_step
from mlx_fd.evaluation.sampling import best_of, maj_at_k
from mlx_fd.evaluation.shots import examples
from mlx_fd.evaluation.statistics import paired_bootstrap
from mlx_fd.evaluation.target import open_target
from mlx_fd.problems import load, parsing
from mlx_fd.problems.sources.arithmetic import questions
from support.steps import processbench_items, to_json_lines
from support.trained import make_run

SHORT = {"expert": "tiny", "batch_size": 3, "max_answer_tokens": 32, "max_feedback_tokens": 12}


@pytest.mark.parametrize(
    ("scores", "right", "wanted"),
    [
        ([0.1, 0.9, 0.5], [False, True, False], 1.0),
        ([0.9, 0.9, 0.5], [False, True, True], 0.5),
        ([None, -1.0], [True, False], 0.0),
        ([None, None, None, None], [True, False, False, False], 0.25),
    ],
)
def test_the_best_score_is_taken_and_a_tie_broken_by_lot(scores, right, wanted):
    assert best_of(scores, right) == wanted


def test_the_best_of_nothing_is_not_defined():
    with pytest.raises(ValueError, match="no samples"):
        best_of([], [])


# What follows each instruction, in their order, and what just does not.
REPLIES = [
    ("Rain falls and puddles shine", "Rain falls, and puddles shine"),
    ("Towel and water and a hat", "Towel, water and a hat"),
    ("a bicycle has two wheels.", "A bicycle has two wheels."),
    ("hello neighbour!", "Hello neighbour!"),
    ("WATCH OUT: WET FLOOR!", "WATCH OUT: wet FLOOR!"),
    ("SHOES FOR 5 POUNDS", "Shoes FOR 5 POUNDS"),
    ("One reads there and borrows books.", " ".join(["word"] * 13)),
    ("Short waves are scattered more.", ""),
    (" ".join(["tea"] * 60), " ".join(["tea"] * 59)),
    (" ".join(["rail"] * 81), "Dear Tom"),
    ("one\ntwo\n\nthree\nfour", "one\ntwo\nthree"),
    ("red\nblue\ngreen\nblack\nwhite\ngrey", "Here:\nred\nblue\ngreen\nblack\nwhite\ngrey"),
    ("Snow is white. Snow falls; snow lies.", "Snowy snow, snow"),
    ("Loyal and loyal.", "loyal"),
    ("Round and sweet.", "A red, round thing."),
    ("It is a means of exchange.", "A bank has it."),
    ("Every night it shines. It is far.", "It shines every night."),
    ("First of all, rest.", "First of all"),
    ("Thank you!\nWith love, Ann", "With love, Ann."),
    ("Bees make honey. That is all.", "Bees make honey. That's all."),
    ('```json\n{"name": "Tom", "age": 3}\n```', '{"name": "Tom"}'),
    ('{"city": "Bern", "country": "CH", "river": "Aare"}', 'Here: {"city": "Bern"}'),
    ("* one\n* two\n* three", "- one\n- two\n- three"),
    ("* a\n* b\n* c\n* d\n* e", "* a\n* b\n* c\n* d"),
    ("1. wet\n2. soap\n3. rub\n4. rinse", "1. wet\n2. soap\n3. rub"),
    ("1. milk\n2. eggs\n3. tea", "1) milk\n2) eggs\n3) tea"),
    ('"One who stays."', "One who stays."),
    ('"Good night."', 'I say "Good night."'),
    ("<<The Fox>>\nA fox ran.", "<<The Fox>>"),
    ("Come on [date] to [place], [name].", "Come on [date] to [place]."),
    ("Cats sleep.\n***\nDogs run.", "Cats sleep. *** Dogs run."),
    ("Dear teacher, he is ill.\nP.S. Thanks", "P.S. Thanks"),
    ("Yes", "Yes, it is"),
    ("smaller", "7 is smaller"),
    ("Bread is brown and warm.", "Bread is brown, and warm."),
    ("trees grow.\nthey are green.", "Trees grow.\nthey are green."),
]


@pytest.mark.parametrize(("item", "replies"), list(zip(INSTRUCTIONS, REPLIES, strict=True)))
def test_each_form_is_told_from_what_has_it_not(item, replies):
    assert [item.follows(reply) for reply in replies] == [True, False]
    assert not item.follows("")


def test_a_form_that_is_only_like_the_one_asked_for_is_none():
    """Any numbers did for a numbered list; words with a hyphen hid others; a word went on."""
    checks = {item.prompt: item.follows for item in INSTRUCTIONS}

    def follows(begin, text):
        (check,) = (check for prompt, check in checks.items() if prompt.startswith(begin))
        return check(text)

    assert not follows("List the steps of washing", "5. wet\n6. soap\n7. rub\n8. rinse")
    assert not follows("List the steps of washing", "1. wet\n1. soap\n1. rub\n1. rinse")
    assert not follows("Describe an apple without", "A deep-red thing.")
    assert not follows("Describe an apple without", "The fruit's core.")
    assert follows("Praise a dog.", "A loyal-hearted, loyal dog")
    assert not follows("Write two sentences about the moon", "Every nightmare is dark. It is far.")


def test_instructions_differ():
    assert len({item.prompt for item in INSTRUCTIONS}) == len(INSTRUCTIONS)


def test_shots_are_solved_problems_of_another_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("arithmetic").mkdir()  # no source of problems
    text = examples("arithmetic", "test", 2)
    train = load("arithmetic", "train").problems
    for problem in train[:2]:
        assert f"{problem.question}\n\n{problem.solution}" in text
    assert train[2].question not in text
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"question": "1 + 1?", "answer": "2"}) + "\n")
    # A hub data set's ``all`` has its train split in it.
    everything = [("owner/name", split) for split in ("all", "Train", "test+train[:5]")]
    for source, split in ((str(file), "test"), ("arithmetic", "train"), *everything):
        with pytest.raises(UserError, match="all is evaluated"):
            examples(source, split, 1)
    with pytest.raises(UserError, match="has 4000 solutions"):
        examples("arithmetic", "test", 4001)
    # What is asked is no example, in whatever split it is once more.
    kept = examples("arithmetic", "test", 1, asked=[f" {train[0].question}\n"])
    assert train[0].question not in kept and train[1].question in kept


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"votes": 8}, "name a file with --processbench"),
        ({"best_of": 4, "temperature": 0.0}, "--best-of: greedy answers are all alike"),
        ({"samples": 4, "temperature": 0.0}, "--k: greedy samples are all alike"),
        ({"forgetting": True}, "name a run"),
        ({"answers_by": "expert"}, "name one with --expert"),
    ],
)
def test_what_would_measure_nothing_is_refused(options, says):
    with pytest.raises(UserError, match=says):
        suites.make_sets(open_target("tiny-student", None), suites.Options(**options))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """An evaluation with all of them: its rows by set, and its results by set."""
    folder = tmp_path_factory.mktemp("critics")
    run = make_run(folder / "run", "tiny-student", strength=0.02, **SHORT)
    steps = folder / "steps.jsonl"
    steps.write_text(to_json_lines(processbench_items(questions(3, 0))))
    options = suites.Options(
        suite="full",
        limit=3,
        best_of=3,
        forgetting=True,
        shots=1,
        processbench=steps,
        votes=3,
        max_tokens=24,
    )
    target = open_target(str(run), None, changes={"max_answer_tokens": 24})
    sets = [one for one in suites.make_sets(target, options) if "transfer" not in one.name]
    bench = running.make_bench(target, options, Cache(folder / "cache"), lambda *_: None)
    results = running.evaluate(bench, sets, options, folder / "out", lambda _: None)
    rows = [json.loads(line) for line in (folder / "out" / "outputs.jsonl").open()]
    return rows, {one["name"]: one for one in results["sets"]}, sets


def values(found, system, measure="accuracy"):
    (one,) = (one for one in found["systems"] if one["name"] == system)
    return one["measures"][measure]["value"]


def grouped(rows, name, system):
    """The rows of a set and system by item, in order."""
    own = [row for row in rows if (row["set"], row["system"]) == (name, system)]
    ids = dict.fromkeys(row["id"] for row in own)
    return [[row for row in own if row["id"] == one] for one in ids]


WAYS = ("head", "sure", "written", "majority", "random")


def majority(samples):
    return maj_at_k([row["final"] for row in samples], samples[0]["reference"].__eq__)


def test_picks_are_made_among_the_same_answers(done):
    rows, found, _ = done
    name = "arithmetic/test, best of 3"
    by_way = {way: grouped(rows, name, way) for way in WAYS}
    texts = [[[row["turns"]["answer"] for row in one] for one in by] for by in by_way.values()]
    assert all(one == texts[0] for one in texts)
    assert len(texts[0]) == 3 and {len(one) for one in texts[0]} == {3}
    assert any(len(set(one)) > 1 for one in texts[0])  # they are drawn
    answers = by_way["head"]
    right = [[bool(row["correct"]) for row in one] for one in answers]
    for one in answers:
        for row in one:
            assert row["correct"] == (str(parsing.final_answer(row["turns"]["answer"])) ==
                                      row["reference"])  # fmt: skip
            assert -1 < row["score"] < 1
    scores = [[row["score"] for row in one] for one in answers]
    head = [best_of(*both) for both in zip(scores, right, strict=True)]
    votes = [majority(one) for one in answers]
    one = found[name]
    assert values(one, "head") == pytest.approx(np.mean(head))
    assert values(one, "majority") == pytest.approx(np.mean(votes))
    assert values(one, "random") == pytest.approx(np.mean(right))
    assert values(one, "head", "pass@3") == pytest.approx(np.mean([any(ok) for ok in right]))
    difference = next(row for row in one["comparisons"] if row["against"] == "majority")
    expected, _ = paired_bootstrap(head, votes)
    assert difference["difference"]["value"] == pytest.approx(expected.value)
    for way, name in (("sure", "sure"), ("written", "written")):
        scores = [[row["score"] for row in item] for item in by_way[way]]
        picked = [best_of(*both) for both in zip(scores, right, strict=True)]
        assert values(one, name) == pytest.approx(np.mean(picked))
    pairs = zip(by_way["sure"], by_way["written"], strict=True)
    for sure, written in (both for items in pairs for both in zip(*items, strict=True)):
        read = parsing.parse_feedback(written["turns"]["student_feedback"]).written_score
        assert written["score"] == read
        assert (sure["score"] is None) == (read is None)
        assert read is None or (sure["score"] > 0) == (read > 0)
    # A pick without scores costs no feedback.
    assert "student_feedback" not in by_way["random"][0][0]["tokens"]


def test_votes_decide_where_the_error_is(done):
    rows, found, _ = done
    items = grouped(rows, "steps", "student")
    assert {len(one) for one in items} == {3}
    for one in items:
        for row in one:
            step = predicted_step(row["turns"]["answer"])
            assert row["final"] == (None if step is None else str(step))
            assert row["tokens"]["answer"] <= 24
    hits = [majority(one) for one in items]
    wrong = [float(one[0]["reference"] != "-1") for one in items]
    assert values(found["steps"], "student", "processbench_f1") == pytest.approx(
        f1(np.array(hits), np.array(wrong))
    )


def test_the_share_that_was_cut_is_said(done):
    rows, found, _ = done
    for name, one in found.items():
        for system in one["systems"]:
            by_item = grouped(rows, name, system["name"])
            cut = np.mean([np.mean([bool(row["capped"]) for row in item]) for item in by_item])
            assert system["measures"]["cut"]["value"] == pytest.approx(cut)
    assert values(found["steps"], "student", "cut") > 0


def test_the_student_before_its_run_follows_the_same_instructions(done):
    rows, found, _ = done
    name = "instructions with a form"
    now, before = (grouped(rows, name, system) for system in ("student", "clear"))
    assert [one[0]["question"] for one in now] == [item.prompt for item in INSTRUCTIONS]
    assert [one[0]["question"] for one in before] == [item.prompt for item in INSTRUCTIONS]
    assert [one[0]["final"] for one in now] != [one[0]["final"] for one in before]
    (row,) = found[name]["comparisons"]
    assert (row["measure"], row["against"]) == ("followed", "clear")


def test_shots_stand_before_what_is_read_and_not_in_the_rows(done):
    rows, _, sets = done
    shots = examples("arithmetic", "test", 1)
    assert sets[0].shots == shots
    read = [row for row in rows if row["set"] == "arithmetic/test" and row["system"] == "student"]
    assert not any(shots in row["question"] for row in read)
    plain = len(shots)  # bytes; the tiny tokenizer makes fewer tokens of them
    assert all(row["prefilled"]["answer"] > plain / 8 for row in read)
