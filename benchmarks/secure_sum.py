"""What a secure sum costs, by phase, for each member and for the coordinator, with members lost on the way.

All parties run in one process, one after the other, so that each phase's time is the work of one party and not the
wait for others. The sum is checked to be exact.

    python benchmarks/secure_sum.py [--quick]
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from _measure import machine
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a shorter vector, one run")
    parser.add_argument("--members", type=int, default=32)
    parser.add_argument("--length", type=int, default=1_000_000)
    parser.add_argument("--lost", type=int, default=3, help="members lost before their vectors come")
    options = parser.parse_args()
    length, runs = (50_000, 1) if options.quick else (options.length, 3)
    print(machine())
    identities = {f"m{place}": Ed25519PrivateKey.generate() for place in range(options.members)}
    public = {name: key.public_key().public_bytes_raw() for name, key in identities.items()}
    for bits in (32, 64):
        clock = Clock()
        for run in range(runs):
            terms = Terms(session=f"{bits}/{run}", members=public, length=length, bits=bits)
            one_sum(clock, terms, identities, options.lost)
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


if __name__ == "__main__":
    main()
