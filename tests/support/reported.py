"""Run directories as files only, for the report: as large, as odd and as broken as is wanted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx_fd import runs
from mlx_fd.config import Config, to_toml
from mlx_fd.files import write_json
from mlx_fd.problems import Problem
from mlx_fd.report.advantage_page import page as make_advantage_page
from mlx_fd.runs.records.manifest import SCHEMA_VERSION
from mlx_fd.training.selfdistill.advantage import AFTER, BEFORE, IN, RIGHT, Scored, summarise
from mlx_fd.training.selfdistill.contexts import Attempt

LOSSES = ("lm", "hidden", "score", "logit")
HOSTILE = (
    "</script><script>window.harmed = 1</script>",
    "<img src=x onerror=window.harmed=1>",
    "<!--<script>",
    "{{ 7 * 7 }}{% for x in y %}",
    "'\"><b onmouseover=window.harmed=1>&amp;",
    "\x00\x01\x08\x1b[31m\x7f\u2028\u2029\ufeff",
    "\u202eevil\u202c \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "\ud800 half a pair",
    "javascript:window.harmed=1",
)
STEPS = ("answer", "student_feedback", "expert_feedback", "merge", "revise", "critique", "final")


def episode(number: int, **changes: Any) -> dict[str, Any]:
    """A row of ``episodes.jsonl``: wrong at first, right at last, unless ``changes`` say more."""
    row = {
        "episode": number,
        "id": f"problem-{number:05d}",
        "question": f"Ann has {number} apples and buys 2. How many has she?",
        "reference": str(number + 2),
        "answer": {"text": f"{number} + 2 = {number + 3}\n#### {number + 3}", "final": "1"},
        "expert_feedback": {"text": "Step 1 should be one less.", "written_score": -0.8},
        "student_feedback": {
            "text": "Step 1 is right.",
            "head_score": 0.25,
            "written_score": 1.0,
            "solves_alike": 1.0,
            "confidence": 0.25,
        },
        "gate": {
            "distilled": True,
            "reason": "score gap 1.05 > 0.25",
            "trusted": False,
            "on_policy": False,
            "losses_before": dict.fromkeys(LOSSES, 0.5),
            "losses_after": dict.fromkeys(LOSSES, 0.25),
        },
        "score": -0.3,
        "merged": "Step 1 should be one less.",
        "revised": f"{number} + 2 = {number + 2}\n#### {number + 2}",
        "critique": "Every step is right.",
        "final": {"text": f"#### {number + 2}", "final": str(number + 2)},
        "correct_before": False,
        "correct_after": True,
        "tokens": dict.fromkeys(STEPS, 10),
        "prefilled": dict.fromkeys(STEPS, 20),
        "capped": [],
        "seconds": dict.fromkeys(STEPS, 0.5),
    }
    return {**row, **changes}


def alone(number: int, **changes: Any) -> dict[str, Any]:
    """An episode after the freeze: the student's feedback stands alone, and the answer stays."""
    return episode(
        number,
        expert_feedback=None,
        gate={"distilled": False, "reason": "the student stands alone"},
        score=0.95,
        merged="",
        revised="",
        critique="",
        **changes,
    )


def metric(batch: int, *, frozen: bool = False, reason: str = "still gaining") -> dict[str, Any]:
    """A row of ``metrics.jsonl``."""
    losses = dict.fromkeys(LOSSES, 1 / (batch + 2))
    update = {
        "losses": losses,
        "total": 0.5,
        "gradient_norm": 1.0,
        "skipped": False,
        "tokens": 100,
    }
    action = "freeze" if frozen else "train"
    gains = {name: 1 - value for name, value in losses.items()}
    return {
        "batch": batch,
        "lagging": 4,
        "weights": dict.fromkeys(LOSSES, 0.25),
        "updates": [update, update],
        "probe": losses,
        "stop": {"action": action, "reason": reason, "gains": gains, "weights": losses},
        "frozen": frozen,
        "trust": {"threshold": None, "coverage": 0.0, "audited": 0, "disagreed": 0, "bound": 1.0},
        "expert_tokens": 12,
        "distil_seconds": 0.5,
        "seconds": 4.0,
    }


def exam() -> dict[str, Any]:
    def estimate(value: float) -> dict[str, Any]:
        return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 40}

    sides = {"before": estimate(0.3), "after": estimate(0.7), "change": estimate(0.4)}
    return {"first_error_f1": sides, "solved": sides}


