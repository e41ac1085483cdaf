"""The report of runs of self-distillation: attempts, headroom, statistics; damaged and hostile."""

import json

import pytest

from mlx_fd import runs
from mlx_fd.errors import UserError
from mlx_fd.files import write_json
from mlx_fd.report import charts, packing, self_charts, self_tables, tables
from mlx_fd.report.page import make_page
from mlx_fd.report.reading import read_runs
from mlx_fd.runs.summary import wilson
from support import reported
from support.pages import check_charts, parsed, run_cli, unpacked


def read(folder):
    (run,) = read_runs([folder])
    return run


def cells(table):
    return {row[0].value: row[1] for row in table.rows}


def test_a_run_is_read_and_its_numbers_are_its_rows(tmp_path):
    attempts = [reported.attempt(n, correct=n >= 4, teaches=n % 2 == 0) for n in range(12)]
    run = read(reported.write_self_run(tmp_path / "run", attempts))
    assert (run.missing, run.finished) == ([], True)
    totals = cells(self_tables.summary_table([run]))
    # Four attempts at one problem are wrong and two at another right: Wilson's of 0.75 of 2.25.
    assert totals["attempts right, first half"] == tables.Cell("33.3%", "6.2% to 79.2%, n 6")
    assert totals["attempts right, second half"].value == "100.0%"
    assert totals["held-out problems right, before"].note.endswith("n 40")
    assert totals["attempts trained on"].value == "50.0%"
    assert totals["tokens per attempt"].value == "4.0"
    assert totals["optimiser steps"] == tables.Cell("3", "3 batches, 0 skipped")
    assert totals["ratios clipped"].value == "12.50%"
    assert totals["peak memory"].value == "1.00 GiB"
    heads = cells(self_tables.headroom_table([run]))
    low, high = wilson(24, 30)
    assert heads["right with the context, of problems with one"] == tables.Cell(
        "80.0%", f"{low:.1%} to {high:.1%}, n 30"
    )
    assert heads["right, of all held-out problems"].value == "25.0%"
    first = dict(self_tables.headlines(run))
    assert first["held-out problems right, before → after"].value == "25.0% → 75.0%"
    assert first["headroom: right without the context → with it"].value == "20.0% → 80.0%"
    assert "critic tiny, method step-critique: context step-critique" in self_tables.lead(run)
    assert "critic" in cells(tables.origin_table([run], "critic"))


def test_charts_have_the_rows_numbers(tmp_path):
    attempts = [reported.attempt(n, correct=n < 6) for n in range(32)]
    run = read(reported.write_self_run(tmp_path / "run", attempts))

    def rows(figure):
        return figure.specification["datasets"]["rows"]

    held_out = rows(self_charts.held_out_figure([run]))
    assert [(row["batch"], row["right"]) for row in held_out] == [(0, 0.25), (2, 0.5), (3, 0.75)]
    assert [held_out[1]["low"], held_out[1]["high"]] == list(wilson(20, 40))
    figures = {figure.title: figure for figure in self_charts.attempt_figures([run])}
    right = rows(figures["Attempts that are right"])
    assert [row["right"] for row in right] == [1.0] * 3 + [0.0] * 13
    assert "37.5% in the first half, 0.0% in the second" in figures["Attempts that are right"].says
    against = rows(figures["Negative advantage on right attempts"])
    assert [(row["batch"], row["value"]) for row in against] == [(1, 0.25), (3, 0.25)]
    assert {row["value"] for row in rows(figures["Clipped ratios"])} == {0.125}
    (match,) = self_charts.update_figures([run])
    assert [row["loss"] for row in rows(match)] == [1 / 2, 1 / 3, 1 / 4]
    assert match.table is None
    assert "frozen" not in charts.gain_figure(run).says
    seconds = rows(self_charts.budget_figures([run])[1])
    assert {row["step"]: row["value"] for row in seconds} == {
        "attempts": 3.0,
        "contexts": 1.5,
        "student learns": 6.0,
    }


