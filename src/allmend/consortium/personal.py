"""A member's own models after a run among organisations: side by side on its own records, and as a plain adapter.

Both are made where the member's records and models are, and nobody is asked or told anything.
"""

import json
from pathlib import Path

from allmend.consortium.own import OwnRun
from allmend.errors import UserError
from allmend.federation.arm import FOLDERS
from allmend.mixtures.export import Exported, check_export, export_client
from allmend.mixtures.routing import mixing
from allmend.models.load import LoadedModel
from allmend.models.mixture_export import How
from allmend.personalised import TABLE, FinishedArm, alone, alone_among, compare, own_scores, work_of
from allmend.prepare import threads
from allmend.report.personalised_page import write_own_comparison
from allmend.results import BASE, PersonalisedTable
from allmend.run import RunFolder, write_atomic
from allmend.strategy import State

PAGE = "personalised.html"

WORK = "work.json"
"""What an arm took of a member, in the arm's folder."""


def keep_work(folder: Path, state: State, *, trainable: int) -> None:
    """Keep what an arm took.

    Args:
        folder: of the arm, at the member.
        state: of the member after the last round that counted.
        trainable: parameters that learn.

    Raises:
        UserError: the operating system refused.
    """
    steps, passes = work_of(state)
    about = {"trainable": trainable, "steps": steps, "passes": passes}
    write_atomic(folder / WORK, json.dumps(about).encode(), mode=0o600)


def compare_own(own: OwnRun, against: str | None = None) -> PersonalisedTable:
    """The base model and the arms on the member's own held-out records, as it was asked to score them.

    Args:
        own: the run.
        against: the arm that the others are compared with, or `base`. When None, the one in which members train alone,
            and the base model where there is none.

    Raises:
        UserError: there is no such arm, nothing of it was scored here, or no arm was; or a file cannot be read.
    """
    arms = own.recipe.arms()
    if against is not None and against not in (BASE, *arms):
        raise UserError(
            f"the run has no arm {against!r}", where="--against", hint=f"It has {', '.join((BASE, *arms))}."
        )
    finished: dict[str, FinishedArm] = {}
    if scores := own_scores(own.run, BASE):
        finished[BASE] = FinishedArm(scores, BASE, alone=True)
    for name, arm in arms.items():
        if scores := own_scores(own.run, name):
            work = _read_work(own.run.arm(name) / WORK)
            finished[name] = FinishedArm(
                scores,
                arm.strategy.name,
                alone=alone(arm),
                trainable=int(work.get("trainable") or 0),
                steps={own.member: int(steps)} if (steps := work.get("steps")) is not None else {},
                passes={own.member: passes} if (passes := work.get("passes")) is not None else {},
            )
    trained = {name: arm for name, arm in finished.items() if name != BASE}
    if not trained or (against is not None and against not in finished):
        raise UserError(
            "no arm has been scored at this member" if not trained else f"{against!r} was not scored at this member",
            where=own.run.path,
            hint="Members score an arm when its last round is over; who is away then does not.",
        )
    if not all(arm.scores.get(own.member) for arm in finished.values()):
        raise UserError(
            "this member has held out no record with a token to score",
            where=own.run.path,
            hint="Take part with --held-out, or with data.held_out above 0 in the recipe.",
        )
    reference = against or alone_among(trained) or (BASE if BASE in finished else None)
    return compare(finished, reference, unfinished=[name for name in arms if name not in finished])


def keep_comparison(own: OwnRun) -> Path | None:
    """Write the comparison and its page into the member's folder; None where there is nothing to compare yet.

    Raises:
        UserError: a file cannot be read or written.
    """
    if not any(own_scores(own.run, name).get(own.member) for name in own.recipe.arms()):
        return None
    found = compare_own(own)
    write_atomic(own.run.path / f"{TABLE}.json", found.model_dump_json(indent=1).encode(), mode=0o600)
    records = len(own_scores(own.run, found.arms[0].arm)[own.member])
    return write_own_comparison(own.run.path / PAGE, found, run=own.recipe.name, records=records)


def export_own(
    own: OwnRun, out: Path, *, how: How, arm: str | None = None, model: LoadedModel | None = None
) -> Exported:
    """Write one plain adapter for the member's mixture, and measure what it loses on its own records.

    Args:
        own: the run.
        out: a folder that is not there yet, is empty, or holds an adapter, which is replaced.
        how: see `allmend.mixtures.export.export`.
        arm: of the run; the first one with mixtures when None.
        model: the base model, where the caller has it in memory already.

    Raises:
        UserError: there is no such arm or mixture, it has no generalist to export, records or model are not those that
            the run was begun with, or the folder holds something else. Nothing is written then.
    """
    recipe = own.recipe
    name = _arm_with_mixture(own.run, mixing(recipe), list(recipe.arms()), arm)
    settings, folder = recipe.arms()[name], own.run.arm(name) / FOLDERS["mixture"]
    check_export(out, settings, how)
    with threads(recipe):
        loaded, client = own.read(model=model)
        return export_client(folder, out, client=client, recipe=recipe, arm=settings, how=how, model=loaded)


def _arm_with_mixture(run: RunFolder, mixed: list[str], arms: list[str], arm: str | None) -> str:
    if arm is not None and arm not in arms:
        raise UserError(f"the run has no arm {arm!r}", where=run.path, hint=f"It has {', '.join(arms)}.")
    name = arm or next(iter(mixed), arms[0])
    place = run.arm(name)
    if (place / FOLDERS["lora"]).is_dir():
        raise UserError(
            f"the model of arm {name!r} is a plain adapter already",
            where=place / FOLDERS["lora"],
            hint="PEFT loads this folder as it is.",
        )
    if name not in mixed or not (place / FOLDERS["mixture"]).is_dir():
        raise UserError(
            f"no mixture of arm {name!r} is here",
            where=place,
            hint="A member gets its mixture when the arm's last round is over."
            if name in mixed
            else f"Arms that have one: {', '.join(mixed) or 'none'}.",
        )
    return name


def _read_work(path: Path) -> dict[str, float | None]:
    """Empty where it was not kept."""
    try:
        found = json.loads(path.read_bytes()) if path.exists() else {}
        if not isinstance(found, dict):
            raise TypeError("not an object")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot be read: {error}", where=path, hint="Delete it.") from error
    return found
