"""Recipes: round trips, all problems at once with their lines, what arms inherit, the schema."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allmend.errors import UserError
from allmend.recipe import (
    Adapter,
    Goldfish,
    MemberPrivacy,
    Privacy,
    Recipe,
    RecipeError,
    key_lines,
    load_recipe,
    make_recipe,
    parse_recipe,
)

CLIENTS = '[[clients]]\nname = "north"\ndata = "north.jsonl"\n[[clients]]\nname = "south"\ndata = "south.jsonl"\n'


def problems(text: str, tmp_path: Path) -> dict[str, tuple[int | None, str]]:
    """Key → line and message of all that is wrong with a recipe file."""
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(RecipeError) as raised:
        load_recipe(path)
    assert str(path) in str(raised.value)
    return {".".join(map(str, p.key)): (p.line, p.what) for p in raised.value.problems}


positive = st.floats(min_value=1e-9, max_value=1e9)
names = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,20}\Z")


noises = st.one_of(
    st.fixed_dictionaries({"epsilon": positive}, optional={"noise_multiplier": positive, "clip": positive}),
    st.fixed_dictionaries({"noise_multiplier": st.just(0.0) | positive}, optional={"delta": st.floats(1e-12, 0.5)}),
    st.just({"noise_multiplier": 0.0, "clip": float("inf")}),
)


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Any]:
    """A `[privacy]` of any layers."""
    sections = {
        "goldfish": st.fixed_dictionaries({}, optional={"k": st.integers(2, 99), "key": st.text("aä\"'\n")}),
        "deduplicate": st.fixed_dictionaries({}, optional={"similarity": st.floats(0.01, 1.0)}),
        "record": noises,
        "member": noises,
        "weight_noise": st.floats(0, 10),
        "randomness": st.sampled_from(["seeded", "secure"]),
    }
    return draw(st.fixed_dictionaries({}, optional=sections))


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    clients = draw(st.lists(names, min_size=1, max_size=4, unique_by=str.lower))
    train: dict[str, Any] = {
        "learning_rate": draw(positive),
        "schedule": draw(st.sampled_from(["cosine", "constant"])),
        "clip_norm": draw(positive | st.just(float("inf"))),
    }
    length = draw(st.sampled_from(["local_epochs", "local_steps", None]))
    if length:
        train[length] = draw(positive if length == "local_epochs" else st.integers(1, 10**6))
    copies = draw(st.lists(st.integers(1, 50), min_size=1, max_size=3, unique=True))
    privacy = draw(layers())
    return {
        "name": draw(names),
        "seed": draw(st.integers(0, 2**31 - 1)),
        "clients": [
            {"name": name, "data": draw(st.text(st.characters(exclude_categories=["Cs"])))} for name in clients
        ],
        "adapter": {"targets": draw(st.just("all-linear") | st.lists(st.text("abc._", min_size=1), max_size=3))},
        "train": train,
        "strategy": {"name": "fedavg", "rounds": draw(st.integers(1, 99)), "participation": draw(positive)},
        "compare": {
            "local": {"strategy": {"name": "local"}, "train": {"batch_size": draw(st.integers(1, 9))}},
            "other": {"privacy": draw(layers())},
        },
        "privacy": privacy,
        "canaries": {
            "copies": copies,
            "count": draw(st.integers(2, 9) | st.just([2] * len(copies))),
            "clients": draw(st.none() | st.just(clients)),
        },
        "audit": {
            "prefix_tokens": draw(st.lists(st.integers(1, 99), max_size=3)),
            "prefix_shares": draw(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=3)),
            "suffix_tokens": draw(st.none() | st.integers(1, 99)),
            "exposure": draw(st.none() | st.lists(st.sampled_from(["ward", "record"]))),
        },
    }


@given(recipes())
def test_a_recipe_survives_toml(values: dict[str, Any]) -> None:
    recipe = make_recipe(values)
    again = parse_recipe(recipe.to_toml())
    assert again == recipe
    assert again.digest() == recipe.digest()
    assert again.arms() == recipe.arms()


def test_the_digest_depends_on_the_values_and_not_on_how_they_are_written() -> None:
    short = parse_recipe(CLIENTS)
    spelt_out = parse_recipe("seed = 0\ntrain = { batch_size = 8 }\n" + CLIENTS)
    other = parse_recipe("train.batch_size = 9\n" + CLIENTS)
    assert short.digest() == spelt_out.digest() != other.digest()


def test_all_problems_are_told_at_once_with_their_lines(tmp_path: Path) -> None:
    found = problems(
        """name = "a/b"
