"""The engine between machines against the one in this process, and members that fail."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from allmend.errors import UserError
from allmend.events import Warned, read_events
from allmend.federation.checkpoint import Checkpoints
from allmend.federation.collaboration.state import members_of
from allmend.federation.engines.flower.engine import FlowerEngine
from allmend.federation.engines.flower.site import ArmAtMember, Site
from allmend.federation.engines.wire import dump_reply, parse_reply, parse_task
from allmend.federation.strategies import STRATEGIES, build_strategy
from allmend.federation.strategies.cobo import CoBo
from allmend.federation.strategies.comigs import CoMiGS
from allmend.federation.strategies.fedavg import FedAvg
from allmend.models.mixture import Mixture, apply_mixture
from allmend.models.mixture_layers import MixtureConfig
from allmend.models.tensors import dump, read_tensors
from allmend.recipe import Train
from allmend.run import EventLog
from allmend.strategy import Reply, State, Task, Turn

NAMES = ["a", "b", "c", "d", "e"]


def make_engine(post: Any, names: list[str], events: list[Any] | None = None, **settings: Any) -> FlowerEngine:
    emit = (events if events is not None else []).append
    options: dict[str, Any] = {"arm": "arm", "run": "run", "seconds": 100.0, "fewest": 1, "emit": emit}
    return FlowerEngine(post.exchange(), names, **options | settings)


def same(first: State, second: State) -> bool:
    return first.tensors.keys() == second.tensors.keys() and all(
        torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items()
    )


APART = sorted({name for name, kind in STRATEGIES.items() if not kind.pooled} - {"comigs"})
"""But for the one that trains a mixture."""


@pytest.mark.parametrize("name", APART)
def test_every_strategy_ends_at_the_same_bits_as_in_one_process(
    name: str,
    run: Callable[..., Any],
    make_member: Callable[..., Any],
    make_sites: Callable[..., Any],
    make_post: Callable[..., Any],
    settings: Train,
) -> None:
    strategy = build_strategy(name, {"groups": "a b, e d c"} if name == "grouped" else {}, seed=3)
    members = [make_member(member, records=3) for member in NAMES]
    here = run(strategy, members, settings, rounds=2)
    sites = make_sites(members, strategy)
    post = make_post({member: site.answer for member, site in sites.items()})
    there = run(strategy, members, settings, rounds=2, engine=make_engine(post, NAMES))
    assert same(here.state, there.state)
    assert here.state.facts == there.state.facts
    if not strategy.shares:
        for member in NAMES:
            path = sites[member].folder / f"arms/arm/000002-{strategy.legs - 1}.state.safetensors"
            tensors, about = read_tensors(path)
            assert same(here.states[member], State(tensors, about["facts"]))


def test_a_mixture_ends_at_the_same_bits_as_in_one_process(
    run: Callable[..., Any],
    make_member: Callable[..., Any],
    make_tiny_model: Callable[..., Any],
    make_post: Callable[..., Any],
    settings: Train,
    tmp_path: Path,
) -> None:
    strategy = CoMiGS(router_every=1, router_steps=1)

    def mixture() -> Mixture:
        return apply_mixture(make_tiny_model(), MixtureConfig(rank=2), seed=0, specialist_seed=0, digest="base")

    @contextlib.contextmanager
    def open_arm(member: Any, arm: str) -> Iterator[ArmAtMember]:
        yield ArmAtMember(strategy, mixture(), member, settings)

    members = [make_member(member, records=4) for member in NAMES]
    here = run(strategy, members, settings, rounds=2, trainable=mixture())
    sites = {member.name: Site(tmp_path / member.name, partial(open_arm, member)) for member in members}
    post = make_post({member: site.answer for member, site in sites.items()})
    there = run(strategy, members, settings, rounds=2, engine=make_engine(post, NAMES), trainable=mixture())

    assert same(here.state, there.state)
    for member in NAMES:
        tensors, _ = read_tensors(sites[member].folder / "arms/arm/000002-1.state.safetensors")
        assert same(here.states[member], State(tensors))


def test_who_shows_a_model_of_other_shapes_is_left_out(
    run: Callable[..., Any],
    make_member: Callable[..., Any],
    make_sites: Callable[..., Any],
    make_post: Callable[..., Any],
    settings: Train,
) -> None:
    strategy = CoBo(pairs_per_member=4.0)
    members = [make_member(member, records=3) for member in NAMES]
    sites = make_sites(members, strategy)
    answers = {member: site.answer for member, site in sites.items()}
    liar, *honest = sorted(answers)

    def cut(question: bytes) -> bytes:
        reply, _, about = parse_reply(sites[liar].answer(question))
        return dump_reply(replace(reply, seen={name: tensor[:1] for name, tensor in reply.seen.items()}), about=about)

    post = make_post(answers | {liar: cut})
    there = run(strategy, members, settings, rounds=2, engine=make_engine(post, NAMES))

    assert members_of(there.state) == honest


def test_a_lost_answer_is_asked_for_again_and_not_worked_out_twice(
    run: Callable[..., Any],
    make_member: Callable[..., Any],
    make_sites: Callable[..., Any],
    make_post: Callable[..., Any],
    settings: Train,
) -> None:
    members = [make_member(name) for name in ("a", "b")]
    here = run(FedAvg(), members, settings, rounds=2)
    sites, trained = make_sites(members, FedAvg()), []
    for name, site in sites.items():
        site.on_step = lambda *step, name=name: trained.append(name)
    post = make_post({name: site.answer for name, site in sites.items()})
    # the members work, and what they answer is lost, three times each
    answered = dict.fromkeys(sites, 0)

    def worked(name: str) -> Callable[[bytes], bytes]:
        def answer(question: bytes) -> bytes:
            answered[name] += 1
            return sites[name].answer(question)

        return answer

    post = make_post({name: worked(name) for name in sites})
    carry = post.answers
    dropped = {"a": 3, "b": 3}

    def answers(waiting: Any) -> Any:
        for answer in carry(waiting):
            if dropped[answer.member]:
                dropped[answer.member] -= 1
            else:
                yield answer

    post.answers = answers
    there = run(FedAvg(), members, settings, rounds=2, engine=make_engine(post, ["a", "b"], seconds=10_000.0))
    assert same(here.state, there.state)
    assert sum(answered.values()) > 4
    assert len(trained) == 2 * 2 * 2  # two members, two rounds of two steps


def test_a_member_that_does_not_answer_is_as_if_it_was_not_sampled(
    run: Callable[..., Any],
    make_member: Callable[..., Any],
    make_sites: Callable[..., Any],
    make_post: Callable[..., Any],
    settings: Train,
) -> None:
    members = [make_member(name) for name in ("a", "b", "c")]
    sites = make_sites(members, FedAvg())
    post = make_post({name: site.answer for name, site in sites.items()})
    post.slow["b"] = 1e9
    events: list[Any] = []
    there = run(FedAvg(), members, settings, rounds=1, engine=make_engine(post, ["a", "b", "c"], events))
    without = run(FedAvg(), [members[0], members[2]], settings, rounds=1)
    assert same(without.state, there.state)
    assert [event.message for event in events if isinstance(event, Warned)] == [
        "client 'b' did not answer in round 1, which goes on without it"
    ]


@pytest.mark.parametrize("worked", [True, False])
def test_a_reply_that_is_lost_leaves_no_trace_at_its_member_either(
    worked: bool,
    run: Callable[..., Any],
    make_member: Callable[..., Any],
    make_sites: Callable[..., Any],
    make_post: Callable[..., Any],
    settings: Train,
) -> None:
    """A round without a member is as if it had not been sampled, in that round and in those after it."""
    members = [make_member(name) for name in ("a", "b", "c")]
    sites = make_sites(members, FedAvg())

    def losing(question: bytes) -> bytes:
        found = sites["b"].answer(question) if worked or parse_task(question)[0].turn.round != 2 else b""
        return b"" if parse_task(question)[0].turn.round == 2 else found

    post = make_post({name: site.answer for name, site in sites.items()} | {"b": losing})
    there = run(FedAvg(), members, settings, rounds=4, engine=make_engine(post, ["a", "b", "c"]))

    class Without(FedAvg):
        def plan(self, state: State, turn: Turn, members: Sequence[str]) -> dict[str, Task]:
            tasks = FedAvg.plan(self, state, turn, members)
            return {name: task for name, task in tasks.items() if (name, turn.round) != ("b", 2)}

    assert same(run(Without(), members, settings, rounds=4).state, there.state)


def test_a_member_that_fails_three_rounds_is_suspended(
    run: Callable[..., Any],
    make_member: Callable[..., Any],
    make_sites: Callable[..., Any],
    make_post: Callable[..., Any],
    settings: Train,
) -> None:
    members = [make_member(name) for name in ("a", "b")]
    sites = make_sites(members, FedAvg())
    post = make_post({name: site.answer for name, site in sites.items()})
    del post.there["b"]
    events: list[Any] = []
    engine = make_engine(post, ["a", "b"], events, seconds=5.0)
    run(FedAvg(), members, settings, rounds=5, engine=engine)
    assert engine.members == ["a"]
    assert "is not asked any more" in events[-1].message
    assert post.sent == ["a"] * 5


def test_too_few_answers_stop_the_run_and_keep_the_round_before(
    run: Callable[..., Any],
    make_member: Callable[..., Any],
    make_sites: Callable[..., Any],
    make_post: Callable[..., Any],
    settings: Train,
    tmp_path: Path,
) -> None:
    members = [make_member(name) for name in ("a", "b")]
    whole = run(FedAvg(), members, settings, rounds=3)
    sites = make_sites(members, FedAvg(), folder=tmp_path / "sites")
    post = make_post({name: site.answer for name, site in sites.items()})
    run(FedAvg(), members, settings, rounds=2, engine=make_engine(post, ["a", "b"], fewest=2), folder=tmp_path / "arm")
    post.slow["b"] = 1e9
    start = Checkpoints(tmp_path / "arm", "identity").newest()
    assert start is not None
    with pytest.raises(UserError, match="1 of 2 members answered in round 3, and 2 are the fewest"):
        run(FedAvg(), members, settings, rounds=3, engine=make_engine(post, ["a", "b"], fewest=2), start=start)
    post.slow.clear()
    last = run(FedAvg(), members, settings, rounds=3, engine=make_engine(post, ["a", "b"], fewest=2), start=start)
    assert same(last.state, whole.state)


def test_a_member_that_answers_rubbish_or_an_error_is_left_out_and_told_of(
    run: Callable[..., Any],
    make_member: Callable[..., Any],
    make_sites: Callable[..., Any],
    make_post: Callable[..., Any],
    settings: Train,
) -> None:
    members = [make_member(name) for name in ("a", "b", "c")]
    sites = make_sites(members, FedAvg())
    deaf = sites["c"]

    def broken(arm: str) -> Any:
        raise UserError("no record has a token to learn from")

    deaf.open_arm = broken
    post = make_post({"a": sites["a"].answer, "b": lambda question: b"rubbish", "c": deaf.answer})
    events: list[Any] = []
    there = run(FedAvg(), members, settings, rounds=1, engine=make_engine(post, ["a", "b", "c"], events))
    assert same(run(FedAvg(), [members[0]], settings, rounds=1).state, there.state)
    told = [event.message for event in events if isinstance(event, Warned)]
    assert any("client 'b', round 1: has 7 bytes" in message for message in told)
    assert any("client 'c', round 1: no record has a token" in message for message in told)


@pytest.mark.parametrize(
    ("spoilt", "why"),
    [
        (Reply({"update/x": torch.zeros(2)}, {"weight": 1.0}), "other names or shapes"),
        (Reply({}, {"weight": 1.0, "extra": 1.0}), "not declared: extra"),
        (Reply({}, {"weight": 1.0}, {"update/x": torch.zeros(2)}), "not declared: update"),
        (Reply({"update/a": torch.full((2,), torch.nan)}, {"weight": 1.0}), "holds NaN"),
    ],
)
def test_a_reply_that_would_spoil_the_round_is_left_out(
    spoilt: Reply,
    why: str,
    run: Callable[..., Any],
    make_member: Callable[..., Any],
    make_sites: Callable[..., Any],
    make_trainable: Callable[..., Any],
    make_post: Callable[..., Any],
    settings: Train,
) -> None:
    members = [make_member(name) for name in ("a", "b")]
    sites, events = make_sites(members, FedAvg()), list[Any]()
    post = make_post({"a": sites["a"].answer, "b": lambda question: dump_reply(spoilt)})
    layout = FedAvg().layout(make_trainable().state()) | {"update/a": torch.Size([2])}
    there = run(FedAvg(), members, settings, rounds=1, engine=make_engine(post, ["a", "b"], events, layout=layout))
    assert same(run(FedAvg(), [members[0]], settings, rounds=1).state, there.state)
    assert any(why in event.message for event in events if isinstance(event, Warned))


@pytest.mark.parametrize(("factor", "left_out"), [(0.9, False), (1.0, False), (1.1, True), (1e6, True)])
def test_a_change_over_the_bound_is_left_out(
    factor: float,
    left_out: bool,
    run: Callable[..., Any],
    make_member: Callable[..., Any],
    make_sites: Callable[..., Any],
    make_post: Callable[..., Any],
    settings: Train,
) -> None:
    bounded = settings.model_copy(update={"largest_update": 1e-3})  # training alone would go further
    members = [make_member(name) for name in ("a", "b")]
    sites, events = make_sites(members, FedAvg(), bounded), list[Any]()

    def larger(question: bytes) -> bytes:
        reply = parse_reply(sites["b"].answer(question))[0]
        return dump_reply(replace(reply, summed={name: tensor * factor for name, tensor in reply.summed.items()}))

    post = make_post({"a": sites["a"].answer, "b": larger})
    engine = make_engine(post, ["a", "b"], events, largest_update=1e-3)
    there = run(FedAvg(), members, bounded, rounds=1, engine=engine)
    assert same(run(FedAvg(), [members[0]], bounded, rounds=1).state, there.state) == left_out
    told = [event.message for event in events if isinstance(event, Warned)]
    assert any("client 'b', round 1: its change has the norm" in message for message in told) == left_out


def test_of_the_members_states_only_which_is_meant_is_kept(make_post: Callable[..., Any]) -> None:
    engine = make_engine(make_post({}), [])
    engine._count(Turn(3, 1, 9), ["a"])
    states = engine.states()
    assert states == {"a": State(facts={"round": 3, "leg": 1})}
    other = make_engine(make_post({}), [])
    other.restore(states)
    assert other.counted == {"a": (3, 1)}


SURROGATE = dump({}, {"error": {"what": "AAAAAAA\x1b[2J" + "x" * 9000}}).replace(b"AAAAAAA", b"\\\\ud800")
"""Half of a pair of UTF-16, which no UTF-8 has, and a command to the terminal."""


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda data: SURROGATE, "xxx"),
        (lambda data: data.replace(b"4.0", b"9e9"), None),
        (lambda data: dump_reply(replace(parse_reply(data)[0], summed_facts={})), "cannot be used (KeyError)"),
        (lambda data: dump_reply(replace(parse_reply(data)[0], summed={})), "cannot be used (KeyError)"),
        (lambda data: dump_reply(replace(parse_reply(data)[0], summed_facts={"weight": 0.0})), "a weight is above 0"),
        (lambda data: dump_reply(replace(parse_reply(data)[0], summed_facts={"weight": -1.0})), "a weight is above 0"),
    ],
)
def test_nothing_that_a_member_sends_stops_the_others(
    change: Callable[[bytes], bytes],
    why: str | None,
    run: Callable[..., Any],
    make_member: Callable[..., Any],
    make_sites: Callable[..., Any],
    make_post: Callable[..., Any],
    settings: Train,
    tmp_path: Path,
) -> None:
    members = [make_member(name) for name in ("a", "b")]
    sites = make_sites(members, FedAvg())
    post = make_post({"a": sites["a"].answer, "b": lambda question: change(sites["b"].answer(question))})
    log = EventLog(tmp_path / "events.jsonl")
    engine = make_engine(post, ["a", "b"], emit=log.emit, largest_update=1e6)
    there = run(FedAvg(), members, settings, rounds=1, engine=engine)
    log.close()
    warned = [event.message for event in read_events(tmp_path / "events.jsonl") if isinstance(event, Warned)]
    if why is not None:
        assert same(run(FedAvg(), [members[0]], settings, rounds=1).state, there.state)
        assert any(why in words and "\x1b" not in words and len(words) < 5000 for words in warned)


def test_seen_tensors_of_other_shapes_are_left_out(
    run: Callable[..., Any],
    make_member: Callable[..., Any],
    make_sites: Callable[..., Any],
    make_post: Callable[..., Any],
    settings: Train,
) -> None:
    strategy = build_strategy("median", {}, seed=0)
    members = [make_member(name) for name in ("a", "b", "c")]
    sites, events = make_sites(members, strategy), list[Any]()

    def odd(question: bytes) -> bytes:
        reply = parse_reply(sites["b"].answer(question))[0]
        return dump_reply(replace(reply, seen={name: tensor[:1] for name, tensor in reply.seen.items()}))

    post = make_post({name: site.answer for name, site in sites.items()} | {"b": odd})
    there = run(strategy, members, settings, rounds=1, engine=make_engine(post, ["a", "b", "c"], events))
    assert same(run(strategy, [members[0], members[2]], settings, rounds=1).state, there.state)
    assert any("other names or shapes" in event.message for event in events if isinstance(event, Warned))
