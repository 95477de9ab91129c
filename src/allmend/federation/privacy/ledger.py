"""The ledger of an arm: what its guarantees have cost after each round, and whether another round can be afforded."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from allmend.errors import UserError
from allmend.federation.member import Member
from allmend.federation.privacy.accounting import Release, epsilon, noise_for
from allmend.learn.private import sampling_rate
from allmend.learn.schedule import steps_per_round
from allmend.recipe import Arm, MemberPrivacy, Noise, RecordPrivacy
from allmend.results import MEMBERS


@dataclass(frozen=True)
class Account:
    """One guarantee and its price.

    Attributes:
        unit: what is protected, `record` or `member`.
        settings: of the layer.
        release: one noisy release.
        releases: how many of them so many rounds make.
        sampling: in words.
        rounds: of the whole run.
    """

    unit: str
    settings: Noise
    release: Release
    releases: Callable[[int], int]
    sampling: str
    rounds: int

    @property
    def whole(self) -> float:
        """ε after all rounds."""
        return self.epsilon(self.rounds)

    def epsilon(self, rounds: int) -> float:
        """ε at the recipe's δ after so many rounds; infinite without noise."""
        return epsilon(self.release, self.releases(rounds), self.settings.delta)


@dataclass(frozen=True)
class Ledger:
    """The accounts of an arm, by client, and under `MEMBERS` that of the guarantee for members.

    Attributes:
        accounts: by name.
        anew: whether clients that begin a round again draw new noise, so that both tries cost.
    """

    accounts: Mapping[str, Account] = field(default_factory=dict)
    anew: bool = False

    def spent(self, took_part: Mapping[str, int], rounds: int) -> dict[str, float]:
        """ε of each account that has noise.

        Args:
            took_part: rounds that each client has begun to train in.
            rounds: rounds in all.
        """
        found = {}
        for name, account in self.accounts.items():
            value = account.epsilon(rounds if name == MEMBERS else took_part.get(name, 0))
            if math.isfinite(value):
                found[name] = value
        return found

    def exhausted(self, took_part: Mapping[str, int], rounds: int, next_round: Iterable[str]) -> list[str]:
        """Accounts whose budget another round, in which `next_round` train, would exceed."""
        after = {**took_part, **{name: took_part.get(name, 0) + 1 for name in next_round}}
        spent = self.spent(after, rounds + 1)
        budgets = {name: account.settings.epsilon for name, account in self.accounts.items()}
        return [name for name, value in spent.items() if (budget := budgets[name]) is not None and value > budget]


NO_LEDGER = Ledger()
"""Of an arm without guarantees."""


def open_ledger(arm: Arm, members: Sequence[Member]) -> Ledger:
    """The accounts of an arm's guarantees; noise that the recipe leaves open is what its budget needs for all rounds.

    Args:
        arm: whose strategy's members are `members`.
        members: with the records that they train on.

    Raises:
        UserError: not even one round fits into the budget.
    """
    accounts: dict[str, Account] = {}
    if arm.privacy.record is not None:
        accounts |= {member.name: _of_records(arm, arm.privacy.record, member) for member in members}
    if arm.privacy.member is not None:
        accounts[MEMBERS] = member_account(arm, arm.privacy.member)
    for name, account in accounts.items():
        budget, first = account.settings.epsilon, account.epsilon(1)
        if budget is not None and first > budget:
            raise UserError(
                f"one round costs ε = {first:.3g}, more than the budget of {budget:g} (δ = {account.settings.delta:g})",
                where=_whose(arm, name),
                hint="Raise epsilon or noise_multiplier, or take fewer or smaller steps in a round.",
            )
    anew = arm.privacy.record is not None and arm.privacy.randomness == "secure"
    return Ledger(accounts, anew)


def member_account(arm: Arm, settings: MemberPrivacy) -> Account:
    """The account of DP-FedAvg."""
    fraction = float(arm.strategy.options.get("participation", 1.0))
    rate = fraction if fraction < 1 else None
    words = (
        f"each round draws every member with probability {fraction:g}, independently (Poisson)"
        if rate
        else "every member takes part in every round: no amplification by sampling"
    )
    skellam = arm.privacy.secure_aggregation is not None
    if skellam:
        rate = None
        words = "members add their shares of the noise before the sum is formed; no amplification by sampling"
    multiplier = _multiplier(settings, rate, arm.strategy.rounds, _whose(arm, MEMBERS), skellam=skellam)
    release = Release(multiplier, rate, skellam)
    return Account("member", settings, release, lambda rounds: rounds, words, arm.strategy.rounds)


def _of_records(arm: Arm, settings: RecordPrivacy, member: Member) -> Account:
    steps = steps_per_round(len(member.records), arm.train)
    records = max(1, sum(record.learns for record in member.records))
    if settings.sampling == "poisson":
        rate = sampling_rate(records, arm.train.batch_size)
        words = f"each step draws every record with probability {rate:.3g}, independently (Poisson)"
        multiplier = _multiplier(settings, rate, arm.strategy.rounds * steps, _whose(arm, member.name))
        return Account(
            "record", settings, Release(multiplier, rate), lambda rounds: rounds * steps, words, arm.strategy.rounds
        )
    per_epoch = math.ceil(records / arm.train.batch_size)
    passes: Callable[[int], int] = lambda rounds: math.ceil(rounds * steps / per_epoch)  # noqa: E731
    # without a record, all batches behind it would shift: the bound is for one that is emptied in its place
    words = (
        "records are shuffled, which is no Poisson sampling: every pass counts in full, without amplification, and the "
        "guarantee is against a record that is empty rather than absent"
    )
    multiplier = _multiplier(settings, None, passes(arm.strategy.rounds), _whose(arm, member.name))
    return Account("record", settings, Release(multiplier, None), passes, words, arm.strategy.rounds)


def _multiplier(settings: Noise, rate: float | None, times: int, where: str, *, skellam: bool = False) -> float:
    if settings.noise_multiplier is not None:
        return settings.noise_multiplier
    assert settings.epsilon is not None  # the recipe has one of the two
    try:
        return noise_for(rate=rate, times=times, epsilon=settings.epsilon, delta=settings.delta, skellam=skellam)
    except UserError as error:
        raise UserError(error.what, where=where, hint=error.hint) from None


def _whose(arm: Arm, account: str) -> str:
    return f"arm {arm.name!r}, {'members' if account == MEMBERS else f'client {account!r}'}"
