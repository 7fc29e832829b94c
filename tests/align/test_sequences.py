# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The main job on molecules, texts and antibodies, with tiny untrained models of the first two."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyro_twist import align
from pyro_twist.align import AlignOptions, OptionError, Outcome, find_domain
from pyro_twist.align.rewardoptions import parse_options
from pyro_twist.align.sequences import jaccard_distances, parts_of
from pyro_twist.zoo import catalogue
from tests.zoo.test_antibodies import HUMAN, needs
from tests.zoo.tiny import LENGTH, write_tiny

SIZE = 8
METHODS = ("base", "best-of-n", "fk", "tri-tsmc")


def has(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) for module in modules)


needs_molecules = pytest.mark.skipif(not has("rdkit", "selfies"), reason="no RDKit or selfies")
needs_vader = pytest.mark.skipif(not has("vaderSentiment"), reason="no VADER")


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("zoo")
    for kind in LENGTH:
        write_tiny(root, kind)
    return root


@pytest.fixture(autouse=True)
def root(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo of tiny models."""
    monkeypatch.setattr(catalogue, "ROOT", shipped)
    return shipped


def run(tmp_path: Path, model: str, **options: Any) -> Outcome:
    given = {"model": model, "particles": SIZE, "out": tmp_path / "out", **options}
    return align.run(AlignOptions(**given))


def long(texts: list[str]) -> list[float]:
    """A reward of a user's own."""
    return [float(len(text)) for text in texts]


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "model", [pytest.param("molecules", marks=needs_molecules), pytest.param("text")]
)
def test_the_job_on_strings(model: str, tmp_path: Path) -> None:
    outcome = run(tmp_path, model, rewards=(long,), methods=METHODS)
    assert [arm.method.name for arm in outcome.arms] == list(METHODS)
    for arm in outcome.arms:
        assert arm.samples.shape == (SIZE, 1)
        lengths = [len(one) for one in arm.samples[:, 0]]
        assert arm.rewards["long"][:, 0].tolist() == lengths
        assert arm.counts["denoiser"] <= SIZE * outcome.num_steps
        assert arm.scores[0].distinct <= SIZE
    assert outcome.arm("fk").scores[0].reward_mean["long"] > 0
    assert outcome.num_steps == LENGTH[outcome.options.model]
    assert outcome.pilot == 64
    page = align.write_report(outcome).read_text(encoding="utf-8")
    assert "http" not in page
    assert "The 64 samples for that were drawn besides" in page
    out = tmp_path / "out"
    for name in METHODS:
        rows = lines(out / "samples" / f"{name}.csv")
        assert len(rows) == SIZE
        assert [float(row["reward:long"]) for row in rows] == outcome.arm(name).rewards["long"][
            :, 0
        ].tolist()
        with np.load(out / "samples" / f"{name}.npz", allow_pickle=False) as saved:
            assert saved["samples"][:, 0].tolist() == list(outcome.arm(name).samples[:, 0])
    found = json.loads((out / "results.json").read_text())
    assert found["steps"] == LENGTH[model] and found["facts"] == {"positions": str(LENGTH[model])}
    assert "transformers" in found["versions"] and "diffusers" not in found["versions"]
    assert (out / "grid.png").exists() == (model == "molecules")
    assert not any(word in page for word in (">class<", ">guidance<", ">scheduler<"))


@needs_molecules
def test_molecules_are_drawn_with_their_properties(tmp_path: Path) -> None:
    from rdkit.Chem import QED, MolFromSmiles

    outcome = run(tmp_path, "molecules", methods=("base", "best-of-n"))
    assert outcome.reward_names == ("qed",)
    page = align.write_report(outcome).read_text(encoding="utf-8")
    smiles = [one for one in outcome.arm("base").samples[:, 0] if one]
    assert len(re.findall('class="card( faded)?"', page)) == 2 * SIZE
    assert page.count("<svg viewBox") >= len(smiles)
    assert "logP" in page and "structural" not in page and "Brenk" in page
    rows = lines(tmp_path / "out" / "samples" / "base.csv")
    assert set(rows[0]) == {"smiles", "judge", "QED", "SA", "logP", "reward:qed", "weight"}
    for row in rows:
        if row["smiles"]:
            assert float(row["QED"]) == pytest.approx(QED.qed(MolFromSmiles(row["smiles"])))
            assert row["QED"] == row["reward:qed"]
        else:
            assert row["reward:qed"] == "-inf" and row["judge"] == "0.0"


