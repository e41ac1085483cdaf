"""GSM8K against its published checksums; files with every kind of damage."""

import csv
import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction
from importlib import resources

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_fd.errors import UserError
from mlx_fd.problems import Problem, ProblemSet, check_split, load, probe_and_train
from support.draws import draws

ROWS = [
    {"question": "What is 1 + 1?", "answer": "1 + 1 = 2\n#### 2"},
    {"question": "What is 3/4 of 6?", "answer": "#### 4.5"},
    {"question": "Wie viel ist 1000 + 234? \u20ac", "answer": "Zusammen 1,234.\n#### 1,234"},
]
VALUES = ["2", "9/2", "1234"]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def message(source, **options):
    with pytest.raises(UserError) as caught:
        load(str(source), **options)
    return str(caught.value)


# --------------------------------------------------------------------------------------- gsm8k


@pytest.mark.parametrize(
    ("split", "size", "sha256"),
    [
        ("train", 7473, "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
        ("test", 1319, "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
    ],
)
def test_gsm8k(split, size, sha256):
    got = load("gsm8k", split)
    assert (got.name, got.split, got.sha256, got.skipped) == ("gsm8k", split, sha256, 0)
    assert len(got.problems) == len({p.id for p in got.problems}) == size
    assert got.problems[17].id == f"gsm8k-{split}-00017"
    assert all(p.question.strip() and p.solution.count("#### ") == 1 for p in got.problems)


def test_gsm8k_first_row():
    first = load().problems[0]
    assert first.question.startswith("Natalia sold clips to 48 of her friends in April")
    assert first.solution.endswith("#### 72")
    assert first.answer == "72"


def test_gsm8k_brings_its_licence():
    text = resources.files("mlx_fd.problems").joinpath("data", "LICENSE-gsm8k").read_text()
    assert "MIT License" in text
    assert "OpenAI" in text


def test_gsm8k_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys, time; begin = time.process_time()\n"
        "from mlx_fd.problems import load, prompts; load('gsm8k', 'train')\n"
        "assert time.process_time() - begin < 1.5\n"
        "heavy = {'datasets', 'mlx', 'numpy', 'pyarrow', 'huggingface_hub', 'transformers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_gsm8k_unknown_split():
    assert "did you mean 'train'" in message("gsm8k", split="trian")
    assert "only 'train' and 'test'" in message("gsm8k", split="validation")


@pytest.mark.parametrize("source", ["gms8k", "GSM8K", "gsm-8k"])
def test_unknown_source_near_gsm8k(source):
    text = message(source)
    assert "did you mean 'gsm8k'" in text
    assert ".parquet" in text
    assert "owner/name" in text


def test_unknown_source_far_from_everything():
    text = message("no such thing")
    assert "did you mean" not in text
    assert "gsm8k" in text


# --------------------------------------------------------------------------------------- files


def test_jsonl(tmp_path):
    path = tmp_path / "mine.jsonl"
    got = load(lines(path, ROWS), "dev")
    assert [p.answer for p in got.problems] == VALUES
    assert [p.id for p in got.problems] == ["mine-00000", "mine-00001", "mine-00002"]
    assert got.problems[2].question == ROWS[2]["question"]
    assert got.problems[0].solution == ROWS[0]["answer"]
    assert got.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (got.name, got.split, got.skipped) == (str(path), "dev", 0)


def write_csv(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_json(path, rows):
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("p.csv", write_csv),
        ("p.CSV", write_csv),
        ("p.parquet", write_parquet),
        ("p.json", write_json),
    ],
)
def test_formats_say_the_same(tmp_path, name, write):
    write(tmp_path / name, ROWS)
    expected = load(lines(tmp_path / "p.jsonl", ROWS))
    assert load(str(tmp_path / name)).problems == expected.problems


def test_json_file_of_lines_and_byte_order_mark(tmp_path):
    path = tmp_path / "p.json"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, ROWS)).encode())
    assert [p.answer for p in load(str(path)).problems] == VALUES


