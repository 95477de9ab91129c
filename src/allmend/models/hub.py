"""A model on the Hugging Face Hub, fetched once into the Hub's own cache."""

import errno
import logging
from pathlib import Path

from allmend.errors import UserError
from allmend.models.folder import check_folder
from allmend.models.quiet import quiet

log = logging.getLogger(__name__)

_NAME = "A name is OWNER/NAME[@REVISION]."


def from_hub(source: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, revision = source.partition("@")

    def snapshot(*, local: bool) -> Path:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        folder = snapshot_download(
            name, revision=revision or None, allow_patterns=patterns, local_files_only=local, max_workers=4
        )
        return Path(folder)

    page = f"https://huggingface.co/{name}"
    try:
        with quiet():
            try:
                folder = snapshot(local=True)
                check_folder(folder)
            except (LocalEntryNotFoundError, UserError):  # not here, or an interrupted download
                log.info("fetching %s from the Hugging Face Hub", source)
                folder = snapshot(local=False)
    except HFValidationError as error:
        raise UserError(f"{source!r} is not a name on the Hub: {error}", hint=_NAME) from error
    except GatedRepoError as error:  # before RepositoryNotFoundError, of which it is a kind
        raise UserError(
            "this model is gated: its publisher asks for consent to terms",
            where=source,
            hint=f"Accept the terms on {page}, log in with `hf auth login`, and try again.",
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"there is no folder {name!r} here, and no such model on the Hub (or it is private)",
            where=source,
            hint=f"Check the spelling on {page}; for a private model log in with `hf auth login`.",
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"the model has no revision {revision!r}",
            where=source,
            hint=f"Choose a branch, tag or commit from {page}/commits/main.",
        ) from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            "the model is not in the local cache of the Hub, and the Hub cannot be reached",
            where=source,
            hint=f"Check the network (and that HF_HUB_OFFLINE is not set), or fetch it elsewhere with "
            f"`hf download {name} --local-dir FOLDER` and name that folder.",
        ) from error
    # whatever else a download ends with is a fault of the network, the Hub or the disk
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise UserError(
                "no space left for the model", where=source, hint="Free some space, or set HF_HOME to a larger disk."
            ) from error
        raise UserError(
            f"cannot be fetched from the Hub: {type(error).__name__}: {error}",
            where=source,
            hint="Check the network and try again; what is already fetched is kept.",
        ) from error
    check_folder(folder)
    return folder
