"""Routers that have collapsed: all the weight on one side, so that a mixture is no mixture any more."""

from collections.abc import Sequence

from allmend.results import MemberRouting

LEAST, MOST = 0.01, 0.99
"""Weight of the generalists below which, and above which, the other side is all there is."""

SHARE = 0.9
"""Share of the layers that make it a matter of the whole mixture."""

ENTROPY = 0.01
"""Of the mean gates of a layer (nats), below which one expert has all the weight."""

_CURE = "Raise strategy.balance, such as to 0.01."


def collapsed(arm: str, routing: MemberRouting, layers: Sequence[int]) -> list[str]:
    """What is to be told of a member's routers, in sentences; nothing where they weigh, or where there are none.

    Args:
        arm: its name.
        routing: of the member.
        layers: numbers of the layers.
    """
    if not routing.routed:
        return []
    who = f"arm {arm!r}, client {routing.member!r}:"
    low = [place for place, mass in enumerate(routing.mass) if mass.value < LEAST]
    high = [place for place, mass in enumerate(routing.mass) if mass.value > MOST]
    both = routing.shared and routing.own  # with one sort alone its weight is 0 or 1 by itself
    for places, bound in ((low, f"less than {LEAST:.0%}"), (high, f"more than {MOST:.0%}")):
        if both and len(places) >= SHARE * len(layers):
            return [
                f"{who} routers give the generalists {bound} of the weight in {len(places)} of {len(layers)} layers "
                f"({ranges([layers[place] for place in places])}). {_CURE}"
            ]
    alone = [place for place in range(len(layers)) if routing.entropy(place) < ENTROPY]
    if alone:
        return [
            f"{who} one expert has all the weight in {'layer' if len(alone) == 1 else 'layers'} "
            f"{ranges([layers[place] for place in alone])}. {_CURE}"
        ]
    return []


def ranges(numbers: Sequence[int]) -> str:
    """Increasing whole numbers, runs of them by their ends: `0–3, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
