"""The coordinator's side of a secure sum: it carries messages, adds masked vectors, and takes the masks off the sum."""

from collections.abc import Callable

import numpy as np

from allmend.federation.privacy.secure_sum.keys import Agreement
from allmend.federation.privacy.secure_sum.masks import Integers, add_mask, dtype
from allmend.federation.privacy.secure_sum.member import check_keys, commitment, enough, masking, self_mask_key
from allmend.federation.privacy.secure_sum.messages import (
    Keys,
    Neighbours,
    Opened,
    ProtocolError,
    Sealed,
    Shares,
    Survivors,
    parse_vector,
)
from allmend.federation.privacy.secure_sum.shares import combine
from allmend.federation.privacy.secure_sum.terms import Terms


class SecureSum:
    """One sum. In each of four phases, `receive` a message from every member that sends one, then `advance`.

        phase      members send            `advance` returns, by member
        keys       `SecureMember.keys`     what goes into `shares`
        shares     `shares`                what goes into `masked`
        masked     `masked`                what goes into `opened`
        opened     `opened`                nothing; `total` is there

    A member whose message does not come, or is refused, is lost: it is in no later phase, and in the sum only if its
    masked vector came. Masked vectors are added as they come, so that memory does not grow with the members.

    Args:
        terms: of the sum.
    """

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.phase = "keys"
        self.total: Integers | None = None
        """The sum [length] modulo 2^bits, once all is done."""
        self._there = set(terms.members)
        """Who has sent all messages so far."""
        self._sent: set[str] = set()
        """Who has sent this phase's."""
        self._keys: dict[str, Keys] = {}
        self._sealed: dict[str, dict[str, bytes]] = {}
        self._sum: Integers = np.zeros(terms.length, dtype=dtype(terms.bits))
        self._opened: dict[str, Opened] = {}
        self._survivors: set[str] = set()

    @property
    def survivors(self) -> list[str]:
        """Whose vectors are in the sum, sorted."""
        return sorted(self._survivors)

    def receive(self, name: str, data: bytes) -> None:
        """Take a member's message of this phase.

        Args:
            name: of the member, as the transport has made sure.
            data: what the member's step returned.

        Raises:
            ProtocolError: the member is not expected, or the message is not what it should be. Nothing has changed;
                the sum can go on without the member.
        """
        steps: dict[str, Callable[[str, bytes], None]] = {
            "keys": self._take_keys,
            "shares": self._take_shares,
            "masked": self._take_masked,
            "opened": self._take_opened,
        }
        if self.phase not in steps or name not in self._there or name in self._sent:
            raise ProtocolError(f"a message that nobody waits for (phase {self.phase!r})", where=f"member {name!r}")
        steps[self.phase](name, data)
        self._sent.add(name)

    def advance(self) -> dict[str, bytes]:
        """End the phase: whoever has sent nothing is lost. Returns what goes to the members that are left.

        Raises:
            ProtocolError: too few members are left; the sum cannot be formed any more.
        """
        phases: dict[str, tuple[str, Callable[[], dict[str, bytes]]]] = {
            "keys": ("shares", self._neighbours),
            "shares": ("masked", self._shares),
            "masked": ("opened", self._ask),
            "opened": ("done", self._open),
        }
        after, end = phases[self.phase]
        if self.phase == "masked":
            self._survivors = set(self._sent)
        self._there, self._sent = self._sent, set()
        if len(self._there) < self.terms.fewest and self.phase != "opened":
            raise ProtocolError(
                f"{len(self._there)} of {len(self.terms.members)} members are left (phase {self.phase!r}), and a sum "
                f"is over {self.terms.fewest} at the fewest",
                hint="Too many members were lost: try the round again.",
            )
        messages = end()
        self.phase = after
        return messages

    def _take_keys(self, name: str, data: bytes) -> None:
        keys = Keys.parse(data, self.terms.digest, of=f"member {name!r}")
        if keys.member != name:
            raise ProtocolError(f"the keys of {keys.member!r}", where=f"member {name!r}")
        check_keys(keys, self.terms)
        self._keys[name] = keys

    def _neighbours(self) -> dict[str, bytes]:
        found = {}
        for name in self._there:
            near = [other for other in self.terms.neighbourhoods[name] if other in self._there]
            enough(self.terms, name, {name, *near}, "have sent their keys")
            keys = [self._keys[other] for other in near]
            found[name] = Neighbours(terms=self.terms.digest, keys=keys).dump()
        return found

    def _take_shares(self, name: str, data: bytes) -> None:
        boxes = Sealed.parse(data, self.terms.digest, of=f"member {name!r}").boxes
        if set(boxes) != set(self.terms.neighbourhoods[name]) & set(self._keys):
            raise ProtocolError("shares for others than its neighbours", where=f"member {name!r}")
        self._sealed[name] = boxes

    def _shares(self) -> dict[str, bytes]:
        found = {}
        for name in self._there:
            near = [other for other in self.terms.neighbourhoods[name] if other in self._there]
            enough(self.terms, name, {name, *near}, "have sent their shares")
            boxes = {other: self._sealed[other][name] for other in near}
            found[name] = Shares(terms=self.terms.digest, boxes=boxes).dump()
        return found

    def _take_masked(self, name: str, data: bytes) -> None:
        terms = self.terms
        self._sum += parse_vector(data, terms.digest, length=terms.length, bits=terms.bits, of=f"member {name!r}")

    def _ask(self) -> dict[str, bytes]:
        for name in self._sealed:
            near = self._survivors & {name, *self.terms.neighbourhoods[name]}
            enough(self.terms, name, near, "have sent their vectors")
        message = Survivors(terms=self.terms.digest, members=self.survivors).dump()
        return dict.fromkeys(self._survivors, message)

    def _take_opened(self, name: str, data: bytes) -> None:
        opened = Opened.parse(data, self.terms.digest, of=f"member {name!r}")
        near = {name, *self.terms.neighbourhoods[name]} & set(self._sealed)
        alive, lost = near & self._survivors, near - self._survivors
        if set(opened.self_masks) != alive or set(opened.keys) != lost:
            raise ProtocolError("shares of others than it was asked for", where=f"member {name!r}")
        self._opened[name] = opened

    def _open(self) -> dict[str, bytes]:
        terms = self.terms
        for name in sorted(self._sealed):
            if name in self._survivors:
                seed = self._secret(name, "self_masks")
                if commitment(seed, terms.digest) != self._keys[name].commitment:
                    raise _wrong(name)
                add_mask(self._sum, self_mask_key(seed, terms.digest), negative=True)
                continue
            key = Agreement(self._secret(name, "keys"), terms.digest)
            if key.public != self._keys[name].masks:
                raise _wrong(name)
            for other in sorted(self._survivors & set(terms.neighbourhoods[name])):
                mask = key.with_(self._keys[other].masks, masking(name, other))
                add_mask(self._sum, mask, negative=other < name)
        self.total = self._sum
        return {}

    def _secret(self, name: str, kind: str) -> bytes:
        shares = {
            self.terms.seat(name, holder): share
            for holder, opened in self._opened.items()
            if (share := getattr(opened, kind).get(name)) is not None
        }
        enough(self.terms, name, {str(seat) for seat in shares}, "have opened their shares")
        return combine(shares, self.terms.needed)


def _wrong(name: str) -> ProtocolError:
    return ProtocolError(
        f"the shares of {name!r} do not make the secret that it is bound to: a member has sent a wrong one",
        hint="Try the round again; if it comes again, a member is at fault.",
    )
