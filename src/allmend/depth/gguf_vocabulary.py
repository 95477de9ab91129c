"""A tokenizer as llama.cpp knows it: pairs of bytes with a rule for splitting text, or SentencePiece's with scores.

Source: llama.cpp, `src/llama-vocab.cpp` (rules by the name in `tokenizer.ggml.pre`, the order in which pairs merge).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from allmend.errors import UserError
from allmend.models.load import load_tokenizer

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RULES = {
    (("Digits",), ("ByteLevel", True)): "smollm",
    (("ByteLevel", True),): "gpt-2",
    (("Split", _WORDS % "{1,3}"), ("ByteLevel", False)): "dbrx",
    (("Split", _WORDS % ""), ("ByteLevel", False)): "qwen2",
}
"""Llama.cpp's name for the steps in which a tokenizer splits text; where it has several for the same, one of them."""

KNOWN = "Tokenizers like those of Llama, SmolLM, Qwen2 and GPT-2 can be exported."


@dataclass(frozen=True)
class BytePairs:
    """Attributes:
    rule: how text is split before pairs are merged.
    merges: two tokens each, a space between them.
    """

    rule: str
    merges: list[str]


@dataclass(frozen=True)
class Pieces:
    """Attributes:
    scores: of each token; the highest is merged first.
    prefix: whether a space is put before a text.
    """

    scores: list[float]
    prefix: bool


@dataclass(frozen=True)
class Vocabulary:
    """Attributes:
    tokens, types: for each row of the embeddings.
    pairs: how tokens come about.
    special: ids by their names (`bos`, `eos` …).
    begins, ends: whether a text is given a first and a last special token.
    template: of chats.
    """

    tokens: list[str]
    types: list[int]
    pairs: BytePairs | Pieces
    special: dict[str, int]
    begins: bool
    ends: bool
    template: str | None


