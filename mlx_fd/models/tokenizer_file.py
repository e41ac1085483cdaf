"""tokenizer.json by itself, and the texts that show whether two tokenizers split alike."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_fd.errors import UserError
from mlx_fd.models.directory import AGAIN, blaming

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Digits, spaces, contractions, accents, several scripts, markup: where splitting rules differ.
PROBES = (
    "Natalia sold clips to 48 of her friends in April.",
    "12345 + 67.5 = 12412.5, that's 3/4 of 100%",
    "  two spaces,\ttab\n\n\nthree lines\r\nand more  ",
    "I'll say they've DON'T we'd",
    "na\u00efve caf\u00e9 e\u0301 \u00dcn\u00efc\u00f6de \u2014 \u201cquotes\u201d",
    "\u65e5\u672c\u8a9e \u4e2d\u6587 \u0420\u0443\u0441\u0441\u043a\u0438\u0439 \u0663\u0664",
    "\U0001f642\U0001f44d\U0001f3fd x_y = [i**2 for i in range(10)]",
    "First add 3 and 5.\n\nThen (2+3)\n= 5, of 1234567",
    "<|im_start|>user\nhi<|im_end|>\n#### 42",
)
PLAIN_PROBES = tuple(unicodedata.normalize("NFC", text) for text in PROBES if "<|" not in text)
"""Those without added tokens, in Unicode's composed form."""


def read_tokenizer(path: Path) -> Tokenizer:
    """A model's tokenizer, without its chat template; it gives all tokens of a text and no more.

    Raises:
        UserError: there is no tokenizer.json, or none that can be read.
    """
    from tokenizers import Tokenizer

    file = path / "tokenizer.json"
    if not file.exists():
        raise UserError(f"{path} has no tokenizer.json, which is needed to compare tokenizers")
    if not file.is_file():  # opening a FIFO would wait for ever
        raise UserError(f"{file}: is not a regular file")
    with blaming(f"{file} cannot be read", AGAIN):
        tokenizer = Tokenizer.from_file(str(file))
    # Whoever fine-tuned the model may have left theirs on; transformers takes no notice of them.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
