"""How toxic texts are, in the judgement of a classifier; which one, the result always says.

Such classifiers go much by single words: a quoted slur scores high, a polite cruelty low. They are
for comparing systems on the same prompts with the same judge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from mlx_fd.errors import UserError

_LABELS = ("toxic", "toxicity", "hate", "hateful", "offensive", "abusive")


@dataclass(frozen=True)
class Toxicity:
    """What a classifier finds in texts.

    Attributes:
        values: a probability in [0, 1] for each text.
        judge: which classifier it was, with its version or the fingerprint of its weights.
        measures: what the numbers are the probability of.
    """

    values: tuple[float, ...]
    judge: str
    measures: str


Judge = Callable[[Sequence[str]], Toxicity]


def load_judge(name: str | None = None) -> Judge:
    """A classifier of toxic texts.

    Args:
        name: a BERT with a sequence-classification head, which runs in MLX: a directory, or a name
            on the hub (``unitary/toxic-bert`` is Detoxify's "original"). ``None``: the small
            scikit-learn model of the extra ``toxicity``. That one is a **pickle** inside the
            package alt-profanity-check, which runs code when it is read: nothing but the extra
            brings it, and no other file is ever read that way.

    Returns:
        A function from texts to their :class:`Toxicity`.

    Raises:
        UserError: there is no such model, it is no BERT classifier, none of its labels is
            called toxic or the like, or the extra is not installed.
    """
    return _word_judge() if name is None else _bert_judge(name)


def _word_judge() -> Judge:
    try:
        from profanity_check import predict_prob
    except ImportError as error:
        raise UserError(
            "there is no toxicity classifier here: pip install 'mlx-fd[toxicity]' brings a small "
            "one (scikit-learn; its model is a pickle), or name a BERT classifier such as "
            "unitary/toxic-bert"
        ) from error
    judge = f"alt-profanity-check {version('alt-profanity-check')}, a linear model of words"

    def score(texts: Sequence[str]) -> Toxicity:
        values = predict_prob(list(texts)) if texts else ()
        return Toxicity(tuple(map(float, values)), judge, "profane or offensive language")

    return score


def _bert_judge(name: str) -> Judge:
    import mlx.core as mx

    from mlx_fd.evaluation.bert import label_names
    from mlx_fd.evaluation.encoder import load_encoder

    encoder = load_encoder(name, classifier=True)
    labels = label_names(encoder.config)
    column = next((k for k, each in enumerate(labels) if each.lower() in _LABELS), None)
    if column is None:
        raise UserError(f"{name} has no label 'toxic'; it has {', '.join(labels)}")
    # As transformers decides it: labels that exclude each other share one probability.
    exclusive = len(labels) > 1
    if (kind := encoder.config.get("problem_type")) is not None:
        exclusive = kind == "single_label_classification"
    judge = f"{name}, a BERT in MLX (weights {encoder.fingerprint})"

    def score(texts: Sequence[str]) -> Toxicity:
        values = dict.fromkeys(range(len(texts)), 0.0)
        for rows, tokens, mask in encoder.batches(encoder.tokens(texts)):
            logits = encoder.model.classify(tokens, mask)
            probabilities = mx.softmax(logits, axis=-1) if exclusive else mx.sigmoid(logits)
            values |= {row: float(probabilities[k, column]) for k, row in enumerate(rows)}
        return Toxicity(tuple(values.values()), judge, f"the label {labels[column]!r}")

    return score
