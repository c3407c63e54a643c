"""The highest rank that a job may train: that of an adapter which the server serves."""

from __future__ import annotations

from onebase_adapters.training.recipe import Recipe, RecipeError

EVA_GROWTH = 2
"""EVA gives ranks from one layer to another, up to so many times `r`."""


def check_rank(recipe: Recipe, max_rank: int) -> None:
    """Refuse an adapter that would not be served, before it is trained. Raises RecipeError."""
    eva = recipe.init == "eva"
    growth = EVA_GROWTH if eva else 1
    why = f", and init eva gives some layers up to {EVA_GROWTH} times that" if eva else ""
    layers = [("rank_pattern", f" of {layer[:80]}", rank) for layer, rank in recipe.rank_pattern.items()]
    for field, of, rank in [("r", "", recipe.r), *layers]:
        if rank * growth > max_rank:
            raise RecipeError(
                field,
                f"{field}{of} is {rank}{why}: this server serves adapters up to rank {max_rank}. Write "
                f"{max_rank // growth} or less, or raise its --max-rank",
            )
