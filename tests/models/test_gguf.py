"""A GGUF file becomes a folder with the same model."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from allmend.errors import UserError
from allmend.models.cache import cache_dir
from allmend.models.sources import resolve

MakeFolder = Callable[..., Path]


def write_gguf(path: Path, model: LlamaForCausalLM, *, pre: str = "default") -> Path:
    """`model` as a GGUF file with a byte-level vocabulary, in llama.cpp's conventions."""
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, "<eos>", "ab"]
    words += [f"<unused{i}>" for i in range(config.vocab_size - len(words))]
    writer.add_token_list(words)
    writer.add_token_types([1 if word in letters or word == "ab" else 3 for word in words])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(len(letters))

    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        short = (
            f"blk.{layer}.{names[rest.removesuffix('.weight')]}"
            if layer.isdigit()
            else names[name.removesuffix(".weight")]
        )
        for part, heads in (("attn_q", config.num_attention_heads), ("attn_k", config.num_key_value_heads)):
            if part in short:  # llama.cpp interleaves the two halves that the rotation pairs
                rows, columns = values.shape
                values = values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        writer.add_tensor(f"{short}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_becomes_a_folder_once(
    tmp_path: Path,
    make_model: Callable[..., LlamaForCausalLM],
    ids: torch.Tensor,
    tied: bool,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = make_model(tied=tied)
    file = write_gguf(tmp_path / "Tiny.F32.gguf", model)
    before = torch.get_rng_state()
    folder = resolve(str(file))
    assert torch.equal(before, torch.get_rng_state())
    assert capfd.readouterr() == ("", "")
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert folder.is_relative_to(cache_dir())
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-5)
    assert (plain.get_input_embeddings().weight is plain.get_output_embeddings().weight) == tied
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())

    moved = tmp_path / "elsewhere" / file.name
    moved.parent.mkdir()
    file.rename(moved)
    assert resolve(str(moved)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made


def test_digits_are_split_where_the_model_was_trained_so(tmp_path: Path, model: LlamaForCausalLM) -> None:
    steps = {}
    for pre in ("default", "smollm"):
        tokenizer = AutoTokenizer.from_pretrained(resolve(str(write_gguf(tmp_path / f"{pre}.gguf", model, pre=pre))))
        steps[pre] = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")]
    assert steps == {"default": ["a", "Ġ", "Ġ12"], "smollm": ["a", "ĠĠ", "1", "2"]}


@pytest.mark.parametrize("keep", [0, 3, 4, 30, 3000, -5000])
def test_a_truncated_gguf_file_is_refused(tmp_path: Path, model: LlamaForCausalLM, cache: Path, keep: int) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", model)
    os.truncate(file, keep if keep >= 0 else file.stat().st_size + keep)
    with pytest.raises(UserError, match=r"tiny\.gguf"):
        resolve(str(file))
    assert not [path for path in cache.rglob("*") if path.is_dir() and path.parent.name == "models"]


def test_another_file_called_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.gguf").write_text("<html>")
    with pytest.raises(UserError, match="not a GGUF file"):
        resolve(str(tmp_path / "page.gguf"))
