"""`allmend privacy`: what a privacy budget costs, before anything is trained."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from allmend.errors import UserError

if TYPE_CHECKING:
    from allmend.federation.privacy.plan import Plan

app = typer.Typer(help="Differential privacy: what a budget costs.", no_args_is_help=True)


@app.callback()
def _privacy() -> None:
    """Keeps `plan` a command of its own while it is the only one."""


@app.command()
def plan(
    rounds: Annotated[int, typer.Option(help="Rounds of the whole run.")],
    target_epsilon: Annotated[float, typer.Option(help="The budget for the whole run.")],
    delta: Annotated[float, typer.Option(help="Probability with which the guarantee may fail.")] = 1e-5,
    clients: Annotated[int | None, typer.Option(help="Members in all: the guarantee is for a member.")] = None,
    fraction: Annotated[
        float | None, typer.Option(help="Probability that a member takes part in a round.  [default: 1]")
    ] = None,
    records: Annotated[
        int | None, typer.Option(help="A client's training records: the guarantee is for a record.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Records per step, on average (with --records).")] = None,
    local_steps: Annotated[int | None, typer.Option(help="Steps in a round (with --records).")] = None,
) -> None:
    """Find the noise that keeps a run within its budget, and show what other numbers would need.

    For members:  allmend privacy plan --clients 100 --fraction 0.1 --rounds 50 --target-epsilon 2

    For records:  allmend privacy plan --records 5000 --batch-size 16 --local-steps 20 --rounds 10 --target-epsilon 2
    """
    from allmend.federation.privacy.plan import plan_members, plan_records

    _check_one_unit(
        {"--clients": clients, "--fraction": fraction},
        {"--records": records, "--batch-size": batch_size, "--local-steps": local_steps},
    )
    if clients is not None:
        found = plan_members(
            clients=clients,
            rounds=rounds,
            fraction=1.0 if fraction is None else fraction,
            epsilon=target_epsilon,
            delta=delta,
        )
    else:
        assert records is not None
        assert batch_size is not None
        assert local_steps is not None
        found = plan_records(
            records=records,
            batch_size=batch_size,
            local_steps=local_steps,
            rounds=rounds,
            epsilon=target_epsilon,
            delta=delta,
        )
    _show(Console(), found)


def _check_one_unit(members: dict[str, float | None], records: dict[str, float | None]) -> None:
    """Options of one level alone, and all that it needs."""
    for_members, for_records = (
        [name for name, value in options.items() if value is not None] for options in (members, records)
    )
    if for_members and for_records:
        raise UserError(
            f"{', '.join(for_members)} is about members, {', '.join(for_records)} about records",
            hint="Plan the two guarantees one after the other.",
        )
    missing = set(records if for_records else ["--clients"]) - {*for_members, *for_records}
    if missing:
        raise UserError(
            f"the plan lacks {', '.join(name for name in (*members, *records) if name in missing)}",
            hint="Give --clients for members, or --records, --batch-size and --local-steps for records.",
        )


def _show(console: Console, plan: "Plan") -> None:
    noise = f"noise_multiplier = {plan.need.noise_multiplier:g}"
    facts = Table.grid(padding=(0, 2))
    facts.add_row("Plan", plan.setting)
    facts.add_row("Budget", f"ε = {plan.epsilon:g} at δ = {plan.delta:g}")
    facts.add_row("Noise", Text.assemble((f"{noise}", "bold"), f", under [privacy.{plan.unit}] of a recipe"))
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
        table.add_row(need.choice, f"{need.noise_multiplier:g}", f"{need.noise_on_average:.3g}")
    console.print(table)
    averaged = "members' updates" if plan.unit == "member" else "records' gradients"
    console.print(
        f"Noise on the average: its standard deviation on every parameter of the average of {averaged}, in clips. "
        "That average is no longer than one clip; noise on d parameters is about √d times as long as on one."
    )