@pytest.mark.parametrize(
    ("row", "answer", "solution"),
    [
        ({"question": "q", "solution": "s", "answer": "18"}, "18", "s"),
        ({"problem": "q", "solution": "s", "answer": 18}, "18", "s"),
        ({"problem": "q", "answer": 0.1}, "1/10", "#### 0.1"),
        ({"question": "q", "answer": "$1,234.50"}, "2469/2", "#### $1,234.50"),
        ({"question": "q", "answer": "3/4", "solution": None}, "3/4", "#### 3/4"),
        ({"question": "q", "answer": "-2 and so\n#### -2"}, "-2", "-2 and so\n#### -2"),
        ({"question": "q", "answer": r"\frac{1}{2}"}, "1/2", r"#### \frac{1}{2}"),
    ],
)
def test_columns(tmp_path, row, answer, solution):
    (got,) = load(lines(tmp_path / "p.jsonl", [row])).problems
    assert (got.question, got.answer, got.solution) == ("q", answer, solution)


def test_id_column(tmp_path):
    rows = [{**ROWS[0], "id": "a"}, {**ROWS[1], "id": 7}, {**ROWS[2], "id": ""}]
    got = load(lines(tmp_path / "p.jsonl", rows))
    assert [p.id for p in got.problems] == ["a", "7", "p-00002"]


BAD = [
    ('{"question": "q"', "not JSON (Expecting ',' delimiter at column 17)"),
    ("[1, 2]x", "not JSON"),
    ("[1, 2]", "not an object but list"),
    ('{"answer": "#### 2"}', "no 'question'"),
    ('{"question": "", "answer": "#### 2"}', "'question' is empty"),
    ('{"question": 5, "answer": "#### 2"}', "'question' is not text but int"),
    ('{"question": "q"}', "no 'answer'"),
    ('{"question": "q", "answer": "a dozen"}', "no final number in 'answer'"),
    ('{"question": "q", "answer": "2 or 3"}', "no final number in 'answer'"),
    ('{"question": "q", "answer": "12\\n#### none"}', "no final number in 'answer'"),
    ('{"question": "q", "answer": true}', "'answer' is not text but bool"),
    ('{"question": "q", "answer": NaN}', "no 'answer'"),
    ('{"question": "q", "answer": {"a": 2}}', "'answer' is not text but dict"),
    ('{"question": "q", "answer": "2", "solution": 3}', "'solution' is not text but int"),
    ('{"question": "q", "answer": "2", "id": 1.5}', "'id' is not text but float"),
    ('{"question": "\\ud800", "answer": "2"}', "'question' is not UTF-8 text"),
    ("[" * 100_000, "not JSON"),
    ('{"question": "q", "answer": ' + "1" * 5000 + "}", ""),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_bad_line_is_named_and_can_be_skipped(tmp_path, line, reason):
    path = tmp_path / "problems.jsonl"
    good = [json.dumps(row) for row in ROWS]
    path.write_text("\n".join([good[0], "", line, good[1], good[2]]) + "\n")
    text = message(path)
    assert f"problems.jsonl:3: {reason}" in text
    assert "1 of 4 rows" in text
    assert "--skip-bad-rows" in text
    got = load(str(path), skip_bad_rows=True)
    assert got.skipped == 1
    assert [p.answer for p in got.problems] == VALUES
    # the other rows keep their names whether or not a bad one is left out
    assert [p.id[-5:] for p in got.problems] == ["00000", "00002", "00003"]


def test_latin1_bytes_are_named_by_line(tmp_path):
    path = tmp_path / "p.jsonl"
    row = json.dumps({"question": "caf\u00e9?", "answer": "2"}, ensure_ascii=False)
    path.write_bytes(json.dumps(ROWS[0]).encode() + b"\n" + row.encode("latin-1") + b"\n")
    assert "p.jsonl:2: 'question' is not UTF-8 text (at character 3)" in message(path)
    assert load(str(path), skip_bad_rows=True).skipped == 1


def test_duplicate_id(tmp_path):
    rows = [{**ROWS[0], "id": "x"}, ROWS[1], {**ROWS[2], "id": "x"}]
    path = lines(tmp_path / "p.jsonl", rows)
    text = message(path)
    assert "p.jsonl:3: duplicate id 'x'" in text
    assert "p.jsonl:1)" in text
    assert len(load(path, skip_bad_rows=True).problems) == 2


def test_ten_bad_rows_and_the_number_of_the_others(tmp_path):
    path = lines(tmp_path / "p.jsonl", [*ROWS, *[{"question": "q", "answer": "?"}] * 25])
    text = message(path)
    assert text.count("p.jsonl:") == 1 + 10
    assert "p.jsonl:13:" in text
    assert "p.jsonl:14:" not in text
    assert "and 15 more" in text
    assert "25 of 28 rows" in text


@pytest.mark.parametrize("skip", [False, True])
def test_no_good_row(tmp_path, skip):
    path = lines(tmp_path / "p.jsonl", [{"q": "q", "a": "2"}] * 3)
    text = message(path, skip_bad_rows=skip)
    assert "no row that can be read" in text
    assert "p.jsonl:1: no 'question'" in text
    assert "--skip-bad-rows" not in text


def test_json_array_rows_are_named_by_line(tmp_path):
    path = tmp_path / "p.json"
    path.write_text('[\n {"question": "q",\n  "answer": "2"},\n {"question": "r"},\n 3\n]\n')
    text = message(path)
    assert "p.json:4: no 'answer'" in text
    assert "p.json:5: not an object but int" in text
    assert len(load(str(path), skip_bad_rows=True).problems) == 1
    path.write_text('[\n {"question": "q", "answer": "2"},\n {"question": \n')
    assert "p.json:4: not JSON" in message(path)


def test_csv_lines_with_quoted_line_breaks(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text('question,answer\n"two\nlines?",2\n\nlast,none\nshort\na,b,c\n')
    text = message(path)
    assert "p.csv:5: no 'answer'" in text
    assert "p.csv:6: 1 cells, but the header has 2" in text
    assert "p.csv:7: 3 cells" in text
    got = load(str(path), skip_bad_rows=True)
    assert got.skipped == 3
    assert got.problems[0].question == "two\nlines?"


def test_csv_damage(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("frage,antwort\nq,2\n")
    text = message(path)
    assert "p.csv:1:" in text
    assert "'frage', 'antwort'" in text
    path.write_text('question,answer\nq,2\n"never closed,2\n')
    assert "p.csv:3: not CSV" in message(path)
    path.write_text("question,answer\n")
    assert f"{path} has no rows" in message(path)
    path.write_text(f"question,answer\nq,2\n{'long ' * 50_000},3\nr,4\n")
    assert [one.answer for one in load(str(path)).problems] == ["2", "3", "4"]
    path.write_text("question,answer,answer\nq,2,3\n")
    assert f"{path}:1: the column 'answer' is there twice" in message(path)
    # Cells without a name, as spreadsheets leave them, are nobody's.
    path.write_text("question,answer,,\nq,2,,\n")
    assert len(load(str(path)).problems) == 1


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("p.json", '[{"question": "q", "answer": 2},\n{"question": so},\n{"question": "r"}]', 2),
        ("p.csv", 'question,answer\nq,2\n"is it so?,2\nr,3\ns,4\n', 3),
        # A line separator of Unicode ends no row.
        ("p.csv", 'question,answer\nq\u2028q,2\n"is it so?,2\nr,3\ns,4\n', 3),
    ],
)
def test_rows_after_damage_are_not_lost_as_one_bad_row(tmp_path, name, text, line):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=rf"{name}:{line}: .*what follows cannot be read either"):
        load(str(path), skip_bad_rows=True)


