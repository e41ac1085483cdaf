"""Every regular expression of a package, and texts that are hard on it.

The texts come from the pattern's own parse tree: what leads up to each of its repeats, then one of
its atoms over and over, then something that the pattern does not take.
"""

import ast
import importlib
import itertools
import pkgutil
import random
import re
import time
from pathlib import Path

# Python has no public door to the parse tree; this one has been there since 3.11.
from re import _constants as ops
from re import _parser

from support.draws import ALL

SCANNING = {"search", "finditer", "findall", "sub", "subn", "split"}
ANCHORED = {"match", "fullmatch"}
METHODS = SCANNING | ANCHORED
_SPREAD = " \t\na0_A9.-é"  # what classes and dots are tried with, beside their own characters
_MAX_STARTS, _MAX_UNITS, _MAX_PAIRS = (16, 24, 16) if ALL else (6, 12, 8)


def _files(package):
    root = Path(package.__file__).parent
    return sorted(root.rglob("*.py"))


def hidden(package):
    """Patterns that are written inside a function: ``(file:line, pattern, flags, method)``.

    ``re.sub(PATTERN, ...)`` and its siblings compile what they are given, and keep it to
    themselves; so whoever looks for patterns has to read the source.
    """
    found = []
    for path in _files(package):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "re"
                and node.func.attr in METHODS
            ):
                continue
            where = f"{path.name}:{node.lineno}"
            found.append((where, node.args[0], node.func.attr))
    return found


def _in(value, seen):
    """The patterns in a module's attribute: itself, or in tuples, lists, sets and dicts."""
    if isinstance(value, re.Pattern):
        yield value
    elif isinstance(value, tuple | list | set | frozenset) and id(value) not in seen:
        for part in value:
            yield from _in(part, seen | {id(value)})
    elif isinstance(value, dict) and id(value) not in seen:
        for part in (*value.keys(), *value.values()):
            yield from _in(part, seen | {id(value)})


def compiled(package):
    """Every compiled pattern in the package's modules: ``{module.NAME[k]: pattern}``."""
    found = {}
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if info.name.endswith("__main__"):
            continue
        try:
            module = importlib.import_module(info.name)
        except ImportError:
            continue  # an optional package is not here
        for name, value in vars(module).items():
            for k, pattern in enumerate(_in(value, set())):
                if pattern not in found.values():
                    found[f"{info.name}.{name}[{k}]"] = pattern
    return found


def uses(package):
    """How patterns are used, by their name: ``{NAME: {"match", ...}}``."""
    found = {}
    for path in _files(package):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                found.setdefault(node.value.id, set()).add(node.attr)
    return found


# ------------------------------------------------------------------------------------ hard texts


def _class_characters(items):
    """A few characters of a class, and whether it is negated."""
    own, negated = [], False
    for op, value in items:
        if op is ops.NEGATE:
            negated = True
        elif op is ops.LITERAL:
            own.append(chr(value))
        elif op is ops.RANGE:
            own += [chr(value[0]), chr(value[1])]
        elif op is ops.CATEGORY:
            own += {
                ops.CATEGORY_DIGIT: "07",
                ops.CATEGORY_SPACE: " \n",
                ops.CATEGORY_WORD: "a_",
            }.get(value, "a.")
    return own, negated


def _characters(op, value):
    if op is ops.LITERAL:
        return [chr(value)]
    if op is ops.NOT_LITERAL:
        return [c for c in _SPREAD if c != chr(value)]
    if op is ops.ANY:
        return [c for c in _SPREAD if c != "\n"]
    own, negated = _class_characters(value)
    return [c for c in _SPREAD if c not in own] if negated else own


_REPEATS = (ops.MAX_REPEAT, ops.MIN_REPEAT, ops.POSSESSIVE_REPEAT)