@needs_molecules
def test_judge_and_distances_of_molecules() -> None:
    domain = find_domain("molecules")
    smiles = np.array(["CCO", "O=[N+]([O-])c1ccccc1", "", "CCO", "CCCO"], dtype=object)
    judged = domain.judge(smiles, None)
    assert judged.score.tolist() == [1.0, 0.0, 0.0, 1.0, 1.0]
    assert judged.details["QED"][2].isnan() and 0 < judged.details["QED"][0] < 1
    distances = domain.distances(smiles)
    assert torch.equal(distances, distances.T) and distances[0, 3] == 0.0
    assert 0 < distances[0, 4] < distances[0, 1] <= 1.0
    assert (distances.diagonal()[[0, 1, 3, 4]] == 0.0).all()


@needs_vader
def test_texts_are_in_a_table_with_reward_and_judge(tmp_path: Path) -> None:
    outcome = run(tmp_path, "text", prompt="i love", methods=("base", "best-of-n", "fk"))
    assert outcome.reward_names == ("sentiment",)
    assert all(text.startswith("i love") for text in outcome.arm("fk").samples[:, 0])
    shown = align.report.show_samples(outcome)
    table, caption = shown.parts
    assert caption.startswith("Beside each text: its reward (sentiment).")
    assert list(table.columns) == ["method", "drawn", "reward", "judge", "text"]
    assert [row[0] for row in table.rows if row[0]] == ["base", "best-of-n", "fk"]
    texts = set(outcome.arm("base").samples[:, 0])
    first = table.rows[: [row[0] for row in table.rows].index("best-of-n")]
    assert {row[4] for row in first} == texts
    assert sum(int(row[1].split()[0]) for row in first) == SIZE
    [best] = [row for row in table.rows if row[1] == "the best"]
    values = outcome.arm("base").rewards["sentiment"][:, 0]
    assert float(best[2]) == pytest.approx(values.max().item(), abs=1e-3)
    page = align.write_report(outcome).read_text(encoding="utf-8")
    assert (
        ">prompt<" in page
        and ">i love<" in page
        and "--prompt 'i love'" in page.replace("&#x27;", "'")
    )
    row = lines(tmp_path / "out" / "samples" / "fk.csv")[0]
    assert set(row) == {"text", "judge", "fluency", "words", "reward:sentiment", "weight"}


def test_distances_of_texts() -> None:
    assert parts_of("a cat's a", r"[\w']+") == {"a", "cat's", ("a", "cat's"), ("cat's", "a")}
    one, two, none = (frozenset(parts) for parts in ("abc", "bcd", ""))
    assert jaccard_distances([one, two, none, none]).tolist() == [
        [0.0, 0.5, 1.0, 1.0],
        [0.5, 0.0, 1.0, 1.0],
        [1.0, 1.0, 0.0, 0.0],
        [1.0, 1.0, 0.0, 0.0],
    ]


