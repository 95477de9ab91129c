import contextlib
import errno
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from allmend.errors import UserError
from allmend.models.tensors import dump, is_finite, layout, nbytes, parse, read_tensors, write_tensors


def example() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "b": torch.randn(3, 4, generator=generator).to(torch.bfloat16),
        "a": torch.tensor([1.0, float("nan"), float("inf"), -0.0]),
        "counts": torch.tensor([[2**40, -1]]),
        "byte": torch.tensor(7, dtype=torch.uint8),
        "empty": torch.zeros(0, 5),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
    }


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal bit by bit, so that NaN equals itself and -0 does not equal 0."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    if left.numel() == 0:
        return True
    return torch.equal(
        left.contiguous().reshape(-1).view(torch.uint8), right.contiguous().reshape(-1).view(torch.uint8)
    )


def test_round_trip_is_exact() -> None:
    metadata = {"round": 3, "names": ["ä", "b"], "nested": {"x": None, "y": 0.1}}
    tensors, read = parse(dump(example(), metadata))
    assert read == metadata
    assert set(tensors) == set(example())
    assert all(same(tensors[name], tensor) for name, tensor in example().items())


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_a_value_that_is_not_finite_is_found_wherever_it_stands(spoilt: float, dtype: torch.dtype) -> None:
    for size in (1, 7, 1000):
        values = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert is_finite(values)
        values[size // 2] = spoilt
        assert not is_finite(values)
    opposite = torch.tensor([float("inf"), float("-inf")]).to(dtype)
    assert not is_finite(opposite)


def test_values_that_add_up_to_infinity_are_finite() -> None:
    assert is_finite(torch.full((3,), torch.finfo(torch.float32).max))
    assert is_finite(torch.full((70_000,), 1.0, dtype=torch.float16))
    assert is_finite(torch.tensor([[2**62, 2**62]]))
    assert is_finite(torch.zeros(0, 5))


@given(
    st.dictionaries(
        st.text(max_size=8).filter(lambda name: name != "__metadata__"),
        st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=4),
        max_size=4,
    )
)
@settings(max_examples=50, deadline=None)
def test_any_names_and_values_survive(content: dict[str, list[float]]) -> None:
    tensors, metadata = parse(dump({name: torch.tensor(values) for name, values in content.items()}, content))
    assert metadata == content
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == content


def test_equal_content_gives_equal_bytes() -> None:
    backwards = dict(reversed(example().items()))
    assert dump(example(), {"a": 1, "b": 2}) == dump(backwards, {"b": 2, "a": 1})


def test_tensors_that_share_memory_are_kept_apart() -> None:
    whole = torch.arange(4.0)
    tensors, _ = parse(dump({"whole": whole, "again": whole, "half": whole[2:]}, {}))
    assert torch.equal(tensors["whole"], whole)
    assert torch.equal(tensors["again"], whole)
    assert torch.equal(tensors["half"], whole[2:])


def test_metadata_that_is_not_json_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        dump({}, {"loss": float("nan")})


def test_every_truncation_and_a_tail_are_refused() -> None:
    data = dump({"a": torch.arange(3.0)}, {"round": 1})
    for length in range(len(data)):
        with pytest.raises(UserError):
            parse(data[:length])
    with pytest.raises(UserError, match="after its end"):
        parse(data + b"x")


def with_header(header: object, body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 64,
        b"\x80\x04pickle" * 8,
        with_header([]),
        with_header({"a": 1}),
        with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)),
        with_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, bytes(8)),
        with_header({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}),
        with_header({"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}, bytes(4)),
        with_header({"a": {"dtype": "XYZ", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        with_header(
            {
                "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            },
            bytes(4),
        ),
        with_header({"__metadata__": {"allmend": "[1]"}}),
        with_header({"__metadata__": {"allmend": "{"}}),
        with_header({"__metadata__": {"allmend": 1}}),
        with_header({"__metadata__": "x"}),
    ],
)
def test_malformed_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(UserError, match="client-3"):
        parse(data, where="client-3")


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_flipped_byte_never_gives_another_error(data: st.DataObject) -> None:
    good = bytearray(dump({"a": torch.arange(3.0), "b": torch.arange(2)}, {"round": 1}))
    good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(UserError):
        parse(bytes(good))


def test_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "state.safetensors"
    write_tensors(path, example(), {"round": 2})
    tensors, metadata = read_tensors(path)
    assert metadata == {"round": 2}
    assert all(same(tensors[name], tensor) for name, tensor in example().items())
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    with safe_open(path, framework="pt") as plain:  # it is a plain safetensors file
        assert same(plain.get_tensor("b"), example()["b"])


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.safetensors"
    write_tensors(path, {"a": torch.zeros(1)}, {})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no space") as caught:
        write_tensors(path, {"a": torch.ones(1)}, {})
    assert caught.value.where == str(path)
    assert caught.value.hint
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert read_tensors(path)[0]["a"].item() == 0


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.safetensors"):
        read_tensors(tmp_path / "gone.safetensors")


def test_nbytes_counts_values() -> None:
    assert nbytes({"a": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16)}) == 48 + 10


def test_layout_points_at_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, example(), {})
    data = path.read_bytes()
    for name, span in layout(path).items():
        tensor = example()[name]
        assert span.shape == tuple(tensor.shape)
        values = tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.zeros(0)
        assert data[span.start : span.stop] == bytes(values.tolist())
