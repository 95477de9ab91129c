import math
from collections.abc import Callable
from pathlib import Path

import pytest

from allmend import life
from allmend.audit_runs.guarantees import accounted_epsilon
from allmend.errors import UserError
from allmend.events import RoundDone, Warned
from allmend.models.load import LoadedModel
from allmend.recipe import Recipe
from allmend.results import Budget, PrivacyTable
from allmend.run import RunFolder

MakeRecipe = Callable[..., Recipe]


def test_the_private_arm_has_a_guarantee_and_tells_no_loss(run: RunFolder) -> None:
    table = run.read_table("privacy", PrivacyTable)
    assert table is not None
    assert set(table.budgets) == {"private"}
    rounds = [event for event in run.history() if isinstance(event, RoundDone) and event.arm == "private"]
    assert [event.loss for event in rounds] == [None, None]
    for budget in table.budgets["private"]:
        assert budget.simulated
        assert budget.epsilon is not None
        assert budget.epsilon <= 8.0
        assert list(budget.by_round) == [event.epsilon[str(budget.client)] for event in rounds]
        assert budget.by_round[-1] == pytest.approx(budget.epsilon)


def test_guarantees_are_paid_for_the_records_that_the_layers_leave(
    workplace: Path, make: MakeRecipe, model: LoadedModel, tmp_path: Path
) -> None:
    """What the table says afterwards is what each round said, whichever layers came before the noise."""
    record = {"noise_multiplier": 1.0, "delta": 0.01}
    recipe = make(
        canaries=None,
        compare={
            "both": {"privacy": {"record": record, "deduplicate": {"similarity": 0.3}, "goldfish": {"k": 2}}},
            "open": {"privacy": {"record": {"noise_multiplier": 0, "clip": math.inf}}},
            "clipped": {"privacy": {"record": {"noise_multiplier": 0}}},
            "faint": {"privacy": {"record": {"noise_multiplier": 0.005}}},
            "everybody": {"privacy": {"member": {"noise_multiplier": 0, "clip": math.inf}}},
        },
    )
    run = life.tune(recipe, tmp_path / "run", base=workplace, model=model)
    table = run.read_table("privacy", PrivacyTable)
    assert table is not None
    rounds = [event for event in run.history() if isinstance(event, RoundDone) and event.arm == "both"]
    for budget in table.budgets["both"]:
        assert budget.by_round[-1] == budget.epsilon == rounds[-1].epsilon[str(budget.client)]
        assert budget.stopped is None
    assert [words.split(" ")[0] for words in table.layers["both"]] == ["deduplication", "Goldfish"]
    assert " 0 similar" not in table.layers["both"][0]  # something was left out, or nothing would be shown
    # what guarantees nothing is not given an ε, and what does nothing is not there
    assert set(table.budgets) == {"both", "clipped", "faint"}
    assert {budget.epsilon for arm in ("clipped", "faint") for budget in table.budgets[arm]} == {None}


def test_a_budget_ends_training_before_it_is_exceeded(
    workplace: Path, make: MakeRecipe, model: LoadedModel, tmp_path: Path
) -> None:
    privacy = {"member": {"noise_multiplier": 1.0, "epsilon": 7.0, "delta": 1e-5}}
    recipe = make(privacy=privacy, strategy={"name": "fedavg", "rounds": 9})
    told: list[object] = []
    run = life.tune(recipe, tmp_path / "run", base=workplace, model=model, listeners=[told.append])
    rounds = [event for event in run.history() if isinstance(event, RoundDone)]
    assert 0 < len(rounds) < 9
    assert any(isinstance(event, Warned) and "budget ends the training" in event.message for event in told)
    table = run.read_table("privacy", PrivacyTable)
    assert table is not None
    (budget,) = table.budgets["fedavg"]
    assert (budget.unit, budget.stopped) == ("member", len(rounds))
    assert budget.epsilon is not None
    assert budget.epsilon <= 7.0
    longer = make(privacy={"member": {"noise_multiplier": 1.0, "epsilon": 0.5}})
    with pytest.raises(UserError, match=r"one round costs ε = [\d.]+, more than the budget of 0.5"):
        life.tune(longer, tmp_path / "dear", base=workplace, model=model)
    assert not (tmp_path / "dear").exists()


def test_the_accounted_epsilon_is_the_largest_of_all_clients_and_none_where_one_has_no_guarantee() -> None:
    def budget(unit: str, epsilon: float | None) -> Budget:
        return Budget(
            unit=unit, client=None, epsilon=epsilon, delta=1e-5, noise_multiplier=1.0, clip=1.0, sampling="", steps=1
        )

    records = [budget("record", 2.0), budget("record", 3.0)]
    assert accounted_epsilon([]) is None
    assert accounted_epsilon(records) == 3.0
    assert accounted_epsilon([*records, budget("record", None)]) is None
    assert accounted_epsilon([*records, budget("record", None), budget("member", 5.0)]) == 5.0
    assert accounted_epsilon([*records, budget("member", 1.0)]) == 1.0
