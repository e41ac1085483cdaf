"""Which problems fit into the context of the models that read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mlx_fd.config import Config
from mlx_fd.errors import UserError
from mlx_fd.models.pairing import read_tokenizer
from mlx_fd.models.storage import read_json
from mlx_fd.problems import ProblemSet
from mlx_fd.problems.prompts import answer_prompt, feedback_prompt

# What a chat template adds to a question, an answer and a request for feedback: role names,
# turn ends, the system prompt of some.
_TEMPLATE = 64


def context_length(path: Path) -> int | None:
    """Tokens that a model was made to read at most; ``None`` where its config.json does not say."""
    value = read_json(path / "config.json").get("max_position_embeddings")
    return value if type(value) is int and value > 0 else None


def too_long(
    texts: Sequence[str], path: Path, prompts: str, written: int, option: str
) -> dict[int, int]:
    """Which texts a model cannot read together with what stands around them.

    Args:
        texts: the texts.
        path: the model's directory.
        prompts: all other text of the conversation.
        written: most tokens that models write in it.
        option: the command line's for that; empty: it has none.

    Returns:
        Place of each text that does not fit -> its tokens.

    Raises:
        UserError: not even an empty text fits.
    """
    context = context_length(path)
    if context is None:
        return {}
    room = context - written - _TEMPLATE
    # No token is shorter than a byte, so the tokenizer is needed for long texts only.
    if room >= len(prompts.encode()) + max((len(text.encode()) for text in texts), default=0):
        return {}
    tokenizer = read_tokenizer(path)
    room -= len(tokenizer.encode(prompts).ids)
    if room <= 0:
        advice = f"; take a smaller {option}" if option else ""
        raise UserError(
            f"{path}: the model's context is {context} tokens, and up to {written} are to be "
            f"written in it, which leaves no room for a problem{advice}"
        )
    counts = {
        place: len(tokenizer.encode(text, add_special_tokens=False).ids)
        for place, text in enumerate(texts)
        if len(text.encode()) > room
    }
    return {place: count for place, count in counts.items() if count > room}


def fitting(
    found: ProblemSet,
    paths: Sequence[Path],
    config: Config,
    *,
    skip: bool,
    with_solutions: bool = False,
    option: str = "--max-answer-tokens",
) -> tuple[ProblemSet, tuple[str, ...]]:
    """The problems that every model can read, with an answer to each and feedback on it.

    A model that reads beyond its context writes nonsense, from which nobody should learn.

    Args:
        found: problems.
        paths: the models' directories.
        config: how much is written.
        skip: leave the others out instead of refusing them.
        with_solutions: a problem's reference solution, or something about as long, is read with it.
        option: as for :func:`too_long`.

    Returns:
        The problems, and what to tell the user of those that were left out.

    Raises:
        UserError: problems are too long, and not to be left out, or all are.
    """
    options = config.generation
    if config.self_distils:
        prompts, written = answer_prompt(""), options.max_answer_tokens
    else:
        prompts = answer_prompt("") + feedback_prompt()
        written = options.max_answer_tokens + max(
            options.max_feedback_tokens, options.max_merge_tokens
        )
    texts = [problem.question for problem in found.problems]
    if with_solutions:
        texts = [f"{problem.question}\n{problem.solution}" for problem in found.problems]
    places, notes = short_enough(
        *(found.name, [problem.id for problem in found.problems], texts, paths, prompts, written),
        skip=skip,
        option=option,
    )
    kept = tuple(found.problems[place] for place in places)
    return dataclasses.replace(found, problems=kept), notes


def short_enough(
    name: str,
    ids: Sequence[str],
    texts: Sequence[str],
    paths: Sequence[Path],
    prompts: str,
    written: int,
    *,
    skip: bool,
    option: str,
) -> tuple[list[int], tuple[str, ...]]:
    """Places of the texts that every model can read, and what to tell the user of the others.

    Args:
        name: where the texts are from.
        ids: what each is called.
        texts: the texts.
        paths: the models' directories.
        prompts: as for :func:`too_long`.
        written: as for :func:`too_long`.
        skip: leave texts out that are too long, instead of refusing them.
        option: as for :func:`too_long`.

    Raises:
        UserError: texts are too long, and not to be left out, or all are.
    """
    places, notes = list(range(len(texts))), []
    for path in dict.fromkeys(paths):
        counts = too_long([texts[place] for place in places], path, prompts, written, option)
        if not counts:
            continue
        worst = max(counts, key=lambda number: counts[number])
        text = (
            f"{name}: {len(counts)} of {len(places)} problems are too long for {path}, whose "
            f"context is {context_length(path)} tokens, with up to {written} to be written: the "
            f"longest, {ids[places[worst]]}, has {counts[worst]}"
        )
        if not skip:
            advice = f" take a smaller {option}," if option else ""
            raise UserError(f"{text}. Shorten them,{advice} or skip them with --skip-bad-rows")
        places = [place for number, place in enumerate(places) if number not in counts]
        notes.append(f"{text}; they are left out")
        if not places:
            raise UserError(f"{text}. None is left")
    return places, tuple(notes)
