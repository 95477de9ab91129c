"""The one exception that users read."""

import pickle
from pathlib import Path

import pytest

from allmend.errors import UserError


class SpecialError(UserError):
    pass


def test_the_message_says_what_where_and_what_to_do() -> None:
    error = UserError("is empty", where=Path("a.jsonl"), hint="Fill it.")
    assert str(error) == "a.jsonl: is empty\nFill it."
    assert str(UserError("is empty")) == "is empty"


@pytest.mark.parametrize("kind", [UserError, SpecialError])
@pytest.mark.parametrize("where", [None, "client 'a'", Path("x/y")])
@pytest.mark.parametrize("hint", [None, "Mend it."])
def test_it_survives_pickling(kind: type[UserError], where: str | Path | None, hint: str | None) -> None:
    error = kind("broke: {}", where=where, hint=hint)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (str(again), again.what, again.where, again.hint) == (str(error), error.what, error.where, error.hint)
