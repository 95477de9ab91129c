"""An arm: what it tells, what it saves, and that it leaves the base model as it was."""

import math
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file

from allmend.events import ArmStarted, Event, PhaseDone, RoundDone, StepDone, Warned, WorkDone
from allmend.federation.arm import Training, save_outcomes, strategy_of, tokens_per_round, train_arm, trainable_of
from allmend.federation.checkpoint import Checkpoint, Checkpoints
from allmend.federation.member import Member
from allmend.federation.privacy.accounting import noise_for
from allmend.federation.privacy.ledger import open_ledger
from allmend.federation.strategies.fedavg import FedAvg
from allmend.federation.strategies.private_fedavg import PrivateFedAvg
from allmend.models.load import LoadedModel
from allmend.models.tensors import Tensors
from allmend.recipe import (
    Adapter,
    Arm,
    Deduplicate,
    Engine,
    Goldfish,
    MemberPrivacy,
    Privacy,
    RecordPrivacy,
    SecureAggregation,
    StrategyChoice,
    Train,
)
from allmend.strategy import State, Sums, Turn, of_group


def make_arm(strategy: str, train: Train, *, privacy: Privacy | None = None, rounds: int = 2, **options: Any) -> Arm:
    choice = StrategyChoice.model_validate({"name": strategy, "rounds": rounds, **options})
    return Arm("arm", Adapter(rank=2), train, choice, privacy or Privacy())


@dataclass
class Trained:
    """What came of an arm."""

    training: Training
    events: list[Event]
    last: Checkpoint

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def shared(self) -> Tensors:
        tensors = self.training.outcomes[None]
        assert tensors is not None
        return tensors


MakeTrained = Callable[..., Trained]


@pytest.fixture
def trained(loaded: LoadedModel, tmp_path: Path) -> MakeTrained:
    """Train an arm over members, in a folder of its own by default."""

    def train(arm: Arm, members: Sequence[Member], *, folder: str | None = None) -> Trained:
        events: list[Event] = []
        checkpoints = Checkpoints(tmp_path / (folder or uuid.uuid4().hex), "id")
        with trainable_of(loaded, arm.adapter, seed=0) as trainable:
            training = train_arm(
                arm, trainable, members, seed=0, engine=Engine(), checkpoints=checkpoints, emit=events.append
            )
        last = checkpoints.newest()
        assert last is not None
        return Trained(training, events, last)

    return train


def equal(first: Tensors, second: Tensors) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def loaded(make_tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> LoadedModel:
    return LoadedModel(make_tiny_model(), tiny_tokenizer, "tiny", tmp_path / "tiny", "digest")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_base_is_as_it_was_whatever_happened(kind: Any, loaded: LoadedModel, settings: Train) -> None:
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}

    def breaks() -> None:
        with trainable_of(loaded, Adapter(kind=kind), seed=0) as trainable:
            assert trainable.kind == kind
            with torch.no_grad():
                for parameter in trainable.parameters().values():
                    parameter += 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        breaks()
    after = loaded.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_the_seed_and_options_reach_the_strategy(settings: Train) -> None:
    strategy = strategy_of(make_arm("fedavg", settings, participation=0.5), seed=9)
    assert (strategy.name, strategy.participation, strategy.seed) == ("fedavg", 0.5, 9)  # type: ignore[attr-defined]


