"""The parity bundle: what is in it, against plain arithmetic, and what a broken one does."""

import copy
import dataclasses
import hashlib
import json
import random
import time
import warnings

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load, save

from mlx_fd import problems
from mlx_fd.errors import UserError
from mlx_fd.export.bundle import CONTENT, FOLDER, REFERENCE, ROLES, make_bundle, write_bundle
from mlx_fd.export.bundle_reading import read_bundle
from mlx_fd.models.loading import load as load_model
from mlx_fd.models.resolve import resolve
from mlx_fd.problems import prompts
from mlx_fd.problems.kinds import read_final
from support.draws import draws
from support.tiny import make_model_dir

KEPT = 64


@pytest.fixture(scope="module")
def student():
    return load_model(resolve("tiny-student"))


@pytest.fixture(scope="module")
def made(student):
    """Two problems through every role, three answered."""
    chosen = problems.load("arithmetic", "test").problems[:3]
    return make_bundle(student, problems=chosen, seed=3, source={"name": "a test"})


@pytest.fixture
def written(made, tmp_path):
    write_bundle(made, tmp_path)
    return tmp_path


def plain_logprobs(loaded, tokens):
    """Log-probabilities [T, vocab] of one pass without a cache, in float64."""
    logits = np.array(loaded.model(mx.array([tokens]))[0].astype(mx.float32)).astype(np.float64)
    logits = logits[:, : loaded.vocab]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_every_role_is_there_for_every_problem(made):
    assert [prompt.role for prompt in made.prompts] == [role for role in ROLES for _ in range(3)]
    for role in ROLES:
        assert len({prompt.problem for prompt in made.prompts if prompt.role == role}) == 3


def test_prompts_are_the_roles_own_words_and_their_tokens(made, student):
    last = {
        "feedback": prompts.feedback_prompt(),
        "revise": prompts.revise_prompt(""),
        "critique": prompts.critique_prompt(),
        "final": prompts.final_prompt(),
    }
    for prompt in made.prompts:
        assert prompt.tokens == tuple(student.tokenizer.encode(prompt.text))
        if prompt.role in last:
            assert last[prompt.role] in prompt.text.rpartition("<|user|>")[2]
        assert prompt.text.endswith(prompts.FEEDBACK_OPENING) == (prompt.role == "feedback")


def test_the_numbers_are_those_of_one_plain_pass(made, student):
    for prompt in made.prompts:
        whole = plain_logprobs(student, prompt.sequence)[:-1]
        rows = whole[prompt.begin :]
        assert prompt.positions == len(rows) == min(len(whole), 32 + 1 + len(prompt.greedy) - 1)
        kept = np.take_along_axis(rows, prompt.top_ids.astype(int), -1)
        np.testing.assert_allclose(prompt.top_logprobs, kept, atol=2e-4)
        np.testing.assert_allclose(np.sort(rows, -1)[:, ::-1][:, :KEPT], kept, atol=2e-4)
        following = rows[np.arange(len(rows)), prompt.sequence[prompt.begin + 1 :]]
        np.testing.assert_allclose(prompt.next_logprobs, following, atol=2e-4)


def test_continuations_are_greedy(made, student):
    for prompt in made.prompts:
        rows = plain_logprobs(student, prompt.sequence)[len(prompt.tokens) - 1 : -1]
        wanted = rows[np.arange(len(rows)), prompt.greedy]
        np.testing.assert_allclose(wanted, rows.max(-1), atol=1e-4)
        assert len(prompt.greedy) == 32 or prompt.greedy[-1] in made.eos


def test_items_are_judged_and_their_prompt_can_be_built_without_a_template(made, student):
    assert len(made.items) == 3
    for item in made.items:
        assert item.right == (item.final == item.answer)
        assert item.final == read_final(item.text, item.problem)
        asked = student.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompts.answer_prompt(item.question)}],
            add_generation_prompt=True,
            tokenize=False,
        )
        assert made.before + item.question + made.after == asked


def test_the_seed_chooses_the_problems_that_go_through_the_roles(student):
    chosen = problems.load("arithmetic", "test").problems[:4]
    for seed in (1, 2):
        made = make_bundle(student, problems=chosen, seed=seed, source={})
        wanted = [problem.id for problem in random.Random(seed).sample(chosen, 3)]
        assert [prompt.problem for prompt in made.prompts[:3]] == wanted
    assert wanted != [problem.id for problem in random.Random(1).sample(chosen, 3)]


