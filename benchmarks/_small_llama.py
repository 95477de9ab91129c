"""A small Llama of its own for quick benchmarks: pretrained once, then taken from a cache.

Its text is WikiText-2 and the training answers of those MedQuAD clients that benchmarks do not federate. Nothing of
the members' own records is in it, neither of their training nor of their held-out ones: an answer of another client
that shares 13 words in a row with one of them is left out, because institutes copy from each other. So a benchmark
knows which text the model meets in tuning for the first time.

    python benchmarks/_small_llama.py [--data FOLDER] [--cache FOLDER] [--threads 2]

The data folder holds `wikitext2/` and `medquad/` (JSON Lines with question, answer and split); the environment
variable ALLMEND_DATA names it otherwise.
"""

import argparse
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from _measure import machine

MEMBERS = ("cancergov", "cdc", "ninds")
"""MedQuAD clients that benchmarks federate."""

CACHE = Path.home() / ".cache" / "allmend" / "benchmarks"

_END, _PAD = "<eos>", "<pad>"
_SHARED_WORDS = 13


@dataclass(frozen=True)
class Pretraining:
    """What the model is and how it is trained; the defaults are those of the benchmarks."""

    vocabulary: int = 4096
    hidden: int = 256
    feed_forward: int = 688
    layers: int = 6
    heads: int = 4
    positions: int = 512
    """Longest sequence; also the length of the packed sequences it is trained on."""
    tokens: int = 2_000_000
    """Seen in training; no more than one pass over the text."""
    batch: int = 4
    """Sequences per step."""
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Text:
    """Documents to learn from, and the members' held-out ones, on which the model is only measured."""

    train: list[str]
    held_out: list[str]
    shared: int
    """Answers left out because they share text with a member's records."""


