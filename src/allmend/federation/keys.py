"""Who a member is: one long-lived Ed25519 key, by which the coordinator and the other members know it.

Private keys are PEM files (PKCS 8) that only their owner may read, public keys OpenSSH lines, and fingerprints what
`ssh-keygen -l` shows, so that two people can compare them on the telephone.
"""

import base64
import hashlib
import tomllib
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_public_key,
)

from allmend.errors import UserError, all_of


def dump_key(key: Ed25519PrivateKey) -> bytes:
    """A private key as PEM."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def read_key(path: Path) -> Ed25519PrivateKey:
    """A member's private key.

    Raises:
        UserError: it is not there, others may read it, or it is no such key.
    """
    try:
        mode = path.stat().st_mode
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"the key cannot be read: {error.strerror or error}",
            where=path,
            hint="`allmend member key --out FILE` makes one.",
        ) from error
    if mode & 0o077:
        raise UserError(
            f"others may read this private key (mode {mode & 0o777:04o})", where=path, hint=f"chmod 600 {path}"
        )
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UserError(f"no private key in PEM: {error}", where=path, hint=_MAKE) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"the key must be Ed25519, and is {type(key).__name__.lstrip('_')}", where=path, hint=_MAKE)
    return key


_MAKE = "`allmend member key --out FILE` makes one."


def public_line(public: bytes, name: str = "") -> str:
    """A raw public key (32 bytes) as one line of OpenSSH, with a name behind it."""
    key = Ed25519PublicKey.from_public_bytes(public)
    return f"{key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()} {name}".strip()


def parse_public(line: str, *, where: str | Path | None = None) -> bytes:
    """The raw public key (32 bytes) of such a line.

    Raises:
        UserError: it is none, or not Ed25519.
    """
    try:
        key = load_ssh_public_key(line.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UserError(f"no public key: {error}", where=where, hint=_LINE) from None
    if not isinstance(key, Ed25519PublicKey):
        raise UserError("the public key must be Ed25519", where=where, hint=_LINE)
    return key.public_bytes_raw()


_LINE = "It is the line that `allmend member key --public FILE` prints: ssh-ed25519 AAAA…"


def fingerprint(public: bytes) -> str:
    """`SHA256:…` of a raw public key, as `ssh-keygen -l` shows it."""
    blob = base64.b64decode(public_line(public).split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def read_members(path: Path) -> dict[str, bytes]:
    """The registered members: name → raw public key, from a TOML file.

        [members]
        clinic-a = "ssh-ed25519 AAAA…"

    Raises:
        UserError: it cannot be read or is empty; or what is wrong with its members, all at once.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8")).get("members")
    except OSError as error:
        raise UserError(f"the members cannot be read: {error.strerror}", where=path, hint="Check the path.") from error
    except ValueError as error:
        raise UserError(
            f"the members cannot be read: {error}", where=path, hint="Write it as TOML, in UTF-8."
        ) from error
    if not isinstance(found, Mapping) or not found:
        hint = '[members]\nclinic-a = "ssh-ed25519 AAAA…"'
        raise UserError("no members are registered here", where=path, hint=f"A line for each, such as\n{hint}")
    members: dict[str, bytes] = {}
    owners: dict[bytes, str] = {}
    problems: list[UserError] = []
    for name, line in found.items():
        try:
            if not isinstance(line, str):
                raise UserError("the public key is not text", where=name, hint=_LINE)
            public = parse_public(line, where=name)
            if public in owners:
                raise UserError(f"has the same public key as {owners[public]}", where=name)
        except UserError as error:
            problems.append(error)
        else:
            members[name], owners[public] = public, name
    if problems:
        raise all_of(problems, f"{len(problems)} of the {len(found)} members cannot be used", where=path)
    return members
