# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Tastes that are learnt from choices: laws by enumeration, posteriors on a grid, coverage.

Z-tests fail by chance once in a million; tolerances of fits are said where they are.
"""

from __future__ import annotations

from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal
from torch import Tensor, tensor

from pyro_twist import handlers
from pyro_twist.hierarchies import mixture
from pyro_twist.infer import ImportanceSampling, TwistedSMC
from pyro_twist.latents import AutoLatents, JointTwist
from pyro_twist.preferences import Favourites, PlackettLuce, Preferences, SimulatedRater
from pyro_twist.rewards import RewardTilted
from pyro_twist.twists import LookaheadTwist
from tests.infer.composition import composes
from tests.oracles import LinearGaussianChain
from tests.statistics import (
    assert_frequencies,
    assert_mean,
    assert_tilted_mean,
    assert_unbiased,
)

TASTES = "Preferences"
UTILITIES = tensor([0.3, -1.0, 1.2, 0.0], dtype=torch.float64)
PLANE = tensor([[1.0, 1.0], [-1.0, -1.0]])


def identity(samples: Tensor) -> Tensor:
    return samples


def numbers(**options: Any) -> Preferences:
    """Two features, in units of one."""
    return Preferences(identity, names=["first", "second"], **options).standardise(PLANE)


# laws of choices


@pytest.mark.parametrize("places", [1, 2, 4])
def test_rankings_by_enumeration(places: int) -> None:
    law = PlackettLuce(UTILITIES, places)
    orders = torch.tensor(list(permutations(range(4), places)))
    probs = law.log_prob(orders).exp()
    expected = []
    for order in orders.tolist():
        p, left = 1.0, UTILITIES.exp().tolist()
        for i in order:
            p, left[i] = p * left[i] / sum(left), 0.0
        expected.append(p)
    assert torch.allclose(probs, tensor(expected, dtype=torch.float64))
    assert float(probs.sum()) == pytest.approx(1.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = law.expand([20_000]).sample()
    counts = tensor([int((drawn == order).all(-1).sum()) for order in orders])
    assert_frequencies(counts, probs)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_favourites_are_rankings_in_any_order(number: int) -> None:
    sets = torch.tensor(list(combinations(range(4), number)))
    found = Favourites(UTILITIES, number).log_prob(sets).exp()
    ranking = PlackettLuce(UTILITIES, number)
    for one, prob in zip(sets, found, strict=True):
        orders = torch.tensor(list(permutations(one.tolist())))
        assert float(ranking.log_prob(orders).exp().sum()) == pytest.approx(float(prob))
    assert float(found.sum()) == pytest.approx(1.0)


def test_two_are_chosen_between_by_bradley_and_terry() -> None:
    found = PlackettLuce(tensor([0.7, -0.4])).log_prob(tensor([0, 1]))
    assert float(found) == pytest.approx(float(tensor(1.1).sigmoid().log()))
    with pytest.raises(ValueError, match="num_ranked=3"):
        PlackettLuce(tensor([0.7, -0.4]), 3)


def test_a_simulated_rater_has_this_law() -> None:
    rater = SimulatedRater(lambda samples: samples, seed=3)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[rater.favourites(UTILITIES, 1)[0]] += 1
    assert_frequencies(counts, UTILITIES.softmax(0))
    first = [SimulatedRater(identity, seed=s).rank(UTILITIES) for s in (1, 1)]
    assert first[0] == first[1] and sorted(first[0]) == [0, 1, 2, 3]


# posteriors


def panels(true: Tensor, number: int, seed: int = 0) -> Preferences:
    """Choices of all three kinds, of a taste that is known."""
    taste, rater = numbers(), SimulatedRater(lambda samples: samples @ true, seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        shown = torch.randn(5, 2, generator=generator)
        taste.favourites(shown, rater.favourites(shown, 2))
        taste.rank(shown[:3], rater.rank(shown[:3]))
        better, worse = rater.rank(shown[3:])
        taste.prefer(shown[3 + better], shown[3 + worse])
    return taste


def test_the_posterior_on_a_grid() -> None:
    """Means and standard deviations; the fit is within 0.06 of both, a quarter of the latter."""
    taste = panels(tensor([1.0, -0.5]), 8).fit(seed=0)
    axis = torch.linspace(-4, 4, 121)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 1, 2)
    conditioned = pyro.poutine.condition(
        pyro.plate("grid", len(grid), dim=-2)(taste.model), data={"taste_weight": grid[:, None]}
    )
    trace = pyro.poutine.trace(conditioned).get_trace()
    trace.compute_log_prob()
    log_p = sum(
        site["log_prob"].double().sum(-1)
        for name, site in trace.nodes.items()
        if name == "taste_weight" or name.startswith("chosen_")
    )
    weights, points = log_p.softmax(0), grid[:, 0].double()
    mean = weights @ points
    spread = (weights @ points.square() - mean.square()).sqrt()
    assert 0.2 < float(spread.min())
    # 200 draws: a standard error of 0.02
    assert torch.allclose(taste.weights.double().mean(0), mean, atol=0.08)
    assert torch.allclose(taste.weights.double().std(0), spread, atol=0.08)


def test_coverage_of_true_weights() -> None:
    """
    Twenty raters with tastes from the prior, side by side in one fit, three weights each.

    The number of 80 % intervals that hold the truth is binomial but for what little the weights of
    one rater depend on each other; the rate of a false alarm is below 1e-6.
    """
    from scipy.stats import binom

    raters, size, number = 20, 3, 60
    generator = torch.Generator().manual_seed(1)
    true = torch.randn(raters, size, generator=generator)
    taste = Preferences(identity, guide=AutoMultivariateNormal)
    taste.standardise(tensor([[1.0], [-1.0]]).expand(2, number))
    for one in range(raters):
        weights = torch.zeros(number)
        weights[size * one : size * (one + 1)] = true[one]
        rater = SimulatedRater(lambda samples, w=weights: samples @ w, seed=one)
        for _ in range(6):
            shown = torch.zeros(5, number)
            own = torch.randn(5, size, generator=generator)
            shown[:, size * one : size * (one + 1)] = own
            taste.favourites(shown, rater.favourites(shown, 2))
    taste.fit(250, num_particles=4, num_draws=300, seed=0)
    low, high = (taste.weights.quantile(q, 0) for q in (0.1, 0.9))
    covered = int(((low < true.flatten()) & (true.flatten() < high)).sum())
    assert binom.ppf(1e-6, number, 0.8) <= covered <= binom.ppf(1 - 1e-6, number, 0.8)
    # the choices have told something
    assert float((high - low).mean()) < 0.8 * 2 * 1.2816
    error = taste.weights.mean(0) - true.flatten()
    assert float(error.std()) < 0.8 * float(true.std())


def test_a_network_learns_what_no_weights_can() -> None:
    """Somebody who likes numbers that are near 1 or near -1."""
    generator = torch.Generator().manual_seed(0)
    rater = SimulatedRater(lambda x: 4 - 6 * (x[:, 0].abs() - 1).abs(), seed=0)
    network = torch.nn.Sequential(
        torch.nn.Linear(2, 12), torch.nn.Tanh(), torch.nn.Linear(12, 1, bias=False)
    )
    before = [value.clone() for value in network.parameters()]
    tastes = [numbers(network=network, prior_scale=4.0), numbers(prior_scale=4.0)]
    for _ in range(30):
        shown = torch.randn(6, 2, generator=generator)
        chosen = rater.rank(shown)
        for taste in tastes:
            taste.rank(shown, chosen)
    x = torch.randn(300, 2, generator=generator)
    truth, fits = rater.utility(x).double(), [taste.fit(250, seed=0) for taste in tastes]
    scores = [float(torch.corrcoef(torch.stack([fit.reward()(x), truth]))[0, 1]) for fit in fits]
    assert scores[0] > 0.8 > 0.4 > abs(scores[1])
    assert all(torch.equal(*both) for both in zip(before, network.parameters(), strict=True))
    with pytest.raises(ValueError, match="a network has no weights"):
        _ = tastes[0].weights
    assert "posterior draws" in str(tastes[0]) and "interval" in str(tastes[1])


@pytest.mark.parametrize("scale", [0.1, 3.0, 10.0])
def test_choices_that_say_nothing_leave_the_prior(scale: float) -> None:
    """Panels of the same sample: the posterior is the prior, however wide, within 15 %."""
    taste = numbers(prior_scale=scale).favourites(torch.ones(4, 2), [0]).fit(seed=0, num_draws=2000)
    assert torch.allclose(taste.weights.std(0) / scale, torch.ones(2), atol=0.15)
    assert torch.allclose(taste.weights.mean(0) / scale, torch.zeros(2), atol=0.2)


def test_one_favourite_over_and_over() -> None:
    """It has the largest utility, by what the prior allows."""
    shown = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    taste = numbers()
    for _ in range(20):
        taste.favourites(shown, [3])
    assert taste.fit(100, seed=0).utilities(shown).mean(0).argmax() == 3
    assert taste.weights.abs().max() < 8


def test_double_precision() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        taste = panels(tensor([1.0, -0.5]), 1).fit(10, seed=0)
        assert taste.weights.dtype == taste.reward()(torch.randn(3, 2)).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert taste.utilities(torch.randn(3, 2)).dtype == torch.float64
    assert panels(tensor([1.0, -0.5]), 1).fit(10, seed=0).weights.dtype == torch.float32


def test_fits_are_closed_to_handlers() -> None:
    taste = panels(tensor([1.0, 0.0]), 1)
    expected = taste.fit(20, seed=4).weights
    with pyro.poutine.trace() as tracer, pyro.condition(data={"taste_weight": torch.zeros(1, 2)}):
        assert torch.equal(taste.fit(20, seed=4).weights, expected)
    assert not tracer.trace.nodes


def test_networks_are_copied_and_evaluated() -> None:
    """Dropout is off, and what happens to the network later is no matter."""
    network = torch.nn.Sequential(
        torch.nn.Linear(2, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1)
    )
    taste, x = numbers(network=network).favourites(PLANE, [0]).fit(5, seed=0), torch.randn(5, 2)
    before = taste.reward()(x)
    network[1] = torch.nn.Linear(4, 4)
    assert network.training and torch.equal(taste.reward()(x.clone()), before)
    with pytest.raises(ValueError, match="has no parameters"):
        numbers(network=torch.nn.Tanh())
    with pytest.raises(ValueError, match=r"returned shape \(1, 2, 2\) .*; return \(1, 2, 1\)"):
        numbers(network=torch.nn.Linear(2, 2)).favourites(PLANE, [0]).fit(1)


def test_fits_leave_nothing_behind() -> None:
    pyro.clear_param_store()
    pyro.param("own", torch.ones(1))
    state = torch.get_rng_state()
    taste = panels(tensor([1.0, 0.0]), 1)
    first = taste.fit(20, seed=4).weights
    assert list(pyro.get_param_store().keys()) == ["own"]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(taste.fit(20, seed=4).weights, first)
    assert len(taste.losses) == 20
    pyro.clear_param_store()


def test_other_inference_of_the_same_model() -> None:
    """Pyro's own tools take the model; another guide finds the same mode."""
    taste = panels(tensor([1.0, -0.5]), 8)
    mean = taste.fit(150, seed=0).weights.mean(0)
    point = Preferences(identity, names=["first", "second"], guide=AutoDelta).standardise(PLANE)
    point.choices = taste.choices
    assert torch.allclose(point.fit(150, seed=0).weights[0], mean, atol=0.25)
    drawn = Predictive(taste.model, {"taste_weight": taste.weights[:5, None]})()
    assert drawn["chosen_0"].shape[-1] == 2


