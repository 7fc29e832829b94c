# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Loading masked models whose samples are strings, with tiny untrained ones."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch

from pyro_twist import zoo
from pyro_twist.zoo import catalogue
from pyro_twist.zoo.sequences import selfies_to_smiles
from tests.zoo.tiny import LENGTH, write_tiny


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo of tiny models."""
    for kind in LENGTH:
        write_tiny(tmp_path, kind)
    monkeypatch.setattr(catalogue, "ROOT", tmp_path)
    return tmp_path


def draw(model: Any, number: int = 8) -> torch.Tensor:
    dim = -1 if model.plate is None else -2
    with torch.no_grad(), pyro.plate("samples", number, dim=dim):
        x: torch.Tensor = model()
    return x


def test_models_of_strings_are_in_the_zoo(root: Path) -> None:
    assert list(zoo.models()) == ["molecules", "text", "antiberty", "sapiens"]
    about = zoo.entry("text")
    assert about.kind == "text" and about.classes == () and about.num_inference_steps is None
    assert zoo.entry("sapiens").kind == "antibodies"
    for part in (zoo.classifier, zoo.judge, zoo.images):
        with pytest.raises(ValueError, match="name='text' is a model of text; try a model of im"):
            part("text")


def test_texts(root: Path) -> None:
    model = zoo.load("text")
    assert model.num_inference_steps == LENGTH["text"] and model.unmasking == "uniform"
    assert tuple(model.event_shape) == (LENGTH["text"],) and model.temperature == 0.5
    x = draw(model)
    assert x.shape == (8, LENGTH["text"])
    texts = model.decode(x)
    assert len(texts) == 8 and all(isinstance(text, str) for text in texts)
    assert not any(mark in text for text in texts for mark in ("[", "##", "_"))
    # what is unknown or masked is never drawn
    tokenizer = model.decoder.tokenizer
    assert not torch.isin(x, torch.tensor([tokenizer.unk_token_id, tokenizer.mask_token_id])).any()
    parameters = list(model.denoiser.network.parameters())
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in parameters)


def test_texts_end_with_their_first_end(root: Path) -> None:
    decode = zoo.load("text").decode
    tokenizer = zoo.load("text").decoder.tokenizer
    rows = [tokenizer(one, padding="max_length")["input_ids"] for one in ("the film", "it's bad!")]
    rows.append(rows[0][:2] + [tokenizer.pad_token_id] + rows[1][:5])
    assert decode(torch.tensor(rows)) == ["the film", "it's bad", "the film"]


def test_prompts_of_texts(root: Path) -> None:
    model = zoo.load("text", prompt="the _ was")
    tokens = draw(model)
    tokenizer = model.decoder.tokenizer
    first, third = (tokenizer.convert_tokens_to_ids(word) for word in ("the", "was"))
    assert (tokens[:, 0] == first).all() and (tokens[:, 2] == third).all()
    assert len(tokens[:, 1].unique()) > 1 and len(tokens[:, 3].unique()) > 1
    several = zoo.load("text", prompt=["i love", "i hate"], num_inference_steps=3)
    assert several.unmasking == "ancestral" and several.num_inference_steps == 3
    assert several.plate == ("prompts", 2)
    x = draw(several)
    assert x.shape == (8, 2, LENGTH["text"])
    words = several.decode(x)
    assert len(words) == 8
    assert all(one.startswith("i love") and two.startswith("i hate") for one, two in words)
    with pytest.raises(ValueError, match="prompt='the cat' has a sign that the model does not kn"):
        zoo.load("text", prompt="the cat")
    with pytest.raises(ValueError, match="has 8 word pieces; give 1 to 7"):
        zoo.load("text", prompt="the film was very very very very good")
    with pytest.raises(ValueError, match="prompt='' has 0 word pieces"):
        zoo.load("text", prompt="")


def test_free_word_pieces_beside_punctuation(root: Path) -> None:
    model = zoo.load("text", prompt="the _, was")
    tokenizer = model.decoder.tokenizer
    ids = tokenizer("the [MASK] , was", add_special_tokens=False)["input_ids"]
    assert model.prompt[:4].tolist() == ids and ids[1] == tokenizer.mask_token_id


WRONG_PROMPTS: list[tuple[Any, str]] = [
    ([], r"prompt=\[\]; give a text, a list of at least one, or tokens"),
    (5, "prompt=5; give a text"),
    (["the film", 5], "give a text, a list of at least one"),
    ("the __ film", "has '_' beside a letter or another"),
    ("the_film", "has '_' beside a letter or another"),
    ("the [SEP] film", r"has \[SEP\], with which a text ends; leave that out"),
    ("the [PAD]", r"has \[PAD\], with which"),
]


@pytest.mark.parametrize("prompt, message", WRONG_PROMPTS)
def test_wrong_prompts_are_refused(root: Path, prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zoo.load("text", prompt=prompt)


def test_options_that_the_loader_sets_itself(root: Path) -> None:
    """Those for the user to say are taken, those that the model says are refused by name."""
    tokenizer = zoo.load("text").decoder.tokenizer
    the = tokenizer.convert_tokens_to_ids("the")
    model = zoo.load("text", forbidden_token_ids=[the], decoder=None, dtype=torch.float64)
    assert {the, tokenizer.unk_token_id} <= set(model.forbidden)
    x = draw(model, 3)
    assert model.decode(x) is x and (x != the).all()
    assert next(model.denoiser.network.parameters()).dtype == torch.float64
    for name, value in (("length", 9), ("vocab_size", 3), ("tokenizer", "mine")):
        with pytest.raises(ValueError, match=f"{name}={value!r}: the model has its own; leave it"):
            zoo.load("text", **{name: value})


def test_molecules(root: Path) -> None:
    model = zoo.load("molecules", num_inference_steps=4)
    assert model.num_inference_steps == 4
    smiles = model.decode(draw(model, 32))
    from rdkit import Chem

    assert len({one for one in smiles if one}) > 3
    for one in filter(None, smiles):
        assert Chem.MolToSmiles(Chem.MolFromSmiles(one)) == one
    with pytest.raises(ValueError, match="molecules are prompted with tokens"):
        zoo.load("molecules", prompt="[C]")
    prompt = torch.full((LENGTH["molecules"],), model.mask_token_id)
    prompt[0] = 7
    assert (draw(zoo.load("molecules", prompt=prompt))[:, 0] == 7).all()


def test_selfies_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert selfies_to_smiles("[C][C][O]") == selfies_to_smiles("[O][C][C]") == "CCO"
    assert selfies_to_smiles("") == ""
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "selfies":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'pyro-twist\[molecules\]'"):
        selfies_to_smiles("[C][C][C]")


@pytest.mark.parametrize(
    ("option", "value"), [("label", 3), ("guidance_scale", 2.0), ("scheduler", "ddim")]
)
def test_options_of_images_are_refused(root: Path, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{option} is for models of images, which 'text' is not"):
        zoo.load("text", **{option: value})


def test_uniform_unmasking_has_its_own_number_of_steps(root: Path) -> None:
    assert zoo.load("text", unmasking="uniform", group_size=3).num_inference_steps == 3
    with pytest.raises(ValueError, match="num_inference_steps=2 goes with unmasking='ancestral'"):
        zoo.load("text", unmasking="uniform", num_inference_steps=2)


def test_tokens_of_molecules_are_named_in_selfies() -> None:
    decoder: Any = zoo.load("molecules").decoder
    names = [decoder.token_name(token) for token in range(40)]
    assert names[:3] == ["[PAD]", "[MASK]", "[END]"]
    assert all(name.isascii() and name.startswith("[") and name.endswith("]") for name in names)
