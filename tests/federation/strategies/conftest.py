"""Toy clients that keep their training loss to themselves."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest


@pytest.fixture
def make_quiet_toy(make_toy: Callable[..., Any]) -> Callable[..., Any]:
    def make(name: str, examples: int = 1) -> Any:
        client = make_toy(name, examples)
        loud = client.train
        client.train = lambda *arguments, **named: replace(loud(*arguments, **named), loss=None)
        return client

    return make
