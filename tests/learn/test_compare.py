import math
from collections.abc import Sequence
from statistics import fmean

import pytest

from allmend.intervals import mean
from allmend.learn.compare import ModelScores, utility_table
from allmend.learn.evaluate import Score, utility
from allmend.results import BASE, POOLED, Difference, UtilityTable


def scores(model: str, right: dict[str, Sequence[int]], *, member: str | None = None) -> ModelScores:
    by_client = {
        client: [
            Score(f"{client}{n}", "k", 1.0 + n, 3, choice=int(hit), answer=1, choices=2) for n, hit in enumerate(hits)
        ]
        for client, hits in right.items()
    }
    # an open question between the others, which has no part in the differences
    by_client["a"].insert(1, Score("open", "k", 2.0, 4))
    return ModelScores(model, member, by_client | {"text": [Score("t0", "", 2.0, 9), Score("t1", "", 3.0, 9)]})


RIGHT = {
    BASE: {"a": [0, 0, 1, 0], "b": [0, 1, 0]},
    "fedavg": {"a": [1, 1, 1, 0], "b": [1, 0, 1]},
    "pool": {"a": [1, 0, 0, 1], "b": [1, 1, 1]},
}
PERSONAL = {"a": {"a": [1, 0, 1, 1], "b": [0, 0, 0]}, "b": {"a": [0, 1, 0, 0], "b": [1, 1, 0]}}


@pytest.fixture(scope="module")
def models() -> list[ModelScores]:
    shared = [scores(name, right) for name, right in RIGHT.items()]
    return [*shared, *(scores("local", right, member=member) for member, right in PERSONAL.items())]


@pytest.fixture(scope="module")
def table(models: list[ModelScores]) -> UtilityTable:
    return utility_table(models, main="fedavg", seed=7)


def found(table: UtilityTable, model: str, other: str, held_out: str) -> Difference:
    (one,) = [d for d in table.differences if (d.model, d.other, d.held_out) == (model, other, held_out)]
    return one


def test_every_model_stands_beside_every_held_out_set(table: UtilityTable, models: list[ModelScores]) -> None:
    assert [(row.model, row.member, row.held_out) for row in table.rows] == [
        (model.model, model.member, held_out) for model in models for held_out in ("a", "b", "text", POOLED)
    ]
    fedavg = models[1]
    pooled = [score for client in ("a", "b", "text") for score in fedavg.by_client[client]]
    assert table.rows[7] == utility(pooled, model="fedavg", held_out=POOLED)
    assert table.rows[5] == utility(fedavg.by_client["b"], model="fedavg", held_out="b")
    assert table.seed == 7


@pytest.mark.parametrize("other", [BASE, "pool"])
def test_differences_are_paired_by_question(table: UtilityTable, other: str) -> None:
    for held_out, clients in (("a", "a"), ("b", "b"), (POOLED, "ab")):
        pairs = [(x - y) for c in clients for x, y in zip(RIGHT["fedavg"][c], RIGHT[other][c], strict=True)]
        one = found(table, "fedavg", other, held_out)
        assert one.accuracy == mean(pairs)
        assert not one.other_is_member_mean


def test_other_arms_are_compared_with_the_base_alone(table: UtilityTable) -> None:
    pairs = {(d.model, d.other) for d in table.differences}
    assert pairs == {("fedavg", BASE), ("fedavg", "pool"), ("fedavg", "local"), ("pool", BASE)}


def test_a_client_is_compared_with_its_own_personal_model(table: UtilityTable) -> None:
    for client in "ab":
        pairs = [x - y for x, y in zip(RIGHT["fedavg"][client], PERSONAL[client][client], strict=True)]
        one = found(table, "fedavg", "local", client)
        assert one.accuracy == mean(pairs)
        assert not one.other_is_member_mean


def test_pooled_records_are_compared_with_the_members_mean(table: UtilityTable) -> None:
    pairs = [
        RIGHT["fedavg"][c][n] - fmean(PERSONAL[member][c][n] for member in PERSONAL)
        for c in "ab"
        for n in range(len(RIGHT["fedavg"][c]))
    ]
    one = found(table, "fedavg", "local", POOLED)
    assert (one.accuracy.value, one.accuracy.low) == (pytest.approx(mean(pairs).value), pytest.approx(mean(pairs).low))
    assert one.accuracy.n == 7
    assert one.other_is_member_mean


def test_where_no_question_is_asked_losses_alone_are_compared(table: UtilityTable) -> None:
    texts = [difference for difference in table.differences if difference.held_out == "text"]
    assert {(d.model, d.other) for d in texts} == {("fedavg", BASE), ("fedavg", "pool"), ("pool", BASE)}
    assert all(d.accuracy is None and d.log_perplexity is not None for d in texts)


def test_where_nothing_is_held_out_there_is_no_difference() -> None:
    nothing = [ModelScores(name, None, {"a": []}) for name in (BASE, "fedavg")]
    assert utility_table(nothing, main="fedavg", seed=0).differences == ()


def test_a_difference_of_losses_is_that_of_the_perplexities_and_paired() -> None:
    """By record, the second is worse by a tenth of a nat a token, on average: far less than records differ."""
    losses = [3.0, 40.0, 9.0, 1.0]
    better = {"a": [Score(str(n), "", loss, 10) for n, loss in enumerate(losses)]}
    worse = {"a": [Score(str(n), "", loss + 1 + 0.1 * (-1) ** n, 10) for n, loss in enumerate(losses)]}
    table = utility_table([ModelScores(BASE, None, worse), ModelScores("arm", None, better)], main="arm", seed=0)
    one = found(table, "arm", BASE, "a").log_perplexity
    rows = {row.model: row.perplexity for row in table.rows if row.held_out == "a"}
    assert one.value == pytest.approx(math.log(rows["arm"].value) - math.log(rows[BASE].value)) == pytest.approx(-0.1)
    assert -0.15 < one.low < one.value < one.high < -0.05
    assert rows[BASE].low < rows["arm"].value < rows[BASE].high


def test_against_personal_models_the_loss_is_that_of_their_mean() -> None:
    own = [
        ModelScores("local", name, {"a": [Score("0", "", loss, 4), Score("1", "", 2.0, 2)], "b": []})
        for name, loss in (("a", 8.0), ("b", 4.0))
    ]
    shared = ModelScores("fedavg", None, {"a": [Score("0", "", 3.0, 4), Score("1", "", 2.5, 2)], "b": []})
    table = utility_table([shared, *own], main="fedavg", seed=0)
    assert found(table, "fedavg", "local", POOLED).log_perplexity.value == pytest.approx((3 - 6 + 0.5) / 6)
    assert found(table, "fedavg", "local", "a").log_perplexity.value == pytest.approx((3 - 8 + 0.5) / 6)


def test_a_main_arm_of_personal_models_has_no_differences(models: list[ModelScores]) -> None:
    table = utility_table([models[0], *models[3:]], main="local", seed=0)
    assert table.differences == ()
    assert len(table.rows) == 12