def test_tree_search_is_a_method_of_sequences(tmp_path: Path) -> None:
    outcome = run(tmp_path, "text", rewards=(long,), methods=("base", "tree-search"), scales=(1.0,))
    base, found = outcome.arm("base"), outcome.arm("tree-search")
    assert found.method.returns == "a maximiser"
    assert found.scores[0].reward_best["long"] >= base.scores[0].reward_best["long"]
    # the root is one node, and a position for every step, not for every particle, is revealed
    assert found.counts["denoiser"] <= SIZE * outcome.num_steps
    assert found.weights[:, 0].tolist() == [1.0] + [0.0] * (len(found.weights) - 1)
    align.write_report(outcome)
    with pytest.raises(OptionError, match="--method tree-search is for models of sequences"):
        monkeypatched = pytest.MonkeyPatch()
        with monkeypatched.context() as context:
            context.setattr(catalogue, "ROOT", Path(catalogue.__file__).parent)
            run(tmp_path, "digits", methods=("tree-search",))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"classes": ("3",)}, "--class 3: 'text' has no classes; leave it out"),
        ({"guidance": 2.0}, "--guidance is for models of images, which 'text' is not"),
        ({"scheduler": "ddim"}, "--scheduler is for models of images"),
        ({"prompt": "unheard"}, "--prompt: prompt='unheard' has a sign that"),
        ({"rewards": ("sentimant",)}, "did you mean 'sentiment'"),
        ({"rewards": ("fluency:3",)}, "--reward fluency: it has no options; leave out '3'"),
        ({"rewards": ("acceptability:nobody",)}, "--reward acceptability: checker='nobody'"),
    ],
)
def test_wrong_options(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=told):
        run(tmp_path, "text", **options)
    assert not (tmp_path / "out").exists()


@needs_molecules
def test_wrong_options_of_molecules(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--prompt is for texts and antibodies"):
        run(tmp_path, "molecules", prompt="CCO")
    with pytest.raises(OptionError, match="say which smarts, as in substructure:smarts="):
        run(tmp_path, "molecules", rewards=("substructure",))
    with pytest.raises(OptionError, match="'C.C' is no SMARTS"):
        run(tmp_path, "molecules", rewards=("substructure:C(C",))


def make(smarts: str, *, count: bool = False, target: float | None = None) -> None:
    """Makes nothing."""


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ("c1ccccc1", {"smarts": "c1ccccc1"}),
        ("smarts=C=O", {"smarts": "C=O"}),
        ("C=O,count=true", {"smarts": "C=O", "count": True}),
        ("[C,N]=O, count=False, target=2.5", {"smarts": "[C,N]=O", "count": False, "target": 2.5}),
        ("target=none,smarts=C,N", {"target": None, "smarts": "C,N"}),
        ("CO,target=3", {"smarts": "CO", "target": 3}),
    ],
)
def test_options_of_rewards_are_read(given: str, options: dict[str, Any]) -> None:
    assert parse_options("substructure", given, make) == options


def test_options_of_rewards_that_do_not_exist() -> None:
    with pytest.raises(OptionError, match="say which smarts"):
        parse_options("substructure", "", make)
    with pytest.raises(OptionError, match="it has no options; leave out 'x=1'"):
        parse_options("plain", "x=1", lambda: None)


def test_pages_of_texts_load_nothing_that_is_for_pictures(tmp_path: Path, root: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom pyro_twist import align\n"
        "from pyro_twist.zoo import catalogue\n"
        f"catalogue.ROOT = Path({str(root)!r})\n"
        "def long(texts):\n    return [float(len(text)) for text in texts]\n"
        "options = align.AlignOptions(model='text', rewards=(long,), particles=4,\n"
        f"    methods=('base', 'fk'), out={str(tmp_path / 'out')!r})\n"
        "align.write_report(align.run(options))\n"
        "wanted = ('viz.grid', 'viz.changes', 'viz.molecules', 'align.push', 'align.molecules')\n"
        "print([name for name in wanted if 'pyro_twist.' + name in sys.modules])\n"
        "print([name for name in ('rdkit', 'diffusers', 'selfies') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["[]", "[]"]


@needs("sapiens")
def test_antibodies(tmp_path: Path) -> None:
    prompt = HUMAN[:98] + "?" * 12 + HUMAN[110:]
    options: dict[str, Any] = {"prompt": prompt, "steps": 4, "scales": (500.0,), "particles": 4}
    options["methods"] = ("base", "fk")
    outcome = run(tmp_path, "sapiens", **options)
    assert outcome.reward_names == ("human",)
    for arm in outcome.arms:
        for sequence in arm.samples[:, 0]:
            assert sequence[:98] == HUMAN[:98] and sequence[110:] == HUMAN[110:]
    means = [arm.scores[0].reward_mean["human"] for arm in outcome.arms]
    assert means[1] > means[0]
    assert outcome.arm("base").scores[0].diversity < 12 / len(HUMAN)
    align.write_report(outcome)
