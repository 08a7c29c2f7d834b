"""The rules that the library has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tilewright.fusion.rules import mhc, quantised, rope

if TYPE_CHECKING:
    from tilewright.fusion.rule import Rule

RULES: tuple[Rule, ...] = (*quantised.RULES, *mhc.RULES, *rope.RULES)
