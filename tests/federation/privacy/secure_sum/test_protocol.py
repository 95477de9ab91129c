"""The whole protocol: exact for every pattern of lost members, refused beyond them, and nothing to see on the way."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from allmend.federation.privacy.secure_sum import ProtocolError, SecureMember, SecureSum
from allmend.federation.privacy.secure_sum.masks import dtype
from allmend.federation.privacy.secure_sum.messages import Keys, Neighbours, Opened, Sealed, Shares, Survivors

PHASES = ("keys", "shares", "masked", "opened")
MakeParties = Callable[..., Any]


def test_every_pattern_of_lost_members_leaves_an_exact_sum_or_none(make_parties: MakeParties) -> None:
    """5 members with threshold 3: each may be lost before any of the four phases, or never."""
    names = [f"m{i:03d}" for i in range(5)]
    exact = refused = 0
    for phases in itertools.product(("never", *PHASES), repeat=5):
        gone = sum(phase != "never" for phase in phases)
        if gone > 2 and list(phases) != sorted(phases):  # of those that must fail, one for each choice of phases
            continue
        parties = make_parties(5, threshold=3, length=3)
        lost: dict[str, list[str]] = {phase: [] for phase in PHASES}
        for name, phase in zip(names, phases, strict=True):
            if phase != "never":
                lost[phase].append(name)
        if gone > 2:
            with pytest.raises(ProtocolError, match=r"are (left|needed)"):
                parties.run(lost)
            assert parties.total.total is None
            refused += 1
            continue
        parties.run(lost)
        within = [name for name, phase in zip(names, phases, strict=True) if phase in ("never", "opened")]
        assert parties.total.survivors == within
        np.testing.assert_array_equal(parties.total.total, parties.sum_of(within))
        exact += 1
    assert exact == 1 + 5 * 4 + 10 * 4 * 4
    assert refused


@pytest.mark.parametrize("bits", [32, 64])
def test_a_sum_over_a_sparse_graph_is_exact_with_members_lost_in_every_phase(
    bits: int, make_parties: MakeParties
) -> None:
    parties = make_parties(40, bits=bits, length=1000)
    assert parties.terms.degree == 24 < 39
    lost = {"keys": ["m001"], "shares": ["m005"], "masked": ["m010", "m020"], "opened": ["m030"]}
    parties.run(lost)
    within = sorted(set(parties.members) - {"m001", "m005", "m010", "m020"})
    assert parties.total.survivors == within
    np.testing.assert_array_equal(parties.total.total, parties.sum_of(within))


def test_with_fewer_shares_than_the_threshold_the_sum_stays_hidden(make_parties: MakeParties) -> None:
    parties = make_parties(6, threshold=4, length=2000)
    with pytest.raises(ProtocolError, match="3 of the 6 in the neighbourhood"):
        parties.run({"opened": ["m000", "m001", "m002"]})
    assert parties.total.total is None
    assert not np.array_equal(parties.total._sum, parties.sum_of(list(parties.members)))


def test_a_masked_vector_looks_uniform_and_never_comes_again(make_parties: MakeParties) -> None:
    """Of a vector of zeros, and the same one twice."""
    seen = []
    for _ in range(2):
        parties = make_parties(5, length=2**16)
        for vector in parties.vectors.values():
            vector[:] = 0
        parties.run(until="masked")
        seen.append(parties.sent["masked"]["m000"][32:])
    assert seen[0] != seen[1]
    for masked in seen:
        counts = np.bincount(np.frombuffer(masked, dtype=np.uint8), minlength=256)
        assert chisquare(counts).pvalue > 1e-6
    # no member's mask is another's turned round: 16 of 2¹⁶ pairs of bytes agree by chance in each place of 2⁸
    first, second = (np.frombuffer(parties.sent["masked"][name][32:], dtype="<u4") for name in ("m000", "m001"))
    assert chisquare(np.bincount((first + second).view(np.uint8), minlength=256)).pvalue > 1e-6


def test_a_member_goes_on_although_another_sends_rubbish(make_parties: MakeParties) -> None:
    parties = make_parties(5, threshold=3)
    told = parties.run(until="shares")
    for name in ("m000", "m001", "m002", "m003"):
        parties.total.receive(name, parties.step("masked", told, name))
    for rubbish in (b"", b"\0" * 10, parties.sent["masked"]["m000"][:-1], b"\0" * 60):
        with pytest.raises(ProtocolError, match="member 'm004'"):
            parties.total.receive("m004", rubbish)
    told = parties.total.advance()
    for name in told:
        parties.total.receive(name, parties.step("opened", told, name))
    parties.total.advance()
    np.testing.assert_array_equal(parties.total.total, parties.sum_of(["m000", "m001", "m002", "m003"]))


def test_a_key_that_the_coordinator_puts_in_the_place_of_anothers_is_found_out(make_parties: MakeParties) -> None:
    parties = make_parties(5)
    told = parties.run(until="keys")
    terms = parties.terms
    middle = make_parties(5, session="of the one in the middle")
    forged = Keys.parse(middle.members["m001"].keys(), middle.terms.digest, of="m001")
    forged = forged.model_copy(update={"terms": terms.digest})
    bundle = Neighbours.parse(told["m000"], terms.digest, of="m000")
    swapped = [forged if keys.member == "m001" else keys for keys in bundle.keys]
    message = bundle.model_copy(update={"keys": swapped}).dump()
    with pytest.raises(ProtocolError, match=r"keys of 'm001' do not have its signature"):
        parties.members["m000"].shares(message)


@pytest.mark.parametrize("field", ["masks", "sealing", "commitment", "member"])
def test_the_signature_covers_every_field(field: str, make_parties: MakeParties) -> None:
    parties = make_parties(5)
    told = parties.run(until="keys")
    bundle = Neighbours.parse(told["m000"], parties.terms.digest, of="m000")
    first, second = bundle.keys[:2]
    changed = first.model_copy(update={field: getattr(second, field)})
    message = bundle.model_copy(update={"keys": [changed, *bundle.keys[1:]]}).dump()
    with pytest.raises(ProtocolError, match="signature"):
        parties.members["m000"].shares(message)


def test_a_key_that_agrees_on_the_same_with_everybody_is_refused(make_parties: MakeParties) -> None:
    """A public key of small order, signed by its member: what it agrees on is known to all."""
    for field in ("masks", "sealing"):
        parties = make_parties(5)
        terms = parties.terms
        keys = Keys.parse(parties.members["m001"].keys(), terms.digest, of="m001")
        keys = keys.model_copy(update={field: bytes(32)})
        keys = keys.model_copy(update={"signature": parties.identities["m001"].sign(keys.content)})
        with pytest.raises(ProtocolError, match="no public key to agree with"):
            parties.total.receive("m001", keys.dump())
        parties.members["m000"].keys()
        with pytest.raises(ProtocolError, match="no public key to agree with"):
            parties.members["m000"].shares(Neighbours(terms=terms.digest, keys=[keys]).dump())


def test_a_sum_of_two_is_not_opened(make_parties: MakeParties) -> None:
    for names, why in (
        (["m000", "m001"], "fewest"),
        (["m001", "m002", "m003"], "that it is not in"),
        (["m000", "m000", "m001", "m002"], "named twice"),
        (["m000", "m001", "m002", "x"], "no members"),
    ):
        parties = make_parties(5, threshold=3)
        parties.run(until="masked")
        message = Survivors(terms=parties.terms.digest, members=names).dump()
        with pytest.raises(ProtocolError, match=why):
            parties.members["m000"].opened(message)


def test_a_member_that_sent_no_shares_cannot_have_survived(make_parties: MakeParties) -> None:
    parties = make_parties(5, threshold=3)
    parties.run({"shares": ["m004"]}, until="masked")
    message = Survivors(terms=parties.terms.digest, members=sorted(parties.members)).dump()
    with pytest.raises(ProtocolError, match="m004 cannot have survived"):
        parties.members["m000"].opened(message)


def test_of_each_neighbour_one_secret_is_opened_and_only_once(make_parties: MakeParties) -> None:
    parties = make_parties(5, threshold=3)
    told = parties.run({"masked": ["m004"]}, until="masked")
    opened = Opened.parse(parties.members["m000"].opened(told["m000"]), parties.terms.digest, of="m000")
    assert set(opened.self_masks) == {"m000", "m001", "m002", "m003"}
    assert set(opened.keys) == {"m004"}
    others = Survivors(terms=parties.terms.digest, members=["m000", "m001", "m004"]).dump()
    for message in (told["m000"], others):  # the same question again, and the one that would complete the secrets
        with pytest.raises(ProtocolError, match="it is over"):
            parties.members["m000"].opened(message)


def test_two_stories_do_not_open_both_secrets_of_one_member(make_parties: MakeParties) -> None:
    """The coordinator tells half of the members that m004 survived, and the others that it did not."""
    for n, threshold in ((5, 3), (6, 4), (9, 6)):
        for told_without in range(n):
            parties = make_parties(n, threshold=threshold)
            parties.run(until="masked")
            names = sorted(parties.members)
            victim, digest = names[-1], parties.terms.digest
            replies = []
            for place, name in enumerate(names):
                if name != victim or place >= told_without:
                    survivors = names[:-1] if place < told_without else names
                    message = Survivors(terms=digest, members=survivors).dump()
                    replies.append(Opened.parse(parties.members[name].opened(message), digest, of=name))
            self_masks = sum(victim in reply.self_masks for reply in replies)
            keys = sum(victim in reply.keys for reply in replies)
            assert self_masks + keys == len(replies)
            assert min(self_masks, keys) < threshold


def test_messages_out_of_order_or_twice_are_refused(make_parties: MakeParties) -> None:
    parties = make_parties(5)
    member = parties.members["m000"]
    with pytest.raises(ProtocolError, match="'keys' comes next"):
        member.shares(b"")
    keys = parties.run(until="keys")
    with pytest.raises(ProtocolError, match="out of order"):
        member.keys()
    with pytest.raises(ProtocolError, match="'shares' comes next"):
        member.masked(b"", parties.vectors["m000"])
    with pytest.raises(ProtocolError, match="nobody waits for"):
        parties.total.receive("stranger", member.shares(keys["m000"]))
    parties.total.receive("m001", parties.members["m001"].shares(keys["m001"]))
    with pytest.raises(ProtocolError, match="nobody waits for"):
        parties.total.receive("m001", b"")


def test_messages_of_another_sum_are_refused(make_parties: MakeParties) -> None:
    """The same members and keys, another session: a replay."""
    first = make_parties(5)
    first.run()
    second = type(first)(
        type(first.terms)(session="next", members=first.terms.members, length=7), first.identities, first.vectors
    )
    told = dict.fromkeys(second.members, b"")
    for phase in PHASES:
        for name in second.members:
            with pytest.raises(ProtocolError, match="another sum"):
                second.total.receive(name, first.sent[phase][name])
            second.total.receive(name, second.step(phase, told, name))
        told = second.total.advance()
    np.testing.assert_array_equal(second.total.total, second.sum_of(list(second.members)))


def test_a_wrong_share_is_found_out(make_parties: MakeParties) -> None:
    for lost, kind in (({}, "self_masks"), ({"masked": ["m004"]}, "keys")):
        parties = make_parties(5, threshold=3)
        told = parties.run(lost, until="masked")
        for name in told:
            message = parties.members[name].opened(told[name])
            if name == "m000":
                opened = Opened.parse(message, parties.terms.digest, of=name)
                shares = {owner: bytes(16) for owner in getattr(opened, kind)}
                message = opened.model_copy(update={kind: shares}).dump()
            parties.total.receive(name, message)
        with pytest.raises(ProtocolError, match="do not make the secret"):
            parties.total.advance()


def test_a_box_that_was_changed_is_not_opened(make_parties: MakeParties) -> None:
    for changed, why in (
        ("m001", "the share that 'm001' sealed cannot be opened"),
        ("x", "'x', which has sent no keys"),
    ):
        parties = make_parties(5)
        told = parties.run(until="shares")
        boxes = Shares.parse(told["m000"], parties.terms.digest, of="m000").boxes
        message = Shares(terms=parties.terms.digest, boxes=boxes | {changed: boxes["m002"]}).dump()
        with pytest.raises(ProtocolError, match=why):
            parties.members["m000"].masked(message, parties.vectors["m000"])


def test_shares_for_others_than_the_neighbours_are_refused(make_parties: MakeParties) -> None:
    parties = make_parties(5)
    told = parties.run(until="keys")
    message = Sealed.parse(parties.members["m000"].shares(told["m000"]), parties.terms.digest, of="m000")
    boxes = dict(message.boxes)
    boxes.pop("m001")
    with pytest.raises(ProtocolError, match="others than its neighbours"):
        parties.total.receive("m000", message.model_copy(update={"boxes": boxes}).dump())


def test_a_member_needs_its_place_and_its_vector(make_parties: MakeParties) -> None:
    parties = make_parties(5)
    with pytest.raises(ValueError, match="do not have member 'm000' with this key"):
        SecureMember(parties.terms, "m000", Ed25519PrivateKey.generate())
    with pytest.raises(ValueError, match="do not have member 'x'"):
        SecureMember(parties.terms, "x", parties.identities["m000"])
    told = parties.run(until="shares")
    for wrong in (np.zeros(6, dtype=dtype(32)), np.zeros(7, dtype=dtype(64)), np.zeros(7)):
        with pytest.raises(ValueError, match="the vector must have 7"):
            parties.members["m000"].masked(told["m000"], wrong)
    # the mistake costs nothing
    parties.members["m000"].masked(told["m000"], parties.vectors["m000"])


def test_the_vector_stays_as_it_is(make_parties: MakeParties) -> None:
    parties = make_parties(5)
    before = {name: vector.copy() for name, vector in parties.vectors.items()}
    parties.run()
    for name, vector in parties.vectors.items():
        np.testing.assert_array_equal(vector, before[name])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_messages_end_in_one_clear_error_or_do_nothing(data: st.DataObject, make_parties: MakeParties) -> None:
    phase = data.draw(st.sampled_from(PHASES))
    parties = make_parties(3, threshold=2, length=2)
    told = (
        parties.run(until=PHASES[PHASES.index(phase) - 1]) if phase != "keys" else dict.fromkeys(parties.members, b"")
    )
    good = parties.step(phase, told, "m000")
    at = data.draw(st.integers(0, len(good) - 1))
    mutated = good[:at] + data.draw(st.binary(max_size=8)) + good[at + data.draw(st.integers(0, 8)) :]
    total: SecureSum = parties.total
    try:
        total.receive("m000", mutated)
    except ProtocolError:
        total.receive("m000", good)
