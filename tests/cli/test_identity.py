"""`allmend member key` and `allmend pki`: what a person types and gets."""

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from allmend.federation.keys import dump_key, parse_public, read_key


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_key_is_made_and_its_public_part_shown(allmend: Callable[..., Any]) -> None:
    made = allmend("member", "key", "--out", "me.key")
    assert made.code == 0
    assert stat.S_IMODE(Path("me.key").stat().st_mode) == 0o600
    key = read_key(Path("me.key"))
    assert parse_public(made.out) == key.public_key().public_bytes_raw()
    shown = allmend("member", "key", "--public", "me.key")
    assert (shown.code, shown.out) == (0, made.out)
    assert "SHA256:" in shown.err
    assert dump_key(key).decode() not in made.out + made.err


def test_without_a_place_the_private_key_goes_to_standard_output(allmend: Callable[..., Any]) -> None:
    made = allmend("member", "key")
    assert made.code == 0
    Path("me.key").touch(mode=0o600)
    Path("me.key").write_text(made.out)
    assert dump_key(read_key(Path("me.key"))).decode() == made.out


def test_a_private_key_is_not_shown_on_a_screen(allmend: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    shown = allmend("member", "key")
    assert shown.code == 2
    assert shown.out == ""
    assert "--out me.key" in shown.err


def test_a_key_is_never_overwritten(allmend: Callable[..., Any]) -> None:
    allmend("member", "key", "--out", "me.key")
    before = Path("me.key").read_bytes()
    again = allmend("member", "key", "--out", "me.key")
    assert again.code == 2
    assert "a file is here already" in again.err
    assert Path("me.key").read_bytes() == before
    assert allmend("member", "key", "--out", "x.key", "--public", "me.key").code == 2


def test_certificates_are_made_and_renewed(allmend: Callable[..., Any]) -> None:
    made = allmend("pki", "init", "coordinator.example", "10.0.0.5")
    assert made.code == 0
    for path in ("pki/ca.pem", "pki/server.pem", "pki/server.key", "pki/ca.key"):
        assert path in made.out
        assert Path(path).exists()
    again = allmend("pki", "init")
    assert again.code == 2
    assert "allmend pki renew" in again.err
    before = Path("pki/ca.pem").read_bytes()
    assert allmend("pki", "renew", "coordinator.example", "--days", "90").code == 0
    assert Path("pki/ca.pem").read_bytes() == before
    wrong = allmend("pki", "renew", "https://x")
    assert wrong.code == 2
    assert "no host name" in wrong.err