def test_health_is_drawn_and_the_experts_answers_are_set_apart(tmp_path):
    def health(batch):
        places = [(0, 8, 0.5 / (batch + 1)), (8, 2 + batch, 0.25)]
        names = ("first", "tokens", "reverse_kl")
        positions = [dict(zip(names, place, strict=True)) for place in places]
        nearness = {"overlap": 0.5 + batch / 10, "reverse_kl": 1 / (batch + 1)}
        return {"top_k": 10, "tokens": 10 + batch, "positions": positions, **nearness}

    attempts = [reported.attempt(n, correct=n < 2) for n in range(4)]
    attempts[3]["by_expert"] = True
    metrics = [reported.self_metric(n) | {"health": health(n)} for n in range(3)]
    run = read(reported.write_self_run(tmp_path / "run", attempts, metrics))
    totals = cells(self_tables.summary_table([run]))
    assert totals["KL(student, teacher), last quarter"].value == "0.3333"
    assert totals["likeliest tokens shared, first quarter"].value == "50.0%"
    assert totals["expert's answers right"].value == "0.0%"
    assert totals["attempts right, first half"].note.endswith("n 1")
    assert totals["attempts right, second half"].note.endswith("n 2")
    figures = {figure.title: figure for figure in self_charts.attempt_figures([run])}
    places = figures["Distance to the teacher by position"].specification["datasets"]["rows"]
    assert [(row["batches"], row["position"], row["KL"]) for row in places] == [
        ("first quarter", 0, 0.5),
        ("first quarter", 8, 0.25),
        ("last quarter", 0, round(0.5 / 3, 6)),
        ("last quarter", 8, 0.25),
    ]
    assert "1 in the first quarter" in figures["Distance to the teacher"].says
    assert check_charts(make_page([run])) >= 8
    damaged = [metrics[0] | {"health": {**health(0), "tokens": 0}}, *metrics[1:]]
    run = read(reported.write_self_run(tmp_path / "damaged", attempts, damaged))
    assert len(run.metrics) == 2 and "metrics.jsonl" in run.missing[0]


def test_one_look_at_the_held_out_problems_is_a_line_from_the_beginning(tmp_path):
    metrics = [reported.self_metric(n, wrong=0.5 if n == 2 else None) for n in range(4)]
    run = read(reported.write_self_run(tmp_path / "run", None, metrics))
    figure = charts.gain_figure(run)
    rows = figure.specification["datasets"]["rows"]
    assert [(row["batch"], row["gain"]) for row in rows] == [(0, 0.0), (3, 0.5)]
    assert {row["loss"] for row in rows} == {"problems answered wrong"}
    assert "problems answered wrong 50%" in figure.says


def test_without_a_look_a_sentence_stands_in_the_charts_place(tmp_path):
    metrics = [reported.self_metric(n) for n in range(4)]
    run = read(reported.write_self_run(tmp_path / "run", None, metrics))
    assert charts.gain_figure(run) is None
    page = " ".join(parsed(make_page([run])).text)
    assert "Gains on the probe set" not in page
    assert "there was no probe evaluation between updates" in page


def test_what_was_not_cut_and_not_measured_has_no_chart(tmp_path):
    metrics = [reported.self_metric(0) | {"clipped": [0.0]}]
    metrics[0]["attempts"] |= dict.fromkeys(("mean_abs_advantage", "negative_on_right"))
    options = {"method": "grpo", "context": "none", "objective": "grpo", "critic": ""}
    run = read(reported.write_self_run(tmp_path / "run", None, metrics, options=options))
    titles = {figure.title for figure in self_charts.attempt_figures([run])}
    assert "Attempts that are right" in titles
    assert not titles & {"Clipped ratios", "Token advantage"}
    heads = cells(self_tables.headroom_table([run]))
    assert heads["right with the context, of problems with one"].value == "-"
    assert heads["both right and wrong attempts, of all held-out problems"].value == "12.5%"
    assert "critic" not in self_tables.lead(run)
    page = " ".join(parsed(make_page([run])).text)
    assert "attempts at one problem are compared" in page and "self-teacher is" not in page


