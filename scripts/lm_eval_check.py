"""Does lm-evaluation-harness count what `mlx-fd eval` counts? The same prompts through both.

python scripts/lm_eval_check.py STUDENT --problems gsm8k --limit 20

STUDENT is a model directory such as `mlx-fd export RUN --out STUDENT` writes. Theirs runs through
mlx-lm's own wrapper, with the filters and the metric of their task gsm8k. It needs
`pip install "lm-eval>=0.4.13"`, which brings no torch. Exits with 1 where an answer is counted
differently.
"""

# ruff: noqa: E402
import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from mlx_fd.models.backend import backend

backend()

import yaml

from mlx_fd import problems
from mlx_fd.evaluation import running, suites
from mlx_fd.evaluation.cache import Cache
from mlx_fd.evaluation.target import open_target
from mlx_fd.models.resolve import resolve
from mlx_fd.problems import Problem, prompts

Row = dict[str, Any]

NAMES = {"strict-match": "strict", "flexible-extract": "flexible"}


def theirs(model: str, found: Sequence[Problem], tokens: int, folder: Path) -> list[Row]:
    """What lm-evaluation-harness counts: for each problem, each filter's match and the response."""
    import lm_eval
    from lm_eval.tasks import TaskManager
    from mlx_lm.evaluate import MLXLM

    data = folder / "problems.jsonl"
    rows = [{"question": p.question, "answer": p.solution} for p in found]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    published = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
    task = {
        **yaml.safe_load(published.read_text(encoding="utf-8")),
        "task": "mlx_fd_problems",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "training_split": None,
        "fewshot_split": None,
        "num_fewshot": 0,
        "doc_to_text": prompts.answer_prompt("{{question}}"),
    }
    task.pop("tag", None)
    lm = MLXLM(str(resolve(model)), max_tokens=tokens)
    results = lm_eval.simple_evaluate(
        lm,
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    by_problem: dict[int, Row] = {}
    for sample in results["samples"]["mlx_fd_problems"]:
        row = by_problem.setdefault(sample["doc_id"], {"text": sample["resps"][0][0]})
        row[NAMES[sample["filter"]]] = bool(sample["exact_match"])
    return [by_problem[place] for place in range(len(found))]


def ours(model: str, source: str, split: str, limit: int, folder: Path) -> list[Row]:
    """What mlx-fd counts; rows of its outputs.jsonl."""
    options = suites.Options(problems=source, split=split, limit=limit)
    target = open_target(model, None)
    sets = suites.make_sets(target, options)[:1]
    bench = running.make_bench(target, options, Cache(folder / "cache"), lambda *_: None)
    running.evaluate(bench, sets, options, folder, lambda _: None)
    lines = (folder / running.OUTPUTS).read_text(encoding="utf-8").splitlines()
    return [{**row, "text": row["turns"]["answer"]} for row in map(json.loads, lines)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--problems", default="gsm8k")
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, default=20)
    args = parser.parse_args()
    found = problems.load(args.problems, args.split).problems[: args.limit]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        own = ours(args.model, args.problems, args.split, args.limit, folder)
        tokens = open_target(args.model, None).config.generation.max_answer_tokens
        other = theirs(args.model, list(found), tokens, folder)
    pairs = list(zip(own, other, strict=True))
    same_text = sum(a["text"] == b["text"].strip() for a, b in pairs)
    print(f"{len(pairs)} problems, the same text in {same_text}")
    different = 0
    for name in NAMES.values():
        right = [sum(row[name] for row in rows) for rows in (own, other)]
        different += sum(a[name] != b[name] for a, b in pairs)
        print(f"{name}: {right[0]} right by mlx-fd, {right[1]} by lm-evaluation-harness")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
