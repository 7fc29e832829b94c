# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The reverse process as a Pyro model: sites, shapes, conditioning, guidance, chunks, costs."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from pyro.infer import SMCFilter
from pyro.infer.smcfilter import SMCState
from torch import Tensor

from pyro_twist.diffusion import GaussianDenoiser, GaussianDiffusion

SHAPE = (3, 8, 8)


class ClassDenoiser:
    """Predicts the class index times 0.1 everywhere, plus a part of the input."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        assert timestep.shape == class_labels.shape == x.shape[:1]
        self.rows.append(len(x))
        level = class_labels.to(x).reshape((-1,) + (1,) * (x.dim() - 1))
        return 0.1 * level + 0.01 * x


def make_unet(num_class_embeds: int | None = 4) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        num_class_embeds=num_class_embeds,
    ).eval()


def make(denoiser: Any, steps: int = 5, **options: Any) -> GaussianDiffusion:
    scheduler = DDPMScheduler(prediction_type="sample", clip_sample=False)
    return GaussianDiffusion(denoiser, scheduler, SHAPE, num_inference_steps=steps, **options)


def initial_state(model: GaussianDiffusion, x: Tensor, **given: Tensor) -> dict[str, Tensor]:
    """The state after ``init`` with the value ``x`` of the first site."""
    state = dict(given)
    with poutine.condition(data={f"x_{model.timesteps[0]}": x}):
        model.init(state)
    return state


def test_trace_has_one_site_per_time() -> None:
    model = make(ClassDenoiser(), conditioning={"class_labels": 1})
    with pyro.plate("particles", 4):
        trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    sites = [name for name, site in trace.nodes.items() if name.startswith("x_")]
    assert sites == ["x_5", "x_4", "x_3", "x_2", "x_1", "x_0"]
    for name in sites:
        site = trace.nodes[name]
        assert site["value"].shape == (4,) + SHAPE
        assert site["log_prob"].shape == (4,)
        assert torch.isfinite(site["log_prob"]).all()
    assert isinstance(trace.nodes["x_0"]["fn"], dist.Delta)
    assert trace.nodes["_RETURN"]["value"] is trace.nodes["x_0"]["value"]


def test_runs_without_plates() -> None:
    assert make(ClassDenoiser(), conditioning={"class_labels": 1})().shape == SHAPE


def test_log_prob_is_that_of_the_kernels() -> None:
    model = make(ClassDenoiser(), conditioning={"class_labels": 1})
    with pyro.plate("particles", 4):
        trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    step = model.schedule[3]
    x, value = trace.nodes["x_3"]["value"], trace.nodes["x_2"]["value"]
    mean = step.x0_coef * (0.1 + 0.01 * x) + step.x_coef * x
    expected = torch.distributions.Normal(mean, step.std).log_prob(value).sum((1, 2, 3))
    assert torch.allclose(trace.nodes["x_2"]["log_prob"], expected, rtol=1e-4)


@pytest.mark.parametrize("nesting, plate", [(0, None), (1, None), (1, ("classes", 3))])
def test_state_in_a_filter(nesting: int, plate: tuple[str, int] | None) -> None:
    model = make(ClassDenoiser(), conditioning={"class_labels": 1}, plate=plate)
    state = SMCState(4)
    batch = (4,) if nesting == 0 else (4, 1 if plate is None else 3)
    with pyro.plate("particles", 4, dim=-1 - nesting), torch.no_grad():
        model.init(state)
        assert state["x"].shape == state["x0_hat"].shape == batch + SHAPE
        for t in model.timesteps:
            assert model.kernel(state, t).batch_shape == batch
            assert model.kernel(state, t).event_shape == SHAPE
            model.step(state, t)
    assert state["x"] is state["x0_hat"]
    assert set(state) == {"x", "x0_hat"}


def test_in_stock_smcfilter() -> None:
    model = make(ClassDenoiser(), conditioning={"class_labels": 1})
    smc = SMCFilter(model, make_guide(model), num_particles=3, max_plate_nesting=0)
    smc.init()
    for t in model.timesteps:
        smc.step(t)
    assert smc.state["x"].shape == (3,) + SHAPE


def make_guide(model: GaussianDiffusion) -> Any:
    """Samples the model's own sites, writing nothing."""

    class Guide:
        def init(self, state: Any) -> None:
            pyro.sample(f"x_{model.timesteps[0]}", model.initial())

        def step(self, state: Any, t: int) -> None:
            pyro.sample(f"x_{t - 1}", model.kernel(state, t))

    return Guide()


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_cost_law(scale: float) -> None:
    denoiser = ClassDenoiser()
    model = make(
        denoiser,
        conditioning={"class_labels": 1},
        null_conditioning={"class_labels": 0},
        guidance_scale=scale,
    )
    with pyro.plate("particles", 4):
        model()
    assert model.counts == {"denoiser": 4 * len(model.timesteps)}
    assert denoiser.rows == [4 if scale == 1.0 else 8] * len(model.timesteps)


