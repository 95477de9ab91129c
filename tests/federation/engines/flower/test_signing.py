"""Signed requests: what a gate lets through, once."""

import base64
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from allmend.federation.engines.flower.signing import (
    KEY,
    NONCE,
    SIGNATURE,
    TIME,
    WINDOW,
    Gate,
    SignatureError,
    sign_request,
)

KEYS = {name: Ed25519PrivateKey.generate() for name in ("a", "b")}
BODY = b"body"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def gate() -> Gate:
    return Gate({name: key.public_key().public_bytes_raw() for name, key in KEYS.items()}, Clock())


def headers(name: str = "a", *, now: float = 1000.0, body: bytes = BODY) -> dict[str, str]:
    return sign_request(KEYS[name], "POST", "/path", body, now=now)


def test_a_signed_request_comes_through_with_its_name(gate: Gate) -> None:
    for name in KEYS:
        assert gate.check(headers(name), "POST", "/path", BODY) == name


@pytest.mark.parametrize(
    ("method", "path", "body"), [("GET", "/path", BODY), ("POST", "/other", BODY), ("POST", "/path", b"bodY")]
)
def test_nothing_of_it_can_be_changed(method: str, path: str, body: bytes, gate: Gate) -> None:
    with pytest.raises(SignatureError, match="does not fit"):
        gate.check(headers(), method, path, body)


@pytest.mark.parametrize("field", [TIME, NONCE, SIGNATURE])
def test_no_header_can_be_changed_or_left_out(field: str, gate: Gate) -> None:
    other = headers()
    changed = headers() | {field: "1000.001" if field == TIME else other[field]}
    with pytest.raises(SignatureError, match="does not fit"):
        gate.check(changed, "POST", "/path", BODY)
    missing = headers()
    del missing[field]
    with pytest.raises(SignatureError, match="not signed"):
        gate.check(missing, "POST", "/path", BODY)


def test_a_member_cannot_sign_as_another(gate: Gate) -> None:
    with pytest.raises(SignatureError, match="does not fit"):
        gate.check(headers("a") | {KEY: headers("b")[KEY]}, "POST", "/path", BODY)


def test_a_stranger_is_refused_before_its_body_is_read(gate: Gate) -> None:
    stranger = sign_request(Ed25519PrivateKey.generate(), "POST", "/path", BODY, now=1000.0)
    with pytest.raises(SignatureError, match="not registered"):
        gate.claimed(stranger)


def test_a_request_comes_once(gate: Gate) -> None:
    again = headers()
    gate.check(again, "POST", "/path", BODY)
    with pytest.raises(SignatureError, match="came before"):
        gate.check(again, "POST", "/path", BODY)


@pytest.mark.parametrize("age", [-WINDOW - 1, WINDOW + 1, float("nan"), float("inf")])
def test_a_request_is_of_now(age: float, gate: Gate) -> None:
    with pytest.raises(SignatureError, match="clock"):
        gate.check(headers(now=1000.0 + age), "POST", "/path", BODY)
    gate.check(headers(now=1000.0 + WINDOW - 1), "POST", "/path", BODY)


def test_old_nonces_are_forgotten_and_their_requests_refused_by_their_time(gate: Gate) -> None:
    clock: Any = gate.clock
    first = headers(now=clock.now)
    gate.check(first, "POST", "/path", BODY)
    for _ in range(50):
        clock.now += 60
        gate.check(headers(now=clock.now), "POST", "/path", BODY)
        with pytest.raises(SignatureError):
            gate.check(first, "POST", "/path", BODY)
    assert len(gate._nonces) < 10


@pytest.mark.parametrize("field", [KEY, SIGNATURE, TIME])
@pytest.mark.parametrize("rubbish", ["", "ü", "AAA", base64.b64encode(b"short").decode(), "1e999", "\n"])
def test_rubbish_is_refused(field: str, rubbish: str, gate: Gate) -> None:
    with pytest.raises(SignatureError):
        gate.check(headers() | {field: rubbish}, "POST", "/path", BODY)
