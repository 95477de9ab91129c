"""The table that an audit's findings in several models make."""

import pytest

from allmend.audit.memorisation import Findings
from allmend.audit_runs.tables import findings_table


def findings(model: str, skipped: int) -> Findings:
    return Findings(
        model=model,
        extraction=(),
        discoverable=(),
        gaps=(),
        exposure=(),
        membership=(),
        epsilon=(),
        probes=(),
        skipped=skipped,
        refused=(),
        identifiers={},
        readings=(),
        group_readings={},
        ranks=(),
    )


@pytest.mark.parametrize("arms", [(), (1,), (1, 1, 1), (1, 0)])
def test_a_canary_too_short_for_a_prefix_is_one_however_many_models_were_asked(arms: tuple[int, ...]) -> None:
    """One arm never drew it."""
    every = [findings("base", 1), *(findings(f"arm {i}", skipped) for i, skipped in enumerate(arms))]
    assert findings_table(every, [], 0).skipped_prefixes == 1
