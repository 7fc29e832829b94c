# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""
Networks over tokens: calling them on a batch of any shape, splitting off the output layer, loading.

The output layer of a language model turns hidden states into logits over the vocabulary, which are
by far the largest tensor of all. :class:`SplitNetwork` runs a model up to there, without a change
to it: for the time of the call a hook takes the layer's input down and hands it an empty slice.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_twist.diffusion.denoiser import BatchedDenoiser, Rows
from pyro_twist.positions import num_positions

__all__ = ["OutputLayerError", "SplitNetwork", "TokenDenoiser", "load_masked_lm", "split_network"]

Head = Callable[[Tensor], Tensor]


class OutputLayerError(ValueError):
    """A network does not call what was taken for its output layer exactly once."""


class SplitNetwork(torch.nn.Module):
    """
    A network up to its output layer.

    :param torch.nn.Module network: Returns logits for tokens of shape ``(rows, length)``.
    :param torch.nn.Module layer: The submodule that maps hidden states to logits. What comes after
        it, if anything, is left out.
    """

    def __init__(self, network: torch.nn.Module, layer: torch.nn.Module) -> None:
        super().__init__()
        self.network, self.layer = network, layer

    def forward(self, tokens: Tensor, **inputs: Any) -> Tensor:
        """
        The hidden states in front of the output layer.

        :param Tensor tokens: Of shape ``(rows, length)``.
        :param inputs: Further arguments of the network.
        :returns: Of shape ``(rows, length, width)``.
        :rtype: Tensor
        :raises OutputLayerError: If the network does not call the layer exactly once.
        """
        found: list[Tensor] = []

        def taken(module: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
            found.append(given[0])
            return (given[0][..., :0, :], *given[1:])

        handle = self.layer.register_forward_pre_hook(taken)
        try:
            self.network(tokens, **inputs)
        finally:
            handle.remove()
        if len(found) != 1:
            raise OutputLayerError(
                f"{type(self.network).__name__} called {type(self.layer).__name__}, taken for its "
                f"output layer, {len(found)} times; name another submodule with head="
            )
        return found[0]


def split_network(
    denoiser: Callable[..., Any], head: Head | str | None
) -> tuple[Callable[..., Any], Head | None]:
    """
    Splits a network in front of its output layer, if that is known.

    :param callable denoiser: A network over tokens.
    :param head: The output layer of a network that stops before it; the name of the submodule
        that is the output layer; or ``None`` for what a transformers model says itself.
    :returns: A function of tokens to hidden states and the output layer; or of tokens to logits
        and ``None``.
    :rtype: tuple
    :raises ValueError: If there is no such submodule, or the network is in training mode.
    """
    check_evaluating(denoiser)
    if callable(head):
        return denoiser, head
    layer = _output_layer(denoiser) if head is None else _submodule(denoiser, head)
    if layer is None or not isinstance(denoiser, torch.nn.Module):
        return denoiser, None
    return SplitNetwork(denoiser, layer), layer


def check_evaluating(network: Any) -> None:
    """
    Refuses dropout: its predictions are no function of the input.

    :param network: Anything; only modules are checked.
    :raises ValueError: If it is in training mode, with dropout.
    """
    modules = network.modules() if isinstance(network, torch.nn.Module) else ()
    active = [m for m in modules if isinstance(m, torch.nn.Dropout) and m.training and m.p > 0]
    if active:
        raise ValueError(
            f"{type(network).__name__} is in training mode, with dropout: its "
            "predictions would be random. Call .eval() on it first."
        )


def _output_layer(network: Any) -> torch.nn.Module | None:
    """The output layer of a model that says what it is, as those of transformers do."""
    find = getattr(network, "get_output_embeddings", None)
    layer = None if find is None else find()
    return layer if isinstance(layer, torch.nn.Module) else None


def _submodule(network: Any, name: str) -> torch.nn.Module:
    if not isinstance(network, torch.nn.Module):
        raise ValueError(
            f"head={name!r} is the name of a submodule, but the denoiser is no torch.nn.Module; "
            "give a function of hidden states instead"
        )
    modules = dict(network.named_modules())
    if name not in modules:
        last = ", ".join(list(modules)[-4:])
        raise ValueError(f"head={name!r} is no submodule of the denoiser; its last are {last}")
    return modules[name]


class TokenDenoiser(BatchedDenoiser):
    """
    A network over tokens, evaluated for some sequences of a batch of any shape.

    :param callable network: ``network(tokens, **conditioning)`` with ``tokens`` of shape
        ``(rows, length)``; returns a tensor of shape ``(rows, length, any)``, an object with it as
        ``.logits``, or a tuple that starts with it.
    :param torch.Size event_shape: ``(length,)``.
    :param int vocab_size: The last size of what the network returns; ``None`` if it is not known.
    :param dict conditioning: Further arguments of the network; tensors have an entry per sequence.
    :param int chunk_size: At most this many sequences per call.
    """

    def __init__(
        self,
        network: Callable[..., Any],
        event_shape: torch.Size,
        *,
        vocab_size: int | None,
        conditioning: Mapping[str, Any],
        chunk_size: int | None = None,
    ) -> None:
        super().__init__(network, event_shape, conditioning=conditioning, chunk_size=chunk_size)
        self.vocab_size = vocab_size
        self._arguments = _arguments(network)

    def evaluate(self, tokens: Tensor, index: Tensor, state: Mapping[Any, Any]) -> Tensor:
        """
        Evaluates the network for some sequences.

        :param Tensor tokens: Of shape ``batch_shape + (length,)``.
        :param Tensor index: Which of the flattened batch.
        :param state: Where entries that take precedence over the conditioning are looked up.
        :returns: Of shape ``(len(index), length, any)``.
        :rtype: Tensor
        """
        given = {name: state.get(name, value) for name, value in self.conditioning.items()}
        inputs = {
            name: value.at(index) if isinstance(value, Rows) else value
            for name, value in self._expand(given, tokens.shape[:-1]).items()
        }
        rows = tokens.reshape((-1,) + self.event_shape)[index]
        output = self._evaluate(rows, 0.0, inputs)
        self.num_rows += len(rows)
        return output

    def _call(self, rows: Tensor, timestep: float, conditioning: dict[str, Any]) -> Tensor:
        device = self.device
        inputs = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in conditioning.items()
        }
        output = _tensor_of(self.network(rows.to(device), **{**self._usual(rows), **inputs}))
        expected = tuple(rows.shape) + (self.vocab_size,)
        if output.shape[:-1] != rows.shape or self.vocab_size not in (None, output.shape[-1]):
            raise ValueError(
                f"the denoiser returned shape {tuple(output.shape)} for {len(rows)} sequences of "
                f"length {self.event_shape[0]}; expected {expected}; is vocab_size right, with the "
                "mask token counted?"
            )
        return output.to(rows.device)

    def _usual(self, rows: Tensor) -> dict[str, Any]:
        """Arguments that masked language models have and that are the same for all."""
        usual: dict[str, Any] = {}
        if "attention_mask" in self._arguments:
            usual["attention_mask"] = torch.ones_like(rows, device=self.device)
        if "timesteps" in self._arguments:
            usual["timesteps"] = torch.zeros(len(rows), device=self.device)
        return usual


