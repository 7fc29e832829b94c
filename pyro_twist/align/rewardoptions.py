# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""What is behind the colon of a named reward."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyro_twist.align.options import OptionError

if TYPE_CHECKING:
    from pyro_twist.rewards import Reward

__all__ = ["image_reward_of", "number_or_text", "parse_options", "parse_reward_options"]

# the only option of each reward that has one, which need not be named, and an example
_OPTIONS = {
    "colour": ("rgb", "orange"),
    "compressible": ("quality", "50"),
    "incompressible": ("quality", "50"),
    "symmetric": ("axis", "top-bottom"),
}


def parse_options(name: str, argument: str, make: Callable[..., Any]) -> dict[str, Any]:
    """
    Reads ``"option=value,option=value"``; the first may be the value of the first option alone.

    Values may hold commas and equals signs, as SMARTS do: only what is the name of an option
    begins one.

    :param str name: The reward.
    :param str argument: What is behind the colon, empty for nothing.
    :param callable make: The function that makes the reward, whose arguments are the options.
    :returns: The options by name: numbers, True, False, None, or text.
    :raises OptionError: If there is no such option, or one is missing.
    """
    parameters = inspect.signature(make).parameters
    known = ", ".join(parameters)
    if not parameters and argument:
        raise OptionError(f"--reward {name}: it has no options; leave out {argument!r}")
    options: dict[str, Any] = {}
    either = "|".join(map(re.escape, parameters))
    for part in re.split(rf",\s*(?=(?:{either})\s*=)", argument) if argument else ():
        key, equals, value = part.partition("=")
        if not equals or key.strip() not in parameters:
            meant = difflib.get_close_matches(key.strip(), parameters, 1) if equals else []
            if options or meant:
                raise OptionError(f"--reward {name}: no option in {part!r}; they are: {known}")
            key, value = next(iter(parameters)), part
        options[key.strip()] = _python_value(value.strip())
    for key, parameter in parameters.items():
        if key not in options and parameter.default is parameter.empty:
            raise OptionError(f"--reward {name}: say which {key}, as in {name}:{key}=...")
    return options


def _python_value(text: str) -> Any:
    named = {"true": True, "false": False, "none": None}
    return named.get(text.lower(), number_or_text(text))


def parse_reward_options(name: str, argument: str) -> dict[str, Any]:
    """
    Reads ``"option=value"``, or the value alone, for a reward on images.

    :param str name: The reward.
    :param str argument: What is behind the colon, empty for nothing.
    :returns: The options by name; values are not checked beyond their type.
    :raises OptionError: If there is no such option, or the value is of the wrong kind.
    """
    option, example = _OPTIONS.get(name, ("", ""))
    if not argument and option == "rgb":
        raise OptionError(f"--reward {name}: say which one, as in {name}:{example}")
    if not argument:
        return {}
    if not option:
        raise OptionError(f"--reward {name}: it has no options; leave out {argument!r}")
    key, equals, value = argument.partition("=")
    if equals and key.strip() != option:
        raise OptionError(f"--reward {name}: no option {key.strip()!r}; its options are: {option}")
    return {option: _value(name, option, (value if equals else argument).strip())}


def image_reward_of(name: str, argument: str) -> Reward:
    """
    Makes a reward of images.

    :param str name: One of :func:`~pyro_twist.rewards.image_rewards`.
    :param str argument: What is behind the colon, empty for nothing.
    :raises OptionError: If there is no such option.
    """
    from pyro_twist.rewards import image_reward

    options = parse_reward_options(name, argument)
    try:
        reward = image_reward(name, **options)
    except (TypeError, ValueError) as error:
        raise OptionError(f"--reward {name}: {error}") from None
    reward.name = f"{name}:{argument}" if argument else name
    return reward


def _value(name: str, option: str, text: str) -> Any:
    if option == "rgb":
        return _colour(text)
    value = number_or_text(text)
    if option == "quality" and not isinstance(value, int):
        raise OptionError(f"--reward {name}: quality is {text!r}; give a whole number, 1 to 95")
    return text if option == "axis" else value


def _colour(text: str) -> Any:
    numbers = [number_or_text(part) for part in text.split(",")]
    is_triple = len(numbers) > 1 and not any(isinstance(one, str) for one in numbers)
    return tuple(map(float, numbers)) if is_triple else text


def number_or_text(text: str) -> Any:
    """A whole number if it is one, otherwise any other number, otherwise the text."""
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text
