"""The report without a browser: what is read, what is said of what is missing, what is written."""

import json
import re

import pytest

from mlx_fd import runs
from mlx_fd.errors import UserError
from mlx_fd.files import write_json
from mlx_fd.report import charts, frontier, packing, tables, theme
from mlx_fd.report.page import check_out, make_page, write_page
from mlx_fd.report.reading import read_runs
from mlx_fd.report.speculation import acceptance_figure, acceptance_table
from mlx_fd.report.trust import trust_figure
from mlx_fd.runs.summary import wilson
from support import ROOT, reported
from support.pages import check_charts, parsed, run_cli, unpacked


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports") / "a <b>&'\"run"
    return make_page(read_runs([reported.hostile_run(folder)]))


def test_a_run_is_read_and_its_numbers_are_its_rows(tmp_path):
    episodes = [*(reported.episode(n) for n in range(6)), *(reported.alone(n) for n in range(6, 8))]
    episodes[0]["correct_after"] = False
    episodes[1]["student_feedback"]["written_score"] = None
    episodes[6]["expert_solution"] = {"text": "3 + 4 = 7\n#### 7", "final": "7"}
    folder = reported.write_run(tmp_path / "run", episodes)
    (run,) = read_runs([folder])
    assert run.missing == []
    assert run.finished
    assert run.episodes[6]["expert_solution"] == episodes[6]["expert_solution"]
    assert "expert_solution" not in run.episodes[7]
    assert run.totals["accuracy"]["final_answers"]["right"] == 7
    assert run.totals["expert_feedback"]["not_asked"] == 2
    assert run.totals["unreadable_scores"] == {"expert": 0, "student": 1}
    cells = {row[0].value: row[1] for row in tables.summary_table([run]).rows}
    # Wilson's interval of 7 of 8, by the formula.
    assert cells["final answers right"] == tables.Cell("87.5%", "52.9% to 97.8%, n 8")
    assert cells["expert feedback requested"].value == "6 of 8"
    lists = [packing.listed_episode(row) for row in run.episodes]
    assert lists[0][3] == packing.LEARNED
    assert lists[1][3] == packing.RIGHT_AFTER | packing.UNREADABLE | packing.LEARNED
    assert lists[7][3] == packing.RIGHT_AFTER | packing.ALONE


def test_trust_along_a_run(tmp_path):
    episodes = [reported.episode(n) for n in range(6)]
    episodes += [reported.alone(n, tokens={"answer": 10}) for n in range(6, 8)]
    for row, score in zip(episodes[4:6], (-0.5, 0.5), strict=True):
        # Audits: the expert says -0.8.
        row["gate"]["trusted"], row["student_feedback"]["written_score"] = True, score
    (run,) = read_runs([reported.write_run(tmp_path / "run", episodes)])
    figure = trust_figure(run)
    assert figure is not None
    found = {}
    for row in figure.specification["datasets"]["rows"]:
        found.setdefault(row["what"], []).append(row["share"])
    assert found == {
        "expert not asked": [0] * 6 + [1] * 2,
        "expert's feedback tokens, of always asking": [1] * 6 + [0] * 2,
        "audited verdicts that differ": [0, 1],
        "final answers right": [1] * 8,
    }
    assert "not asked in 2 of 8 episodes, which saves about 25.0%" in figure.says
    assert "1 of 2 audited verdicts differ (50.0%, 95 % 9.4% to 90.5%)." in figure.says


@pytest.mark.parametrize(("allowed", "ends"), [
    (0.05, " at most 5 % may differ from the expert's."),
    (0.0, "of its feedback tokens."),
    (None, "of its feedback tokens."),
])  # fmt: skip
def test_what_trust_allows_is_said_of_verdicts(tmp_path, allowed, ends):
    """It was said of the tokens saved where nothing was audited, and of no trust as 0 %."""
    options = {"max_disagreement": allowed}
    (run,) = read_runs([reported.write_run(tmp_path / "run", options=options)])
    assert trust_figure(run).says.endswith(ends)


def test_how_many_episodes_a_point_stands_for(tmp_path):
    def says(name, *sizes):
        folders = [
            reported.write_run(tmp_path / name / str(n), [reported.episode(k) for k in range(n)])
            for n in sizes
        ]
        return charts.accuracy_figure(read_runs(folders)).says

    assert says("a", 16).startswith("Each point is one episode; the bands")
    assert says("b", 32).startswith("Each point is 2 episodes; the bands")
    assert says("c", 33).startswith("Each point is 3 episodes; the bands")
    assert says("d", 34).startswith("Each point is 3 episodes, the last one fewer; the bands")
    # 17 episodes are nine points: none is a sixteenth.
    assert says("e", 17, 40).startswith("Each run in at most 16 points;")


