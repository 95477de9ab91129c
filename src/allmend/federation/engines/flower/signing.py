"""Signed requests: every request to the coordinator is signed with the member's Ed25519 key.

The signature covers method, path, the body's hash, a time and a nonce, so that a request cannot be changed, sent to
another place, or sent twice. (Flower's own signature covers the time alone.)
"""

import base64
import hashlib
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from allmend.federation.privacy.secure_sum.keys import sign, signed

KEY, TIME, NONCE, SIGNATURE = "allmend-key", "allmend-time", "allmend-nonce", "allmend-signature"

WINDOW = 120.0
"""Seconds that a request may be early or late by the coordinator's clock."""


class SignatureError(Exception):
    """A request is not what a registered member has just sent; the text says why."""


def _content(method: str, path: str, time: str, nonce: str, body: bytes) -> bytes:
    digest = hashlib.sha256(body).hexdigest()
    return "\n".join(("allmend request 1", method, path, time, nonce, digest)).encode()


def sign_request(key: Ed25519PrivateKey, method: str, path: str, body: bytes, *, now: float) -> dict[str, str]:
    """The headers of a signed request.

    Args:
        key: the member's.
        method: of the request, in capitals.
        path: without the host.
        body: all of it.
        now: seconds since the epoch by the coordinator's clock.
    """
    moment, nonce = f"{now:.3f}", secrets.token_hex(16)
    return {
        KEY: base64.b64encode(key.public_key().public_bytes_raw()).decode(),
        TIME: moment,
        NONCE: nonce,
        SIGNATURE: base64.b64encode(sign(key, _content(method, path, moment, nonce, body))).decode(),
    }


@dataclass
class Gate:
    """Lets signed requests of registered members through, each once.

    Attributes:
        members: name → raw public key.
        clock: seconds since the epoch.
    """

    members: Mapping[str, bytes]
    clock: Callable[[], float] = time.time
    _names: dict[bytes, str] = field(init=False)
    _nonces: dict[str, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._names = {key: name for name, key in self.members.items()}

    def claimed(self, headers: Mapping[str, str]) -> str:
        """Who the request says that it is from, from its headers alone; nothing is proved yet.

        Raises:
            SignatureError: headers are missing, the key is not registered, or the time is off.
        """
        try:
            key = base64.b64decode(headers[KEY], validate=True)
            moment = float(headers[TIME])
            headers[NONCE], headers[SIGNATURE]
        except (KeyError, ValueError):
            raise SignatureError("the request is not signed") from None
        name = self._names.get(key)
        if name is None:
            raise SignatureError("the key is not registered here")
        if not abs(self.clock() - moment) <= WINDOW:
            raise SignatureError("clock")
        return name

    def check(self, headers: Mapping[str, str], method: str, path: str, body: bytes) -> str:
        """The member that has signed this request, now and not before.

        Raises:
            SignatureError: see `claimed`; or the signature does not fit, or the request came before.
        """
        name = self.claimed(headers)
        try:
            signature = base64.b64decode(headers[SIGNATURE], validate=True)
        except ValueError:
            raise SignatureError("the request is not signed") from None
        content = _content(method, path, headers[TIME], headers[NONCE], body)
        if not signed(self.members[name], signature, content):
            raise SignatureError("the signature does not fit")
        self._once(f"{name}/{headers[NONCE]}")
        return name

    def _once(self, nonce: str) -> None:
        now = self.clock()
        if nonce in self._nonces:
            raise SignatureError("the request came before")
        # in order of arrival: what has left the window stands in front
        while self._nonces and now - next(iter(self._nonces.values())) > 2 * WINDOW + 1:
            self._nonces.pop(next(iter(self._nonces)))
        self._nonces[nonce] = now
