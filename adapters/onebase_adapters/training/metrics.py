"""What is measured on generated replies. No metric runs code or patterns from outside."""

from __future__ import annotations


def check_metric(name: str) -> None:
    """Raise RecipeError unless `name` is a metric."""
