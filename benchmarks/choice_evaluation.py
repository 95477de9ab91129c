"""Multiple-choice evaluation against the naive way, and that both give the same answers.

The naive way puts every choice through the model with its own copy of the prompt, padded batches, and computes logits
at every position. Ours shares the prompt among its choices, packs questions, and computes logits on choices only.

    python benchmarks/choice_evaluation.py [--quick]
"""

import argparse
from pathlib import Path

import torch

from _measure import figure, interleaved, machine, times
from allmend.data.chat import Encoded, Encoder
from allmend.data.records import Message, Record
from allmend.learn.evaluate import score
from allmend.models.load import LoadedModel
from allmend.prepare import prepare
from allmend.recipe import make_recipe


@torch.inference_mode()
def naive(model: LoadedModel, encoder: Encoder, records: list[Record], *, batch_size: int = 16) -> list[int]:
    """The choice with the highest mean log-likelihood of each question."""
    rows: list[Encoded] = []
    for record in records:
        for choice in record.choices:
            messages = (*record.messages[:-1], Message("assistant", choice))
            rows.append(encoder.for_evaluation(Record(id=record.id, messages=messages)))
    means = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        ids = torch.nn.utils.rnn.pad_sequence([row.ids for row in batch], batch_first=True)
        target = torch.nn.utils.rnn.pad_sequence([row.target for row in batch], batch_first=True)
        mask = torch.arange(ids.shape[1])[None] < torch.tensor([len(row) for row in batch])[:, None]
        logits = model.model(input_ids=ids, attention_mask=mask.long()).logits.float()
        values = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        means += ((values * target[:, 1:]).sum(1) / target[:, 1:].sum(1)).tolist()
    chosen, at = [], 0
    for record in records:
        options = means[at : at + len(record.choices)]
        chosen.append(options.index(max(options)))
        at += len(record.choices)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer questions and runs")
    quick = parser.parse_args().quick
    print(machine())
    settings = {"data": {"template": "plain", "icd10cm": {"train": 16, "held_out": 10 if quick else 40}}}
    prepared = prepare(make_recipe(settings), Path())
    records = [record for client in sorted(prepared.held_out) for record in prepared.held_out[client]]
    encoded = [one for client in sorted(prepared.held_out) for one in prepared.held_out_encoded[client]]
    model, answers = prepared.model, dict[str, list[int | None]]()

    def ours() -> float:
        answers["ours"] = [one.choice for one in score(model.model, records, encoded)]
        return len(records)

    def plain() -> float:
        answers["naive"] = list(naive(model, prepared.encoder, records))
        return len(records)

    a, b = interleaved(("prompt shared", ours), ("naive", plain), runs=2 if quick else 5)
    same = sum(x == y for x, y in zip(answers["ours"], answers["naive"], strict=True))
    figure(
        "multiple choice with shared prompts against a copy of the prompt for each choice",
        f"{times(a, b)}; the same choice on {same} of {len(records)} questions",
    )


if __name__ == "__main__":
    main()
