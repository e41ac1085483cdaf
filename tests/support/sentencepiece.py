"""A small tokenizer as transformers makes it of a SentencePiece model."""

from __future__ import annotations

from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers.convert_slow_tokenizer import generate_merges

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
TURNS = ("<start_of_turn>", "<end_of_turn>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) }}"
    "{{ '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_TEXT = [
    "Tom has 3 apples and buys 5 more apples. How many apples does Tom have now?",
    "The answer is 8. First add 3 and 5, then check that the sum is right.",
    "Step 1 should be 3 * 4 = 12, it is 3 * 4 = 12: right. Every step is right.",
    "Score: 1.0 Mia has 12 apples. Then she buys 3 bags with 4 apples each.",
    "Judge the answer of the student and give feedback.  Two  spaces.",
] * 3


def make_sentencepiece(*, prefix: bool = False, size: int = 480) -> Tokenizer:
    """Pieces with scores of their own, and all merges that transformers makes of them.

    Args:
        prefix: a text begins with a space (Llama 2, Mistral) or not (Gemma).
        size: most tokens.
    """
    marked = [f"▁{text.replace(' ', '▁')}" for text in _TEXT]
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    room = size - len(SPECIAL) - len(TURNS) - 256
    learned.train_from_iterator(marked, trainers.BpeTrainer(vocab_size=room, show_progress=False))
    found = sorted(learned.get_vocab().items(), key=lambda item: item[1])
    # Characters last, as in SentencePiece's models.
    pieces = [piece for piece, _ in found if len(piece) > 1]
    pieces += [piece for piece, _ in found if len(piece) == 1]
    order = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *TURNS, *pieces]
    vocabulary = {piece: number for number, piece in enumerate(order)}
    scores = {piece: -float(number) for number, piece in enumerate(pieces)}
    merges: Any = generate_merges(scores, list(scores.items()))
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    replace = normalizers.Replace(" ", "▁")
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.normalizer = replace
    if prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in (*SPECIAL, *TURNS)])
    return tokenizer