def pareto(folder: Path) -> dict[str, Any]:
    """As ``mlx-fd pareto`` writes it."""

    def point(threshold: float, batch: int | None, lm: float, **flags: bool) -> dict[str, Any]:
        steps = 4 * (batch or 20)
        return {
            "stop_threshold": threshold,
            "stopped_after_batch": batch,
            "cost": {"kd_steps": steps, "teacher_tokens": 900 * steps, "seconds": 0.5 * steps},
            "losses": {"lm": lm, "logit": 2 * lm},
            "metrics": {"final_accuracy": 0.5},
            "estimates": {"final_accuracy": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 40}},
            "dominated": False,
            "recommended": False,
            **flags,
        }

    return {
        "format": 1,
        "run": str(folder),
        "objectives": ["kd_steps", "lm", "logit"],
        "points": [
            point(0.1, 4, 0.4),
            point(0.3, 9, 0.2, recommended=True),
            point(0.4, 12, 0.21, dominated=True),
            point(0.9, None, 0.19),
        ],
        "hypervolume": 0.61,
        "knee": 0.3,
        "product_rule": 0.1,
    }


def evaluation() -> dict[str, Any]:
    """As ``mlx-fd eval`` writes it."""

    def estimate(value: float, half: float = 0.08) -> dict[str, Any]:
        return {"value": value, "low": value - half, "high": value + half, "n": 100}

    labels = {"loop": "Online feedback distillation", "clear": "CLEAR", "expert": "Bare expert"}
    return {
        "format": 1,
        "target": "runs/mine",
        "suite": "fast",
        "created": "2026-11-24T12:00:00+00:00",
        "versions": {"mlx-fd": "0.3.0"},
        "models": {"expert": {"name": "tiny"}, "student": {"name": "tiny-student"}},
        "seed": 0,
        "k": 1,
        "sets": [
            {
                "name": "gsm8k/test",
                "n": 100,
                "systems": [
                    {
                        "name": name,
                        "label": label,
                        "measures": {"accuracy": estimate(0.8 - 0.1 * place)},
                        "cost_estimates": {
                            "tokens": estimate(300 - 100 * place, 20),
                            "seconds": estimate(1.5),
                        },
                    }
                    for place, (name, label) in enumerate(labels.items())
                ],
                "comparisons": [
                    {
                        "measure": "accuracy",
                        "system": "loop",
                        "against": "clear",
                        "difference": estimate(0.1, 0.05),
                        "test": "mcnemar",
                        "p": 0.0002,
                        "p_holm": 0.041,
                    }
                ],
            }
        ],
    }


def write_run(
    folder: Path,
    episodes: list[dict[str, Any]] | None = None,
    metrics: list[dict[str, Any]] | None = None,
    *,
    finished: bool = True,
    expert: str = "tiny",
    options: dict[str, Any] | None = None,
) -> Path:
    """Write a run's files, without weights."""
    episodes = [episode(n) for n in range(12)] if episodes is None else episodes
    metrics = [metric(n) for n in range(3)] if metrics is None else metrics
    _write(folder, {runs.EPISODES: episodes, runs.METRICS: metrics}, expert, options)
    probe = {"before": dict.fromkeys(LOSSES, 1.0), "after": dict.fromkeys(LOSSES, 0.2)}
    if finished:
        write_json(
            folder / runs.SUMMARY,
            {"probe": probe, "exam": exam(), "peak_memory_bytes": 2**30, "best_checkpoint": "3"},
        )
    return folder


def _write(
    folder: Path,
    logs: dict[str, list[dict[str, Any]]],
    expert: str,
    options: dict[str, Any] | None,
) -> None:
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "created": "2026-11-24T10:00:00+00:00",
        "versions": {"mlx-fd": "0.3.0", "mlx": "0.32.4"},
        "backend": {"device": "cpu"},
        "seed": 0,
        "expert": {"name": expert, "sha256": "ab" * 32},
        "student": {"name": "tiny-student", "sha256": "cd" * 32},
        "problems": {"name": "arithmetic", "sha256": "ef" * 32},
        "options": {"stop_threshold": 0.25, "seed": 0, **(options or {})},
    }
    folder.mkdir(parents=True)
    (folder / runs.CHECKPOINTS).mkdir()
    (folder / runs.CONFIG).write_text(to_toml(Config()))
    (folder / runs.MANIFEST).write_text(json.dumps(manifest))
    for name, rows in logs.items():
        lines = [json.dumps(row, ensure_ascii=True) + "\n" for row in rows]
        (folder / name).write_text("".join(lines), encoding="utf-8")


