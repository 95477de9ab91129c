"""What a secure sum costs, by phase, for each member and for the coordinator, with members lost on the way.

All parties run in one process, one after the other, so that each phase's time is the work of one party and not the
wait for others. The sum is checked to be exact. The primitives of Flower's SecAgg+ form the same sum beside it. Before
that: how often a sum fails for want of shares, when members are lost at random.

    python benchmarks/secure_sum.py [--quick]
"""

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import dequantize, quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen, share_keys_plaintext_concat
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, generate_key_pairs, private_key_to_bytes

from _measure import figure, machine
from allmend.federation.privacy import FixedPoint, SecureMember, SecureSum, Terms

T = TypeVar("T")


class Clock:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def __call__(self, what: str, work: Callable[[], T]) -> T:
        start = time.perf_counter()
        done = work()
        self.seconds[what].append(time.perf_counter() - start)
        return done


def one_sum(clock: Clock, terms: Terms, identities: dict[str, Ed25519PrivateKey], lost: int) -> None:
    """One sum; the last `lost` members fall silent before their vectors come."""
    code = FixedPoint(clip=1.0, members=len(identities), bits=terms.bits)
    values = {name: np.random.default_rng(place).uniform(-1, 1, terms.length) for place, name in enumerate(identities)}
    uniform = np.random.default_rng(0).random
    coded = {name: clock("member: encode", partial(code.encode, x, uniform))[0] for name, x in values.items()}
    members = {name: SecureMember(terms, name, key) for name, key in identities.items()}
    total = SecureSum(terms)
    gone = set(list(identities)[len(identities) - lost :])
    told: dict[str, bytes] = {}
    for phase in ("keys", "shares", "masked", "opened"):
        for name, member in members.items():
            if phase in ("masked", "opened") and name in gone:
                continue
            arguments = ([told[name]] if told else []) + ([coded[name]] if phase == "masked" else [])
            message = clock(f"member: {phase}", partial(getattr(member, phase), *arguments))
            clock(f"coordinator: receive {phase}", partial(total.receive, name, message))
        told = clock(f"coordinator: end {phase}", total.advance)
    plain = np.zeros(terms.length, dtype=coded[next(iter(coded))].dtype)
    for name in set(identities) - gone:
        plain += coded[name]
    assert total.total is not None
    assert np.array_equal(total.total, plain), "the sum is exact"


MODULUS, LEVELS = 2**32, 2**22
"""Flower's defaults of `mod_range` and `quantization_range`."""


def one_sum_of_flower(clock: Clock, terms: Terms, lost: int) -> None:
    """The same sum from the primitives of Flower's SecAgg+, in the order in which its client and workflow use them.

    Masks run between the same neighbours with the same threshold; the last `lost` fall silent at the same point.
    """
    names, near = sorted(terms.members), terms.neighbourhoods
    values = {name: np.random.default_rng(place).uniform(-1, 1, terms.length) for place, name in enumerate(names)}
    pairs = {name: clock("flower member: keys", lambda: (generate_key_pairs(), generate_key_pairs())) for name in names}
    seeds = {name: os.urandom(32) for name in names}
    shape = [(terms.length,)]

    def shares(name: str) -> dict[str, tuple[bytes, bytes, bytes]]:
        holders = [name, *near[name]]
        of_seed = create_shares(seeds[name], terms.needed, len(holders))
        of_key = create_shares(private_key_to_bytes(pairs[name][0][0]), terms.needed, len(holders))
        found = {}
        for place, holder in enumerate(holders):
            sealed = b""
            if holder != name:
                key = generate_shared_key(pairs[name][1][0], pairs[holder][1][1])
                sealed = encrypt(key, share_keys_plaintext_concat(1, 2, of_seed[place], of_key[place]))
            found[holder] = sealed, of_seed[place], of_key[place]
        return found

    given = {name: clock("flower member: shares", partial(shares, name)) for name in names}
    gone = set(names[len(names) - lost :])

    def masked(name: str) -> Any:
        for other in near[name]:
            decrypt(generate_shared_key(pairs[name][1][0], pairs[other][1][1]), given[other][name][0])
        vector = quantize([values[name]], 1.0, LEVELS)
        vector = parameters_addition(vector, pseudo_rand_gen(seeds[name], MODULUS, shape))
        for other in near[name]:
            key = generate_shared_key(pairs[name][0][0], pairs[other][0][1])
            add = parameters_addition if name > other else parameters_subtraction
            vector = add(vector, pseudo_rand_gen(key, MODULUS, shape))
        return parameters_mod(vector, MODULUS)

    total = [np.zeros(terms.length, dtype=np.int64)]
    for name in names:
        if name not in gone:
            vector = clock("flower member: masked", partial(masked, name))
            total = clock("flower coordinator: receive masked", partial(parameters_addition, total, vector))

    def opened() -> Any:
        result = total
        for name in names:
            kind = 2 if name in gone else 1
            holders = [holder for holder in (name, *near[name]) if holder not in gone][: terms.needed]
            secret = combine_shares([given[name][holder][kind] for holder in holders])
            if name not in gone:
                result = parameters_subtraction(result, pseudo_rand_gen(secret, MODULUS, shape))
                continue
            private = bytes_to_private_key(secret)
            for other in set(near[name]) - gone:
                mask = pseudo_rand_gen(generate_shared_key(private, pairs[other][0][1]), MODULUS, shape)
                result = (parameters_addition if name > other else parameters_subtraction)(result, mask)
        return parameters_mod(result, MODULUS)

    found = clock("flower coordinator: end opened", opened)
    there = [name for name in names if name not in gone]
    (mean,) = dequantize(found, 1.0, LEVELS)
    plain = sum(values[name] for name in there)
    assert np.allclose(mean - (len(there) - 1), plain, atol=1e-4)


