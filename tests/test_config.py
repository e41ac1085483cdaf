import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_fd.config import OPTIONS, PRESETS, Config, override, preset, read, to_toml
from mlx_fd.errors import UserError
from mlx_fd.runs.plan import configuration
from support.draws import draws


def test_every_option_has_one_name_in_one_section():
    sections = dataclasses.fields(Config)
    names = [f.name for s in sections for f in dataclasses.fields(s.default_factory)]
    assert len(names) == len(set(names)) == len(OPTIONS)


@pytest.mark.parametrize("name", PRESETS)
def test_toml_gives_back_theconfiguration(name, tmp_path):
    file = tmp_path / "config.toml"
    file.write_text(to_toml(preset(name)))
    assert read(file) == preset(name)


def test_the_tiny_preset_is_the_default_in_other_sizes_and_rates():
    what = {"expert", "problems"}
    sizes = {
        *("episodes", "batch_size", "micro_batch", "kd_steps", "step_samples", "replay_size"),
        *("max_answer_tokens", "max_feedback_tokens", "max_merge_tokens"),
        *("probe_size", "exam_size", "own_solutions", "warm_up", "lora_rank"),
    }
    rates = {"lora_rate", "score_rate", "projection_rate", "ema_decay"}
    for name in ("tiny", "tiny-hard"):
        assert set(PRESETS[name]) <= what | sizes | rates


def test_published_preset_holds_the_published_numbers():
    config = preset("published")
    assert config.losses.loss_temperature == 4.0
    assert config.losses.standardize_logits
    assert config.losses.scales == (1.0, 1.0, 1.0, 0.03)
    assert config.training.score_rate == 5e-5
    assert config.training.projection_rate == 1e-6
    assert config.gate.gate == "published"
    assert (config.episode.student_weight, config.episode.target_score) == (0.65, 1.0)


