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

from pyro_twist.diffusion.denoiser import BatchedDenoiser
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
    :param int chunk_size: At most this many rows per call of the network (guidance takes two rows
        per sample) and of the decoder.
    :param callable decoder: Maps samples of shape ``(rows,) + event_shape`` to user space, such as
        images of shape ``(rows, channels, height, width)`` in [0, 1].
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
        decoder: Callable[[Tensor], Tensor] | None = None,
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
        self.timesteps = tuple(range(len(self.schedule), 0, -1))
        self.plate = plate
        self._plate: AbstractContextManager[Any] = contextlib.nullcontext()
        if plate is not None:
            # Creating a plate emits a site, which must be in no trace twice: once, and hidden.
            with poutine.block():
                self._plate = pyro.plate(plate[0], plate[1], dim=-1)
        self.decoder = decoder
        self.keep_graph = False
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size} is not a positive integer; try chunk_size=8")
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
        """The law of :math:`x_T`, of empty batch shape."""
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        mean = torch.zeros(self.event_shape, dtype=dtype, device=self.denoiser.device)
        return dist.Normal(mean, self.schedule.init_std).to_event(len(self.event_shape))

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
        chunks = rows.split(self.denoiser.chunk_size or max(len(rows), 1))
        decoded = torch.cat([self.decoder(chunk) for chunk in chunks])
        return decoded.reshape(batch_shape + decoded.shape[1:])

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
