# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Small pretrained models that ship with the package, with a classifier and a judge for each::

    from pyro_twist import zoo

    model = zoo.load("emoji", label="Food & Drink")
    judge = zoo.judge("emoji")

Every model is a folder in diffusers' format with its model card; the scripts that made them are in
:mod:`pyro_twist.zoo.recipes`.
"""

from pyro_twist.zoo.catalogue import (
    Entry,
    classifier,
    entry,
    images,
    judge,
    load,
    load_folder,
    models,
)
from pyro_twist.zoo.classifiers import Classifier
from pyro_twist.zoo.data import Images

__all__ = [
    "Classifier",
    "Entry",
    "Images",
    "classifier",
    "entry",
    "images",
    "judge",
    "load",
    "load_folder",
    "models",
]