def test_it_reads_as_it_was_written_and_is_small(made, written):
    again = read_bundle(written)
    for name in ("vocab", "eos", "before", "after", "items", "pieces", "reference", "source"):
        assert getattr(again, name) == getattr(made, name)
    for one, other in zip(made.prompts, again.prompts, strict=True):
        for field in dataclasses.fields(one):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))
    files = list((written / FOLDER).iterdir())
    assert sorted(file.name for file in files) == [CONTENT, REFERENCE]
    assert sum(file.stat().st_size for file in files) < 1 << 20


def test_a_padded_vocabulary_stays_outside(tmp_path):
    loaded = load_model(make_model_dir(tmp_path / "m", arch="qwen2", vocab_size=512, tie=False))
    made = make_bundle(loaded, problems=problems.load().problems[:1], seed=0, source={})
    assert made.vocab == 400
    assert all(prompt.top_ids.max() < 400 for prompt in made.prompts)
    # Random weights spread their mass: what is outside must not count in the sum.
    whole = plain_logprobs(loaded, made.prompts[0].sequence)
    np.testing.assert_allclose(np.exp(whole).sum(-1), 1)
    row = made.prompts[0].begin
    kept = whole[row][made.prompts[0].top_ids[0]]
    np.testing.assert_allclose(made.prompts[0].top_logprobs[0], kept, atol=1e-4)


def test_what_cannot_be_a_reference_is_refused(tmp_path, student):
    one = problems.load().problems[:1]
    with pytest.raises(UserError, match="at least one problem"):
        make_bundle(student, problems=[], seed=0, source={})
    base = load_model(make_model_dir(tmp_path / "base", chat_template=None))
    with pytest.raises(UserError, match="chat template"):
        make_bundle(base, problems=one, seed=0, source={})
    broken = load_model(make_model_dir(tmp_path / "broken"))
    broken.model.model.norm.weight = broken.model.model.norm.weight * float("nan")
    with pytest.raises(UserError, match="not finite"):
        make_bundle(broken, problems=one, seed=0, source={})


# ------------------------------------------------------------------------------------------ broken


def sealed(folder, content, arrays=None):
    """Write a bundle's content with the digests that belong to it."""
    if arrays is not None:
        (folder / FOLDER / REFERENCE).write_bytes(save(arrays))
    data = (folder / FOLDER / REFERENCE).read_bytes()
    content = {k: v for k, v in content.items() if k != "sha256"}
    content[REFERENCE] = hashlib.sha256(data).hexdigest()
    content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / FOLDER / CONTENT).write_text(json.dumps(content))


def content_of(folder):
    return json.loads((folder / FOLDER / CONTENT).read_text())


def arrays_of(folder):
    return load((folder / FOLDER / REFERENCE).read_bytes())


def test_a_missing_file_is_named(written):
    (written / FOLDER / REFERENCE).unlink()
    with pytest.raises(UserError, match=r"reference\.safetensors is missing"):
        read_bundle(written)
    with pytest.raises(UserError, match=r"bundle\.json is missing: name a directory"):
        read_bundle(written / "nowhere")


def test_an_edited_bundle_is_refused(written):
    path = written / FOLDER / CONTENT
    path.write_text(
        path.read_text().replace('"max_answer_tokens": 256', '"max_answer_tokens": 255')
    )
    with pytest.raises(UserError, match=r"bundle\.json was changed after it was written"):
        read_bundle(written)


def test_another_bundles_numbers_are_refused(written):
    path = written / FOLDER / REFERENCE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"reference\.safetensors is damaged"):
        read_bundle(written)


def test_another_format_says_what_to_do(written):
    content = content_of(written)
    sealed(written, {**content, "format": 3})
    with pytest.raises(UserError, match="has format 3, and this mlx-fd reads 2"):
        read_bundle(written)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_no_report_can_hold_is_refused(written, number):
    content = content_of(written)
    sealed(written, {**content, "source": {"mean_kl": number}})
    with pytest.raises(UserError, match=r"bundle\.json has a number that is not finite"):
        read_bundle(written)


def test_a_huge_file_is_not_read(written):
    with (written / FOLDER / CONTENT).open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(UserError, match="is no part of a parity bundle"):
        read_bundle(written)


