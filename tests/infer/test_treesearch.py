# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Tree search on sequences so short that everything can be enumerated."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_twist import MaskedDiffusion, RewardTilted, Tilted
from pyro_twist.infer import BestOfN, TreeSearch
from pyro_twist.infer.treesearch import Frontier, _highest

VOCABULARY, LENGTH = 4, 4  # tokens 0 to 2, and the mask
MASK = VOCABULARY - 1
POWERS = VOCABULARY ** torch.arange(LENGTH)


def table(seed: int = 0, sharpness: float = 1.0) -> Tensor:
    """Logits for each of the partly masked sequences, which factorise in no way."""
    generator = torch.Generator().manual_seed(seed)
    return sharpness * torch.randn(VOCABULARY**LENGTH, LENGTH, VOCABULARY, generator=generator)


def masked_model(logits: Tensor | None = None, **options: Any) -> MaskedDiffusion:
    logits = table() if logits is None else logits
    return MaskedDiffusion(
        lambda tokens: logits[(tokens * POWERS).sum(-1)], LENGTH, VOCABULARY, MASK, **options
    )


def values(x: Tensor) -> Tensor:
    """A reward that tells all sequences apart, in no order that the model knows of."""
    return torch.sin(1.0 + (x * POWERS.double()).sum(-1) * 0.37)


def tilted(scale: float = 1.0, **options: Any) -> RewardTilted:
    return RewardTilted(masked_model(**options), values, scale)


def everything(prompt: Tensor | None = None) -> Tensor:
    rows = torch.tensor(list(itertools.product(range(MASK), repeat=LENGTH)))
    if prompt is None:
        return rows
    known = prompt != MASK
    return rows[(rows[:, known] == prompt[known]).all(-1)]


def root(model: Any) -> Frontier:
    return TreeSearch(model)._root()


@pytest.mark.parametrize("group_size", [1, 2, 3])
@pytest.mark.parametrize("branching", [1, 2, 3])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_calls_are_exact(width: int, branching: int, group_size: int) -> None:
    """One call of the network for each parent; one of the reward for each different completion."""
    model = tilted()
    search = TreeSearch(model, width, branching, group_size=group_size, seed=1)
    result = search.run()
    parents = [step.num_parents for step in search.steps]
    children = [step.num_children for step in search.steps]
    assert len(parents) == math.ceil(LENGTH / group_size)
    assert parents == [1, *(min(width, number) for number in children[:-1])]
    assert result.counts["denoiser"] == sum(parents)
    assert children[0] == min(branching, 3 ** min(group_size, LENGTH))
    assert result.counts["reward"] <= sum(children) + result.num_particles
    assert result.num_particles == min(width, children[-1])
    if width == branching == 1:
        assert result.counts == {"denoiser": len(parents), "reward": len(parents) + 1}


def test_calls_of_the_reward_are_those_of_different_completions() -> None:
    scored: list[Tensor] = []

    def noted(x: Tensor) -> Tensor:
        scored.append(x)
        return values(x)

    model = RewardTilted(masked_model(), noted)
    search = TreeSearch(model, 3, 2, seed=2)
    result = search.run()
    assert result.counts["reward"] == sum(map(len, scored))
    # Every call of the function is a step, the last one the end.
    assert len(scored) == len(search.steps) + 1
    for batch in scored:
        assert len(batch.unique(dim=0)) == len(batch)
        assert (batch != MASK).all()


def test_wide_trees_find_the_best_of_all() -> None:
    model = tilted()
    result = TreeSearch(model, 81, 3, seed=0).run()
    best = values(everything()).max()
    assert result.state["reward"][0] == best
    assert result.state["log_potential"][0] == best
    assert result.num_particles == 81
    assert len(result.state["x"].unique(dim=0)) == 81


def test_results_are_maximisers() -> None:
    result = TreeSearch(tilted(3.0), 4, 2, seed=0).run()
    assert result.kind == "maximiser"
    assert result.log_normalizer.isnan() and result.log_normalizer.shape == ()
    assert result.log_weights.tolist() == [0.0] * 4
    assert result.diagnostics is None and result.seconds > 0
    rewards = result.state["reward"]
    assert torch.equal(rewards, values(result.state["x"]))
    assert torch.allclose(result.state["log_potential"], 3.0 * rewards)
    assert torch.equal(rewards, rewards.sort(descending=True).values)
    assert torch.equal(result.best().state["x"], result.state["x"][:1])
    assert "maximiser" in repr(result)