def read_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """The tokenizer of a model folder.

    Args:
        folder: with `tokenizer.json`.
        rows: of the embeddings; those that no token has are given unused ones.

    Raises:
        UserError: it cannot be read, or llama.cpp has nothing that is equal to it.
    """
    from gguf import TokenType  # takes a moment to import, and little else needs it

    tokenizer: Any = load_tokenizer(folder)
    path = folder / "tokenizer.json"
    try:
        body = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", where=path, hint=KNOWN) from error
    model = body["model"]
    if model["type"] != "BPE" or not model["merges"]:
        raise UserError(f"has no pairs to merge (it is of the kind {model['type']})", where=path, hint=KNOWN)
    if len(tokenizer) > rows:
        raise UserError(f"has {len(tokenizer)} tokens, and the model only {rows} embeddings", where=path)
    tokens, types = [f"[PAD{number}]" for number in range(rows)], [int(TokenType.UNUSED)] * rows
    for token, number in model["vocab"].items():
        tokens[number], types[number] = token, int(TokenType.NORMAL)
    merges = [tuple(one.split(" ", 1) if isinstance(one, str) else one) for one in model["merges"]]
    special = {
        name: number
        for name in ("bos", "eos", "unk", "sep", "pad", "mask")
        if (number := getattr(tokenizer, f"{name}_token_id", None)) is not None
    }
    pairs: BytePairs | Pieces
    if model.get("byte_fallback"):
        pairs = Pieces(_scores(tokens, merges, path), _has_prefix(body, path))
        for number, token in enumerate(tokens):
            if len(token) == len("<0x00>") and token.startswith("<0x"):
                types[number] = int(TokenType.BYTE)
    else:
        # a space stands between the two of a merge, so another sign stands for those in them
        joined = [" ".join(part.replace(" ", chr(ord(" ") + 256)) for part in merge) for merge in merges]
        pairs = BytePairs(_rule(body, path), joined)
    for added in body["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    if isinstance(pairs, Pieces) and "unk" in special:
        types[special["unk"]] = int(TokenType.UNKNOWN)
    begins, ends = _around(tokenizer, special, path)
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    return Vocabulary(tokens, types, pairs, special, begins, ends, template)


def add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Put a vocabulary into the metadata of a `gguf.GGUFWriter`."""
    match vocabulary.pairs:
        case BytePairs(rule, merges):
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre(rule)
            writer.add_token_merges(merges)
        case Pieces(scores, prefix):
            writer.add_tokenizer_model("llama")
            writer.add_tokenizer_pre("default")
            writer.add_token_scores(scores)
            writer.add_add_space_prefix(prefix)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    for name, token in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(vocabulary.begins)
    writer.add_add_eos_token(vocabulary.ends)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)


def _around(tokenizer: Any, special: dict[str, int], path: Path) -> tuple[bool, bool]:
    """Whether a tokenizer puts its first special token before a text, and its last behind it."""
    bare, full = (tokenizer("a", add_special_tokens=whole).input_ids for whole in (False, True))
    for begins in (False, True):
        for ends in (False, True):
            before, behind = [special.get("bos")] * begins, [special.get("eos")] * ends
            if full == [*before, *bare, *behind]:
                return begins, ends
    raise UserError("puts something around a text that is not its first and last token", where=path, hint=KNOWN)


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer."""
    if step is None:
        return []
    found: list[dict[str, Any]] = step.get("pretokenizers") or step.get("normalizers") or [step]
    return found


def _rule(body: dict[str, Any], path: Path) -> str:
    """Llama.cpp's name for how a tokenizer of byte pairs splits text."""
    found: list[tuple[Any, ...]] = []
    for step in _steps(body["pre_tokenizer"]):
        match step:
            case {"type": "Digits", "individual_digits": True}:
                found.append(("Digits",))
            case {"type": "ByteLevel", "add_prefix_space": False}:
                found.append(("ByteLevel", step.get("use_regex", True)))
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                found.append(("Split", pattern))
            case _:
                found.append((step["type"], step))
    rule = next((name for steps, name in RULES.items() if list(steps) == found), None)
    if body["model"].get("ignore_merges"):  # words that are tokens are not put together from pairs
        rule = {"dbrx": "llama-bpe"}.get(rule or "")
    if rule is None or any(step["type"] != "NFC" for step in _steps(body["normalizer"])):
        raise UserError("llama.cpp has no rule that splits text as this tokenizer does", where=path, hint=KNOWN)
    return rule


def _has_prefix(body: dict[str, Any], path: Path) -> bool:
    """Whether a tokenizer of SentencePiece's kind puts a space before a text."""
    prefix = False
    for step in [*_steps(body["normalizer"]), *_steps(body["pre_tokenizer"])]:
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                prefix = True
            case {"type": "Metaspace", "replacement": "▁", "split": False}:
                prefix = step.get("prepend_scheme", "always") != "never"
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                pass
            case _:
                raise UserError(f"its step {step['type']} is not SentencePiece's", where=path, hint=KNOWN)
    return prefix


def _scores(tokens: Sequence[str], merges: Sequence[tuple[str, ...]], path: Path) -> list[float]:
    """Scores by which llama.cpp merges as the list of merges does: the earlier in it, the higher.

    Llama.cpp merges whichever two neighbours make the token with the highest score. That is the same if all ways of
    making a token are in the list, one after the other.
    """
    known, listed = set(tokens), set(merges)
    made = [token for token, _ in groupby("".join(merge) for merge in merges)]
    ranks = {token: rank for rank, token in enumerate(made)}
    ways = ((token[:end], token[end:]) for token in ranks for end in range(1, len(token)))
    if len(ranks) != len(made) or any({*way} <= known and way not in listed for way in ways):
        raise UserError("its merges are not in the order of scores, as SentencePiece's are", where=path, hint=KNOWN)
    return [-float(ranks.get(token, len(ranks))) for token in tokens]
