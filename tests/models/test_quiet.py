"""The silence ends with the block."""

from collections.abc import Callable
from pathlib import Path

from allmend.models.quiet import quiet

MakeFolder = Callable[..., Path]


def test_quiet_restores_what_it_found() -> None:
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    with quiet():
        assert not logging.is_progress_bar_enabled()
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before
