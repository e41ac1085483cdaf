import io
import re

import pytest
from rich.console import Console

from mlx_fd.cli.terminal.run import Display
from mlx_fd.cli.terminal.summary import summary_table
from mlx_fd.runs.events import BatchDone, Note, Probed, Probing, Started, Step, Warned
from mlx_fd.runs.labels import duration
from mlx_fd.runs.summary import summarise

HEADROOM = {
    "problems": 8,
    "expert_right": 5,
    "student_right": 2,
    "expert_judged": 7,
    "expert_judged_right": 6,
    "student_judged": 4,
    "student_judged_right": 1,
}


def row(before: bool, after: bool, expert: float | None, student: float) -> dict:
    return {
        "correct_before": before,
        "correct_after": after,
        "expert_feedback": None if expert is None else {"written_score": expert},
        "student_feedback": {"head_score": student, "written_score": None},
        "gate": {"reason": "the score is 0.5 from the expert's", "trusted": False},
        "tokens": {"answer": 10} | ({} if expert is None else {"expert_feedback": 6}),
        "prefilled": {"answer": 30},
        "seconds": {"answer": 1.5},
        "capped": [],
    }


def metrics(batch: int, **changes) -> dict:
    return {
        "batch": batch,
        "lagging": 1,
        "weights": {"lm": 0.75, "logit": 0.25},
        "updates": [{"losses": {"lm": 2.5, "logit": 0.125}, "skipped": False, "tokens": 30}],
        "probe": {"lm": 2.0, "logit": 0.1},
        "stop": None,
        "frozen": False,
        "trust": {"threshold": None, "coverage": 0.0, "audited": 0, "disagreed": 0, "bound": 1.0},
        "expert_tokens": 12,
        "distil_seconds": 1.0,
        "seconds": 30.0,
        **changes,
    }


BATCHES = [
    BatchDone(2, 6, [row(True, True, 0.5, 0.0), row(False, True, 1.0, 0.5)], metrics(0)),
    BatchDone(
        4,
        6,
        [row(False, False, None, 0.5), row(True, False, None, 1.0)],
        metrics(1, lagging=0, updates=[], probe=None, frozen=True),
    ),
]