[train]
learning_rate = "fast"
batch_size = 0      # too few

[adapter]
kind = "qlora"
depth = 3

[[clients]]
name = "north"
data = "north.jsonl"
[[clients]]
name = "south"

[engine]
workers = true
[evaluation]
max_held_out = 2.5
[compare.other.strategy]
rounds = 1
[compare."../up"]
""",
        tmp_path,
    )
    assert {key: line for key, (line, _) in found.items()} == {
        "name": 1,
        "train.learning_rate": 3,
        "train.batch_size": 4,
        "adapter.kind": 7,
        "adapter.depth": 8,
        "clients.1.data": 13,
        "engine.workers": 17,
        "evaluation.max_held_out": 19,
        "compare.../up": 22,
    }
    assert "no such key" in found["adapter.depth"][1]
    assert "missing" in found["clients.1.data"][1]
    assert '"fast"' in found["train.learning_rate"][1]
    assert "qlora" in found["adapter.kind"][1]


def test_dotted_keys_inline_tables_and_indentation_have_lines(tmp_path: Path) -> None:
    found = problems(
        'clients = [{ name = "a", data = "a.jsonl" }, { name = "b" }]\n'
        'model . source = 3\n  "train" . batch_size = -1\n\n'
        "  [ data . fields ] # names\n  prompt = 1\n",
        tmp_path,
    )
    lines = {key: line for key, (line, _) in found.items()}
    assert lines == {"clients.1.data": 1, "model.source": 2, "train.batch_size": 3, "data.fields.prompt": 6}


def test_a_table_below_an_array_of_tables_belongs_to_its_last_element() -> None:
    lines = key_lines('[[a]]\nx = 1\n[[a]]\n[a.b]\ny = 2\n[[a.c]]\nz = 3\n["q.r".s]\n')
    assert lines["a", 0, "x"] == 2
    assert lines["a", 1] == 3
    assert lines["a", 1, "b", "y"] == 5
    assert lines["a", 1, "c", 0, "z"] == 7
    assert lines["q.r", "s"] == 8


@pytest.mark.parametrize(
    ("text", "key", "line", "words"),
    [
        ("[data.icd10cm]\n" + CLIENTS, "clients", 2, "brings its own"),
        ("seed = 1\n", "clients", None, "[[clients]]"),
        (CLIENTS.replace("south", "NORTH", 1), "clients.1.name", 5, "NORTH"),
        ("train.local_epochs = 1.0\ntrain.local_steps = 3\n" + CLIENTS, "train", 1, "exclude each other"),
        (CLIENTS + "[compare.fedavg]\ntrain.batch_size = 1\n", "compare.fedavg", 7, "fedavg"),
        (CLIENTS + "[compare.base]\ntrain.batch_size = 1\n", "compare.base", 7, "base"),
        (CLIENTS + '[canaries]\nclients = ["west"]\n', "canaries.clients", 8, "west"),
        (CLIENTS + "[canaries]\ncopies = [1, 3]\ncount = [2]\n", "canaries", 7, "1 entries for 2 numbers"),
        (CLIENTS + '[canaries]\nkinds = ["letter", "letter"]\n', "canaries", 7, "twice"),
        (CLIENTS + "[canaries]\ncount = 1\n", "canaries.count", 8, "2"),
        (CLIENTS + "[audit]\nprefix_tokens = []\n", "audit", 7, "both empty"),
        (CLIENTS + "[audit]\nprefix_shares = [1.0]\n", "audit.prefix_shares.0", 8, "less than 1"),
        (CLIENTS.replace("south", "members", 1), "clients.1.name", 5, "stands for all clients"),
        (CLIENTS + "[privacy.goldfish]\nk = 1\n", "privacy.goldfish.k", 8, "2"),
        (CLIENTS + "[privacy.deduplicate]\nsimilarity = 0\n", "privacy.deduplicate.similarity", 8, "greater than 0"),
        (CLIENTS + "[privacy.record]\nclip = 2\n", "privacy.record", 7, "give one of them"),
        (CLIENTS + "[privacy.member]\nclip = inf\nepsilon = 3\n", "privacy.member", 7, "clip of inf"),
        (CLIENTS + "[privacy.member]\nclip = inf\nnoise_multiplier = 1\n", "privacy.member", 7, "clip of inf"),
        (CLIENTS + "[privacy.record]\nnoise_multiplier = 0\nepsilon = 3\n", "privacy.record", 7, "no epsilon"),
        (CLIENTS + "[privacy.record]\nepsilon = inf\n", "privacy.record.epsilon", 8, "finite"),
        (CLIENTS + "[privacy.record]\nepsilon = 1\ndelta = 1.0\n", "privacy.record.delta", 9, "less than 1"),
        (CLIENTS + '[privacy.record]\nepsilon = 1\nsampling = "all"\n', "privacy.record.sampling", 9, "poisson"),
        (CLIENTS + "[privacy.member]\nepsilon = 1\nquantile = 1.0\n", "privacy.member.quantile", 9, "less than 1"),
        (
            CLIENTS + "[privacy.member]\nclip = inf\nnoise_multiplier = 0\nquantile = 0.5\n",
            "privacy.member",
            7,
            "quantile",
        ),
        (
            CLIENTS + "[privacy.record]\nepsilon = 1\n[adapter]\ndropout = 0.1\n",
            "adapter.dropout",
            10,
            "privacy.record",
        ),
        (
            CLIENTS + "[privacy.record]\nepsilon = 1\n[compare.x.adapter]\ndropout = 0.1\n",
            "compare.x.adapter.dropout",
            10,
            "privacy.record",
        ),
        (CLIENTS + 'rank = 2\n[adapter]\nlearns = "b"\n', "clients.1.rank", 7, "remove rank, or adapter.learns"),
        (CLIENTS + 'rank = 2\n[compare.x.adapter]\nlearns = "b"\n', "clients.1.rank", 7, "(x)"),
        (CLIENTS + '[adapter]\nlearns = "a"\n', "adapter.learns", 8, "b"),
        (CLIENTS + '[adapter]\nkind = "mixture"\nlearns = "b"\n', "adapter", 7, "remove learns"),
        (CLIENTS + '[adapter]\nkind = "full"\nlearns = "both"\n', "adapter", 7, "has no learns"),
        (CLIENTS + "[privacy]\nweight_noise = -0.1\n", "privacy.weight_noise", 8, "0"),
        (CLIENTS + '[privacy]\nrandomness = "dice"\n', "privacy.randomness", 8, "secure"),
        (CLIENTS + "[privacy.golfish]\nk = 4\n", "privacy.golfish", 7, "did you mean goldfish"),
        (CLIENTS + "[compare.x.privacy.record]\nclip = 2\n", "compare.x.privacy.record", 7, "give one of them"),
        (CLIENTS + "[compare.x.privacy.golfish]\n", "compare.x.privacy.golfish", 7, "did you mean goldfish"),
        (CLIENTS + "[compare.x]\nadapter.rnak = 2\n", "compare.x.adapter.rnak", 8, "did you mean rank"),
        (CLIENTS + "[canaries]\ncopies = [3, 3]\n", "canaries", 7, "twice"),
        (CLIENTS + '[audit]\nmodels = ["local"]\n', "audit.models", 8, "local"),
        (CLIENTS + "[strategy]\nrounds = 0\n", "strategy.rounds", 8, "1"),
        (CLIENTS + "[train]\nlearning_rate = nan\n", "train.learning_rate", 8, "finite"),
        (CLIENTS + "[adapter]\nalpha = inf\n", "adapter.alpha", 8, "finite"),
        (CLIENTS + "[compare.x]\nadapter.rank = 0\n", "compare.x.adapter.rank", 8, "1"),
        (CLIENTS + "[compare.x]\nadapter.foo = 0\n", "compare.x.adapter.foo", 8, "no such key"),
        (CLIENTS + '[adapter]\nkind = "full"\nrank = 4\n', "adapter", 7, "full fine-tuning has no rank"),
        (
            CLIENTS + '[adapter]\nkind = "full"\n[compare.x]\nadapter = { rank = 4, targets = ["q_proj"] }\n',
            "compare.x.adapter",
            10,
            'no rank, targets: remove it, or set kind = "lora"',
        ),
        (CLIENTS + "[compare.x.train]\nlocal_steps = 1\nlocal_epochs = 1.0\n", "compare.x.train", 7, "exclude"),
        (CLIENTS + "model = 3\n", "clients.1.model", 7, "no such key"),  # TOML puts it into the last client
    ],
)
def test_impossible_combinations_are_refused_in_place(
    text: str, key: str, line: int | None, words: str, tmp_path: Path
) -> None:
    found = problems(text, tmp_path)
    assert list(found) == [key]
    assert found[key][0] == line
    assert words in found[key][1]


def test_impossible_combinations_are_told_together(tmp_path: Path) -> None:
    text = CLIENTS + '[canaries]\nclients = ["west"]\n[audit]\nmodels = ["x"]\n[compare.y]\nadapter.rank = "r"\n'
    assert set(problems(text, tmp_path)) == {"canaries.clients", "audit.models", "compare.y.adapter.rank"}


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "-x", "a b", "a\n", "a\\b", "é", "x" * 65, "con\0"])
def test_names_that_are_no_file_names_are_refused(name: str) -> None:
    client = {"name": "n", "data": "d"}
    for values in (
        {"name": name, "clients": [client]},
        {"clients": [client | {"name": name}]},
        {"clients": [client], "compare": {name: {}}},
    ):
        with pytest.raises(RecipeError, match="letters, digits"):
            make_recipe(values)


def test_arms_inherit_what_they_do_not_name() -> None:
    recipe = parse_recipe(
        CLIENTS
        + """