def _arguments(network: Any) -> frozenset[str]:
    """The names of a network's arguments."""
    if isinstance(network, SplitNetwork):
        network = network.network
    call = network.forward if isinstance(network, torch.nn.Module) else network
    try:
        return frozenset(inspect.signature(call).parameters)
    except (TypeError, ValueError):
        return frozenset()


def _tensor_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return output[0]
    raise ValueError(
        f"the denoiser returned {type(output).__name__}; expected a tensor, an object with the "
        "tensor as .logits, or a tuple that starts with it"
    )


# Loading


def load_masked_lm(
    path: str | Path,
    tokenizer: Any,
    trust_remote_code: bool,
    dtype: torch.dtype | None,
    length: int | None,
    options: MutableMapping[str, Any],
) -> dict[str, Any]:
    """
    The arguments of :class:`~pyro_twist.diffusion.MaskedDiffusion` for a pretrained model.

    Parameters are those of :meth:`~pyro_twist.diffusion.MaskedDiffusion.from_pretrained`.

    :returns: The arguments by name.
    :rtype: dict
    :raises ValueError: If the model predicts no masked tokens, or something is not known.
    """
    from transformers import AutoConfig

    if "denoiser" in options:
        raise ValueError(
            f"denoiser={type(options['denoiser']).__name__}: it is what is loaded from {path}; "
            "leave it out, or give it to MaskedDiffusion itself"
        )
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    kind = _auto_class(config, path)
    model = kind.from_pretrained(
        path, config=config, trust_remote_code=trust_remote_code, use_safetensors=True
    ).eval()
    if dtype is not None:
        model = model.to(dtype)
    if tokenizer is None:
        tokenizer = _tokenizer(path, trust_remote_code)
    found = dict(options)
    if kind.__name__ == "AutoModel" and not {"num_inference_steps", "schedule"} & options.keys():
        found.setdefault("unmasking", "uniform")
    found["denoiser"] = model
    found["length"] = _length(length, found.get("prompt"), model, tokenizer)
    found.setdefault("vocab_size", _vocab_size(model, config))
    found.setdefault("mask_token_id", _mask_token_id(tokenizer, config, path))
    if tokenizer is not None:
        found.setdefault("decoder", _Decoder(tokenizer))
        found.setdefault("forbidden_token_ids", _unspoken(tokenizer, found["vocab_size"]))
    return found