# rewards and their laws


def fitted(scale: float = 0.3) -> Preferences:
    """A posterior with known draws: fifty, of some spread."""
    taste = panels(tensor([1.0, -0.5]), 1).fit(1, num_draws=50, seed=0)
    generator = torch.Generator().manual_seed(7)
    draws = scale * torch.randn(50, 1, 2, generator=generator) + tensor([0.5, -0.2])
    taste._draws = {"taste_weight": draws}
    return taste


def plane() -> LinearGaussianChain:
    return LinearGaussianChain(3, k=0.0, dim=2)


LAMBDA = 0.7


def log_z_of(weights: Tensor) -> Tensor:
    """The log-normalisers of tilts by weights, given the chain's variance."""
    return 0.5 * plane().variance * LAMBDA**2 * weights.double().square().sum(-1)


@composes(
    TASTES,
    "`taste.reward()` in a `RewardTilted`",
    "the utility by the posterior mean, with `caution` less its standard deviation; by one draw; "
    'or, for `"average"`, the tilt averaged over the posterior',
)
@pytest.mark.parametrize("posterior", ["mean", "cautious", "draw", "average"])
def test_laws_of_rewards(posterior: Any) -> None:
    taste = fitted()
    options = {"caution": 0.8} if posterior == "cautious" else {"scale": LAMBDA, "draw": 3}
    reward = taste.reward("mean" if posterior == "cautious" else posterior, **options)
    model = RewardTilted(plane(), reward, scale=LAMBDA)
    by_draw = log_z_of(taste.weights)
    exact = {
        "mean": log_z_of(taste.weights.mean(0)),
        "cautious": cautious_log_z(taste.weights, 0.8),
        "draw": by_draw[3],
        "average": by_draw.logsumexp(0) - torch.tensor(50.0).log(),
    }
    result = ImportanceSampling(model, 40_000, seed=0).run()
    assert_mean((result.log_weights - exact[posterior]).exp(), 1.0)
    assert abs(float(exact["average"] - exact["mean"])) > 0.04
    assert float(exact["mean"] - exact["cautious"]) > 0.04


