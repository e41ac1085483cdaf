"""What the tests share: models small enough to train, runs, references and hostile inputs."""

from pathlib import Path

#: The repository's folder.
ROOT = Path(__file__).parents[2]
#: Files that were made once, with how they were made beside them.
FIXTURES = ROOT / "tests" / "fixtures"