def test_a_page_says_nothing_of_a_comparison_that_was_not_made(tmp_path):
    said = "were held against its answers without"
    folder = reported.write_self_run(tmp_path / "run")
    assert said in " ".join(parsed(make_page([read(folder)])).text)
    (folder / runs.HEADROOM).unlink()
    page = " ".join(parsed(make_page([read(folder)])).text)
    assert "what the model can use." in page and said not in page


def test_an_unfinished_run_is_counted_so_far(tmp_path):
    run = read(reported.write_self_run(tmp_path / "run", finished=False))
    assert len(run.missing) == 1
    assert "12 attempts so far" in run.missing[0]
    # The headroom check is what it was before the first update.
    assert run.totals["held_out"]["before"]["right"] == 10
    assert run.totals["held_out"]["after"]["right"] == 20
    assert "unfinished" in make_page([run])


def test_a_run_that_has_only_begun(tmp_path):
    folder = reported.write_self_run(tmp_path / "run", [], [], finished=False)
    for name in (runs.ATTEMPTS, runs.METRICS, runs.HEADROOM):
        (folder / name).unlink()
    run = read(folder)
    assert [said.split()[0] for said in run.missing[:3]] == [
        "attempts.jsonl",
        "metrics.jsonl",
        "headroom.json",
    ]
    page = " ".join(parsed(make_page([run])).text)
    assert "The headroom is not known." in page
    assert "episode" not in page.split("Configuration")[0]


@pytest.mark.parametrize("name", [runs.MANIFEST, runs.ATTEMPTS, runs.METRICS, runs.HEADROOM])
@pytest.mark.parametrize("content", [None, "", "{", "[]", "null", '{"a": 1}\n', "\x00\xff\n"])
def test_missing_and_damaged_files_are_named_on_the_page(tmp_path, name, content):
    folder = reported.write_self_run(tmp_path / "run")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content, encoding="latin-1")
    run = read(folder)
    assert [said for said in run.missing if name in said], run.missing
    if content in (None, "{"):
        assert any(name in text for text in parsed(make_page([run])).text)


def test_every_key_of_a_row_may_be_lost(tmp_path):
    whole, metrics = reported.attempt(0), reported.self_metric(0, wrong=0.5)
    rows, batches = [whole], [metrics]
    for found, row in ((rows, whole), (batches, metrics)):
        for key in row:
            found += [
                {k: v for k, v in row.items() if k != key},
                row | {key: [[1]]},
                row | {key: {"a": None}},
            ]
    run = read(reported.write_self_run(tmp_path / "run", rows, batches))
    assert 0 < len(run.attempts) < len(rows)
    assert 0 < len(run.metrics) < len(batches)
    assert sum("damaged" in said for said in run.missing) == 2
    make_page([run])


@pytest.mark.parametrize(
    "changes", [{"right": 41}, {"with_context": 31}, {"taught": 41}, {"mixed": -1}, {"problems": 0}]
)
def test_a_headroom_that_cannot_be_is_left_out(tmp_path, changes):
    folder = reported.write_self_run(tmp_path / "run")
    found = json.loads((folder / runs.HEADROOM).read_text())
    write_json(folder / runs.HEADROOM, found | changes)
    run = read(folder)
    assert [said.split()[0] for said in run.missing] == [runs.HEADROOM]
    make_page([run])


@pytest.mark.parametrize("finished", [True, False])
def test_shares_that_cannot_be_are_left_out(tmp_path, finished):
    metrics = [reported.self_metric(n, wrong=wrong) for n, wrong in enumerate((0.5, 7.0, -1e300))]
    folder = reported.write_self_run(tmp_path / "run", None, metrics, finished=finished)
    if finished:
        found = json.loads((folder / runs.SUMMARY).read_text())
        found["probe"]["after"] = {"wrong": 3.0}
        write_json(folder / runs.SUMMARY, found)
    run = read(folder)
    rows = self_charts.held_out_figure([run]).specification["datasets"]["rows"]
    assert [(row["batch"], row["right"]) for row in rows] == [(0, 0.25), (1, 0.5)]
    make_page([run])


