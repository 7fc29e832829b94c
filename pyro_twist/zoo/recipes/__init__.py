# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The scripts that made the shipped models, each runnable again from the public data it names."""