def test_a_seed_fixes_the_search_and_leaves_the_global_stream_alone() -> None:
    runs = []
    for _ in range(2):
        before = torch.get_rng_state()
        search = TreeSearch(tilted(), 2, 2, seed=7)
        runs += [search.run(), search.run()]
        assert torch.equal(torch.get_rng_state(), before)
    for run in runs[1:]:
        assert torch.equal(run.state["x"], runs[0].state["x"])
        assert run.counts == runs[0].counts
    found = {
        tuple(TreeSearch(tilted(), 1, 2, seed=s).run().state["x"][0].tolist()) for s in range(9)
    }
    assert len(found) > 1
    pyro.set_rng_seed(3)
    one = TreeSearch(tilted(), 1, 2).run().state["x"]
    pyro.set_rng_seed(3)
    assert torch.equal(TreeSearch(tilted(), 1, 2).run().state["x"], one)


@pytest.mark.parametrize("group_size", [1, 2])
def test_prompts_are_never_altered(group_size: int) -> None:
    prompt = torch.tensor([MASK, 1, MASK, 2])
    model = tilted(prompt=prompt)
    scored = TreeSearch(model, 9, 9, group_size=group_size, seed=0)
    result = scored.run()
    assert (result.state["x"][:, [1, 3]] == prompt[[1, 3]]).all()
    assert result.state["reward"][0] == values(everything(prompt)).max()
    assert len(scored.steps) == 2 // group_size


def test_branches_are_the_most_probable_tokens_of_one_position() -> None:
    """The children and their completions, from logits written down by hand."""
    logits = table(3)
    model = RewardTilted(masked_model(logits), values)
    search = TreeSearch(model, branching=2)
    x = torch.tensor([[MASK, 1, MASK, MASK], [0, MASK, MASK, 2]])
    nodes = torch.zeros(2).double()
    children = search.branch(Frontier(x, x, nodes, nodes + 1, torch.ones(2).bool()))
    assert children.x.shape == (4, LENGTH) and children.valid.all()
    for parent in range(2):
        log_probs = logits[(x[parent] * POWERS).sum()].clone()
        log_probs[:, MASK] = -torch.inf
        completion = torch.where(x[parent] == MASK, log_probs.argmax(-1), x[parent])
        for rank, child in enumerate((2 * parent, 2 * parent + 1)):
            [place] = (children.x[child] != x[parent]).nonzero()[:, 0].tolist()
            assert x[parent, place] == MASK
            token = int(log_probs[place].argsort(descending=True)[rank])
            assert children.x[child, place] == token
            expected = completion.clone()
            expected[place] = token
            assert torch.equal(children.proxy[child], expected)
            assert children.score[child] == values(expected)


def test_groups_are_the_most_probable_joint_assignments() -> None:
    logits = table(5)
    model = RewardTilted(masked_model(logits), values)
    search = TreeSearch(model, branching=7, group_size=3)
    children = search.branch(root(model))
    log_probs = logits[(torch.full((LENGTH,), MASK) * POWERS).sum()].clone()
    log_probs[:, MASK] = -torch.inf
    log_probs = log_probs.double().log_softmax(-1)
    places = (children.x[0] != MASK).nonzero()[:, 0]
    assert len(places) == 3
    joint = torch.tensor(
        [
            [*tokens, sum(log_probs[p, v] for p, v in zip(places, tokens, strict=True))]
            for tokens in itertools.product(range(MASK), repeat=3)
        ]
    )
    expected = joint[joint[:, -1].argsort(descending=True)][:7, :3]
    assert torch.equal(children.x[:, places].double(), expected.double())


def test_positions_are_uniform_and_times_are_those_of_first_hitting() -> None:
    """
    Of 4 masks the shares left at the reveals are the order statistics of 4 uniforms, whose mean is
    k / 5 and whose variance k (5 - k) / 150. With 4,000 searches, one of 20 numbers is 5.5 standard
    errors off by chance with probability under 1e-6.
    """
    size = 4000
    model = tilted()
    search = TreeSearch(model, branching=1)
    start = root(model)
    frontier = start.take(torch.zeros(size).long())
    firsts, shares = [], []
    with torch.no_grad():
        for _ in range(LENGTH):
            previous = frontier.x
            positions, _, shrunk = search._drawn(previous)
            children = previous.scatter(-1, positions, 0)
            shares.append(frontier.masked_share * shrunk)
            firsts.append(positions[:, 0])
            frontier = Frontier(children, children, frontier.score, shares[-1], frontier.valid)
    for number, share in enumerate(shares):
        k = LENGTH - number
        error = math.sqrt(k * (5 - k) / 150 / size)
        assert abs(share.mean().item() - k / 5) < 5.5 * error
        assert (share < (shares[number - 1] if number else 1.0)).all()
    for positions in firsts:
        counts = torch.bincount(positions, minlength=LENGTH).double()
        assert ((counts - size / 4).abs() < 5.5 * math.sqrt(size * 3 / 16)).all()
    order = torch.stack(firsts, -1).sort(-1).values
    assert torch.equal(order, torch.arange(LENGTH).expand(size, LENGTH))


