"""What an evaluation's measures are called where people read them."""

from __future__ import annotations

_NAMES = {
    "accuracy": "right",
    "accuracy_strict": "strict",
    "accuracy_flexible": "flexible",
    "first_accuracy": "first answers right",
    "token_f1": "token F1",
    "first_error_f1": "F1",
    "first_error_on_wrong": "errors found",
    "first_error_on_right": "right passed",
    "processbench_f1": "F1",
    "accuracy_on_wrong": "errors found",
    "accuracy_on_right": "right passed",
    "processbench_f1_single": "F1 of one reply",
    "followed": "instructions followed",
    "cut": "cut at the token limit",
    "agreement": "agreeing with the expert",
    "expert_good": "good by the expert",
    "score": "score of first answers",
    "score_gap": "score gap to the expert",
    "score_error": "score error",
    "score_roc_auc": "score ROC-AUC",
    "score_pr_auc": "score PR-AUC",
    "score_spearman": "score Spearman",
    "score_brier": "score Brier",
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "chrf": "chrF",
    "bertscore_f1": "BERTScore",
}
# Shown as per cent, their differences in points.
_SHARES = (
    *("accuracy", "avg@", "maj@", "pass@", "first_", "processbench_", "readable", "token_f1"),
    *("agreement", "expert_good", "followed", "cut"),
)


def is_share(measure: str) -> bool:
    """Whether a measure is a share, which is shown as per cent."""
    return measure.startswith(_SHARES)


def shown_name(measure: str) -> str:
    """A measure's name, with its unit."""
    name = _NAMES.get(measure, measure.replace("_", " "))
    return f"{name}, %" if is_share(measure) else name
