# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Small pretrained models that ship with the package, with a classifier and a judge for each::

    from pyro_twist import zoo

    model = zoo.load("emoji", label="Food & Drink")
    judge = zoo.judge("emoji")

and a text-to-image model with a reward for how well a picture fits its prompt::

    model = zoo.load("emoji-text", prompt="red apple")
    reward = zoo.scorer("emoji-text", prompt="red apple")

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
    pipeline,
    scorer,
)
from pyro_twist.zoo.classifiers import Classifier
from pyro_twist.zoo.data import Images
from pyro_twist.zoo.judges import PromptJudge
from pyro_twist.zoo.scorers import Fidelity

__all__ = [
    "Classifier",
    "Entry",
    "Fidelity",
    "Images",
    "PromptJudge",
    "classifier",
    "entry",
    "images",
    "judge",
    "load",
    "load_folder",
    "models",
    "pipeline",
    "scorer",
]
