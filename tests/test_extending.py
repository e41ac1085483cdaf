"""One new thing of each kind, in one file each from outside the package: those in CONTRIBUTING.md.

Each file is run as its reader would run it, and what it registers does its work on small models.
"""

import dataclasses
import json
import re
import runpy
import subprocess
import sys

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx import nn

from mlx_fd import problems
from mlx_fd.config import OPTIONS, Config, LossOptions, TrainingOptions, override
from mlx_fd.errors import UserError
from mlx_fd.evaluation import bench, running, suites
from mlx_fd.evaluation.cache import Cache, asked
from mlx_fd.evaluation.exam import exam_questions, examine
from mlx_fd.evaluation.target import open_target
from mlx_fd.export.exporter import export
from mlx_fd.export.form import Form
from mlx_fd.feedback.distill import measure, update
from mlx_fd.feedback.pair import open_pair
from mlx_fd.feedback.samples import Sample, read_text
from mlx_fd.models.conversation import Conversation
from mlx_fd.problems import Problem, arithmetic, sources
from mlx_fd.problems.kinds import form_of, is_right, read_final
from mlx_fd.problems.prompts import answer_prompt
from mlx_fd.registry import KINDS, REGISTRIES, Entry, Registry
from mlx_fd.runs.plan import make_plan as real_plan
from mlx_fd.training.selfdistill.combination import check_combination
from mlx_fd.training.selfdistill.contexts import CONTEXTS, Attempt, Materials, student_prompt
from support import ROOT
from support.architectures import make_architecture
from support.pairs import logits_of, make_dirs, make_plan
from support.shell import shell

RUN = '\nif __name__ == "__main__":\n    from mlx_fd.cli import main\n\n    main()\n'


