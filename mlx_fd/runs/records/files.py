"""Each file that a run, an evaluation or an export leaves, with the types of what is in it.

``docs/reference.md`` lists them (``scripts/make_reference.py`` takes the text from the docstrings).
"""

from __future__ import annotations

from collections.abc import Mapping

from mlx_fd.runs.records.bundle import BundleFile, BundleItemRow, BundlePromptRow
from mlx_fd.runs.records.cascade import (
    CascadeFile,
    CascadeMeasuredRow,
    CascadePointRow,
    CascadePromiseRow,
    CascadeStepRow,
    CascadeSystemRow,
)
from mlx_fd.runs.records.episodes import (
    AnswerRow,
    EpisodeRow,
    ExpertFeedbackRow,
    GateRow,
    LoggedSampleRow,
    SecondRow,
    StudentFeedbackRow,
    VerdictRow,
)
from mlx_fd.runs.records.evaluation import (
    ComparisonRow,
    EvaluationFile,
    EvaluationSetRow,
    OutputRow,
    SystemRow,
)
from mlx_fd.runs.records.exam import ExamFile, ExamResultRow
from mlx_fd.runs.records.manifest import LearnedRow, Manifest, ModelRow, ProblemsRow
from mlx_fd.runs.records.metrics import MetricsRow, StopRow, TrustRow, UpdateRow
from mlx_fd.runs.records.pareto import ParetoFile, ParetoPointRow, ParetoStartRow, RealStopRow
from mlx_fd.runs.records.parts import BeforeAfterRow, EstimateRow, ProbeLossesRow, ShareRow
from mlx_fd.runs.records.self_distillation import (
    AttemptRow,
    AttemptsRow,
    HeldOutRow,
    SelfHeadroomRow,
    SelfMetricsRow,
    SelfSummary,
    SelfUpdatesRow,
)
from mlx_fd.runs.records.summary import (
    AccuracyRow,
    AuditsRow,
    CalibrationBinRow,
    ExpertUseRow,
    ExpertVerdictsRow,
    HeadroomRow,
    JudgingRow,
    ReliabilityRow,
    ScoreGapRow,
    Summary,
    TopKRow,
    UnreadableRow,
    UpdatesRow,
    VerdictsRow,
)
from mlx_fd.runs.records.tracking import TrackerRow

FILES: Mapping[str, tuple[type, ...]] = {
    "manifest.json": (Manifest, ModelRow, ProblemsRow, LearnedRow),
    "episodes.jsonl": (
        EpisodeRow,
        SecondRow,
        AnswerRow,
        ExpertFeedbackRow,
        StudentFeedbackRow,
        GateRow,
        VerdictRow,
    ),
    "metrics.jsonl": (MetricsRow, SelfMetricsRow, UpdateRow, StopRow, TrustRow, AttemptsRow),
    "attempts.jsonl": (AttemptRow,),
    "samples.jsonl and probe.json": (LoggedSampleRow,),
    "headroom.json": (SelfHeadroomRow,),
    "summary.json": (
        Summary,
        SelfSummary,
        AccuracyRow,
        HeldOutRow,
        ShareRow,
        ProbeLossesRow,
        HeadroomRow,
        ScoreGapRow,
        JudgingRow,
        ReliabilityRow,
        CalibrationBinRow,
        UpdatesRow,
        SelfUpdatesRow,
        ExpertUseRow,
        AuditsRow,
        UnreadableRow,
        ExpertVerdictsRow,
        VerdictsRow,
        TopKRow,
        BeforeAfterRow,
        EstimateRow,
    ),
    "exam_before.json and exam_after.json": (ExamFile, ExamResultRow),
    "tracking.json": (TrackerRow,),
    "outputs.jsonl": (OutputRow,),
    "eval.json": (EvaluationFile, EvaluationSetRow, SystemRow, ComparisonRow),
    "pareto.json": (ParetoFile, ParetoPointRow, RealStopRow, ParetoStartRow),
    "cascade.json": (
        CascadeFile,
        CascadePromiseRow,
        CascadeStepRow,
        CascadeMeasuredRow,
        CascadeSystemRow,
        CascadePointRow,
    ),
    "parity/bundle.json": (BundleFile, BundlePromptRow, BundleItemRow),
}
"""Each file with the types of what is in it, the outermost first."""
