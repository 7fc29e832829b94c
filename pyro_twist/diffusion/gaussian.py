# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The reverse process of a diffusion model as a Pyro model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_twist.diffusion.chunks import Chunks, checkpointed
from pyro_twist.diffusion.denoiser import BatchedDenoiser
from pyro_twist.diffusion.kernels import GaussianSchedule
from pyro_twist.diffusion.schedules import make_schedule

__all__ = ["GaussianDiffusion"]


class GaussianDiffusion:
    r"""
    The reverse process of a diffusion model, with the exact kernels of a diffusers scheduler.

    Time is counted down: ``init`` samples the site ``x_T`` (``"x_50"`` for 50 steps), ``step(state,
    t)`` samples ``x_{t-1}``. Between sites the state holds

    - ``x``, the current value, of shape ``batch_shape + event_shape``;
    - ``x0_hat``, the prediction of :math:`x_0` that the next kernel uses (after clipping or
      thresholding), of the same shape; equal to ``x`` after the last step;
    - ``eps_hat`` and ``std_hat``, the predicted noise and the learned standard deviation, of the
      same shape, where the kernel needs them.

    The batch shape is that of the plates around the model. The network is evaluated once per state,
    ``num_inference_steps`` times per trajectory; a graph is kept only where something in the state
    requires a gradient, or ``keep_graph`` is set.
    Kernels are computed in float32, or in torch's default dtype if that is wider, whatever the
    dtype of the network::

        unet = UNet2DModel.from_pretrained(...)
        model = GaussianDiffusion(unet, DDPMScheduler.from_pretrained(...), (3, 32, 32))
        with pyro.plate("particles", 16):
            images = model.decode(model())

    :param callable denoiser: A diffusers network such as ``UNet2DModel``, or any callable
        ``denoiser(x, timestep, **conditioning)`` with ``x`` of shape ``(rows,) + event_shape`` and
        ``timestep`` of shape ``(rows,)``, which returns the scheduler's ``prediction_type`` as a
        tensor of the shape of ``x`` (twice the channels if the scheduler's variance is learned), or
        an object that has it as ``.sample``. Modules should be in evaluation mode.
    :param scheduler: A diffusers scheduler with Markov, Gaussian steps; see
        :mod:`pyro_twist.diffusion.schedules`. It is copied, never changed.
    :param tuple event_shape: Shape of one sample, such as ``(3, 32, 32)``.
    :param int num_inference_steps: Number of steps T.
    :param float eta: Strength of the noise for DDIM and flow matching (default 1), TCD's gamma.
    :param dict conditioning: Keyword arguments of the denoiser, such as ``{"class_labels": 3}``.
        Tensors have the shape of the plate, ``(size,)``, or one entry. An entry of the same name in
        the state, broadcastable to the batch shape, takes precedence, so that a latent variable of
        an enclosing model can condition the denoiser.
    :param guidance_scale: Strength of classifier-free guidance, a number or a tensor of shape
        ``(size,)``; 1 evaluates the network without it. An entry ``guidance_scale`` in the state
        takes precedence.
    :param dict null_conditioning: What replaces entries of ``conditioning`` in the unconditional
        evaluation of guidance, such as ``{"class_labels": 8}``.
    :param dict conditioning_event_dims: Number of event dimensions of conditioning tensors by name,
        such as ``{"encoder_hidden_states": 2}``; 0 where nothing is said.
    :param tuple plate: Name and size of a plate, such as ``("classes", 8)``, opened at dim -1
        around every site; inference needs ``max_plate_nesting=1``.
    :param int chunk_size: At most this many rows per call of the network; guidance takes two rows
        per sample. Where memory runs out, rows are taken in halves, which is said once.
    :param int decode_chunk_size: At most this many samples per call of the decoder; by default
        ``chunk_size``.
    :param callable decoder: Maps samples of shape ``(rows,) + event_shape`` to user space, such as
        images of shape ``(rows, channels, height, width)`` in [0, 1].
    :param Tensor start: A clean sample to start from instead of pure noise, of shape
        ``event_shape``, or one per entry of the plate; it is noised to ``start_time`` (C. Meng et
        al. 2021, SDEdit, https://arxiv.org/abs/2108.01073).
    :param start_std: The standard deviation of the clean sample where that is uncertain, such as an
        encoder's; a number or a tensor of the shape of ``start``.
    :param int start_time: The time index at which a process with a ``start`` begins, from 1 to
        ``num_inference_steps``, the default; so many steps are run.
    :param bool use_clipped_model_output: DDIM only: take the noise from the clipped prediction.
    :param dict timestep_options: More arguments of the scheduler's ``set_timesteps``.
    :raises ValueError: If the scheduler has no exact Gaussian kernel, or an option does not fit.
    """

    def __init__(
        self,
        denoiser: Callable[..., Any],
        scheduler: Any,
        event_shape: Sequence[int],
        *,
        num_inference_steps: int | None = 50,
        eta: float | None = None,
        conditioning: Mapping[str, Any] | None = None,
        guidance_scale: float | Tensor = 1.0,
        null_conditioning: Mapping[str, Any] | None = None,
        conditioning_event_dims: Mapping[str, int] | None = None,
        plate: tuple[str, int] | None = None,
        chunk_size: int | None = None,
        decode_chunk_size: int | None = None,
        decoder: Callable[[Tensor], Tensor] | None = None,
        start: Tensor | None = None,
        start_std: float | Tensor = 0.0,
        start_time: int | None = None,
        use_clipped_model_output: bool = False,
        timestep_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.event_shape = torch.Size(event_shape)
        if not self.event_shape:
            raise ValueError("event_shape=() has no event dimension; use (1,) for numbers")
        self.schedule = make_schedule(
            scheduler,
            num_inference_steps,
            eta=eta,
            use_clipped_model_output=use_clipped_model_output,
            timestep_options=timestep_options,
        )
        self.start, self.start_std = start, start_std
        if start is not None or start_time is not None:
            self.schedule = self._starting_at(start_time)
        self.timesteps = tuple(range(len(self.schedule), 0, -1))
        #: The prompts, one per entry of the plate; empty for models without.
        self.prompts: tuple[str, ...] = ()
        self.plate = plate
        self._plate: AbstractContextManager[Any] = contextlib.nullcontext()
        if plate is not None:
            # Creating a plate emits a site, which must be in no trace twice: once, and hidden.
            with poutine.block():
                self._plate = pyro.plate(plate[0], plate[1], dim=-1)
        self.decoder = decoder
        self.keep_graph = False
        decode_chunk_size = chunk_size if decode_chunk_size is None else decode_chunk_size
        self._decoding = Chunks(decode_chunk_size, "decode_chunk_size")
        self.denoiser = BatchedDenoiser(
            denoiser,
            self.event_shape,
            conditioning=conditioning or {},
            null_conditioning=null_conditioning,
            guidance_scale=guidance_scale,
            event_dims=conditioning_event_dims,
            chunk_size=chunk_size,
            doubled=self.schedule.learned_variance is not None,
        )
        self._check_conditioning()

    @classmethod
    def from_pipeline(
        cls,
        pipe: Any,
        prompt: Any = None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        guidance_scale: float | Sequence[float] | Tensor | None = None,
        num_inference_steps: int = 50,
        scheduler: Any = None,
        eta: float | None = None,
        height: int | None = None,
        width: int | None = None,
        image: Any = None,
        strength: float | None = None,
        chunk_size: int | None = None,
        decode_chunk_size: int | None = None,
        timestep_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> GaussianDiffusion:
        """
        Builds the model from the components of a diffusers pipeline, which is not changed.

        Prompts are encoded here, once. The state is the pipeline's latents, ``decode`` maps them to
        images in [0, 1]. Options are named as in the pipeline's own call::

            pipe = StableDiffusionPipeline.from_pretrained(...)
            diffusion = GaussianDiffusion.from_pipeline(pipe, "a blue cat on a red mat")

        A list of prompts opens the plate ``"prompts"`` with one population each::

            diffusion = GaussianDiffusion.from_pipeline(pipe, ["a blue cat", "a red fox"])
            smc = TwistedSMC(diffusion, None, 8, max_plate_nesting=1, population_plate="prompts")

        :param pipe: A pipeline such as ``StableDiffusionPipeline``; see
            :mod:`pyro_twist.diffusion.pipelines` for those that are known and how to add one.
        :param prompt: A prompt or a list of them; class labels, by name or index, for ``DiT``;
            ``None`` for pipelines without.
        :param negative_prompt: What guidance leads away from, one or one per prompt; by default the
            pipeline's own.
        :param guidance_scale: Strength of guidance, a number or one per prompt; by default the
            pipeline's own. As in diffusers, guidance is off at 1 or less.
        :param int num_inference_steps: Number of steps of the scheduler.
        :param scheduler: A diffusers scheduler to use instead of the pipeline's own. By default
            the pipeline's own where its steps are Markov and Gaussian; else, which a warning
            says, DDIM with ``eta=1`` made from its config, and for flow matching the stochastic
            process of the same marginals. ``"keep"`` refuses what it would have to replace.
        :param float eta: Strength of the noise for DDIM and flow matching, by default 1.
        :param int height: The height of the images in pixels; by default the pipeline's own.
        :param int width: Their width.
        :param image: What to start from instead of pure noise (image to image), as the pipeline's
            image processor takes it: a PIL image, an array, a tensor in [0, 1], or latents; one, or
            one per prompt. For pipelines of inpainting, the image to be filled in.
        :param float strength: How much of the image is replaced, in (0, 1]: the share of the steps
            that are run.
        :param int chunk_size: At most this many rows per call of the network; guidance takes two
            rows per sample. Where memory runs out, rows are taken in halves, which is said once.
        :param int decode_chunk_size: At most this many samples per call of the decoder.
        :param dict timestep_options: More arguments of the scheduler's ``set_timesteps``.
        :param options: What else the pipeline's kind knows, such as ``clip_skip``,
            ``original_size``, ``true_cfg_scale`` or ``mask_image``.
        :raises ValueError: If the pipeline is not known, or an option does not fit.
        """
        from pyro_twist.diffusion.pipelines.build import build

        return build(
            cls,
            pipe,
            prompt,
            negative_prompt,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            scheduler=scheduler,
            eta=eta,
            image=image,
            strength=strength,
            timestep_options=timestep_options,
            options={"height": height, "width": width, **options},
            chunk_size=chunk_size,
            decode_chunk_size=decode_chunk_size,
        )

    @property
    def counts(self) -> dict[str, int]:
        """Evaluations of the denoiser so far, per sample: guidance counts as one."""
        return {"denoiser": self.denoiser.num_rows}

    @property
    def num_inference_steps(self) -> int:
        """Number of steps T of the reverse process."""
        return len(self.schedule)

    def __call__(self) -> Tensor:
        """
        Samples a whole trajectory, under any Pyro handler.

        :returns: The sample :math:`x_0`, of shape ``batch_shape + event_shape``.
        :rtype: Tensor
        """
        state: dict[str, Tensor] = {}
        self.init(state)
        for t in self.timesteps:
            self.step(state, t)
        return state["x"]

    def init(self, state: MutableMapping[Any, Tensor]) -> None:
        """
        Samples :math:`x_T` and predicts :math:`x_0` from it.

        :param dict state: Written: ``x``, ``x0_hat`` and what else the next kernel needs.
        """
        with self._plate:
            x = pyro.sample(f"x_{len(self.schedule)}", self.initial())
        self._write(state, len(self.schedule), x)

    def step(self, state: MutableMapping[Any, Tensor], t: int) -> None:
        """
        Samples :math:`x_{t-1}` and, unless it is :math:`x_0`, predicts :math:`x_0` from it.

        :param dict state: Read and written.
        :param int t: Time index of the state, one of :attr:`timesteps`.
        """
        with self._plate:
            x = pyro.sample(f"x_{t - 1}", self.kernel(state, t))
        self._write(state, t - 1, x)

    def initial(self) -> dist.TorchDistribution:
        """The law of :math:`x_T`, of empty batch shape unless the plate's entries start apart."""
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        level = torch.tensor(self.schedule.init_std, dtype=dtype, device=self.denoiser.device)
        if self.start is None:
            return dist.Normal(level.new_zeros(self.event_shape), level).to_event(
                len(self.event_shape)
            )
        alpha = self.schedule[len(self.schedule)].alpha
        std = torch.hypot(alpha * torch.as_tensor(self.start_std).to(level), level)
        return dist.Normal(alpha * self.start.to(level), std).to_event(len(self.event_shape))

    def kernel(self, state: Mapping[Any, Tensor], t: int) -> dist.TorchDistribution:
        """
        The law of :math:`x_{t-1}` given the state; the denoiser is not evaluated.

        :param dict state: What :meth:`init` or :meth:`step` has written.
        :param int t: Time index of the state, one of :attr:`timesteps`.
        :returns: An independent Normal, or a Delta for a deterministic step, of the state's batch
            shape and of event shape :attr:`event_shape`.
        """
        mean, std = self.schedule.kernel(t, state)
        if not isinstance(std, Tensor) and std == 0:
            return dist.Delta(mean, event_dim=len(self.event_shape))
        return dist.Normal(mean, std).to_event(len(self.event_shape))

    def known_share(self, variance: float | Tensor = 0.25) -> Tensor:
        r"""
        The share of the data that the state tells at each time index.

        With signal and noise levels :math:`\alpha_t, \sigma_t` and data of variance :math:`v_0` it
        is :math:`\alpha_t^2 v_0 / (\alpha_t^2 v_0 + \sigma_t^2)`.

        :param variance: The variance of an entry of the data; images in [-1, 1] have about a
            quarter.
        :returns: Of shape ``(T + 1,)``, float64, from 1 at index 0.
        :rtype: Tensor
        """
        steps = [self.schedule[t] for t in range(1, len(self.schedule) + 1)]
        signal = torch.tensor([step.alpha**2 for step in steps], dtype=torch.float64)
        noise = torch.tensor([step.sigma**2 for step in steps], dtype=torch.float64)
        signal = signal * torch.as_tensor(variance, dtype=torch.float64, device=signal.device)
        return torch.cat([torch.ones(1, dtype=torch.float64), signal / (signal + noise)])

    def terminal(self, state: Mapping[Any, Tensor], x0: Tensor) -> None:
        """
        The factors and observations at the end of a trajectory: none.

        :param dict state: A state.
        :param Tensor x0: Samples of shape ``batch_shape + event_shape``.
        """

    def decode(self, x: Tensor) -> Tensor:
        """
        Maps samples to user space.

        Without a decoder, samples of three event dimensions are images in [-1, 1] and are mapped to
        [0, 1]; others are returned as they are.

        :param Tensor x: Samples of shape ``batch_shape + event_shape``.
        :returns: A tensor of shape ``batch_shape`` and the decoded event shape.
        :rtype: Tensor
        """
        if self.decoder is None:
            return (x / 2 + 0.5).clamp(0, 1) if len(self.event_shape) == 3 else x
        batch_shape = x.shape[: x.dim() - len(self.event_shape)]
        rows = x.reshape((-1,) + self.event_shape)
        decoder = self.decoder
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
            decoded = self._decoding(lambda part: self._decode(decoder, rows, part), len(rows))
        return decoded.reshape(batch_shape + decoded.shape[1:])

    def _decode(self, decoder: Callable[[Tensor], Tensor], rows: Tensor, part: slice) -> Tensor:
        whole = part == slice(0, len(rows))
        return decoder(rows) if whole else checkpointed(decoder, rows[part])

    def _starting_at(self, time: int | None) -> GaussianSchedule:
        """The schedule's last part, for a process that begins with a noised sample."""
        total, shape = len(self.schedule), self.event_shape
        time = total if time is None else time
        if self.start is None:
            raise ValueError(f"start_time={time} needs start, the clean sample that is noised")
        if isinstance(time, bool) or not isinstance(time, int) or not 1 <= time <= total:
            raise ValueError(f"start_time={time!r} is not a time index from 1 to {total}")
        if self.start.shape[self.start.dim() - len(shape) :] != shape:
            raise ValueError(
                f"start has shape {tuple(self.start.shape)}, which does not end in the event_shape "
                f"{tuple(shape)}"
            )
        return self.schedule.starting_at(time)

    def _write(self, state: MutableMapping[Any, Tensor], t: int, x: Tensor) -> None:
        """Stores ``x``, which has time index ``t``, and the prediction made from it."""
        if t == 0:
            state["x"] = state["x0_hat"] = x
            for name in ("eps_hat", "std_hat"):
                state.pop(name, None)
            return
        wanted = torch.is_grad_enabled() and _needs_gradient(state, x)
        with torch.set_grad_enabled(self.keep_graph or wanted):
            if self.keep_graph:
                x = x.detach().requires_grad_()
            state["x"] = x
            for name, value in self._predict(state, t).items():
                state[name] = value.reshape(x.shape)

    def _predict(self, state: Mapping[Any, Tensor], t: int) -> dict[str, Tensor]:
        step, x = self.schedule[t], state["x"]
        output = self.denoiser(x, step.timestep, step.input_scale, state)
        return self.schedule.read(t, x.reshape((-1,) + self.event_shape), output)

    def _check_conditioning(self) -> None:
        """Refuses per-class tensors without a plate: they would be taken as one per particle."""
        size = 1 if self.plate is None else self.plate[1]
        named = {**self.denoiser.conditioning, "guidance_scale": self.denoiser.guidance_scale}
        for name, value in named.items():
            if not isinstance(value, Tensor):
                continue
            shape = value.shape[: value.dim() - self.denoiser.event_dims.get(name, 0)]
            if shape.numel() != 1 and tuple(shape) != (size,):
                raise ValueError(
                    f"'{name}' has shape {tuple(value.shape)}, of which {tuple(shape)} is not the "
                    f"shape ({size},) of the plate; pass plate=('classes', {shape.numel()}) to run "
                    "one population per entry, or conditioning_event_dims if these are event "
                    "dimensions"
                )


def _needs_gradient(state: Mapping[Any, Tensor], x: Tensor) -> bool:
    others = [value for name, value in state.items() if name not in ("x", "x0_hat")]
    return x.requires_grad or any(getattr(value, "requires_grad", False) for value in others)
