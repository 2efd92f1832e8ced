"""The variants of the quality study: a default, and others that change one thing of it each.

Owns the names, what each changes and the settings that follow from the data. The default is HBP with its levels in
random alternation from the first step on, without curriculum, so that the methods of one length, which can have none,
differ from it in packing alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from hbp_titan.config import JobConfig

CURRICULUM = 0.15
"""Share of all steps that train the lowest level alone."""


@dataclass(frozen=True)
class Variant:
    """changes(config, step_tokens) changes the default's settings; step_tokens: trained tokens of a mean step."""

    name: str
    says: str
    changes: Callable[[JobConfig, float], None] = lambda config, step_tokens: None


def _method(name: str) -> Callable[[JobConfig, float], None]:
    def change(config: JobConfig, step_tokens: float) -> None:
        config.packing.method = name

    return change


def _normalizer(name: str) -> Callable[[JobConfig, float], None]:
    def change(config: JobConfig, step_tokens: float) -> None:
        config.training.normalizer = name

    return change


def _sum(config: JobConfig, step_tokens: float) -> None:
    # AdamW's update is the same for gradients of another scale if the clipping norm and epsilon have that scale too. So
    # the learning rate stays, and what is left is what `sum` is about: steps with more trained tokens weigh more.
    config.training.normalizer = "sum"
    config.training.max_norm *= step_tokens
    config.optimizer.eps *= step_tokens


def _curriculum(config: JobConfig, step_tokens: float) -> None:
    config.packing.curriculum_steps = CURRICULUM


def _interleave(config: JobConfig, step_tokens: float) -> None:
    config.packing.mix = "interleave"


def _half_rate(config: JobConfig, step_tokens: float) -> None:
    config.optimizer.lr /= 2


DEFAULT = "hbp"
VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant(DEFAULT, "the default: levels, alternate, no curriculum, ave_token"),
        Variant("hbp_paper", "packing as the paper prints it", _method("hbp_paper")),
        Variant("flat_sorted", "one length, packs sorted by cost", _method("flat_sorted")),
        Variant("isf", "one length, packs in random order", _method("isf")),
        Variant("curriculum", f"the first {CURRICULUM:.0%} of the steps train the lowest level", _curriculum),
        Variant("interleave", "every step has its share of every level", _interleave),
        Variant("token_mean", "normalizer", _normalizer("token_mean")),
        Variant("sample_mean", "normalizer", _normalizer("sample_mean")),
        Variant("sum", "normalizer; clipping norm and epsilon times the mean step's trained tokens", _sum),
        Variant("half_rate", "yardstick: half the learning rate", _half_rate),
    )
}


def parse_variants(text: str) -> list[Variant]:
    """From "isf,sum": those of VARIANTS in their order, the default always among them; "" is all."""
    names = [word.strip() for word in text.split(",")] if text else list(VARIANTS)
    for name in names:
        if name not in VARIANTS:
            close = "".join(f"; did you mean {near}?" for near in difflib.get_close_matches(name, VARIANTS, n=1))
            raise ValueError(f"--variants {text}: {name!r} is none of {', '.join(VARIANTS)}{close}")
    return [variant for name, variant in VARIANTS.items() if name in (*names, DEFAULT)]
