"""A member's own records, asked for on the member's machine."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from allmend.audit.likelihood import check_finite, read_texts
from allmend.audit.mine import own_records
from allmend.auditing.outcomes import audited, outcome
from allmend.data.chat import Encoded, Encoder
from allmend.data.files import load_client
from allmend.models.load import LoadedModel
from allmend.prepare import differs, prepare_model, read_frozen, threads
from allmend.recipe import Recipe
from allmend.results import OwnRecord, OwnRecords, OwnTable
from allmend.run import RunFolder


def mine(
    out: Path | str,
    data: Path | str,
    *,
    controls: Path | str | None = None,
    suffix_tokens: int = 50,
    model: LoadedModel | None = None,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> OwnTable:
    """Ask a run's tuned models for a member's own records. Nothing is written, and nothing leaves this machine.

    Args:
        out: the run, or a copy of its folder.
        data: the member's records, in a form that a recipe takes.
        controls: records of the same kind that nobody trained on.
        suffix_tokens: most tokens that a model is asked for.
        model: the recipe's model, where the caller has it in memory already.
        on_tokens: told the tokens read.

    Raises:
        UserError: there is no run or tuned model, the records cannot be read, or a model gives no probabilities.
    """
    run = RunFolder.open(Path(out))
    recipe = read_frozen(run)
    loaded, encoder = prepare_model(recipe, Path(str(run.facts["base"])), model=model)
    if loaded.digest != run.facts.get("model"):
        raise differs("the base model", run)
    sets = {"records": data} | ({"controls": controls} if controls else {})
    encoded = {name: _own(path, recipe, encoder) for name, path in sets.items()}
    with threads(recipe):
        base = {name: read_texts(loaded.model, records, on_tokens=on_tokens) for name, records in encoded.items()}
        rows: list[OwnRecord] = []
        summaries: dict[str, list[OwnRecords]] = {"records": [], "controls": []}
        for arm in audited(recipe):
            with outcome(run, loaded, arm) as module:
                for name, records in encoded.items():
                    readings = read_texts(module, records, on_tokens=on_tokens)
                    check_finite([reading.log_likelihood for reading in readings], of=f"the {name}", where=arm)
                    ids = [record.id for record in records]
                    found, summary = own_records(arm, ids, readings, base[name], suffix_tokens=suffix_tokens)
                    rows += found if name == "records" else []
                    summaries[name] += [summary] if summary else []
    return OwnTable(records=tuple(summaries["records"]), controls=tuple(summaries["controls"]), rows=tuple(rows))


def _own(path: Path | str, recipe: Recipe, encoder: Encoder) -> list[Encoded]:
    client = load_client("mine", str(path), fields=recipe.data.fields, held_out=0.0, base=Path())
    # as answered, without the end mark that training adds: a model that ends where others end completes nothing
    answered = (replace(record, choices=(), answer=None) for record in (*client.train, *client.held_out))
    return [encoder.for_evaluation(record) for record in answered]
