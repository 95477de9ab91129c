"""Paired folders in vLLM, where it is installed: on its own platform, through its own engine."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from allmend.models.modeling_paired import PAIRED
from allmend.models.vllm_plugin import CLASSES

RUN = {kind.config_class.model_type: kind for kind in PAIRED if CLASSES[kind.__name__] != "NotInVllm"}
REFUSED = {kind.config_class.model_type: kind for kind in PAIRED if CLASSES[kind.__name__] == "NotInVllm"}
SIZES: dict[str, Any] = {
    "layer_widths": [1, 3, 2],
    "vocab_size": 264,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
OTHER: dict[str, dict[str, Any]] = {"paired_llama": {"attention_bias": True}, "paired_qwen3": {"head_dim": 64}}

# a file, since vLLM's processes start by importing it
ENGINE = """
import json, sys
from vllm import LLM, SamplingParams

def main():
    sizes = dict(max_model_len=64, max_num_seqs=2, max_logprobs=-1, tensor_parallel_size=int(sys.argv[3]))
    llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, **sizes)
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])]
    asked = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, prompt_logprobs=-1)
    for found in llm.generate(prompts, asked):
        told = [[line[token].logprob for token in range(len(line))] for line in found.prompt_logprobs[1:]]
        print("FOUND", json.dumps([told, list(found.outputs[0].token_ids)]))

if __name__ == "__main__":
    main()
"""

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _needs_vllm() -> None:
    pytest.importorskip("vllm")


@pytest.fixture
def make_paired(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., tuple[Any, Path]]:
    """A paired model with weights that no initialisation gives, and its folder."""

    def make(kind: type[Any], **other: Any) -> tuple[Any, Path]:
        config = kind.config_class(**SIZES | OTHER.get(kind.config_class.model_type, {}) | other)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = kind(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / "paired")
        tokenizer.save_pretrained(tmp_path / "paired")
        return model, tmp_path / "paired"

    return make


def engine(
    folder: Path, prompts: list[list[int]], tmp_path: Path, *, processes: int = 1
) -> subprocess.CompletedProcess[str]:
    (tmp_path / "engine.py").write_text(ENGINE)
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    quiet |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # or two processes ask for two NUMA nodes
    command = [sys.executable, str(tmp_path / "engine.py"), str(folder), json.dumps(prompts), str(processes)]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | quiet)


def check_engine(model: Any, folder: Path, tmp_path: Path, *, processes: int = 1) -> None:
    """See that vLLM gives transformers' log-probabilities for a prompt, and goes on with the likeliest tokens."""
    ids = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [ids[0], ids[1][:9]]

    done = engine(folder, prompts, tmp_path, processes=processes)

    found = [json.loads(line.split(maxsplit=1)[1]) for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert len(found) == 2, done.stdout + done.stderr
    for prompt, (told, made) in zip(prompts, found, strict=True):
        whole = model(torch.tensor([prompt + made])).logits[0].float()
        expected = whole[: len(prompt) - 1].log_softmax(-1)
        assert expected.std(0).mean() > 0.05  # or all tokens would have got the same
        assert (torch.tensor(told) - expected).abs().max() < 1e-3
        best = whole[len(prompt) - 1 : -1]
        taken = best.gather(-1, torch.tensor(made)[:, None]).squeeze(-1)
        assert (best.amax(-1) - taken).max() < 1e-3  # greedily, with the cache


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", RUN)
@torch.no_grad()
def test_vllm_computes_what_transformers_does(name: str, make_paired: Any, tmp_path: Path) -> None:
    check_engine(*make_paired(RUN[name]), tmp_path)


@pytest.mark.timeout(600)
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two processes need two GPUs, or a build without any")
@torch.no_grad()
def test_two_processes_compute_what_one_does(make_paired: Any, tmp_path: Path) -> None:
    """One key-value head is on both, two are shared out, the gains of the heads with them."""
    model, folder = make_paired(RUN["paired_qwen3"], layer_widths=[1, 2, 4], num_key_value_heads=1)

    check_engine(model, folder, tmp_path, processes=2)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_run_is_refused(name: str, make_paired: Any, tmp_path: Path) -> None:
    _, folder = make_paired(REFUSED[name])

    done = engine(folder, [[1, 2, 3]], tmp_path)

    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert f"{REFUSED[name].__name__} does not run in vLLM" in said
    assert "Paired models of Llama, Mistral, Phi-3, Qwen2 and Qwen3 do." in said