def test_every_step_that_was_taken_is_in_the_tables(tmp_path):
    row = reported.episode(0)
    for step in ("student_solution", "second_answer", "second_student_solution", "later step"):
        for part, value in (("tokens", 7), ("prefilled", 8), ("seconds", 0.5)):
            row[part][step] = value
    (run,) = read_runs([reported.write_run(tmp_path / "run", [row])])
    steps = {found[0].value: found[1].value for found in tables.steps_table([run]).rows}
    assert steps["student's own solution"] == steps["later step"] == "7"
    assert steps["student's own solution beside it"] == "7" and "total" not in steps
    found = re.search('id="facts">(.*?)</script>', make_page([run]))
    assert found is not None
    facts = json.loads(found[1])
    assert facts["steps"]["second_student_solution"] == "student's own solution beside it"


def test_a_bar_of_decisions_names_its_last_episode(tmp_path):
    rows = [reported.episode(n) for n in range(32)]
    (run,) = read_runs([reported.write_run(tmp_path / "run", rows)])
    bars = charts.decision_figure(run).specification["datasets"]["rows"]
    # "Up to 2" was the bar of the episodes 0 and 1, and 2 the first of the next one.
    assert [bars[0][key] for key in ("first", "last", "end")] == [0, 1, 2]


def test_an_older_evaluation_does_not_say_who_answered_first():
    found = {**reported.evaluation(), "answers_by": None, "text_models": {}}
    found["temperature"] = {"first_answers": 0.7}
    assert "first answers at temperature 0.7" in tables.evaluation_says(found)
    found["answers_by"] = "student"
    assert "first answers by the student at temperature 0.7" in tables.evaluation_says(found)


def test_costs_are_written_in_digits():
    cost = {"value": 12345.6, "low": 9876.5, "high": 23456.7, "n": 5}
    found = {
        "systems": [{"label": "a", "cost": {"tokens": cost, "seconds": {**cost, "value": 1.5}}}]
    }
    (row,) = tables.costs_table(found).rows
    assert row[1] == tables.Cell("12,346", "9,876 to 23,457, n 5")
    assert row[2].value == "1.5"
    assert tables.amount(1234567.8) == "1,234,568" and tables.amount(0.01234567) == "0.01235"


def test_what_a_draft_proposed_is_shown_by_step_and_along_the_run(tmp_path):
    written = {"student_feedback": 9, "expert_feedback": 20, "merge": 10}
    episodes = [
        reported.episode(
            n, tokens=written, accepted={"expert_feedback": 5 + 2 * n, "merge": 2 + n % 2}
        )
        for n in range(4)
    ]
    runs = read_runs(
        [
            reported.write_run(tmp_path / "drafted", episodes),
            reported.write_run(tmp_path / "plain", [reported.episode(0)]),
        ]
    )
    rows = acceptance_table(runs).rows
    by_step = {row[0].value: [cell.value for cell in row[1:]] for row in rows}
    assert by_step == {
        "expert's feedback": ["30.0%", "50.0%", "-", "-"],
        "merged feedback": ["25.0%", "25.0%", "-", "-"],
        "all of them": ["28.3%", "41.7%", "-", "-"],
    }
    figure = acceptance_figure(runs)
    assert [round(row["value"] * 30) for row in figure.specification["datasets"]["rows"]] == [
        7,
        10,
        11,
        14,
    ]
    assert figure.says.startswith("drafted: 28.3% in the first half of the episodes, 41.7% in the")
    assert acceptance_table(runs[1:]) is None and acceptance_figure(runs[1:]) is None


def test_intervals_and_what_is_surely_so():
    better = {"value": 0.4, "low": 0.1, "high": 0.7, "n": 40}
    assert tables.estimate(better, sign="+") == tables.Cell(
        "+0.400", "+0.100 to +0.700, n 40", strong=True
    )
    assert not tables.estimate({**better, "low": -0.1}, sign="+").strong
    assert not tables.estimate(better).strong
    assert tables.estimate({**better, "low": None}).note == "n 40"
    assert tables.estimate({**better, "value": None}).value == "-"