def hostile_run(folder):
    """A run with every kind of harm in every text that a report shows."""
    bad = " ".join(HOSTILE)
    loss = f"lm{HOSTILE[0]}"
    rows = []
    for number in range(3):
        row = episode(number, question=bad, reference=bad, merged=bad, id=f"{number} {bad}")
        row["answer"] = row["final"] = {"text": bad, "final": bad}
        row["expert_feedback"] = {"text": bad, "written_score": 0.5}
        row["student_feedback"] |= {"text": bad + " and more"}
        row["gate"] |= {"reason": bad, "losses_before": {loss: 0.5}}
        rows.append({**row, "revised": bad, "critique": bad, "capped": [bad]})
    rows.append(episode(3, critique="word " * 20_000))
    rows.append(alone(4))
    metrics = []
    for batch in range(2):
        row = metric(batch, frozen=batch == 1, reason=bad)
        for part in (
            row["weights"],
            row["probe"],
            row["stop"]["gains"],
            row["updates"][1]["losses"],
        ):
            part[loss] = 0.5
        metrics.append(row)
    options = {"teacher_cache": bad, bad: bad}
    write_run(folder, rows, metrics, expert=bad, options=options)
    found = evaluation()
    found["target"] = found["sets"][0]["name"] = bad
    for system in found["sets"][0]["systems"]:
        system["label"] += bad
    (folder / "eval" / "fast").mkdir(parents=True)
    text = json.dumps(found)
    (folder / "eval" / "fast" / "eval.json").write_text(text)
    (folder / "pareto.json").write_text(json.dumps(pareto(folder)))
    return folder


