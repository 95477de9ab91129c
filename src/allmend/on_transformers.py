"""Transformers' list of configurations learns of paired models, and nothing is imported for it.

`AutoConfig` is given stand-ins as soon as it is there; one that is asked for anything imports the true class. Its
module (`allmend.models.modeling_paired`) then registers itself, the models too.

What makes the stand-ins necessary: at the moment when `AutoConfig` is there, other modules of transformers may be half
imported, so that classes derived from theirs cannot be made.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# neither `logging` nor `importlib.abc` here: they take longer to import than all the rest

AWAITED = "transformers.models.auto.configuration_auto"
WHERE = "allmend.models.modeling_paired"

CONFIGURATIONS = {
    "paired_llama": "PairedLlamaConfig",
    "paired_mistral": "PairedMistralConfig",
    "paired_qwen2": "PairedQwen2Config",
    "paired_qwen3": "PairedQwen3Config",
    "paired_phi3": "PairedPhi3Config",
    "paired_phi": "PairedPhiConfig",
    "paired_starcoder2": "PairedStarcoder2Config",
}
"""Of each `model_type`, the name of its configuration."""


class _StandIn(type):
    """The class of a configuration that is not imported yet; what it is asked for, the true one answers."""

    def _true(cls) -> Any:
        return getattr(import_module(WHERE), cls.__name__)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):  # somebody looks at the class, and does not use it
            raise AttributeError(name)
        return getattr(cls._true(), name)

    def __call__(cls, *args: Any, **named: Any) -> Any:
        return cls._true()(*args, **named)


def announce() -> None:
    """See that `AutoConfig` knows the configurations of paired models, now or once it is there."""
    if AWAITED in sys.modules:
        _tell()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _tell() -> None:
    if WHERE in sys.modules:  # it tells more
        return
    try:
        auto: Any = import_module(AWAITED)
        for kind, name in CONFIGURATIONS.items():
            auto.AutoConfig.register(kind, _StandIn(name, (), {"model_type": kind}), exist_ok=True)
    # whoever imports transformers has not asked for this
    except Exception:
        import logging

        logging.getLogger(__name__).debug("paired models are not announced to transformers", exc_info=True)


class _Finder:
    """Waits for one module to be imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AWAITED:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        found = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        if found is not None and found.loader is not None:
            loader: Any = _Loader(found.loader, self)
            found.loader = loader
        return found


class _Loader:
    """Loads a module as `own` does, and tells afterwards."""

    def __init__(self, own: Any, finder: _Finder) -> None:
        self.own, self.finder = own, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self.own.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.own
        if module.__spec__ is not None:
            module.__spec__.loader = self.own
        self.own.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self.finder]
        _tell()
