# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Rewards from classifiers: the log-probability of a class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn

from pyro_twist.rewards.reward import Reward

__all__ = ["classifier_log_prob"]


def classifier_log_prob(
    classifier: Any,
    label: Any,
    *,
    preprocess: Callable[[Tensor], Any] | None = None,
    chunk_size: int | None = None,
) -> Reward:
    """
    The log-probability of a class under a classifier, in nats; at most 0.

    With ``scale=1`` it is a likelihood: the tilted law is that of the samples given the class, by
    Bayes' rule. Differentiable for torch classifiers.

    :param classifier: A scikit-learn classifier with ``predict_log_proba`` or ``predict_proba``,
        given the flattened samples as an array of shape ``(B, features)``; or a torch module or
        function that maps ``(B,) + event_shape`` to logits of shape ``(B, num_classes)``, or to
        an object with such ``logits``. A module must be in evaluation mode.
    :param label: The class: one of ``classifier.classes_``, or a column of the logits.
    :param callable preprocess: Applied to the samples first, for example ``lambda images: 16 *
        images`` for a classifier of pixels from 0 to 16; by default samples are passed as they
        are.
    :param int chunk_size: The most samples per call; by default all.
    :returns: The reward. Classifiers that count votes, such as random forests, give minus
        infinity to classes without a vote.
    :raises ValueError: If ``classifier`` is none of these, does not know ``label`` or is a module
        in training mode.

    Example::

        >>> import torch
        >>> classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2)).eval()
        >>> log_prob = classifier_log_prob(classifier, 1)
        >>> log_prob(torch.zeros(5, 3, 2, 2)).shape
        torch.Size([5])
    """
    prepare = preprocess or _identity
    if hasattr(classifier, "predict_proba") or hasattr(classifier, "predict_log_proba"):
        fn, differentiable = _scikit_learn(classifier, label, prepare), False
    elif callable(classifier):
        fn, differentiable = _torch(classifier, label, prepare), True
    else:
        raise ValueError(
            f"{type(classifier).__name__} is no classifier: give one with predict_proba, or a "
            "torch module or function that returns logits"
        )
    name = f"log-probability of {label!r}"
    return Reward(fn, name=name, chunk_size=chunk_size, differentiable=differentiable)


def _scikit_learn(
    classifier: Any, label: Any, prepare: Callable[[Tensor], Any]
) -> Callable[[Tensor], Any]:
    classes = list(classifier.classes_)
    if label not in classes:
        raise ValueError(f"label={label!r}; the classifier's classes are {_listed(classes)}")
    column = classes.index(label)

    def log_prob(samples: Tensor) -> Any:
        features = np.asarray(prepare(samples.detach().cpu()), dtype=np.float64)
        return _log_probabilities(classifier, features.reshape(len(features), -1))[:, column]

    return log_prob


def _log_probabilities(classifier: Any, features: Any) -> Any:
    with np.errstate(divide="ignore"):
        if hasattr(classifier, "predict_log_proba"):
            return np.asarray(classifier.predict_log_proba(features))
        return np.log(classifier.predict_proba(features))


def _torch(
    classifier: Any, label: Any, prepare: Callable[[Tensor], Any]
) -> Callable[[Tensor], Any]:
    if not isinstance(label, int) or label < 0:
        raise ValueError(f"label={label!r}; give a column of the logits, 0 or more")
    if isinstance(classifier, nn.Module) and classifier.training:
        raise ValueError("the classifier is in training mode; call classifier.eval() first")

    def log_prob(samples: Tensor) -> Tensor:
        logits = classifier(_like_parameters(prepare(samples), classifier))
        logits = getattr(logits, "logits", logits)
        _check_logits(logits, len(samples), label)
        return logits.double().log_softmax(-1)[:, label]

    return log_prob


def _like_parameters(samples: Any, classifier: Any) -> Any:
    if not isinstance(classifier, nn.Module) or not isinstance(samples, Tensor):
        return samples
    parameter = next(classifier.parameters(), None)
    return samples if parameter is None else samples.to(parameter.device, parameter.dtype)


def _check_logits(logits: Tensor, size: int, label: int) -> None:
    if logits.dim() != 2 or logits.shape[0] != size or logits.shape[1] <= label:
        raise ValueError(
            f"the classifier returned shape {tuple(logits.shape)} for {size} samples; logits of "
            f"shape ({size}, num_classes) with num_classes > {label} are needed"
        )


def _identity(samples: Tensor) -> Tensor:
    return samples


def _listed(classes: list[Any]) -> str:
    shown = ", ".join(str(label) for label in classes[:20])
    return f"{shown}, ..." if len(classes) > 20 else shown
