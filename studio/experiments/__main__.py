"""Conducts one experiment in this process: python -m studio.experiments FOLDER, as `start` calls it."""

import sys

from studio import background
from studio.experiments.conduct import Conduct


def main(argv: list[str] | None = None) -> int:
    """Does what is not done yet, and says what it does."""
    return background.work(Conduct.of, Conduct.go, argv)


if __name__ == "__main__":
    sys.exit(main())