def attempt(number: int, **changes: Any) -> dict[str, Any]:
    """A row of ``attempts.jsonl``: wrong, unless ``changes`` say more; two of each problem."""
    question = f"Ann has {number // 2} apples and buys 2. How many has she?"
    row = {
        "attempt": number,
        "id": f"problem-{number // 2:05d}",
        "question": question,
        "reference": str(number // 2 + 2),
        "text": f"Step 1: {number} + 2 = 0\n#### 0",
        "tokens": [5, 6, 7, 8],
        "final": "0",
        "correct": False,
        "finished": True,
        "teacher": f"{question}\n\nYour attempt, mended: 2 is added.",
        "note": f"Step 1: {number} + 2 = mended\n#### mended",
        "wrong": 0,
        "teaches": True,
        "reward": 0.0,
        "group_advantage": None,
        "mean_abs_advantage": 0.5,
        "negative_advantage": 0.25,
        "entropy": 0.125,
        "logprob": -0.5,
        "logprob_gap": 1e-6,
    }
    return {**row, **changes}


def self_metric(batch: int, *, wrong: float | None = None, frozen: bool = False) -> dict[str, Any]:
    """A row of ``metrics.jsonl`` of self-distillation; ``wrong``: on the held-out problems."""
    row = metric(batch, frozen=frozen)
    update = {**row["updates"][0], "losses": {"match": 1 / (batch + 2)}}
    stop = {**row["stop"], "gains": {"wrong": 1 - wrong}} if wrong is not None else None
    del row["trust"], row["expert_tokens"]
    return {
        **row,
        "weights": {},
        "updates": [update],
        "probe": None if wrong is None else {"wrong": wrong},
        "stop": stop,
        "attempts": {
            "n": 4,
            "right": 1,
            "reward": 0.25,
            "teaches": 0.5,
            "finished": 0.75,
            "tokens": 4.0,
            "entropy": 0.125,
            "mean_abs_advantage": 0.5,
            "negative_on_right": None if batch == 1 else 0.25,
            "logprob_gap": 1e-6,
        },
        "clipped": [0.125],
        "prefilled": 20,
        "step_seconds": {"attempt": 1.0, "context": 0.5, "learn": 2.0},
    }


def write_self_run(
    folder: Path,
    attempts: list[dict[str, Any]] | None = None,
    metrics: list[dict[str, Any]] | None = None,
    *,
    finished: bool = True,
    critic: str = "tiny",
    options: dict[str, Any] | None = None,
) -> Path:
    """Write the files of a run of self-distillation, without weights."""
    attempts = [attempt(n) for n in range(12)] if attempts is None else attempts
    if metrics is None:
        metrics = [self_metric(n, wrong=0.5 if n == 1 else None) for n in range(3)]
    method = {
        "method": "step-critique",
        "context": "step-critique",
        "objective": "forward",
        "self_teacher": "base",
        "critic": critic,
        "num_generations": 2,
    }
    logs = {runs.ATTEMPTS: attempts, runs.METRICS: metrics}
    _write(folder, logs, critic, {**method, **(options or {})})
    head = {
        "problems": 40,
        "right": 10,
        "mixed": 5,
        "taught": 30,
        "without": 6,
        "with_context": 24,
    }
    write_json(folder / runs.HEADROOM, head)
    if finished:
        probe = {"before": {"wrong": 0.75}, "after": {"wrong": 0.25}}
        found = {"probe": probe, "peak_memory_bytes": 2**30, "best_checkpoint": "000003"}
        write_json(folder / runs.SUMMARY, found)
    return folder


def hostile_self_run(folder: Path) -> Path:
    """A run of self-distillation with every kind of harm in every text that a report shows."""
    bad = " ".join(HOSTILE)
    loss = f"match{HOSTILE[0]}"
    texts = dict.fromkeys(("question", "reference", "text", "final", "teacher", "note"), bad)
    rows = [attempt(n, **{**texts, "id": f"{n} {bad}"}) for n in range(3)]
    rows.append(attempt(3, note="word " * 20_000))
    metrics = [self_metric(n, wrong=0.5) for n in range(2)]
    for row in metrics:
        row["stop"]["reason"] = bad
        row["stop"]["gains"][loss] = row["updates"][0]["losses"][loss] = 0.5
    options = {"method": bad, "context": bad, "objective": bad, bad: bad}
    return write_self_run(folder, rows, metrics, critic=bad, options=options)


def comparison(text: str = "a name", failure: str | None = "no answer") -> dict[str, Any]:
    """What ``mlx-fd compare`` finds; ``text`` stands wherever somebody else's text may."""
    count = {"agreeing": 30, "n": 40}
    accuracy = {"right": 3, "n": 4, "low": 0.3, "high": 0.95}
    measures = {
        "about": text,
        "quantized": False,
        "tokenisation": {"by": "ids", "equal": 3, "n": 4},
        "greedy": {**count, "diverged": 1, "prompts": 4, "first_divergence": 7},
        "kl": {"mean": 0.002, "worst": 0.5, "n": 40, "tokens": 64.0},
        "top1": count,
        "clear": count,
        "perplexity": {"engine": 1.5, "reference": 1.25, "known": 40, "n": 40},
        "roles": {
            role: {"kl": {"mean": mean, "worst": 0.5, "n": n}, "top1": {"agreeing": n, "n": n}}
            for role, mean, n in (("answer", 0.004, 20), (text, 0.001, 20), ("merge", None, 0))
        },
        "accuracy": {"engine": accuracy, "reference": accuracy, "same_answer": 3},
        "speed": {"prefill": 1234.5, "decode": 56.7, "first_token": 0.0123, "n": 3},
        "peak_memory": 2**28,
        "missing": {text: text},
    }

    # A folder's name cannot hold the first two, and what is before the third is not shown.
    folder = text.replace("\x00", "").replace("\ud800", "").replace("/", "")

    def row(found: dict[str, Any] | None, *reasons: str) -> dict[str, Any]:
        return {
            "engine": text,
            "target": f"http://{text}",
            "export": folder,
            "weights": "float",
            "tolerance": {"mean_kl": 0.001, "top1": 0.99},
            "parity": not reasons,
            "reasons": list(reasons),
            "measures": found,
        }

    rows = [row(measures), row(measures, text)]
    rows += [row(None, failure)] if failure else []
    bundle = {"prompts": 4, "positions": 40, "items": 4}
    bundle |= {"reference": {text: text}, "versions": {"mlx": text}, "source": {"kind": text}}
    return {"parity": False, "rows": rows, "bundles": {text: bundle}, "versions": {}}


def scored(
    problem: Problem,
    parts: list[str],
    values: list[float] | None,
    text: str = "x",
    pieces: tuple[str, ...] | None = None,
) -> Scored:
    """An attempt with an advantage for each token, by the context ``reference``."""
    attempt = Attempt(problem, problem.question, (), text, None, RIGHT in parts)
    pieces = pieces or tuple(f"t{k}" for k in range(len(parts)))
    return Scored(attempt, pieces, tuple(parts), {"reference": tuple(values)} if values else {})


def advantages(text: str = "3 + 4 = 8") -> list[Scored]:
    """A wrong attempt with tokens of every shade, and a right one."""
    values = [6.0, 3.0, 1.0, 0.2, 0.0, -0.2, -1.0, -3.0, -6.0, 0.0]
    parts = [BEFORE] * 5 + [IN] * 4 + [AFTER]
    solution = "Step 1: <<3+4=7>>7\n#### 7"
    one, two = (Problem(f"{n} {text}", text, solution, "7") for n in range(2))
    return [
        scored(one, parts, values, text, tuple(f"{text} " for _ in parts)),
        scored(two, [RIGHT] * 3, [0.5, -0.5, 0.0], text, ("right ", text, "\n")),
    ]


def advantage_page(text: str) -> str:
    """The page of ``mlx-fd advantage`` on these."""
    found = advantages(text)
    return make_advantage_page(text, [summarise(found, "reference")], found)