def test_a_step_is_one_call_where_naive_branching_takes_many() -> None:
    """
    Theorem 1: with hazard h for each of n masks, a step reveals anything at all with probability
    1 - exp(-n h), so that b children take about b / (1 - exp(-n h)) calls without sharing.
    """
    steps = 20
    model = tilted(num_inference_steps=steps)
    search = TreeSearch(model, width=1, branching=3, seed=0)
    assert search.run().counts["denoiser"] == LENGTH
    naive = 3 / (1 - math.exp(LENGTH * math.log(1 - 1 / steps)))
    assert naive > 12 * search.steps[0].num_parents
    base = masked_model(num_inference_steps=steps)
    with torch.no_grad(), pyro.plate("particles", 2000):
        state: dict[str, Tensor] = {}
        base.init(state)
        base.step(state, steps)
    changed = (state["x"] != MASK).any(-1).double().mean().item()
    # one standard error is 0.0087
    assert changed == pytest.approx(1 - (1 - 1 / steps) ** LENGTH, abs=0.04)


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_near_the_mean_where_the_reward_is_lipschitz(seed: int) -> None:
    """
    Theorem 2: for |r(x) - r(y)| <= c * (number of differences), the arg-max completion is within
    c * sum of (1 - highest probability) of the mean over independent draws.
    """
    logits = table(seed, sharpness=2.0)
    model = masked_model(logits)
    weights = torch.randn(LENGTH, MASK, generator=torch.Generator().manual_seed(seed)).double()
    rewards = {
        tuple(row): sum(weights[i, v].item() for i, v in enumerate(row)) + math.cos(3 * sum(row))
        for row in everything().tolist()
    }
    pairs = itertools.combinations(rewards, 2)
    lipschitz = max(
        abs(rewards[a] - rewards[b]) / sum(i != j for i, j in zip(a, b, strict=True))
        for a, b in pairs
    )
    tightest = 0.0
    for x in itertools.product(range(VOCABULARY), repeat=LENGTH):
        if MASK not in x:
            continue
        state: dict[str, Tensor] = {"x": torch.tensor([x])}
        state["logits"] = logits[(state["x"] * POWERS).sum(-1)]
        proxy = tuple(model.complete(state)[0].tolist())
        probs = state["logits"][0, :, :MASK].double().softmax(-1)
        masked = [i for i, token in enumerate(x) if token == MASK]
        mean = 0.0
        for tokens in itertools.product(range(MASK), repeat=len(masked)):
            filled = list(x)
            for place, token in zip(masked, tokens, strict=True):
                filled[place] = token
            chance = math.prod(probs[p, v].item() for p, v in zip(masked, tokens, strict=True))
            mean += chance * rewards[tuple(filled)]
        bound = lipschitz * sum(1 - probs[place].max().item() for place in masked)
        error = abs(rewards[proxy] - mean)
        assert error <= bound + 1e-9
        tightest = max(tightest, error / bound)
    # a bound that nothing comes near would prove little
    assert tightest > 0.3


def test_a_step_finds_no_worse_with_more_children_or_parents() -> None:
    """Theorem 3, step by step: more width or branching means more candidates of the same draws."""
    model = tilted()
    for seed in range(20):
        best: dict[tuple[int, int], float] = {}
        frontier = TreeSearch(model, 4, 3, seed=seed)
        with torch.no_grad():
            pyro.set_rng_seed(seed)
            children = frontier.branch(root(model))
            parents = frontier._best(children, 1)
            for width, branching in itertools.product((1, 2, 3), (1, 2, 3)):
                pyro.set_rng_seed(seed)
                search = TreeSearch(model, width, branching)
                found = search.branch(parents.take(torch.arange(width)))
                best[width, branching] = found.score.max().item()
        for width, branching in best:
            assert best[width, branching] <= best.get((width + 1, branching), math.inf)
            assert best[width, branching] <= best.get((width, branching + 1), math.inf)
    mean = {m: _mean_best(m) for m in (1, 4)}
    assert mean[4] > mean[1] + 0.1