[adapter]
rank = 4
[train]
local_epochs = 2.0
learning_rate = 0.5
[strategy]
name = "fedavg"
rounds = 7
participation = 0.5
[compare.local.strategy]
name = "local"
[compare.half.strategy]
participation = 0.25
[compare.short]
strategy = { name = "centralised", rounds = 2 }
adapter.rank = 2
train.local_steps = 3
"""
    )
    arms = recipe.arms()
    assert list(arms) == ["fedavg", "local", "half", "short"]
    assert arms["fedavg"].strategy.options == {"participation": 0.5}
    # another strategy: its rounds are the recipe's, the options are not
    assert (arms["local"].strategy.rounds, arms["local"].strategy.options) == (7, {})
    assert arms["local"].train == recipe.train
    assert arms["local"].adapter == recipe.adapter
    # the same strategy: what is not named stays
    assert (arms["half"].strategy.name, arms["half"].strategy.rounds) == ("fedavg", 7)
    assert arms["half"].strategy.options == {"participation": 0.25}
    assert (arms["short"].strategy.rounds, arms["short"].adapter.rank) == (2, 2)
    # steps replace epochs
    assert (arms["short"].train.local_steps, arms["short"].train.local_epochs) == (3, None)
    assert arms["short"].train.learning_rate == 0.5


def test_an_arm_with_another_kind_of_adapter_keeps_nothing_of_it() -> None:
    recipe = parse_recipe(
        CLIENTS
        + """
