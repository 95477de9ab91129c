"""Settings become the method that they describe, or are refused with what can be done."""

import math
from typing import Any

import pytest

from allmend.attribution.settings import PASSES, Settings
from allmend.errors import UserError
from allmend.influence.inverses import INVERSES
from allmend.influence.methods import DataInf, Exact, Gfim, HessianFree, Lissa


@pytest.mark.parametrize(
    ("name", "kind"),
    [("gfim", Gfim), ("exact", Exact), ("datainf", DataInf), ("lissa", Lissa), ("hessian_free", HessianFree)],
)
def test_each_method_is_built_with_its_damping(name: Any, kind: type) -> None:
    built = Settings(method=name, damping=0.3, inverse="eigen", side="rank").build()
    assert type(built) is kind
    assert built.name == name
    assert name in PASSES
    if name != "hessian_free":
        assert built.damping == 0.3  # type: ignore[attr-defined]
    if isinstance(built, Gfim):
        assert (built.side, built.inverse) == ("rank", INVERSES["eigen"])


@pytest.mark.parametrize("damping", [0.0, -1.0, math.inf, math.nan])
def test_a_damping_out_of_range_is_told(damping: float) -> None:
    with pytest.raises(UserError, match=r"damping must be above 0 and finite.*\n.*0.001 to 10"):
        Settings(damping=damping).build()


def test_an_inverse_that_is_not_known_is_told_with_those_that_are() -> None:
    with pytest.raises(UserError, match=r"there is no inverse 'magic'\nThere are auto, cholesky, eigen, hyperpower."):
        Settings(inverse="magic").build()
