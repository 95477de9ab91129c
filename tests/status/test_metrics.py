"""Metrics: Prometheus' own parser reads back what the standing holds."""

from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from tests.status.conftest import OFFERED, arm, done, started

from allmend.events import Waiting, Warned
from allmend.status.metrics import exposition
from allmend.status.standing import standing


def samples(run: Any) -> dict[tuple[str, ...], float]:
    text = exposition(standing(run.folder)).decode()
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_they_say_what_the_standing_says(begun: Any) -> None:
    begun.add(started(), OFFERED, arm(rounds=9), done(1, "a", "b"), done(2, "a", loss=None), Warned(message="x"))
    begun.work()
    begun.add(Waiting(members=["a", "c"], away=["c"]))
    found = samples(begun)
    assert found["allmend_run_info", "some/model", "joint", "1.2"] == 1
    states = {key[1]: value for key, value in found.items() if key[0] == "allmend_run_state"}
    assert states == {"running": 1, "finished": 0, "stopped": 0, "not running": 0}
    assert found["allmend_rounds_done", "fedavg"] == 2
    assert found["allmend_rounds_planned", "fedavg"] == 9
    assert ("allmend_round_loss", "fedavg") not in found
    assert found["allmend_round_seconds", "fedavg"] == 10
    assert found["allmend_epsilon", "fedavg", "members"] == 1
    assert found["allmend_member_rounds_total", "a"] == 2
    assert found["allmend_member_bytes_total", "to", "a"] == 200
    assert found["allmend_member_bytes_total", "from", "b"] == 40
    assert [found["allmend_member_away", name] for name in "abc"] == [0, 0, 1]
    assert found["allmend_warnings_total",] == 1
    assert found["allmend_last_event_timestamp_seconds",] == 1007


def test_a_name_with_quotes_and_line_breaks_stays_one_label(begun: Any) -> None:
    strange = 'a"b\\c\nd'
    begun.add(started(strange), arm(), done(1, strange))
    assert samples(begun)["allmend_member_rounds_total", strange] == 1


def test_a_run_that_has_not_begun_has_a_state(begun: Any) -> None:
    assert samples(begun)["allmend_run_state", "not running"] == 1
