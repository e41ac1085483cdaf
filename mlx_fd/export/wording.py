"""A comparison's rows in words, and as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_fd.export.measures import NEAR_TIE

_NOTHING = "n/a"


def _share(count: Mapping[str, Any], key: str) -> str:
    return f"{count[key] / count['n']:.1%} of {count['n']}" if count["n"] else _NOTHING


def _number(value: float | None, form: str) -> str:
    return _NOTHING if value is None else format(value, form)


def heading(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row's engine, its export and, where that is not the same, what the engine opened."""
    target, export = row["target"], row["export"]
    opened = () if target == export else (target.partition("://")[2] or Path(target).name,)
    return row["engine"], Path(export).resolve().name, *opened


def measured(row: Mapping[str, Any]) -> dict[str, str]:
    """What was measured, in words; empty where the engine failed."""
    measures = row["measures"]
    if measures is None:
        return {}
    tokens, greedy, kl = measures["tokenisation"], measures["greedy"], measures["kl"]
    speed, memory, accuracy = measures["speed"], measures["peak_memory"], measures["accuracy"]
    counted = " counted" if tokens["by"] == "counts" else ""
    lines = {
        "prompts, same tokens": (
            f"{tokens['equal']} of {tokens['n']}{counted}" if tokens["n"] else _NOTHING
        ),
        "greedy tokens agreeing": _share(greedy, "agreeing"),
        "continuations diverging": f"{greedy['diverged']} of {greedy['prompts']}",
        "first divergence at token": str(greedy["first_divergence"] or "none"),
        "mean KL, nats": _number(kl["mean"], ".2g"),
        "worst KL, nats": _number(kl["worst"], ".2g"),
        "same top-1 token": _share(measures["top1"], "agreeing"),
        "same, near ties excluded": _share(measures["clear"], "agreeing"),
        "perplexity": _number(measures["perplexity"]["engine"], ".4f"),
        "perplexity, reference": _number(measures["perplexity"]["reference"], ".4f"),
    }
    if accuracy:
        for who, name in (("engine", "problems right"), ("reference", "problems right, reference")):
            count = accuracy[who]
            lines[name] = f"{count['right']} of {count['n']}" if count["n"] else _NOTHING
            if count["n"]:
                lines[f"{name}, 95 %"] = f"{count['low']:.0%} to {count['high']:.0%}"
        if n := accuracy["reference"]["n"]:
            lines["answers equal to reference"] = f"{accuracy['same_answer']} of {n}"
    return lines | {
        "prefill, tokens/s": _number(speed["prefill"], ",.1f"),
        "decode, tokens/s": _number(speed["decode"], ",.1f"),
        "time to first token, s": _number(speed["first_token"], ".3g"),
        "peak memory, MiB": _number(None if memory is None else memory / 2**20, ",.0f"),
    }


def notes(row: Mapping[str, Any]) -> list[str]:
    """How a row's numbers came about, and what is not among them."""
    measures = row["measures"]
    if measures is None:
        return []
    kl, tolerance = measures["kl"], row["tolerance"]
    lines = [f"ran on {measures['about']}"]
    if kl["n"]:
        lines.append(
            f"KL over {kl['n']} positions, from {kl['tokens']:.0f} of the reference's top tokens "
            "and the tail"
        )
    lines.append(
        f"tolerance for {row['weights']} weights: same tokens, mean KL at most "
        f"{tolerance['mean_kl']:g}, same top-1 token at {tolerance['top1']:.0%} or more, near ties "
        f"(within {NEAR_TIE:g} nats) excluded"
    )
    return lines + [f"{what}: n/a, {why}" for what, why in measures["missing"].items()]


def verdict(row: Mapping[str, Any]) -> str:
    """The verdict with its reasons."""
    if row["parity"]:
        return "the same model"
    failed = "NOT the same" if row["measures"] else "could not be compared"
    return f"{failed}: {'; '.join(row['reasons'])}"
