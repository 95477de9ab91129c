"""Scores on disk: what each model of an arm made of every held-out record, kept so that nothing is asked twice."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from allmend.errors import UserError
from allmend.learn.compare import ModelScores
from allmend.learn.evaluate import Score
from allmend.run import write_atomic


def write_scores(path: Path, scores: Sequence[ModelScores]) -> None:
    """Write the scores of one arm's models as a whole.

    Raises:
        UserError: the operating system refused.
    """
    write_atomic(path, json.dumps([asdict(one) for one in scores]).encode())


def read_scores(path: Path) -> list[ModelScores]:
    """Scores as `write_scores` left them.

    Raises:
        UserError: the file cannot be read as such.
    """
    try:
        return [
            ModelScores(
                entry["model"],
                entry["member"],
                {client: [Score(**one) for one in scores] for client, scores in entry["by_client"].items()},
            )
            for entry in json.loads(path.read_bytes())
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"these scores cannot be read: {error}", where=path, hint="Delete the file and resume the run."
        ) from error