def _unspoken(tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """Tokens that no text has: those beyond the tokenizer, and the one for what is unknown."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    beyond = range(min(len(tokenizer), vocab_size), vocab_size)
    return (*beyond,) if unknown is None else (unknown, *beyond)


def _auto_class(config: Any, path: Any) -> Any:
    """Which of transformers' classes loads a model."""
    from transformers import AutoModel, AutoModelForMaskedLM

    remote = getattr(config, "auto_map", None) or {}
    if type(config) in AutoModelForMaskedLM._model_mapping or "AutoModelForMaskedLM" in remote:
        return AutoModelForMaskedLM
    if "AutoModel" in remote:
        return AutoModel
    raise ValueError(
        f"{path} is a {config.model_type!r} model, which transformers does not load for masked "
        "language modelling. A model of left-to-right text predicts no masked tokens; others can "
        "be given to MaskedDiffusion as a denoiser."
    )


def _tokenizer(path: Any, trust_remote_code: bool) -> Any:
    """The tokenizer that is saved with the model, if one is."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError):
        return None


def _length(length: int | None, prompt: Any, model: Any, tokenizer: Any) -> int:
    most = num_positions(model)
    if length is None and prompt is not None and not isinstance(prompt, str):
        length = int(torch.as_tensor(prompt).shape[-1])
    if length is None and most is not None:
        # a tokenizer that does not know says a number without meaning
        return min(most, int(min(getattr(tokenizer, "model_max_length", most), 2**31)))
    if length is None:
        raise ValueError("the model does not say how long its sequences are; give length=")
    return length


def _vocab_size(model: Any, config: Any) -> int:
    weight = getattr(_output_layer(model), "weight", None)
    size = getattr(config, "vocab_size", None) if weight is None else weight.shape[0]
    if size is None:
        raise ValueError("the model does not say how many tokens it has; give vocab_size=")
    return int(size)


def _mask_token_id(tokenizer: Any, config: Any, path: Any) -> int:
    for source in (tokenizer, config):
        found = getattr(source, "mask_token_id", None)
        if found is not None:
            return int(found)
    raise ValueError(f"neither tokenizer nor config of {path} names a mask; give mask_token_id=")


class _Decoder:
    """Sequences to strings, special tokens left out."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: Tensor) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return texts
