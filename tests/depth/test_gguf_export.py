"""A paired folder as GGUF: what stands in the file, what it computes, what llama.cpp makes of it where it is there."""

import json
import random
import re
import resource
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from allmend.depth.apply import apply_plan, save_paired
from allmend.depth.gguf_export import export_gguf
from allmend.depth.gguf_vocabulary import RULES, Pieces, read_vocabulary
from allmend.depth.plan import Plan
from allmend.errors import UserError

MakeDecoder = Callable[..., Any]

PLAN = Plan(((0,), (1, 2), (3,), (4, 5)))
TEXT = "The lamb and the ram ran to the band in the sand, and that made the man glad. 1234 lambs! " * 3
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 1e4,
}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLMEND_CACHE", str(tmp_path_factory.mktemp("cache")))


def trained(*, ignore_merges: bool = False, special: tuple[str, ...] = ("<s>", "<eos>")) -> Tokenizer:
    """Pairs of bytes, split as GPT-2 does."""
    bare = Tokenizer(BPE(ignore_merges=ignore_merges))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=290, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False)
    bare.train_from_iterator([TEXT], trainer)
    return bare


def fast(bare: Tokenizer, **named: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="<eos>", **named)


@pytest.fixture
def make_folder(make_decoder: MakeDecoder, tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """A folder of a paired decoder, and the decoder."""

    def make(
        name: str = "llama", *, rows: int = 300, tokenizer: Any = None, plan: Plan = PLAN, **other: Any
    ) -> tuple[Path, Any]:
        model = make_decoder(name, dtype=torch.float32, **other)
        model.resize_token_embeddings(rows, mean_resizing=False)
        paired = apply_plan(model, plan)
        save_paired(paired, tokenizer or fast(trained()), tmp_path / "model", plan)
        return tmp_path / "model", paired

    return make


def values(file: Path) -> dict[str, Any]:
    """The metadata."""
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


def tensors(file: Path) -> dict[str, np.ndarray]:
    """Arrays as [rows, columns]."""
    return {one.name: np.array(one.data) for one in GGUFReader(file).tensors}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama with biases", {}),
    "larger heads": ("llama", {"head_dim": 16}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
}


def computed(facts: dict[str, Any], held: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """Logits [tokens, vocabulary], as llama.cpp's `deci.cpp` goes about it: neighbouring rows of a head are rotated."""
    held = {name: array.astype(np.float64) for name, array in held.items()}

    def norm(x: np.ndarray, gains: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + facts["deci.attention.layer_norm_rms_epsilon"]) * gains

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ held[f"{name}.weight"].T + held.get(f"{name}.bias", 0.0)

    size, count = facts["deci.attention.key_length"], len(ids)
    turns = facts["deci.rope.freq_base"] ** (-np.arange(0, facts["deci.rope.dimension_count"], 2) / size)
    angles = np.arange(count)[:, None, None] * turns / held.get("rope_freqs.weight", 1.0)

    def rotated(x: np.ndarray) -> np.ndarray:
        x = x.reshape(count, -1, size)
        first, second = x[..., 0::2], x[..., 1::2]
        turned = first * np.cos(angles) - second * np.sin(angles), first * np.sin(angles) + second * np.cos(angles)
        return np.stack(turned, -1).reshape(x.shape)

    x = held["token_embd.weight"][ids]
    for layer in range(facts["deci.block_count"]):
        at = f"blk.{layer}."
        heads, pairs = (facts[f"deci.attention.head_count{kind}"][layer] for kind in ("", "_kv"))
        read = norm(x, held[f"{at}attn_norm.weight"])
        q, k = rotated(linear(read, f"{at}attn_q")), rotated(linear(read, f"{at}attn_k"))
        v = linear(read, f"{at}attn_v").reshape(count, -1, size)
        assert (q.shape[1], k.shape[1], v.shape[1]) == (heads, pairs, pairs)
        k, v = (np.repeat(one, heads // pairs, axis=1) for one in (k, v))
        scores = np.einsum("qhs,khs->hqk", q, k) / np.sqrt(size) + np.triu(np.full((count, count), -np.inf), 1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + linear(np.einsum("hqk,khs->qhs", weights, v).reshape(count, -1), f"{at}attn_output")
        read = norm(x, held[f"{at}ffn_norm.weight"])
        gate, up = linear(read, f"{at}ffn_gate"), linear(read, f"{at}ffn_up")
        assert gate.shape[-1] == facts["deci.feed_forward_length"][layer]
        x = x + linear(gate / (1 + np.exp(-gate)) * up, f"{at}ffn_down")
    x = norm(x, held["output_norm.weight"])
    return x @ held.get("output.weight", held["token_embd.weight"]).T


def far(found: np.ndarray, expected: torch.Tensor) -> float:
    return float(np.linalg.norm(found - expected.detach().numpy()) / expected.detach().norm())


@pytest.mark.parametrize("case", CASES)
def test_the_file_computes_what_the_model_does(
    make_folder: Callable[..., tuple[Path, Any]], ids: torch.Tensor, tmp_path: Path, case: str
) -> None:
    name, other = CASES[case]
    folder, paired = make_folder(name, **other)
    expected = paired(ids[:1]).logits[0]

    for kind, most in (("float32", 1e-5), ("float16", 1e-2)):
        out = tmp_path / f"{kind}.gguf"
        export_gguf(folder, out, kind=kind)
        assert far(computed(values(out), tensors(out), ids[0].tolist()), expected) < most
    assert ("output.weight" in tensors(out)) == (case != "tied")


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_the_model_does(
    make_folder: Callable[..., tuple[Path, Any]], ids: torch.Tensor, tmp_path: Path, case: str
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    name, other = CASES[case]
    folder, paired = make_folder(name, **other)
    export_gguf(folder, tmp_path / "out.gguf", kind="float32")

    whole = {"type_k": 0, "type_v": 0}  # keys and values in single precision
    llama = llama_cpp.Llama(str(tmp_path / "out.gguf"), n_ctx=64, logits_all=True, verbose=False, **whole)
    llama.eval(ids[0].tolist())

    assert far(np.array(llama.scores[: ids.shape[1]]), paired(ids[:1]).logits[0]) < 1e-4
    expected = fast(trained())(TEXT).input_ids
    assert llama.tokenize(TEXT.encode(), add_bos=True) == expected


def test_the_sizes_are_those_of_each_layer(make_folder: Callable[..., tuple[Path, Any]], tmp_path: Path) -> None:
    folder, _ = make_folder(plan=Plan(((0,), (1, 2, 3), (4, 5))))
    export_gguf(folder, tmp_path / "out.gguf")

    found = values(tmp_path / "out.gguf")
    assert {name.removeprefix("deci."): value for name, value in found.items() if name.startswith("deci.")} == {
        "block_count": 3,
        "context_length": 256,
        "embedding_length": 32,
        "feed_forward_length": [40, 120, 80],
        "attention.head_count": [4, 12, 8],
        "attention.head_count_kv": [2, 6, 4],
        "attention.key_length": 8,
        "attention.value_length": 8,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "rope.freq_base": 10000.0,
        "rope.dimension_count": 8,
        "vocab_size": 300,
    }
    assert found["general.architecture"] == "deci"
    assert found["general.name"] == "model"


def test_the_tensors_are_the_model_s(make_folder: Callable[..., tuple[Path, Any]], tmp_path: Path) -> None:
    folder, paired = make_folder("llama with biases")
    export_gguf(folder, tmp_path / "out.gguf")

    found = tensors(tmp_path / "out.gguf")
    layer = paired.model.layers[1]
    # row i and row i + 4 of a head of 8 stand side by side
    order = [8 * head + row for head in range(8) for pair in range(4) for row in (pair, pair + 4)]
    for name, values_, rows in (
        ("attn_q", layer.self_attn.q_proj, order),
        ("attn_k", layer.self_attn.k_proj, order[:32]),
        ("attn_v", layer.self_attn.v_proj, range(32)),
        ("attn_output", layer.self_attn.o_proj, range(32)),
        ("ffn_gate", layer.mlp.gate_proj, range(80)),
        ("ffn_up", layer.mlp.up_proj, range(80)),
        ("ffn_down", layer.mlp.down_proj, range(32)),
    ):
        weight, bias = found[f"blk.1.{name}.weight"], found[f"blk.1.{name}.bias"]
        assert (weight.dtype, bias.dtype) == (np.float16, np.float32)
        assert np.array_equal(weight, values_.weight.detach().half().numpy()[list(rows)])
        assert np.array_equal(bias, values_.bias.detach().numpy()[list(rows)])
    assert np.array_equal(found["blk.1.attn_norm.weight"], layer.input_layernorm.weight.detach().numpy())
    assert np.array_equal(found["token_embd.weight"], paired.model.embed_tokens.weight.detach().half().numpy())
    assert len(found) == len(paired.state_dict())


def test_the_tokenizer_comes_along(make_folder: Callable[..., tuple[Path, Any]], tmp_path: Path) -> None:
    bare = trained()
    bare.add_tokens([AddedToken("lambs", normalized=False)])
    tokenizer = fast(bare, chat_template="{{ messages }}", pad_token="<eos>")
    folder, _ = make_folder(tokenizer=tokenizer)
    export_gguf(folder, tmp_path / "out.gguf")

    found = {
        name.removeprefix("tokenizer."): value
        for name, value in values(tmp_path / "out.gguf").items()
        if name.startswith("tokenizer.")
    }
    tokens, types = found.pop("ggml.tokens"), found.pop("ggml.token_type")
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    assert len(merges) > 20
    assert found == {
        "chat_template": "{{ messages }}",
        "ggml.model": "gpt2",
        "ggml.pre": "gpt-2",
        "ggml.merges": [" ".join(pair) for pair in merges],
        "ggml.bos_token_id": 0,
        "ggml.eos_token_id": 1,
        "ggml.padding_token_id": 1,
        "ggml.add_bos_token": False,
        "ggml.add_eos_token": False,
    }
    assert len(tokens) == len(types) == 300
    assert [tokens.index(tokenizer.convert_ids_to_tokens(number)) for number in range(290)] == list(range(290))
    assert types[:2] == [TokenType.CONTROL] * 2
    assert (tokens[290], types[290]) == ("lambs", TokenType.USER_DEFINED)
    assert set(types[2:290]) == {TokenType.NORMAL}
    assert set(types[291:]) == {TokenType.UNUSED}  # rows without a token


@pytest.mark.parametrize(("begins", "ends"), [(True, False), (False, True), (True, True)])
def test_what_stands_around_a_text_is_told(
    make_folder: Callable[..., tuple[Path, Any]], tmp_path: Path, begins: bool, ends: bool
) -> None:
    bare = trained()
    single = "<s> " * begins + "$A" + " <eos>" * ends
    bare.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("<eos>", 1)])
    folder, _ = make_folder(tokenizer=fast(bare))

    found = read_vocabulary(folder, 300)

    assert (found.begins, found.ends) == (begins, ends)


def test_something_else_around_a_text_is_refused(make_folder: Callable[..., tuple[Path, Any]]) -> None:
    bare = trained()
    bare.post_processor = processors.TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    folder, _ = make_folder(tokenizer=fast(bare))

    with pytest.raises(UserError, match="around a text"):
        read_vocabulary(folder, 300)


def splitting(*, each: str, regex: bool = False) -> pre_tokenizers.PreTokenizer:
    (words,) = (steps[0][1] for steps in RULES if steps[0][0] == "Split" and rf"\p{{N}}{each}|" in steps[0][1])
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex),
        ]
    )


DIGITS = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]


