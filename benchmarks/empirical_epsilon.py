"""The empirical ε against the accountant's, over many seeds on a tiny model.

Each seed trains the same tiny model on the same records with canaries of its own coins, privately and without noise.
For a private run the lower bound from the coins must lie below the accountant's ε in at least 95 % of the seeds;
without noise and with ten copies it must be far above 0.

    python benchmarks/empirical_epsilon.py [--quick]
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from _measure import machine
from allmend.life import tune
from allmend.models.load import load_model
from allmend.recipe import make_recipe
from allmend.results import AuditTable, PrivacyTable

DELTA = 1e-3


def tiny_model(folder: Path) -> Path:
    """A byte-level Llama of two layers with random weights."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(BPE(vocab={symbol: number for number, symbol in enumerate(symbols)}, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bare.decoder = decoders.ByteLevel()
    bare.add_special_tokens(["<eos>"])
    PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<eos>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(symbols) + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer seeds")
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    seeds = 3 if options.quick else options.seeds
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        model = load_model(str(tiny_model(work / "model")))
        rows = [
            {"id": str(i), "text": f"Line {i}: the ward opens at {i % 24} and closes at {i % 7}."} for i in range(40)
        ]
        (work / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        below, private, open_ended = 0, [], []
        for seed in range(seeds):
            recipe = make_recipe(
                {
                    "seed": seed,
                    "model": {"source": str(work / "model")},
                    "data": {"template": "plain", "max_tokens": 400},
                    "clients": [{"name": "a", "data": "a.jsonl"}],
                    "adapter": {"kind": "full"},
                    "train": {"learning_rate": 3e-3, "batch_size": 32, "loss_mean": "record", "schedule": "constant"},
                    "strategy": {"name": "fedavg", "rounds": 10},
                    "privacy": {"record": {"clip": 1.0, "epsilon": 4.0, "delta": DELTA}},
                    "compare": {"plain": {"privacy": {}}},
                    "canaries": {"copies": [1, 10], "count": [100, 20]},
                    "audit": {"prefix_tokens": [20], "exposure": [], "membership_records": 0},
                }
            )
            run = tune(recipe, work / f"run-{seed}", base=work, model=model)
            audit, privacy = run.read_table("audit", AuditTable), run.read_table("privacy", PrivacyTable)
            if audit is None or privacy is None:
                raise RuntimeError("the run left no audit")
            accounted = max(budget.epsilon or 0 for budget in privacy.budgets["fedavg"])
            once = next(row for row in audit.epsilon if (row.model, row.copies) == ("fedavg", 1))
            ten = next(row for row in audit.epsilon if (row.model, row.copies) == ("plain", 10))
            plain = next(row for row in audit.epsilon if (row.model, row.copies) == ("plain", 1))
            below += once.epsilon <= accounted
            private.append(once.epsilon)
            open_ended.append((plain.epsilon, ten.epsilon))
            print(
                f"seed {seed}: accounted {accounted:.2f}; measured with noise {once.epsilon:.2f} ({once.right} of "
                f"{once.guesses}); without noise {plain.epsilon:.2f} with one copy, {ten.epsilon:.2f} with ten",
                flush=True,
            )
    print(f"measured below accounted: {below} of {seeds} seeds; with noise median {statistics.median(private):.2f}")
    one, ten_copies = (statistics.median(column) for column in zip(*open_ended, strict=True))
    print(f"without noise: median {one:.2f} with one copy, {ten_copies:.2f} with ten")


if __name__ == "__main__":
    main()
