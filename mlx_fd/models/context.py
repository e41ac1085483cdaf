"""Which problems fit into the context of the models that read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_fd.config import Config
from mlx_fd.errors import UserError
from mlx_fd.models.directory import CONFIG
from mlx_fd.models.published_config import (
    ignored_window,
    language_part,
    read_config,
    short_text_length,
    text_config,
)
from mlx_fd.models.tokenizer import open_template
from mlx_fd.models.tokenizer_file import read_tokenizer
from mlx_fd.problems import ProblemSet
from mlx_fd.problems.prompts import answer_prompt, feedback_prompt

# What a chat template adds to a question, an answer and a request for feedback, at least: role
# names, turn ends. The system prompt of some is longer, and is counted where it may matter.
TEMPLATE_TOKENS = 64
_LONG_TEMPLATE = 512
_LENGTH = "max_position_embeddings"
# What architectures of other makers call it. GPT-2's table of positions has n_positions rows.
_SYNONYMS = (
    *("n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "max_context_length"),
    *("seq_length", "model_max_length"),
)


def context_length(path: Path) -> int | None:
    """Tokens that a model was made to read at most; ``None`` where its config.json does not say.

    Where several entries say it, the least counts. No more than the window of its layers, where
    mlx-lm lets them read beyond it; and no more than longrope's factors for short texts are for.
    """
    config, file = read_config(path), path / CONFIG
    said = [language_part(config).get(name) for name in _SYNONYMS]
    length = text_config(config, file).get(_LENGTH)
    limits = (length, *said, ignored_window(config, file), short_text_length(config))
    return min((one for one in limits if type(one) is int and one > 0), default=None)


@dataclass(frozen=True)
class Surroundings:
    """What a conversation holds beside a problem.

    Attributes:
        prompts: all other text that models read in it.
        max_tokens: the most that models write in it.
        option: the command line's option for that; empty: it has none.
    """

    prompts: str
    max_tokens: int
    option: str = ""


def too_long(texts: Sequence[str], path: Path, around: Surroundings) -> dict[int, int]:
    """Which texts a model cannot read together with what stands around them.

    Args:
        texts: problems, each alone in its conversation.
        path: the model's directory.
        around: the rest of the conversation.

    Returns:
        Index of each text that does not fit -> its tokens.

    Raises:
        UserError: not even an empty text fits.
    """
    context = context_length(path)
    if context is None:
        return {}
    room = context - around.max_tokens
    # No token is shorter than a byte, so the tokenizer is needed for long texts only.
    longest = max((len(text.encode()) for text in texts), default=0)
    if room >= _LONG_TEMPLATE + len(around.prompts.encode()) + longest:
        return {}
    tokenizer = read_tokenizer(path)
    room -= len(tokenizer.encode(around.prompts).ids)
    chat = open_template(path).render(["?", "?", "?"]) if room > TEMPLATE_TOKENS else ""
    room -= max(TEMPLATE_TOKENS, len(tokenizer.encode(chat, add_special_tokens=False).ids))
    if room <= 0:
        advice = f"; take a smaller {around.option}" if around.option else ""
        raise UserError(
            f"{path}: the model's context is {context} tokens, and up to {around.max_tokens} are "
            f"to be written in it, which leaves no room for a problem{advice}"
        )
    counts = {
        index: len(tokenizer.encode(text, add_special_tokens=False).ids)
        for index, text in enumerate(texts)
        if len(text.encode()) > room
    }
    return {index: count for index, count in counts.items() if count > room}


def fitting(
    problem_set: ProblemSet,
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
        problem_set: what a source gave.
        paths: the models' directories.
        config: the most tokens of answers and feedback.
        skip: leave the others out instead of refusing them.
        with_solutions: a problem's reference solution, or something about as long, is read with it.
        option: as in :class:`Surroundings`.

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
    written += options.thought_tokens  # those of earlier turns are not read again
    texts = [problem.question for problem in problem_set.problems]
    if with_solutions:
        texts = [f"{problem.question}\n{problem.solution}" for problem in problem_set.problems]
    ids = [problem.id for problem in problem_set.problems]
    around = Surroundings(prompts, written, option)
    indices, notes = short_enough(problem_set.name, ids, texts, paths, around, skip=skip)
    kept = tuple(problem_set.problems[index] for index in indices)
    return dataclasses.replace(problem_set, problems=kept), notes


def short_enough(
    name: str,
    ids: Sequence[str],
    texts: Sequence[str],
    paths: Sequence[Path],
    around: Surroundings,
    *,
    skip: bool,
) -> tuple[list[int], tuple[str, ...]]:
    """Indices of the texts that every model can read, and what to tell the user of the others.

    Args:
        name: where the texts are from.
        ids: what each is called.
        texts: problems, each alone in its conversation.
        paths: the models' directories.
        around: the rest of the conversation.
        skip: leave texts out that are too long, instead of refusing them.

    Raises:
        UserError: texts are too long, and not to be left out, or all are.
    """
    indices, notes = list(range(len(texts))), []
    for path in dict.fromkeys(paths):
        counts = too_long([texts[index] for index in indices], path, around)
        if not counts:
            continue
        worst = max(counts, key=lambda number: counts[number])
        text = (
            f"{name}: {len(counts)} of {len(indices)} problems are too long for {path}, whose "
            f"context is {context_length(path)} tokens, with up to {around.max_tokens} to be "
            f"written: the longest, {ids[indices[worst]]}, has {counts[worst]}"
        )
        if not skip:
            advice = f" take a smaller {around.option}," if around.option else ""
            raise UserError(f"{text}. Shorten them,{advice} or skip them with --skip-bad-rows")
        indices = [index for number, index in enumerate(indices) if number not in counts]
        notes.append(f"{text}; they are left out")
        if not indices:
            raise UserError(f"{text}. None is left")
    return indices, tuple(notes)