def _example(tree, rng):
    """A text that the tree takes, assertions aside; repeats as often as they must, or once."""
    text = ""
    for op, value in tree:
        if op in (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN):
            text += rng.choice(_characters(op, value))
        elif op is ops.BRANCH:
            text += _example(rng.choice(value[1]), rng)
        elif op is ops.SUBPATTERN:
            text += _example(value[3], rng)
        elif op is ops.ATOMIC_GROUP:
            text += _example(value, rng)
        elif op in _REPEATS:
            low, high, body = value
            for _ in range(min(low, 3) or (rng.random() < 0.3 and high > 0)):
                text += _example(body, rng)
    return text


def _walk(tree, before, rng, starts, units):
    """Collect what leads up to each repeat, and what can be repeated."""
    for op, value in tree:
        if op in (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN):
            units.update(dict.fromkeys(_characters(op, value)))
        elif op is ops.BRANCH:
            for branch in value[1]:
                units[_example(branch, rng)] = None
                _walk(branch, before, rng, starts, units)
        elif op in (ops.SUBPATTERN, ops.ATOMIC_GROUP, ops.ASSERT, ops.ASSERT_NOT):
            inner = value if op is ops.ATOMIC_GROUP else value[-1]
            _walk(inner, before, rng, starts, units)
        elif op in _REPEATS:
            starts[before] = None
            for _ in range(3):
                units[_example(value[2], rng)] = None
            _walk(value[2], before, rng, starts, units)
        before += _example([(op, value)], rng)
    starts[before] = None


def attacks(pattern, seed=0):
    """Makers of texts that are hard on a pattern: each takes a length."""
    rng = random.Random(seed)
    tree = _parser.parse(pattern.pattern, pattern.flags & ~re.DEBUG)
    starts, units = {"": None}, {}
    for _ in range(3):
        _walk(tree, "", rng, starts, units)
    units.pop("", None)
    chosen = rng.sample([*units], min(len(units), _MAX_UNITS))
    pairs = [a + b for a, b in itertools.permutations(chosen, 2)]
    rng.shuffle(pairs)
    chosen += ["\n", " ", "0", "a", *pairs[:_MAX_PAIRS]]
    starts.pop("", None)
    leads = ["", *rng.sample([*starts], min(len(starts), _MAX_STARTS))]
    for start, unit, tail in itertools.product(leads, dict.fromkeys(chosen), ("", "!\n")):
        yield lambda n, s=start, u=unit, t=tail: s + (u * (n // len(u) + 1))[:n] + t
    for k in range(20):
        yield lambda n, k=k: "".join(random.Random(k).choices(chosen, k=n))[:n]


# ------------------------------------------------------------------------------------------- time


def seconds(run, text, tries):
    """Processor seconds, of the best try."""
    found = []
    for _ in range(tries):
        begin = time.process_time()
        run(text)
        found.append(time.process_time() - begin)
    return min(found)


def outgrown(run, make):
    """The length at which a text takes too long, or grows faster than it; ``None``: it is linear.

    Args:
        run: takes a text.
        make: makes one of a length.
    """
    # What is exponential shows at 18 already, and would never come back from 3000.
    for length, most in ((18, 0.001), (300, 0.003)):
        text = make(length)
        if seconds(run, text, 1) > most and seconds(run, text, 4) > most:
            return length
    short = make(3000)
    if seconds(run, short, 1) < 0.004:  # a step for every pair of characters takes 13 ms
        return None
    long = make(6000)
    # Twice the length: linear 2, quadratic 4. The best of several, for other work disturbs.
    least = min(seconds(run, long, 3) / max(seconds(run, short, 3), 1e-4) for _ in range(2))
    return 6000 if least > 3 else None


def runs_of(pattern, methods):
    """The ways in which a pattern is used, each a function of a text."""
    found = {name: getattr(pattern, name) for name in ANCHORED & methods}
    if SCANNING & methods:
        found["search"] = lambda text: sum(1 for _ in pattern.finditer(text))
    return found
