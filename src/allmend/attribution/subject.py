"""Whose influence on what: a model with an adapter, training records by client, and the records that are the target."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from allmend.attribution.loss_folder import digest
from allmend.attribution.overlap import overlapping, refuse_overlap, refuse_shared
from allmend.attribution.settings import Settings
from allmend.data.chat import Encoded, Encoder, choose_template
from allmend.data.files import read_records
from allmend.data.records import Record
from allmend.errors import UserError
from allmend.influence.block_memory import check_room
from allmend.influence.cache import Cached
from allmend.influence.gradients import OfRecords, Source
from allmend.learn.objective import records_stay_apart
from allmend.meter import Meter
from allmend.models.adapters import check_adapter, learning_adapter
from allmend.models.attention import packs
from allmend.models.load import LoadedModel, load_model
from allmend.models.sources import resolve
from allmend.models.tensors import JSON
from allmend.recipe import Fields


@dataclass(frozen=True)
class Subject:
    """Everything that scores need, in memory.

    Attributes:
        model: the adapter's base.
        adapter: a PEFT folder.
        clients: in their order.
        records: of all clients, one after the other; `owners` whose each is; `encoded` as in training.
        asked: the target records; `aim` the same, encoded.
        settings: how influence is measured.
        silent: training records without a token to learn from, with their owners; they are not among `records`.
        notes: what a reader should know of the records, in sentences.
    """

    model: LoadedModel
    adapter: Path
    clients: tuple[str, ...]
    records: tuple[Record, ...]
    owners: tuple[str, ...]
    encoded: tuple[Encoded, ...]
    asked: tuple[Record, ...]
    aim: tuple[Encoded, ...]
    settings: Settings
    silent: tuple[tuple[str, Record], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> tuple[float, float]:
        """Of the training records, and of the target's."""
        return float(sum(map(len, self.encoded))), float(sum(map(len, self.aim)))

    @property
    def digest(self) -> str:
        """SHA-256 of the adapter's weights."""
        digest = hashlib.sha256()
        for path in sorted(self.adapter.glob("adapter_model*")):
            digest.update(path.read_bytes())
        return digest.hexdigest()

    @contextlib.contextmanager
    def sources(self, meter: Meter) -> Iterator[tuple[OfRecords, OfRecords]]:
        """Gradients of the training records and of the target's.

        Raises:
            UserError: the adapter does not fit, or no weight has a name that was asked for.
        """
        settings = self.settings
        with learning_adapter(self.model.model, self.adapter) as trainable:
            train, aim = (
                OfRecords(trainable, some, settings.modules, settings.tokens_per_pass, meter.add)
                for some in (self.encoded, self.aim)
            )
            yield train, aim

    def kept(self, source: OfRecords) -> Source:
        """The training records' gradients, kept on disk where the settings say so.

        Raises:
            UserError: the disk has no room for them, or holds others.
        """
        if self.settings.cache is None:
            return source
        identity: dict[str, JSON] = {
            "model": self.model.digest,
            "adapter": self.digest,
            "modules": self.settings.modules,
            "packing": self.settings.tokens_per_pass,
            "set_of_records": digest(self.encoded, self.owners),
        }
        return Cached(source, self.settings.cache, identity)

    def check_room(self, source: OfRecords) -> None:
        """See that the blocks of a source have room in memory.

        Raises:
            UserError: they do not; names the largest.
        """
        parameters = source.trainable.parameters()
        shapes = {name: tuple(parameters[name].shape) for name in source.names}
        check_room(shapes, self.settings.side, device=next(iter(parameters.values())).device)


