"""What is measured when an engine is held against a bundle. Pure arithmetic, and one loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_fd.errors import UserError
from mlx_fd.export.bundle import ROLES, Bundle, Item, Prompt
from mlx_fd.export.engines import TIMED_ROLE, Continuation, Engine
from mlx_fd.problems import Problem
from mlx_fd.problems.kinds import is_right, known, read_final
from mlx_fd.runs.summary import wilson

# Below what is left of 1 after 64 float32 log-probabilities are taken from it.
_TAIL_FLOOR = 1e-7
_WARM_UP = 2  # tokens
NEAR_TIE = 0.1  # nats between the reference's two likeliest tokens; rounding may swap them

Measures = dict[str, Any]


def coarse_kl(
    reference: NDArray[np.floating[Any]], engine: NDArray[np.floating[Any]]
) -> NDArray[np.float64]:
    """KL(reference || engine) in nats, where only some tokens' log-probabilities are known.

    The tokens known on both sides stay apart, all others are one outcome: the tail, with what is
    left of the mass. By the data-processing inequality this is never above the divergence over
    the whole vocabulary.

    Args:
        reference: [P, K] log-probabilities.
        engine: [P, K] those of the same tokens; NaN where unknown.

    Returns:
        [P]; NaN where no token is known, infinity where it is above the largest float64.
    """
    given = ~np.isnan(engine)
    log_p = np.where(given, reference, 0.0).astype(np.float64)
    log_q = np.where(given, engine, 0.0).astype(np.float64)
    p, q = np.exp(log_p) * given, np.exp(log_q) * given
    tail_p = np.maximum(1 - p.sum(-1), _TAIL_FLOOR)
    tail_q = np.maximum(1 - q.sum(-1), _TAIL_FLOOR)
    with np.errstate(over="ignore"):
        divergence = (p * (log_p - log_q)).sum(-1) + tail_p * np.log(tail_p / tail_q)
    # Rounding alone can make it a little less than nothing.
    return np.where(given.any(-1), np.maximum(divergence, 0.0), np.nan)


def _finite(value: float) -> float | None:
    """A number as JSON has it, which knows no infinity."""
    return float(value) if np.isfinite(value) else None


def _perplexity(logprobs: NDArray[np.floating[Any]]) -> float | None:
    if not len(logprobs) or np.isnan(logprobs).any():
        return None
    with np.errstate(over="ignore"):
        return _finite(np.exp(-logprobs.astype(np.float64).mean()))


def _tokenisation(engine: Engine, prompts: Sequence[Prompt]) -> Measures:
    counts = [engine.count(prompt) for prompt in prompts]
    compared = [equal for equal, _ in counts if equal is not None]
    return {"equal": sum(compared), "n": len(compared), "by": counts[0][1]}


def _parity(prompts: Sequence[Prompt], followed: Sequence[Continuation]) -> Measures:
    """Everything but the timings, over some of the prompts."""
    pairs = list(zip(prompts, followed, strict=True))
    kl = np.concatenate([coarse_kl(p.top_logprobs[f.rows], f.logprobs) for p, f in pairs])
    kl = kl[~np.isnan(kl)]
    shared = np.concatenate([(~np.isnan(f.logprobs)).sum(-1) for _, f in pairs])
    top = np.concatenate([f.top for _, f in pairs])
    margin = np.concatenate(
        [(p.top_logprobs[:, 0] - p.top_logprobs[:, 1])[f.rows] for p, f in pairs]
    )
    clear = margin >= NEAR_TIE
    # Rows of the continuation: those that predict a token after the prompt's last.
    aligned = [(p, f, f.rows + p.begin >= len(p.tokens) - 1) for p, f in pairs]
    engine = np.concatenate([f.next_logprobs[after_prompt] for _, f, after_prompt in aligned])
    reference = np.concatenate(
        [p.next_logprobs[f.rows[after_prompt]] for p, f, after_prompt in aligned]
    )
    broken = [f.agreed + 1 for p, f in pairs if f.agreed < len(p.greedy)]
    with np.errstate(over="ignore"):
        mean = kl.mean() if len(kl) else np.nan
    return {
        "greedy": {
            "agreeing": sum(f.agreed for f in followed),
            "n": sum(len(p.greedy) for p in prompts),
            "diverged": len(broken),
            "prompts": len(pairs),
            "first_divergence": min(broken, default=None),
        },
        "kl": {
            "mean": _finite(mean),
            "worst": _finite(kl.max(initial=-np.inf)),
            "n": len(kl),
            "tokens": float(shared[shared > 0].mean()) if len(kl) else 0.0,
        },
        "top1": {"agreeing": int(top.sum()), "n": len(top)},
        "clear": {"agreeing": int(top[clear].sum()), "n": int(clear.sum())},
        "perplexity": {
            "engine": _perplexity(engine),
            "reference": _perplexity(reference),
            "known": int((~np.isnan(engine)).sum()),
            "n": len(engine),
        },
    }


def _speed(followed: Sequence[Continuation]) -> Measures:
    timings = [f.timing for f in followed if f.timing is not None]
    decoded = [(t.written - 1) / t.rest for t in timings if t.written > 1 and t.rest > 0]

    def median(values: Sequence[float]) -> float | None:
        return float(np.median(values)) if values else None

    return {
        "prefill": median([t.prompt / t.first for t in timings if t.first > 0]),
        "decode": median(decoded),
        "first_token": median([t.first for t in timings]),
        "n": len(timings),
    }


def _accuracy(rights: Sequence[bool]) -> Measures:
    right, n = sum(rights), len(rights)
    low, high = wilson(right, n)
    return {"right": right, "n": n, "low": low, "high": high}


def _answers(
    engine: Engine, bundle: Bundle, problems: Sequence[Problem | Item], did: Callable[[], None]
) -> Measures:
    in_bundle = {item.id: item for item in bundle.items}
    rights: list[bool | None] = []
    reference_right: list[bool | None] = []
    same = 0
    for asked in problems:
        problem = asked.problem if isinstance(asked, Item) else asked
        text = engine.answer(
            bundle.before + problem.question.strip() + bundle.after, bundle.max_answer_tokens
        )
        final = read_final(text, problem)
        rights.append(is_right(final, problem))
        item = in_bundle.get(problem.id)
        if item is not None and item.question == problem.question.strip():
            reference_right.append(item.right)
            same += item.right is not None and final == item.final
        did()
    return {
        "engine": _accuracy(known(rights)),
        "reference": _accuracy(known(reference_right)),
        "same_answer": same,
    }


def measure(
    engine: Engine,
    bundle: Bundle,
    problems: Sequence[Problem | Item],
    progress: Callable[[int, int], None],
) -> Measures:
    """Run a bundle on an engine.

    Args:
        engine: open, with the exported model in it.
        bundle: the reference's outputs.
        problems: problems to be answered; the bundle's have the reference's answers beside them.
        progress: called with the prompts and problems done, and their number.

    Returns:
        JSON values; a measure that the engine cannot give is ``None``, and ``missing`` says why.
        A divergence or a perplexity that is not finite is ``None`` too, and not among them.

    Raises:
        UserError: the engine cannot go on.
    """
    done, total = 0, len(bundle.prompts) + len(problems)
    progress(0, total)

    def did() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    # What is compiled or loaded at the first call shall not be timed.
    engine.answer(bundle.prompts[0].text, _WARM_UP)
    # The timed ones first: a server keeps what it has read, and would not read it again.
    order = sorted(
        range(len(bundle.prompts)), key=lambda index: bundle.prompts[index].role != TIMED_ROLE
    )
    followed: dict[int, Continuation] = {}
    for index in order:
        followed[index] = engine.score_continuation(bundle.prompts[index])
        did()
    in_order = [followed[index] for index in range(len(bundle.prompts))]

    def some(role: str) -> Measures:
        chosen = [index for index, prompt in enumerate(bundle.prompts) if prompt.role == role]
        return _parity([bundle.prompts[p] for p in chosen], [followed[p] for p in chosen])

    timed = [followed[p] for p in order if bundle.prompts[p].role == TIMED_ROLE]
    if not any(len(f.rows) or f.agreed for f in in_order):
        raise UserError(f"{engine.about} gave nothing that could be compared")
    parity = _parity(bundle.prompts, in_order)
    perplexity = parity["perplexity"]
    if perplexity["known"] < perplexity["n"] or not perplexity["n"]:
        engine.missing["perplexity"] = "not every token of the continuations comes with a number"
    return {
        "about": engine.about,
        "quantized": engine.quantized,
        "tokenisation": _tokenisation(engine, bundle.prompts),
        **parity,
        "roles": {
            role: some(role) for role in ROLES if any(p.role == role for p in bundle.prompts)
        },
        "accuracy": _answers(engine, bundle, problems, did) if problems else None,
        "speed": _speed(timed),
        "peak_memory": engine.peak_memory(),
        "missing": engine.missing,
    }
