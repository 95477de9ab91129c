"""A member's own records, asked for on the member's machine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from allmend.audit.likelihood import Reading, check_finite, read_texts
from allmend.audit.mine import own_records
from allmend.check import shared_and_audited
from allmend.data.chat import Encoded
from allmend.data.files import load_client
from allmend.data.records import Record
from allmend.events import Event, WorkPlanned, to_all
from allmend.meter import Meter
from allmend.models.load import LoadedModel
from allmend.outcomes import outcome, with_outcome
from allmend.prepare import differs, prepare_model, read_frozen, threads
from allmend.recipe import Recipe
from allmend.results import BASE, OwnRecord, OwnRecords, OwnTable
from allmend.run import RunFolder


def mine(
    out: Path | str,
    data: Path | str,
    *,
    controls: Path | str | None = None,
    suffix_tokens: int = 50,
    model: LoadedModel | None = None,
    listeners: Sequence[Callable[[Event], None]] = (),
) -> OwnTable:
    """Ask a run's tuned models for a member's own records. Nothing is written, and nothing leaves this machine.

    Args:
        out: the run, or a copy of its folder.
        data: the member's records, in a form that a recipe takes.
        controls: records of the same kind that nobody trained on.
        suffix_tokens: most tokens that a model is asked for.
        model: the recipe's model, where the caller has it in memory already.
        listeners: told how far it is.

    Raises:
        UserError: there is no run or tuned model, the records cannot be read, or a model gives no probabilities.
    """
    run = RunFolder.open(Path(out))
    recipe = read_frozen(run)
    arms, missing = with_outcome(run, shared_and_audited(recipe))
    sets = {"records": data} | ({"controls": controls} if controls else {})
    clients = {name: _read(path, recipe) for name, path in sets.items()}  # a wrong path is told before a model is read
    loaded, encoder = prepare_model(recipe, Path(str(run.facts["base"])), model=model)
    if loaded.digest != run.facts.get("model"):
        raise differs("the base model", run)
    encoded = {name: [encoder.for_evaluation(record) for record in records] for name, records in clients.items()}
    tokens = float(sum(len(record) for records in encoded.values() for record in records))
    emit = to_all(listeners)
    emit(WorkPlanned(work={f"ask {name}": tokens for name in (BASE, *arms)}))
    with threads(recipe):
        base = _ask(BASE, loaded.model, encoded, Meter(emit, f"ask {BASE}", tokens))
        rows: list[OwnRecord] = []
        summaries: dict[str, list[OwnRecords]] = {"records": [], "controls": []}
        passed_over = 0
        for arm in arms:
            with outcome(run, loaded, arm) as module:
                readings = _ask(arm, module, encoded, Meter(emit, f"ask {arm}", tokens))
            for name, records in encoded.items():
                ids = [record.id for record in records]
                found, summary = own_records(arm, ids, readings[name], base[name], suffix_tokens=suffix_tokens)
                summaries[name] += [summary] if summary else []
                if name == "records":
                    rows += found
                    passed_over = len(records) - len(found)
    return OwnTable(
        records=tuple(summaries["records"]),
        controls=tuple(summaries["controls"]),
        rows=tuple(rows),
        suffix_tokens=suffix_tokens,
        passed_over=passed_over,
        missing=missing,
    )


def _ask(
    name: str, module: torch.nn.Module, encoded: Mapping[str, Sequence[Encoded]], meter: Meter
) -> dict[str, list[Reading]]:
    readings = {what: read_texts(module, records, on_tokens=meter.add) for what, records in encoded.items()}
    for what, found in readings.items():
        check_finite([reading.log_likelihood for reading in found], of=f"the {what}", where=name)
    meter.done()
    return readings


def _read(path: Path | str, recipe: Recipe) -> list[Record]:
    client = load_client("mine", str(path), fields=recipe.data.fields, held_out=0.0, base=Path())
    # as answered, without the end mark that training adds: a model that ends where others end completes nothing
    return [replace(record, choices=(), answer=None) for record in (*client.train, *client.held_out)]
