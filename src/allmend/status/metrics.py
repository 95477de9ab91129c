"""How a run stands, as Prometheus reads it (text exposition format)."""

from collections.abc import Iterator
from typing import get_args

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from allmend.status.standing import Standing, State


def exposition(standing: Standing) -> bytes:
    """The metrics of a run, as text.

    Names follow Prometheus' conventions: base units, counters that end in `_total`. There is nothing about records.
    """
    registry = CollectorRegistry()
    registry.register(_Metrics(standing))
    return generate_latest(registry)


class _Metrics(Collector):
    def __init__(self, standing: Standing) -> None:
        self._standing = standing

    def collect(self) -> Iterator[Metric]:
        it = self._standing
        info = InfoMetricFamily("allmend_run", "The run that is watched")
        info.add_metric([], {"run": it.run, "model": it.model, "version": it.allmend})
        yield info
        state = GaugeMetricFamily("allmend_run_state", "1 for the state that the run is in", labels=["state"])
        for name in get_args(State):
            state.add_metric([name], float(name == it.state))
        yield state
        if it.latest is not None:
            yield GaugeMetricFamily("allmend_last_event_timestamp_seconds", "When the log was last written", it.latest)
        yield CounterMetricFamily("allmend_warnings", "Different warnings so far", len(it.warnings))
        yield from self._arms()
        yield from self._members()

    def _arms(self) -> Iterator[Metric]:
        done = GaugeMetricFamily("allmend_rounds_done", "Rounds that are done", labels=["arm"])
        planned = GaugeMetricFamily("allmend_rounds_planned", "Rounds of the whole arm", labels=["arm"])
        loss = GaugeMetricFamily("allmend_round_loss", "Training loss of the last round (nats)", labels=["arm"])
        seconds = GaugeMetricFamily("allmend_round_seconds", "Median over the last rounds", labels=["arm"])
        epsilon = GaugeMetricFamily("allmend_epsilon", "Privacy budget spent so far", labels=["arm", "of"])
        for arm in self._standing.arms:
            done.add_metric([arm.name], arm.round)
            planned.add_metric([arm.name], arm.rounds)
            if arm.loss is not None:
                loss.add_metric([arm.name], arm.loss)
            if arm.seconds is not None:
                seconds.add_metric([arm.name], arm.seconds)
            for of, value in arm.epsilon.items():
                epsilon.add_metric([arm.name, of], value)
        yield from (done, planned, loss, seconds, epsilon)

    def _members(self) -> Iterator[Metric]:
        rounds = CounterMetricFamily("allmend_member_rounds", "Rounds that the member took part in", labels=["member"])
        octets = CounterMetricFamily("allmend_member_bytes", "Bytes of tensors", labels=["member", "direction"])
        away = GaugeMetricFamily("allmend_member_away", "1 while the member is not heard of", labels=["member"])
        for member in self._standing.members:
            rounds.add_metric([member.name], member.rounds)
            octets.add_metric([member.name, "to"], member.sent)
            octets.add_metric([member.name, "from"], member.received)
            if member.away is not None:
                away.add_metric([member.name], float(member.away))
        yield from (rounds, octets, away)
