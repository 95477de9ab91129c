"""One plain adapter in the place of a member's mixture, with what that costs in loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from allmend import intervals
from allmend.data.chat import Encoded
from allmend.data.records import Record
from allmend.errors import UserError
from allmend.federation.arm import at_member
from allmend.federation.strategies.comigs import CoMiGS
from allmend.learn.evaluate import Score, score
from allmend.learn.routing import usage
from allmend.mixtures.routing import arm_with_mixtures, folders
from allmend.models.adapters import applied, check_adapter
from allmend.models.load import LoadedModel
from allmend.models.mixture import mixed
from allmend.models.mixture_export import How, export_mixture
from allmend.prepare import EncodedClient, differs, prepare, read_frozen, threads
from allmend.recipe import Arm, Recipe
from allmend.report.export_card import Compared, export_card
from allmend.run import RunFolder, folder_atomic

CARD = "README.md"

MOST = 2**31
"""Tokens that gates are averaged over: all there are."""


@dataclass(frozen=True)
class Exported:
    """An adapter that was written.

    Attributes:
        out: the folder.
        arm, member: whose mixture it stands for.
        how: `generalist` or `mean-gates`.
        rank: of the adapter.
        compared: on the member's records; nothing where it has none.
    """

    out: Path
    arm: str
    member: str
    how: How
    rank: int
    compared: tuple[Compared, ...]


def export(
    source: Path | str,
    out: Path,
    *,
    member: str,
    how: How,
    arm: str | None = None,
    model: LoadedModel | None = None,
) -> Exported:
    """Write one plain adapter for a member's mixture, and measure what it loses.

    Args:
        source: the run.
        out: a folder that is not there yet, is empty, or holds an adapter, which is replaced.
        member: whose mixture.
        how: `generalist` leaves the member's own experts and its router out; `mean-gates` gives every expert its mean
            gate over the records that the member's router has learnt from.
        arm: of the run; the first one with mixtures when None.
        model: the base model, where the caller has it in memory already.

    Raises:
        UserError: there is no such run, arm, member or mixture, the mixture has no generalist to export, records or
            model are not the run's, or the folder holds something else. Nothing is written then.
    """
    run = RunFolder.open(Path(source))
    recipe = read_frozen(run)
    arm = arm_with_mixtures(run, recipe, arm)
    settings = recipe.arms()[arm]
    check_export(out, settings, how)
    found = folders(run, arm)
    if member not in found:
        hint = f"Clients that do: {', '.join(found)}."
        raise UserError(f"no client {member!r} has a mixture here", where="--member", hint=hint)
    prepared = prepare(recipe, Path(str(run.facts["base"])), model=model)
    if prepared.model.digest != run.facts.get("model"):
        raise differs("the base model", run)
    if prepared.data_digests != run.facts.get("data"):
        raise differs("the clients' data", run)
    client = EncodedClient(
        next(one for one in prepared.members if one.name == member),
        prepared.train[member],
        prepared.held_out[member],
        prepared.held_out_encoded[member],
        prepared.notes[member],
    )
    with threads(recipe):
        return export_client(
            found[member], out, client=client, recipe=recipe, arm=settings, how=how, model=prepared.model
        )


def export_client(
    folder: Path, out: Path, *, client: EncodedClient, recipe: Recipe, arm: Arm, how: How, model: LoadedModel
) -> Exported:
    """Write one plain adapter for a mixture, and measure what it loses on its client's records.

    Args:
        folder: of the mixture.
        out: as in `export`; `check_export` says beforehand whether it can be written.
        client: whose mixture it is.
        recipe, arm: that it comes from.
        how: as in `export`.
        model: the base.

    Raises:
        UserError: the mixture cannot be read, or the operating system refused. Nothing is written then.
    """
    trained, _ = at_member(client.member, arm)
    share = arm.strategy.options.get("validation", CoMiGS.validation)
    validation = trained.validation(share)
    sets: dict[Literal["validation", "held-out"], tuple[Sequence[Record], Sequence[Encoded]]] = {
        "validation": ([Record(one.id) for one in validation], validation),
        "held-out": (client.held_out, client.held_out_encoded),
    }
    passes = recipe.evaluation.tokens_per_pass
    with folder_atomic(out) as partial:
        with mixed(model, folder) as mixture:
            if int(mixture.present.sum()) < 2:  # it has no router, and nothing was set apart for one
                del sets["validation"]
            used = usage(mixture, validation or trained.records, most=MOST)
            gates = used.mean if used is not None and how == "mean-gates" else None
            export_mixture(mixture, partial, mixture.state(), how=how, base=str(model.folder), gates=gates)
            before = {name: score(mixture.model, *some, tokens_per_pass=passes) for name, some in sets.items()}
        with applied(model.model, partial) as adapter:
            after = {name: score(adapter, *some, tokens_per_pass=passes) for name, some in sets.items()}
            rank = adapter.peft_config["default"].r
        compared = tuple(one for name in sets if (one := compare(name, before[name], after[name])) is not None)
        card = export_card(how=how, run=recipe.name, arm=arm.name, rank=rank, compared=compared)
        (partial / CARD).write_text(card, encoding="utf-8")
    return Exported(out, arm.name, client.member.name, how, rank, compared)


def compare(
    records: Literal["validation", "held-out"], mixture: Sequence[Score], export: Sequence[Score]
) -> Compared | None:
    """Losses of both on the same records, those with a token; None where there is none."""
    pairs = [(a, b) for a, b in zip(mixture, export, strict=True) if a.tokens]
    if not pairs:
        return None
    tokens = [a.tokens for a, _ in pairs]
    return Compared(
        records,
        len(pairs),
        intervals.ratio([a.nll for a, _ in pairs], tokens),
        intervals.ratio([b.nll for _, b in pairs], tokens),
        intervals.ratio([b.nll - a.nll for a, b in pairs], tokens),
    )


def check_export(out: Path, arm: Arm, how: How) -> None:
    """Refuse what cannot be exported so, and a place that holds something else than an adapter.

    Raises:
        UserError: so it is.
    """
    if how == "generalist" and not arm.adapter.generalists:
        raise UserError("the mixture has no generalist", where="--how", hint="Take mean-gates.")
    if out.is_file():
        raise UserError("is a file, not a folder", where=out, hint="Choose another folder with --out.")
    if out.is_dir() and any(out.iterdir()):
        try:
            check_adapter(out)
        except UserError:
            raise UserError(
                "this folder is not empty and holds no adapter", where=out, hint="Choose another with --out."
            ) from None