[adapter]
rank = 4
alpha = 8.0
[compare.full]
adapter.kind = "full"
"""
    )
    assert recipe.arms()["full"].adapter == Adapter(kind="full")
    recipe = parse_recipe(CLIENTS + '[adapter]\nkind = "full"\n[compare.x]\nadapter = { kind = "lora", rank = 4 }\n')
    assert recipe.arms()["x"].adapter == Adapter(rank=4)
    assert parse_recipe(recipe.to_toml()) == recipe  # what full fine-tuning does not have is not frozen either


def test_an_arm_with_privacy_of_its_own_has_those_layers_alone() -> None:
    recipe = parse_recipe(
        CLIENTS
        + """
[privacy]
weight_noise = 0.5
randomness = "secure"
goldfish = { k = 7 }
[privacy.record]
epsilon = 2
[compare.same]
train.batch_size = 1
[compare.none.privacy]
[compare.other.privacy.member]
noise_multiplier = 1
"""
    )
    arms = {name: arm.privacy for name, arm in recipe.arms().items()}
    assert arms["fedavg"] == arms["same"] == recipe.privacy
    assert recipe.privacy.goldfish == Goldfish(k=7)
    assert arms["none"] == Privacy()
    assert arms["other"] == Privacy(member=MemberPrivacy(noise_multiplier=1.0))


def test_the_digest_depends_on_every_layer_and_on_the_audit() -> None:
    sections = (
        "",
        "[privacy.goldfish]\n",
        "[privacy.goldfish]\nk = 5\n",
        "[privacy.deduplicate]\n",
        "[privacy.record]\nepsilon = 1\n",
        "[privacy.member]\nepsilon = 1\n",
        "[privacy]\nweight_noise = 0.1\n",
        '[privacy]\nrandomness = "secure"\n',
        "[compare.x.privacy]\n",
        "[compare.x]\n",
        "[canaries]\n",
        "[canaries]\ncount = 9\n",
        "[audit]\ndraws = [2]\n",
    )
    assert len({parse_recipe(CLIENTS + section).digest() for section in sections}) == len(sections)


def test_types_are_not_coerced() -> None:
    client = {"name": "n", "data": "d"}
    for train in ({"batch_size": 2.0}, {"batch_size": "2"}, {"batch_size": True}, {"learning_rate": "0.1"}):
        with pytest.raises(RecipeError):
            make_recipe({"clients": [client], "train": train})
    assert make_recipe({"clients": [client], "train": {"learning_rate": 1}}).train.learning_rate == 1.0


def test_the_wrong_member_of_a_union_is_not_told(tmp_path: Path) -> None:
    found = problems(CLIENTS + "[canaries]\ncopies = [1, 2]\ncount = [2, 0]\n", tmp_path)
    assert set(found) == {"canaries.count.1"}
    found = problems(CLIENTS + '[canaries]\ncount = "x"\n', tmp_path)
    assert set(found) == {"canaries.count"}


@pytest.mark.parametrize("damage", ["missing", "folder", "binary", "toml"])
def test_files_that_are_no_recipes(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    match damage:
        case "folder":
            path.mkdir()
        case "binary":
            path.write_bytes(b"name = \xff\xfe")
        case "toml":
            path.write_text("name = \n[clients")
    with pytest.raises(UserError) as raised:
        load_recipe(path)
    words = {"missing": "no such recipe", "folder": "directory", "binary": "byte 7", "toml": "line 1"}
    assert words[damage] in str(raised.value)
    assert str(path) in str(raised.value)


def test_a_recipe_error_survives_pickling(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("foo = 1\n" + CLIENTS)
    with pytest.raises(RecipeError) as raised:
        load_recipe(path)
    again = pickle.loads(pickle.dumps(raised.value))
    assert str(again) == str(raised.value)
    assert again.problems == raised.value.problems


def _references(schema: Any) -> list[str]:
    if isinstance(schema, dict):
        own = [schema["$ref"]] if "$ref" in schema else []
        return own + [ref for value in schema.values() for ref in _references(value)]
    return [ref for value in schema for ref in _references(value)] if isinstance(schema, list) else []


def test_the_json_schema_is_whole_and_describes_every_key() -> None:
    schema = json.loads(json.dumps(Recipe.model_json_schema()))
    assert schema["type"] == "object"
    assert set(schema["properties"]) == set(Recipe.model_fields)
    references = _references(schema)
    assert references
    for reference in references:
        assert reference.removeprefix("#/$defs/") in schema["$defs"]
    for name, section in schema["$defs"].items():
        assert section["type"] == "object", name
        assert section["additionalProperties"] is (name == "StrategyChoice")
    assert "left" in schema["$defs"]["Data"]["properties"]["too_long"]["description"]


def test_a_recipe_without_clients_takes_those_that_are_known_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('name = "joint"\n')
    assert [client.name for client in load_recipe(path, members=["b", "a"]).clients] == ["b", "a"]
    with pytest.raises(RecipeError, match="there are none"):
        load_recipe(path)
    path.write_text('[[clients]]\nname = "own"\ndata = "own.jsonl"\n')
    assert [client.name for client in load_recipe(path, members=["b", "a"]).clients] == ["own"]