def test_options_stand_in_their_table_or_at_the_top(tmp_path):
    flat, nested = tmp_path / "flat.toml", tmp_path / "nested.toml"
    flat.write_text("seed = 3\nkl = 'reverse'\n")
    nested.write_text("[episode]\nseed = 3\n[losses]\nkl = 'reverse'\n")
    assert read(flat) == read(nested) == override(Config(), {"seed": 3, "kl": "reverse"}, "test")


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("batchsize = 4", 'did you mean "batch_size"'),
        ("[gates]\ngate = 'ema'", 'did you mean "gate"'),
        ("[gate]\nseed = 1", "seed belongs in [episode], not [gate]"),
        ("batch_size = 0", "at least 1"),
        ("batch_size = 2.5", "whole number"),
        ("batch_size = true", "whole number"),
        ("on_policy_fraction = 1.5", "at most 1"),
        ("max_grad_norm = nan", "finite"),
        ("kl = 'foward'", 'did you mean "forward"'),
        ("losses = ['lm', 'scores']", 'did you mean "score"'),
        ("losses = []", "at least one"),
        ("losses = ['lm', 'lm']", "without repetitions"),
        ("losses = 'lm'", "a list"),
        ("scales = [1, 2]", "2 numbers for 4 losses"),
        ("scales = [1, 2, -1, 1]", "positive"),
        ("sequential = 'yes'", "true or false"),
        ("seed = \nkl = 'reverse'", "line 1"),
        ("seed = 1\nseed = 2\nkl = 'reverse'", "line 2"),
        (f"seed = {2**63}", f"at most {2**63 - 1}"),
        (f"seed = 0x{'f' * 9000}", "an integer of thousands of digits"),
        (f"seed = {'9' * 5000}", "not a TOML file"),
        (f"batch_size = {2**31}", f"at most {2**31 - 1}"),
        (f"max_grad_norm = 1{'0' * 400}", "finite"),
        ("max_grad_norm = 1e39", "at most 3e+38"),
        ("scales = [1, 1, 1, 1e39]", "positive"),
        ("losses = [['lm'], {a = 1}]", "a list of words"),
        ("losses = [1979-05-27]", "a list of words"),
        ("seed = 1979-05-27T07:32:00Z", "whole number"),
        ("[[gate]]\ngate = 'ema'", "gate must be a text"),
        ("[[training]]\nmax_grad_norm = 1", "write [training]"),
        ("training = 3", "write [training]"),
        ("[seed]\na = 1", "seed is an option, not a table"),
        ("seed.a = 1", "seed is an option, not a table"),
        ("episode.seed = 1\nseed = 2", "seed is there twice"),
        (f"a = {'[' * 5000}", "nested too deeply"),
        (r'student = "a\u0000b"', "control characters"),
        (f"{'a' * 5000} = 1", "there is no option 'aaaa"),
        ("#" + "x" * (1 << 20), "larger than 1 MiB"),
    ],
)
def test_wrong_files_say_what_is_wrong_and_where(toml, message, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(toml)
    with pytest.raises(UserError) as error:
        read(file)
    assert message in str(error.value)
    assert "run.toml" in str(error.value)


def test_a_mark_of_the_byte_order_is_no_option(tmp_path):
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbfseed = 3\n")
    assert read(tmp_path / "run.toml").episode.seed == 3


def test_missing_file_and_binary_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a TOML file"):
        read(tmp_path / "binary.toml")


def test_unknown_preset_suggests():
    with pytest.raises(UserError, match='did you mean "quick"'):
        preset("quik")


@given(
    st.dictionaries(
        st.sampled_from([*OPTIONS, "nothing"]),
        st.one_of(
            st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.text() | st.floats())
        ),
    )
)
def test_any_value_is_taken_or_refused_with_its_name(changes):
    try:
        config = override(Config(), changes, "fuzz")
    except UserError as error:
        assert str(error).startswith("fuzz: ")
        return
    for name, value in changes.items():
        kept = getattr(getattr(config, OPTIONS[name].section), name)
        assert kept == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_top_k": 8, "standardize_logits": True}, "set teacher_top_k to 0"),
        ({"teacher_cache": "/cache"}, "teacher_cache is used with teacher_top_k only"),
        (
            {"teacher_cache": "/cache", "method": "gkd", "self_teacher": "expert"},
            "an expert's likeliest tokens only; set support to teacher, or",
        ),
        (
            {"losses": ("lm",), "on_policy_fraction": 1.0, "solutions": False},
            "there are none; set on_policy_fraction below 1, or add a loss",
        ),
        ({"max_disagreement": 1e-320}, "give at least 0.0001, or 0"),
        (
            {"objective": "likelihood", "on_policy_fraction": 1.0, "self_teacher": "expert"},
            "there are none; set on_policy_fraction to 0.",
        ),
        ({"max_answer_temperature": 0.5}, "is 0.5, below answer_temperature, 0.7, so that it"),
        ({"phase_begin": 0.8, "phase_end": 0.7}, "phase_begin is 0.8, after phase_end, 0.7"),
        ({"phase_begin": 0.8}, "after phase_end, 0.75"),
        ({"losses": ["answers"]}, 'did you mean "answer"'),
    ],
)
def test_options_that_contradict_each_other(changes, message):
    with pytest.raises(UserError) as error:
        override(Config(), changes, "test")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"losses": ("lm",), "on_policy_fraction": 1.0},
        {"losses": ("lm",), "on_policy_fraction": 0.9, "solutions": False},
        {"losses": ("lm", "logit"), "on_policy_fraction": 1.0, "solutions": False},
        {"max_disagreement": 1e-4},
        {"max_disagreement": 0.0},
    ],
)
def test_options_that_go_together(changes):
    assert override(Config(), changes, "test") != Config()