def test_a_difference_of_shares_is_in_points(tmp_path):
    (run,) = read_runs([reported.write_run(tmp_path / "run")])
    found = dict(tables.headlines(run))["problems the student solves, before → after"]
    assert found.value == "30.0% → 70.0%"
    # Not per cent: 40 % more than 30 % are 42 %.
    assert found.note == "change +40.0 points, +30.0 to +50.0, n 40"
    assert tables.points(None) == tables.Cell("-")
    unknown = {"value": None, "low": None, "high": None, "n": 0}
    assert tables.points(unknown) == tables.Cell("-")


def test_an_unfinished_run_is_counted_so_far(tmp_path):
    folder = reported.write_run(tmp_path / "run", finished=False)
    state = folder / runs.CHECKPOINTS / "last"
    state.mkdir()
    (state / runs.STATE).write_text(json.dumps({"probe_first": {"lm": 2.0}}))
    (run,) = read_runs([folder])
    assert not run.finished
    assert "12 episodes so far" in run.missing[0]
    assert run.probe_first == {"lm": 2.0}
    assert run.totals["probe"]["after"]["lm"] == 0.25  # the last batch's
    assert "unfinished" in make_page([run])


@pytest.mark.parametrize("name", [runs.MANIFEST, runs.EPISODES, runs.METRICS, runs.SUMMARY])
@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", "null", '{"a": 1}\n', "\x00\xff\n", "9\n"]
)
def test_missing_and_damaged_files_are_named_on_the_page(tmp_path, name, content):
    folder = reported.write_run(tmp_path / "run")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content, encoding="latin-1")
    (run,) = read_runs([folder])
    assert any(name in said for said in run.missing), run.missing
    if content == "{":
        page = parsed(make_page([run]))
        assert any(name in text for text in page.text)


def test_every_key_of_a_row_may_be_lost(tmp_path):
    """A row without one of its keys, or with another kind of value there, never stops a report."""
    whole, metrics = reported.episode(0), reported.metric(0)
    rows = [whole]
    for key in whole:
        rows += [
            {k: v for k, v in whole.items() if k != key},
            whole | {key: [[1]]},
            whole | {key: 7},
        ]
    batches = [metrics]
    for key in metrics:
        batches += [{k: v for k, v in metrics.items() if k != key}, metrics | {key: "no"}]
    (run,) = read_runs([reported.write_run(tmp_path / "run", rows, batches)])
    assert 0 < len(run.episodes) < len(rows)
    assert 0 < len(run.metrics) < len(batches)
    assert sum("damaged" in said for said in run.missing) == 2
    make_page([run])


def test_a_number_that_no_float_holds_is_left_out(tmp_path):
    rows = [reported.episode(0), reported.episode(1, score=10**400)]
    (run,) = read_runs([reported.write_run(tmp_path / "run", rows)])
    assert len(run.episodes) == 1
    assert f"1 of 2 lines of {runs.EPISODES} are damaged and left out." in run.missing


def test_a_half_written_last_line_is_left_out(tmp_path):
    folder = reported.write_run(tmp_path / "run")
    with (folder / runs.EPISODES).open("a") as file:
        file.write('{"episode": 12, "id"')
    (run,) = read_runs([folder])
    assert run.missing == ["1 of 13 lines of episodes.jsonl are damaged and left out."]
    assert len(run.episodes) == 12


def test_a_run_without_an_examination_says_so(tmp_path):
    folder = reported.write_run(tmp_path / "run")
    summary = json.loads((folder / runs.SUMMARY).read_text())
    del summary["exam"]
    (folder / runs.SUMMARY).write_text(json.dumps(summary))
    (run,) = read_runs([folder])
    assert run.missing == ["There was no examination: its problems do not come with the truth."]
    assert tables.exam_table([run]) is None
    assert charts.exam_figure([run]) is None
    make_page([run])


def test_an_examination_that_was_not_asked_for(tmp_path):
    folder = reported.write_run(tmp_path / "run")
    (folder / runs.SUMMARY).unlink()
    summary = {"exam_size": 0, "problems": "arithmetic"}
    manifest = json.loads((folder / runs.MANIFEST).read_text())
    manifest["options"] |= summary
    (folder / runs.MANIFEST).write_text(json.dumps(manifest))
    (folder / runs.SUMMARY).write_text("{}")
    (run,) = read_runs([folder])
    said = [text for text in run.missing if "examination" in text]
    assert said == ["There was no examination: none was asked for (exam_size = 0)."]


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    folders = [reported.write_run(tmp_path / name / "run") for name in ("a", "b")]
    assert [run.name for run in read_runs([*folders, folders[0]])] == ["a/run", "b/run"]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        read_runs([tmp_path])


