"""What one server takes of a recipe, beyond the recipe's own limits."""

from __future__ import annotations

from collections.abc import Sequence

from onebase_adapters.training.recipe import Recipe, RecipeError

MAX_TEXTS = 32
MAX_PROMPT = 8_000
"""Characters of one of `sample_prompts`."""
MAX_METRIC = 500
"""Characters of one of `metrics`."""
EVA_GROWTH = 2
"""EVA gives ranks from one layer to another, up to so many times `r`."""


def check_limits(recipe: Recipe, max_rank: int) -> None:
    """Refuse what this server could not serve, or not keep in its registry. Raises RecipeError.

    Args:
        max_rank: the highest rank of an adapter that is served.
    """
    _check_texts("sample_prompts", recipe.sample_prompts, MAX_PROMPT)
    _check_texts("metrics", recipe.metrics, MAX_METRIC)
    _check_rank("r", recipe.r, recipe.init, max_rank)
    for layer, rank in recipe.rank_pattern.items():
        _check_rank("rank_pattern", rank, recipe.init, max_rank, of=f" of {layer[:80]}")


def _check_texts(field: str, texts: Sequence[str], longest: int) -> None:
    if len(texts) > MAX_TEXTS:
        raise RecipeError(field, f"{field} has {len(texts)} texts: a job takes {MAX_TEXTS} at most")
    for number, text in enumerate(texts):
        if len(text) > longest:
            raise RecipeError(
                field, f"{field}[{number}] has {len(text)} characters: a job takes {longest} at most"
            )


def _check_rank(field: str, rank: int, init: str, max_rank: int, of: str = "") -> None:
    eva = init == "eva"
    if rank * (EVA_GROWTH if eva else 1) <= max_rank:
        return
    why = f", and init eva gives some layers up to {EVA_GROWTH} times that" if eva else ""
    most = max_rank // EVA_GROWTH if eva else max_rank
    raise RecipeError(
        field,
        f"{field}{of} is {rank}{why}: this server serves adapters up to rank {max_rank}. Write {most} or "
        "less, or raise its --max-rank",
    )