@pytest.mark.parametrize("strategy", ["fedavg", "local"])
def test_an_arm_tells_every_step_and_round_and_saves_its_outcomes(
    strategy: str, loaded: LoadedModel, make_member: Callable[..., Any], settings: Train, tmp_path: Path
) -> None:
    arm, events = make_arm(strategy, settings), list[Event]()
    members = [make_member("a", records=3), make_member("b", records=5)]
    checkpoints = Checkpoints(tmp_path, "id")
    with trainable_of(loaded, arm.adapter, seed=0) as trainable:
        outcomes = train_arm(
            arm, trainable, members, seed=0, engine=Engine(), checkpoints=checkpoints, emit=events.append
        ).outcomes
        save_outcomes(tmp_path, outcomes, trainable, "tiny")
    assert events[0] == ArmStarted(arm="arm", strategy=strategy, round=1, rounds=2, trainable=trainable.count)
    assert isinstance(events[-1], PhaseDone)
    steps = [event for event in events if isinstance(event, StepDone)]
    rounds = [event for event in events if isinstance(event, RoundDone)]
    assert [(e.client, e.round, e.step) for e in steps] == [
        *(("a", 1, 1), ("a", 1, 2), ("b", 1, 1), ("b", 1, 2), ("b", 1, 3)),
        *(("a", 2, 3), ("a", 2, 4), ("b", 2, 4), ("b", 2, 5), ("b", 2, 6)),
    ]
    for event in rounds:
        own = [step for step in steps if step.round == event.round]
        assert event.tokens == sum(step.tokens for step in own)
        assert event.loss is not None
        assert min(step.loss for step in own) <= event.loss <= max(step.loss for step in own)
    # all records once a round, for whole epochs
    everything = sum(len(record) for member in members for record in member.records)
    assert [event.tokens for event in rounds] == [everything, everything]
    shares = [event.share for event in events if isinstance(event, WorkDone)]
    assert shares == sorted(shares)
    assert tokens_per_round(arm, members) == pytest.approx(everything, rel=0.4)  # an estimate, for the time left
    names = {None: "adapter"} if strategy == "fedavg" else {name: f"members/{name}/adapter" for name in ("a", "b")}
    assert outcomes.keys() == names.keys()
    for name, folder in names.items():
        saved = load_file(tmp_path / folder / "adapter_model.safetensors")
        tensors = outcomes[name]
        assert tensors is not None
        assert saved.keys() == tensors.keys()
        assert all(torch.equal(saved[key], tensors[key]) for key in saved)


def test_a_trained_arm_trains_no_more(trained: MakeTrained, make_member: Callable[..., Any], settings: Train) -> None:
    arm, members = make_arm("fedavg", settings), [make_member("a")]
    first, second = (trained(arm, members, folder="same") for _ in range(2))
    assert equal(first.shared, second.shared)
    assert first.training.learnt == second.training.learnt
    assert not second.of(StepDone)
    assert not second.of(RoundDone)
    assert isinstance(second.events[0], ArmStarted)
    assert second.events[0].round == 3


# --- what was learnt from


def test_every_record_is_learnt_from_once_an_epoch(
    trained: MakeTrained, make_member: Callable[..., Any], settings: Train
) -> None:
    """Closed form: each pass sees each record in one step, with all its tokens but the first."""
    members = [make_member("a", records=3), make_member("b", records=5)]
    for epochs in (1.0, 2.0):
        arm = make_arm("fedavg", settings.model_copy(update={"local_epochs": epochs}))
        assert trained(arm, members).training.learnt == {
            record.id: (2 * epochs, 2 * epochs * (len(record) - 1)) for member in members for record in member.records
        }


def test_copies_with_one_id_are_counted_together_and_what_no_step_saw_is_not_there(
    trained: MakeTrained, make_member: Callable[..., Any], settings: Train
) -> None:
    one, other = make_member("a", records=2), make_member("b", records=4)
    twice = replace(one, records=[one.records[0], one.records[0], one.records[1]])
    few = settings.model_copy(update={"local_steps": 1, "batch_size": 1})
    found = trained(make_arm("fedavg", settings), [twice]).training.learnt
    assert found == {
        one.records[0].id: (4, 4 * (len(one.records[0]) - 1)),
        one.records[1].id: (2, found[one.records[1].id][1]),
    }
    seen = trained(make_arm("fedavg", few), [other]).training.learnt
    assert sum(steps for steps, _ in seen.values()) == 2
    assert set(seen) < {record.id for record in other.records}


# --- guarantees for records

SMALL = RecordPrivacy(noise_multiplier=1.0, delta=1e-2)


