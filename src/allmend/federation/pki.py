"""Certificates for the coordinator's door: an authority of its own, and the server's certificate that it signs.

Members check the server with the authority's certificate alone (`ca.pem`); no public authority and no openssl are
needed. Members themselves are known by their keys (`keys`), not by certificates.
"""

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from allmend.errors import UserError
from allmend.run import write_atomic

AUTHORITY_DAYS = 3650
LOCAL = ("localhost", "127.0.0.1", "::1")
"""Names of this machine, which every server's certificate has too."""

_SKEW = datetime.timedelta(days=1)
"""Certificates hold since yesterday: a member's clock may be slow."""


@dataclass(frozen=True)
class Files:
    """Where the certificates and keys lie.

    Attributes:
        ca: the authority's certificate, for members.
        ca_key: its private key; nobody needs it but to sign the next server's certificate.
        server: the server's certificate.
        server_key: its private key.
    """

    folder: Path

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def ca_key(self) -> Path:
        return self.folder / "ca.key"

    @property
    def server(self) -> Path:
        return self.folder / "server.pem"

    @property
    def server_key(self) -> Path:
        return self.folder / "server.key"


def make_pki(folder: Path, names: Sequence[str], *, days: int) -> x509.Certificate:
    """A new authority (`ca.pem`, `ca.key`) and what `renew_server` makes.

    Raises:
        UserError: there is an authority already, a name or number is none, or the operating system refused. Nothing
            is written where the arguments are at fault.
    """
    _alternatives(names)
    _validity(days)
    files = Files(folder)
    for path in (files.ca, files.ca_key):
        if path.exists():
            raise UserError(
                "an authority is here already, and members may have its certificate",
                where=path,
                hint="`allmend pki renew` makes a new server's certificate with it; or choose another folder.",
            )
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Allmend federation")])
    certificate = (
        _begun(name, name, key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(key, SHA256())
    )
    _write_key(files.ca_key, key)
    write_atomic(files.ca, certificate.public_bytes(Encoding.PEM))
    return renew_server(folder, names, days=days)


def renew_server(folder: Path, names: Sequence[str], *, days: int) -> x509.Certificate:
    """A new `server.pem` and `server.key`, signed by the folder's authority; old ones are replaced.

    Args:
        folder: with `ca.pem` and `ca.key`.
        names: host names and IP addresses that members will use, beside `LOCAL`.
        days: how long the certificate holds.

    Raises:
        UserError: there is no authority, a name is none, or the operating system refused.
    """
    files, alternatives = Files(folder), _alternatives(names)
    try:
        authority = x509.load_pem_x509_certificate(files.ca.read_bytes())
        signer = load_pem_private_key(files.ca_key.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"no authority can be read here: {error}", where=folder, hint="`allmend pki init` makes one."
        ) from error
    if not isinstance(signer, ec.EllipticCurvePrivateKey) or signer.public_key() != authority.public_key():
        raise UserError("ca.key is not the key of ca.pem", where=folder)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, [*names, *LOCAL][0][:64])])
    certificate = (
        _begun(subject, authority.subject, key.public_key(), days)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, SHA256())
    )
    _write_key(files.server_key, key)
    write_atomic(files.server, certificate.public_bytes(Encoding.PEM))
    return certificate


def _begun(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    start, end = _validity(days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(**given: bool) -> x509.KeyUsage:
    usages = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**(dict.fromkeys(usages, False) | given))


def _validity(days: int) -> tuple[datetime.datetime, datetime.datetime]:
    if not 1 <= days <= AUTHORITY_DAYS:
        raise UserError(f"a certificate holds between 1 and {AUTHORITY_DAYS} days, not {days}", where="--days")
    now = datetime.datetime.now(datetime.UTC)
    return now - _SKEW, now + datetime.timedelta(days=days)


def _alternatives(names: Sequence[str]) -> list[x509.GeneralName]:
    return [_name(name) for name in dict.fromkeys([*names, *LOCAL])]


def _name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    if not name or any(not (part.isascii() and part.replace("-", "").isalnum()) for part in name.split(".")):
        raise UserError(f"{name!r} is no host name and no IP address", hint="Leave out https:// and the port.")
    return x509.DNSName(name)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    write_atomic(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=0o600)
