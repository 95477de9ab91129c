"""`allmend join`: a run among organisations, at a member."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from allmend.errors import UserError

if TYPE_CHECKING:
    from allmend.consortium.offer import Offer
    from allmend.learn.loop import Step
    from allmend.prepare import EncodedClient
    from allmend.recipe import Recipe
    from allmend.strategy import Declaration, Turn


def join(
    address: Annotated[str, typer.Argument(help="The coordinator: HOST:PORT.")],
    key: Annotated[Path, typer.Option(help="This member's private key (`allmend member key`).")],
    data: Annotated[Path, typer.Option(help="This member's records; they stay here.")],
    name: Annotated[str, typer.Option(help="This member's name, as the coordinator has registered it.")],
    ca: Annotated[Path | None, typer.Option(help="The coordinator's ca.pem.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Plain HTTP, to a coordinator on this machine.")] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Where this member keeps what is its own; allmend-NAME when absent.")
    ] = None,
    held_out: Annotated[
        Path | None, typer.Option(help="Records to be measured on, which are then no share of --data.")
    ] = None,
    target: Annotated[
        Path | None, typer.Option(help="Records of what this member's model is to be good at, for its routers.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Take the base model from here.")] = None,
    accept: Annotated[str | None, typer.Option(help="Agree to the offer with this hash without being asked.")] = None,
    patience: Annotated[float, typer.Option(help="Seconds of silence after which to give up; 0 for never.")] = 0.0,
) -> None:
    """Take part in a run: train on this member's own records, and send what the recipe says.

    Started again with the same arguments, it goes on where it stopped.
    """
    from allmend.federation.engines.flower import check_installed

    check_installed()
    from allmend.consortium.member import MemberSide
    from allmend.consortium.member_end import serve
    from allmend.federation.engines.flower.node import Node
    from allmend.federation.keys import read_key
    from allmend.run import RunFolder

    console = Console()
    if (ca is None) != insecure:
        raise UserError(
            "the coordinator is known by its certificate" if ca is None else "--ca and --insecure exclude each other",
            where="--ca",
            hint="Ask the coordinator for its ca.pem.",
        )
    if not data.is_file():
        raise UserError("no such file", where=data, hint="Name this member's records with --data.")
    for option, path in (("--held-out", held_out), ("--target", target)):
        if path is not None and not path.is_file():
            raise UserError("no such file", where=path, hint=f"Name a file with {option}, or leave it out.")
    own = read_key(key)
    place = folder or Path(f"allmend-{name}")
    place.mkdir(mode=0o700, parents=True, exist_ok=True)

    fault: list[UserError] = []

    def agree(offer: "Offer", recipe: "Recipe", client: "EncodedClient") -> bool:
        _show(console, offer, recipe, client)
        again = f"To agree to this one: --accept {offer.digest}"
        if accept is not None:
            if accept == offer.digest:
                return True
            fault.append(UserError("the offer is another than --accept names", where="--accept", hint=again))
            return False
        if not console.is_terminal:
            fault.append(UserError("nobody is here to agree", where="allmend join", hint=again))
            return False
        return typer.confirm("Take part?")

    last: list[int] = []

    def tell(member: str, turn: "Turn", step: "Step") -> None:
        if last != [turn.round]:
            last[:] = [turn.round]
            loss = "" if step.loss is None else f", loss {step.loss:.3f} at first"
            console.print(f"  round {turn.round} of {turn.rounds}: training{loss}", highlight=False)

    side = MemberSide(name, own, data, place, agree, source=model, on_step=tell, held_out=held_out, target=target)
    waits: set[str] = set()

    def wait(why: str) -> None:
        if why not in waits:
            waits.add(why)
            console.print(f"  waiting: {why}", style="dim", highlight=False)

    node = Node(address, own, ca, patience=patience or float("inf"), on_wait=wait)
    with RunFolder(place).lock():  # two processes of one member could open two sums of the same work
        console.print(f"Joining {address} as {name}", highlight=False)
        if side.resume():
            console.print("Going on with the run that was agreed to.")
        serve(side, node)
    if fault:
        raise fault[0]
    if side.declined:
        console.print("Declined; nothing has left.")
        raise typer.Exit(1)
    console.print(f"The run has ended. This member's folder: {place}", highlight=False, soft_wrap=True)
    for kind in ("adapter", "model", "mixture"):
        for outcome in sorted(place.glob(f"runs/*/arms/*/{kind}")):
            console.print(f"Model   {outcome}", highlight=False, soft_wrap=True)
    for page in sorted(place.glob("runs/*/personalised.html")):
        console.print(f"Arms    {page}", highlight=False, soft_wrap=True)
    for page in sorted(place.glob("runs/*/arms/*/routing.html")):
        console.print(f"Routers {page}", highlight=False, soft_wrap=True)
    for page in sorted(place.glob("runs/*/arms/*/influence/influence.html")):
        console.print(f"Scores  {page}", highlight=False, soft_wrap=True)


def _show(console: Console, offer: "Offer", recipe: "Recipe", client: "EncodedClient") -> None:
    """The offer in words: what leaves, who sees it, what protects it."""
    from allmend.cli.disclosure import guarantee
    from allmend.consortium.influence import influenced_here, strategy_for
    from allmend.consortium.member import FEWEST_SCORED
    from allmend.federation.arm import strategy_of
    from allmend.federation.keys import fingerprint
    from allmend.federation.privacy.layers import in_words
    from allmend.federation.privacy.ledger import open_ledger

    facts = Table.grid(padding=(0, 2))
    facts.add_row("Run", recipe.name)
    facts.add_row("Model", recipe.model.source)
    facts.add_row("Members", ", ".join(one.name for one in recipe.clients))
    if client.member.target:
        facts.add_row("Your target", f"{len(client.member.target):,} records, for your own routers")
    planted = len(client.member.records) - len(client.train)
    facts.add_row("Your records", f"{len(client.train):,} for training, {len(client.held_out):,} held out")
    if planted:
        facts.add_row("Canaries", f"{planted:,} synthetic texts join your training records, for the audit")
    facts.add_row("Offer", offer.digest)
    console.print(facts, highlight=False)
    console.print("The members' keys; compare the fingerprints with them:", highlight=False)
    for name, raw in offer.keys.items():
        console.print(f"  {name}  {fingerprint(raw)}", highlight=False, soft_wrap=True)
    for name, arm in recipe.arms().items():
        hidden = arm.privacy.secure_aggregation is not None
        title = f"{name}: what leaves, {arm.strategy.rounds} rounds"
        _show_declared(console, title, strategy_of(arm, seed=recipe.seed).declare(), hidden=hidden)
        for whose, account in open_ledger(arm, [client.member]).accounts.items():
            console.print(guarantee(whose, account), highlight=False)
        for words in in_words(arm.privacy):
            console.print(words[0].upper() + words[1:] + ".", highlight=False)
    for name in influenced_here(recipe):
        title = f"{name}, influence: what leaves, once, when the arm is trained"
        asked = strategy_for(recipe)
        _show_declared(console, title, asked.declare(), hidden=True)
        probed = (
            "A target's gradients let whoever has them probe the target"
            if asked.curvature is None
            else "Curvature over all members' records, and a target's direction in it, let whoever has them probe both"
        )
        console.print(f"{probed}; no guarantee of differential privacy covers this.", highlight=False)
    console.print(
        "The coordinator also sees, of this member by itself and behind no masks: sums over your held-out records of "
        "their log-likelihoods and right answers under the models of all arms, your own ones too"
        + (", and how often each canary was learnt from." if planted else ".")
        + " Your records do not leave.",
        highlight=False,
    )
    if len(client.held_out) < FEWEST_SCORED:
        console.print(
            f"You hold out fewer than {FEWEST_SCORED} records, and sums would tell of each: no such sums leave.",
            highlight=False,
        )


def _show_declared(console: Console, title: str, declared: "Declaration", *, hidden: bool) -> None:
    table = Table("what", "which", "who sees it", title=title)
    for what, which in declared.summed.items():
        table.add_row(what, which, "summed behind masks" if hidden else "summed; whoever sums could see each")
    for what, why in declared.seen.items():
        table.add_row(what, why, f"seen by {declared.seen_by} one by one")
    if declared.kept:
        table.add_row("(stays)", declared.kept, "this member alone")
    console.print(table)
