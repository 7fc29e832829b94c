# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The command line, ``pyro-twist``."""

from pyro_twist.cli.app import app, main

__all__ = ["app", "main"]