def test_the_freeze_is_marked_with_its_reason(tmp_path):
    metrics = [reported.metric(0), reported.metric(1, frozen=True, reason="every loss is done")]
    thawed = reported.metric(2) | {"stop": None}
    (run,) = read_runs([reported.write_run(tmp_path / "run", None, [*metrics, thawed])])
    figure = charts.gain_figure(run)
    assert "Freeze after batch 2: every loss is done." in figure.says
    assert "Thaw after batch 3: the losses on audited samples have risen." in figure.says
    rules = json.dumps(figure.specification)
    assert "every loss is done" in rules
    rows = tables.decision_table(run).rows
    assert [[cell.value for cell in row] for row in rows] == [
        ["1", "learning", "train", "still gaining"],
        ["2", "frozen", "freeze", "every loss is done"],
    ]


def gains(figure):
    rows = figure.specification["datasets"]["rows"]
    return {
        name: [(row["batch"], row["gain"]) for row in rows if row["loss"] == name]
        for name in {row["loss"] for row in rows}
    }


def test_gains_begin_at_nothing(tmp_path):
    metrics = [reported.metric(0) | {"stop": None}, reported.metric(1)]
    (run,) = read_runs([reported.write_run(tmp_path / "run", None, metrics)])
    found = gains(charts.gain_figure(run))
    assert found["lm"] == [(0, 0.0), (2, 1 - 1 / 3)]


def test_a_loss_that_was_nothing_at_first_gains_nothing(tmp_path):
    folder = reported.write_run(tmp_path / "run")
    summary = json.loads((folder / runs.SUMMARY).read_text())
    summary["probe"]["before"]["lm"] = 0.0
    write_json(folder / runs.SUMMARY, summary)
    (run,) = read_runs([folder])
    assert set(gains(charts.gain_figure(run))) == {"hidden", "score", "logit"}
    summary["probe"]["before"] = dict.fromkeys(reported.LOSSES, 0.0)
    write_json(folder / runs.SUMMARY, summary)
    (run,) = read_runs([folder])
    assert charts.gain_figure(run) is None
    assert "were 0 before the first update" in " ".join(parsed(make_page([run])).text)


def test_charts_have_the_rows_numbers(tmp_path):
    (run,) = read_runs([reported.write_run(tmp_path / "run")])
    figure = next(f for f in charts.loss_figures([run]) if f.title == "lm loss")
    held_out = [
        (row["batch"], row["loss"])
        for row in figure.specification["datasets"]["rows"]
        if row["on"] == "held out"
    ]
    assert held_out == [(0, 1.0), (1, 1 / 2), (2, 1 / 3), (3, 1 / 4)]
    assert figure.says == "1 to 0.2 on held-out problems (-80%)."
    (accuracy,) = [charts.accuracy_figure([run])]
    assert "0.0% of the first, 100.0% of the final answers" in accuracy.says


