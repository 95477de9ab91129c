"""What vLLM is told of paired models, and what is refused, without vLLM."""

import ast
import importlib.util
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from allmend.errors import UserError
from allmend.models import vllm_plugin
from allmend.models.modeling_paired import PAIRED, LayerConfig, PairedLlamaConfig
from allmend.models.vllm_plugin import CLASSES, KNOWN, OLDEST, check_processes, check_version, register


def classes() -> set[str]:
    """Of the module that needs vLLM, read without importing it."""
    spec = importlib.util.find_spec(vllm_plugin.WHERE)
    assert spec is not None
    assert spec.origin is not None
    return {node.name for node in ast.parse(Path(spec.origin).read_text()).body if isinstance(node, ast.ClassDef)}


def test_the_entry_point_is_there() -> None:
    (found,) = metadata.distribution("allmend").entry_points.select(group="vllm.general_plugins")

    assert found.name == "allmend"
    assert found.load() is register


def test_the_plugin_costs_vllm_nothing() -> None:
    """It is loaded in all of vLLM's processes, whatever model they are for."""
    code = "import sys, allmend.models.vllm_plugin; print(*{'torch', 'transformers', 'vllm'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout

    assert said.split() == []


def test_every_architecture_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, str] = {}
    there: Any = ModuleType("vllm")
    there.__spec__ = importlib.util.spec_from_loader("vllm", None)
    there.ModelRegistry = type("ModelRegistry", (), {"register_model": staticmethod(known.__setitem__)})
    monkeypatch.setitem(sys.modules, "vllm", there)

    register()
    register()

    assert set(known) == {kind.__name__ for kind in PAIRED}
    assert {name.split(":")[0] for name in known.values()} == {"allmend.models.paired_vllm"}
    assert {name.split(":")[1] for name in known.values()} <= classes()


def test_the_architectures_that_run_are_those_that_are_named() -> None:
    run = {name for name, found in CLASSES.items() if found != "NotInVllm"}

    told = {name.replace("-", "") for name in re.split(", | and ", KNOWN)}
    assert {f"Paired{name}ForCausalLM" for name in told} == run


def test_no_vllm_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(UserError, match="vLLM is not installed") as caught:
        register()

    assert "pip install vllm" in str(caught.value)


@pytest.mark.parametrize("version", [(0, 31), (0, 9, 2), (0, 31, 1, "dev0")])
def test_a_version_that_is_too_old_is_refused(version: tuple[int | str, ...]) -> None:
    with pytest.raises(UserError, match=r"vLLM 0\.\d+[.\d]* is too old") as caught:
        check_version(version)

    assert "0.32" in str(caught.value)


@pytest.mark.parametrize("version", [OLDEST, (0, 33, 0), (1, 0, 0), (0, 0, "dev"), (0, 40, "dev1", "gabc")])
def test_other_versions_are_used(version: tuple[int | str, ...]) -> None:
    check_version(version)


def config(widths: list[int] | None, **sizes: int) -> PairedLlamaConfig:
    facts = {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 60, "hidden_size": 24} | sizes
    return PairedLlamaConfig(layer_widths=widths, num_hidden_layers=len(widths or "123"), **facts)


def test_layers_that_cannot_be_shared_out_are_named() -> None:
    with pytest.raises(UserError) as caught:
        check_processes(config([1, 3, 1, 2, 3], num_attention_heads=4), 4)

    said = str(caught.value)
    assert "4 processes" in said
    assert "the 6 key-value heads of layers 1, 4" in said
    assert "of layers 0, 2" not in said  # two heads, each on two processes
    assert "layer 3" not in said
    assert "can be 1, 2." in said


def test_all_that_does_not_fit_is_named() -> None:
    with pytest.raises(UserError) as caught:
        check_processes(config([1, 2], num_attention_heads=3, num_key_value_heads=3), 7)

    said = str(caught.value)
    for size in ("3 heads", "3 key-value heads", "60 neurons"):
        assert f"the {size} of layer 0" in said
    for size in ("6 heads", "6 key-value heads", "120 neurons"):
        assert f"the {size} of layer 1" in said
    assert "can be 1, 3." in said


@pytest.mark.parametrize("widths", [None, [1, 2, 3], [1, 1], [3, 2]])
@pytest.mark.parametrize("heads", [(12, 4), (9, 3), (8, 8), (4, 1)])
def test_what_fits_is_what_vllm_asserts(widths: list[int] | None, heads: tuple[int, int]) -> None:
    sizes = config(widths, num_attention_heads=heads[0], num_key_value_heads=heads[1], intermediate_size=48)
    for processes in range(1, 17):
        layers = [LayerConfig(sizes, width) for width in widths or [1]]
        # as `LlamaAttention` and its linear layers have it
        fits = all(
            layer.num_attention_heads % processes == 0
            and layer.intermediate_size % processes == 0
            and (
                layer.num_key_value_heads % processes == 0
                if layer.num_key_value_heads >= processes
                else processes % layer.num_key_value_heads == 0
            )
            for layer in layers
        )
        try:
            check_processes(sizes, processes)
        except UserError as error:
            assert not fits
            numbers = str(error).rsplit("can be ", 1)[1]
            for works in map(int, re.findall(r"\d+", numbers)):
                check_processes(sizes, works)
        else:
            assert fits
