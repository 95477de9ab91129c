"""What a reader learns of the layers: which were on, what they guarantee and what that rests on."""

import re
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pytest

from allmend.report import numbers
from allmend.report.page import write_report
from allmend.results import Budget, PrivacyTable

BUDGET = Budget(
    unit="record",
    client="injuries",
    epsilon=2.0,
    delta=1e-5,
    noise_multiplier=1.1,
    clip=1.0,
    sampling="each step draws every record with probability 0.04, independently (Poisson)",
    steps=60,
    by_round=(1.2, 2.0),
)


def words(run: Path) -> str:
    found = re.search(r'<section id="privacy".*?</section>', write_report(run).read_text(), flags=re.S)
    assert found
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", found[0])).replace("\u202f", " ").split())


@pytest.fixture
def with_table(run: Path) -> Callable[..., str]:
    """The section's words with such layers and budgets of `fedavg`."""

    def write(*budgets: Budget, layers: tuple[str, ...] = ()) -> str:
        table = PrivacyTable(layers={"fedavg": layers}, budgets={"fedavg": budgets})
        (run / "results/privacy.json").write_text(table.model_dump_json())
        return words(run)

    return write


def test_without_any_layer_there_is_one_sentence(run: Path, with_table: Callable[..., str]) -> None:
    text = with_table()
    assert re.fullmatch(r"What protected the records No layer of privacy was on in any arm[^.]*\.", text)
    (run / "results/privacy.json").unlink()
    assert words(run) == "What protected the records No layer of privacy is recorded for this run."


def test_layers_without_guarantee_are_named_as_such(with_table: Callable[..., str]) -> None:
    text = with_table(layers=("Goldfish loss (k = 4)",))
    assert "fedavg Goldfish loss (k = 4)" in text
    assert "No arm has a guarantee of differential privacy" in text
    assert "no formal guarantee" not in text


@pytest.mark.parametrize("layer", ["weight noise: Gaussian, 0.01; no formal guarantee", "weight_noise of 0.01"])
def test_weight_noise_is_no_formal_guarantee_said_once(with_table: Callable[..., str], layer: str) -> None:
    assert with_table(layers=(layer,)).count("no formal guarantee") == 1


def test_guarantee_names_its_unit_and_all_that_it_rests_on(with_table: Callable[..., str]) -> None:
    text = with_table(BUDGET, BUDGET.model_copy(update={"unit": "member", "client": None}))
    for part in ("one training record of injuries", "one member with all its records", "10⁻⁵", "1.10", BUDGET.sampling):
        assert part in text
    assert "How to read ε" in text
    assert "e ε = 7.39" in text  # e²


@pytest.mark.parametrize(("record", "member"), [(True, False), (False, True), (True, True)])
def test_epsilon_is_said_to_hold_where_it_does(with_table: Callable[..., str], record: bool, member: bool) -> None:
    members = BUDGET.model_copy(update={"unit": "member", "client": None})
    text = with_table(*[BUDGET] * record, *[members] * member)
    assert ("what leaves the client and the final model (for a record)" in text) is record
    assert ("the models sent to all (for a member)" in text) is member
    assert "not hold for the run folder and this page" in text
    assert "whatever anybody sees" not in text


def test_clip_and_noise_are_layers_too(with_table: Callable[..., str]) -> None:
    members = BUDGET.model_copy(update={"unit": "member", "client": None})
    for budget, told in ((BUDGET, "each training record"), (members, "each member with all its records")):
        text = with_table(budget, layers=("Goldfish loss (k = 4)",))
        assert f"fedavg Goldfish loss (k = 4) differential privacy for {told}, ε below" in text
        text = with_table(budget.model_copy(update={"epsilon": None, "noise_multiplier": 0.0}))
        assert f"fedavg clip for {told}, without noise" in text
        assert "differential privacy for" not in text


def test_every_epsilon_by_round_is_on_the_page(run: Path, privacy_table: PrivacyTable) -> None:
    text = words(run)
    for b in privacy_table.budgets["private"]:
        assert all(numbers.number(spent) in text for spent in b.by_round if spent is not None)
        assert numbers.number(b.epsilon or 0) in text


@pytest.mark.parametrize("simulated", [True, False])
def test_says_where_the_noise_came_from(with_table: Callable[..., str], simulated: bool) -> None:
    text = with_table(BUDGET.model_copy(update={"simulated": simulated}))
    assert ("Simulation (fedavg)" in text) is simulated
    assert ("cryptographic generator (fedavg)" in text) is not simulated


def test_budget_that_stopped_training_is_told(with_table: Callable[..., str]) -> None:
    assert "stopped" not in with_table(BUDGET)
    assert "The budget stopped fedavg after round 2" in with_table(BUDGET.model_copy(update={"stopped": 2}))


def test_without_noise_there_is_no_figure(with_table: Callable[..., str]) -> None:
    text = with_table(BUDGET.model_copy(update={"epsilon": None, "noise_multiplier": 0.0, "by_round": (None, None)}))
    assert "no noise, no guarantee" in text
    assert "How to read ε" not in text
    assert "Simulation" not in text


def test_rounds_before_a_member_took_part_are_blank(with_table: Callable[..., str]) -> None:
    text = with_table(BUDGET.model_copy(update={"by_round": (None, 2.0)}))
    assert "injuries fedavg – 2.00" in text
    assert "injuries, round 2 ε = 2.00" in text
    assert "round 1 ε" not in text