def test_no_loss_is_told_of_an_arm_with_a_guarantee_and_its_price_is(
    trained: MakeTrained, make_member: Callable[..., Any], settings: Train
) -> None:
    members = [make_member("a", records=4), make_member("b", records=8)]
    for privacy, accounts in (
        (Privacy(record=SMALL), {"a", "b"}),
        (Privacy(member=MemberPrivacy(noise_multiplier=1.0)), {"members"}),
        (Privacy(record=RecordPrivacy(noise_multiplier=0.0)), set()),
    ):
        arm = make_arm("fedavg", settings, privacy=privacy, rounds=3)
        rounds = trained(arm, members).of(RoundDone)
        ledger = open_ledger(arm, members)
        assert [event.loss for event in rounds] == [None] * 3
        for event in rounds:
            assert event.epsilon.keys() == accounts
            assert event.epsilon == {name: ledger.accounts[name].epsilon(event.round) for name in accounts}
        if "b" in accounts:
            assert rounds[0].epsilon["a"] > rounds[0].epsilon["b"]  # a larger share of its records in each step
    assert all(event.loss is not None for event in trained(make_arm("fedavg", settings), members).of(RoundDone))


def test_a_step_on_an_empty_sample_is_taken_and_has_no_loss_to_tell(
    trained: MakeTrained, make_member: Callable[..., Any], settings: Train
) -> None:
    arm = make_arm("fedavg", settings.model_copy(update={"batch_size": 1}), privacy=Privacy(record=SMALL), rounds=3)
    found = trained(arm, [make_member("a", records=4)])
    steps = found.of(StepDone)
    assert found.last.members["a"].facts["steps"] == 3 * 4
    assert 0 < len(steps) < 3 * 4  # (1 − 1/4)⁴: a third of the samples are empty
    assert {event.step for event in steps} < set(range(1, 13))


def test_without_clip_and_noise_the_guarantees_change_no_bit(
    trained: MakeTrained, make_member: Callable[..., Any], settings: Train
) -> None:
    """σ = 0 and C = ∞: plain training by the mean over records, and, with equal members, plain averaging."""
    members = [make_member("a"), make_member("b")]
    mean = settings.model_copy(update={"loss_mean": "record"})
    plain = trained(make_arm("fedavg", mean), members).shared
    record = Privacy(record=RecordPrivacy(clip=math.inf, noise_multiplier=0.0, sampling="shuffle"))
    assert equal(trained(make_arm("fedavg", settings, privacy=record), members).shared, plain)
    member = Privacy(member=MemberPrivacy(clip=math.inf, noise_multiplier=0.0))
    averaged = trained(make_arm("fedavg", mean, privacy=member), members).shared
    for name, tensor in plain.items():
        # updates of some hundredths are rounded to float32 in one of the two, whatever they are added to
        torch.testing.assert_close(averaged[name], tensor, rtol=1e-6, atol=5e-8)
    assert not equal(trained(make_arm("fedavg", settings), members).shared, plain)


def test_private_training_can_be_repeated_where_it_is_seeded_and_not_where_it_is_secure(
    trained: MakeTrained, make_member: Callable[..., Any], settings: Train
) -> None:
    members = [make_member("a"), make_member("b")]
    for layers in ({"record": SMALL}, {"member": MemberPrivacy(noise_multiplier=1.0)}, {"weight_noise": 0.1}):
        seeded, secure = (
            make_arm("fedavg", settings, privacy=Privacy.model_validate(layers | {"randomness": randomness}), rounds=1)
            for randomness in ("seeded", "secure")
        )
        one = trained(seeded, members).shared
        assert equal(trained(seeded, members).shared, one)
        assert not equal(trained(secure, members).shared, trained(secure, members).shared)


def test_the_noise_is_what_the_ledger_pays_for(
    trained: MakeTrained, make_member: Callable[..., Any], settings: Train
) -> None:
    """Without Poisson sampling nothing but the noise depends on the multiplier, and a budget is worth one."""
    members = [make_member("a")]
    layer = {"sampling": "shuffle", "delta": 1e-2}

    def outcome(**choice: float) -> Tensors:
        arm = make_arm("fedavg", settings, privacy=Privacy.model_validate({"record": layer | choice}), rounds=3)
        return trained(arm, members).shared

    silent, one, two = (outcome(noise_multiplier=multiplier) for multiplier in (0.0, 1.0, 2.0))
    assert not equal(silent, one)
    assert not equal(one, two)
    assert equal(outcome(epsilon=5.0), outcome(noise_multiplier=noise_for(rate=None, times=3, epsilon=5.0, delta=1e-2)))


