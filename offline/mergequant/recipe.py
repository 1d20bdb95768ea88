"""Recipes: sets of options as YAML, named ones and the user's own.

A recipe has a line for each option that is not at its default. The one that a checkpoint was made
by lies beside its weights, and makes it again.
"""

from pathlib import Path
from typing import Any

import yaml

from mergequant.errors import InputError
from mergequant.options import Options

FILE = "recipe.yaml"
FOLDER = Path(__file__).parent / "recipes"
# What says where a run is made, and not what is made.
_OF_THE_MACHINE = {"device"}


def recipe_names() -> list[str]:
    """Names of the recipes that come with mergequant."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def load_recipe(recipe: str) -> dict[str, Any]:
    """The options of a recipe, by name.

    Args:
        recipe: a name, or a YAML file.

    Raises:
        InputError: there is no such recipe, or it names no options.
    """
    named = FOLDER / f"{recipe}.yaml"
    file = named if recipe in recipe_names() else Path(recipe)
    if not file.is_file():
        known = ", ".join(recipe_names())
        raise InputError(f"--recipe {recipe!r} is neither a file nor one of {known}.")
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = str(error).splitlines()[0]
        raise InputError(f"{file} is not YAML ({line}): mend the file.") from error
    options = {} if found is None else found
    if not isinstance(options, dict):
        raise InputError(f"{file} is no recipe: it needs lines such as `weight_bits: 4`.")
    unknown = sorted(str(name) for name in options if name not in Options.model_fields)
    if unknown:
        raise InputError(
            f"{file} has {unknown[0]!r}, which is no option: see `mergequant quantize --help`, "
            "with _ for -."
        )
    overrides = options.get("overrides") or {}
    if not isinstance(overrides, dict) or not all(isinstance(x, dict) for x in overrides.values()):
        raise InputError(
            f"{file}: overrides are options by pattern, as in "
            '`overrides: {"re:.*down_proj": {weight_bits: 8}}`.'
        )
    return options


def dump_recipe(options: Options) -> str:
    """YAML of the options that are not at their defaults."""
    changed = options.model_dump(mode="json", exclude_defaults=True, exclude=_OF_THE_MACHINE)
    text: str = yaml.safe_dump(changed, sort_keys=False)
    return f"# mergequant quantize MODEL OUTPUT --calibration TEXT --recipe {FILE}\n{text}"
