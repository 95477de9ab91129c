"""Single probes, counted for each member."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from allmend import intervals
from allmend.probes import Probe
from allmend.report.base_rate import Verdict
from allmend.report.members import by_member

PREFIXES = {"10 tokens": 10, "20 tokens": 20, "75 %": 48}


def probe(**changes: object) -> Probe:
    plain = Probe(
        model="arm",
        canary="a/1x/0",
        kind="clinical-note",
        client="a",
        copies=1,
        inserted=True,
        prefix="20 tokens",
        prefix_tokens=20,
        exact=False,
        matched=0.2,
        bleu=0.1,
        secrets_out=0,
        secrets=2,
        log_discovered=-50.0,
        log_likelihood=-3.0,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


probes = st.lists(
    st.builds(
        lambda client, number, inserted, prefix, exact, out, model: probe(
            model=model,
            client=client,
            canary=f"{client}/{number}/{inserted}",
            copies=(1, 3, 10)[number % 3],
            inserted=inserted,
            prefix=prefix,
            prefix_tokens=PREFIXES[prefix],
            exact=exact,
            secrets_out=out,
        ),
        st.sampled_from("abc"),
        st.integers(0, 5),
        st.booleans(),
        st.sampled_from(sorted(PREFIXES)),
        st.booleans(),
        st.integers(0, 2),
        st.sampled_from(["arm", "other"]),
    ),
    max_size=40,
)


@given(probes)
def test_counts_of_each_member_are_those_of_a_plain_count(rows: list[Probe]) -> None:
    found = {m.client: m for m in by_member(rows, "arm", "20 tokens")}
    own = [p for p in rows if p.model == "arm"]
    assert set(found) == {p.client for p in own if p.inserted}
    for client, m in found.items():
        planted = {p.canary for p in own if p.client == client and p.inserted}
        out = {p.canary for p in own if p.client == client and p.inserted and p.exact}
        assert (round(m.planted.value * m.planted.n), m.planted.n) == (len(out), len(planted))
        assert sum(m.copies.values()) == len(out)
        assert list(m.copies) == sorted(m.copies)
        controls = {p.canary for p in own if p.client == client and not p.inserted}
        assert (m.control.n if m.control else 0) == len(controls)
        shortest = [p.prefix_tokens for p in own if p.client == client and p.inserted and p.exact]
        assert (PREFIXES[m.prefix] if m.prefix else None) == min(shortest, default=None)
        at = [p for p in own if p.client == client and p.inserted and p.prefix == "20 tokens"]
        assert (m.secrets.asked if m.secrets else 0) == sum(p.secrets for p in at)
        assert (m.secrets.out if m.secrets else 0) == sum(p.secrets_out for p in at)
        assert (m.secrets.share.n if m.secrets else 0) == len(at)


@given(probes, probes)
def test_a_member_is_judged_by_its_own_canaries_alone(own: list[Probe], others: list[Probe]) -> None:
    own = [replace(p, client="me") for p in own]
    alone = by_member(own, "arm", "20 tokens")
    among = [m for m in by_member([*others, *own], "arm", "20 tokens") if m.client == "me"]
    assert among == alone


@given(probes)
def test_the_most_serious_stand_first(rows: list[Probe]) -> None:
    verdicts = [m.verdict for m in by_member(rows, "arm", "20 tokens")]
    assert verdicts == sorted(verdicts, reverse=True)


def test_a_member_is_judged_as_the_table_of_all_is() -> None:
    """Secrets of one text depend on each other: eight canaries are eight, however many secrets they hold."""
    outs = [3, 4, 1, 0, 2, 0, 4, 1]
    loud = [probe(canary=str(i), secrets=4, secrets_out=out) for i, out in enumerate(outs)]
    silent = [probe(canary=f"c{i}", inserted=False, secrets=4) for i in range(8)]
    (m,) = by_member([*loud, *silent], "arm", "20 tokens")
    assert m.secrets is not None
    assert m.control_secrets is not None
    assert m.secrets.share == intervals.mean_share([out / 4 for out in outs])
    assert m.control_secrets.share == intervals.share(0, 8)
    # as if all secrets were independent, the two would be apart
    assert (intervals.share(sum(outs), 32).low or 0) > (intervals.share(0, 32).high or 1)
    assert m.verdict is Verdict.UNCLEAR


def test_secrets_without_a_whole_canary_count() -> None:
    leaking = [probe(canary=str(i), secrets_out=2) for i in range(8)]
    silent = [probe(canary=f"c{i}", inserted=False) for i in range(8)]
    (m,) = by_member([*leaking, *silent], "arm", "20 tokens")
    assert not m.copies
    assert m.verdict is Verdict.MEMORISED
    (m,) = by_member([*leaking, *(replace(p, secrets_out=2) for p in silent)], "arm", "20 tokens")
    assert m.verdict is Verdict.GUESSED
