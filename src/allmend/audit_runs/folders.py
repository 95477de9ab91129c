"""The audit of a model or adapter that was made elsewhere."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from allmend.audit.memorisation import Findings, audit_model, tokens_to_read
from allmend.audit_runs.tables import PROBES, check_same_canaries, check_settings, findings_table
from allmend.data.canaries import read_canaries
from allmend.data.chat import Encoder
from allmend.errors import UserError
from allmend.events import Event, WorkPlanned, to_all
from allmend.meter import Meter
from allmend.models.adapters import applied, check_adapter
from allmend.models.load import load_model
from allmend.probes import write_probes
from allmend.recipe import Audit
from allmend.report.page import write_report
from allmend.results import BASE, AuditTable
from allmend.run import RunFolder


def audit_folder(
    model: str,
    canaries: Path | str,
    *,
    out: Path | str,
    adapter: Path | str | None = None,
    reference: str | None = None,
    settings: Audit | None = None,
    seed: int = 0,
    listeners: Sequence[Callable[[Event], None]] = (),
) -> AuditTable:
    """Audit a model, or a PEFT adapter on it, that was made elsewhere, on canaries that were planted in its data.

    Args:
        model: a source as in a recipe: a folder, a Hub name, a GGUF file.
        canaries: the canaries' file, `canaries.jsonl`, with both those that were inserted and the controls.
        out: folder for `results/audit.json`, `results/audit.parquet` and `report.html`; it may be there already, but
            not as a run.
        adapter: a PEFT folder. The model itself is its reference then.
        reference: source of the model before tuning, where `model` is a tuned one; without it there are no figures
            relative to a base.
        settings: the audit's design.
        seed: of bootstraps and sampled values.
        listeners: told how far it is.

    Raises:
        UserError: a model, the adapter or the canaries cannot be used, or they belong to different runs.
    """
    if RunFolder(Path(out)).marker.exists():
        raise UserError(
            "a run is here, whose own audit would be lost", where=out, hint="Choose another folder for this audit."
        )
    settings = settings or Audit()
    planted = read_canaries(Path(canaries))
    if adapter is not None:
        check_adapter(Path(adapter))
    _check_origin(Path(canaries), [Path(one) for one in (adapter, model) if one and Path(one).is_dir()])
    findings: list[Findings] = []
    loaded = load_model(model)
    encoder = Encoder(loaded.tokenizer, "plain", sys.maxsize)
    check_settings(planted, encoder, settings)
    if adapter is not None:
        with applied(loaded.model, Path(adapter)):
            pass  # told before the base is asked, which takes long
    tokens = tokens_to_read(planted, encoder, settings, ())

    emit = to_all(listeners)

    def probe(name: str, module: torch.nn.Module) -> None:
        base, meter = findings[0] if findings else None, Meter(emit, f"audit {name}", tokens)
        found = audit_model(name, module, encoder, planted, settings, seed=seed, reference=base, on_tokens=meter.add)
        findings.append(found)
        meter.done()

    tuned = "model" if adapter is None else "adapter"
    names = [tuned] if adapter is None and reference is None else [BASE, tuned]
    emit(WorkPlanned(work={f"audit {name}": tokens for name in names}))

    if reference is not None:
        base = load_model(reference, dtype=loaded.model.dtype, device=loaded.model.device)
        if base.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
            raise UserError(
                f"{reference} has another tokenizer than {model}, so that likelihoods cannot be compared",
                where="reference",
                hint="Name the model that was tuned, or leave the reference out.",
            )
        probe(BASE, base.model)
    elif adapter is not None:
        probe(BASE, loaded.model)
    if adapter is not None:
        with applied(loaded.model, Path(adapter)) as module:
            probe(tuned, module)
    else:
        probe(tuned, loaded.model)
    table = findings_table(findings, planted, seed)
    folder = Path(out)
    run = RunFolder(folder)
    run.write_table("audit", table)
    write_probes(folder / "results" / PROBES, [row for found in findings for row in found.probes])
    write_report(folder)
    return table


def _check_origin(canaries: Path, models: Sequence[Path]) -> None:
    """A model that lies in a run has canaries of its own; those of another run were never in its data."""
    for folder in models:
        for parent in folder.resolve().parents:
            own = RunFolder(parent).canaries
            if RunFolder(parent).marker.exists() and own.exists():
                check_same_canaries(canaries, own)
                break
