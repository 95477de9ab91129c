"""What a run says of itself before it starts. Caveats of guarantees are in tests/test_prepare.py."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.test_prepare import recipe, write

from allmend.data.canaries import canary_of
from allmend.federation.member import Member
from allmend.federation.privacy import layers
from allmend.federation.privacy.layers import RecordLayer
from allmend.prepare import prepare

CANARIES = {"copies": [1], "count": 12, "clients": ["south"]}


def warnings(model: Path, folder: Path, **sections: Any) -> tuple[str, ...]:
    for name in ("north", "south"):
        write(folder, name, 12)
    return prepare(recipe(model, canaries=CANARIES, **sections), folder).warnings


@pytest.mark.parametrize(
    ("train", "rounds", "few"),
    [
        ({"local_steps": 1}, 1, True),
        ({"local_steps": 1}, 30, False),
        ({"local_epochs": 0.2}, 2, True),
        ({"local_epochs": 1.0}, 1, False),
    ],
)
def test_a_run_that_is_too_short_for_a_pass_over_the_canaries_says_so(
    train: dict[str, Any], rounds: int, few: bool, tiny_folder: Path, tmp_path: Path
) -> None:
    strategy = {"name": "fedavg", "rounds": rounds}
    said = warnings(tiny_folder, tmp_path, train={"batch_size": 2} | train, strategy=strategy)
    # north has no canary, and may be as short as it likes
    assert [("'south'" in one, "may never learn" in one) for one in said] == ([(True, True)] if few else [])


def test_an_arm_that_is_not_audited_needs_no_pass(tiny_folder: Path, tmp_path: Path) -> None:
    short = {"train": {"local_steps": 1}, "strategy": {"name": "local", "rounds": 1}}
    assert warnings(tiny_folder, tmp_path, compare={"local": short}) == ()
    (said,) = warnings(tiny_folder, tmp_path, compare={"local": short}, audit={"models": ["local/south"]})
    assert "arm 'local': client 'south' takes 1 steps" in said


def test_poisson_sampling_leaves_canaries_out_by_design(tiny_folder: Path, tmp_path: Path) -> None:
    record = {"epsilon": 8.0, "delta": 0.01, "sampling": "poisson"}
    said = warnings(tiny_folder, tmp_path, train={"local_steps": 1}, privacy={"record": record})
    assert not any("learn" in one for one in said)


def test_a_layer_that_leaves_nothing_of_a_canary_is_told(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_canaries(members: Sequence[Member], settings: object) -> tuple[list[Member], str]:
        kept = [[record for record in member.records if canary_of(record.id) is None] for member in members]
        return [replace(member, records=records) for member, records in zip(members, kept, strict=True)], "all gone"

    layer: RecordLayer[Any] = RecordLayer("deduplicate", lambda settings: "a layer", without_canaries)
    monkeypatch.setattr(layers, "RECORD_LAYERS", (layer,))
    (said,) = warnings(tiny_folder, tmp_path, privacy={"deduplicate": {}})
    assert "leave nothing to learn of" in said


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"optimizer": "lionar"}, "it steps as liona does"),
        ({"optimizer_state": "ramp", "local_steps": 5, "learning_rate": 0.01}, "steps have 26% of their length"),
        ({"optimizer_state": "ramp", "local_steps": 40}, None),
        ({"optimizer": "liona"}, None),
    ],
)
def test_what_an_optimiser_does_not_do_is_told(
    train: dict[str, Any], words: str | None, tiny_folder: Path, tmp_path: Path
) -> None:
    write(tmp_path, "north", 12)
    said = prepare(recipe(tiny_folder, "north", train=train), tmp_path).warnings
    assert len(said) == (words is not None)
    assert words is None or words in said[0]


def told(model: Path, folder: Path, **sections: Any) -> list[str]:
    for name in ("north", "south"):
        write(folder, name, 12)
    return list(prepare(recipe(model, **sections), folder).warnings)


@pytest.mark.parametrize(("rounds", "few"), [(2, True), (4, True), (5, False), (400, False)])
def test_members_that_are_compared_too_seldom(rounds: int, few: bool, tiny_folder: Path, tmp_path: Path) -> None:
    """Two clients are one pair, which is compared in every round."""
    said = told(tiny_folder, tmp_path, strategy={"name": "cobo", "rounds": rounds})
    assert [f"compared {rounds} times" in one for one in said] == [True] * few


def test_a_graph_that_stays_as_it_is_needs_no_comparison(tiny_folder: Path, tmp_path: Path) -> None:
    assert told(tiny_folder, tmp_path, strategy={"name": "cobo", "rounds": 2, "pairs_per_member": 0.0}) == []


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        ({"specialists": 0}, ["comigs is fedavg"]),
        ({"generalists": 0}, ["comigs is local training", "fewer than 64 records at north, south"]),
        ({"generalists": 2, "specialists": 0}, ["fedavg with routers of each client's own"]),
        ({}, ["fewer than 64 records at north, south"]),
    ],
)
def test_experts_that_come_to_something_simpler(
    experts: dict[str, int], words: list[str], tiny_folder: Path, tmp_path: Path
) -> None:
    adapter = {"kind": "mixture", "rank": 2} | experts
    said = told(tiny_folder, tmp_path, adapter=adapter, strategy={"name": "comigs", "rounds": 1})
    assert len(said) == len(words)
    assert all(word in one for word, one in zip(words, said, strict=True))


def test_a_generalist_alone_is_warned_of(tiny_folder: Path, tmp_path: Path) -> None:
    clients = [{"name": "north", "data": "north.jsonl", "specialists": 0}, {"name": "south", "data": "south.jsonl"}]
    adapter = {"kind": "mixture", "rank": 2}
    said = told(tiny_folder, tmp_path, clients=clients, adapter=adapter, strategy={"name": "comigs", "rounds": 1})
    assert "north without a specialist" in said[0]
    assert "at south, and can" in said[1]


@pytest.mark.parametrize("options", [{"router_steps": 0}, {"router": "train"}])
def test_routers_that_learn_from_no_few_records_of_their_own_are_not_warned_of(
    options: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    adapter = {"kind": "mixture", "rank": 2}
    assert told(tiny_folder, tmp_path, adapter=adapter, strategy={"name": "comigs", "rounds": 1} | options) == []


@pytest.mark.parametrize(("groups", "words"), [(1, []), (2, ["2 models for 2 clients leave some of them alone"])])
def test_models_that_hardly_anybody_can_choose(
    groups: int, words: list[str], tiny_folder: Path, tmp_path: Path
) -> None:
    said = told(tiny_folder, tmp_path, strategy={"name": "ifca", "rounds": 2, "groups": groups})
    assert len(said) == len(words)
    assert all(word in one for word, one in zip(words, said, strict=True))


def test_a_sum_that_may_be_one_clients_is_told(tiny_folder: Path, tmp_path: Path) -> None:
    clients = [{"name": f"c{number}", "data": f"c{number}.jsonl"} for number in range(4)]
    for number in range(4):
        write(tmp_path, f"c{number}", 12)
    layers = {"secure_aggregation": {}}
    said = told(tiny_folder, tmp_path, clients=clients, strategy={"name": "ifca", "rounds": 2}, privacy=layers)
    assert ["one client alone has chosen" in one for one in said] == [True]


def test_a_target_counts_for_routers_and_needs_some(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "aim.jsonl").write_text("".join(f'{{"text": "aim {i}"}}\n' for i in range(64)))
    clients = [
        {"name": "north", "data": "north.jsonl", "target": "aim.jsonl"},
        {"name": "south", "data": "south.jsonl"},
    ]
    mixture = {"kind": "mixture", "rank": 2}
    (few,) = told(tiny_folder, tmp_path, clients=clients, adapter=mixture, strategy={"name": "comigs", "rounds": 1})
    assert "fewer than 64 records at south," in few
    (idle,) = told(tiny_folder, tmp_path, clients=clients)
    assert "north with a target, and no arm has routers" in idle
