"""Whose influence on what: a model with an adapter, training records by client, and the records that are the target."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from allmend.attribution.settings import Settings
from allmend.data.chat import Encoded, Encoder, choose_template
from allmend.data.files import read_records
from allmend.data.records import Record
from allmend.errors import UserError
from allmend.influence.gradients import OfRecords
from allmend.meter import Meter
from allmend.models.adapters import check_adapter, learning_adapter
from allmend.models.load import LoadedModel, load_model
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
        UserError: one of them cannot be used.
    """
    check_adapter(Path(adapter))
    if not train:
        raise UserError("no training records are named", where="train")
    if twice := [str(path) for place, path in enumerate(train) if path in list(train)[:place]]:
        raise UserError("is named twice", where=twice[0], hint="Name each file once.")
    sources = {client_name(Path(path), train): _read(path, fields) for path in train}
    asked = _read(target, fields)
    loaded = load_model(model)
    encoder = Encoder(loaded.tokenizer, choose_template(settings.template, loaded.tokenizer), settings.max_tokens)
    records = [record for some in sources.values() for record in some]
    return Subject(
        model=loaded,
        adapter=Path(adapter),
        clients=tuple(sources),
        records=tuple(records),
        owners=tuple(client for client, some in sources.items() for _ in some),
        encoded=tuple(encoder.for_training(record) for record in records),
        asked=tuple(asked),
        aim=tuple(encoder.for_training(record) for record in asked),
        settings=settings,
    )


def client_name(path: Path, all_paths: Sequence[Path | str]) -> str:
    """A file's name up to its first dot; where two files share it, the whole path."""
    name = path.name.partition(".")[0]
    shared = sum(Path(other).name.partition(".")[0] == name for other in all_paths)
    return name if shared == 1 else str(path)


def _read(path: Path | str, fields: Fields) -> list[Record]:
    records, _ = read_records(str(path), fields=fields)
    return records
