# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Masked language models of transformers, and networks of their own kind, as denoisers."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn

from pyro_twist import MaskedDiffusion
from pyro_twist.diffusion.maskedlm import SplitNetwork, split_network

LENGTH = 7
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
MASK, SIZE = 4, len(WORDS)
COMMON: dict[str, Any] = {
    "vocab_size": SIZE,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}


def make_network(name: str) -> Any:
    """A tiny network of random weights."""
    import transformers as hf

    torch.manual_seed(0)
    configs: dict[str, Any] = {
        "bert": lambda: hf.BertConfig(**COMMON),
        "roberta": lambda: hf.RobertaConfig(**COMMON),
        "modernbert-eager": lambda: modernbert("eager"),
        "modernbert-sdpa": lambda: modernbert("sdpa"),
        "distilbert": lambda: hf.DistilBertConfig(
            vocab_size=SIZE,
            dim=16,
            n_layers=2,
            n_heads=2,
            hidden_dim=24,
            max_position_embeddings=16,
        ),
        "albert": lambda: hf.AlbertConfig(**COMMON, embedding_size=8),
        "megatron": lambda: hf.MegatronBertConfig(**COMMON),
        # a bias is added after the output layer
        "esm": lambda: hf.EsmConfig(**COMMON, mask_token_id=MASK, position_embedding_type="rotary"),
        # the output layer's weights are used without a call of it
        "mobilebert": lambda: hf.MobileBertConfig(
            **COMMON, embedding_size=8, intra_bottleneck_size=16
        ),
    }
    model = hf.AutoModelForMaskedLM.from_config(configs[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def modernbert(attention: str) -> Any:
    import transformers as hf

    return hf.ModernBertConfig(
        **COMMON,
        attn_implementation=attention,
        local_attention=4,
        cls_token_id=2,
        sep_token_id=3,
        bos_token_id=2,
        eos_token_id=3,
    )


NETWORKS = [
    "bert",
    "roberta",
    "modernbert-eager",
    "modernbert-sdpa",
    "distilbert",
    "albert",
    "megatron",
]


def make_tokens() -> Tensor:
    """Random sequences in which some positions are masks and some padding."""
    tokens = torch.randint(0, SIZE, (5, LENGTH))
    tokens[:, 2] = MASK
    tokens[:3, -1] = 0
    return tokens


@pytest.mark.parametrize("name", NETWORKS)
def test_split_is_exact(name: str) -> None:
    network, tokens = make_network(name), make_tokens()
    split, head = split_network(network, None)
    everywhere = torch.ones_like(tokens)
    with torch.no_grad():
        expected = network(tokens, attention_mask=everywhere).logits
        hidden = split(tokens, attention_mask=everywhere)
        assert head is not None
        assert torch.equal(head(hidden), expected)
        # the network itself is as it was
        assert torch.equal(network(tokens, attention_mask=everywhere).logits, expected)
        rows = head(hidden[:, 2])
    assert hidden.dim() == 3 and hidden.shape[:2] == tokens.shape
    assert torch.allclose(rows, expected[:, 2], atol=1e-5)


#: Models whose logits are not what their output layer returns, so that they are not split.
WHOLE = ["esm", "mobilebert"]


@pytest.mark.parametrize("name", NETWORKS + WHOLE)
def test_kernels_are_the_softmax_of_the_logits(name: str) -> None:
    network = make_network(name)
    model = MaskedDiffusion(network, LENGTH, SIZE, MASK, num_inference_steps=3, chunk_size=3)
    assert model.counts == {"denoiser": 0}
    state: dict[str, Tensor] = {}
    tokens = make_tokens()
    model._write(state, 2, tokens)
    assert set(state) == {"x", "logits" if name in WHOLE else "hidden"}
    kernel = model.kernel(state, 2)
    with torch.no_grad():
        logits = network(tokens, attention_mask=torch.ones_like(tokens)).logits.double()
    logits[..., MASK] = -torch.inf
    expected = logits.log_softmax(-1)[tokens == MASK]
    [(_, found)] = list(kernel.chunks())
    assert torch.allclose(found.exp(), expected.exp(), atol=1e-6)
    with pyro.plate("particles", 4):
        assert (model() != MASK).all()


def test_no_logits_of_all_positions_ever_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_network("bert")
    seen: list[int] = []
    network.get_output_embeddings().register_forward_hook(
        lambda module, given, output: seen.append(output.numel() // SIZE)
    )
    model = MaskedDiffusion(network, LENGTH, SIZE, MASK, num_inference_steps=4)
    seen.clear()
    with pyro.plate("particles", 6):
        model()
    assert sum(seen) == 6 * LENGTH, "the head is applied once to every position"


def test_half_precision() -> None:
    model = MaskedDiffusion(make_network("bert").bfloat16(), LENGTH, SIZE, MASK)
    state: dict[str, Tensor] = {}
    model.init(state)
    assert state["hidden"].dtype == torch.bfloat16
    assert model.kernel(state, 50).log_prob(state["x"]).dtype == torch.float64


class MdlmLike(nn.Module):
    """The shape of MDLM's network: a second argument ``timesteps``, no output embeddings."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.ModuleDict(
            {"embed": nn.Embedding(SIZE, 8), "output_layer": nn.Linear(8, SIZE)}
        )

    def forward(self, input_ids: Tensor, timesteps: Tensor, return_dict: bool = False) -> Any:
        assert timesteps.shape == input_ids.shape[:1] and not timesteps.any()
        embedded = self.backbone["embed"](input_ids)
        hidden = embedded + embedded.mean(1, keepdim=True)
        return SimpleNamespace(logits=self.backbone["output_layer"](hidden))


class LladaLike(nn.Module):
    """The shape of LLaDA's: a causal model's class, attending everywhere."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.lm_head = nn.Embedding(SIZE, 8), nn.Linear(8, SIZE, bias=False)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        assert attention_mask is not None and attention_mask.all()
        return SimpleNamespace(logits=self.lm_head(self.block(self.wte(input_ids))))


def test_mdlm_like_network() -> None:
    network = MdlmLike().eval()
    dense = MaskedDiffusion(network, LENGTH, SIZE, MASK, num_inference_steps=4)
    split = MaskedDiffusion(
        network, LENGTH, SIZE, MASK, num_inference_steps=4, head="backbone.output_layer"
    )
    paths, states = [], []
    for model in (dense, split):
        torch.manual_seed(1)
        state: dict[str, Tensor] = {}
        with pyro.plate("particles", 6):
            model.init(state)
            model.step(state, 4)
            states.append(set(state))
            for t in (3, 2, 1):
                model.step(state, t)
        paths.append(state["x"])
    assert states == [{"x", "logits"}, {"x", "hidden"}]
    assert torch.equal(*paths)


def test_llada_like_network() -> None:
    model = MaskedDiffusion(
        LladaLike().eval(), LENGTH, SIZE, MASK, unmasking="uniform", group_size=2
    )
    assert model.timesteps == (4, 3, 2, 1)
    with pyro.plate("particles", 6):
        assert (model() != MASK).all()


def test_wrong_output_layers_are_refused() -> None:
    network = make_network("bert")
    with pytest.raises(ValueError, match="head='cls.nothing' is no submodule of the denoiser"):
        MaskedDiffusion(network, LENGTH, SIZE, MASK, head="cls.nothing")
    twice = nn.Sequential(nn.Embedding(SIZE, SIZE))
    twice.append(layer := nn.Linear(SIZE, SIZE))
    twice.append(layer)
    with pytest.raises(ValueError, match="called Linear, taken for its output layer, 2 times"):
        SplitNetwork(twice, layer)(make_tokens())
    with pytest.raises(ValueError, match=r"the denoiser returned shape .*is vocab_size right"):
        MaskedDiffusion(network, LENGTH, 99, MASK, num_inference_steps=1)
    with pytest.raises(ValueError, match="logits are not those of its submodule head='lm_head.de"):
        MaskedDiffusion(make_network("esm"), LENGTH, SIZE, MASK, head="lm_head.decoder")


# Folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with its tokenizer, as it would be downloaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("bert")
    make_network("bert").save_pretrained(path)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    tokenizer.save_pretrained(path)
    return path


def test_from_pretrained(folder: Path) -> None:
    model = MaskedDiffusion.from_pretrained(folder, LENGTH, num_inference_steps=3)
    assert (model.vocab_size, model.mask_token_id) == (SIZE, MASK)
    assert model.event_shape == (LENGTH,) and len(model.timesteps) == 3
    with pyro.plate("particles", 3):
        x = model()
    texts = model.decode(x)
    assert len(texts) == 3
    for text, row in zip(texts, x.tolist()):
        assert text.split() == [WORDS[token] for token in row if token > 4]
    network = model.denoiser.network
    assert isinstance(network, SplitNetwork) and not network.network.training
    # never what no text has: tokens beyond the tokenizer's, and the one for what is unknown
    silent = {WORDS.index("[UNK]"), *range(len(WORDS), SIZE)}
    assert silent <= set(torch.as_tensor(model.forbidden).tolist())


def test_from_pretrained_options(folder: Path) -> None:
    prompt = torch.full((5,), MASK)
    model = MaskedDiffusion.from_pretrained(
        folder, prompt=prompt, unmasking="uniform", dtype=torch.bfloat16, decoder=len
    )
    assert model.event_shape == (5,) and model.unmasking == "uniform" and model.decoder is len
    state: dict[str, Tensor] = {}
    model.init(state)
    assert state["hidden"].dtype == torch.bfloat16
    assert MaskedDiffusion.from_pretrained(folder).event_shape == (16,)


def test_the_length_is_that_of_the_model(folder: Path, tmp_path: Path) -> None:
    """RoBERTa counts positions from behind the padding token."""
    from transformers import AutoTokenizer, RobertaConfig, RobertaForMaskedLM

    config = RobertaConfig(
        vocab_size=SIZE,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
        pad_token_id=1,
    )
    RobertaForMaskedLM(config).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path)
    model = MaskedDiffusion.from_pretrained(tmp_path, num_inference_steps=2)
    assert model.event_shape == (10,)
    model()
    tokenizer.model_max_length = 7
    tokenizer.save_pretrained(tmp_path)
    assert MaskedDiffusion.from_pretrained(tmp_path).event_shape == (7,)
    assert MaskedDiffusion.from_pretrained(tmp_path, 9).event_shape == (9,)


def test_esm_wants_its_frame(tmp_path: Path) -> None:
    """With token dropout nothing but masks has no prediction, and the error says where."""
    from transformers import EsmConfig, EsmForMaskedLM

    config = EsmConfig(
        vocab_size=SIZE,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=20,
        position_embedding_type="rotary",
        token_dropout=True,
        mask_token_id=MASK,
        pad_token_id=0,
    )
    network = EsmForMaskedLM(config).eval()
    with pytest.raises(ValueError, match="the logits of sequence .* have the maximum nan"):
        MaskedDiffusion(network, 6, SIZE, MASK, num_inference_steps=2)()
    frame = torch.tensor([2, MASK, MASK, MASK, MASK, 3])
    x = MaskedDiffusion(
        network, 6, SIZE, MASK, prompt=frame, num_inference_steps=2, forbidden_token_ids=(2, 3)
    )()
    assert x[0] == 2 and x[-1] == 3 and not torch.isin(x[1:-1], torch.tensor([2, 3, MASK])).any()


def test_what_is_loaded_is_not_given(folder: Path) -> None:
    with pytest.raises(ValueError, match="denoiser=.*: it is what is loaded from"):
        MaskedDiffusion.from_pretrained(folder, denoiser=make_network("bert"))


def test_weights_are_read_from_safetensors_only(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(make_network("bert").state_dict(), tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        MaskedDiffusion.from_pretrained(tmp_path / "model", LENGTH)


def test_models_of_left_to_right_text_are_refused(tmp_path: Path) -> None:
    import transformers as hf

    hf.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'gpt2' model, which transformers does not load"):
        MaskedDiffusion.from_pretrained(tmp_path, LENGTH)


REMOTE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput


class TinyConfig(PretrainedConfig):
    model_type = "tiny_{kind}"

    def __init__(self, vocab_size=13, mask_token_id=4, **options):
        self.vocab_size, self.mask_token_id = vocab_size, mask_token_id
        super().__init__(**options)


class Tiny(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.vocab_size, 8)
        self.out = torch.nn.Linear(8, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, {argument}=None):
        assert {argument} is not None
        hidden = self.embed(input_ids)
        return MaskedLMOutput(logits=self.out(hidden + hidden.mean(1, keepdim=True)))
"""


@pytest.mark.parametrize(
    "kind, auto, argument, unmasking",
    [
        ("mdlm", "AutoModelForMaskedLM", "timesteps", "ancestral"),
        ("llada", "AutoModel", "attention_mask", "uniform"),
    ],
)
def test_code_of_their_own(
    kind: str, auto: str, argument: str, unmasking: str, tmp_path: Path
) -> None:
    """It is run only if one says so; MDLM's kind gets times, LLaDA's is revealed in groups."""
    from safetensors.torch import save_file

    (tmp_path / "modeling.py").write_text(REMOTE.format(kind=kind, argument=argument))
    (tmp_path / "config.json").write_text(
        f'{{"model_type": "tiny_{kind}", "auto_map": {{"AutoConfig": "modeling.TinyConfig", '
        f'"{auto}": "modeling.Tiny"}}}}'
    )
    weights = {"embed.weight": torch.randn(13, 8)}
    weights |= {"out.weight": torch.randn(13, 8), "out.bias": torch.zeros(13)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="trust_remote_code"):
        MaskedDiffusion.from_pretrained(tmp_path, LENGTH)
    options: dict[str, Any] = {"trust_remote_code": True, "head": "out"}
    model = MaskedDiffusion.from_pretrained(tmp_path, LENGTH, **options)
    assert (model.unmasking, model.mask_token_id, model.vocab_size) == (unmasking, 4, 13)
    with pyro.plate("particles", 3):
        x = model()
    assert (x != 4).all() and torch.equal(model.decode(x), x)
    model = MaskedDiffusion.from_pretrained(tmp_path, LENGTH, num_inference_steps=2, **options)
    assert model.unmasking == "ancestral" and model.num_inference_steps == 2


def test_dropout_is_refused() -> None:
    network = make_network("bert").train()
    with pytest.raises(ValueError, match="training mode"):
        MaskedDiffusion(network, LENGTH, SIZE, MASK)
