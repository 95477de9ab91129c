"""The one exception that a user is meant to read."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Self


class UserError(Exception):
    """A mistake or fault outside the program that its user can mend.

    The message says what is wrong, where, and what to do. The command line prints it without a
    traceback and exits with status 2; any other exception is a bug and keeps its traceback.

    Args:
        what: what is wrong, with the offending value.
        where: the file, line or field; a path or words.
        hint: what to do about it.
    """

    def __init__(self, what: str, *, where: str | Path | None = None, hint: str | None = None) -> None:
        self.what = what
        self.where = str(where) if where is not None else None
        self.hint = hint
        parts = [f"{self.where}: {what}" if self.where else what]
        if hint:
            parts.append(hint)
        super().__init__("\n".join(parts))

    def __reduce__(self) -> tuple[Callable[[], Self], tuple[()]]:
        # keyword arguments do not survive an exception's own pickling, which worker processes use
        return partial(type(self), self.what, where=self.where, hint=self.hint), ()


def listed(problems: Iterable[object]) -> str:
    """Problems one below the other, as items of a list."""
    return "\n".join(f"  - {problem}".replace("\n", "\n    ") for problem in problems)


def all_of(problems: Sequence[UserError], what: str, *, where: str | Path | None = None) -> UserError:
    """Several problems as one: `what`, and a list of them; a single one as it is.

    Args:
        problems: one or more.
        what: what they come to.
        where: the file that they all stand in.
    """
    if len(problems) > 1:
        return UserError(f"{what}\n{listed(problems)}", where=where)
    (only,) = problems
    place = ": ".join(str(part) for part in (where, only.where) if part is not None)
    return UserError(only.what, where=place or None, hint=only.hint)
