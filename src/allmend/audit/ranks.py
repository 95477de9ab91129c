"""Does a member's model know planted canaries better than the toss of their coins explains?

Whether a canary was planted is decided by a fair coin of its own, which depends on nothing else. As long as nothing of
how the coins fell has reached a model, planted canaries and controls are exchangeable in it, whatever it has learnt of
texts of their kind: the Mann–Whitney statistic of any score has its exact null distribution. So a model that has met
none of the others' canaries, such as one of a member that trains alone, is called one that knows them only by chance.

Source: Mann, Whitney, "On a test of whether one of two random variables is stochastically larger than the other",
Annals of Mathematical Statistics 18, 1947.
"""

from collections.abc import Sequence

from scipy.stats import mannwhitneyu

from allmend.audit.likelihood import Reading
from allmend.data.canaries import Canary
from allmend.results import RankTest, Whose


def rank_tests(
    model: str, whose: Whose, canaries: Sequence[Canary], readings: Sequence[Reading], base: Sequence[Reading]
) -> list[RankTest]:
    """Tests of one member's model, one for each number of copies that has planted canaries; none without controls.

    Args:
        model: its name.
        whose: canaries they are.
        canaries: planted ones and controls.
        readings: of them, under the model.
        base: the same under the base model, which takes out what makes a canary easy for any model.
    """
    scored = [
        (canary, (one.log_likelihood.mean() - before.log_likelihood.mean()).item())
        for canary, one, before in zip(canaries, readings, base, strict=True)
    ]
    controls = [value for canary, value in scored if not canary.inserted]
    tests = []
    for copies in sorted({canary.copies for canary in canaries}):
        planted = [value for canary, value in scored if canary.inserted and canary.copies == copies]
        if planted and controls:
            p = float(mannwhitneyu(planted, controls, alternative="greater").pvalue)
            about = RankTest(model=model, whose=whose, copies=copies, planted=len(planted), controls=len(controls), p=p)
            tests.append(about)
    return tests