def test_layers_on_records_come_before_training_and_are_told(
    trained: MakeTrained, make_member: Callable[..., Any], settings: Train
) -> None:
    one = make_member("a", records=6)
    twice = replace(one, records=[*one.records, *one.records])
    found = trained(make_arm("fedavg", settings, privacy=Privacy(deduplicate=Deduplicate())), [twice])
    plain = trained(make_arm("fedavg", settings), [one])
    assert found.training.learnt == plain.training.learnt  # each record in one step of each round
    assert equal(found.shared, plain.shared)
    assert plain.training.layers == ()
    assert "6 equal and 0 similar of 12" in found.training.layers[0]
    goldfish = make_arm("fedavg", settings, privacy=Privacy(goldfish=Goldfish(k=2, context=1)))
    some = trained(goldfish, [one]).training.learnt
    everything = sum(tokens for _, tokens in plain.training.learnt.values())
    assert 0.2 * everything < sum(tokens for _, tokens in some.values()) < 0.8 * everything
    assert all(some[name][1] <= tokens for name, (_, tokens) in plain.training.learnt.items() if name in some)


def test_members_draw_noise_of_their_own(
    trained: MakeTrained, make_member: Callable[..., Any], settings: Train
) -> None:
    """Two members with the same records but seeds of their own: what is added to one cannot be taken off the other."""
    one = make_member("a")
    other = replace(one, name="b", seed=one.seed + 1)
    arm = make_arm("local", settings, privacy=Privacy(record=SMALL), rounds=1)
    outcomes = trained(arm, [one, other]).training.outcomes
    assert outcomes["a"] is not None
    assert outcomes["b"] is not None
    assert not equal(outcomes["a"], outcomes["b"])


def test_noise_on_the_weights_comes_last_and_leaves_the_checkpoint_alone(
    trained: MakeTrained, make_member: Callable[..., Any], settings: Train
) -> None:
    members = [make_member("a"), make_member("b")]
    plain = trained(make_arm("fedavg", settings), members)
    noisy = trained(make_arm("fedavg", settings, privacy=Privacy(weight_noise=0.1)), members)
    kept = of_group("model", noisy.last.server.tensors)
    assert equal(kept, plain.shared)
    noise = torch.cat([(noisy.shared[name] - kept[name]).flatten() for name in kept])
    assert noise.std().item() == pytest.approx(0.1, rel=4.5 / math.sqrt(2 * noise.numel()))
    own = trained(make_arm("local", settings, privacy=Privacy(weight_noise=0.1)), members).training.outcomes
    assert set(own) == {"a", "b"}


def test_a_guarantee_for_members_is_for_averaging_alone(settings: Train) -> None:
    for name in ("local", "centralised"):
        with pytest.raises(ValueError, match=rf"privacy\.member is for fedavg, and this is '{name}'"):
            strategy_of(make_arm(name, settings, privacy=Privacy(member=MemberPrivacy(epsilon=1.0))), seed=0)


def test_the_layer_and_the_seed_reach_the_private_strategy(settings: Train) -> None:
    layer = MemberPrivacy(clip=0.3, epsilon=5.0, delta=1e-3, quantile=0.4)
    arm = make_arm("fedavg", settings, privacy=Privacy(member=layer, randomness="secure"), participation=0.5, rounds=4)
    strategy = strategy_of(arm, seed=9)
    assert isinstance(strategy, PrivateFedAvg)
    multiplier = noise_for(rate=0.5, times=4, epsilon=5.0, delta=1e-3)
    assert strategy == PrivateFedAvg(
        clip=0.3, noise_multiplier=multiplier, participation=0.5, quantile=0.4, randomness="secure", seed=9
    )


@pytest.mark.parametrize("layer", [{"quantile": 0.5, "epsilon": 5.0}, {"clip": math.inf, "noise_multiplier": 0.0}])
def test_out_of_sight_a_guarantees_clip_is_a_number_that_stays(layer: dict[str, float], settings: Train) -> None:
    privacy = Privacy(member=MemberPrivacy(**layer), secure_aggregation=SecureAggregation())
    with pytest.raises(ValueError, match="must be a number and stay as it is"):
        strategy_of(make_arm("fedavg", settings, privacy=privacy), seed=0)