def one_id_twice(arrays):
    arrays["top_ids"][0, 1] = arrays["top_ids"][0, 0]


def one_id_outside(arrays):
    arrays["top_ids"][3, 5] = 1 << 20


def one_nan(arrays):
    arrays["next_logprobs"][2] = np.nan


def too_much_mass(arrays):
    arrays["top_logprobs"][0] = 0.0


def no_exponential(arrays):
    arrays["top_logprobs"][0, 0] = 1e30


def out_of_order(arrays):
    arrays["top_logprobs"][4] = arrays["top_logprobs"][4][::-1]


def one_row_less(arrays):
    arrays["next_logprobs"] = arrays["next_logprobs"][1:]


def another_type(arrays):
    arrays["top_logprobs"] = arrays["top_logprobs"].astype(np.float64)


@pytest.mark.parametrize(
    "harm",
    [
        one_id_twice,
        one_id_outside,
        one_nan,
        too_much_mass,
        no_exponential,
        out_of_order,
        one_row_less,
        another_type,
        lambda arrays: arrays.pop("top_ids"),
    ],
)
def test_impossible_numbers_are_refused_even_when_sealed(written, harm):
    content, arrays = content_of(written), arrays_of(written)
    harm(arrays)
    sealed(written, content, arrays)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a user would see it beside the sentence
        with pytest.raises(UserError, match=r"reference\.safetensors: .*export the model again"):
            read_bundle(written)


@pytest.mark.parametrize(
    "number", ["1/" + "1" * 160_000 + "x", "1/" + "0" * 160_000, "1/" + "7" * 5000]
)
def test_a_number_of_any_length_is_refused_at_once(written, number):
    """The first held compare for minutes; the last has more digits than Python reads."""
    content = content_of(written)
    content["items"][0]["answer"] = number
    sealed(written, content)
    begin = time.process_time()
    with pytest.raises(UserError, match="answer is no number"):
        read_bundle(written)
    assert time.process_time() - begin < 5


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for place, inner in enumerate(value[:3]):
            yield from places(inner, (*path, place))


ODD = (
    *(None, True, -1, 10**30, 0.5, "", "x", "1e999999999", "1/0", "\ud800", [], [None], {}),
    *({"a": 1}, [[]], float("nan"), float("inf")),
)


def test_any_value_in_any_place_is_read_or_refused(written):
    """Sealed bundles with one odd value each: no other exception than ours comes out."""
    rng = random.Random(0)
    content = content_of(written)
    content["prompts"], content["items"] = content["prompts"][:2], content["items"][:1]
    content["pieces"] = dict(list(content["pieces"].items())[:3])
    kept = sum(len(p["tokens"]) + len(p["greedy"]) - 1 - p["begin"] for p in content["prompts"])
    arrays = {name: array[:kept] for name, array in arrays_of(written).items()}
    sealed(written, content, arrays)
    read_bundle(written)
    everywhere = [path for path in places(content) if path]
    refused = 0
    count = draws(500)
    for _ in range(count):
        harmed = copy.deepcopy(content)
        *parents, last = rng.choice(everywhere)
        target = harmed
        for key in parents:
            target = target[key]
        target[last] = rng.choice(ODD)
        sealed(written, harmed)
        try:
            read_bundle(written)
        except UserError as error:
            refused += 1
            assert FOLDER in str(error)
    assert refused > 0.6 * count


def test_any_damage_to_the_bytes_is_refused(written):
    """Bits flipped, files cut, bytes put in: the digests notice all of it."""
    rng = random.Random(1)
    files = {name: (written / FOLDER / name).read_bytes() for name in (CONTENT, REFERENCE)}
    whole = read_bundle(written)
    for _ in range(draws(300)):
        name = rng.choice([CONTENT, REFERENCE])
        data = bytearray(files[name])
        place = rng.randrange(len(data))
        kind = rng.randrange(3)
        if kind == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[place:]
        else:
            data[place:place] = rng.randbytes(3)
        (written / FOLDER / name).write_bytes(bytes(data))
        try:
            again = read_bundle(written)
        except UserError:
            pass
        else:
            # Only white space between two values may differ.
            assert name == CONTENT
            assert again.items == whole.items and again.pieces == whole.pieces
        (written / FOLDER / name).write_bytes(files[name])
