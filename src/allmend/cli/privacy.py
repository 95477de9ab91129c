"""`allmend privacy`: what a privacy budget costs, before anything is trained."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from allmend.cli.as_json import AsJson, print_json, silent
from allmend.cli.figures import plain, points
from allmend.cli.progress import shown
from allmend.errors import UserError
from allmend.run import RunFolder

if TYPE_CHECKING:
    from allmend.federation.privacy.plan import Plan
    from allmend.noise_cost import NoiseCost

app = typer.Typer(help="Differential privacy: what a budget costs.", no_args_is_help=True)


@app.command()
def plan(
    rounds: Annotated[int, typer.Option(help="Rounds of the whole run.")],
    target_epsilon: Annotated[float, typer.Option(help="The budget for the whole run.")],
    delta: Annotated[float, typer.Option(help="Probability with which the guarantee may fail.")] = 1e-5,
    clients: Annotated[int | None, typer.Option(help="Members in all: the guarantee is for a member.")] = None,
    fraction: Annotated[
        float | None, typer.Option(help="Probability that a member takes part in a round; 1 if absent.")
    ] = None,
    records: Annotated[
        int | None, typer.Option(help="A client's training records: the guarantee is for a record.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Records per step, on average (with --records).")] = None,
    local_steps: Annotated[int | None, typer.Option(help="Steps in a round (with --records).")] = None,
    run: Annotated[
        Path | None, typer.Option(help="A finished run: ask its held-out records with as much noise on its model.")
    ] = None,
    clip: Annotated[float | None, typer.Option(help="The clip to assume (with --run).")] = None,
    as_json: AsJson = False,
) -> None:
    """Find the noise that keeps a run within its budget, and show what other numbers would need.

    For members:  allmend privacy plan --clients 100 --fraction 0.1 --rounds 50 --target-epsilon 2

    For records:  allmend privacy plan --records 5000 --batch-size 16 --local-steps 20 --rounds 10 --target-epsilon 2
    """
    from allmend.federation.privacy.plan import plan_members, plan_records

    for_members = _given({"--clients": clients, "--fraction": fraction})
    for_records = _given({"--records": records, "--batch-size": batch_size, "--local-steps": local_steps})
    if for_members and for_records:
        raise UserError(
            f"{', '.join(for_members)} is about members, {', '.join(for_records)} about records",
            hint="Plan the two guarantees one after the other.",
        )
    if clients is not None:
        found = plan_members(
            clients=clients,
            rounds=rounds,
            fraction=1.0 if fraction is None else fraction,
            epsilon=target_epsilon,
            delta=delta,
        )
    elif records is not None and batch_size is not None and local_steps is not None:
        found = plan_records(
            records=records,
            batch_size=batch_size,
            local_steps=local_steps,
            rounds=rounds,
            epsilon=target_epsilon,
            delta=delta,
        )
    else:
        raise UserError(
            "what to protect is not said, or not in full",
            hint="Give --clients for members; --records, --batch-size and --local-steps for records.",
        )
    if run is not None and found.unit == "record":
        raise UserError(
            "what records' noise costs can only be seen by training with it: every step goes on from the last",
            where="--run",
            hint="Add an arm with [privacy.record] to the recipe.",
        )
    if clip is not None and (run is None or not 0 < clip < math.inf):
        raise UserError(
            "only a run's model has a use for it" if run is None else f"{clip:g} is no clip",
            where="--clip",
            hint="Name a finished run with --run." if run is None else "Choose a number above 0.",
        )
    if run is not None:
        RunFolder.open(run)  # a wrong path is told before the plan
    console, cost = Console(quiet=as_json), None
    _show(console, found)
    if run is not None:
        from allmend.noise_cost import noise_cost

        with silent() if as_json else shown(console) as listen:
            cost = noise_cost(
                run, noise_on_average=found.need.noise_on_average, rounds=rounds, clip=clip, listeners=[listen]
            )
        _show_cost(console, cost)
    if as_json:
        print_json({"plan": found, "on_the_run": cost})


def _show_cost(console: Console, cost: "NoiseCost") -> None:
    accuracy = f", accuracy {points(cost.accuracy)}" if cost.accuracy else ""
    console.print(
        f"\n[bold]On the run's model ({cost.arm}):[/bold] noise of length {cost.noise:.3g} beside a change of length "
        f"{cost.change:.3g} by training, with a clip of {cost.clip:.3g}. On held-out records: log-perplexity "
        f"{plain(cost.log_perplexity, '+.3f')} nats per token{accuracy}, paired. Clipping itself is not counted.",
        highlight=False,
    )


def _given(options: dict[str, float | None]) -> list[str]:
    return [name for name, value in options.items() if value is not None]


def _show(console: Console, plan: "Plan") -> None:
    noise = f"noise_multiplier = {plan.need.noise_multiplier:g}"
    facts = Table.grid(padding=(0, 2))
    facts.add_row("Plan", plan.setting)
    facts.add_row("Budget", f"ε = {plan.epsilon:g} at δ = {plan.delta:g}")
    facts.add_row("Noise", Text.assemble((noise, "bold"), f", under [privacy.{plan.unit}] of a recipe"))
    facts.add_row("Spent", "; ".join(f"ε = {spent:.3g} after round {round:,}" for round, spent in plan.spent.items()))
    facts.add_row("Meaning", plan.protects)
    for warning in plan.warnings:
        facts.add_row("[yellow]Warning[/yellow]", warning)
    console.print(facts)
    table = Table(title="\nThe same budget with other numbers", title_justify="left")
    table.add_column("numbers")
    table.add_column("noise multiplier", justify="right")
    table.add_column("noise on the average", justify="right")
    for need in (plan.need, *plan.others):
        if math.isfinite(need.noise_multiplier):
            table.add_row(need.choice, f"{need.noise_multiplier:g}", f"{need.noise_on_average:.3g}")
        else:
            table.add_row(need.choice, "none is enough", "")
    console.print(table)
    averaged = "members' updates" if plan.unit == "member" else "records' gradients"
    console.print(
        f"Noise on the average: its standard deviation on each parameter of the average of {averaged}, in clips. "
        "That average is about one clip long at most; noise on d parameters is about √d times as long as on one."
    )
