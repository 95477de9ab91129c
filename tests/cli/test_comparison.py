"""What is printed of models side by side."""

from io import StringIO

from rich.console import Console

from allmend.cli.comparison import show_comparison
from allmend.results import ComparedModel, ComparedPair, Comparison, Estimate


def printed(*models: ComparedModel, pairs: tuple[ComparedPair, ...] = ()) -> str:
    out = StringIO()
    show_comparison(Console(file=out, width=200), Comparison(models=models, pairs=pairs))
    return out.getvalue()


def test_a_bound_measured_of_one_copy_is_shown_whatever_the_canaries_that_are_compared() -> None:
    once = ComparedModel(label="once", copies=1, measured=1.25)
    both = ComparedModel(label="both", copies=10, measured=1.25, measured_together=3.5)
    together = ComparedModel(label="together", copies=10, measured_together=3.5)
    assert "≥ 1.25 (×1)" in printed(once)
    assert "≥ 3.50" not in printed(once)
    for bound in ("≥ 1.25 (×1)", "≥ 3.50 (×10)"):
        assert bound in printed(both)
    assert "(×1)" not in printed(together)
    assert "≥ 3.50 (×10)" in printed(together)
    assert "≥" not in printed(ComparedModel(label="unmeasured", copies=1))


def test_a_pair_says_how_many_canaries_it_rests_on() -> None:
    gap = Estimate(value=-0.5, low=-0.6, high=-0.4, n=23)
    exact = Estimate(value=-0.25, n=11)
    models = [ComparedModel(label=label, copies=10) for label in ("plain", "private")]
    pair = ComparedPair(
        label="private", other="plain", gap=gap, exact=exact, paired=True, same_utility=None, words="[in words]"
    )
    text = printed(*models, pairs=(pair,))
    assert "[in words]." in text
    assert "gap -0.50 (-0.60 to -0.40), exact -25.0 points; paired by canary (n = 23)" in text