@pytest.mark.parametrize("name", ["lora_rank", "lora_scale", "lora_layers"])
def test_a_size_of_lora_says_nothing_where_all_weights_train(name, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(to_toml(override(Config(), {"train": "full"}, "test")))
    with pytest.raises(
        UserError, match=f"command line: {name} has no effect without train = lora or dora"
    ):
        configuration(None, file, {name: 4}, "command line")
    # A file, and a preset, have a value of each.
    assert configuration("quick", file, {"seed": 3}, "command line").models.train == "full"
    assert configuration(None, file, {"train": "dora", name: 4}, "command line").models.train


@pytest.mark.parametrize("name", ["tiny", "tiny-hard", "smollm2-135m"])
def test_the_tiny_expert_brings_its_preset_from_a_file_too(name, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(f'expert = "{name}"\nepisodes = 7\n')
    found = configuration(None, file, {"seed": 3}, "command line")
    known = {"tiny": "arithmetic", "tiny-hard": "arithmetic-hard"}
    assert found.problems.problems == known.get(name, "gsm8k")
    assert (found.problems.episodes, found.episode.seed) == (7, 3)
    # A preset that is named, and options that are given, win.
    found = configuration("quick", file, {"problems": "mine.jsonl"}, "command line")
    assert found.problems.problems == "mine.jsonl" and found.generation.batch_size == 4


_WORDS = (
    *("", "true", "false", "nan", "-inf", "0", "-0.0", "1e400", "1e39", "1e-400", "01", "1_000"),
    *("0x" + "f" * 5000, "9" * 4301, str(2**31), str(2**63), str(2**64), f"-{2**63}", "0b2", "1e"),
    *("1979-05-27", "0000-00-00", "07:32:00.999999999", "1979-05-27T07:32:00+99:00", "'a'", "''"),
    *('"\\u0000"', '"\\ud800"', '"\\U0010ffff"', '"\x00"', "'''", '"' + "a" * 9000 + '"', "[]"),
    *("[1, [2]]", "[{}]", "{}", "{a = 1}", "[" * 3000, "{a=" * 3000, "['lm']", "['lm', 'lm']"),
    *("[nan]", "[[x]]", "[1979-05-27]", "#", "\\", "=", "+", "\ufeff", "\r", "\x85", "\u2028"),
)
_KEYS = ("nothing", "", "a.b", "'seed'", '"\\u00e9"')
_TABLES = tuple(item.name for item in dataclasses.fields(Config))


def _made_toml(rng: random.Random) -> bytes:
    """A TOML file as a user might break it: mostly in shape, wrong somewhere."""
    lines = []
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        key = rng.choice(
            [*OPTIONS, *OPTIONS, *_TABLES, "nothing", "", "a.b", "'seed'", '"\\u00e9"']
        )
        if rng.random() < 0.3:
            key = f"{rng.choice([*_TABLES, *OPTIONS, 'x'])}.{key}"
        form = rng.choice(["{k} = {v}"] * 6 + ["[{k}]", "[[{k}]]", "{k} = [{v}, {v}]", "{k}{v}"])
        lines.append(form.format(k=key, v=rng.choice(_WORDS)))
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        content = to_toml(preset(rng.choice(list(PRESETS)))).encode() + content
    for _ in range(rng.choice([0, 0, 0, 0, 1, 3])):
        at = rng.randrange(len(content) + 1)
        content = content[:at] + rng.choice([b"", bytes([rng.randrange(256)])]) + content[at + 1 :]
    return content[: rng.randrange(len(content) + 1)] if rng.random() < 0.1 else content


def fuzz(folder, count: int, seed: int) -> int:
    """How many of ``count`` made-up files are configurations; the others are refused."""
    rng = random.Random(seed)
    file = folder / "fuzz.toml"
    taken = 0
    for _ in range(count):
        content = _made_toml(rng)
        file.write_bytes(content)
        try:
            config = read(file)
        except UserError as error:
            text = str(error)
            assert str(file) in text and len(text) < 600, (content, text)
            assert text.isprintable() or "\n" in text, (content, text)
            continue
        taken += 1
        # What is taken can be written with the run, and read again.
        file.write_text(to_toml(config), encoding="utf-8")
        assert read(file) == config, content
    return taken


def test_any_file_is_a_configuration_or_refused_with_its_name(tmp_path):
    count = draws(2000)
    assert 0 < fuzz(tmp_path, count, seed=0) < count