@pytest.mark.parametrize(
    ("name", "text", "right"),
    [
        ("p.csv", 'question,answer\nq,2\n"is it "so"?",2\nr,3\ns,4\n', 3),
        ("p.csv", 'question,answer\nq,2\nr,3\n"is it', 2),
        ("p.json", '[{"question": "q", "answer": 2},\n{"question": "is it', 1),
        ("p.json", '[{"question": "q", "question": "p"},\n{"question": "r", "answer": 3}]', 1),
    ],
)
def test_a_bad_row_is_left_out_and_the_next_one_read(tmp_path, name, text, right):
    path = tmp_path / name
    path.write_text(text)
    found = load(str(path), skip_bad_rows=True)
    assert (len(found.problems), found.skipped) == (right, 1)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.json", json.dumps({"version": 2, "data": ROWS}, indent=2)),
        ("p.jsonl", json.dumps({"examples": ROWS})),
        ("p.json", json.dumps(ROWS[0], indent=1)),
        ("p.ndjson", "".join(json.dumps(row) + "\n" for row in ROWS)),
        ("p.tsv", "question\tanswer\n" + f"one, two; {ROWS[0]['question']}\t5\n"),
    ],
)
def test_other_shapes_of_a_file(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    found = load(str(path)).problems
    assert ROWS[0]["question"] in found[0].question and found[0].answer


def test_duplicate_columns_in_json(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"question": "q", "answer": 2, "answer": 3}\n')
    assert f"{path}:1: not JSON (the column 'answer' is there twice)" in message(path)
    path.write_text('[{"question": "q", "answer": 2, "question": "p"}]')
    assert "the column 'question' is there twice" in message(path)


def test_what_follows_an_array_is_not_left_out_silently(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(ROWS) + "\n" + json.dumps(ROWS[0]))
    assert "p.json:1" in message(path) and "after the end of the array" in message(path)
    assert load(str(path), skip_bad_rows=True).skipped == 1


def test_parquet_damage(tmp_path):
    path = tmp_path / "p.parquet"
    path.write_bytes(b"PAR1 this is not parquet")
    assert "cannot be read as Parquet" in message(path)
    write_parquet(path, [*ROWS, {"question": None, "answer": "2"}])
    assert "p.parquet: row 3: no 'question'" in message(path)
    assert load(str(path), skip_bad_rows=True).skipped == 1


@pytest.mark.parametrize("name", ["data [2]", "da*ta", "w\u00e4s ist?"])
def test_parquet_is_read_wherever_it_lies(tmp_path, name):
    (tmp_path / name).mkdir()
    write_parquet(tmp_path / name / "p.parquet", ROWS)
    assert len(load(str(tmp_path / name / "p.parquet"), "train").problems) == len(ROWS)


def test_parquet_is_never_stale(tmp_path):
    path = tmp_path / "p.parquet"
    write_parquet(path, [{"question": "a", "answer": 1}])
    assert load(str(path)).problems[0].answer == "1"
    write_parquet(path, [{"question": "a", "answer": 2}])
    os.utime(path, (0, 0))
    assert load(str(path)).problems[0].answer == "2"


def test_files_that_are_none(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text(" \n\n")
    assert "is empty" in message(empty)
    lines(tmp_path / "problems.jsonl", ROWS)
    text = message(tmp_path / "problem.jsonl")
    assert "no such file" in text
    assert f"did you mean '{tmp_path / 'problems.jsonl'}'" in text
    assert "no such file" in message(tmp_path / "nowhere" / "p.jsonl")
    assert "is a directory" in message(tmp_path)
    (tmp_path / "dir.jsonl").mkdir()
    assert "is a directory" in message(tmp_path / "dir.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "a pipe or a device" in message(tmp_path / "pipe.jsonl")
    (tmp_path / "p.txt").write_text("hello")
    assert ".parquet" in message(tmp_path / "p.txt")


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv"])
def test_binary_junk(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(bytes(range(256)) * 40)
    assert "binary" in message(path)
    path.write_bytes(json.dumps(ROWS[0]).encode("utf-16"))
    assert "UTF-16" in message(path)


def test_hub_without_network_fails_quickly(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    begin = time.monotonic()
    text = message("owner/name", split="train")
    assert time.monotonic() - begin < 15
    assert "'owner/name'" in text
    assert "network" in text


@settings(max_examples=draws(300), deadline=None)
@given(st.binary(max_size=200), st.sampled_from([".jsonl", ".json", ".csv"]))
def test_any_bytes_give_problems_or_a_user_error(tmp_path_factory, content, suffix):
    path = tmp_path_factory.mktemp("any") / f"p{suffix}"
    path.write_bytes(content)
    try:
        assert load(str(path), skip_bad_rows=True).problems
    except UserError as error:
        assert path.name in str(error)


_VALUES = (
    *("1e400", "-1e-400", "NaN", "-Infinity", "9" * 5000, "1e999999999", "0x10", "null", "true"),
    *(
        '"#### 1"',
        '"#### ' + "9" * 5000 + '"',
        '"1/0"',
        '"\\ud800"',
        '"\\u0000"',
        '""',
        '" "',
        '"a',
    ),
    *("[" * 3000, '{"a":' * 3000, "[]", "{}", "[[1]]", '{"a": 1, "a": 2}', "'a'", '"\ufeff"', "2"),
    *('"' + "long " * 40_000 + '"', '"\u2028"', '"\x00"', '"\x85"', '"a\nb"', "1,234", '"3 4"'),
)
_COLUMNS = (
    "question",
    "answer",
    "problem",
    "solution",
    "id",
    "",
    "x",
    "answer ",
    "Answer",
    "\ufeff",
)


def _made_rows(rng: random.Random, suffix: str) -> bytes:
    """A file of problems as it comes from somewhere: in shape, but for something in it."""
    lines, columns = [], [*rng.choices(_COLUMNS, k=rng.randint(0, 3)), "question", "answer"]
    if suffix == ".csv":
        lines.append(rng.choice([",", ",", ",", ";"]).join(columns))
    for _ in range(rng.choice([0, 1, 1, 3])):
        values = [f'"q {rng.random()}"' if c == "question" else "7" for c in columns]
        for _ in range(rng.choice([0, 0, 1, 1, 2])):
            values[rng.randrange(len(values))] = rng.choice(_VALUES)
        if suffix == ".csv":
            lines.append(",".join(values))
        else:
            pairs = zip(columns, values, strict=True)
            lines.append("{" + ", ".join(f'"{name}": {value}' for name, value in pairs) + "}")
    text = rng.choice(["\n", "\n", "\r\n", "\r", "\n\n"]).join(lines)
    if suffix == ".json":
        text = rng.choice(["[{}]", "[{}", "{}]", "[[{}]]", "[{}]]"]).format(
            text.replace("}\n{", "},{")
        )
    content = text.encode(rng.choice(["utf-8"] * 8 + ["utf-8-sig", "utf-16", "latin-1"]), "replace")
    for _ in range(rng.choice([0, 0, 0, 1, 3])):
        at = rng.randrange(len(content) + 1)
        content = content[:at] + rng.choice([b"", bytes([rng.randrange(256)])]) + content[at + 1 :]
    return content


def fuzz(folder, count: int, seed: int) -> int:
    """How many of ``count`` made-up files can be read, rows left out; the others are refused."""
    rng = random.Random(seed)
    taken = 0
    for _ in range(count):
        path = folder / f"fuzz{rng.choice(['.jsonl', '.json', '.csv'])}"
        content = _made_rows(rng, path.suffix)
        path.write_bytes(content)
        try:
            found = load(str(path), skip_bad_rows=True)
        except UserError as error:
            assert str(path) in str(error), content
            assert len(str(error)) < 4000, content
            continue
        taken += 1
        for problem in found.problems:
            json.dumps([problem.question, problem.solution, problem.id]).encode()
            assert problem.question.strip() and (problem.answer or problem.kind == "none")
            if problem.kind == "number":
                assert problem.answer == str(Fraction(problem.answer))
    return taken


def test_any_file_gives_problems_or_is_refused_with_its_name(tmp_path):
    count = draws(1000)
    assert 0.1 * count < fuzz(tmp_path, count, seed=0) < 0.9 * count


def test_any_parquet_file_gives_problems_or_is_refused_with_its_name(tmp_path):
    path = tmp_path / "p.parquet"
    write_parquet(path, ROWS)
    content, rng = path.read_bytes(), random.Random(0)
    twice = pa.table([["q"], ["2"], ["3"]], names=["question", "answer", "answer"])
    for n in range(12):
        at = rng.randrange(len(content))
        path.write_bytes(content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :])
        if n == 10:
            path.write_bytes(content[: len(content) // 2])
        if n == 11:
            pq.write_table(twice, path)
        try:
            assert load(str(path), skip_bad_rows=True).problems and n < 10
        except UserError as error:
            assert str(path) in str(error)


# ------------------------------------------------------------------------------------- splits


def problem_set(questions):
    return ProblemSet(
        "mine",
        "train",
        tuple(Problem(f"p{n}", q, "#### 1", "1") for n, q in enumerate(questions)),
        "",
    )


def normal(problem):
    return " ".join(problem.question.split())


def test_probe_and_train_on_gsm8k():
    got = load()
    probe, train, _ = probe_and_train(got, 8, 200, 0)
    assert (len(probe), len(train)) == (8, 200)
    assert not {p.id for p in probe} & {p.id for p in train}
    assert probe_and_train(got, 8, 200, 0) == (probe, train, ())
    assert probe_and_train(got, 8, 300, 0)[1][:200] == train
    assert probe_and_train(got, 8, 300, 0)[0] == probe
    assert probe_and_train(got, 8, 200, 1) != (probe, train, ())
    assert [p.id for p in train] != sorted(p.id for p in train)
    everything = probe_and_train(got, 8, 7465, 0)
    assert Counter(everything[0] + everything[1]) == Counter(got.problems)


@settings(max_examples=draws(300), deadline=None)
@given(
    st.lists(st.sampled_from(["a b", "a  b", " a\nb", "c", "d", "e", "e ", "f"]), max_size=30),
    st.integers(1, 4),
    st.integers(1, 10),
    st.integers(0, 100),
)
def test_probe_questions_never_come_up_in_training(questions, probe_size, episodes, seed):
    got = problem_set(questions)
    different = len({" ".join(q.split()) for q in questions})
    try:
        probe, train, _ = probe_and_train(got, probe_size, episodes, seed)
    except UserError as error:
        assert f"has {len(questions)} problems" in str(error)
        # the largest probe question may take all its duplicates out of training
        most = max(Counter(" ".join(q.split()) for q in questions).values(), default=0)
        assert different < probe_size or len(questions) < probe_size * most + episodes
        return
    assert (len(probe), len(train)) == (probe_size, episodes)
    assert len({normal(p) for p in probe}) == probe_size
    assert not {normal(p) for p in probe} & {normal(p) for p in train}
    assert len({p.id for p in train}) == episodes


def test_too_many_episodes_says_how_many_there_are():
    with pytest.raises(UserError, match="at most 7465 episodes"):
        probe_and_train(load(), 8, 7466, 0)
    with pytest.raises(UserError, match=r"has 3 problems.*at most 1 episodes"):
        probe_and_train(problem_set(["a", "a ", "b"]), 1, 3, 3)
    with pytest.raises(UserError, match="--probe-size"):
        probe_and_train(problem_set(["a", "b"]), 8, 1, 0)


@pytest.mark.parametrize(
    "split",
    ["test", "TEST", " Test", "test[:10%]", "train+test", "testmini", "all",
     "all[:50%]", "challenge_test", "hidden-test[:9]", "train+ALL"],
)  # fmt: skip
def test_test_split_needs_permission(split):
    with pytest.raises(UserError, match="--train-on-test"):
        check_split(split, False)
    check_split(split, True)


@pytest.mark.parametrize("split", ["train", "validation", "latest", "train[:10%]", "train_all", ""])
def test_other_splits_do_not(split):
    check_split(split, False)


@pytest.mark.parametrize("begin", ["", "\ufeff"], ids=["", "BOM"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_a_file_may_be_packed_and_come_from_anywhere(tmp_path, begin, end, packed):
    rows = [{"id": n, "question": f"{n} + 1?", "answer": str(n + 1)} for n in range(3)]
    lines = begin + "".join(json.dumps(row) + end for row in rows)
    cells = begin + "".join(f"{line}{end}" for line in ("question,answer", "0 + 1?,1"))
    for name, text, count in (("p.jsonl", lines, 3), ("p.csv", cells, 1)):
        content = text.encode()
        if packed == ".gz":
            content = gzip.compress(content)
        if packed == ".zst":
            content = pytest.importorskip("zstandard").compress(content)
        path = tmp_path / f"{name}{packed}"
        path.write_bytes(content)
        found = load(str(path)).problems
        assert [(one.question, one.answer) for one in found] == [
            (f"{n} + 1?", str(n + 1)) for n in range(count)
        ]
    assert found[0].id == "p-00000"


def test_a_packed_file_that_is_not_whole_is_refused(tmp_path):
    whole = gzip.compress(b'{"question": "1?", "answer": "1"}\n' * 99)
    path = tmp_path / "p.jsonl.gz"
    for content, said in ((whole[:-20], "cannot be unpacked"), (b"no", "cannot be unpacked")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=said):
            load(str(path))
    pytest.importorskip("zstandard")
    path = tmp_path / "p.jsonl.zst"
    path.write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be unpacked"):
        load(str(path))


def test_what_was_left_out_is_counted_by_reason(tmp_path):
    rows = [{"id": n % 6, "question": f"{n}?", "answer": str(n)} for n in range(8)]
    rows += [{"question": "?", "answer": "none"}, {"question": " ", "answer": "1"}]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    found = load(str(path), skip_bad_rows=True)
    assert dict(found.reasons) == {
        "duplicate id": 2, "'question' is empty": 1, "not JSON": 1, "no 'answer'": 1,
    }  # fmt: skip
    (note,) = found.notes
    assert note.startswith(
        f"5 rows of {path} could not be read and were skipped: 2 duplicate id; 1 "
    )
