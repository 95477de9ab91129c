"""Mixtures among organisations: they stay with their members, and so does who answers in them."""

import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.consortium.conftest import Place

from allmend import load_model
from allmend.errors import UserError
from allmend.learn.routing import token_gates
from allmend.models.mixture import mixed
from allmend.models.tensors import read_tensors
from allmend.results import ArmRouting

MIXTURE = {
    "adapter": {"kind": "mixture", "rank": 2},
    "strategy": {"name": "comigs", "rounds": 2, "router_every": 2, "router_steps": 1},
    "compare": {},
    "canaries": None,
}


def test_routing_and_texts_are_with_the_member_alone(make_place: Callable[..., Place], tiny_folder: Path) -> None:
    place = make_place(**MIXTURE)

    run = place.coordinate()

    clients = {client.member.name: client.member for _, _, client in place.asked}
    assert not (run.path / "results" / "routing.json").exists()
    assert not list(run.path.rglob("mixture"))
    for name, side in place.sides.items():
        (folder,) = side.folder.glob("runs/*/arms/comigs")
        (member,) = (routing := ArmRouting.model_validate_json((folder / "routing.json").read_bytes())).members
        assert (routing.arm, routing.layers, member.member) == ("comigs", (0, 1), name)
        with mixed(load_model(str(tiny_folder), device="cpu"), folder / "mixture") as mixture:
            found = [token_gates(mixture, record.ids) for record in clients[name].held_out]
        assert torch.allclose(torch.tensor(member.gates), torch.cat(found, dim=1).mean(1), atol=1e-6)
        page = folder / "routing.html"
        assert stat.S_IMODE(page.stat().st_mode) == 0o600
        assert f"{name}-" in page.read_text()


def test_a_target_and_held_out_records_of_ones_own_are_read_at_the_member(make_place: Callable[..., Place]) -> None:
    place = make_place(**MIXTURE)
    side = place.sides["north"]
    for kind in ("target", "held_out"):
        rows = [{"id": f"{kind}{i}", "prompt": f"{kind} {i}?", "response": f"{i}"} for i in range(6)]
        path = place.folder / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        setattr(side, kind, path)

    place.coordinate()

    client = next(client for _, _, client in place.asked if client.member.name == "north")
    assert [record.id for record in client.member.target] == [f"target{i}" for i in range(6)]
    assert {record.id for record in client.held_out} == {f"held_out{i}" for i in range(6)}
    assert len(client.train) == 30, "none of its data is held out"
    (state,) = side.folder.glob("runs/*/arms/comigs/000002-1.state.safetensors")
    learnt = read_tensors(state)[0]["client/learnt"]
    assert learnt.shape == (30, 2), "the target is no part of what experts learn from"


def test_what_a_target_shares_with_training_records_is_refused_before_anything_is_agreed(
    make_place: Callable[..., Place],
) -> None:
    place = make_place(**MIXTURE)
    place.sides["north"].target = place.folder / "north.jsonl"
    with pytest.raises(UserError):
        place.coordinate(fewest=3)
    assert place.sides["north"].refused is not None
    assert "training records of client 'north' too" in str(place.sides["north"].refused)
