"""`mlx-fd advantage` as a user meets it: its result is never lost, nor written over another's."""

import json

import pytest

from support.shell import failed, shell

SMALL = ("--limit", 2, "--samples", 2, "--max-answer-tokens", 8, "--quiet")
SHORT = ("--contexts", "reference")


def test_another_analysis_goes_into_another_folder(tmp_path):
    """The default folder held whichever came last."""
    for seed in (0, 1, 0):
        done = shell("advantage", "tiny-base", *SMALL, *SHORT, "--seed", seed, cwd=tmp_path)
        assert done.status == 0, done
    assert "wrote advantage/advantage.html" in done.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["advantage", "advantage-2"]
    found = json.loads((tmp_path / "advantage" / "advantage.json").read_text())
    made_with = {
        "target": "tiny-base",
        "problems": "arithmetic/validation",
        "skip_bad_rows": False,
        "limit": 2,
        "samples": 2,
        "max_answer_tokens": 8,
        "temperature": 1.0,
        "critic": "truth",
        "critic_sees": "problem",
        "reference_style": "prose",
        "noise": None,
        "seed": 0,
    }
    assert {name: found[name] for name in made_with} == made_with
    assert [row["context"] for row in found["contexts"]] == ["reference"]
    before = (tmp_path / "advantage-2" / "advantage.json").read_bytes()
    done = shell("advantage", "tiny-base", *SMALL, *SHORT, "--out", "advantage-2", cwd=tmp_path)
    failed(done, "advantage-2/advantage.json: there is another analysis", "choose another --out")
    assert (tmp_path / "advantage-2" / "advantage.json").read_bytes() == before


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "t.jsonl").touch()
    # More than minutes of work.
    work = ("--limit", 1000, "--samples", 64)
    done = shell("advantage", "tiny-base", *work, "--out", "t.jsonl/x", cwd=tmp_path)
    failed(done, "t.jsonl/x: cannot be written", "choose another --out")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--noise-level", 0.9), "noise_level has no effect without a noise"),
        (("--critic-sees", "reference"), "critic_sees has no effect without a critic"),
        (("--critic", "tiny", "--contexts", "reference"), "critic has no effect without context ="),
        (("--reference-style", "prose", "--contexts", "sibling"), "reference_style has no effect"),
        (("--contexts", "clean"), "add --noise, or leave clean out"),
        (("--contexts", ""), "names nothing; name at least one of 'none', 'reference'"),
        (("--contexts", "sibling,sibling"), "'sibling' is there twice; name it once"),
    ],
)
def test_what_has_no_effect_is_refused(options, says, tmp_path):
    failed(shell("advantage", "tiny-base", *SMALL, *options, cwd=tmp_path), says)
    assert not any(tmp_path.iterdir())


def test_an_option_counts_that_one_of_the_contexts_reads(tmp_path):
    options = ("--contexts", "clean,rubric", "--noise", "typed", "--noise-level", 0.9)
    options += ("--reference-style", "solution", "--critic", "truth")
    done = shell("advantage", "tiny-base", *SMALL, *options, "--json", cwd=tmp_path)
    assert done.status == 0, done
    assert json.loads(done.out)["noise"] == ["typed", 0.9]
