# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""First-order proposals for masked models: tokens tilted by the gradient of a relaxed reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_twist.diffusion.unmasking import Unmasking
from pyro_twist.twists.guided import Strength, _at, _check_strength
from pyro_twist.twists.tilting import tilt
from pyro_twist.twists.tokens import check_counts, check_masked
from pyro_twist.twists.twist import Twist

__all__ = ["GradientTokenTwist"]


class GradientTokenTwist(Twist):
    r"""
    Tilts the tokens of a masked model by the gradient of a reward of token probabilities [1].

    The relaxed prediction :math:`\hat p(x_t)` is a law of tokens for each position: the denoiser's
    where the position is masked, all probability on the token where it is revealed. With the reward
    :math:`r` a differentiable function of such laws, the kernel is

    .. math::

        q(x_{t-1} \mid x_t) \propto p(x_{t-1} \mid x_t) \exp(x_{t-1} \cdot \eta_t), \qquad
        \eta_t = c \, \nabla_{\hat p} \, r(\hat p(x_t))

    over the tokens of the positions that are revealed, with sequences as one-hot vectors. It is
    exact to first order in the reward: for tokens that are independent of each other and a reward
    that is linear in the probabilities it is the optimal proposal. Which positions are revealed
    stays as it is; a position that stays masked is worth what it will be when it is revealed.

    The twist is a proposal only, which the weights correct: put it beside a look-ahead::

        twist = LookaheadTwist(model) + GradientTokenTwist(model, relaxed)

    It takes no evaluation of the denoiser. Memory: one tensor of the shape
    ``(sequences, length, vocab_size)`` for the tilt in float32, and what the reward keeps for the
    backward pass of ``chunk_size`` sequences. The run counts under ``"gradient"`` the sequences for
    which the reward was differentiated.

    :param model: A :class:`~pyro_twist.diffusion.MaskedDiffusion`, with or without rewards.
    :param callable relaxed: A function of token probabilities of shape ``(B, length, vocab_size)``,
        in torch's default dtype, that returns ``B`` log-potentials, such as a strength times the
        output of a classifier at the averages of token embeddings, differentiable.
    :param strength: The factor :math:`c`, or a function of the time index ``t`` of the state that
        the step starts from.
    :param float cap: The largest tilt, as a difference between a token and the mean of them all
        under the relaxed prediction; ``None`` for no limit.
    :param int chunk_size: At most so many sequences are differentiated at once; all by default.
    :raises ValueError: If the model is not a masked one, or an option is out of range.

    **References**

    [1] `Inference-Time Scaling of Discrete Diffusion Models via Importance Weighting and ...`
        Zijing Ou, Chinmay Pani, Yingzhen Li (2025), https://arxiv.org/abs/2505.22524
    """

    def __init__(
        self,
        model: Any,
        relaxed: Callable[[Tensor], Tensor],
        *,
        strength: Strength = 1.0,
        cap: float | None = None,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__(model)
        check_masked(model, type(self).__name__)
        if chunk_size is not None:
            check_counts(chunk_size=chunk_size)
        if not callable(relaxed):
            raise ValueError(
                f"relaxed={relaxed!r}; give a differentiable function of token probabilities of "
                "shape (B, length, vocab_size) that returns B numbers"
            )
        _check_strength(strength, cap)
        # not a submodule: its parameters are none of the twist's
        self._relaxed = (relaxed,)
        self.strength, self.cap, self.chunk_size = strength, cap, chunk_size
        self._num_gradients = 0

    @property
    def counts(self) -> dict[str, int]:
        """Sequences for which the reward was differentiated so far."""
        return {"gradient": self._num_gradients}

    def get_posterior(self, name: str, prior: Any) -> Any:
        """The prior with tilted tokens."""
        kernel = prior if self.base_kernel is None else self.base_kernel
        args = self.args_kwargs[0]
        if not self.stepping or not isinstance(prior, Unmasking) or len(args) < 2:
            return prior
        strength = _at(self.strength, int(args[1]))
        if strength == 0 or len(kernel.rows) == 0:
            return prior
        return tilt(prior, strength * self.eta(kernel))

    def eta(self, kernel: Unmasking) -> Tensor:
        """
        The tilt of a kernel, without the strength.

        :param Unmasking kernel: The model's own kernel.
        :returns: Of the shape of ``kernel.tokens`` with ``vocab_size`` on the right; 0 at positions
            that are not masked.
        :rtype: Tensor
        """
        shape = tuple(kernel.tokens.shape)
        probs = relaxed_tokens(kernel).reshape(-1, shape[-1], kernel.vocab_size)
        masked = torch.zeros(probs.shape[:2], dtype=torch.bool, device=probs.device)
        masked.view(-1)[kernel.rows] = True
        size = self.chunk_size or max(len(probs), 1)
        pairs = zip(probs.split(size), masked.split(size), strict=True)
        eta = torch.cat([self._tilt(*pair) for pair in pairs])
        return eta.reshape(*shape, kernel.vocab_size)

    def _tilt(self, probs: Tensor, masked: Tensor) -> Tensor:
        """The gradient at masked positions, less its mean, which no law of tokens sees."""
        gradient = self._gradient(probs)
        gradient = gradient - (probs * gradient).sum(-1, keepdim=True)
        if self.cap is not None:
            gradient = gradient.clamp(-self.cap, self.cap)
        return torch.where(masked[..., None], gradient, 0.0)

    def _gradient(self, probs: Tensor) -> Tensor:
        self._num_gradients += len(probs)
        with torch.enable_grad():
            probs = probs.detach().requires_grad_()
            value = self._relaxed[0](probs)
            _check_value(value, len(probs))
            (gradient,) = torch.autograd.grad(value.sum(), probs)
        if not torch.isfinite(gradient).all():
            raise ValueError(
                "the gradient of the relaxed reward is not finite. Probabilities of tokens can be "
                "0: clamp what the reward takes logarithms of or divides by."
            )
        found: Tensor = gradient
        return found


def relaxed_tokens(kernel: Unmasking) -> Tensor:
    """
    The relaxed prediction: the probabilities of tokens at every position.

    :param Unmasking kernel: A kernel.
    :returns: Of the shape of ``kernel.tokens`` with ``vocab_size`` on the right, in torch's default
        dtype.
    :rtype: Tensor
    """
    tokens, dtype = kernel.tokens, torch.get_default_dtype()
    probs = torch.zeros((tokens.numel(), kernel.vocab_size), dtype=dtype, device=tokens.device)
    probs.scatter_(1, tokens.reshape(-1, 1), 1.0)
    for part, log_probs in kernel.chunks():
        probs[kernel.rows[part]] = log_probs.exp().to(dtype)
    return probs.reshape((*tokens.shape, kernel.vocab_size))


def _check_value(value: Any, size: int) -> None:
    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if shape != (size,):
        raise ValueError(
            f"relaxed returned {shape} for probabilities of {size} sequences; return one number "
            f"each, of shape ({size},)"
        )
    if not value.requires_grad:
        raise ValueError(
            "relaxed has no gradient in the token probabilities: it is computed outside of torch, "
            "detached, or takes the likeliest tokens. Use TokenTilt, which learns from values."
        )