@pytest.mark.parametrize(
    ("pre", "ignore_merges", "expected"),
    [
        (pre_tokenizers.Sequence(DIGITS), False, "smollm"),
        (pre_tokenizers.ByteLevel(add_prefix_space=False), False, "gpt-2"),
        (splitting(each="{1,3}"), True, "llama-bpe"),
        (splitting(each="{1,3}"), False, "dbrx"),
        (splitting(each=""), False, "qwen2"),
        (splitting(each=""), True, None),
        (splitting(each="", regex=True), False, None),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), False, None),
        (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), False, None),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), DIGITS[1]]), False, None),
    ],
)
def test_how_text_is_split_has_a_name_or_is_refused(
    make_folder: Callable[..., tuple[Path, Any]],
    tmp_path: Path,
    pre: pre_tokenizers.PreTokenizer,
    ignore_merges: bool,
    expected: str | None,
) -> None:
    bare = trained(ignore_merges=ignore_merges)
    bare.pre_tokenizer = pre
    folder, _ = make_folder(tokenizer=fast(bare))

    if expected is None:
        with pytest.raises(UserError, match=r"tokenizer\.json: llama\.cpp has no rule.*\n.*SmolLM"):
            export_gguf(folder, tmp_path / "out.gguf")
    else:
        export_gguf(folder, tmp_path / "out.gguf")
        assert values(tmp_path / "out.gguf")["tokenizer.ggml.pre"] == expected


