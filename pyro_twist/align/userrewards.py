# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""From what the user asked for to reward objects."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pyro_twist.align.domains import Domain
from pyro_twist.align.options import OptionError
from pyro_twist.rewards import Reward

__all__ = ["code_of", "load_function", "make_rewards"]


def make_rewards(domain: Domain, given: Sequence[str | Callable[..., Any]]) -> dict[str, Reward]:
    """
    Makes the rewards of a job, by name.

    :param Domain domain: Knows its own rewards.
    :param given: What the user asked for.
    :raises OptionError: If one does not exist, cannot be imported or is given twice.
    """
    made: dict[str, Reward] = {}
    for one in given:
        reward = _make(domain, one)
        if reward.name in made:
            raise OptionError(f"--reward {reward.name} is given twice; use --scale to weigh it")
        made[reward.name] = reward
    return made


def _make(domain: Domain, given: str | Callable[..., Any]) -> Reward:
    if isinstance(given, Reward):
        return _for_prompt(given, domain)
    if not isinstance(given, str):
        return _wrapped(given, domain)
    name, colon, argument = given.strip().partition(":")
    if not colon or name in {known.partition(":")[0] for known in domain.rewards()}:
        return domain.reward(name.strip(), argument.strip())
    function = load_function(given)
    return _make(domain, function)


def _for_prompt(given: Reward, domain: Domain) -> Reward:
    """The reward for the prompt of the job; its name is the same for every prompt."""
    if not hasattr(domain, "for_prompt"):
        return given
    reward: Reward = domain.for_prompt(given)
    if reward is not given:
        reward.name = getattr(reward, "title", reward.name)
    return reward


def _wrapped(function: Callable[..., Any], domain: Domain) -> Reward:
    name = getattr(function, "__name__", type(function).__name__)

    prompt = _prompt_for(function, domain)

    @functools.wraps(function)
    def returning(samples: Any) -> Any:
        values = function(samples, **prompt)
        if values is None:
            raise TypeError(f"{name} returned None; it may lack a 'return'")
        return values

    return Reward(returning, name=name, input=domain.input)


def _prompt_for(function: Callable[..., Any], domain: Domain) -> dict[str, Any]:
    """The prompt of the job, for a function with an argument of that name."""
    if getattr(domain, "prompt", None) is None:
        return {}
    try:
        takes = "prompt" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # some callables have no signature
        takes = False
    return {"prompt": getattr(domain, "prompt", None)} if takes else {}


def code_of(given: Sequence[str | Callable[..., Any]]) -> list[str | None]:
    """
    Checksums of the code of functions of the user's own, which tell that one has changed.

    :param given: What the user asked for.
    :returns: For each reward; ``None`` for those that are named, and where no code is to be had.
    """
    return [_checksum(one) for one in given]


def _checksum(given: str | Callable[..., Any]) -> str | None:
    try:
        code = _code(given)
    except (ImportError, OSError, TypeError, ValueError):
        return None
    return None if code is None else f"{zlib.crc32(code):08x}"


def _code(given: str | Callable[..., Any]) -> bytes | None:
    if isinstance(given, Reward):
        return None
    if not isinstance(given, str):
        return inspect.getsource(given).encode()
    place = given.strip().rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place).read_bytes()
    _look_here()
    found = importlib.util.find_spec(place) if place else None
    return Path(found.origin).read_bytes() if found and found.origin else None


def load_function(path: str) -> Any:
    """
    Imports a function of the user's own.

    :param str path: ``"package.module:function"``, found as Python would from the current folder,
        or ``"path/to/file.py:function"``.
    :returns: The function, or whatever callable has that name.
    :raises OptionError: If the module or the function cannot be had.
    """
    place, _, name = path.strip().rpartition(":")
    if not place or not name:
        raise OptionError(
            f"--reward {path}: name a file or module and a function in it, as in r.py:score"
        )
    module = _load_module(path, place)
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part, None)
    if value is None:
        raise OptionError(f"--reward {path}: {place!r} was imported but has no {name!r}")
    if not callable(value):
        raise OptionError(
            f"--reward {path}: {name!r} is no function but {type(value).__name__}; a reward takes "
            "a batch of samples and returns one number for each"
        )
    return value


def _load_module(path: str, place: str) -> Any:
    try:
        if place.endswith(".py"):
            return _from_file(Path(place))
        return _from_name(place)
    except Exception as error:  # whatever the user's module raises while it is imported
        told = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise OptionError(
            f"--reward {path}: no reward is called {path.partition(':')[0]!r}, and "
            f"importing {place!r} failed with {told}"
        ) from error


def _from_name(place: str) -> Any:
    _look_here()
    return importlib.import_module(place)


def _look_here() -> None:
    """An installed command, unlike ``python -m``, does not look in the current folder."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)


def _from_file(file: Path) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {str(file)!r}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{str(file)!r} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
