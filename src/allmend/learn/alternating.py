"""Local work on a mixture of experts: experts learn from training records, routers from validation records, in turns.

    min over experts of f_train(θ, φ), with the router φ = argmin f_valid(θ, ·),

by τ steps of the experts, then k of the routers, and so on. The validation records are of what a member's model is to
be good at; routers that learn from the training records favour the experts that fitted them best. In each phase nothing
but its own group requires a gradient: no batch of one group adds to the other's steps.

A member's steps are counted over all rounds. There is no router step before the first τ expert steps, when routers have
no gradient.

Source: Fan, Messmer, Doikov, Jaggi, "On-Device Collaborative Language Modeling via a Mixture of Generalists and
Specialists" (CoMiGS), arXiv 2409.13931.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from allmend.data.chat import Encoded
from allmend.data.packing import Row
from allmend.errors import UserError
from allmend.learn.loop import DivergedError, Outcome, Step, train
from allmend.learn.objective import logits_at_sources
from allmend.models.adapters import Trainable
from allmend.models.mixture import Mixture, role
from allmend.models.mixture_layers import watched_gates
from allmend.models.tensors import Tensors
from allmend.recipe import Train

_ROUTER_STREAM = 1_919_905_652
"""Added to a seed, so that routers see their records in an order of their own; below 2³², for torch's generator on the
CPU reads no higher bits."""


@dataclass(frozen=True)
class RouterSettings:
    """How routers learn.

    Attributes:
        every: τ, expert steps before the routers' turn; at least 1.
        steps: k, router steps in a turn; with 0 the gates stay as they are at the start.
        learning_rate: of their AdamW, the same in every step.
        balance: weight of a term beside the loss (see `balance_penalty`).
    """

    every: int = 30
    steps: int = 10
    learning_rate: float = 2e-3
    balance: float = 0.0


@dataclass(frozen=True)
class Alternation:
    """What came of one call of `alternate`.

    Attributes:
        tensors: the mixture's state.
        experts: state of the experts' optimiser.
        routers: state of the routers' optimiser; empty before their first step.
        steps: of the experts, in order.
        router_steps: of the routers, in order.
        learnt: what the experts learnt from each training record, int64 [N, 2], as in `Outcome.learnt`.
        validated: what the routers learnt from each validation record.
    """

    tensors: Tensors
    experts: Tensors
    routers: Tensors
    steps: tuple[Step, ...]
    router_steps: tuple[Step, ...]
    learnt: torch.Tensor
    validated: torch.Tensor


def alternate(
    mixture: Mixture,
    records: Sequence[Encoded],
    validation: Sequence[Encoded],
    settings: Train,
    router: RouterSettings,
    *,
    steps: int,
    first_step: int,
    schedule_step: int,
    total_steps: int,
    seed: int,
    experts: Tensors | None = None,
    routers: Tensors | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
    on_router_step: Callable[[Step], None] = lambda step: None,
) -> Alternation:
    """Train a mixture, in place, for some expert steps of a member's schedule and the router steps among them.

    The routers' turn comes after every τ-th expert step of the member, also where that is the last one here. Where one
    expert alone is present, its gate is 1, and there are no router steps.

    Args:
        mixture: left with the trained parameters.
        records: the member's training records; those without a target are passed over.
        validation: of the member's target; not needed where no router learns.
        settings: of the experts' steps. Routers take batch size, weight decay, clipping and the like from it.
        router: of the routers' steps.
        steps: expert steps to take.
        first_step: expert steps this member has taken before.
        schedule_step: the step (from 0) of the experts' schedule to start at.
        total_steps: steps of that schedule.
        seed: of data order and dropout; routers see theirs in another order.
        experts, routers: the optimisers' states from an earlier call; fresh when None or empty.
        on_step: told after every expert step.
        on_router_step: told after every router step; numbered by themselves.

    Raises:
        DivergedError: loss or gradient norm became NaN or infinite.
        UserError: no training record has a token to learn from, or no validation record where routers learn.
        ValueError: `router.every` is not positive.
    """
    if router.every < 1:
        raise ValueError(f"routers learn after every {router.every} expert steps: this must be at least 1")
    groups = {own: [name for name in mixture.parameters() if (role(name) == "router") == own] for own in (False, True)}
    learns = bool(groups[True]) and int(mixture.present.sum()) > 1 and router.steps > 0
    if learns and not any(record.learns for record in validation):
        raise UserError(
            "no validation record has a token to learn from, and the routers learn from nothing else",
            hint="Set validation aside, or give members a single expert.",
        )
    for_router = settings.model_copy(
        update={
            "optimizer": "adamw",
            "optimizer_state": "reset",
            "learning_rate": router.learning_rate,
            "schedule": "constant",
            "warmup_steps": 0,
            "log_updates": False,
        }
    )

    def expert_phase(done: int, count: int, state: Tensors | None) -> Outcome:
        with _alone(mixture, groups[False]) as part:
            return train(
                part,
                records,
                settings,
                steps=count,
                first_step=first_step + done,
                schedule_step=schedule_step + done,
                total_steps=total_steps,
                seed=seed,
                optimizer=state,
                on_step=on_step,
            )

    def router_phase(turn: int, state: Tensors | None) -> Outcome:
        with _alone(mixture, groups[True]) as part:
            try:
                return train(
                    part,
                    validation,
                    for_router,
                    steps=router.steps,
                    first_step=turn * router.steps,
                    schedule_step=turn * router.steps,
                    total_steps=(turn + 1) * router.steps,  # of a schedule that is constant
                    seed=seed + _ROUTER_STREAM,
                    optimizer=state,
                    penalty=balance_penalty(mixture, router.balance),
                    on_step=on_router_step,
                )
            except DivergedError as error:
                hint = "Lower the routers' learning rate, then start a new run."
                raise DivergedError(f"routers: {error.what}", hint=hint) from error

    experts, routers = experts or {}, routers or {}
    taken: list[Step] = []
    routed: list[Step] = []
    learnt = torch.zeros(len(records), 2, dtype=torch.int64)
    validated = torch.zeros(len(validation), 2, dtype=torch.int64)
    while len(taken) < steps:
        at = first_step + len(taken)
        count = min(router.every - at % router.every, steps - len(taken))
        outcome = expert_phase(len(taken), count, experts)
        experts, learnt = outcome.optimizer, learnt + outcome.learnt
        taken += outcome.steps
        if learns and (at + count) % router.every == 0:
            outcome = router_phase((at + count) // router.every - 1, routers)
            routers, validated = outcome.optimizer, validated + outcome.learnt
            routed += outcome.steps
    return Alternation(mixture.state(), experts, routers, tuple(taken), tuple(routed), learnt, validated)


def balance_penalty(mixture: Mixture, weight: float) -> Callable[[Sequence[Row]], None]:
    """A `penalty` for `train` that draws the gates of a batch towards equal use of the experts.

    The term is the weight times the mean over MLPs of n Σ_e ḡ_e², with ḡ_e the mean gate of expert e over all of the
    batch's tokens, however they are packed, and n experts present: 1 where all are used alike, and n where one is. It
    is the load-balancing loss of Fedus, Zoph, Shazeer, "Switch Transformers", JMLR 2022, where every token goes to all
    experts. It takes passes of its own.
    """

    def penalise(rows: Sequence[Row]) -> None:
        tokens = sum(row.tokens for row in rows)

        def gates_of(row: Row) -> torch.Tensor:
            """Σ_t g_t / T over a row's tokens, [layers, E]."""
            with watched_gates(mixture.model) as found:
                logits_at_sources(mixture.model, row.to(mixture.present.device))
            return torch.stack([gates.flatten(0, -2).sum(0) for gates in found]) / tokens

        with torch.no_grad():
            mean = torch.stack([gates_of(row) for row in rows]).sum(0)
        slope = weight * 2 * mixture.present.sum() * mean / mean.shape[0]
        for row in rows:
            (slope * gates_of(row)).sum().backward()  # type: ignore[no-untyped-call]

    return penalise if weight else lambda rows: None


@contextlib.contextmanager
def _alone(mixture: Mixture, names: Collection[str]) -> Iterator[Trainable]:
    """Some of a mixture's parameters as all that learns; nothing else requires a gradient meanwhile."""
    parameters = mixture.parameters()
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)
    try:
        yield Trainable(mixture.model, "mixture", {name: parameters[name] for name in names})
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