def test_a_half_written_last_line_is_left_out(tmp_path):
    folder = reported.write_self_run(tmp_path / "run")
    with (folder / runs.ATTEMPTS).open("a") as file:
        file.write('{"attempt": 12, "id"')
    run = read(folder)
    assert run.missing == ["1 of 13 lines of attempts.jsonl are damaged and left out."]


def test_nothing_that_was_written_into_a_run_becomes_markup(tmp_path):
    written = make_page([read(reported.hostile_self_run(tmp_path / "a <b>&run"))])
    assert check_charts(written) >= 8
    page = parsed(written)
    assert {attributes.get("type") for attributes, _ in page.scripts} == {
        "module",
        "application/json",
        "text/plain",
    }
    assert not {name for name, _ in page.elements} & {"img", "b", "iframe", "object", "link"}
    data = {a["id"]: "".join(text) for a, text in page.scripts if a.get("type") == "text/plain"}
    rows = unpacked(data["part-0-0"])
    bad = " ".join(reported.HOSTILE).replace("\ud800", "?")
    assert rows[0]["text"] == rows[0]["teacher"] == rows[0]["note"] == bad
    assert "tokens" not in rows[0]
    assert rows[0]["length"] == 4
    assert unpacked(data["index-0"])[0][1] == f"0 {bad}"


def test_the_list_says_what_an_attempt_is():
    def flags(**changes):
        return packing.listed_attempt(reported.attempt(0, **changes))[3]

    assert flags() == packing.TEACHES | packing.TOLD
    assert flags(correct=True, teaches=False) == packing.RIGHT | packing.TOLD
    assert flags(finished=False, final=None, teacher=None) == (
        packing.TEACHES | packing.CUT | packing.UNREAD
    )


def test_both_kinds_of_run_do_not_go_on_one_page(tmp_path, monkeypatch, capsys):
    folders = [
        reported.write_run(tmp_path / "loop"),
        reported.write_self_run(tmp_path / "self"),
    ]
    with pytest.raises(UserError, match=r"self is a run of self-distillation, .*loop one of"):
        read_runs(folders)
    status, _, err = run_cli(monkeypatch, capsys, *folders)
    assert status == 2
    assert "make a page of each" in err


def test_the_command_compares_methods(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders = [reported.write_self_run(tmp_path / name) for name in ("one", "two")]
    status, out, _ = run_cli(monkeypatch, capsys, *folders, "--episodes", "5", "--json")
    result = json.loads(out)
    assert status == 0
    assert [run["attempts"] for run in result["runs"]] == [12, 12]
    page = " ".join(" ".join(parsed((tmp_path / "report.html").read_text()).text).split())
    assert "10 of 24 attempts are in this page" in page
    assert "2 runs compared" in page


def test_without_gold_no_share_is_shown(tmp_path):
    unknown = {"correct": None, "reward": None, "reference": None, "final": None}
    attempts = [reported.attempt(n, **unknown) for n in range(12)]
    metrics = [reported.self_metric(n) for n in range(3)]
    for row in metrics:
        row["attempts"] |= {"right": None, "reward": None, "negative_on_right": None}
    folder = reported.write_self_run(tmp_path / "run", attempts, metrics)
    names = ("right", "mixed", "without", "with_context")
    blind = {"problems": 4, "taught": 3, **dict.fromkeys(names), "seconds": 1.0}
    (folder / runs.HEADROOM).write_text(json.dumps(blind))
    summary = {"probe": {"before": {}, "after": {}}}
    (folder / runs.SUMMARY).write_text(json.dumps(summary))
    run = read(folder)
    assert run.missing == []
    assert dict(self_tables.headlines(run))["right answers"].value == "none are known"
    totals = cells(self_tables.summary_table([run]))
    assert totals["attempts right, first half"] == totals["held-out problems right, after"]
    assert totals["attempts right, first half"] == tables.Cell("-")
    assert self_tables.headroom_table([run]) is None
    assert self_charts.held_out_figure([run]) is None
    titles = [figure.title for figure in self_charts.attempt_figures([run])]
    assert "Attempts that are right" not in titles and "Length of attempts" in titles
    assert packing.listed_attempt(run.attempts[0])[3] & packing.UNGRADED
    assert "the problems have no right answers" in make_page([run])