def test_a_pareto_frontier_and_an_evaluation_are_shown(tmp_path):
    folder = reported.write_run(tmp_path / "run")
    write_json(folder / "pareto.json", reported.pareto(folder))
    (folder / "eval" / "fast").mkdir(parents=True)
    write_json(folder / "eval" / "fast" / "eval.json", reported.evaluation())
    (run,) = read_runs([folder])
    assert run.missing == []
    lm, _ = charts.pareto_figures(run)
    assert lm.says == (
        "4 stopping thresholds, 3 of them on the frontier. Recommended: 0.3, at 36 kd steps a lm "
        "loss of 0.2."
    )
    rows = {
        row[0].value: [cell.value for cell in row] for row in tables.pareto_table(run.pareto).rows
    }
    assert rows["0.9"][1] == "never"
    assert rows["0.1"][-1] == "product rule"
    assert rows["0.4"][-1] == "dominated"
    (right,) = {row[-2] for row in tables.pareto_table(run.pareto).rows}
    assert right == tables.Cell("50.0%", "40.0% to 60.0%, n 40")
    (found,) = run.evaluations[0]["sets"]
    table = tables.systems_table(found)
    assert table.columns == ("", "right, %")
    assert table.rows[1][1] == tables.Cell("70.0", "62.0 to 78.0, n 100")
    costs = tables.costs_table(found)
    assert costs.rows[1][1] == tables.Cell("200", "180 to 220, n 100")
    assert charts.system_figure(found).title == "gsm8k/test: right"
    compared = tables.comparisons_table(found).rows[0]
    assert compared[0].value == "Online feedback distillation against CLEAR"
    assert compared[1].value == "right"
    assert compared[2] == tables.Cell("+10.0 points", "+5.0 to +15.0, n 100", strong=True)
    assert [compared[3].value, compared[4].value] == ["< 0.001", "0.041"]
    page = " ".join(parsed(make_page([run])).text)
    assert "Hypervolume of the frontier: 0.61" in page
    assert "gsm8k/test: n = 100" in page
    assert "Note:" not in page
    # Made before the run went on.
    early = {**reported.pareto(folder), "batches": 2, "notes": ["the run has not ended"]}
    write_json(folder / "pareto.json", early)
    (run,) = read_runs([folder])
    assert run.missing == [
        f"pareto.json is of the first 2 of the {len(run.metrics)} batches; make it again: mlx-fd "
        f"pareto {folder}."
    ]
    page = " ".join(parsed(make_page([run])).text)
    assert "Note: the run has not ended." in page
    # One of the student as it was, and one of a checkpoint that was named.
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "best").unlink(missing_ok=True)
    (folder / "checkpoints" / "best").symlink_to("000006")
    for name, checkpoint in (("fast", "000002"), ("full-2", "000006"), ("fast-000002", "000002")):
        known = reported.evaluation()
        known["models"]["adapter"] = {"name": f"elsewhere/checkpoints/{checkpoint}"}
        (folder / "eval" / name).mkdir(exist_ok=True)
        write_json(folder / "eval" / name / "eval.json", known)
    (run,) = read_runs([folder])
    assert run.missing[1:] == [
        "eval/fast is of checkpoint 000002, and the student is that of 000006 now: evaluate it "
        "again."
    ]


@pytest.mark.parametrize(
    ("start", "drawn"),
    [({"lm": 1.0, "logit": 2.0}, 2), ({"lm": 0.0, "logit": 2.0}, 1), ({"lm": 0, "logit": 0}, 0)],
)
def test_a_loss_that_starts_at_zero_is_not_in_the_plot(tmp_path, start, drawn):
    found = {**reported.pareto(tmp_path), "start": {"losses": start}}
    frontier.plot(found, tmp_path / "pareto.svg")
    text = (tmp_path / "pareto.svg").read_text()
    assert text.startswith("<svg") and "held-out loss, of its start" in text
    assert sum(f">{name}</text>" in text for name in start) == drawn


@pytest.mark.parametrize("name", ["pareto.json", "eval/fast/eval.json"])
def test_results_of_another_shape_are_left_out(tmp_path, name):
    folder = reported.write_run(tmp_path / "run")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text('{"format": 9, "sets": 3, "points": [{}], "objectives": []}')
    (run,) = read_runs([folder])
    assert run.missing == [f"{name} is damaged, or of another version, and was left out."]
    make_page([run])


def test_charts_keep_to_vega_lites_schema(hostile, tmp_path):
    assert check_charts(hostile) >= 12
    both = [reported.write_run(tmp_path / name) for name in ("one", "other")]
    assert check_charts(make_page(read_runs(both))) >= 8


def test_nothing_that_was_written_into_a_run_becomes_markup(hostile):
    page = parsed(hostile)
    code = [attributes for attributes, _ in page.scripts if attributes.get("type") == "module"]
    kinds = {attributes.get("type") for attributes, _ in page.scripts}
    assert len(code) == 2
    assert kinds == {"module", "application/json", "text/plain"}
    assert not {name for name, _ in page.elements} & {"img", "b", "iframe", "object", "link"}
    for name, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on") or key == "style"], name
        assert attributes.get("href", "#").startswith("#")
    # Jinja's own syntax in a text stays text.
    assert any("{{ 7 * 7 }}" in text for text in page.text)