def cautious_log_z(weights: Tensor, caution: float) -> Tensor:
    """On a grid of the plane: the mean utility less so many of its standard deviations."""
    axis = plane().variance ** 0.5 * torch.linspace(-7, 7, 281, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    utilities = points @ weights.double().T
    log_p = -0.5 * points.square().sum(-1) / plane().variance
    gain = LAMBDA * (utilities.mean(-1) - caution * utilities.std(-1))
    return (log_p + gain).logsumexp(0) - log_p.logsumexp(0)


@composes(
    TASTES,
    "`taste.latent(model, scale)`",
    "the whole posterior as a latent: its law becomes the posterior times the normaliser, that of "
    'the sample is the same as of `"average"`; guides of latents propose it',
)
@pytest.mark.parametrize("guided", [False, True])
def test_the_taste_as_a_latent(guided: bool) -> None:
    taste = fitted()
    model = taste.latent(plane(), LAMBDA)
    joint = log_z_of(taste.weights)
    log_z = float(joint.logsumexp(0)) - float(torch.tensor(50.0).log())
    mean = float(joint.softmax(0) @ taste.weights[:, 0].double())
    guide = JointTwist(LookaheadTwist(model), AutoLatents(model)) if guided else None
    plated = handlers.handle(model, pyro.plate("replicates", 400, dim=-1))
    smc = TwistedSMC(plated, guide, 64, 1, population_plate="replicates", seed=0)
    result = smc.run()
    assert_unbiased(result.log_normalizer, log_z)
    drawn = result.expectation(lambda state: taste.weights[:, 0][state["taste"]].double())
    assert_tilted_mean(result.log_normalizer, drawn, log_z, mean)
    assert abs(mean - float(taste.weights[:, 0].mean())) > 0.02


@composes(
    TASTES,
    "`taste.rewards(number)` as populations, joined by `mixture`",
    "the mixture of the tilted laws of several draws, all counting the same",
)
def test_a_mixture_over_tastes() -> None:
    """The mean, within five standard errors."""
    taste = fitted()
    chain = LinearGaussianChain(3, k=0.0, dim=2, replicates=5)
    model = RewardTilted(chain, taste.rewards(5), scale=LAMBDA)
    smc = ImportanceSampling(model, 20_000, 1, population_plate="replicates", seed=0)
    result = mixture(smc.run())
    expected = LAMBDA * chain.variance * taste.weights[[0, 10, 20, 30, 40]].double().mean(0)
    error = 5 * 1.3 / float(result.get_ESS()) ** 0.5
    assert error < 0.05
    assert torch.allclose(result.expectation("x"), expected, atol=error)


def test_caution_and_gradients() -> None:
    taste, x = fitted(), torch.randn(6, 2)
    utilities = taste.utilities(x)
    assert torch.allclose(utilities, (x @ taste.weights.T).T.double(), atol=1e-5)
    careful = taste.reward(caution=1.5)(x)
    assert torch.allclose(careful, utilities.mean(0) - 1.5 * utilities.std(0))
    leaf = x.clone().requires_grad_()
    taste.reward()(leaf).sum().backward()
    assert torch.allclose(leaf.grad, taste.weights.mean(0).expand(6, 2), atol=1e-5)


def test_a_reward_keeps_the_posterior_it_was_made_of() -> None:
    taste, x = panels(tensor([1.0, -0.5]), 2).fit(30, seed=0), torch.randn(4, 2)
    reward = taste.reward()
    before = reward(x)
    taste.prefer(x[0], x[1]).fit(30, seed=1)
    assert torch.equal(reward(x), before) and not torch.equal(taste.reward()(x), before)


def test_probabilities_and_suggestions() -> None:
    taste, x = fitted(), torch.randn(50, 2)
    first, second = taste.utilities(x[:4]), taste.utilities(x[4:8])
    expected = (first - second).sigmoid().mean(0)
    assert torch.allclose(taste.probability(x[:4], x[4:8]), expected)
    chosen = taste.suggest(x, 4)
    assert len(set(chosen)) == 4
    spread = taste.utilities(x) - taste.utilities(x).mean(1, keepdim=True)
    assert chosen[0] == int(spread.var(0, correction=0).argmax())
    # a copy of what was chosen tells less than another direction
    across, up = tensor([3.0, 0.0]), tensor([0.0, 2.0])
    shown = torch.stack([across, across, -across, -across, up, -up])
    assert fitted(1.0).suggest(shown, 2)[1] in (4, 5)
    with pytest.raises(ValueError, match="size=51"):
        taste.suggest(x, 51)


@composes(
    TASTES,
    "rounds of showing, choosing, fitting and aligning",
    "with a simulated rater, the mean true utility of the samples approaches that of the aligned "
    "law of the true taste",
)
def test_the_loop() -> None:
    """Three rounds of eight panels: three quarters of what knowing the taste would give."""
    true, chain = tensor([1.2, -0.8]), plane()
    rater = SimulatedRater(lambda samples: samples @ true, seed=0)
    taste, model, gained = numbers(), chain, []
    for number in range(4):
        result = TwistedSMC(model, None, 400, seed=number).run()
        gained.append(float(result.expectation(lambda state: (state["x"] @ true).double())))
        shown = result.resample(48, generator=torch.Generator().manual_seed(number)).state["x"]
        for panel in shown.split(6):
            taste.favourites(panel, rater.favourites(panel, 2))
        model = RewardTilted(chain, taste.fit(150, seed=number).reward(), scale=LAMBDA)
    best = LAMBDA * chain.variance * float(true.square().sum())
    assert abs(gained[0]) < 0.2 * best
    assert gained[-1] > 0.75 * best
    cosine = torch.cosine_similarity(taste.weights.mean(0), true, dim=0)
    assert float(cosine) > 0.95


# images, files, errors


def pictures(number: int = 6) -> Tensor:
    return torch.rand(number, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_image_features_by_name() -> None:
    taste = Preferences(["red", "bright"]).standardise(pictures(40))
    taste.favourites(pictures(), [1]).rank(pictures(), [2, 0, 1]).prefer(
        pictures()[0], pictures()[1]
    )
    assert taste.names == ("red", "bright") and len(taste.choices) == 3
    table = str(taste.fit(10, seed=0))
    assert "red " in table and "90 % interval" in table
    assert taste.reward()(pictures()).shape == (6,)
    by_dict = Preferences({"mean": lambda images: images.mean((1, 2, 3))}).standardise(pictures(40))
    assert by_dict.features(pictures()).shape == (6, 1)


def test_lists_of_strings() -> None:
    taste = Preferences(
        {"length": lambda texts: [float(len(text)) for text in texts]}, input="list"
    )
    taste.favourites(["a", "abc", "abcdef"], [2]).prefer("abcd", "a").fit(10, seed=0)
    assert taste.reward()(["abc", "a"]).shape == (2,)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "taste.safetensors"
    taste = panels(tensor([1.0, -0.5]), 2).fit(30, seed=0)
    taste.save(path)
    again = Preferences.load(path, identity)
    x = torch.randn(4, 2)
    assert torch.equal(again.reward()(x), taste.reward()(x))
    assert again.choices[0].chosen == taste.choices[0].chosen
    assert torch.equal(again.fit(30, seed=0).weights, taste.weights)
    with pytest.raises(ValueError, match=r"features are \['first', 'second'\], these are \['a'\]"):
        Preferences.load(path, {"a": identity})
    from safetensors.torch import save_file

    save_file({"x": x}, path)
    with pytest.raises(ValueError, match="was not written by Preferences.save"):
        Preferences.load(path, identity)


def test_errors() -> None:
    taste, x, both = numbers(), torch.randn(4, 2), {"a": identity, "b": identity}
    cases: list[tuple[str, Any]] = [
        ("no choices to learn from", lambda: taste.fit()),
        ("not fitted yet", lambda: taste.reward()),
        (r"chosen=\[4\]; give different indices from 0 to 3", lambda: taste.favourites(x, [4])),
        (r"chosen=\[1, 1\]", lambda: taste.favourites(x, [1, 1])),
        (r"order=\[\]", lambda: taste.rank(x, [])),
        (r"chosen=\[True, False\]", lambda: taste.favourites(x, [True, False])),
        (r"chosen=\[0.7\]", lambda: taste.favourites(x, [0.7])),  # type: ignore[list-item]
        ("chosen=2; give different", lambda: taste.favourites(x, 2)),  # type: ignore[arg-type]
        ("chosen=tensor.*True", lambda: taste.favourites(x, x[:, 0] > 0)),  # type: ignore[arg-type]
        ("prior_scale=inf", lambda: numbers(prior_scale=float("inf"))),
        ("num_steps=0", lambda: panels(x[0], 1).fit(0)),
        ("num_draws=0", lambda: panels(x[0], 1).fit(1, num_draws=0)),
        ("num_particles=0", lambda: panels(x[0], 1).fit(1, num_particles=0)),
        ("level=90", lambda: fitted().table(90)),
        ("first has 4 samples, second 1", lambda: fitted().probability(x, x[:1])),
        (
            "needs two or more draws",
            lambda: panels(x[0], 1).fit(1, num_draws=1).reward(caution=1.0),
        ),
        (r"returned \(4, 2\) numbers for 4", lambda: SimulatedRater(identity).rank(x)),
        ("4 of them NaN", lambda: SimulatedRater(lambda s: s[:, 0] * float("nan")).rank(x)),
        ("all 4 samples are chosen", lambda: taste.favourites(x, range(4))),
        ("mark at most 8", lambda: taste.favourites(torch.randn(20, 2), range(9))),
        ("better has 2 samples, worse 3", lambda: taste.prefer(x[:2], x[:3])),
        ("posterior='median'", lambda: taste.reward("median")),  # type: ignore[arg-type]
        ("caution=1.0 is for posterior='mean'", lambda: taste.reward("draw", caution=1.0)),
        ("scale=None: the average", lambda: taste.reward("average")),
        ("prior_scale=0", lambda: Preferences(identity, prior_scale=0)),
        ("give names of image rewards", lambda: Preferences("red")),
        ("whose keys are the names", lambda: Preferences({})),
        ("no image reward|image reward", lambda: Preferences(["rouge"])),
        ("the same for all of 3", lambda: Preferences(identity).standardise(torch.ones(3, 2))),
        ("not finite", lambda: taste.favourites(x / 0, [0])),
        ("have the names", lambda: taste.features(torch.randn(4, 3))),
        (
            r"feature 'a' has shape \(4, 2\)",
            lambda: Preferences(both).features(x),
        ),
        (r"returned shape \(4, 2, 2\)", lambda: taste.features(torch.randn(4, 2, 2))),
        ("no units yet", lambda: Preferences(identity)._standardised(x)),
        ("draw=50", lambda: fitted().reward("draw", draw=50)),
        ("number=51", lambda: fitted().rewards(51)),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
    assert not taste.choices
    assert repr(taste) == "Preferences(['first', 'second'], 0 choices, not fitted)" == str(taste)