def read_subject(
    model: str,
    adapter: Path | str,
    *,
    train: Sequence[Path | str],
    target: Path | str,
    fields: Fields,
    settings: Settings,
) -> Subject:
    """Read files, model and tokenizer; all files before the model, which takes long.

    Raises:
        UserError: one of them cannot be used; clients share a record; or target records are training records, and are
            not to be left out.
    """
    check_adapter(Path(adapter))
    _check_lora(Path(adapter))
    if not train:
        raise UserError("no training records are named", where="train")
    if twice := [str(path) for place, path in enumerate(train) if path in list(train)[:place]]:
        raise UserError("is named twice", where=twice[0], hint="Name each file once.")
    sources = {client_name(Path(path), train): _read(path, fields) for path in train}
    asked = _read(target, fields)
    _check_whole(resolve(model))
    loaded = load_model(model)
    _check_packing(loaded, settings.max_tokens)
    encoder = Encoder(loaded.tokenizer, choose_template(settings.template, loaded.tokenizer), settings.max_tokens)
    everyone = [(owner, one, encoder.for_training(one)) for owner, some in sources.items() for one in some]
    learning = [found for found in everyone if found[2].learns]
    silent = tuple((owner, record) for owner, record, encoded in everyone if not encoded.learns)
    if not learning:
        raise UserError("no training record has a token to learn from", where="train", hint=_LABELS)
    owners, records, encoded = (tuple(column) for column in zip(*learning, strict=True))
    refuse_shared(owners, encoded)
    notes = []
    if silent:
        notes.append(f"{_some(len(silent), 'training record')} without a token to learn from, and without a score.")
    if cut := sum(one.cut > 0 for one in encoded):
        notes.append(
            f"{_some(cut, 'training record')} longer than {settings.max_tokens} tokens and cut, from the left of the "
            "question on: an answer without its question cannot look wrong (--max-tokens)."
        )
    aimed = [(record, encoder.for_training(record)) for record in asked]
    aim = [pair for pair in aimed if pair[1].learns]
    if len(aim) < len(aimed):
        notes.append(f"{_some(len(aimed) - len(aim), 'target record')} without a token to learn from, and left out.")
    shared = overlapping(encoded, [one for _, one in aim])
    if settings.drop_overlap:
        aim = [pair for place, pair in enumerate(aim) if place not in shared]
        if shared:
            notes.append(f"{_some(len(shared), 'target record')} among the training records, and left out.")
    else:
        refuse_overlap(shared, [one for _, one in aim])
    if not aim:
        raise UserError("no target record is left", where=target, hint=f"Name other records. {_LABELS}")
    return Subject(
        model=loaded,
        adapter=Path(adapter),
        clients=tuple(sources),
        records=records,
        owners=owners,
        encoded=encoded,
        asked=tuple(record for record, _ in aim),
        aim=tuple(one for _, one in aim),
        settings=settings,
        silent=silent,
        notes=tuple(notes),
    )


_LABELS = "Look at the longest record in tokens (--max-tokens) and at the response's field."


def _some(count: int, thing: str) -> str:
    return f"1 {thing} is" if count == 1 else f"{count:,} {thing}s are"


def _check_lora(folder: Path) -> None:
    """Raise unless an adapter says of itself that it is a plain LoRA."""
    try:
        config = json.loads((folder / "adapter_config.json").read_bytes())
        kind = str(config.get("peft_type", "LORA"))
        dora = bool(config.get("use_dora"))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"adapter_config.json cannot be read: {error}", where=folder, hint="Save it again.") from None
    if kind != "LORA" or dora:
        raise UserError(
            f"is {'DoRA' if dora else kind}, and influence is of the factors of a plain LoRA",
            where=folder,
            hint="Train a LoRA on the same records first: `allmend tune`, or PEFT's LoraConfig.",
        )


def _check_whole(folder: Path) -> None:
    """Raise where a model's weights are quantised: what passes through them is not what an adapter was trained on."""
    config = json.loads((folder / "config.json").read_bytes())
    if (how := config.get("quantization_config")) is None:
        return
    kind = how.get("quant_method", "") if isinstance(how, dict) else ""
    raise UserError(
        f"the base is quantised{f' ({kind})' if kind else ''}, and gradients need its weights in full",
        where=folder,
        hint="Name the model that it was made from, or write it in full first: "
        "`AutoModelForCausalLM.from_pretrained(BASE).dequantize().save_pretrained(FOLDER)`.",
    )


def _check_packing(loaded: LoadedModel, longest: int) -> None:
    """Raise where a record in a packed row would see another, or less of itself than alone."""
    config = loaded.model.config
    if not (packs(loaded.model) and records_stay_apart(loaded.model)):
        raise UserError(
            f"records of this architecture ({config.model_type}) cannot be told apart in a packed row",
            where="model",
            hint="Use a decoder in which attention alone mixes tokens, such as Llama, Qwen, Mistral or SmolLM.",
        )
    reaches = (getattr(config, key, None) for key in ("sliding_window", "max_position_embeddings"))
    window = min((reach for reach in reaches if reach is not None), default=longest)
    if longest > window:
        raise UserError(
            f"records may have {longest} tokens, but the model looks back no more than {window}",
            where="--max-tokens",
            hint=f"Set it to {window} or less.",
        )


def client_name(path: Path, all_paths: Sequence[Path | str]) -> str:
    """A file's name up to its first dot; where two files share it, the whole path."""
    name = path.name.partition(".")[0]
    shared = sum(Path(other).name.partition(".")[0] == name for other in all_paths)
    return name if shared == 1 else str(path)


def _read(path: Path | str, fields: Fields) -> list[Record]:
    records, _ = read_records(str(path), fields=fields)
    return records
