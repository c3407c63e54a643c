"""The day that a chat template prints: one for a whole run, so that a row has the same tokens on every day.

Llama 3.2's template and others ask for today's date. A run that goes on after midnight would read other rows
than it began with.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

from onebase_adapters.store.atomic_files import write_atomically
from onebase_adapters.training.base_tokens import template_of
from onebase_adapters.training.checkpoint import CheckpointError
from onebase_adapters.training.recipe import Recipe

_FILE = "template_date"
_ASKS_FOR_IT = "strftime_now"
_FORMATS = [f"%{letter}" for letter in (*"aAbBcdDeFgGHIjmMnpPrRsSTuUVwWxXyYzZ", "-d", "-m", "-H", "-I", "-M")]


def pin_template_date(recipe: Recipe, tokenizer: Any, folder: Path) -> Recipe:
    """The recipe with the day on which the run in `folder` began; as it is, if the template prints none.

    That day is today, until `keep_template_date`. Raises CheckpointError, OSError.
    """
    if recipe.template_date != "auto" or _ASKS_FOR_IT not in template_of(tokenizer):
        return recipe
    path = folder / _FILE
    try:
        day = date.fromisoformat(path.read_text()).isoformat()
    except FileNotFoundError:
        day = date.today().isoformat()
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read ({error}): remove {folder} to begin anew") from error
    return replace(recipe, template_date=day)


def keep_template_date(recipe: Recipe, folder: Path) -> None:
    """The run in `folder` begins: on another day it goes on with the recipe's one. Raises OSError."""
    path = folder / _FILE
    if recipe.template_date != "auto" and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, recipe.template_date)


def dated_tokenizer(tokenizer: Any, recipe: Recipe) -> Any:
    """The tokenizer with a chat template that prints the recipe's day; itself, if the recipe has none."""
    if recipe.template_date == "auto" or _ASKS_FOR_IT not in template_of(tokenizer):
        return tokenizer
    # transformers hands a template nothing that can be called but its own clock: a macro takes its place.
    macro = _clock(date.fromisoformat(recipe.template_date))
    template = tokenizer.chat_template
    dated = copy.copy(tokenizer)
    if isinstance(template, str):
        dated.chat_template = macro + template
    else:
        dated.chat_template = {name: macro + text for name, text in template.items()}
    return dated


def _clock(day: date) -> str:
    """A macro `strftime_now` for Jinja, at midnight. The newline after it is trimmed, as after any tag."""
    midnight = datetime.combine(day, time())
    filters = "".join(
        f" | replace({json.dumps(form)}, {json.dumps(midnight.strftime(form))})" for form in _FORMATS
    )
    filters += ' | replace("%%", "%")'
    return f"{{% macro {_ASKS_FOR_IT}(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n"
