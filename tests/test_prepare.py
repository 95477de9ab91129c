"""From a recipe to what a run needs: all that is wrong at once, and what goes where."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from allmend.data.canaries import LARGE_BITS
from allmend.errors import UserError
from allmend.federation.privacy.ledger import open_ledger
from allmend.life import rehearse
from allmend.models.load import load_model
from allmend.prepare import prepare
from allmend.recipe import Recipe, RecipeError, StrategyChoice, make_recipe


def write(folder: Path, client: str, count: int = 6, **extra: Any) -> None:
    rows = [{"id": f"{client}-{i}", "prompt": f"{i} plus {i}?", "response": str(2 * i), **extra} for i in range(count)]
    (folder / f"{client}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe(model: Path, *clients: str, **sections: Any) -> Recipe:
    sources = [{"name": name, "data": f"{name}.jsonl"} for name in clients or ("north", "south")]
    sections.setdefault("adapter", {"rank": 2})
    return make_recipe({"model": {"source": str(model)}, "clients": sources, **sections})


def test_a_home_folder_is_understood(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "north")
    monkeypatch.setenv("HOME", str(tmp_path))
    source = recipe(tiny_folder, "north").model_dump(exclude_unset=True)
    source["clients"][0]["data"] = "~/north.jsonl"
    assert prepare(make_recipe(source), tmp_path / "elsewhere").members[0].name == "north"


def test_faults_in_the_data_of_all_clients_are_told_together(tiny_folder: Path, tmp_path: Path) -> None:
    write(tmp_path, "north")
    (tmp_path / "south.jsonl").write_text("")
    with pytest.raises(UserError) as raised:
        prepare(recipe(tiny_folder), tmp_path)
    assert str(raised.value) == "south.jsonl: holds no record\nPut at least one record in it."
    (tmp_path / "north.jsonl").write_text('{"id": "a"\n')
    with pytest.raises(UserError) as raised:
        prepare(recipe(tiny_folder), tmp_path)
    lines = str(raised.value).splitlines()
    assert lines[0] == "the data of 2 clients cannot be used"
    assert [line[:4] for line in lines[1:]] == ["  - ", "    ", "  - ", "    "]
    assert "north.jsonl:1" in lines[1]
    assert "south.jsonl" in lines[3]


def test_who_gets_what(tiny_folder: Path, tmp_path: Path) -> None:
    write(tmp_path, "north", 8)
    write(tmp_path, "south", 12)
    made = recipe(
        tiny_folder,
        data={"held_out": 0.4},
        canaries={"copies": [1, 3], "count": [6, 4], "clients": ["south"]},
        evaluation={"max_held_out": 2},
    )
    prepared = prepare(made, tmp_path)
    plain = prepare(recipe(tiny_folder, data={"held_out": 0.4}), tmp_path)
    counts = {member.name: len(member.records) for member in prepared.members}
    before = {member.name: len(member.records) for member in plain.members}
    planted = sum(canary.copies for canary in prepared.canaries if canary.inserted)
    assert len(prepared.canaries) == 6 + 4
    assert planted
    assert counts == {"north": before["north"], "south": before["south"] + planted}
    assert {canary.client for canary in prepared.canaries} == {"south"}
    controls = [canary.text for canary in prepared.canaries if not canary.inserted]
    assert controls
    tokenizer = prepared.model.tokenizer
    trained = {tokenizer.decode(record.ids) for member in prepared.members for record in member.records}
    assert not any(control in text for control in controls for text in trained)
    for client, held_out in prepared.held_out.items():
        assert len(held_out) == min(2, len(plain.held_out[client]))
        assert len(held_out) == len(prepared.held_out_encoded[client])
        learnt = {record.id for member in prepared.members if member.name == client for record in member.records}
        assert not learnt & {record.id for record in held_out}
    arm = made.arms()["fedavg"]
    assert prepared.parties(arm) == (prepared.members, arm)
    (pooled,), _ = prepared.parties(replace(arm, strategy=StrategyChoice(name="centralised")))
    assert len(pooled.records) == sum(counts.values())


def test_seeds_and_digests_follow_names_and_content_and_not_places(tiny_folder: Path, tmp_path: Path) -> None:
    for client in ("north", "south", "west"):
        write(tmp_path, client)
    model = load_model(str(tiny_folder))
    two = prepare(recipe(tiny_folder), tmp_path, model=model)
    three = prepare(recipe(tiny_folder, "west", "south", "north"), tmp_path, model=model)
    seeds = {member.name: member.seed for member in three.members}
    assert {member.name: member.seed for member in two.members} == {n: seeds[n] for n in ("north", "south")}
    assert len(set(seeds.values())) == 3
    other = prepare(recipe(tiny_folder, seed=1), tmp_path, model=model)
    assert all(member.seed != seeds[member.name] for member in other.members)
    assert two.data_digests == {name: three.data_digests[name] for name in ("north", "south")}
    write(tmp_path, "north", 3)
    changed = prepare(recipe(tiny_folder), tmp_path, model=model)
    assert changed.data_digests["north"] != two.data_digests["north"]
    assert changed.data_digests["south"] == two.data_digests["south"]


def test_records_that_are_too_long_are_cut_or_left_out_and_counted(tiny_folder: Path, tmp_path: Path) -> None:
    write(tmp_path, "north", 4, split="train")
    long = {"id": "long", "prompt": "x" * 500, "response": "yes", "split": "train"}
    with (tmp_path / "north.jsonl").open("a") as file:
        file.write(json.dumps(long) + "\n")
    cut = prepare(recipe(tiny_folder, "north", data={"max_tokens": 40}), tmp_path)
    assert len(cut.members[0].records) == 5
    assert max(len(record) for record in cut.members[0].records) == 40
    assert cut.notes["north"] == {"training records truncated": 1}
    rejected = prepare(recipe(tiny_folder, "north", data={"max_tokens": 40, "too_long": "reject"}), tmp_path)
    assert {record.id for record in rejected.members[0].records} == {f"north-{i}" for i in range(4)}
    assert rejected.notes["north"] == {"training records rejected (too long)": 1}
    with pytest.raises(UserError, match=r"no training record fits data\.max_tokens = 8"):
        prepare(recipe(tiny_folder, "north", data={"max_tokens": 8, "too_long": "reject"}), tmp_path)


def test_the_chat_template_must_be_there_where_it_is_asked_for(tiny_folder: Path, tmp_path: Path) -> None:
    write(tmp_path, "north")
    with pytest.raises(UserError, match="no chat template"):
        prepare(recipe(tiny_folder, "north", data={"template": "chat"}), tmp_path)
    assert prepare(recipe(tiny_folder, "north"), tmp_path).encoder.template == "plain"


def test_the_type_is_the_recipes(tiny_folder: Path, tmp_path: Path) -> None:
    write(tmp_path, "north")
    source = recipe(tiny_folder, "north").model_dump(exclude_unset=True)
    source["model"]["dtype"] = "bfloat16"
    assert prepare(make_recipe(source), tmp_path).model.model.dtype == torch.bfloat16
    source["adapter"] = {"kind": "full"}
    with pytest.raises(RecipeError, match=r"model\.dtype.*bfloat16"):
        prepare(make_recipe(source), tmp_path)


def test_a_canary_that_would_be_cut_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    write(tmp_path, "north")
    with pytest.raises(RecipeError, match=r"data\.max_tokens.*canaries have up to \d+ tokens"):
        prepare(recipe(tiny_folder, "north", data={"max_tokens": 40}, canaries={}), tmp_path)


def test_canaries_that_all_fall_on_one_side_are_refused_before_anything_is_trained(
    tiny_folder: Path, tmp_path: Path
) -> None:
    write(tmp_path, "north")

    def coins(seed: int) -> set[bool]:
        made = recipe(tiny_folder, "north", seed=seed, canaries={"copies": [1], "count": 2})
        return {canary.inserted for canary in prepare(made, tmp_path).canaries}

    refused = []
    for seed in range(8):
        try:
            assert coins(seed) == {True, False}
        except RecipeError as error:
            refused.append(str(error))
    assert 0 < len(refused) < 8
    assert all("canaries.count: all 2 coins fell alike" in message for message in refused)


def test_a_secret_that_stands_in_a_record_is_drawn_anew(tiny_folder: Path, tmp_path: Path) -> None:
    """Also one in a record that is only asked for: an audit could not tell the canary from it."""
    write(tmp_path, "north", 6)
    made = recipe(tiny_folder, "north", canaries={"copies": [1], "count": 6})
    before = prepare(made, tmp_path).canaries
    spoilt = next(canary for canary in before if canary.inserted)
    for split in ("train", "test"):
        write(tmp_path, "north", 6)
        with (tmp_path / "north.jsonl").open("a") as file:
            file.write(json.dumps({"id": "x", "prompt": "who?", "response": spoilt.text, "split": split}) + "\n")
        after = prepare(made, tmp_path).canaries
        assert [canary.id for canary in after] == [canary.id for canary in before]
        assert spoilt.text not in {canary.text for canary in after}
        large = [canary.text[s.start : s.end] for canary in after for s in canary.secret_spans if s.bits >= LARGE_BITS]
        assert large
        assert not [secret for secret in large if secret in spoilt.text]


def test_a_held_out_record_that_another_client_learns_from_is_left_out(tiny_folder: Path, tmp_path: Path) -> None:
    row = {"id": "x", "prompt": "the same?", "response": "yes"}
    for client, split in (("north", "train"), ("south", "test")):
        write(tmp_path, client)
        with (tmp_path / f"{client}.jsonl").open("a") as file:
            file.write(json.dumps(row | {"split": split}) + "\n")
    prepared = prepare(recipe(tiny_folder), tmp_path)
    assert "x" in {record.id for record in prepared.members[0].records}
    assert "x" not in {record.id for record in prepared.held_out["south"]}
    assert prepared.notes["south"]["held-out records in others' training"] == 1


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (["local", "fedavg"], None),
        (["local/north"], None),
        (["local/west"], r"audit\.models.*'local/west' is no model: the clients are north, south"),
        (["local/north", "local/north"], r"audit\.models.*'local/north' is named twice"),
        (["local", "local/north"], r"audit\.models.*'local/north' is named twice: it is among"),
        (["fedavg/north"], r"audit\.models.*'fedavg/north' is no model: all clients share that of 'fedavg'"),
    ],
)
def test_arms_of_personal_models_are_audited_where_they_or_clients_are_named(
    models: list[str], words: str | None, tiny_folder: Path, tmp_path: Path
) -> None:
    for name in ("north", "south"):
        write(tmp_path, name)
    arms = {"local": {"strategy": {"name": "local"}}}
    made = recipe(tiny_folder, "north", "south", compare=arms, audit={"models": models})
    if words is None:
        prepare(made, tmp_path)
        return
    with pytest.raises(RecipeError, match=words):
        prepare(made, tmp_path)


def test_canaries_that_no_audit_would_ask_for_are_refused_before_training(tiny_folder: Path, tmp_path: Path) -> None:
    write(tmp_path, "north")
    alone = {"strategy": {"name": "local"}, "canaries": {"copies": [1], "count": 2}}
    with pytest.raises(RecipeError, match=r"no model to audit.*Name arms \(local\) or single models \(local/north\)"):
        prepare(recipe(tiny_folder, "north", **alone), tmp_path)
    prepare(recipe(tiny_folder, "north", **alone, audit={"models": ["local"]}), tmp_path)


def test_canaries_for_a_client_that_is_not_there(tmp_path: Path, tiny_folder: Path) -> None:
    """The built-in clients have names that a recipe alone does not know."""
    made = make_recipe(
        {
            "model": {"source": str(tiny_folder)},
            "adapter": {"rank": 2},
            "data": {"icd10cm": {"train": 16, "held_out": 1}},
            "canaries": {"clients": ["nobody"]},
        }
    )
    with pytest.raises(RecipeError, match=r"canaries\.clients: no such client: nobody"):
        prepare(made, tmp_path)


# --- guarantees

RECORD = {"noise_multiplier": 1.0, "delta": 1e-3}


def test_the_ledger_is_about_the_records_that_the_layers_leave(tiny_folder: Path, tmp_path: Path) -> None:
    """Of 8 records 4 are left: batches of 2 make 2 steps instead of 4, each with half of the records."""
    rows = [{"id": f"{i}", "prompt": f"question {i % 4}?", "response": f"{i % 4}", "split": "train"} for i in range(8)]
    (tmp_path / "north.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = recipe(
        tiny_folder,
        "north",
        train={"batch_size": 2},
        privacy={"deduplicate": {"similarity": 1.0}, "record": RECORD},
        compare={"all": {"privacy": {"record": RECORD}}, "none": {"privacy": {}}},
    )
    prepared = prepare(made, tmp_path)
    found = {}
    for name, arm in made.arms().items():
        members, whole = prepared.protected(arm)
        found[name] = open_ledger(whole, members).accounts
    assert (found["fedavg"]["north"].release.rate, found["fedavg"]["north"].releases(1)) == (2 / 4, 2)
    assert (found["all"]["north"].release.rate, found["all"]["north"].releases(1)) == (2 / 8, 4)
    assert found["none"] == {}
    assert len(prepared.members[0].records) == 8  # nothing is left out for the other arms


def test_a_rehearsal_tells_the_price_of_the_pooled_arm_as_it_will_be(tiny_folder: Path, tmp_path: Path) -> None:
    """One party with all records takes as many steps as its members would."""
    for client in ("north", "south"):
        write(tmp_path, client, 8, split="train")
    made = recipe(
        tiny_folder,
        train={"batch_size": 2, "local_steps": 3},
        strategy={"name": "centralised", "rounds": 5},
        privacy={"record": RECORD},
    )
    _, (disclosure,) = rehearse(made, tmp_path)
    (account,) = disclosure.ledger.accounts.values()
    assert account.releases(5) == 5 * 2 * 3
    assert account.release.rate == 2 / 16


@pytest.mark.parametrize(
    ("privacy", "words"),
    [
        (
            {"record": {"noise_multiplier": 1.0, "delta": 0.2}},
            ("δ = 0.2 is not below 1/6 (6 records of client 'north')", "below 1/7 (7 records of client 'south')"),
        ),
        ({"record": {"noise_multiplier": 1.0, "delta": 0.16}}, ("below 1/7 (7 records of client 'south')",)),
        ({"record": {"noise_multiplier": 1.0, "delta": 0.14}}, ()),
        ({"member": {"noise_multiplier": 1.0, "delta": 0.5}}, ("δ = 0.5 is not below 1/2 (2 members)",)),
        ({"member": {"noise_multiplier": 1.0, "delta": 0.49}}, ()),
        ({"record": {"noise_multiplier": 0.0}}, ("records' gradients are clipped without noise",)),
        ({"member": {"noise_multiplier": 0.0}}, ("members' updates are clipped without noise",)),
        ({"record": RECORD, "deduplicate": {}}, ("for the records that deduplication leaves",)),
        ({"record": RECORD, "deduplicate": {"similarity": 1.0}}, ()),
        ({"deduplicate": {}, "goldfish": {}, "weight_noise": 0.1}, ()),
    ],
)
def test_weak_guarantees_are_warned_of(
    privacy: dict[str, Any], words: tuple[str, ...], tiny_folder: Path, tmp_path: Path
) -> None:
    write(tmp_path, "north", 6, split="train")
    write(tmp_path, "south", 7, split="train")
    found = prepare(recipe(tiny_folder, privacy=privacy), tmp_path).warnings
    assert len(found) == len(words)
    for warning, word in zip(found, words, strict=True):
        assert word in warning
        assert "arm 'fedavg'" in warning


def test_a_records_budget_that_cannot_be_kept_names_the_client(tiny_folder: Path, tmp_path: Path) -> None:
    for client in ("north", "south"):
        write(tmp_path, client)
    beyond = {"epsilon": 1e-6, "delta": 1e-9}
    with pytest.raises(UserError, match="the smallest ε that can be reached is") as late:
        prepare(recipe(tiny_folder, privacy={"record": beyond}), tmp_path)
    assert late.value.where == "arm 'fedavg', client 'north'"


def with_target(model: Path, folder: Path, **client: Any) -> Recipe:
    for name in ("north", "south"):
        write(folder, name)
    (folder / "aim.jsonl").write_text("".join(json.dumps({"prompt": f"{i}!", "response": "yes"}) + "\n" for i in "abc"))
    clients = [{"name": "north", "data": "north.jsonl"} | client, {"name": "south", "data": "south.jsonl"}]
    return recipe(model, clients=clients, data={"held_out": 0.0}) if client else recipe(model, data={"held_out": 0.0})


def test_a_target_is_encoded_counted_and_part_of_what_a_run_is_bound_to(tiny_folder: Path, tmp_path: Path) -> None:
    plain = prepare(with_target(tiny_folder, tmp_path), tmp_path)
    aiming = prepare(with_target(tiny_folder, tmp_path, target="aim.jsonl"), tmp_path)
    north, south = aiming.members
    assert [len(member.target) for member in (north, south)] == [3, 0]
    assert all(record.learns for record in north.target)
    assert aiming.notes["north"]["records of its target"] == 3
    assert "records of its target" not in aiming.notes["south"]
    assert aiming.data_digests["south"] == plain.data_digests["south"]
    assert aiming.data_digests["north"] != plain.data_digests["north"]
    (tmp_path / "aim.jsonl").write_text('{"prompt": "other", "response": "yes"}\n')
    other = prepare(aiming.recipe, tmp_path)
    assert other.data_digests["north"] != aiming.data_digests["north"]


def test_held_out_records_from_a_file_are_measured_and_leave_the_data_whole(tiny_folder: Path, tmp_path: Path) -> None:
    found = prepare(with_target(tiny_folder, tmp_path, held_out="aim.jsonl"), tmp_path)
    assert (len(found.train["north"]), len(found.held_out["north"])) == (6, 3)
    assert (len(found.train["south"]), len(found.held_out["south"])) == (6, 0)


@pytest.mark.parametrize("key", ["held_out", "target"])
def test_files_that_are_not_there_are_told_with_their_key(key: str, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=rf"clients\[1\]\.{key}: .*absent\.jsonl is not there"):
        prepare(with_target(tiny_folder, tmp_path, **{key: "absent.jsonl"}), tmp_path)