def _mean_best(width: int) -> float:
    runs = (TreeSearch(tilted(), width, 2, seed=seed).run() for seed in range(25))
    return sum(run.state["log_potential"][0].item() for run in runs) / 25


def test_equal_children_are_kept_once() -> None:
    """Two parents that reveal the same two tokens in either order have a child in common."""
    model = tilted()
    search = TreeSearch(model, 4, 3)
    x = torch.tensor([[0, MASK, 2, 2], [MASK, 1, 2, 2]])
    nodes = torch.zeros(2).double()
    children = search.branch(Frontier(x, x, nodes, nodes + 1, torch.ones(2).bool()))
    kept = children.x[children.valid]
    assert len(kept) == 5 == len(kept.unique(dim=0))
    found = search._best(children, 2)
    assert len(found.x) == 4 and found.valid.all()
    assert torch.equal(found.score, children.score[children.valid].sort(descending=True).values[:4])


def test_ties_go_to_the_more_probable_child() -> None:
    model = RewardTilted(masked_model(), lambda x: torch.zeros(len(x)))
    search = TreeSearch(model, width=1, branching=3, seed=4)
    result = search.run()
    greedy = TreeSearch(model, width=1, branching=1, seed=4).run()
    assert torch.equal(result.state["x"], greedy.state["x"])


def test_forbidden_tokens_and_too_much_branching() -> None:
    model = tilted(forbidden_token_ids=(1,))
    search = TreeSearch(model, width=50, branching=9, seed=0)
    result = search.run()
    assert (result.state["x"] != 1).all()
    assert result.num_particles == 2**LENGTH
    assert search.steps[0].num_children == 2


def test_hard_constraints_are_searched() -> None:
    def limited(x: Tensor) -> Tensor:
        return torch.where(x[:, 0] == 2, values(x), -torch.inf)

    model = RewardTilted(masked_model(), limited)
    result = TreeSearch(model, 12, 3, seed=0).run()
    assert result.state["x"][0, 0] == 2 and result.state["log_potential"][0].isfinite()
    nothing = RewardTilted(masked_model(), lambda x: torch.full((len(x),), -torch.inf))
    assert (TreeSearch(nothing, 2, 2, seed=0).run().state["log_potential"] == -torch.inf).all()


def test_likelihoods_are_searched_too() -> None:
    def likelihood(state: Any, x0: Tensor) -> None:
        pyro.sample("y", dist.Normal(x0.double().sum(-1), 0.1), obs=torch.tensor(7.0).double())

    model = Tilted(masked_model(), likelihood)
    result = TreeSearch(model, 27, 3, seed=0).run()
    assert result.state["x"][0].sum() == 7
    assert set(result.counts) == {"denoiser"}


@pytest.mark.parametrize("budget", [10, 25, 30, 1000])
def test_budgets_of_rewards_are_kept(budget: int) -> None:
    model = tilted()
    search = TreeSearch(model, 4, 3, max_reward_calls=budget, seed=0)
    result = search.run()
    assert result.counts["reward"] <= budget
    assert (result.state["x"] != MASK).all()
    assert torch.equal(result.state["log_potential"], values(result.state["x"]))
    assert len(result.state["x"].unique(dim=0)) == result.num_particles
    whole = TreeSearch(model, 4, 3, seed=0)
    whole.run()
    assert (len(search.steps) == len(whole.steps)) == (budget == 1000)


@pytest.mark.parametrize("budget", [12, 16, 20])
def test_budgets_of_other_potentials_are_kept(budget: int) -> None:
    """Two rewards are two calls, and a potential that is no reward is one."""
    asked: list[Tensor] = []

    def potential(state: Any, x0: Tensor) -> None:
        asked.append(x0.unique(dim=0))
        pyro.factor("worth", values(x0))

    search = TreeSearch(
        Tilted(masked_model(), potential), 2, 3, max_reward_calls=budget, seed=0, progress=False
    )
    search.run()
    assert sum(map(len, asked)) <= budget
    whole = TreeSearch(Tilted(masked_model(), potential), 2, 3, seed=0, progress=False)
    whole.run()
    assert len(search.steps) < len(whole.steps)
    both = {"a": values, "b": lambda x: -2 * values(x)}
    model = RewardTilted(masked_model(), both)
    search = TreeSearch(model, 2, 3, max_reward_calls=budget, seed=0, progress=False)
    assert search.run().counts["reward"] <= budget