def test_nothing_that_was_written_into_a_run_becomes_an_expression_of_a_chart(tmp_path):
    """Vega runs expressions; texts are data for them, never a part of them."""
    import vl_convert

    (run,) = read_runs([reported.hostile_run(tmp_path / "<run>")])
    (found,) = run.evaluations[0]["sets"]
    figures = [
        *charts.loss_figures([run]),
        charts.gain_figure(run),
        charts.weight_figure(run),
        charts.decision_figure(run),
        charts.accuracy_figure([run]),
        charts.exam_figure([run, run]),
        *charts.budget_figures([run]),
        *charts.pareto_figures(run),
        charts.system_figure(found),
    ]

    def expressions(part):
        if isinstance(part, dict):
            for key, value in part.items():
                if key in ("signal", "expr", "test", "update", "init", "filter", "encode"):
                    yield value if isinstance(value, str) else ""
                if key != "values":
                    yield from expressions(value)
        elif isinstance(part, list):
            for value in part:
                yield from expressions(value)

    seen = 0
    for figure in figures:
        specification = json.dumps(figure.specification).replace("\\ud800", "?")
        for expression in expressions(vl_convert.vegalite_to_vega(specification)):
            assert "harmed" not in expression, figure.title
            seen += 1
    assert seen > 100


def test_what_html_cannot_hold_is_not_in_the_page(hostile):
    hostile.encode()  # a half of a surrogate pair would raise
    found = re.findall("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e]", hostile)
    assert found == []


