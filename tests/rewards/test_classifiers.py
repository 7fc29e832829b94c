# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pyro_twist.rewards import classifier_log_prob


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, np.ndarray]:
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    return torch.tensor(data.images[:, None] / 16, dtype=torch.float32), data.target


@pytest.mark.parametrize("kind", ["LogisticRegression", "RandomForestClassifier", "proba only"])
def test_scikit_learn_classifiers(kind: str, digits: Any) -> None:
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression

    images, labels = digits
    pixels = 16 * images.flatten(1).double().numpy()
    forest = kind == "RandomForestClassifier"
    model = (
        RandomForestClassifier(10, random_state=0) if forest else LogisticRegression(max_iter=50)
    )
    model = fit(model, pixels[:900], labels[:900])
    if kind == "proba only":
        model = SimpleNamespace(classes_=model.classes_, predict_proba=model.predict_proba)
    reward = classifier_log_prob(model, 3, preprocess=lambda x: 16 * x, chunk_size=64)
    values = reward(images[900:1100])
    with np.errstate(divide="ignore"):
        expected = np.log(model.predict_proba(pixels[900:1100])[:, 3])
    np.testing.assert_allclose(values, expected, atol=1e-5, rtol=1e-5)
    assert reward.differentiable is False
    of_threes = values[torch.tensor(labels[900:1100] == 3)]
    assert of_threes.exp().mean() > 3 * values.exp().mean()
    assert (values == -math.inf).any() == forest


def fit(model: Any, pixels: Any, labels: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(pixels, labels)


def test_classes_may_have_names(digits: Any) -> None:
    from sklearn.naive_bayes import GaussianNB

    images, labels = digits
    names = np.where(labels % 2 == 0, "even", "odd")
    model = GaussianNB().fit(images.flatten(1).numpy(), names)
    values = classifier_log_prob(model, "odd")(images[:100])
    assert values[torch.tensor(names[:100] == "odd")].mean() > values.mean()
    with pytest.raises(ValueError, match="label='prime'; the classifier's classes are even, odd"):
        classifier_log_prob(model, "prime")


def network(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4)).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_torch_modules_get_their_own_dtype(dtype: torch.dtype) -> None:
    module, images = network(dtype), torch.rand(5, 3, 2, 2)
    reward = classifier_log_prob(module, 2)
    expected = module(images.to(dtype)).double().softmax(-1)[:, 2].log()
    torch.testing.assert_close(reward(images), expected.detach())
    wrapped = classifier_log_prob(lambda x: SimpleNamespace(logits=module(x.to(dtype))), 2)
    torch.testing.assert_close(wrapped(images), expected.detach())


def test_probabilities_of_all_classes_sum_to_one() -> None:
    module, images = network(), torch.rand(5, 3, 2, 2)
    total = sum(classifier_log_prob(module, label)(images).exp() for label in range(4))
    torch.testing.assert_close(total, torch.ones(5).double())


def test_gradients_reach_the_pixels_but_no_graph_is_kept_without() -> None:
    reward, images = classifier_log_prob(network(), 1), torch.rand(2, 3, 2, 2)
    assert reward.differentiable is True
    assert not reward(images).requires_grad
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images).sum(), images)
    assert (gradient != 0).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: classifier_log_prob(3, 0), "int is no classifier"),
        (lambda: classifier_log_prob(network(), "cat"), "label='cat'; give a column"),
        (lambda: classifier_log_prob(network(), -1), "label=-1; give a column"),
        (lambda: classifier_log_prob(network().train(), 0), "training mode; call classifier.eval"),
        (lambda: classifier_log_prob(network(), 9)(torch.rand(2, 3, 2, 2)), "num_classes > 9"),
        (lambda: classifier_log_prob(lambda x: x, 0)(torch.rand(2, 3, 2, 2)), "logits of shape"),
    ],
)
def test_wrong_use_answers_in_a_sentence(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
