"""A text, token by token, with how much weight a mixture's generalists have on each."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from allmend.errors import UserError
from allmend.learn.routing import layers_with_experts, token_gates
from allmend.mixtures.routing import arm_with_mixtures, folders
from allmend.models.load import LoadedModel, load_model
from allmend.models.mixture import FACTS, Mixture, mixed, read_facts
from allmend.prepare import differs, prepare_model, read_frozen
from allmend.report.routed_text import Piece, RoutedText
from allmend.run import RunFolder

MOST = 4096
"""Tokens of a text that are read; the rest is left out, and that is said."""

WINDOW = 512
"""Tokens that are read at once: each part of a longer text is read as if nothing stood before it."""


def coloured(
    source: Path | str,
    text: str,
    *,
    arm: str | None = None,
    member: str | None = None,
    layer: int | None = None,
    model: LoadedModel | None = None,
) -> list[RoutedText]:
    """A text as the mixtures of a run read it, a member after the other, or as one mixture alone does.

    Args:
        source: a run, or the folder of a mixture.
        text: running text.
        arm: of the run; the first one with mixtures when None.
        member: whose mixture; all members' when None.
        layer: number of the decoder's layer; the mean over layers when None.
        model: the base model, where the caller has it in memory already.

    Raises:
        UserError: there is no such run, arm, member, layer or mixture, or the text is empty.
    """
    if not text.strip():
        raise UserError("the text is empty", where="--text", hint="Name a file with some words.")
    folder = Path(source)
    if (folder / FACTS).is_file():
        name = folder.parent.name if folder.parent.parent.name == "members" else folder.name
        model = model or load_model(str(read_facts(folder)["base"]))
        return [_read(model, folder, name, text, layer)]
    run = RunFolder.open(folder)
    recipe = read_frozen(run)
    arm = arm_with_mixtures(run, recipe, arm)
    found = folders(run, arm)
    if member is not None and member not in found:
        raise UserError(f"no client {member!r} has a mixture here", where="--member", hint=_named(found))
    model, _ = prepare_model(recipe, Path(str(run.facts["base"])), model=model)
    if model.digest != run.facts.get("model"):
        raise differs("the base model", run)
    return [_read(model, path, name, text, layer) for name, path in found.items() if member in (None, name)]


def _named(found: dict[str, Path]) -> str:
    return f"Clients that do: {', '.join(found)}."


def _read(model: LoadedModel, folder: Path, name: str, text: str, layer: int | None) -> RoutedText:
    ids = torch.tensor(model.tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    with mixed(model, folder) as mixture:
        return routed_text(mixture, model.tokenizer, ids, title=name, layer=layer)


def routed_text(
    mixture: Mixture, tokenizer: Any, ids: torch.Tensor, *, title: str, layer: int | None = None
) -> RoutedText:
    """Tokens of a text with the weight of the generalists on each.

    Args:
        mixture: with the state that is asked about.
        tokenizer: of its base.
        ids: int64 [T]; what is more than `MOST` is left out.
        title: what the text is called: the member's name.
        layer: number of the decoder's layer; the mean over layers when None.

    Raises:
        UserError: there are no experts in that layer.
    """
    layers = layers_with_experts(mixture)
    if layer is not None and layer not in layers:
        raise UserError(
            f"layer {layer} has no experts", where="--layer", hint=f"Layers that do: {layers[0]} to {layers[-1]}."
        )
    kept = ids[:MOST]
    window = min(WINDOW, getattr(mixture.model.config, "max_position_embeddings", WINDOW))
    gates = torch.cat([token_gates(mixture, part) for part in torch.split(kept, window)], dim=1)
    mass = gates[:, :, : mixture.config.generalists].sum(-1)  # [layers, T]
    chosen = mass.mean(0) if layer is None else mass[layers.index(layer)]
    return RoutedText(
        title, layer, tuple(_pieces(tokenizer, kept.tolist(), chosen.tolist())), left_out=len(ids) - len(kept)
    )


def _pieces(tokenizer: Any, ids: Sequence[int], masses: Sequence[float]) -> Iterator[Piece]:
    """Tokens as text. Those that hold parts of one character are one piece, with their mean weight.

    A token by itself may lose the space before it, so each is what the text up to it has more than before.
    """
    start = begun = 0
    before = ""
    for end in range(1, len(ids) + 1):
        whole: str = tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
        if whole.endswith("\ufffd") and end < len(ids) and end - begun < 4:
            continue
        some = masses[begun:end]
        yield Piece(whole[len(before) :], sum(some) / len(some))
        before, begun = whole, end
        if end - start >= 64:  # what is decoded again and again stays short
            start = end - 8
            before = tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