def test_prompts_that_are_filled_in_are_not_scored_again() -> None:
    prompts = torch.tensor([[1, MASK, MASK, MASK], [0, MASK, 1, 1]])
    scored: list[Tensor] = []

    def noted(x: Tensor) -> Tensor:
        scored.append(x)
        return values(x)

    model = RewardTilted(masked_model(prompt=prompts, plate=("prompts", 2)), noted)
    result = TreeSearch(model, 2, 3, seed=0, progress=False).run()
    # after its only step and at the end
    assert [int((batch[:, 0] == 0).sum()) for batch in scored] == [3, 0, 0, 2]
    assert torch.equal(result.state["log_potential"], result.state["reward"])


def test_the_highest_are_those_of_a_sort() -> None:
    """Of equal ones the first, as a stable sort has them."""
    torch.manual_seed(0)
    for spread in (1000, 5, 1):
        rows = torch.randint(spread, (200, 30)).double()
        rows[:, ::7] = -torch.inf
        for number in (1, 4, 29, 30):
            expected, places = rows.sort(dim=-1, descending=True, stable=True)
            found = _highest(rows, number)
            assert torch.equal(found[0], expected[:, :number])
            assert torch.equal(found[1], places[:, :number])


def test_prompts_are_populations_of_their_own() -> None:
    prompts = torch.tensor([[MASK] * 4, [0, MASK, MASK, 1], [MASK, 2, MASK, MASK]])
    model = tilted(prompt=prompts, plate=("prompts", 3))
    search = TreeSearch(model, 27, 3, seed=0)
    result = search.run()
    assert result.state["x"].shape == (27, 3, LENGTH)
    assert result.log_normalizer.shape == (3,) and result.log_normalizer.isnan().all()
    for p, prompt in enumerate(prompts):
        alive = result.log_weights[:, p] > -torch.inf
        found = result.state["x"][alive, p]
        assert len(found) == min(27, len(everything(prompt)))
        assert len(found.unique(dim=0)) == len(found)
        known = prompt != MASK
        assert (found[:, known] == prompt[known]).all()
        if p:
            assert result.state["reward"][0, p] == values(everything(prompt)).max()
    best = result.best().state["reward"][0]
    assert torch.equal(best, result.state["reward"][0])
    # each population is as if it were alone in what it can reach
    assert [step.num_parents for step in search.steps][0] == 3


def test_search_beats_best_of_n_at_equal_cost() -> None:
    """A mean over 40 searches of 13 network calls, against best-of-3 with at least 9."""
    found = [TreeSearch(tilted(), 4, 2, seed=s).run() for s in range(40)]
    calls = sum(run.counts["denoiser"] for run in found) / 40
    size = round(calls / LENGTH)
    model = tilted(unmasking="uniform")
    drawn = [BestOfN(model, size, seed=s).run() for s in range(40)]
    assert sum(run.counts["denoiser"] for run in drawn) / 40 >= 0.9 * calls
    means = [sum(run.state["reward"][0].item() for run in runs) / 40 for runs in (found, drawn)]
    assert means[0] > means[1] + 0.1


def test_wrong_arguments_are_refused() -> None:
    model = tilted()
    for name in ("width", "branching", "group_size", "max_reward_calls"):
        with pytest.raises(ValueError, match=f"{name}=0; give a whole number, 1 or more"):
            TreeSearch(model, **{name: 0})
    with pytest.raises(ValueError, match="max_reward_calls=5 is too few for one step"):
        TreeSearch(model, 4, 4, max_reward_calls=5).run()
    with pytest.raises(ValueError, match="has no `mask_token_id`; a tree search is over"):
        TreeSearch(object())
    with pytest.raises(ValueError, match="MaskedDiffusion has no reward.* nothing to search for"):
        TreeSearch(masked_model())


def test_other_latent_variables_are_refused() -> None:
    base = masked_model()

    class Enclosing:
        timesteps, event_shape = base.timesteps, base.event_shape

        def __getattr__(self, name: str) -> Any:
            return getattr(base, name)

        def init(self, state: Any) -> None:
            state["strength"] = pyro.sample("strength", dist.Normal(0.0, 1.0))
            base.init(state)

    with pytest.raises(ValueError, match="the model draws 'strength' besides its sequences"):
        TreeSearch(RewardTilted(Enclosing(), values)).run()