def test_kernel_does_not_call_the_denoiser() -> None:
    denoiser = ClassDenoiser()
    model = make(denoiser, conditioning={"class_labels": 1})
    state = initial_state(model, torch.randn(2, *SHAPE))
    for _ in range(3):
        model.kernel(state, 5)
    assert denoiser.rows == [2]


def test_guidance_arithmetic() -> None:
    options = dict(null_conditioning={"class_labels": 0})
    x = torch.randn(4, *SHAPE)

    def predict(label: int, **more: Any) -> Tensor:
        model = make(ClassDenoiser(), conditioning={"class_labels": label}, **options, **more)
        return initial_state(model, x)["x0_hat"]

    expected = predict(0) + 2.5 * (predict(3) - predict(0))
    assert torch.allclose(predict(3, guidance_scale=2.5), expected, atol=1e-6)
    assert torch.allclose(predict(3, guidance_scale=0.0), predict(0), atol=1e-6)
    assert torch.equal(predict(3, guidance_scale=1.0), predict(3))


def test_state_takes_precedence() -> None:
    model = make(
        ClassDenoiser(),
        conditioning={"class_labels": 1},
        null_conditioning={"class_labels": 0},
    )
    x, labels = torch.zeros(3, *SHAPE), torch.tensor([0, 2, 3])
    state = initial_state(model, x, class_labels=labels)
    assert torch.allclose(state["x0_hat"][:, 0, 0, 0], 0.1 * labels)
    scales = torch.tensor([0.0, 1.0, 2.0])
    state = initial_state(model, x, class_labels=labels, guidance_scale=scales)
    assert torch.allclose(state["x0_hat"][:, 0, 0, 0], 0.1 * labels * scales)


def test_latent_class_of_an_enclosing_model() -> None:
    model = make(ClassDenoiser(), conditioning={"class_labels": None})

    def program() -> Tensor:
        state: dict[str, Tensor] = {}
        state["class_labels"] = pyro.sample("class", dist.Categorical(torch.ones(4)))
        model.init(state)
        for t in model.timesteps:
            model.step(state, t)
        return state["class_labels"]

    with pyro.plate("particles", 5):
        trace = poutine.trace(program).get_trace()
    label = trace.nodes["class"]["value"]
    mean = trace.nodes["x_0"]["fn"].mean - 0.01 * trace.nodes["x_1"]["value"]
    assert torch.allclose(mean[:, 0, 0, 0], 0.1 * label, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, torch.tensor([1.0, 2.0, 3.0])])
