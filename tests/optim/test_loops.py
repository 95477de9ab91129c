"""Ordinary optimisers in other people's loops: transformers' Trainer, accelerate, and sharded parameters (FSDP2)."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer, TrainingArguments, get_wsd_schedule

from allmend.optim import LionA, LionAR, parameter_groups

SHARDED = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from allmend.optim import LionA, LionAR, parameter_groups

name, folder, world = sys.argv[1], sys.argv[2], int(sys.argv[3])
rank = int(sys.argv[4])
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{name}", rank=rank, world_size=world)
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
groups = parameter_groups(model)
optimizer = LionAR(groups, lr=0.01) if name == "lionar" else LionA(groups, lr=0.01)
inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
for _ in range(5):
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()
whole = {key: value.full_tensor() if world > 1 else value for key, value in model.state_dict().items()}
if rank == 0:
    torch.save(whole, f"{folder}/{name}-{world}.pt")
if world > 1:
    dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["liona", "lionar"])
def test_sharded_by_rows_it_is_the_same_to_the_last_bits(name: str, tmp_path: Path) -> None:
    def start(world: int, rank: int) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", SHARDED, name, str(tmp_path), str(world), str(rank)]
        return subprocess.Popen(words, stderr=subprocess.PIPE, text=True)

    for process in [start(1, 0), start(2, 0), start(2, 1)]:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    one, two = (torch.load(tmp_path / f"{name}-{world}.pt") for world in (1, 2))
    for key, tensor in one.items():
        assert torch.allclose(tensor, two[key], atol=1e-6), key


class Random(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 300, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("kind", [LionA, LionAR])
def test_transformers_trainer_takes_it_with_a_schedule_without_warmup(
    kind: type[LionA], make_tiny_model: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    model = make_tiny_model()
    optimizer = kind(parameter_groups(model), lr=0.01)
    schedule = get_wsd_schedule(optimizer, num_warmup_steps=0, num_decay_steps=6, num_training_steps=12)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=12, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no",
        logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Random(), optimizers=(optimizer, schedule))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3])


@pytest.mark.parametrize("kind", [LionA, LionAR])
def test_the_trainer_builds_it_from_a_class_and_arguments(
    kind: type[LionA], make_tiny_model: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, weight_decay=0.1,
    )  # fmt: skip
    trainer = Trainer(
        make_tiny_model(), arguments, train_dataset=Random(), optimizer_cls_and_kwargs=(kind, {"lr": 0.01})
    )
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, kind)  # inside accelerate's


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "one cycle": lambda it: torch.optim.lr_scheduler.OneCycleLR(it, max_lr=0.02, total_steps=20, cycle_momentum=False),
    "warmup, stable, decay": lambda it: get_wsd_schedule(
        it, num_warmup_steps=2, num_decay_steps=5, num_training_steps=20
    ),
    "plateau": lambda it: torch.optim.lr_scheduler.ReduceLROnPlateau(it, factor=0.5, patience=1),
}


@pytest.mark.filterwarnings("ignore:LionAR begins")
@pytest.mark.parametrize("kind", [LionA, LionAR])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_it(name: str, kind: type[LionA]) -> None:
    one = torch.nn.Parameter(torch.randn(6, 50, generator=torch.Generator().manual_seed(0)))
    optimizer = kind([one], lr=0.02, weight_decay=0.1)
    scheduler, rates = SCHEDULERS[name](optimizer), set[float]()
    for step in range(19):
        before, lr = one.detach().clone(), optimizer.param_groups[0]["lr"]
        one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        scheduler.step(*([1.0] if name == "plateau" else []))
        moved = (one.detach() - before).norm().item()
        assert (moved == 0) == (lr == 0)
        rates.add(lr)
    assert len(rates) > 2


def test_a_scaler_of_gradients_steps_it() -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = LionAR(parameter_groups(model), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = model.weight.detach().clone()
    scaler.scale(model(torch.randn(5, 4)).square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(model.weight, before)


def test_accelerate_prepares_it() -> None:
    from accelerate import Accelerator

    model = torch.nn.Linear(4, 3)
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, LionAR(parameter_groups(model), lr=0.01))
    before = model.weight.detach().clone()
    accelerator.backward(prepared(torch.randn(5, 4)).square().sum())
    optimizer.step()
    assert not torch.equal(model.weight, before)
