"""What a goal is, and the table of those that a run met and missed."""

from __future__ import annotations

from dataclasses import dataclass

from harness.report import text_table

# What the process's resident memory may grow by where only [N]-sized tensors are made, as a share of the logits.
SMALL_SHARE = 0.02


@dataclass(frozen=True)
class Verdict:
    """A goal in one setting, and what was measured."""

    goal: str
    setting: str
    measured: float
    bound: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the goal is reached."""
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound


def verdicts_text(found: list[Verdict]) -> str:
    """Verdicts as a table, and how many goals are met; empty where there are none."""
    if not found:
        return ""
    body: list[tuple[str, ...]] = [("goal", "setting", "measured", "bound", "")]
    for one in found:
        bound = f"{'>=' if one.at_least else '<='} {one.bound:g}"
        body.append((one.goal, one.setting, f"{one.measured:.3g}", bound, "met" if one.met else "MISSED"))
    missed = sum(not one.met for one in found)
    return f"{text_table(body)}\n{len(found) - missed} of {len(found)} goals met"
