"""Numbers as people and models write them: which one a text is, begins with, or has."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from mlx_fd.problems.parsing.characters import NARROW, PLAIN, last_match

LONGEST_NUMBER = 60  # characters; longer ones come from models that repeat themselves
NUMBER = re.compile(
    r"""
    (?:(?P<sign>(?<![A-Za-z0-9)\]}%.-])[-+])(?:\$[ ]?)?)?
    (?<!\d\.)(?<![A-Za-z0-9])
    (?:
        (?P<whole>\d+)[ ](?P<top>\d+)/(?P<bottom>\d+)(?![\d/])      # 1 1/2
      | (?:
            (?P<continental>\d{1,3}(?:[.\u202f]\d{3})+,\d{1,2}|\d+,\d{1,2}
                |\d{1,3}(?:\.\d{3}){2,}+|0,\d++)(?![.,]?\d)            # 1.234.567; 0,125
          | (?P<number>(?:\d{1,3}(?:[,'\u202f]\d{3})+(?!\d)
                |\d{1,2}(?:,\d{2}){1,4},\d{3}(?!\d)       # 1,00,000
                |\d+)(?:\.\d+)?|(?<!\.)\.\d+)
        )
        (?:[eE](?P<exponent>[-+]?\d+)(?![A-Za-z\d])
          |[ ]?[*x\u00d7][ ]?10[ ]?\^[ ]?(?P<power>[-+]?\d+)
        )?
        (?:[ ]?/[ ]?(?P<under>\d+(?:\.\d+)?))?
    )
    """,
    re.VERBOSE,
)
_VULGAR = re.compile("[ \u00a0\u202f]?([\u00bc-\u00be\u2150-\u215e\u2189])")
# What no number is read out of stands for it.
_SIGN = "\ue000"
_FORMULA = re.compile(
    r"""
    \\(?:sqrt|pi|infty|log|ln|exp|sin|cos|tan|pm|mp|cup|cap|sum|int|binom
        |overline|bar|dot|lvert|lfloor|lceil|l[et]|leq(?:slant)?|g[et]|geq(?:slant)?|neq?
        |alpha|beta|gamma|delta|theta|lambda|mu|sigma|phi|omega)(?![A-Za-z])
    | \bsqrt(?=\s?\() | [\u221a\u03c0\u221e\u00b1\u2264\u2265\u2260] | \\\{    # a root; a set
    | (?:(?<!\w)|\\left)\|(?=-[\d.]++(?:\\right)?\|)                           # |-3|
    | [(\[]\s*+(?=[-+]?[\d./]++\s*+,(?!\d{3}(?!\d))\s*+(?:[-+]?[\d.]|\\))       # a pair
    | (?<![A-Za-z\\])[a-z]\s?=\s?(?=[-+]?\d{1,3},\s?[-+]?\d{1,2}(?!\d))          # two roots
    | (?<![A-Za-z</\\])[a-z]\s?(?:[<>]=?|\\[lgn]eq?(?![A-Za-z]))(?=\s?[-\d])     # x > 5
    | (?<=[/(+*-])x(?![A-Za-z\d]) | (?<=[/(+*-][ ])x(?=[-+/)=])                  # 240/(x-2)
    """,
    re.VERBOSE,
)
# A sign in words; behind anything else it may be an operation.
_SAID_SIGN = re.compile(
    r"""(?:(?<=\bis[ ])|(?<=\bbe[ ])|(?<=\bare[ ])|(?<=\bwas[ ])|(?<=\bequals[ ])|(?<=[=:][ ])
        |(?<=\ba[ ]))(?:minus|negative)\s++(?=\$?[ ]?[\d.])""",
    re.VERBOSE | re.IGNORECASE,
)
_PLAIN_PART = re.compile(r"\s*+([-+]?)([\d.,]++)\s*+")
_NO_CALCULATION = re.compile(rf"[A-Za-z\\{_SIGN}]")
_LONG_WORD = re.compile(r"[A-Za-z]{3}")


def _fraction(match: re.Match[str]) -> str:
    """A LaTeX fraction as ``3/4``; the sign of a formula if it has letters in it."""
    top, bottom = match[1] or match[2] or "", match[3] or match[4] or ""
    below = _PLAIN_PART.fullmatch(bottom)
    above = _PLAIN_PART.fullmatch(top)
    if above and below and below[1]:
        return ("" if above[1] == below[1] else "-") + f"{above[2]}/{below[2]}"
    parts = [part.replace("\\$", "").replace("\\%", "") for part in (top, bottom)]
    # Of words it is a name, of which a number may follow.
    readable = all(not _NO_CALCULATION.search(part) or _LONG_WORD.search(part) for part in parts)
    return f"{top}/{bottom}" if readable else _SIGN


_LATEX: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (_FORMULA, _SIGN),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,!;:]"), ""),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])"), "*"),
    (re.compile(r"(?<=\d)[ ]*(?=\\[dtc]?frac)"), " "),
    (
        re.compile(r"\\[dtc]?frac[ ]?(?:\{([^{}]*)\}|(\d))[ ]?(?:\{([^{}]*)\}|(\d))(?!\d)"),
        _fraction,
    ),
    # What is left has something else than a number in it; of words it is no formula.
    (re.compile(r"\\[dtc]?frac(?![A-Za-z])(?![ ]?\{[ ]?\\(?:text|mathrm|mbox))"), _SIGN),
    (re.compile(r"\\[A-Za-z]+"), " "),
    (re.compile(r"\\(?=[^A-Za-z\s])|[{}]"), ""),
    (re.compile(r"\$[ ]?([-+])(?=[\d.])"), r"\1$"),
    (_SAID_SIGN, "-"),
    # Of a unit or a variable: 20 m^2 is twenty of something.
    (re.compile(r"(?<=[A-Za-z])[ ]?\^[ ]?\d"), ""),
)
_LEAD = re.compile(
    r"""(?:[\s*_`~:=>$\u2248"'(\[]++|[A-Za-z]\w{0,15}+\s*+=
        |(?:the|my|so|final|answer|ans|result|is|equals|about|approximately|total|therefore)\b
    |(?:Rs|USD|EUR|GBP|CHF|INR|CNY|RMB)\b\.?|(?:US|CA|AU|NZ|HK|[ACRS])(?=\$))++""",
    re.VERBOSE | re.IGNORECASE,
)
_CALCULATION = re.compile(
    r"[-+($\s]*+[\d.,][\d\s.,$%()]*+[-+*/x\u00d7\u00f7]"
    r"[\d\s.,$%()+*/x\u00d7\u00f7-]*+=++\s*+(?=[-+$\d.])"
)
_SEPARATOR = re.compile(rf"[,'{NARROW}]")  # of thousands
_CONTINENTAL = re.compile(rf"[.{NARROW}]")  # likewise, beside a decimal comma
# Thousands with plain spaces between them, or several numbers.
SPACED = re.compile(r"(?<![\d.,/^])(?<!\d[ ])[1-9]\d{0,2}(?:[ ]\d{3}(?!\d))++(?![ ]\d)")
# What one number is followed by: at most one word, no more digits.
_AT_MOST_A_WORD = re.compile(r"(?:[.,]\d++)?[ ]?(?:[^\s\d/-][^\s\d]*+)?[.\s*)]*+\Z")
# In a sentence: decimals, a unit, and then no word that the number could count (3 250 ml bottles).
_AT_MOST_A_UNIT = re.compile(
    r"""(?:[.,]\d++)?+[*_"')$]*+(?:[ ]?[^\s\d/.,;:!?(-][^\s\d.,;:!?(]*+)?
    (?:[.,;:!?]|[ ]?\(|\s*+\Z|[ ]*+\n
      |[ ](?:in|on|of|for|from|to|at|by|per|and|or|each|every|total|altogether|an?|the|is|are|was
        |were|as|than|more|less|left|with|after|before|when|if|so|because|which|that|who|this
        |now|today|instead|will|would|over|during|since|then|but)\b)""",
    re.VERBOSE | re.IGNORECASE,
)
_SPACED_SIGN = re.compile(r"^([-+])\s+(?=[$\d.])")
_LEADING_SIGN = re.compile(r"^(?:minus|negative)\s+(?=[$\d.])", re.IGNORECASE)
_DIGIT = re.compile(r"\d")


def plain_number(text: str) -> str:
    """Plain characters, LaTeX and one-character fractions written out."""
    text = _VULGAR.sub(lambda m: " " + unicodedata.normalize("NFKC", m[1]), text)
    text = text.translate(PLAIN)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return SPACED.sub(_joined_thousands, text)


def _joined_thousands(match: re.Match[str]) -> str:
    """5 000 is one number, since no second one begins with a 0; 12 500 may be two."""
    return match[0].replace(" ", NARROW) if " 0" in match[0] else match[0]


def _value(match: re.Match[str]) -> Fraction | None:
    """The number of a match of ``NUMBER``; ``None`` if too long, too large or over zero."""
    if match.end() - match.start() > LONGEST_NUMBER:
        return None
    if match["whole"]:
        top, bottom = int(match["top"]), int(match["bottom"])
        if not bottom:
            return None
        # "2 6/3" is no mixed number: the last number of it is 6/3.
        value = Fraction(top, bottom) + (int(match["whole"]) if top < bottom else 0)
    else:
        power = int(match["exponent"] or match["power"] or 0)
        if abs(power) > LONGEST_NUMBER:
            return None
        if match["continental"]:
            digits = _CONTINENTAL.sub("", match["continental"]).replace(",", ".")
        else:
            digits = _SEPARATOR.sub("", match["number"])
        value = Fraction(digits) * Fraction(10) ** power
        if match["under"]:
            under = Fraction(match["under"])
            if not under:
                return None
            value /= under
    return -value if match["sign"] == "-" else value


_MAGNITUDES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_MAGNITUDE_WORD = f"(?:{'|'.join(_MAGNITUDES)})"
# 5 hundred-dollar bills are five bills, and 5 hundred dollar bills may be.
_OF_EACH = r"(?:-|[ ](?:dollar|pound|euro|mile|year|foot)[ -][A-Za-z])"
_MAGNITUDE = re.compile(
    rf"[ {NARROW}]*+-?({_MAGNITUDE_WORD})s?(?:[ ]({_MAGNITUDE_WORD})s?)?(?![\w\ue000]|{_OF_EACH})",
    re.IGNORECASE,
)
_BEHIND_MAGNITUDE = re.compile(rf"{_MAGNITUDE_WORD}s?,?[ ](?:and[ ])?[$]?\Z", re.IGNORECASE)
# What makes the number before it a part of something: a power, a variable or thousands behind it.
_GOES_WITH = re.compile(
    rf"""[ ]?\.?{_SIGN}|[ ]?\^[ ]?(?:[-+]?[\d(]|[a-np-z](?![A-Za-z]))
    |[xyzknriabcefjpquvwKMB](?![A-Za-z\d])|(?!cc)[abcxyz]{{2,3}}(?![A-Za-z\d])
    |[\u00b2\u00b3\u00b9\u2070-\u207f\u0304\u0305\u0307]|\*\*[-+]?\d
    # A magnitude of another language, or in short, or of which it is not sure.
    |[ {NARROW}]*+(?i:-?{_MAGNITUDE_WORD}s?{_OF_EACH}
        |(?:mn|mln|mil|mio|mrd|bn|bln|tn|trn|lakhs?|lacs?|crores?|quadrillions?|quintillions?
           |millionen|milliarden?|milliards?|millones|tausend|hundert|mille
           |halves|thirds|(?:four|fif|six|seven|eigh|nin|ten|twelf|hundred|thousand|million)ths
          )(?![^\W_])
        |[\u767e\u4e07\u842c\u4ebf\u5104\u5146\u5341\ub9cc\uc5b5\ucc9c\uc870]
        |\u5343(?![\u514b\u7c73\u74e6]))        # of thousands, not of a kilogram
    |[ ]?\*?[ ]?(?:pi(?![A-Za-z])|(?:sqrt|log|ln|sin|cos|tan)[ ]?(?:[\d(]|[a-z](?![A-Za-z])))
    |[ ](?:(?:squared|cubed)(?![ ][A-Za-z])|factorial\b)""",
    re.VERBOSE,
)
_OTHER_THAN_UNIT = (
    "(?!(?:in|on|of|for|from|at|by|per|each|every|total|is|are|was|were|as|than|more|less|with"
    r"|after|before|when|if|so|because|since|which|that|over|during|then|but|a|an|the)\b)"
)
# And where it should be all there is: an operation, or a second one beside it.
_GOES_ON_WITH = re.compile(
    rf"""[ ]?(?:[+/\u00d7\u00f7-]|\*(?!\*))[ ]?(?:[\d({_SIGN}]|[a-z](?![A-Za-z]|[ ]+[A-Za-z]))
    |[ ]*+(?:[,;]|or\b|and\b)[ ]*+[-+$]?\d[\d.,/]*+[\s.*$]*+\Z
    |[ ]?[,;][ ]?(?:[a-z][ ]?=|[A-Za-z]\w{{0,15}}+[ ]?=[ ]?[-+$]?\d)
    |[:'"\u00b0h.]\d|[ ]:[ ]?\d|\.?\([-+\d]|[ ]?(?:\.{{2,9}}+|\u2026)[ ]?\d
    |![\s*_$)\]]*+(?:\Z|[-+/*])
    |[ ]?[<>]=?[ ]?(?:[-+\d]|[a-z](?![A-Za-z>]))
    |[ ](?:and|or|to|through|over|plus|minus|times|divided[ ]by|choose|mod|rem(?:ainder)?)
      [ ][-+$]?\d
    |[ ]?[rR][ ]?\d|[ ]to[ ]the[ ](?:power\b|\w{{1,9}}th\b|second\b|third\b|[a-z](?!\w))
    # 2 hours and 30 minutes, 5 ft 4 in
    |[ ]?{_OTHER_THAN_UNIT}[^\W\d_]{{1,15}}+\.?[ ](?:and[ ][$]?\d|\d[\d.,/]*+[ ]?(?!x\b)[A-Za-z])
    |[ ]and[ ]an?[ ]\w{{1,9}}+[ ]{_MAGNITUDE_WORD}""",
    re.VERBOSE,
)
_GOES_ON_IN_MAGNITUDE = re.compile(r",?[ ](?:and[ ])?\d")
# Bounds, and names with a number each, have no one number.
_BOUND = re.compile(
    r"""[\s*_`$(\[]*+(?:[<>]=?|=<)\s*+[-+$]*+[\d.](?![^<>\n]*>)
    |(?!(?:the|my|so|final|answer|ans|result|total|therefore)\b)
    [^\d\n:=,;]{1,30}+[:=][ ]*+[-+$]*+\d[\d.]*+[^\d\n:=,;]{0,20}+[,;][ ]*+(?:and[ ])?
    (?!(?:which|so|that|as|since|because|where|check|note)\b)
    [^\W\d]\w{0,15}+(?:[ ]\w{1,15}+)?[ ]?[:=][ ]*+[-+$]*+\d""",
    re.VERBOSE | re.IGNORECASE,
)
# What a value is of: \mu = 3.5, f(2) = 8.
_NAMED = re.compile(
    r"\s*+(?:\\[A-Za-z]++(?:_\{?\w{1,10}\}?)?|[A-Za-z]{1,10}+[ ]?\([^()\n]{0,40}\))\s*+="
    r"(?=[^=\n]*+(?:\n|\Z))"
)
_BEFORE_IT = re.compile(rf"(?:{_SIGN}|[A-Za-z)][ ]?[-+*/^])[ ]?\Z")


class Leading(NamedTuple):
    """What a short piece of text begins with: a number, what follows it, or a formula."""

    value: Fraction | None
    rest: str
    is_formula: bool = False


def _scaled(match: re.Match[str], rest: str) -> tuple[Fraction | None, str]:
    """The number of a match of ``NUMBER`` times a hundred, a million, ..., and what follows."""
    value = _value(match)
    if not (found := _MAGNITUDE.match(rest)):
        return value, rest
    rest = rest[found.end() :].lstrip("!")
    if value is None or _GOES_ON_IN_MAGNITUDE.match(rest):
        return None, rest  # 2 thousand 5 hundred
    for word in filter(None, found.groups()):
        value *= _MAGNITUDES[word.lower()]
    return value, rest


def _is_part(rest: str) -> bool:
    rest = rest.replace(NARROW, " ")
    return bool(_GOES_WITH.match(rest) or _GOES_ON_WITH.match(rest))


def leading_number(segment: str) -> Leading:
    """The number that a short piece of text begins with, and what follows it on its line."""
    if named := _NAMED.match(segment):
        segment = segment[named.end() :]
    line = plain_number(segment).strip().partition("\n")[0]
    if _BOUND.match(line):
        return Leading(None, line, is_formula=True)
    if lead := _LEAD.match(line):
        line = line[lead.end() :]
    while calculation := _CALCULATION.match(line):
        line = line[calculation.end() :]
    line = _SPACED_SIGN.sub(r"\1", _LEADING_SIGN.sub("-", line))
    if spaced := SPACED.match(line, len(line) - len(line.lstrip("-+$"))):
        rest = line[spaced.end() :]
        if _AT_MOST_A_WORD.match(rest):
            line = line[: spaced.end()].replace(" ", NARROW) + rest
        elif rest[:1] != "-" and not rest.lstrip().startswith("/"):
            return Leading(None, rest, is_formula=True)  # 3 bottles of 250 ml, or 3,250 of them
    match = NUMBER.match(line)
    if match is None:
        return Leading(None, line, line.lstrip("-+ ").startswith(_SIGN))
    value, rest = _scaled(match, line[match.end() :])
    if _is_part(rest):
        return Leading(None, rest, is_formula=True)
    return Leading(value, rest)


def number(text: str) -> Fraction | None:
    """The number that a whole text is: ``"1,234"``, ``"$18.50"``, ``"3/4"``, ``"18 eggs"``.

    Returns:
        ``None`` where the text does not begin with a number, or holds a second one.
    """
    text = text.strip()
    if "\n" in text or len(text) > 2 * LONGEST_NUMBER:
        return None
    found = leading_number(text)
    return None if _DIGIT.search(found.rest) else found.value


# What no gold number has, whatever is read of it in a reply: a set, a power, another command.
_NO_GOLD_NUMBER = re.compile(
    r"""\\(?!(?:text|mathrm|mbox|[dtc]?frac|times|cdot|left|right)(?![A-Za-z]))[A-Za-z]
    |(?<![A-Za-z\d}^])\{|[A-Za-z}][ ]?\^|[\u00b2\u00b3\u00b9\u2070-\u207f]""",
    re.VERBOSE,
)
_DEGREES = re.compile(r"\^[ ]?\{?[ ]?\\circ\b[ ]?\}?|\\degree\b")
_SQUARE_OR_CUBIC = re.compile(
    r"(?<![A-Za-z\\])((?:[cdkm]?m|in|ft|yd|mi|units?|met(?:er|re)s?|feet|inch(?:es)?)\}?)"
    r"[ ]?(?:\^[ ]?(?:[23]|\{[23]\})|[\u00b2\u00b3])"
)
# Units that may stand at a number without a space; two letters of any other kind are two factors.
_UNIT_SIGN = r"""(?:[mk]?g|[cdkm]m|m[lL]|kWh?|[kMG]?Hz|[KkMGT]B|k[JN]|kPa|kcal|ft|lbs?|oz|mph|km/?h
    |min|hrs?|secs?|USD|EUR|GBP|CHF|INR|CNY|RMB|(?:dollar|euro|cent|year|month|week|day|hour|minute
    |second|degree|met(?:er|re))s?|people)(?![A-Za-z])"""
# Of several parts, of more or less: a half, tenths, about, at least.
_CJK_UNIT = (
    "(?:(?![\u4e00\u4e8c-\u4e94\u516d\u4e03\u516b\u4e5d\u5341\u767e\u4e07\u842c\u4ebf\u5104\u5146\u4e24"
    "\u534a\u591a\u4f59\u9918\u4ee5\u6210\u5272\u6298])[\u3041-\u30ff\u3400-\u9fff\uac00-\ud7a3]){1,8}+"
)
_GOLD_NUMBER = re.compile(
    rf"""\s*+(?:[-+]|(?:minus|negative)(?=\s))?\s?
    (?:(?:Rs\.?|USD|EUR|GBP|CHF|INR|CNY|RMB)\s?|(?:US|CA|AU|NZ|HK|[ACRS])(?=\$))?\${{0,2}}+\s?
    (?:\d{{1,3}}(?:\.\d{{3}})++(?:,\d{{1,2}}(?!\d)|(?<=\.\d{{3}}\.\d{{3}}))
      |\d{{1,3}}(?:[ \u202f]\d{{3}})++,\d{{1,2}}(?!\d)|\d++,\d{{1,2}}(?![\d,])|0,\d++
      |\d{{1,3}}(?:[,'\u202f]\d{{2,3}}|[ ]\d{{3}}(?!\d|/))++(?:\.\d++)?|\d++(?:\.\d++)?|\.\d++)
    (?:[ ]\d++/\d++|\s?/\s?\d++|[eE][-+]?\d++|[ ]?[*x\u00d7][ ]?10[ ]?\^[ ]?[-+]?\d++)?
    (?:\s?(?:%|\${{1,2}}+))?
    (?:\s{{0,3}}+(?:{_UNIT_SIGN}|{_CJK_UNIT}|\u00b0[CF]?)|\s{{1,3}}+[mghslL](?![A-Za-z])
      |\s{{1,3}}+(?!(?:pi|squared|cubed|factorial|dozens?|and|to|or|over|plus|minus|times)\b)
      \(?[A-Za-z\u00b0][A-Za-z .]{{1,30}}+\)?)?
    (?:[ ]?/[ ]?(?:h|hr|hour|s|sec|second|min|minute|day|week|month|year|person|piece|each|kg|g|lb
      |km|m|mile|ft|cm|l|L))?\s*+\.?\s*+""",
    re.VERBOSE,
)


def is_number(text: str) -> bool:
    """Whether a gold answer is one number, maybe with a unit, and nothing else.

    ``18``, ``$1,234.50``, ``12,50 \u20ac``, ``3/4``, ``12,5``, ``18 eggs`` and ``5kg`` are; ``2k``,
    ``12 pi``, ``(2,4)`` and a root are not.
    """
    if number(text) is None:
        return False
    text = _SQUARE_OR_CUBIC.sub(r"\1", _DEGREES.sub("\u00b0", text))
    return not _NO_GOLD_NUMBER.search(text) and bool(_GOLD_NUMBER.fullmatch(plain_number(text)))


def value_in_text(plain: str, match: re.Match[str]) -> Fraction | None:
    """The number of a match of ``NUMBER``; ``None`` if it is part of a formula."""
    before, rest = plain[: match.start()], plain[match.end() :]
    if before.endswith(_SIGN) or _GOES_WITH.match(rest) or _BEHIND_MAGNITUDE.search(before[-20:]):
        return None
    value, rest = _scaled(match, rest)
    return None if _GOES_WITH.match(rest) else value


def spaced_value(plain: str, spaced: re.Match[str], last: re.Match[str]) -> Fraction | None:
    """The number in a sentence that ends in groups of three digits: one, the last, or none.

    Args:
        plain: the text.
        spaced: the groups.
        last: the last number of the text, if spaces end a number.
    """
    rest = plain[spaced.end() :]
    if rest[:1] == "-" or rest.lstrip(" ").startswith("/"):
        return value_in_text(plain, last)  # 12 100-dollar bills, 12 500/3
    before = plain[: spaced.start()]
    if not before.endswith(("$", "$ ")) and not _AT_MOST_A_UNIT.match(rest):
        return None
    joined = before + spaced[0].replace(" ", NARROW) + rest
    whole = last_match(NUMBER, joined)
    assert whole is not None
    return value_in_text(joined, whole)


def boxed_number(box: str) -> Leading:
    """The number that a box begins with, else the first one in it."""
    found = leading_number(box)
    if found.value is not None or found.is_formula:
        return found
    plain = plain_number(box)
    first = NUMBER.search(plain)
    if first is None:
        return Leading(None, plain, _SIGN in plain)
    value, rest = _scaled(first, plain[first.end() :])
    if _BEFORE_IT.search(plain[: first.start()]) or _is_part(rest):
        return Leading(None, rest, is_formula=True)
    return Leading(value, rest)