def test_a_normalizer_that_llama_cpp_has_not_is_refused(make_folder: Callable[..., tuple[Path, Any]]) -> None:
    bare = trained()
    bare.normalizer = normalizers.Lowercase()
    folder, _ = make_folder(tokenizer=fast(bare))

    with pytest.raises(UserError, match="no rule that splits"):
        read_vocabulary(folder, 300)


WORDS = ["▁a", "an", "nd", "and", "▁and", "▁s", "▁sand", "ban", "band"]
"""In the order of their scores."""


def of_pieces(words: list[str], *, shuffled: bool = False) -> Tokenizer:
    """A tokenizer as transformers makes one of SentencePiece's: every way of making a word, the best word first."""
    letters = ["▁", *"abdns"]
    names = ["<unk>", "<s>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *words]
    known = set(names)
    ways = [(word[:end], word[end:]) for word in words for end in range(1, len(word))]
    merges = [way for way in ways if {*way} <= known]
    if shuffled:
        merges.append(merges.pop(merges.index(("an", "d"))))
    vocabulary = {name: number for number, name in enumerate(names)}
    bare = Tokenizer(BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bare.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bare.add_special_tokens(["<unk>", "<s>", "<eos>"])
    return bare


def merged(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's way: the neighbours whose token has the highest score, the first of them, while there are any."""
    pieces = list(text)
    while True:
        pairs = [one + other for one, other in pairwise(pieces)]
        best = max((pair for pair in pairs if pair in scores), key=lambda pair: scores[pair], default=None)
        if best is None:
            return pieces
        pieces[pairs.index(best) : pairs.index(best) + 2] = [best]


def test_pieces_are_merged_by_scores_as_by_the_list(make_folder: Callable[..., tuple[Path, Any]]) -> None:
    tokenizer = fast(of_pieces(WORDS), unk_token="<unk>")
    folder, _ = make_folder(tokenizer=tokenizer)

    found = read_vocabulary(folder, 300)

    assert isinstance(found.pairs, Pieces)
    assert found.pairs.prefix
    names = ("UNKNOWN", "CONTROL", "BYTE", "NORMAL", "UNUSED")
    assert [found.types.count(TokenType[name]) for name in names] == [1, 2, 256, 15, 26]
    scores = {token: score for token, score in zip(found.tokens, found.pairs.scores, strict=True) if len(token) > 1}
    draw = random.Random(0)
    for _ in range(200):
        text = "a" + "".join(draw.choices("abdns ", k=draw.randint(1, 20)))
        assert merged("▁" + text.replace(" ", "▁"), scores) == tokenizer.tokenize(text)


@pytest.mark.parametrize("case", ["out of order", "a way is missing", "another step"])
def test_pieces_that_scores_do_not_describe_are_refused(
    make_folder: Callable[..., tuple[Path, Any]], case: str
) -> None:
    bare = of_pieces(WORDS, shuffled=case == "out of order")
    if case == "another step":
        bare.normalizer = normalizers.Lowercase()
    folder, _ = make_folder(tokenizer=fast(bare, unk_token="<unk>"))
    if case == "a way is missing":
        path = folder / "tokenizer.json"
        body = json.loads(path.read_text())
        body["model"]["merges"].remove(["b", "and"])
        path.write_text(json.dumps(body))

    with pytest.raises(UserError, match="SentencePiece"):
        read_vocabulary(folder, 300)


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("qwen3", {}, r"layers of qwen3 with different widths.*\n.*Llama, Mistral, Qwen2 can be exported"),
        ("phi3", {}, r"layers of phi3"),
        ("phi", {}, r"layers of phi with"),
        ("starcoder2", {}, r"layers of starcoder2"),
        ("mistral", {"sliding_window": 8}, r"a window of tokens"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}, r"a window of tokens"),
        ("llama", {"hidden_act": "gelu"}, r"the activation gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, r"kind dynamic"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(
    make_folder: Callable[..., tuple[Path, Any]], tmp_path: Path, name: str, other: dict[str, Any], message: str
) -> None:
    plan = Plan(((0,), (1, 2), (3, 4), (5,)))
    folder, _ = make_folder(name, plan=plan, **other)

    with pytest.raises(UserError, match=message):
        export_gguf(folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_other_folders_are_refused(
    make_folder: Callable[..., tuple[Path, Any]], tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(UserError, match=r"no layers run side by side.*\n.*convert_hf_to_gguf"):
        export_gguf(tiny_folder, out)
    with pytest.raises(UserError, match=r"no config\.json"):
        export_gguf(tmp_path, out)
    folder, _ = make_folder(rows=291)
    with pytest.raises(UserError, match="has 292 tokens, and the model only 291"):
        read_vocabulary(_with_tokens(folder, 2), 291)
    (folder / "tokenizer.json").unlink()
    words = Tokenizer(WordLevel({"<s>": 0, "<eos>": 1, "a": 2}, unk_token="a"))
    fast(words).save_pretrained(folder)
    with pytest.raises(UserError, match=r"no pairs to merge .*WordLevel"):
        export_gguf(folder, out)
    assert not out.exists()


def _with_tokens(folder: Path, more: int) -> Path:
    bare = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bare.add_tokens([f"<{number}>" for number in range(more)])
    bare.save(str(folder / "tokenizer.json"))
    return folder


def test_a_file_that_is_there_is_not_overwritten(make_folder: Callable[..., tuple[Path, Any]], tmp_path: Path) -> None:
    folder, _ = make_folder()
    (tmp_path / "out.gguf").write_text("mine")

    with pytest.raises(UserError, match=r"out\.gguf: there is a file here already\n.*--out"):
        export_gguf(folder, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_text() == "mine"


def test_numbers_that_do_not_fit_are_refused(make_folder: Callable[..., tuple[Path, Any]], tmp_path: Path) -> None:
    folder, paired = make_folder()
    with torch.no_grad():
        paired.model.layers[2].mlp.up_proj.weight[3, 4] = -1e5
    paired.save_pretrained(folder)

    with pytest.raises(UserError, match=r"layers\.2\.mlp\.up_proj\.weight has values up to 1e\+05.*\n.*float32"):
        export_gguf(folder, tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    export_gguf(folder, tmp_path / "out.gguf", kind="float32")
    assert tensors(tmp_path / "out.gguf")["blk.2.ffn_up.weight"][3, 4] == np.float32(-1e5)


@pytest.mark.parametrize("room", [100, 50_000])
def test_nothing_is_left_of_a_file_that_does_not_fit(
    make_folder: Callable[..., tuple[Path, Any]], tmp_path: Path, room: int
) -> None:
    folder, _ = make_folder()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(UserError, match=re.escape("out.gguf: no space left")):
            export_gguf(folder, tmp_path / "new" / "out.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert list((tmp_path / "new").iterdir()) == []