def files():
    """The files in CONTRIBUTING.md, by their names."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert RUN.strip() in text
    return dict(found)


FILES = files()


@pytest.fixture
def added(request, tmp_path):
    """Runs a file, and gives its path; what it registered is taken out again at the end."""
    before = {title: set(registry) for title, registry in REGISTRIES.items()}

    def add(name):
        path = tmp_path / f"{name}.py"
        path.write_text(FILES[name] + RUN, encoding="utf-8")
        runpy.run_path(str(path))
        return path

    yield add
    for title, registry in REGISTRIES.items():
        for name in set(registry) - before[title]:
            registry.unregister(name)


def mlx_fd(*arguments, program=None):
    done = shell(*arguments, cwd=ROOT, program=program)
    return done.status, done.out + done.err


# ------------------------------------------------------------------------------------- registries


def test_every_kind_has_an_example():
    assert list(FILES) == ["early", "units", "units_critic", "ollama", "yes_no", "sums", "seed_oss"]
    assert len(FILES) == len(REGISTRIES)


@pytest.mark.parametrize("registry", REGISTRIES.values(), ids=REGISTRIES)
def test_entries_keep_their_order_and_names(registry, added):
    before = list(registry)
    assert [registry[name].name for name in registry] == before
    assert [registry[name].order for name in registry] == sorted(
        registry[name].order for name in registry
    )
    for name in FILES:
        added(name)
    # What comes from outside comes last, and changes nothing about the others.
    assert list(registry)[:-1] == before
    with pytest.raises(ValueError, match=f"two entries '{before[0]}'"):
        registry.register(registry[before[0]])


def test_a_kind_of_answers_reads_and_judges(added):
    added("yes_no")
    problem = Problem("p", "Is it so?", "", KINDS["yes-no"].gold(True, ()), kind="yes-no")
    assert answer_prompt(problem.question, form_of(problem)).endswith("#### <yes or no>")
    assert read_final("It rains.\n#### Yes.", problem) == "yes"
    assert is_right("yes", problem) and not is_right("no", problem)
    assert read_final("#### maybe", problem) is None and not is_right(None, problem)
    with pytest.raises(ValueError, match="neither yes nor no"):
        KINDS["yes-no"].gold("perhaps", ())


def test_the_cache_knows_how_a_kind_of_answers_is_asked_for_and_read(added):
    """Answers to the old wording, read as before, came back after the file had changed."""
    path, keys = added("yes_no"), []
    problem = Problem("p", "Is it so?", "", "yes", kind="yes-no")
    for text in ("", "\n# changed\n"):
        KINDS.unregister("yes-no")
        path.write_text(path.read_text() + text)
        runpy.run_path(str(path))
        keys.append(asked([problem]))
    assert keys[0] != keys[1] and "End with a line of its own: #### <yes or no>" in keys[0][0]
    form = dataclasses.replace(KINDS["yes-no"].form, end="Say yes or no.")
    other = dataclasses.replace(KINDS["yes-no"], form=form)
    KINDS.unregister("yes-no")
    KINDS.register(other)
    assert asked([problem]) != keys[1]


def test_reference_lists_every_entry():
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    for registry in REGISTRIES.values():
        for entry in registry.values():
            assert f"| `{entry.name}` | {entry.help} |" in text


def test_names_and_help_need_no_mlx():
    code = (
        "import sys\nfrom mlx_fd.registry import REGISTRIES\n"
        "assert all(r.described() for r in REGISTRIES.values())\n"
        "sys.exit('mlx' in sys.modules or 'mlx.core' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_a_registry_reads_its_package_once_and_sorts_it():
    own = Registry("number", "email.mime")  # any package without entries
    own.register(Entry(name="b", help="second", order=2))
    own.register(Entry(name="c", help="first", order=1))
    own.register(Entry(name="a", help="as far", order=2))
    assert own.described() == "c: first; a: as far; b: second"
    own.unregister("c")
    assert list(own) == ["a", "b"]
    missing = Registry("number", "mlx_fd.no_such_package")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError):
            list(missing)


# ------------------------------------------------------------------------------------------- loss


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return make_plan(*make_dirs(tmp_path_factory.mktemp("pair")))


def sample(pair, options):
    prompt, target = tuple(range(20, 29)), (7, 3, 11, 5)
    reading = read_text(pair, Conversation(prompt[:-1]), prompt, target, options)
    return Sample(prompt, target, reading, 0.5)


def test_a_loss_is_what_its_file_says_and_is_learned(added, plan):
    path = added("early")
    pair = open_pair(plan)
    options = override(Config(), {"losses": ["lm", "early"]}, "test").losses
    samples = [sample(pair, options)]
    # By the definition, from the whole logits.
    tokens = mx.array([[*samples[0].prompt, *samples[0].target[:-1]]])
    final = pair.student.view.forward(tokens).final[0, len(samples[0].prompt) - 1 :]
    logits = logits_of(pair.student.view, final)
    each = nn.losses.cross_entropy(logits, mx.array(samples[0].target))
    weights = np.array([1, 1 / 2, 1 / 3, 1 / 4])
    wanted = float((np.array(each, dtype=np.float64) * weights).sum() / weights.sum())
    found = measure(pair.student, pair.expert, samples, options, 400, 1)
    assert found["early"] == pytest.approx(wanted, rel=1e-5)
    assert found["lm"] == pytest.approx(float(each.mean()), rel=1e-5)
    assert found["early"] != pytest.approx(found["lm"], rel=1e-3)

    done = update(
        pair,
        optim.SGD(0.05),
        samples,
        {"lm": 0.0, "early": 1.0},
        options,
        TrainingOptions(),
    )
    assert not done.skipped
    assert done.total == pytest.approx(wanted, rel=1e-5)
    after = measure(pair.student, pair.expert, samples, options, 400, 1)
    assert after["early"] < found["early"]
    # The command line has it, and its help; without the file the name is refused in one sentence.
    status, text = mlx_fd("loop", "--help", program=path)
    assert status == 0
    assert "attention, early." in " ".join(text.split())
    status, text = mlx_fd("loop", "--expert", "tiny", "--losses", "lm,early")
    assert status == 2
    assert "'early' is not one of 'lm'," in text and "Traceback" not in text


def test_a_loss_on_states_takes_part_in_the_total(plan):
    from mlx_fd.feedback.loss_terms import LOSSES, Loss, register_loss

    register_loss(
        Loss(
            name="small-states",
            help="mean square of the final states",
            compute=lambda made: mx.square(made.final).mean(axis=-1).sum(axis=-1),
            count=lambda samples: float(sum(len(s.target) for s in samples)),
            phase="reasoning",
        )
    )
    try:
        pair = open_pair(plan)
        options = LossOptions(losses=("small-states",))
        one = [sample(pair, options)]
        before = measure(pair.student, pair.expert, one, options, 400, 1)["small-states"]
        weights = {"small-states": 1.0}
        done = update(pair, optim.SGD(0.1), one, weights, options, TrainingOptions())
        assert done.total == pytest.approx(before, rel=1e-5)
        assert measure(pair.student, pair.expert, one, options, 400, 1)["small-states"] < before
        from mlx_fd.feedback.phases import PhaseSchedule

        assert PhaseSchedule().reasoning == ("reasoning", "attention", "small-states")
    finally:
        LOSSES.unregister("small-states")


def test_a_name_can_stand_in_lists_and_is_not_taken():
    from mlx_fd.feedback.loss_terms import Loss

    for name in ("a,b", "a b", "", "Früh"):
        with pytest.raises(ValueError, match="a name is made of"):
            Entry(name=name, help="x")
    with pytest.raises(ValueError, match="called 'self'"):
        Loss(name="self", help="x", count=len, compute=lambda made: made.final.sum())


def test_a_loss_has_one_of_two_forms():
    from mlx_fd.feedback.loss_terms import Loss

    with pytest.raises(ValueError, match="needs either"):
        Loss(name="x", help="x", count=len)
    with pytest.raises(ValueError, match="needs either"):
        Loss(
            name="x",
            help="x",
            count=len,
            matches="tokens",
            token_weights=lambda s: [1.0],
            compute=lambda made: made.final.sum(),
        )


# ---------------------------------------------------------------------------------------- context


def test_a_context_is_read_by_the_self_teacher(added, tmp_path):
    path = added("units")
    assert OPTIONS["context"].choices[-1] == "units"
    assert OPTIONS["student_context"].choices[-1] == "units"
    command = (
        *("self-distill", "--context", "units", "--episodes", 2, "--batch-size", 2),
        *("--probe-size", 2, "--max-answer-tokens", 24, "--lora-rank", 2, "--quiet"),
    )
    status, text = mlx_fd(*command, "--out", tmp_path / "run", program=path)
    assert status == 0, text
    lines = (tmp_path / "run" / "attempts.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 2
    for row in rows:
        assert row["teacher"].startswith(row["question"])
        assert "Write the unit beside every number." in row["teacher"]
        assert row["teaches"]
    status, text = mlx_fd("resume", tmp_path / "run")
    assert status == 2
    assert "context takes none," in text and "Traceback" not in text


# --------------------------------------------------------------------------------------- baseline


def test_a_baseline_takes_part_in_an_evaluation(added, tmp_path):
    added("units_critic")
    options = suites.Options(baselines=True, limit=2, problems="arithmetic")
    target = open_target("tiny-student", "tiny")
    solving, judging = suites.make_sets(target, options)
    assert solving.systems[-1] == judging.systems[-1] == "units-critic"
    assert solving.label("units-critic") == judging.label("units-critic") == "Units critic"
    made = running.make_bench(target, options, Cache(tmp_path / "cache"), lambda *_: None)
    trials = solving.attempt(made, "units-critic", 0, 0, solving.items)
    assert [set(trial.turns) >= {"answer", "feedback"} for trial in trials] == [True, True]
    for trial in trials:
        assert set(trial.by) == set(trial.tokens) == set(trial.turns)
    judged = judging.attempt(made, "units-critic", 0, 0, judging.items)
    assert [trial.last for trial in judged] == ["feedback", "feedback"]


def test_the_cache_knows_the_file_of_a_baseline(added, tmp_path):
    path = added("units_critic")
    first = bench.outside_code("units-critic")
    assert bench.outside_code("cot") == {}
    suites.SYSTEMS.unregister("units-critic")
    path.write_text(path.read_text() + "\n# changed\n")
    runpy.run_path(str(path))
    assert set(first) == {"outside_code"}
    assert bench.outside_code("units-critic") != first


# ----------------------------------------------------------------------------------------- format


def test_a_format_is_written_read_back_and_described(added, tmp_path):
    path = added("ollama")
    form = Form(format="ollama", parity_problems=1)
    done = export("tiny-student", tmp_path / "out", form, progress=lambda *_: None)
    assert done.agreement.top1 > 0.9
    assert (tmp_path / "out" / "Modelfile").read_text() == "FROM .\n"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "ollama create student" in card and "mlx-fd compare ." in card
    with pytest.raises(UserError, match="--adapter is for --format mlx and hf; --format ollama"):
        export("tiny-student", tmp_path / "b", Form("ollama", True), progress=lambda *_: None)
    status, text = mlx_fd("export", "--help", program=path)
    assert status == 0
    assert "[mlx|hf|gguf|ollama]" in text and "ollama: for Ollama." in " ".join(text.split())


# ----------------------------------------------------------------------------------------- family


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_a_family_is_exported_and_its_file_read(added, tmp_path, form):
    model = make_architecture(tmp_path / "model", "seed_oss")
    wanted = Form(format=form, parity_problems=0)
    with pytest.raises(UserError, match="this one is seed_oss"):
        export(str(model), tmp_path / "a", wanted, progress=lambda *_: None)
    added("seed_oss")
    # What was written is read back and compared.
    done = export(str(model), tmp_path / "b", wanted, progress=lambda *_: None)
    assert done.agreement.mean_kl < 1e-3


# ----------------------------------------------------------------------------------------- source


def test_a_source_gives_a_run_its_problems_and_its_exam(added, plan):
    added("sums")
    given = {"expert": "tiny", "problems": "sums", "episodes": 5, "probe_size": 3, "exam_size": 4}
    made = real_plan(override(Config(), given, "test"))
    assert len(made.problems) == 5 and len(made.probe) == 3
    assert all(p.id.startswith("sums-") for p in (*made.problems, *made.probe))
    assert made.manifest["problems"]["name"] == "sums"
    assert made.config.problems.problems == "sums"
    exam = exam_questions(made.config)
    assert [question.first_error for question in exam] == [0, 1, 0, 1]
    together: list[int] = []
    options = dataclasses.replace(plan.config.generation, batch_size=3)
    results = examine(open_pair(plan), exam, options, lambda step, count: together.append(count))
    assert [result.wrong for result in results] == [False, True, False, True]
    assert max(together) == 3


def test_a_source_that_knows_the_truth_criticises_and_is_judged(added):
    added("sums")
    problem = problems.load("sums", "test").problems[0]
    truth = sources.truth_about(problem)
    assert truth is sources.truth_of("sums")
    assert sources.truth_about(problems.load("gsm8k", "test").problems[0]) is None
    assert sources.names_with_truth() == "arithmetic or arithmetic-hard or sums"
    for answer, error in ((problem.solution, 0), ("#### 7", 1)):
        assert truth.judge(problem, answer).first_error == error
        # The same reading of feedback as for all other sources.
        assert arithmetic.first_error(truth.feedback(problem, answer)) == error
    assert truth.span(problem, problem.solution) is None
    assert truth.span(problem, "so: 7\n#### 7") == (0, 5)

    wrong = Attempt(problem, problem.question, (1,), "#### 7", None, False)
    (view,) = CONTEXTS["step-critique"].views([wrong], Materials(truth=True))
    assert view.note == problem.solution
    (view,) = CONTEXTS["feedback"].views([wrong], Materials(truth=True))
    assert "Step 1 should be 52" in view.teacher and view.student == student_prompt(wrong)
    (view,) = CONTEXTS["reflection"].views([wrong], Materials(truth=True))
    assert "it is 7: a slip." in view.teacher

    given = {
        "critic": "truth",
        "context": "step-critique",
        "method": "custom",
        "student": "tiny-student",
        "gate": "always",
    }
    check_combination(override(Config(), {**given, "problems": "sums"}, "test"))
    with pytest.raises(
        UserError, match="for --problems arithmetic or arithmetic-hard or sums only"
    ):
        check_combination(override(Config(), {**given, "problems": "gsm8k"}, "test"))
    target = open_target("tiny-student", None)
    sets = suites.make_sets(target, suites.Options(problems="sums", limit=4))
    assert [one.name for one in sets] == ["sums/test", "sums/first errors"]
    assert [question.first_error for question in sets[1].items] == [0, 1, 0, 1]


def test_a_source_says_which_splits_it_has(added):
    added("sums")
    with pytest.raises(UserError, match="sums has no split 'dev', only train, test"):
        problems.load("sums", "dev")
    with pytest.raises(
        UserError, match="a source is gsm8k, arithmetic, arithmetic-hard, sums, a file"
    ):
        problems.load("smus!", "train")