def failed(members: int, threshold: str, lost: float, draws: int) -> float:
    """Share of sums in which some member's neighbourhood has fewer than the threshold left."""
    public = {f"m{place}": place.to_bytes(32, "big") for place in range(members)}
    terms = Terms(session="failures", members=public, length=1)
    needed = terms.needed if threshold == "two thirds" else terms.lowest_threshold
    place = {name: number for number, name in enumerate(public)}
    neighbourhoods = np.array(
        [[place[name], *map(place.get, terms.neighbourhoods[name])] for name in public], dtype=int
    )
    generator = np.random.default_rng(0)
    found = 0
    for _ in range(draws):
        there = np.ones(members, dtype=int)
        there[generator.choice(members, round(lost * members), replace=False)] = 0
        found += int(there[neighbourhoods].sum(axis=1).min() < needed)
    return found / draws


def print_failures(draws: int) -> None:
    shares = (0.05, 0.1, 0.2, 0.3)
    print(f"\nsums that fail when members are lost at random, of {draws:,} draws:")
    print(f"  {'members':>8s} {'threshold':>12s} " + " ".join(f"{share:>8.0%}" for share in shares))
    for members in (8, 16, 40, 100, 256, 1000):
        for threshold in ("two thirds", "lowest"):
            row = [failed(members, threshold, share, draws) for share in shares]
            print(f"  {members:8d} {threshold:>12s} " + " ".join(f"{value:8.1%}" for value in row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a shorter vector, one run")
    parser.add_argument("--members", type=int, default=32)
    parser.add_argument("--length", type=int, default=1_000_000)
    parser.add_argument("--lost", type=int, default=3, help="members lost before their vectors come")
    options = parser.parse_args()
    length, runs = (50_000, 1) if options.quick else (options.length, 3)
    print(machine())
    print_failures(200 if options.quick else 5000)
    identities = {f"m{place}": Ed25519PrivateKey.generate() for place in range(options.members)}
    public = {name: key.public_key().public_bytes_raw() for name, key in identities.items()}
    for bits in (32, 64):
        clock = Clock()
        for run in range(runs):
            terms = Terms(session=f"{bits}/{run}", members=public, length=length, bits=bits)
            one_sum(clock, terms, identities, options.lost)
            if bits == 32:
                one_sum_of_flower(clock, terms, options.lost)
        print(
            f"\n{options.members} members, {length:,} numbers of {bits} bits, {terms.degree} neighbours, threshold "
            f"{terms.needed}, {options.lost} lost before their vectors came, {runs} runs; milliseconds, median (range):"
        )
        for what, seconds in clock.seconds.items():
            low, high = min(seconds), max(seconds)
            print(f"  {what:28s} {1e3 * statistics.median(seconds):8.1f}  ({1e3 * low:.1f} to {1e3 * high:.1f})")
        each = sum(statistics.median(seconds) for what, seconds in clock.seconds.items() if what.startswith("member"))
        received = sum(sum(seconds) for what, seconds in clock.seconds.items() if what.startswith("coordinator"))
        print(f"  a member in all: {each:.2f} s; the coordinator: {received / runs:.2f} s")
        if bits == 32:
            theirs = sum(statistics.median(s) for what, s in clock.seconds.items() if what.startswith("flower member"))
            rest = sum(sum(s) for what, s in clock.seconds.items() if what.startswith("flower coordinator"))
            print(f"  Flower's primitives: a member in all: {theirs:.2f} s; the coordinator: {rest / runs:.2f} s")
            figure(
                f"a secure sum of {length:,} numbers over {options.members} members against Flower's primitives",
                f"a member {theirs / each:.1f} times as fast: {each:.2f} against {theirs:.2f} s; the coordinator "
                f"{rest / received:.1f} times: {received / runs:.2f} against {rest / runs:.2f} s",
            )


if __name__ == "__main__":
    main()
