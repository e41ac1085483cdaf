"""Feedback: its score, and what it says beside that."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass

from mlx_fd.problems.parsing.characters import PLAIN
from mlx_fd.problems.prompts import SCALE, Feedback
from mlx_fd.problems.thoughts import without_thoughts

_WINDOW = 200  # characters looked at behind a label
_BEFORE = 60  # and before it
_MAX_LABELS = 10_000  # that are read, the first ones: no feedback has as many
_MARKUP = r"[ \t*_`\"'#>|]*"
_LABEL = re.compile(
    r"(?<![A-Za-z])(?:score|rating|grade|overall|verdict)(?![A-Za-z])", re.IGNORECASE
)
# Words that may stand between the beginning of a sentence and the label.
_OWN_LABEL = re.compile(
    rf"""(?:[\n.,;:!?()\[\]{{}}<"'`*_\#>|~]|-[ ])\s{{0,{_BEFORE}}}+
    (?:(?:and|here|here's|is|my|the|this|a|an|your|overall|final|total|feedback|quality|assigned
        |numeric|numerical|suggested|proposed|expert|answer|solution|response|assessment
        |evaluation)[\s_-]{{1,{_BEFORE}}}+){{0,5}}[*_`"']{{0,{_BEFORE}}}+\Z""",
    re.VERBOSE | re.IGNORECASE,
)
# Whose score it is when it belongs to the mathematics: "Tom's score: 0.5".
_OTHERS_LABEL = re.compile(
    r"(?:'s|s'|\b(?:his|her|their|its|test|exam|average|mean|game|team|total|maths?|quiz|z|high"
    r"|low|credit|max|min|maximum|minimum|confidence))[\s_-]*\Z",
    re.IGNORECASE,
)
_AFTER_LABEL = re.compile(
    r"""[*_`"']*
    (?:[ \t]*[(\[](?P<note>[^()\[\]\n]{1,40})[)\]]|\s+(?P<outof>out\s+of\s+\d{1,3})
       |(?P<slash>/\d{1,3}))?
    (?:\s+(?:for|given|assigned|to|the|this|your|my|answer|solution|response|work|feedback|that|i
        |would|give|it)\b){0,8}
    [*_`"']*
    (?P<sep>\s*(?::-?(?=\s)|[:=|>\u2192]|-(?=\s))|\s+(?:is|of|was|would\s+be)\b|)
    (?P<noise>(?:[\s*_`"'|>~\u2248$\\({\[]|boxed\{|<(?=[^<>\n]{1,20}>))*)
    (?:(?:about|around|approximately|roughly|an?|solid|only|exactly|very|partly|partially|excellent
        |good|fair|weak|useless|misleading|mostly\s+wrong|harmful|correct|incorrect|wrong)\b
        [\s,(:=*_`]*){0,3}
    """,
    re.VERBOSE | re.IGNORECASE,
)
_SCORE = re.compile(
    r"""(?P<sign>[-+]\s?|(?:minus|negative|plus|positive)\s+)?
    (?P<digits>\d{1,20}(?:[.,]\d{1,20})?|[.,]\d{1,20})(?!\d|[A-Za-z]|[.,]\d)""",
    re.VERBOSE | re.IGNORECASE,
)
_OUT_OF = re.compile(
    r"""\s*+(?:points?|stars?|marks?)?+[\s*_`"'\]]*+\(?+\s*+
    (?:/|(?:out\s+of|of|over)\b(?:\s+an?)?(?:\s+(?:possible|maximum))?)[\s*_`"']*+
    (?P<scale>\d{1,3})(?:[.,]0{1,3})?(?!\d|[A-Za-z%]|[.,]\d)(?:[ ]?\))?""",
    re.VERBOSE | re.IGNORECASE,
)
_ON_SCALE = re.compile(
    r"""[\s,(]*on\s+(?:an?|the)\s+scale\s+(?:of|from)?\s*
    (?:(?P<low>-?\d{1,3})(?:\.0+)?\s*(?:to|-|\.\.)\s*)?\+?(?P<scale>\d{1,3})(?:\.0+)?\)?""",
    re.VERBOSE | re.IGNORECASE,
)
_PERCENT = re.compile(r"\s*(?:%|per\s?cent\b)", re.IGNORECASE)
_NOTE_SCALE = re.compile(
    r"(?:out\s+of|/|max\.?|maximum|[01]\s*(?:-|to|\.\.))?\s*(?P<scale>\d{1,3})", re.IGNORECASE
)
# A range, a list or a calculation goes on after the number: it is no score.
_GOES_ON = re.compile(
    r"""[\s*_`"']*+[\])]?+\s*+(?:
        (?:(?:to|and|or|through)\b|\.{2,}+|[-+*x/^\u00d7\u00f7\u2026\u2192])\s*+[-+$(\[]*+[.,]?\d[\d.,]*
      | (?<=[ \t])[-+]?[.,]?\d
      | [,;|]\s*+[-+]?(?:\d*+[.,]\d++|\d++)\s*(?:[,;|\])}]|$)
    )
    | (?:[\s_`"']*+\*)++\s*+[-+$(\[]*+[.,]?\d[\d.,]*              # 1*5: the star is no markup""",
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
_RUBRIC = re.compile(r"excellent[^a-z\d]*+\d[^a-z]*+(?:to[^a-z\d]*+\d[^a-z]*+)?good", re.IGNORECASE)
_TAIL = re.compile(r"(?:\s*(?:points?|stars?|marks?)\b)?[*_`\"')\]}>|]*[.,;]?", re.IGNORECASE)
_SECOND_ITEM = re.compile(r"(?<=\n)[ \t*]*2[.)]")
_LINE_END = re.compile(r"[ \t*_`\"')\]}.!|>]*(?:\n|$)")
_I_GIVE = re.compile(
    r"""(?<![A-Za-z])(?:I|we)(?:'d|'ll|'m|\s+(?:would|will|am|can|must))?\s+
    (?:also\s+|therefore\s+|thus\s+)?
    (?:give|giving|rate|rating|score|scoring|assign|assigning|award|grade|grading)\b"""
    r"|\b(?:answer|solution|response|it|this|work|explanation)\s+(?:only\s+)?"
    r"(?:deserves|merits|earns|gets|receives)\s+(?:an?\s+)?(?:score|rating)\s+of\b",
    re.VERBOSE | re.IGNORECASE,
)
_JUDGED = re.compile(r"(?:[^.\d\n]{0,60}?[\s*_\"'(])(?=[-+]?\s?[.,]?\d)")
_SENTENCE_GOES = re.compile(
    r"[\s*_`\"')\]]*(?:$|[.,;:!)]|(?:because|since|for|as|on|overall|but|due|given|here|with|and"
    r"|points?|score|rating)\b)",
    re.IGNORECASE,
)
_FEEDBACK_LABEL = re.compile(
    rf"^(?:[{{(<\-]|\d{{1,2}}[.)])?{_MARKUP}(?:feedback|critique|comments?){_MARKUP}"
    r"(?:(?::|-(?=\s))(?:[*_`\"']+(?=\s))?[ \t]*\"?|(?<=>))",
    re.IGNORECASE | re.MULTILINE,
)
_RUN_ON = re.compile(
    rf"^{_MARKUP}(?:(?:overall|final)\s+)?(?:feedback|score|rating){_MARKUP}:",
    re.IGNORECASE | re.MULTILINE,
)
_WORD = re.compile(r"[^\W\d_]{2}|[^\W\d_a-zA-Z]")
_TAG = re.compile(r"</?(?:feedback|score|critique|comments?)>", re.IGNORECASE)
_EMPTY_LINE = re.compile(
    r"^[ \t]*(?:```\w*|\d{1,2}[.)]|[*_`#>|{}\[\]\"',;:.-]+)[ \t]*$", re.MULTILINE
)
# The rubric said back, whole or begun.
_ECHO = re.compile(r"\s+".join(map(re.escape, SCALE.partition(", ")[0].split())) + r",[^\n]*")
_STRONG = re.compile(r"[:=|>\u2192]")
_LAST_WORD = re.compile(r"(?:overall|final)[\s_-]++[*_`\"']*+\Z", re.IGNORECASE)
_THOUSANDS = re.compile(r"[1-9]\d{0,2},\d{3}")
_FIRST_LINE = re.compile(r"\s*+([^\n]{1,60})(?:\n|$)")
_PERCENTAGE = re.compile(r"%|cent")
_USUAL_SCALE = re.compile(r"\D(?:1|5|10|100)(?:[.,]0+)?\)?$")
_SIGNED_OR_DECIMAL = re.compile(r"[.,+]")
_JSON_TEXT = ("feedback", "critique", "comment", "comments", "explanation", "review", "reason")


@dataclass(frozen=True)
class _Found:
    """A place that looks like a score: its value where it can be read, and what to cut out."""

    value: float | None
    start: int
    end: int
    last_word: bool = False


def _read_score(text: str, place: int, scale: str | None) -> tuple[float | None, int, bool] | None:
    """The score that stands at ``place``.

    Returns:
        Its value (``None``: out of range, or part of a range or a calculation), where it ends, and
        whether it came with a scale; ``None`` where there is no number.
    """
    match = _SCORE.match(text, place, place + _WINDOW)
    if not match:
        return None
    sign = -1 if (match["sign"] or "").strip().lower() in ("-", "minus", "negative") else 1
    digits, end = match["digits"], match.end()
    value = float(digits.replace(",", "."))
    most = 1.0
    if found := _OUT_OF.match(text, end, end + _WINDOW):
        most, end = float(found["scale"]), found.end()
    elif found := _PERCENT.match(text, end, end + _WINDOW):
        most, end = 100.0, found.end()
    elif found := _ON_SCALE.match(text, end, end + _WINDOW):
        low = float(found["low"] or 0)
        most, end = float(found["scale"]), found.end()
        if low < 0 and most != 1:
            return None, end, True
    elif scale:
        noted = _NOTE_SCALE.fullmatch(scale.strip())
        most = 100.0 if "%" in scale else float(noted["scale"]) if noted else 1.0
    scaled = bool(found or scale)
    interval = "," in digits and text[max(place - 1, 0)] in "[("
    thousands = _THOUSANDS.fullmatch(digits)
    rest = text[end : end + _WINDOW]
    if goes_on := _GOES_ON.match(rest):
        return None, end + goes_on.end(), scaled
    if interval or thousands or value > most or not most or _RUBRIC.search(rest.partition("\n")[0]):
        return None, end, scaled
    return sign * value / most + 0.0, end, scaled


def _labelled(text: str) -> list[_Found]:
    """Numbers that a label calls the score, in order."""
    scores = []
    for label in itertools.islice(_LABEL.finditer(text), _MAX_LABELS):
        start, end = label.span()
        first = max(start + 1 - _BEFORE, 0)
        # A text begins as a line does.
        before = text[first - 1 : start] if first else "\n" + text[:start]
        after = _AFTER_LABEL.match(text, end, end + _WINDOW)
        assert after is not None  # every part of it may be empty
        own = _OWN_LABEL.search(before)
        strong = _STRONG.search(after["sep"]) is not None
        if not own and (not strong or _OTHERS_LABEL.search(before)):
            continue
        glued_dash = text.startswith("-", end) or after["sep"].strip() == ":-"
        found = _read_score(text, after.end(), after["note"] or after["outof"] or after["slash"])
        if found is None:
            continue
        value, stop, scaled = found
        rest = text[stop : stop + _WINDOW]
        alone = _LINE_END.match(rest) is not None
        number_text = text[after.end() : stop]
        exact = scaled or "." in number_text or "," in number_text
        sure = label[0].lower() in ("score", "rating")
        if not (sure and strong) and not ((sure or strong) and (exact or alone)):
            continue  # "Overall: 1 egg", "they score 1 goal"
        if not own and scaled:
            continue
        if after["sep"].strip() in ("is", "of", "was") and "%" in number_text:
            continue
        if "\n" in after["sep"] + after["noise"] and not alone:
            continue  # "Score:" and then a numbered list
        if glued_dash and not (strong and after["sep"].strip() == ":"):
            value = None  # "Score-0.7", "Score:- 0.7": sign or separator?
        if number_text == "1" and _SECOND_ITEM.search(text, stop, stop + 5 * _WINDOW):
            value = None  # "Score: 1. Step one ... 2. Step two": a list
        lead = own.start() + 1 - len(before) + start if own else start
        last_word = _LAST_WORD.search(before)
        tail = _TAIL.match(rest)
        stop += tail.end() if tail else 0
        scores.append(_Found(value, max(lead, 0), stop, bool(last_word)))
    return scores


def _said(text: str) -> _Found | None:
    """A score given in a sentence ("I'd give this a 0.8"); the sentence stays in the feedback."""
    for verb in itertools.islice(_I_GIVE.finditer(text), _MAX_LABELS):
        if gap := _JUDGED.match(text, verb.end(), verb.end() + _WINDOW):
            found = _read_score(text, gap.end(), None)
            if found and found[0] is not None:
                value, end, scaled = found
                if scaled or _SENTENCE_GOES.match(text[end : end + _WINDOW]):
                    return _Found(value, end, end)
    return None


def _bare(text: str) -> _Found | None:
    """A first line that is nothing but a score: a signed or decimal number, or ``x/10``."""
    line = _FIRST_LINE.match(text)
    if not line:
        return None
    start = line.start(1) + len(line[1]) - len(line[1].lstrip(" \t*_`#>\"'"))
    found = _read_score(text, start, None)
    if not found or not _LINE_END.match(text[found[1] : found[1] + _WINDOW]):
        return None
    value, end, scaled = found
    written = text[start:end]
    if _PERCENTAGE.search(written):
        return None
    if scaled and not _USUAL_SCALE.search(written):
        return None
    if not scaled and not _SIGNED_OR_DECIMAL.search(written):
        labelled = _FEEDBACK_LABEL.match(text[end:].lstrip(" \t\n*_`\"'."))
        if not labelled:
            return None  # a lone 1, 0 or -1 may be anything
    return _Found(value, start, end)


def _from_json(text: str) -> str:
    """The feedback of a JSON object in the text; empty where there is none."""
    start, end = text.find("{"), text.rfind("}")
    if not 0 <= start < end <= 20_000:
        return ""
    try:
        value = json.loads(text[start : end + 1], strict=False)
    except (ValueError, RecursionError):
        return ""
    fields = {k.lower(): v for k, v in value.items()} if isinstance(value, dict) else {}
    return next((v.strip() for k in _JSON_TEXT if isinstance(v := fields.get(k), str)), "")


def _prose(text: str, cut: _Found | None) -> str:
    """The paragraph without score and labels, without a second feedback that follows it."""
    if cut and cut.start < cut.end:
        text = text[: cut.start] + "\n" + text[cut.end :]
    if label := _FEEDBACK_LABEL.search(text):
        rest = text[label.end() :]
        run_on = _RUN_ON.search(rest)
        paragraph = rest[: run_on.start()] if run_on else rest
        text = paragraph if _WORD.search(paragraph) else text
    text = _EMPTY_LINE.sub("", _TAG.sub("", text)).strip()
    if text.count("**") % 2:
        text = text.removeprefix("**").removesuffix("**").strip()
    return text if _WORD.search(text) else ""


def parse_feedback(text: str, tokens: tuple[int, ...] = ()) -> Feedback:
    """Read a feedback as models write it.

    The score is the first readable number that a label (``Score``, ``Rating``, ...) announces; one
    announced as overall or final goes before the others. The first, because the prompt asks for it
    on the first line and what follows a complete feedback is a model that did not stop. Without a
    label, only ``I'd give this a 0.8`` and a first line that is nothing but a score count; other
    numbers belong to the mathematics. ``x/n``, ``x out of n`` and percentages become the ratio
    (the rubric's positive part: 7/10 is 0.7). Ranges, echoes of the prompt and values out of range
    are no score: nothing is clamped or guessed.

    Args:
        text: what the model wrote.
        tokens: ids of the generated tokens, kept as they are.

    Returns:
        The feedback. Its text is the paragraph without labels and score, the whole text where
        nothing else is left.
    """
    whole = without_thoughts(text)
    own = _ECHO.sub("", whole)
    plain = own.translate(PLAIN)
    labelled = _labelled(plain)
    readable = [score for score in labelled if score.value is not None]
    found = next((score for score in readable if score.last_word), None)
    if found is None and labelled:
        found = readable[0] if readable else labelled[0]
    elif not labelled:
        found = _said(plain) or _bare(plain)
    prose = _from_json(own) or _prose(own, found)
    return Feedback(prose or whole.strip(), found.value if found else None, tuple(tokens))


def _words(feedback: Feedback) -> list[str]:
    """What a feedback says beside its score, which stays in the text where nothing else is left."""
    scores = _labelled(feedback.text.translate(PLAIN))
    return _prose(feedback.text, scores[0] if scores else None).split()


def needs_merge(expert: Feedback, student: Feedback | None) -> bool:
    """Whether there are two feedbacks with something in each, and not the same thing."""
    if student is None:
        return False
    expert_text, student_text = _words(expert), _words(student)
    return bool(expert_text) and bool(student_text) and expert_text != student_text
