"""GSM8K as published (Cobbe et al., arXiv 2110.14168), compressed in the package.

The licence (MIT) is beside the data.
"""

from __future__ import annotations

import difflib
import functools
import gzip
import hashlib
import json
from fractions import Fraction
from importlib import resources

from mlx_fd.errors import UserError
from mlx_fd.problems import Problem, ProblemSet
from mlx_fd.problems.sources import ProblemSource, register_source

SPLITS = ("train", "test")


@functools.cache
def load(split: str) -> ProblemSet:
    """The 7,473 problems of ``train`` or the 1,319 of ``test``.

    Raises:
        UserError: GSM8K has no such split.
    """
    if split not in SPLITS:
        near = difflib.get_close_matches(split.lower(), SPLITS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"gsm8k has no split {split!r}, only 'train' and 'test'{hint}")
    packed = resources.files("mlx_fd.problems").joinpath("data", f"gsm8k-{split}.jsonl.gz")
    published = gzip.decompress(packed.read_bytes())
    problems = []
    for place, line in enumerate(published.decode().splitlines()):
        row = json.loads(line)
        final = row["answer"].rpartition("#### ")[2].replace(",", "")
        name = f"gsm8k-{split}-{place:05d}"
        problems.append(
            Problem(name, row["question"], row["answer"], str(Fraction(final)), published=final)
        )
    return ProblemSet("gsm8k", split, tuple(problems), hashlib.sha256(published).hexdigest())


register_source(
    ProblemSource(
        name="gsm8k",
        help="grade-school word problems as published, 7,473 to train and 1,319 to test",
        order=10,
        load=load,
    )
)
