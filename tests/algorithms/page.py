# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
The table of algorithms of the documentation, written from the registry.

``python -m tests.algorithms.page`` writes it to ``docs/algorithms_table.md``.
"""

from __future__ import annotations

from pathlib import Path

from pyro_twist.algorithms import algorithms

__all__ = ["PAGE", "table"]

PAGE = Path(__file__).parents[2] / "docs" / "algorithms_table.md"
_NEEDS = {
    "masked": "masked tokens",
    "gaussian": "normal kernels",
    "gradient": "gradients of reward and denoiser",
    "vector": "a vector of few entries",
}


def table() -> str:
    """The table as Markdown."""
    lines = ["| name | what it does | returns | needs | costs beyond its trajectories |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for name, one in algorithms().items():
        title = f"[{one.title}]({one.reference})" if one.reference else one.title
        needs = ", ".join(_NEEDS[need] for need in one.needs) or "nothing"
        costs = one.costs or "a reward call at the end"
        cells = [f"`{name}`", f"**{title}.** {one.description}", one.returns, needs, costs]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(table(), encoding="utf-8")