def test_the_policy_allows_what_is_in_the_page_and_nothing_else(hostile):
    page = parsed(hostile)
    (policy,) = [
        attributes["content"]
        for name, attributes in page.elements
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert policy.count("sha256-") == 3


def test_every_text_comes_back_out_of_the_page_whole(hostile):
    page = parsed(hostile)
    data = {a["id"]: "".join(text) for a, text in page.scripts if a.get("type") == "text/plain"}
    for text in data.values():
        assert re.fullmatch(r"[A-Za-z0-9+/=]+", text)
    rows = unpacked(data["part-0-0"])
    assert len(rows[3]["critique"]) == 100_000
    bad = " ".join(reported.HOSTILE).replace("\ud800", "?")
    assert rows[0]["answer"]["text"] == rows[0]["gate"]["reason"] == bad
    assert unpacked(data["index-0"])[0][1] == f"0 {bad}"
    for attributes, text in page.scripts:
        if attributes.get("type") == "application/json":
            assert "<" not in "".join(text)
            json.loads("".join(text))


def test_the_same_runs_make_the_same_page(tmp_path):
    folder = reported.write_run(tmp_path / "run")
    assert make_page(read_runs([folder])) == make_page(read_runs([folder]))


def test_some_episodes_evenly_spread(tmp_path):
    rows = [{"episode": n} for n in range(101)]
    assert [row["episode"] for row in packing.spread(rows, 5)] == [0, 25, 50, 75, 100]
    assert packing.spread(rows, 1) == rows[:1]
    assert packing.spread(rows, 200) == rows
    (run,) = read_runs([reported.write_run(tmp_path / "run")])
    assert "5 of 12 episodes are in this page" in " ".join(
        " ".join(parsed(make_page([run], most=5)).text).split()
    )


def test_five_thousand_episodes_of_gsm8k_fit_in_ten_megabytes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from bench_report import BATCH, episodes

    metrics = [reported.metric(n) for n in range(5000 // BATCH)]
    folder = reported.write_run(tmp_path / "run", list(episodes(5000)), metrics)
    page = make_page(read_runs([folder]))
    assert (folder / runs.EPISODES).stat().st_size > 20e6
    assert len(page.encode()) < 10e6
    rows = [
        row
        for attributes, text in parsed(page).scripts
        if attributes.get("id", "").startswith("part-")
        for row in unpacked("".join(text))
    ]
    assert [row["episode"] for row in rows] == list(range(5000))


def test_only_a_report_is_overwritten(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("<h1>mine</h1>")
    with pytest.raises(UserError, match="left alone"):
        write_page("<!doctype html>", path)
    assert path.read_text() == "<h1>mine</h1>"
    with pytest.raises(UserError, match="a folder"):
        check_out(tmp_path)
    path.unlink()
    page = make_page(read_runs([reported.write_run(tmp_path / "run")]))
    write_page(page, path)
    write_page(page, path)


def test_a_chart_in_a_file_has_colours_of_its_own(tmp_path):
    import altair as alt

    chart = alt.Chart(alt.Data(values=[{"x": 1, "y": 2}])).mark_point().encode(x="x:Q", y="y:Q")
    theme.save_svg(chart, tmp_path / "chart.svg")
    svg = (tmp_path / "chart.svg").read_text()
    assert svg.startswith("<svg")
    assert "var(" not in svg


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    one = reported.write_run(tmp_path / "one")
    two = reported.write_run(tmp_path / "two", finished=False)
    status, out, err = run_cli(monkeypatch, capsys, one)
    assert (status, err) == (0, "")
    assert out.startswith(f"{one / 'report.html'} (")
    assert (one / "report.html").is_file()
    status, out, _ = run_cli(monkeypatch, capsys, one, two, "--json")
    result = json.loads(out)
    assert (status, result["report"]) == (0, "report.html")
    assert [run["finished"] for run in result["runs"]] == [True, False]
    assert (tmp_path / "report.html").stat().st_size == result["bytes"]


def test_what_goes_wrong_is_said(tmp_path, monkeypatch, capsys):
    status, _, err = run_cli(monkeypatch, capsys, tmp_path / "none")
    assert status == 2
    assert "not a run directory" in err
    run = reported.write_run(tmp_path / "run")
    (run / "report.html").write_text("mine")
    status, _, err = run_cli(monkeypatch, capsys, run)
    assert status == 2
    assert "left alone" in err
    status, _, err = run_cli(monkeypatch, capsys, run, "--out", run / "config.toml" / "x.html")
    assert status == 2
    assert "choose another --out" in err


def test_a_run_of_another_schema_is_refused(tmp_path):
    folder = reported.write_run(tmp_path / "run")
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["schema_version"]
    path.write_text(json.dumps(manifest | {"versions": {"mlx-fd": "0.2.0"}}))
    with pytest.raises(UserError, match=r"older version \(mlx-fd 0\.2\.0\).*begin a new run"):
        read_runs([folder])


def test_without_gold_the_page_says_so_and_shows_verdicts(tmp_path):
    blind = {"reference": None, "correct_before": None, "correct_after": None}
    episodes = [reported.episode(n, **blind) for n in range(3)]
    episodes[0]["expert_feedback"]["written_score"] = 0.5
    episodes.append(reported.alone(3, **blind))
    folder = reported.write_run(tmp_path / "run", episodes)
    none = {"count": 0, "n": 0}
    counts = {"problems": 4, "expert_judged": 4, "student_judged": 4}
    unknown = dict.fromkeys(("expert_right", "student_right"))
    unknown |= dict.fromkeys(("expert_judged_right", "student_judged_right"))
    verdicts = {"expert": {"count": 3, "n": 4}, "student": {"count": 1, "n": 3}, "agreement": none}
    probe = {"headroom": {**counts, **unknown, "verdicts": verdicts}}
    (folder / "probe.json").write_text(json.dumps(probe))
    (run,) = read_runs([folder])
    assert run.missing == []
    cells = {row[0].value: row[1] for row in tables.summary_table([run]).rows}
    low, high = (round(side, 4) for side in wilson(1, 3))
    good = tables.Cell("33.3%", f"{low:.1%} to {high:.1%}, n 3")
    assert cells["first answers good, by the expert's verdict"] == good
    assert not any("right" in label.split() for label in cells)
    assert cells["headroom, held-out problems"].value == "good: expert 3 of 4, student 1 of 3"
    assert dict(tables.headlines(run))["first answers good, by the expert's verdict"] == good
    figure = charts.accuracy_figure([run])
    assert "No right answers are known" in figure.says
    points = figure.specification["datasets"]["rows"]
    assert sum(point["n"] for point in points) == 3
    flags = [packing.listed_episode(row)[3] for row in run.episodes]
    assert [flag & packing.GOOD > 0 for flag in flags] == [True, False, False, False]
    assert [flag & packing.POOR > 0 for flag in flags] == [False, True, True, False]
    # Beside a run with gold each shows what it has.
    beside = read_runs([folder, reported.write_run(tmp_path / "graded")])
    both = {row[0].value: row[1:] for row in tables.summary_table(beside).rows}
    assert [cell.value for cell in both["final answers right"]] == ["-", "100.0%"]
    assert [cell.value for cell in both["first answers good, by the expert's verdict"]] == [
        "33.3%", "-",
    ]  # fmt: skip
    assert {row["run"] for row in charts.accuracy_figure(beside).specification["datasets"]["rows"]}
    assert make_page(beside)
