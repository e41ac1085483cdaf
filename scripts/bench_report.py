"""How large a long run's report is, and how fast it opens.

python scripts/bench_report.py                     # 5,000 episodes of GSM8K's own texts
python scripts/bench_report.py --episodes 20000 --out /tmp/bench

The run is made up: questions and solutions of GSM8K's training split, with a line changed in first
answers and a sentence on each line as feedback, so that its texts are as long, and as unlike each
other, as those of a real run on GSM8K. With Chromium and the package playwright here, it is opened.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from mlx_fd.problems.sources import gsm8k
from mlx_fd.report.page import make_page, write_page
from mlx_fd.report.reading import read_runs
from support import reported

BATCH = 8
REMARKS = (
    "the calculation is right and follows from the question",
    "this is correct, though the unit could have been named",
    "the quantity is the one that the question asks for",
    "here the wrong number was taken from the question, which changes all that follows",
    "the multiplication was done before the discount was taken into account",
    "well explained; nothing to add",
)


def episodes(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Episodes with texts as long as those on GSM8K."""
    rng = np.random.default_rng(seed)
    problems = gsm8k.load("train").problems

    def feedback(lines: Sequence[str]) -> str:
        said = [
            f'Step {place}: "{line}" - {REMARKS[rng.integers(len(REMARKS))]}.'
            for place, line in enumerate(lines, 1)
        ]
        return " ".join(said)

    for number in range(count):
        problem = problems[int(rng.integers(len(problems)))]
        lines = problem.solution.splitlines()
        wrong = list(lines)
        wrong[int(rng.integers(len(lines)))] += f" So there are {rng.integers(1000)} left."
        expert, student = feedback(wrong), feedback(wrong)
        yield reported.episode(
            number,
            id=problem.id,
            question=problem.question,
            reference=str(problem.answer),
            answer={"text": "\n".join(wrong), "final": str(rng.integers(1000))},
            expert_feedback={"text": expert, "written_score": round(float(rng.uniform(-1, 1)), 2)},
            student_feedback={
                "text": student,
                "head_score": float(rng.uniform(-1, 1)),
                "written_score": round(float(rng.uniform(-1, 1)), 2),
            },
            merged=expert + " " + feedback(lines[:2]),
            revised=problem.solution,
            critique=feedback(lines),
            final={"text": problem.solution, "final": str(problem.answer)},
            correct_before=bool(rng.random() < 0.7),
            correct_after=bool(rng.random() < 0.85),
            tokens={step: int(rng.integers(60, 300)) for step in reported.STEPS},
            seconds={step: round(float(rng.uniform(1, 9)), 3) for step in reported.STEPS},
        )


def opened(page: Path) -> dict[str, float]:
    """Seconds by the page's own clock, and what its main thread has worked for all of it."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.set_default_timeout(120_000)
        session = tab.context.new_cdp_session(tab)
        session.send("Performance.enable")
        tab.goto(page.as_uri())
        tab.wait_for_selector("html[data-charts=drawn]", state="attached")
        found = tab.evaluate(
            """() => Object.fromEntries(
                performance.getEntries().filter(entry => entry.entryType !== "navigation")
                    .map(entry => [entry.name, entry.startTime / 1000]))"""
        )
        measured = session.send("Performance.getMetrics")["metrics"]
        browser.close()
    return {
        "first contents": found["first-contentful-paint"],
        "first episode": found["records"],
        "all charts": found["charts"],
        "CPU of the main thread": next(m["value"] for m in measured if m["name"] == "ThreadTime"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--episodes", type=int, default=5000)
    parser.add_argument("--out", type=Path, help="keep the run and its report there")
    parser.add_argument("--no-browser", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.out or Path(temporary)) / "run"
        rows = list(episodes(arguments.episodes))
        metrics = [reported.metric(n) for n in range(-(-arguments.episodes // BATCH))]
        reported.write_run(folder, rows, metrics)
        begin = time.perf_counter()
        page = folder / "report.html"
        write_page(make_page(read_runs([folder])), page)
        result: dict[str, Any] = {
            "episodes": arguments.episodes,
            "log_mb": round((folder / "episodes.jsonl").stat().st_size / 1e6, 1),
            "report_mb": round(page.stat().st_size / 1e6, 2),
            "made_in_s": round(time.perf_counter() - begin, 1),
        }
        if not arguments.no_browser:
            result["opened_s"] = {name: round(value, 2) for name, value in opened(page).items()}
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
