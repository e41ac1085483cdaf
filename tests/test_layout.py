"""Tables in a terminal of 80 columns, of 128, and in a file: no number is broken over two lines."""

import io
import re

import pytest
from rich.console import Console

from mlx_fd.cli.checks import models_table
from mlx_fd.cli.terminal.advantage import table as advantage_table
from mlx_fd.cli.terminal.comparison import print_comparison
from mlx_fd.cli.terminal.evaluation import print_results
from mlx_fd.cli.terminal.frontier import table as frontier_table
from mlx_fd.cli.terminal.layout import (
    FittingTable,
    NamedValues,
    output_console,
    print_whole,
    wrapped,
)
from mlx_fd.cli.terminal.self_distillation import summary_table as self_summary_table
from mlx_fd.cli.terminal.summary import summary_table
from mlx_fd.evaluation.statistics import Estimate
from mlx_fd.runs.labels import EXAM_NAMES
from mlx_fd.training.selfdistill.advantage import PARTS, Summary

# What must stand on one line: intervals, numbers with decimals, percentages.
ATOMS = re.compile(r"[-+]?[\d.]+ \[[^\]]*\]|\([^)]*\d[^)]*\)|[-+]?\d+\.\d+%?|\d+/\d+")


def rendered(renderable, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(renderable)
    return console.file.getvalue()


def check(at, widths=(80, 100, 128)) -> None:
    """What ``at`` prints at a width is what it prints with much room, in lines that fit."""
    wanted = sorted(ATOMS.findall(at(1000)))
    assert len(wanted) > 5
    for width in widths:
        text = at(width)
        assert max(map(len, text.splitlines())) <= width
        assert sorted(ATOMS.findall(text)) == wanted


def interval(value: float = 0.5) -> dict:
    return {"value": value, "low": value - 0.125, "high": value + 0.125, "n": 200}


def share(right: int = 466) -> dict:
    return {"right": right, "n": 480, "interval": [0.9515, 0.9825]}


SUMMARY = {
    "episodes": 480,
    "accuracy": {"first_answers": share(286), "final_answers": share()},
    "probe": {"before": {"lm": 0.16374, "score": 0.87754}, "after": {"lm": 0.06171}},
    "score_gap": {"first_half": 0.728, "second_half": 0.481, "n": 480},
    "updates": {"steps": 44, "batches": 11, "skipped": 0, "frozen_after_batch": 11},
    "expert_feedback": {
        "asked": 400,
        "not_asked": 80,
        "tokens_written": 25613,
        "tokens_saved": 5123,
        "share_saved": 0.1667,
        "share_saved_second_half": 0.3333,
        "audits": {"n": 40, "disagreed": 2, "interval": [0.0138, 0.165]},
        "trust": {
            "threshold": 0.97,
            "coverage": 0.5,
            "audited": 200,
            "disagreed": 9,
            "bound": 0.0775,
        },
        "accuracy_when_asked": share(300),
        "accuracy_when_not_asked": share(70),
    },
    "top_k": {"k": 64, "tail_mass": 0.0152, "missing_at_most": 0.01234},
    "unreadable_scores": {"expert": 0, "student": 4},
    "exam": {
        name: {side: interval() for side in ("before", "after", "change")} for name in EXAM_NAMES
    },
    "seconds": {"total": 198.0},
    "peak_memory_bytes": 3 << 27,
}
SELF_SUMMARY = {
    "headroom": {
        "taught": 32,
        "without": 14,
        "with_context": 30,
        "right": 14,
        "mixed": 3,
        "problems": 32,
    },
    "attempts": {
        "n": 1024,
        "right": 600,
        "teaches": 0.912,
        "finished": 0.998,
        "tokens": 31.21,
        "entropy": 0.1734,
        "mean_abs_advantage": 0.0312,
        "negative_on_right": 0.112,
        "logprob_gap": 0.0000123,
    },
    "updates": {"steps": 44, "batches": 11, "skipped": 0, "clipped": 0.0123},
    "held_out": {"before": share(14), "after": share(30)},
    "first_half": share(200),
    "second_half": share(300),
    "best_checkpoint": "000011",
    "seconds": {"total": 198.0},
    "peak_memory_bytes": 3 << 27,
}


@pytest.mark.parametrize(
    "table", [summary_table(SUMMARY), self_summary_table(SELF_SUMMARY, has_context=True)]
)
def test_summaries_keep_numbers_whole(table):
    check(lambda width: rendered(table, width))


def test_a_run_without_a_context_says_nothing_of_one():
    shown = [
        rendered(self_summary_table(SELF_SUMMARY, has_context=has), 200) for has in (True, False)
    ]
    assert ["with it, of" in text for text in shown] == [True, False]


def evaluation(systems: int = 7) -> dict:
    measures = ("accuracy", "accuracy_strict", "accuracy_flexible", "first_accuracy", "score_error")
    named = [
        {
            "name": f"system-{index}",
            "label": f"the label of system {index}",
            "measures": {name: interval() for name in measures},
            "cost_estimates": {"expert_tokens": interval(131.5), "tokens": interval(411.25)},
        }
        for index in range(systems)
    ]
    rows = [
        {"measure": "accuracy", "against": one["name"], "p_holm": 0.0123, "difference": interval()}
        for one in named[1:]
    ]
    found = {"name": "arithmetic/test", "n": 100, "systems": named, "comparisons": rows}
    return {
        "sets": [found],
        "temperature": {"first_answers": 0.7, "bare": 0.0},
        "answers_by": "student",
        "k": 1,
        "text_models": {},
    }


def test_an_evaluation_keeps_intervals_whole():
    results = evaluation()
    names = list(results["sets"][0]["systems"][0]["measures"])

    def at(width: int) -> str:
        console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
        print_results(results, [names], console)
        return console.file.getvalue()

    check(at, (80, 100, 128, 160))
    # A table where there is room, a block for each system where there is not.
    assert at(1000).count("first answers right") == 1 and at(80).count("first answers right") == 7


def test_a_frontier_keeps_numbers_whole():
    point = {
        "stop_threshold": 0.35,
        "stopped_after_batch": 11,
        "cost": {
            "expert_tokens": 18_700,
            "kd_steps": 44,
            "teacher_tokens": 25613,
            "seconds": 105.3,
        },
        "losses": dict.fromkeys(("lm", "hidden", "score", "logit"), 0.01674),
        "metrics": {"final_accuracy": 0.97, "first_error_f1": 0.7, "solved": 0.6},
        "estimates": {n: interval() for n in ("final_accuracy", "first_error_f1", "solved")},
        "recommended": True,
        "dominated": False,
    }
    found = {"points": [point, {**point, "recommended": False}], "product_rule": 0.35}
    check(lambda width: rendered(frontier_table(found), width))


def test_advantages_keep_numbers_whole():
    estimate = Estimate(-0.123, -0.2, -0.1, 40)
    summary = Summary(
        "step-critique", 160, 80, dict.fromkeys(PARTS, 100), dict.fromkeys(PARTS, estimate),
        estimate, estimate, estimate,
    )  # fmt: skip
    check(lambda width: rendered(advantage_table([summary, summary]), width), (60, 80))


def test_a_comparison_of_many_engines_turns_into_blocks():
    count = {"agreeing": 560, "n": 562}
    measures = {
        "tokenisation": {"equal": 18, "n": 18, "by": "ids"},
        "greedy": {**count, "diverged": 1, "prompts": 18, "first_divergence": 12},
        "kl": {"mean": 1.1e-6, "worst": 0.00123, "n": 1138, "tokens": 20.0},
        "top1": count,
        "clear": count,
        "perplexity": {"engine": 3.1234, "reference": 3.1235},
        "accuracy": None,
        "speed": {"prefill": 1234.5, "decode": 123.4, "first_token": 0.0123},
        "peak_memory": 1 << 28,
        "about": "a machine",
        "missing": {},
    }
    row = {
        "engine": "llama.cpp",
        "export": "/runs/a-long-name-of-an-export",
        "target": "/runs/a-long-name-of-an-export/model-q4_1.gguf",
        "measures": measures,
        "tolerance": {"mean_kl": 0.01, "top1": 0.99},
        "weights": "float",
        "parity": True,
        "reasons": [],
    }

    def at(width: int) -> str:
        console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
        print_comparison([row] * 3, console)
        # The verdicts below are sentences.
        return console.file.getvalue().partition(": the same model")[0]

    narrow, wide = at(80), at(1000)
    assert wide.count("perplexity, reference") == 1 and narrow.count("perplexity, reference") == 3
    table = narrow.splitlines()[:-1]
    assert max(map(len, table)) <= 80 and narrow.count("99.6% of 562") == 9


def test_words_wrap_and_numbers_do_not():
    text = "change +0.550 [0.440, 0.660] (n 100), in 3 min 18 s, 0.5 -> 0.25"
    lines = wrapped(text, 24).split("\n")
    assert lines == ["change", "+0.550 [0.440, 0.660]", "(n 100), in 3 min 18 s,", "0.5 -> 0.25"]
    assert " ".join(lines) == text


@pytest.mark.parametrize("width", [8, 20, 30])
def test_nothing_is_cut_off_in_a_narrow_terminal(width):
    """A number that lost its last digits is another number, and looks like one."""
    for table in (summary_table(SUMMARY), self_summary_table(SELF_SUMMARY, has_context=True)):
        console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
        print_whole(console, table)
        text = console.file.getvalue()
        assert sorted(ATOMS.findall(text)) == sorted(ATOMS.findall(rendered(table, 1000)))
        assert max(map(len, text.splitlines())) <= 40
    rows = [{"name": "n" * 20, "student": "s" * 20, "here": True, "note": "a note", "source": ""}]
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    print_whole(console, models_table(rows))
    for words in (["name", "here", "default", "student", "what"], ["n" * 20, "yes", "s" * 20]):
        assert any(
            line.split()[: len(words)] == words for line in console.file.getvalue().split("\n")
        )


def test_text_in_tables_is_not_markup():
    table = FittingTable(["", "[red]x[/]"], [["a\x1b[2Jb", "[bold]"]])
    values = NamedValues(rows=[("[red]", "\x1b]0;t\x07")])
    text = rendered(table, 80) + rendered(table, 5) + rendered(values, 80)
    assert "[red]x[/]" in text and "[bold]" in text and not {"\x1b", "\x07"} & set(text)


def test_a_file_gets_the_table(capsys):
    table = FittingTable([f"column {i}" for i in range(20)], [[f"{i}.{i}" for i in range(20)]])
    output_console().print(table)
    assert len(capsys.readouterr().out.splitlines()) == 2
