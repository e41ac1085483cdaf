"""What lm-evaluation-harness reads as the answer of GSM8K, by its two filters."""

from __future__ import annotations

import re

from mlx_fd.problems.parsing.characters import last_match

INVALID = "[invalid]"
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
FULL_STOP = re.compile(r"\.$")


def lm_eval_answer(text: str, filter: str) -> str:
    """What lm-evaluation-harness takes from a GSM8K response (task ``gsm8k``, version 3).

    Args:
        text: the response.
        filter: ``"strict"`` (its ``strict-match``: first match) or ``"flexible"`` (its
            ``flexible-extract``: last match).

    Returns:
        The extracted text as it stands there, ``"[invalid]"`` where there is none.
    """
    if filter == "strict":
        first = _STRICT.search(text)
        return first[1].strip() if first else INVALID
    if filter != "flexible":
        raise ValueError(f"filter must be 'strict' or 'flexible', not {filter!r}")
    last = last_match(_FLEXIBLE, text)
    return last[0].strip() if last else INVALID


def _lm_eval_normal(text: str) -> str:
    text = text.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return FULL_STOP.sub("", text).lower()


def lm_eval_match(text: str, gold_text: str, filter: str) -> bool:
    """Whether lm-evaluation-harness counts a response right: a comparison of *strings*.

    So ``18.00`` does not match a gold ``18``; :func:`same_answer` compares values.

    Args:
        text: the response.
        gold_text: the solution of the data set, ending in ``#### n``.
        filter: ``"strict"`` or ``"flexible"``.
    """
    return _lm_eval_normal(lm_eval_answer(text, filter)) == _lm_eval_normal(gold_text)


def lm_eval_readable(gold_text: str, filter: str) -> bool:
    """Whether a reply can match a gold answer by a filter: not one with a unit, ``%`` or ``/``.

    Args:
        gold_text: as for :func:`lm_eval_match`.
        filter: likewise.
    """
    return lm_eval_match(f"#### {_lm_eval_normal(gold_text)}", gold_text, filter)
