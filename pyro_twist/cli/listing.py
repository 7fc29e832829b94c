# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The commands that list what there is."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pyro_twist.align import OptionError, domains, find_domain
from pyro_twist.align import methods as all_methods
from pyro_twist.cli.app import WRONG_OPTION, complain

__all__ = ["print_methods", "print_models", "print_rewards"]


def print_models() -> None:
    """Prints the models and their classes."""
    rows = []
    for name, description in domains().items():
        classes = ", ".join(find_domain(name).classes)
        listed = f"\n[dim]classes: {classes}[/dim]" if classes else ""
        rows.append((name, f"{description}{listed}"))
    _print(rows)


def print_rewards(model: str) -> int:
    """
    Prints the rewards of a model.

    :param str model: Its name.
    :returns: The exit code.
    """
    try:
        rewards = find_domain(model).rewards()
    except OptionError as error:
        complain(str(error))
        return WRONG_OPTION
    own = {
        "package.module:function": "your own, importable from the current folder",
        "file.py:function": "your own, in a file",
    }
    _print([*rewards.items(), *own.items()])
    return 0


def print_methods() -> None:
    """Prints the methods, those that run by default marked."""
    rows = []
    for name, method in all_methods().items():
        mark = " [dim](by default)[/dim]" if method.default else ""
        rows.append((name, f"{method.description}{mark}\n[dim]returns {method.returns}[/dim]"))
    _print(rows)


def _print(rows: list[tuple[str, str]]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)