def test_plate_of_classes_equals_separate_runs(scale: Any) -> None:
    unet = make_unet()
    options = dict(null_conditioning={"class_labels": 3})
    both = make(
        unet,
        conditioning={"class_labels": torch.arange(3)},
        guidance_scale=scale,
        plate=("classes", 3),
        **options,
    )
    with pyro.plate("particles", 2, dim=-2):
        trace = poutine.trace(both).get_trace()
    trace.compute_log_prob()
    values = {n: s["value"] for n, s in trace.nodes.items() if n.startswith("x_")}
    for label in range(3):
        alone = make(
            unet,
            conditioning={"class_labels": label},
            guidance_scale=float(torch.as_tensor(scale).expand(3)[label]),
            **options,
        )
        data = {name: value[:, label] for name, value in values.items() if name != "x_0"}
        with pyro.plate("particles", 2), poutine.condition(data=data):
            single = poutine.trace(alone).get_trace()
        single.compute_log_prob()
        for name in data:
            expected = trace.nodes[name]["log_prob"][:, label]
            assert torch.allclose(single.nodes[name]["log_prob"], expected, rtol=1e-3)
        assert torch.allclose(single.nodes["x_0"]["value"], values["x_0"][:, label], atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_chunks_give_the_same_result(size: int, scale: float) -> None:
    unet = make_unet()
    options: dict[str, Any] = dict(
        conditioning={"class_labels": torch.arange(2)},
        null_conditioning={"class_labels": 3},
        guidance_scale=scale,
        plate=("classes", 2),
    )
    results = []
    for chunk_size in (None, size):
        pyro.set_rng_seed(0)
        with pyro.plate("particles", 4, dim=-2):
            results.append(make(unet, chunk_size=chunk_size, **options)())
    assert torch.allclose(results[0], results[1], atol=1e-5)


def test_chunk_size_bounds_the_rows() -> None:
    denoiser = ClassDenoiser()
    model = make(denoiser, conditioning={"class_labels": 1}, chunk_size=3)
    initial_state(model, torch.zeros(7, *SHAPE))
    assert denoiser.rows == [3, 3, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_network_sees_its_own_dtype(dtype: torch.dtype) -> None:
    unet = make_unet(None).to(dtype)
    with pyro.plate("particles", 2):
        trace = poutine.trace(make(unet)).get_trace()
    assert all(s["value"].dtype == torch.float32 for n, s in trace.nodes.items() if n[:2] == "x_")


def test_float64_by_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert make(make_unet(None).float())().dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_no_graph_is_kept_unless_asked() -> None:
    unet = make_unet(None)
    assert not make(unet)().requires_grad
    model = make(unet)
    model.keep_graph = True
    with torch.no_grad():
        state = initial_state(model, torch.randn(2, *SHAPE))
        assert state["x"].is_leaf and state["x"].requires_grad
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(state["x0_hat"].sum(), state["x"])
        assert gradient.abs().sum() > 0
        model.step(state, 5)
    assert state["x"].is_leaf and state["x0_hat"].requires_grad


def test_eps_hat_is_kept_where_clipping_needs_it() -> None:
    def keys(scheduler: Any, **options: Any) -> set[str]:
        options["num_inference_steps"] = 4
        model = GaussianDiffusion(lambda x, t: x, scheduler, SHAPE, **options)
        return set(initial_state(model, torch.randn(2, *SHAPE)))

    assert keys(DDIMScheduler(clip_sample=True)) == {"x", "x0_hat", "eps_hat"}
    assert keys(DDIMScheduler(clip_sample=True), use_clipped_model_output=True) == {"x", "x0_hat"}
    assert keys(DDIMScheduler(clip_sample=False)) == {"x", "x0_hat"}
    assert keys(DDPMScheduler(clip_sample=True)) == {"x", "x0_hat"}
    assert keys(FlowMatchEulerDiscreteScheduler()) == {"x", "x0_hat"}


def test_conditioning_with_event_dims() -> None:
    seen = {}

    def denoiser(x: Tensor, timestep: Tensor, text: Tensor, mode: str) -> Tensor:
        seen.update(text=text, mode=mode)
        return x

    text = torch.randn(2, 7, 5)
    model = make(
        denoiser,
        conditioning={"text": text, "mode": "fast"},
        conditioning_event_dims={"text": 2},
        plate=("prompts", 2),
    )
    initial_state(model, torch.zeros(3, 2, *SHAPE))
    assert seen["mode"] == "fast"
    assert torch.equal(seen["text"], text.repeat(3, 1, 1))


def test_decode() -> None:
    model = make(ClassDenoiser())
    x = torch.randn(2, 5, *SHAPE) * 2
    assert torch.equal(model.decode(x), (x / 2 + 0.5).clamp(0, 1))
    model = make(ClassDenoiser(), decoder=lambda z: z.mean((2, 3)), chunk_size=3)
    assert torch.allclose(model.decode(x), x.mean((3, 4)))
    points = GaussianDiffusion(ClassDenoiser(), DDPMScheduler(), (2,))
    assert points.decode(torch.ones(3, 2) * 7).max() == 7


def test_terminal_emits_nothing() -> None:
    model = make(ClassDenoiser())
    trace = poutine.trace(model.terminal).get_trace({}, torch.zeros(SHAPE))
    assert not list(trace.stochastic_nodes) and not list(trace.observation_nodes)


def test_the_scheduler_is_left_alone() -> None:
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(7)
    GaussianDiffusion(ClassDenoiser(), scheduler, SHAPE, num_inference_steps=5)
    assert len(scheduler.timesteps) == 7


def test_samples_of_a_tuple_or_an_output_object() -> None:
    class Output:
        def __init__(self, sample: Tensor) -> None:
            self.sample = sample

    x = torch.randn(2, *SHAPE)
    for wrap in (lambda y: y, lambda y: (y, 1), Output):
        model = make(lambda x, t, wrap=wrap: wrap(x))
        assert torch.equal(initial_state(model, x)["x0_hat"], x)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(conditioning={"class_labels": torch.arange(8)}), "pass plate=\\('classes', 8\\)"),
        (dict(conditioning={"class_labels": [0, 1]}, plate=("classes", 3)), "shape \\(3,\\)"),
        (dict(guidance_scale=torch.ones(2)), "'guidance_scale' has shape \\(2,\\)"),
        (dict(chunk_size=0), "chunk_size=0"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(ClassDenoiser(), **options)


def test_errors_of_calls() -> None:
    x = torch.zeros(2, *SHAPE)
    with pytest.raises(ValueError, match="needs null_conditioning"):
        initial_state(make(ClassDenoiser(), guidance_scale=2.0), x)
    with pytest.raises(ValueError, match="expected \\(2, 3, 8, 8\\)"):
        initial_state(make(lambda x, t: x[:, :1]), x)
    with pytest.raises(ValueError, match="returned str"):
        initial_state(make(lambda x, t: "noise"), x)
    model = make(ClassDenoiser(), conditioning={"class_labels": 1})
    with pytest.raises(ValueError, match="does not broadcast to the batch shape \\(2,\\)"):
        initial_state(model, x, class_labels=torch.zeros(3))
    with pytest.raises(ValueError, match="time index 6 is outside 5..1"):
        model.kernel(initial_state(model, x), 6)
    with pytest.raises(ValueError, match="event_shape"):
        GaussianDiffusion(ClassDenoiser(), DDPMScheduler(), ())


def test_learned_variance_must_be_positive() -> None:
    scheduler = DDPMScheduler(variance_type="learned")
    model = GaussianDiffusion(lambda x, t: torch.cat([x, -x.abs()], 1), scheduler, SHAPE)
    with pytest.raises(ValueError, match="not positive"):
        initial_state(model, torch.randn(2, *SHAPE))


def test_guidance_leaves_the_learned_variance_alone() -> None:
    def denoiser(x: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        level = class_labels.to(x).reshape(-1, 1, 1, 1).expand_as(x)
        return torch.cat([level, 0.1 * level + 0.1], 1)

    scheduler = DDPMScheduler(variance_type="learned", prediction_type="sample", clip_sample=False)
    model = GaussianDiffusion(
        denoiser,
        scheduler,
        SHAPE,
        conditioning={"class_labels": 2},
        null_conditioning={"class_labels": 1},
        guidance_scale=3.0,
    )
    state = initial_state(model, torch.zeros(2, *SHAPE))
    assert torch.allclose(state["x0_hat"], torch.tensor(4.0))
    assert torch.allclose(state["std_hat"] ** 2, torch.tensor(0.3))


def test_chain_law_with_a_gaussian_denoiser() -> None:
    """
    With a linear denoiser the law of x_0 is Gaussian and known by recursion.

    Means by a z-test, variances by the normal approximation of chi-squared, three coordinates each;
    false-alarm rate 6e-6 in total.
    """
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    mean, variance = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.2, 1.0, 2.0])
    denoiser = GaussianDenoiser(mean, variance, scheduler)
    model = GaussianDiffusion(denoiser, scheduler, (3,), num_inference_steps=20)
    expected_mean, expected_variance = chain_moments(model, mean, variance)
    number = 20000
    with pyro.plate("particles", number):
        x = model()
    z = (x.mean(0) - expected_mean) / (expected_variance / number) ** 0.5
    ratio = (x.var(0) / expected_variance - 1) / (2 / number) ** 0.5
    assert z.abs().max() < 4.9
    assert ratio.abs().max() < 4.9
    # The chain itself is close to the data, as it should be with 20 steps.
    assert torch.allclose(expected_mean, mean.double(), atol=0.1)
    assert torch.allclose(expected_variance, variance.double(), rtol=0.3)


def chain_moments(
    model: GaussianDiffusion, mean: Tensor, variance: Tensor, down_to: int = 0
) -> tuple[Tensor, Tensor]:
    """Exact moments of ``x_{down_to}`` for Gaussian data and its exact denoiser, in float64."""
    mean, variance = mean.double(), variance.double()
    m, v = torch.zeros_like(mean), torch.full_like(variance, model.schedule.init_std**2)
    for t in model.timesteps[: len(model.timesteps) - down_to]:
        step = model.schedule[t]
        gain = step.alpha * variance / (step.alpha**2 * variance + step.sigma**2)
        slope = step.x_coef + step.x0_coef * gain
        m = slope * m + step.x0_coef * (mean - gain * step.alpha * mean)
        v = slope**2 * v + step.std**2
    return m, v


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_flow_matching_preserves_the_marginals(eta: float) -> None:
    """The error of every marginal falls with the number of steps, whatever the noise."""
    mean, variance = torch.tensor([1.5, -0.5]), torch.tensor([0.3, 2.0])
    scheduler = FlowMatchEulerDiscreteScheduler()
    errors = []
    for number in (25, 100, 400):
        denoiser = GaussianDenoiser(mean, variance, scheduler)
        model = GaussianDiffusion(denoiser, scheduler, (2,), num_inference_steps=number, eta=eta)
        worst = 0.0
        for t in (number * 3 // 4, number // 2, number // 4, 0):
            sigma = model.schedule[t].sigma if t else 0.0
            m, v = chain_moments(model, mean, variance, down_to=t)
            exact = (1 - sigma) ** 2 * variance + sigma**2
            off = torch.cat([m - (1 - sigma) * mean, v - exact]).abs().max()
            worst = max(worst, float(off))
        errors.append(worst)
    assert errors[1] < errors[0] / 2 and errors[2] < errors[1] / 2
    assert errors[2] < 0.03


def test_flow_matching_kernel_is_euler_maruyama_to_first_order() -> None:
    """Drift and diffusion at sigma = 0.5 against the stochastic differential equation."""
    scheduler, eta = FlowMatchEulerDiscreteScheduler(), 0.8
    options = dict(timestep_options={"sigmas": [0.5, 0.4999]}, num_inference_steps=2)
    model = GaussianDiffusion(lambda x, t: x, scheduler, (1,), eta=eta, **options)
    sigma, lower, h = 0.5, 0.4999, 1e-4
    v, x = 0.7, 1.3
    state = {"x": torch.tensor([x]), "x0_hat": torch.tensor([x - sigma * v])}
    kernel = model.kernel(state, 2)
    rate = 2 * eta**2 * sigma / (1 - sigma)
    score = -(x + (1 - sigma) * v) / sigma
    drift = (float(kernel.mean) - x) / (lower - sigma)
    assert drift == pytest.approx(v - rate * score / 2, rel=5e-3)
    assert float(kernel.variance) / h == pytest.approx(rate, rel=5e-3)


def test_flow_matching_starts_at_pure_noise() -> None:
    """At sigma = 1 the kernel is finite, and with eta = 1 forgets the state."""
    model = GaussianDiffusion(
        lambda x, t: x, FlowMatchEulerDiscreteScheduler(), (1,), num_inference_steps=10
    )
    step = model.schedule[10]
    assert step.sigma == 1.0
    assert step.std == pytest.approx(model.schedule[9].sigma)
    assert step.x_coef == pytest.approx(0.0, abs=1e-6)


def test_gradients_reach_an_earlier_state() -> None:
    """Where something asks for a gradient it is the true one, against finite differences."""
    scheduler = DDPMScheduler(clip_sample=False)
    denoiser = GaussianDenoiser(torch.zeros(2), torch.tensor([0.5, 2.0]), scheduler)
    model = GaussianDiffusion(denoiser, scheduler, (2,), num_inference_steps=6)

    def end(x: torch.Tensor) -> torch.Tensor:
        state: dict[str, torch.Tensor] = {}
        model._write(state, 3, x)
        for t in (3, 2, 1):
            model._write(state, t - 1, model.kernel(state, t).mean)
        return state["x"].square().sum()

    x = torch.tensor([0.3, -0.8], requires_grad=True)
    (gradient,) = torch.autograd.grad(end(x), x)
    steps = 1e-2 * torch.eye(2)
    with torch.no_grad():
        differences = torch.stack([(end(x + e) - end(x - e)) / 2e-2 for e in steps])
    assert torch.allclose(gradient, differences, rtol=1e-2)
    with torch.no_grad():
        assert not end(x).requires_grad
