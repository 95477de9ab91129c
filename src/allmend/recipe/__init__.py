"""The recipe: a TOML file that says everything about a run, typed and checked as a whole before anything starts.

This package knows the shape of a recipe and what can be checked from it alone. What needs the model or the data
(a rank larger than a layer, a missing file) is checked by `allmend.check`; both report all problems at once.
"""

from allmend.recipe.problems import Key, Problem, RecipeError
from allmend.recipe.reading import AT_MEMBER, key_lines, load_recipe, locate, located, make_recipe, parse_recipe
from allmend.recipe.schema import Arm, Recipe
from allmend.recipe.sections import (
    HELD_OUT,
    Adapter,
    Audit,
    Canaries,
    Change,
    ClientSource,
    Data,
    Deduplicate,
    Engine,
    Evaluation,
    Fields,
    Goldfish,
    Icd10cm,
    Influence,
    MemberPrivacy,
    Model,
    Name,
    Noise,
    Privacy,
    RecordPrivacy,
    Section,
    SecureAggregation,
    StrategyChoice,
    Train,
)

__all__ = [
    "AT_MEMBER",
    "HELD_OUT",
    "Adapter",
    "Arm",
    "Audit",
    "Canaries",
    "Change",
    "ClientSource",
    "Data",
    "Deduplicate",
    "Engine",
    "Evaluation",
    "Fields",
    "Goldfish",
    "Icd10cm",
    "Influence",
    "Key",
    "MemberPrivacy",
    "Model",
    "Name",
    "Noise",
    "Privacy",
    "Problem",
    "Recipe",
    "RecipeError",
    "RecordPrivacy",
    "Section",
    "SecureAggregation",
    "StrategyChoice",
    "Train",
    "key_lines",
    "load_recipe",
    "locate",
    "located",
    "make_recipe",
    "parse_recipe",
]
