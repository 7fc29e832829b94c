# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Runs the command line: ``python -m pyro_twist``."""

from pyro_twist.cli import main

if __name__ == "__main__":
    main()