# --- budgets


@pytest.mark.parametrize("unit", ["record", "member"])
def test_the_budget_ends_the_training_before_it_is_exceeded_and_goes_on_ending_it(
    unit: str, trained: MakeTrained, make_member: Callable[..., Any], settings: Train
) -> None:
    members = [make_member("a"), make_member("b", records=6)]
    layer = {"noise_multiplier": 2.0, "delta": 1e-2}
    free = open_ledger(make_arm("fedavg", settings, privacy=Privacy.model_validate({unit: layer}), rounds=9), members)
    # three rounds fit into it, four do not
    budget = max(account.epsilon(3) for account in free.accounts.values()) * 1.001
    arm = make_arm("fedavg", settings, privacy=Privacy.model_validate({unit: layer | {"epsilon": budget}}), rounds=9)
    found = trained(arm, members, folder="same")
    rounds = found.of(RoundDone)
    assert [event.round for event in rounds] == [1, 2, 3]
    spent = [max(event.epsilon.values()) for event in rounds]
    assert spent == sorted(spent)
    assert spent[-1] <= budget < max(account.epsilon(4) for account in free.accounts.values())
    (warned,) = found.of(Warned)
    assert "budget ends the training after round 3 of 9" in warned.message
    assert ("a" if unit == "record" else "members") in warned.message
    assert found.last.round == 3
    assert found.last.took_part == {"a": 3, "b": 3}
    # whoever goes on meets the same end, with the same model
    again = trained(arm, members, folder="same")
    assert not again.of(RoundDone)
    assert again.of(Warned) == found.of(Warned)
    assert equal(again.shared, found.shared)
    assert equal(found.shared, trained(make_arm("fedavg", settings, privacy=arm.privacy, rounds=9), members).shared)


@pytest.mark.parametrize("unit", ["record", "member"])
def test_noise_that_is_chosen_for_a_budget_lasts_for_all_rounds(
    unit: str, trained: MakeTrained, make_member: Callable[..., Any], settings: Train
) -> None:
    members = [make_member("a"), make_member("b", records=6)]
    privacy = Privacy.model_validate({unit: {"epsilon": 3.0, "delta": 1e-2}})
    found = trained(make_arm("fedavg", settings, privacy=privacy, rounds=4), members)
    assert not found.of(Warned)
    for name, spent in found.of(RoundDone)[-1].epsilon.items():
        assert 0.97 * 3.0 < spent <= 3.0, name


class PowerCutError(Exception):
    pass


@pytest.mark.parametrize("randomness", ["seeded", "secure"])
def test_a_round_that_is_broken_off_is_paid_for_where_its_noise_does_not_come_again(
    randomness: Literal["seeded", "secure"],
    trained: MakeTrained,
    make_member: Callable[..., Any],
    settings: Train,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    members = [make_member("a"), make_member("b")]
    privacy = Privacy(record=RecordPrivacy(noise_multiplier=2.0, delta=1e-2), randomness=randomness)
    arm = make_arm("fedavg", settings, privacy=privacy, rounds=3)
    price = open_ledger(arm, members).accounts["a"].epsilon

    def cut(strategy: FedAvg, state: State, turn: Turn, sums: Sums, seen: Any) -> State:
        if turn.round == 2:
            raise PowerCutError
        return combine(strategy, state, turn, sums, seen)

    combine = FedAvg.combine
    with monkeypatch.context() as patch:
        patch.setattr(FedAvg, "combine", cut)
        for _ in range(2):
            with pytest.raises(PowerCutError):
                trained(arm, members, folder="same")
    found = trained(arm, members, folder="same")
    tries = [2, 3] if randomness == "seeded" else [4, 5]
    assert [event.took_part for event in found.of(RoundDone)] == [{"a": n, "b": n} for n in tries]
    assert [event.epsilon["a"] for event in found.of(RoundDone)] == [price(n) for n in tries]
