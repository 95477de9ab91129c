"""The engine between machines: Flower carries the messages over TLS, as a library inside our two processes.

The coordinator opens one door (`door`) with what members need of Flower's Fleet API, and keeps letters in Flower's
database (`post`). A member (`node`) asks for letters and answers them; it opens no socket and runs no code but its
own. The stock processes of Flower are not used: they put an open control interface beside the members' door, and load
code that the coordinator sends.
"""

import importlib.util
import logging
import os

from allmend.errors import UserError

# both are read when flwr is imported: nothing calls home
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")


def check_installed() -> None:
    """Raise unless Flower is there.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("flwr") is None:
        raise UserError("runs between machines need Flower", hint="pip install 'allmend[flower]'")


def quiet() -> None:
    """Keep what Flower logs off the screen: what a user can act on is told by this program."""
    logger = logging.getLogger("flwr")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.CRITICAL)
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
