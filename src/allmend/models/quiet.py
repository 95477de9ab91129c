"""The silence of others: what transformers and the Hub's client say and draw, kept back."""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no notices of transformers and the Hub's client inside."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging as transformers

    hub_logging: Any = hub  # both are partly untyped
    transformers_logging: Any = transformers
    bars = transformers_logging.is_progress_bar_enabled()
    levels = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    transformers_logging.disable_progress_bar()  # the Hub's client's too
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(levels[0])
        hub_logging.set_verbosity(levels[1])
        if bars:
            transformers_logging.enable_progress_bar()
