"""Members' keys: files that come back, lines that other tools read, and mistakes with one message each."""

import base64
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from allmend.errors import UserError
from allmend.federation.keys import dump_key, fingerprint, parse_public, public_line, read_key, read_members
from allmend.run import write_atomic


def raw(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def test_a_key_comes_back_from_its_file(tmp_path: Path) -> None:
    key, path = Ed25519PrivateKey.generate(), tmp_path / "me.key"
    write_atomic(path, dump_key(key), mode=0o600)
    assert path.stat().st_mode & 0o777 == 0o600
    assert raw(read_key(path)) == raw(key)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610])
def test_a_key_that_others_may_read_is_refused(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "me.key"
    path.write_bytes(dump_key(Ed25519PrivateKey.generate()))
    path.chmod(mode)
    with pytest.raises(UserError, match=rf"others may read this private key \(mode {mode:04o}\)\nchmod 600"):
        read_key(path)


def test_what_is_no_key_is_refused(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    other = ec.generate_private_key(ec.SECP256R1())
    contents = {
        "no private key in PEM": b"nothing",
        "no private key in": public_line(raw(key)).encode(),
        "must be Ed25519, and is ECPrivateKey": other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    }
    for why, data in contents.items():
        path = tmp_path / "me.key"
        write_atomic(path, data, mode=0o600)
        with pytest.raises(UserError, match=why) as raised:
            read_key(path)
        assert "allmend member key" in str(raised.value)
    with pytest.raises(UserError, match="the key cannot be read: No such file"):
        read_key(tmp_path / "absent")


def test_a_public_line_is_read_back_with_whatever_name_behind_it() -> None:
    public = raw(Ed25519PrivateKey.generate())
    for name in ("", "clinic a"):
        assert parse_public(public_line(public, name)) == public


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen here")
def test_ssh_keygen_shows_the_same_fingerprint(tmp_path: Path) -> None:
    public = raw(Ed25519PrivateKey.generate())
    (tmp_path / "me.pub").write_text(public_line(public) + "\n")
    shown = subprocess.run(["ssh-keygen", "-lf", tmp_path / "me.pub"], capture_output=True, text=True, check=True)
    assert fingerprint(public) in shown.stdout


def test_the_fingerprint_is_of_the_key_alone() -> None:
    public = raw(Ed25519PrivateKey.generate())
    shown = fingerprint(public)
    assert shown.startswith("SHA256:")
    assert len(base64.b64decode(shown.removeprefix("SHA256:") + "=")) == 32
    assert shown != fingerprint(raw(Ed25519PrivateKey.generate()))


def test_what_is_no_public_key_is_refused() -> None:
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    line = other.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    for wrong, why in ((line, "must be Ed25519"), ("ssh-ed25519 AAAA", "no public key"), ("", "no public key")):
        with pytest.raises(UserError, match=why):
            parse_public(wrong)


def test_members_are_read_by_name(tmp_path: Path) -> None:
    keys = {name: raw(Ed25519PrivateKey.generate()) for name in ("clinic-a", "clinic b")}
    path = tmp_path / "members.toml"
    path.write_text("[members]\n" + "".join(f'"{name}" = "{public_line(key)}"\n' for name, key in keys.items()))
    assert read_members(path) == keys


def test_members_that_cannot_be_are_refused(tmp_path: Path) -> None:
    one = public_line(raw(Ed25519PrivateKey.generate()))
    path = tmp_path / "members.toml"
    for text, why in (
        ("", "no members are registered"),
        ("[members]", "no members are registered"),
        ("members = 3", "no members are registered"),
        ("[members", "cannot be read"),
        (f'[members]\na = "{one}"\na = "{one}"', "cannot be read"),
        (f'[members]\na = "{one}"\nb = "{one}"', "members.toml: b: has the same public key as a"),
        ("[members]\na = 3", "members.toml: a: the public key is not text"),
        ('[members]\na = "x"', "members.toml: a: no public key"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=why):
            read_members(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_members(tmp_path / "absent.toml")
    path.write_text(f'[members]\na = "{one}"\nb = 3\nc = "x"\nd = "{one}"')
    with pytest.raises(UserError) as raised:
        read_members(path)
    for words in ("3 of the 4 members cannot be used", "- b: ", "- c: ", "- d: has the same public key as a"):
        assert words in str(raised.value)
