"""Certificates as an independent verifier and a real TLS connection see them."""

import datetime
import ipaddress
import socket
import ssl
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from allmend.errors import UserError
from allmend.federation.pki import Files, make_pki, renew_server


@pytest.fixture
def files(tmp_path: Path) -> Files:
    make_pki(tmp_path / "pki", ["coordinator.example", "10.1.2.3"], days=30)
    return Files(tmp_path / "pki")


@pytest.fixture
def stranger(tmp_path: Path) -> Files:
    make_pki(tmp_path / "stranger", [], days=30)
    return Files(tmp_path / "stranger")


def verify(files: Files, name: str, *, after: float = 0.0) -> None:
    authority, server = (x509.load_pem_x509_certificate(path.read_bytes()) for path in (files.ca, files.server))
    try:
        subject: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        subject = x509.DNSName(name)
    moment = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=after)
    PolicyBuilder().store(Store([authority])).time(moment).build_server_verifier(subject).verify(server, [])


@pytest.mark.parametrize("name", ["coordinator.example", "10.1.2.3", "localhost", "127.0.0.1", "::1"])
def test_the_server_is_who_it_says(name: str, files: Files) -> None:
    for after in (0.0, -0.9, 29.9):  # a member's clock may be a day slow
        verify(files, name, after=after)


@pytest.mark.parametrize(
    ("name", "after"), [("other.example", 0.0), ("10.1.2.4", 0.0), ("localhost", 31.0), ("localhost", -2.0)]
)
def test_another_name_and_another_time_are_refused(name: str, after: float, files: Files) -> None:
    with pytest.raises(VerificationError):
        verify(files, name, after=after)


def test_another_authority_s_certificate_is_refused(files: Files, stranger: Files) -> None:
    stranger.server.replace(files.server)
    with pytest.raises(VerificationError):
        verify(files, "localhost")


def test_a_tls_connection_is_made_with_the_authority_s_certificate_alone(files: Files, stranger: Files) -> None:
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(files.server, files.server_key)
    for ca, trusted in ((files.ca, True), (stranger.ca, False)):
        with socket.create_server(("127.0.0.1", 0)) as door:

            def answer() -> None:
                connection, _ = door.accept()
                try:
                    with serving.wrap_socket(connection, server_side=True) as secure:
                        secure.sendall(b"hello")
                except (ssl.SSLError, OSError):
                    pass

            thread = threading.Thread(target=answer)
            thread.start()
            context = ssl.create_default_context(cafile=ca)
            with socket.create_connection(door.getsockname()) as plain:
                if trusted:
                    with context.wrap_socket(plain, server_hostname="localhost") as secure:
                        assert secure.recv(5) == b"hello"
                else:
                    with pytest.raises(ssl.SSLCertVerificationError):
                        context.wrap_socket(plain, server_hostname="localhost")
            thread.join(5)


def test_private_keys_are_the_owners_alone(files: Files) -> None:
    for path in (files.ca_key, files.server_key):
        assert path.stat().st_mode & 0o777 == 0o600


def test_an_authority_is_not_replaced_and_a_server_s_certificate_is(files: Files) -> None:
    before = {path: path.read_bytes() for path in (files.ca, files.ca_key, files.server)}
    with pytest.raises(UserError, match="an authority is here already"):
        make_pki(files.folder, [], days=30)
    renew_server(files.folder, ["new.example"], days=90)
    assert files.ca.read_bytes() == before[files.ca]
    assert files.server.read_bytes() != before[files.server]
    verify(files, "new.example", after=80)


def test_what_cannot_be_is_refused(files: Files, stranger: Files, tmp_path: Path) -> None:
    for name in ("https://coordinator.example", "coordinator.example:8443", "", "a b", "ä.example"):
        with pytest.raises(UserError, match="is no host name and no IP address"):
            renew_server(files.folder, [name], days=30)
        with pytest.raises(UserError, match="is no host name"):
            make_pki(tmp_path / "new", [name], days=30)
    for days in (0, -3, 99999):
        with pytest.raises(UserError, match=f"not {days}"):
            renew_server(files.folder, [], days=days)
        with pytest.raises(UserError, match=f"not {days}"):
            make_pki(tmp_path / "new", [], days=days)
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="no authority can be read here"):
        renew_server(tmp_path / "empty", [], days=30)
    stranger.ca_key.replace(files.ca_key)
    with pytest.raises(UserError, match=r"ca\.key is not the key of ca\.pem"):
        renew_server(files.folder, [], days=30)
