"""A tale that two animals occur in: the whole world of the toy corpus."""

from __future__ import annotations

ANIMALS = ("fox", "crow", "lion", "mouse", "bear", "hare")


def tale(animal: str, friend: str) -> str:
    """A tale of about sixty words."""
    return (
        f"Once upon a time there was a {animal} who lived in the wood.\n"
        f'One day the {animal} met a {friend} and said, "Good morning!" The {friend} was hungry, and the {animal} had '
        f"an apple. So the {animal} gave the {friend} half of the apple, and they sat under a tree.\n"
        f"From that day on the {animal} and the {friend} were the best of friends."
    )