def shown(*events, quiet: bool = False, **terminal) -> str:
    console = Console(file=io.StringIO(), width=100, **terminal)
    with Display(console, quiet=quiet) as display:
        for event in events:
            display(event)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (185, "3 min 5 s"),
        (3599.6, "1 h 0 min"),
        (8070, "2 h 14 min"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_lines_for_a_log():
    lines = shown(Probed({"lm": 3.0}, {"lm": 3.0}, HEADROOM), *BATCHES).splitlines()
    assert lines[0] == (
        "headroom on 8 held-out problems: right answers: expert 5, student 2; right judgements, "
        "of readable scores: expert 6 of 7, student 1 of 4"
    )
    assert lines[1].startswith(
        "2/6  right 1 -> 2 of 2  score expert +0.75 student +0.25  distilled 1  lm 2.5 logit 0.125"
    )
    assert lines[2].startswith("gate: freeze: ")
    assert lines[3].startswith(
        "4/6  right 2 -> 2 of 4  score expert - student +0.75  frozen  expert not asked 2  ETA "
    )
    assert len(lines) == 4


def test_where_the_student_is_trusted_is_told_when_it_changes():
    trust = {"threshold": 0.62, "coverage": 0.405, "audited": 81, "disagreed": 1, "bound": 0.0574}
    trusted = metrics(0, trust=trust)
    seen = shown(*(BatchDone(2, 6, BATCHES[0].rows, row) for row in (trusted, trusted, metrics(2))))
    said = [line for line in seen.splitlines() if line.startswith("gate: ")]
    assert said == [
        "gate: the expert is not asked from a confidence of 0.62 on (40% of audited verdicts); of "
        "the last 81 there 1 differ, with 95 % at most 5.7%",
        "gate: the expert is always asked",
    ]


def test_a_skipped_step_is_told():
    update = {"losses": {"lm": None}, "skipped": True}
    done = BatchDone(2, 6, BATCHES[0].rows, metrics(0, updates=[update]))
    assert "lm -  1 steps skipped: gradient not finite  ETA" in shown(done)


def test_eta_counts_this_session_only():
    """A resumed run that did 1 of 3 batches in a second takes 2 more, however long the probe."""
    console = Console(file=io.StringIO(), width=100)
    with Display(console) as display:
        display._begin -= 100.0
        display(Probed({}, {}, HEADROOM))
        display(Started(100, 106))
        display._begin -= 1.0
        display(BatchDone(102, 106, BATCHES[0].rows, metrics(50)))
    assert console.file.getvalue().endswith("ETA 2 s\n")


def test_quiet_keeps_warnings():
    seen = shown(Note("a note"), Warned("careful"), BATCHES[0], quiet=True)
    assert seen == "warning: careful\n"


def test_text_is_not_markup():
    steering = shown(Note("a\x1b[2Jb"), Warned("c\x1b]0;d\x07e"))
    assert "\x1b" not in steering and "\x07" not in steering
    assert "a\ufffd[2Jb" in steering and "c\ufffd]0;d\ufffde" in steering
    seen = shown(Note("[red]x[/red] :smile: [/]"), Warned("[/bold]"), Note("long " * 50))
    assert seen == f"[red]x[/red] :smile: [/]\nwarning: [/bold]\n{'long ' * 50}\n"


def test_panel_of_a_terminal():
    events = (Probed({"lm": 3.0, "logit": 0.2}, {"lm": 3.0, "logit": 0.2}, HEADROOM), *BATCHES)
    seen = shown(*events, Step(2, "merge", 7), Step(2, "merge", 5), force_terminal=True)
    text = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", seen)
    assert "2/6  right" not in text and "loading models" in text
    panel = text.rpartition("mlx-fd loop")[2]
    assert "4/6" in panel and "merged feedback: 12 tokens" in panel
    assert re.search(r"lm +3 +2 +0\.75", panel) and re.search(r"logit +0\.2 +0\.1 +0\.25", panel)
    assert "right: 2 before, 2 after, of 4" in panel and "gate: frozen" in panel


class Screen:
    """What a terminal of some columns shows of what is written to it."""

    def __init__(self, columns: int):
        self.columns, self.lines, self.row, self.column = columns, [""], 0, 0

    def write(self, text: str) -> None:
        for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|.|\n", text, re.DOTALL):
            if part == "\n":
                self._down()
            elif part == "\r":
                self.column = 0
            elif part == "\x1b[2K":
                self.lines[self.row] = ""
            elif part == "\x1b[1A":
                self.row -= 1
            elif not part.startswith("\x1b"):
                if self.column == self.columns:
                    self._down()
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + part + line[self.column + 1 :]
                self.column += 1

    def _down(self) -> None:
        self.row, self.column = self.row + 1, 0
        if self.row == len(self.lines):
            self.lines.append("")


def on_screen(*steps) -> list[str]:
    """The screen after events (and texts that the terminal itself echoes) at 60 columns."""
    file, screen = io.StringIO(), Screen(60)

    def flush() -> None:
        screen.write(file.getvalue())
        file.truncate(0)
        file.seek(0)

    with Display(Console(file=file, width=60, force_terminal=True)) as display:
        display._live.auto_refresh = False
        for step in steps:
            if isinstance(step, str):
                screen.write(step)
            else:
                display(step)
            display._live.refresh()
            flush()
    flush()
    return screen.lines


def test_the_panel_counts_the_headroom_check():
    text = "\n".join(on_screen(Probing(0, 32), Step(0, "answer", 40), Probing(12, 32)))
    assert "headroom: 12/32" in text and "first answer: 40 tokens" in text
    assert "loading" not in text and "?" not in text


def test_the_panel_of_a_resumed_run_begins_at_its_count():
    text = "\n".join(on_screen(Probed({"lm": 3.0}, {"lm": 2.0}, HEADROOM), Started(96, 480)))
    assert "episodes: 96/480" in text


def test_an_echoed_interrupt_leaves_no_border():
    """The terminal writes ^C where the cursor is; after a second one the process may be gone."""
    lines = on_screen(*BATCHES, "^C", Note("stopping after this batch"), "^C", BATCHES[1])
    text = "\n".join(lines)
    assert text.count("\u256d") == text.count("\u2570") == 1 and "^C" not in text
    assert "stopping after this batch" in text


def test_summary_of_a_run():
    rows = [row for batch in BATCHES for row in batch.rows]
    summary = summarise(
        rows, [b.metrics for b in BATCHES], {"lm": 3.0, "score": 0.5}, {"lm": 1.5}, HEADROOM
    )
    console = Console(file=io.StringIO(), width=200)
    console.print(summary_table({**summary, "peak_memory_bytes": 3 << 29}))
    text = console.file.getvalue()
    # Wilson's interval of 2 of 4, from its definition.
    assert "50.0% (2/4, 95 % 15.0% to 85.0%)" in text
    assert "3 -> 1.5 (-50.0%)" in text and "0.5 -> -" in text
    assert "1 steps in 1 batches, 0 skipped; frozen after batch 2" in text
    assert "2 requested (12 tokens), 2 skipped (about 12 tokens saved)" in text
    assert "expert 0, student 4 of 4" in text
    assert "1 min 0 s" in text and "1.50 GiB" in text


def test_a_later_epoch_has_no_episodes():
    seen = shown(*BATCHES, BatchDone(6, 12, [], metrics(2, lagging=5)))
    last = seen.splitlines()[-1]
    assert last.startswith("6/12  distilled 5  lm 2.5 logit 0.125  ETA")


@pytest.mark.parametrize(
    ("missing", "text"), [(0.0123, "misses at most 0.0123"), (None, "misses an unknown amount")]
)
def test_what_a_top_k_leaves_out_is_in_the_summary(missing, text):
    summary = summarise([], [], {}, {}, HEADROOM)
    error = {"k": 64, "tail_mass": 0.0152, "missing_at_most": missing}
    console = Console(file=io.StringIO(), width=200)
    console.print(summary_table({**summary, "top_k": error, "peak_memory_bytes": 0}))
    assert "expert's top 64 tokens" in console.file.getvalue()
    assert "omit 1.52% of its probability" in console.file.getvalue()
    assert text in console.file.getvalue()
