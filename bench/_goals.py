"""Goals of a benchmark: ratios that we set out to reach, and the lines that tell whether a run did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench._common import Row


@dataclass(frozen=True)
class Goal:
    """A ratio of process CPU times (of wall clocks on a GPU): the least asked for, and the one hoped for."""

    case: str
    direction: str
    rival: str
    must: float
    want: float


def goals(case: str, direction: str, ratios: dict[str, tuple[float, float]]) -> list[Goal]:
    """One goal per rival: name -> (must, want)."""
    return [Goal(case, direction, name, *ratio) for name, ratio in ratios.items()]


def report(rows: Sequence[Row], wanted: Sequence[Goal]) -> str:
    """One line per goal that the rows can judge. A rival's name may go on (", 8 of 128")."""
    lines = []
    for goal in wanted:
        for row in rows:
            if (row.case, row.direction) != (goal.case, goal.direction):
                continue
            if row.rival != goal.rival and not row.rival.startswith(goal.rival + ","):
                continue
            got = row.ratio if row.device == "cuda" else row.cpu_ratio
            verdict = "not met" if got < goal.must else "met" if got < goal.want else "met, and what was hoped for"
            less = ", OURS LESS EXACT" if row.ours_error > row.rival_error else ""
            lines.append(
                f"{goal.case}, {goal.direction}, {row.rival}: {got:.1f}x, goal {goal.must:g}x, hoped {goal.want:g}x: "
                f"{verdict}; errors {row.ours_error:.1e} and {row.rival_error:.1e}{less}"
            )
    met = sum(": met" in line for line in lines)
    return "\n".join(["", *lines, f"{met} of {len(lines)} goals met"]) if lines else ""