def small_llama(cache: Path, *, data: Path, settings: Pretraining | None = None) -> Path:
    """The folder of the pretrained model and its tokenizer, for `from_pretrained`.

    A model in the cache is returned at once; else it is trained, with the progress printed. The name of its folder is
    a digest of the settings and of the data. The same call gives the same model on the same machine with the same
    number of threads.

    Args:
        cache: folder of such models; made when there is none.
        data: folder with `wikitext2/` and `medquad/`.
        settings: other than the default ones.
    """
    settings = settings or Pretraining()
    folder = cache / f"small-llama-{_digest(data, settings)[:16]}"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    text = read_text(data)
    tokenizer = _tokenizer(text.train, settings)
    train, held_out = (_sequences(tokenizer, part, settings) for part in (text.train, text.held_out))
    print(
        f"{len(text.train):,} documents, {train.numel():,} tokens ({text.shared} answers left out that share text with "
        f"members); held out: {len(text.held_out):,} documents, {held_out.numel():,} tokens",
        flush=True,
    )
    model, speed = _pretrain(train, held_out, settings)
    losses = {
        "held_out_loss": _loss(model, held_out),
        "unigram_loss": _unigram_loss(train, held_out, settings.vocabulary),
    }
    results = {name: round(loss, 4) for name, loss in losses.items()} | {"tokens_per_second": round(speed)}
    print(json.dumps(results), flush=True)
    unfinished = Path(tempfile.mkdtemp(dir=cache, prefix=".unfinished-"))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        record = {"settings": asdict(settings), "members": MEMBERS, "machine": machine(), **results}
        (unfinished / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n")
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    except OSError:
        if not folder.exists():  # another process was faster
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def read_text(data: Path) -> Text:
    """The documents: Wikipedia articles, and question and answer as a record without a chat template is rendered."""
    members = [record for name in MEMBERS for record in _medquad(data, name)]
    known = {words for record in members for words in _runs_of_words(record["answer"])}
    train, shared = [], 0
    for path in _files(data):
        name = path.name.split(".")[0]
        if path.parent.name == "wikitext2":
            train += _articles(gzip.decompress(path.read_bytes()).decode())
        elif name not in MEMBERS:
            for record in _medquad(data, name):
                if record["split"] != "train":
                    continue
                if known.isdisjoint(_runs_of_words(record["answer"])):
                    train.append(_rendered(record))
                else:
                    shared += 1
    return Text(train, [_rendered(record) for record in members if record["split"] == "test"], shared)


def _files(data: Path) -> list[Path]:
    """All files of the data, by name."""
    return [*sorted(data.glob("wikitext2/*.txt.gz")), *sorted(data.glob("medquad/*.jsonl.gz"))]


def _digest(data: Path, settings: Pretraining) -> str:
    digest = hashlib.sha256(json.dumps([asdict(settings), MEMBERS, _SHARED_WORDS]).encode())
    for path in _files(data):
        digest.update(hashlib.sha256(path.name.encode()).digest() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _medquad(data: Path, name: str) -> list[dict[str, str]]:
    with gzip.open(data / "medquad" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _rendered(record: dict[str, str]) -> str:
    return f"{record['question']} {record['answer']}"


def _articles(text: str) -> list[str]:
    """WikiText's articles, each under its title (` = Title = `), with the marks around hyphens and the like removed."""
    articles = re.split(r"\n(?= = [^=].* = \n)", re.sub(r" @(.)@ ", r"\1", text))
    return [article.strip() for article in articles if article.strip()]


def _runs_of_words(text: str) -> Iterator[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return (tuple(words[i : i + _SHARED_WORDS]) for i in range(max(1, len(words) - _SHARED_WORDS + 1)))


def _tokenizer(texts: Sequence[str], settings: Pretraining) -> PreTrainedTokenizerFast:
    """Byte-level BPE, of the documents that the model learns from."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary, special_tokens=[_END, _PAD], initial_alphabet=alphabet, show_progress=False
    )
    bare.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, eos_token=_END, pad_token=_PAD, model_max_length=settings.positions
    )


def _sequences(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], settings: Pretraining) -> torch.Tensor:
    """Documents in an order by the seed, end to end with an end mark behind each, int64 [sequences, positions]."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    encode = tokenizer.backend_tokenizer.encode
    ids = torch.cat([torch.tensor(encode(texts[index] + _END).ids) for index in order])
    whole = len(ids) // settings.positions * settings.positions
    return ids[:whole].view(-1, settings.positions)


def _pretrain(train: torch.Tensor, held_out: torch.Tensor, settings: Pretraining) -> tuple[LlamaForCausalLM, float]:
    """The trained model, and the tokens per second that training took."""
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.feed_forward,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = LlamaForCausalLM(config).float().train()
    count = min(len(train), settings.tokens // settings.positions)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(settings.seed + 1))[:count]
    steps = math.ceil(count / settings.batch)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {steps} steps; {machine()}", flush=True)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": gains, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        foreach=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: _share_of_rate(step, steps, settings.warmup_steps))
    start = time.perf_counter()
    for step, batch in enumerate(order.split(settings.batch), start=1):
        loss = _next_token_loss(model, train[batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        adam.step()
        schedule.step()
        adam.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps:
            speed = step * settings.batch * settings.positions / (time.perf_counter() - start)
            print(f"step {step:4} of {steps}: loss {loss.item():.3f}, {speed:,.0f} tokens/s", flush=True)
    speed = count * settings.positions / (time.perf_counter() - start)
    return model.eval(), speed


def _share_of_rate(step: int, steps: int, warmup: int) -> float:
    """Linear warmup, then cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _next_token_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood (nats) of each token of int64 [B, T] but the first."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def _loss(model: LlamaForCausalLM, sequences: torch.Tensor) -> float:
    """Of the first 64 sequences."""
    losses = [_next_token_loss(model, batch).item() * len(batch) for batch in sequences[:64].split(8)]
    return sum(losses) / len(sequences[:64])


def _unigram_loss(train: torch.Tensor, held_out: torch.Tensor, vocabulary: int) -> float:
    """Of the same sequences, under the frequencies of the training tokens (add one)."""
    frequencies = (torch.bincount(train.flatten(), minlength=vocabulary) + 1).double()
    return -(frequencies / frequencies.sum()).log()[held_out[:64, 1:]].mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    named = os.environ.get("ALLMEND_DATA")
    parser.add_argument(
        "--data", type=Path, default=named and Path(named), required=not named, help="folder of the data"
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of pretrained models")
    parser.add_argument("--threads", type=int, help="of torch")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(small_llama(options.cache, data=options.data))


if __name__ == "__main__":
    main()
