# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
The main job: align a model to rewards with several methods at equal budget, and report.

This is what the command ``pyro-twist align`` runs, without the command line::

    from pyro_twist import align

    outcome = align.run(align.AlignOptions(model="digits", rewards=("bright",), classes=("3",)))
    print(outcome.arm("fk").scores[0].log_normalizer)
    align.write_report(outcome)
"""

from pyro_twist.align.domains import Domain, Judgement, ShippedDomain, domains, find_domain
from pyro_twist.align.images import ZooImages
from pyro_twist.align.job import AlignmentFailed, Progress, run, tilted_model
from pyro_twist.align.methods import Method, Setting, default_methods, methods, register_method
from pyro_twist.align.options import AlignOptions, OptionError
from pyro_twist.align.outcome import Arm, Outcome, Score, Strength
from pyro_twist.align.pictures import Pictures
from pyro_twist.align.pipelines import PipelineImages
from pyro_twist.align.prompts import PromptResult, run_prompts
from pyro_twist.align.report import write_report
from pyro_twist.align.sequences import ZooSequences
from pyro_twist.align.shown import Shown, ShownRow, ShownSection

__all__ = [
    "AlignOptions",
    "AlignmentFailed",
    "Arm",
    "Domain",
    "Judgement",
    "Method",
    "OptionError",
    "Outcome",
    "Pictures",
    "PipelineImages",
    "Progress",
    "PromptResult",
    "Score",
    "Setting",
    "ShippedDomain",
    "Shown",
    "ShownRow",
    "ShownSection",
    "Strength",
    "ZooImages",
    "ZooSequences",
    "default_methods",
    "domains",
    "find_domain",
    "methods",
    "register_method",
    "run",
    "run_prompts",
    "tilted_model",
    "write_report",
]
