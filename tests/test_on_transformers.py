"""What `import allmend` does to transformers: it knows paired models, whichever comes first, and costs nothing."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from allmend import models, on_transformers
from allmend.models.modeling_paired import PAIRED, PairedLlamaConfig, PairedLlamaForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "layer_widths": [1, 2],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    PairedLlamaForCausalLM(PairedLlamaConfig(**SIZES)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(code: str, *words: object) -> str:
    """What a fresh Python says."""
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | offline)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_stand_ins_are_those_of_the_classes() -> None:
    assert {kind.config_class.model_type: kind.config_class.__name__ for kind in PAIRED} == (
        on_transformers.CONFIGURATIONS
    )


def test_importing_costs_nothing() -> None:
    said = run("import sys, allmend; import allmend.cli; print(*sys.modules)")
    assert {"allmend", "allmend.cli", "allmend.on_transformers"} <= set(said.split())
    assert not {"torch", "transformers", "numpy", "allmend.models.modeling_paired"} & set(said.split())


LOADS = """
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("allmend")]
print(type(config).__name__, type(model).__module__, model.config.layer_widths)
"""

ORDERS = {
    # a module of transformers is half imported when its `AutoConfig` is there
    "allmend first": "import sys, allmend\nfrom transformers import LlamaConfig",
    "transformers first": "import sys\nfrom transformers import AutoConfig, AutoModelForCausalLM\nimport allmend",
    "transformers first, nothing of it used": "import sys, transformers, allmend",
}


@pytest.mark.parametrize(
    "order", [pytest.param(name, marks=[pytest.mark.slow] if name != "allmend first" else []) for name in ORDERS]
)
def test_a_folder_loads_in_whatever_order(order: str, folder: Path) -> None:
    said = run(ORDERS[order] + LOADS, folder)

    assert said.split("\n")[0] == "PairedLlamaConfig allmend.models.modeling_paired [1, 2]"


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`AutoConfig` and this process as if the classes were not imported yet."""
    monkeypatch.setattr(models, "modeling_paired", models.modeling_paired)  # is put back afterwards
    monkeypatch.delitem(sys.modules, on_transformers.WHERE)
    kept = dict(CONFIG_MAPPING._extra_content)
    yield
    CONFIG_MAPPING._extra_content.clear()
    CONFIG_MAPPING._extra_content.update(kept)


def test_stand_ins_become_the_classes_when_they_are_used(folder: Path, early: None) -> None:
    on_transformers.announce()

    stand_in: Any = CONFIG_MAPPING["paired_llama"]
    assert not issubclass(stand_in, PretrainedConfig)
    assert not hasattr(stand_in, "__wrapped__")  # looking at it does not import
    assert on_transformers.WHERE not in sys.modules
    found = AutoConfig.from_pretrained(folder)
    assert type(found).__name__ == "PairedLlamaConfig"
    assert found.layer_widths == [1, 2]
    assert on_transformers.WHERE in sys.modules
    assert CONFIG_MAPPING["paired_llama"] is type(found)  # no stand-in any more
    assert type(stand_in(**SIZES)) is type(found)
    assert type(AutoModelForCausalLM.from_config(found)).__name__ == "PairedLlamaForCausalLM"


def test_classes_are_not_replaced_by_stand_ins() -> None:
    on_transformers.announce()

    assert CONFIG_MAPPING["paired_llama"] is PairedLlamaConfig
    assert not [finder for finder in sys.meta_path if isinstance(finder, on_transformers._Finder)]


MakeAwaited = Callable[[str], str]


@pytest.fixture
def make_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeAwaited]:
    """A module in the place of transformers' list of configurations; the name is its."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(on_transformers, "WHERE", "no.such.module")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    names = []

    def make(body: str) -> str:
        name = f"awaited_{len(names)}_{tmp_path.name}"
        (tmp_path / f"{name}.py").write_text(body)
        importlib.invalidate_caches()
        monkeypatch.setattr(on_transformers, "AWAITED", name)
        names.append(name)
        return name

    yield make
    for name in names:
        sys.modules.pop(name, None)


def waiting() -> int:
    return sum(isinstance(finder, on_transformers._Finder) for finder in sys.meta_path)


AUTO = """
told = []
class AutoConfig:
    @staticmethod
    def register(kind, name, exist_ok):
        told.append(kind)
"""


def test_it_waits_for_one_module_and_goes(make_awaited: MakeAwaited, tmp_path: Path) -> None:
    name = make_awaited(AUTO)
    on_transformers.announce()
    on_transformers.announce()
    assert waiting() == 1
    importlib.import_module("colorsys")
    assert importlib.util.find_spec(name) is not None  # looked for, and not imported
    assert waiting() == 1

    module = importlib.import_module(name)

    assert waiting() == 0
    assert module.told == list(on_transformers.CONFIGURATIONS)
    assert module.__file__ == str(tmp_path / f"{name}.py")
    assert type(module.__loader__).__name__ == type(module.__spec__.loader).__name__ == "SourceFileLoader"
    importlib.reload(module)
    assert module.told == []  # a module of another's: told once
    on_transformers.announce()
    assert module.told == list(on_transformers.CONFIGURATIONS)


@pytest.mark.parametrize("body", ["AutoConfig = None", "", AUTO.replace("told.append(kind)", "raise ValueError(kind)")])
def test_what_cannot_be_told_breaks_nothing(make_awaited: MakeAwaited, body: str) -> None:
    name = make_awaited(body)
    on_transformers.announce()

    assert isinstance(importlib.import_module(name), ModuleType)
    assert waiting() == 0


def test_a_module_that_fails_is_waited_for_again(make_awaited: MakeAwaited, tmp_path: Path) -> None:
    name = make_awaited("raise OSError('broken')")
    on_transformers.announce()
    with pytest.raises(OSError, match="broken"):
        importlib.import_module(name)
    assert waiting() == 1
    (tmp_path / f"{name}.py").write_text(AUTO + "# mended\n")
    importlib.invalidate_caches()

    assert importlib.import_module(name).told == list(on_transformers.CONFIGURATIONS)
    assert waiting() == 0


def test_a_module_that_is_not_there_is_not_there(make_awaited: MakeAwaited, tmp_path: Path) -> None:
    name = make_awaited("")
    (tmp_path / f"{name}.py").unlink()
    on_transformers.announce()

    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)
