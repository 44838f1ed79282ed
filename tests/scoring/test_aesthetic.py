"""The aesthetic scorer: heads in the two layouts that LAION published, on the unit vector of CLIP, against sums by hand."""

import math
import os

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scoring.small_world import beside, row, write_dataset

from facediffuser.dataset.added_columns import read_added_columns
from facediffuser.errors import InputError
from facediffuser.evaluation.add_columns import column_stage
from facediffuser.evaluation.score_settings import ScoreSettings
from facediffuser.scoring.columns import load_columns
from facediffuser.storage import open_store
from facediffuser.tasks.local_driver import LocalDriver

WIDTH = 16  # of the vectors of the tests' CLIP; 768 in ViT-L/14
# Sizes of the improved predictor's layers, narrower; between them it has Dropout, which does nothing when it is used, at
# the numbers that its state dict leaves out.
STACK = {"layers.0": (8, WIDTH), "layers.2": (6, 8), "layers.4": (4, 6), "layers.6": (3, 4), "layers.7": (1, 3)}


def head(path, layers: dict[str, tuple[int, int]], weights=torch.randn):
    """Write a state dict of linear layers, `{name}.weight` (out, in) and `{name}.bias`; an empty name is one nn.Linear."""
    torch.manual_seed(0)
    state = {}
    for name, (rows, columns) in layers.items():
        prefix = f"{name}." if name else ""
        state |= {f"{prefix}weight": weights(rows, columns), f"{prefix}bias": torch.randn(rows)}
    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)
    return state


def by_hand(state, names: list[str], vector) -> float:
    """The layers one after another, each a sum of products and an offset, in Python's own floats."""
    values = [float(value) for value in vector]
    for name in names:
        weight, bias = (state[f"{name}.{part}" if name else part].tolist() for part in ("weight", "bias"))
        values = [math.fsum(w * v for w, v in zip(line, values, strict=True)) + offset
                  for line, offset in zip(weight, bias, strict=True)]  # fmt: skip
    [value] = values
    return value


@pytest.fixture
def clip(scorers_folder) -> str:
    return str(scorers_folder / "prompt")


def scores(name: str, pictures) -> list[float]:
    table = load_columns([name])[name].score(pictures, [], [""] * len(pictures))
    return table["aesthetic"].to_pylist()


@pytest.mark.parametrize("layers", [{"": (1, WIDTH)}, STACK], ids=["linear", "improved"])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_head_in_a_published_layout_gives_the_sums_made_by_hand(scorers, clip, people, tmp_path, layers, ending):
    state = head(tmp_path / f"head.{ending}", layers)
    pictures = [beside(face) for face in people.values()]
    vectors = scorers.prompt.embed_images(pictures)
    expected = [by_hand(state, list(layers), vector) for vector in vectors]
    found = scores(f"aesthetic:{tmp_path}/head.{ending}#{clip}", pictures)
    assert found == pytest.approx(expected, rel=1e-5) and max(found) - min(found) > 1e-4
    # One by one, and of none, it is the same.
    assert [scores(f"aesthetic:{tmp_path}/head.{ending}#{clip}", [one])[0] for one in pictures] == pytest.approx(found)
    assert scores(f"aesthetic:{tmp_path}/head.{ending}#{clip}", []) == []


def test_the_head_sees_unit_vectors(scorers, clip, photograph, tmp_path):
    """Ones for weights, 0.25 as offset: the score is the sum of CLIP's unit vector and a quarter."""
    torch.save({"weight": torch.ones(1, WIDTH), "bias": torch.tensor([0.25])}, tmp_path / "ones.pth")
    [vector] = scorers.prompt.embed_images([photograph])
    assert math.fsum(float(value) ** 2 for value in vector) == pytest.approx(1, abs=1e-5)
    [found] = scores(f"aesthetic:{tmp_path}/ones.pth#{clip}", [photograph])
    assert found == pytest.approx(math.fsum(map(float, vector)) + 0.25, abs=1e-5)


def test_layers_are_taken_in_the_order_of_their_numbers(scorers, clip, photograph, tmp_path):
    layers = {"layers.2": (4, WIDTH), "layers.10": (1, 4)}  # as text, 10 comes before 2
    state = head(tmp_path / "head.pth", dict(reversed(layers.items())))
    [vector] = scorers.prompt.embed_images([photograph])
    expected = by_hand(state, ["layers.2", "layers.10"], vector)
    assert scores(f"aesthetic:{tmp_path}/head.pth#{clip}", [photograph]) == pytest.approx([expected], rel=1e-5)


def test_a_column_of_a_dataset_with_its_digest_and_licence(scorers, clip, photograph, tmp_path):
    state = head(tmp_path / "taste.pth", {"": (1, WIDTH)})
    store = open_store(write_dataset(tmp_path / "d", [row(0, photograph), row(1, None)], {"ada": photograph}))
    name = f"aesthetic:{tmp_path}/taste.pth#{clip}"
    keys = LocalDriver().run(column_stage(ScoreSettings(url=store.url, add=[name], device="cpu")))
    assert keys == ["scores/aesthetic-taste.parquet"]
    added = read_added_columns(store)
    [vector] = scorers.prompt.embed_images([photograph])
    expected = pytest.approx(by_hand(state, [""], vector), rel=1e-4)
    assert added.rows(["sample-00000", "sample-00001"])["aesthetic"].to_pylist() == [expected, None]
    assert added.licences() == {"aesthetic-taste": "the file's own"}
    first = added.digests()["aesthetic-taste"]
    head(tmp_path / "taste.pth", {"": (1, WIDTH)}, weights=torch.zeros)
    assert load_columns([name])[name].digest != first


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ({"": (1, WIDTH + 1)}, f"takes {WIDTH + 1} numbers, this CLIP gives {WIDTH}; give its own CLIP"),
        ({"": (2, WIDTH)}, "not linear layers that end in one number"),
        ({"layers.0": (3, WIDTH), "layers.1": (1, 4)}, "not linear layers that end in one number"),
        ({}, "not linear layers that end in one number"),
    ],
)
def test_a_head_that_does_not_fit_is_refused_in_one_line(clip, tmp_path, layers, says):
    head(tmp_path / "head.pth", layers)
    with pytest.raises(InputError, match=says) as refused:
        load_columns([f"aesthetic:{tmp_path}/head.pth#{clip}"])
    assert "head.pth" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04"])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_damaged_head_is_refused_in_one_line(clip, tmp_path, ending, content):
    (tmp_path / f"head.{ending}").write_bytes(content)
    with pytest.raises(InputError, match=rf"head\.{ending}: not a state dict of linear layers") as refused:
        load_columns([f"aesthetic:{tmp_path}/head.{ending}#{clip}"])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("state", [{"weight": torch.ones(1, WIDTH)}, [1.0], {"weight": 1.0, "bias": 2.0}])
def test_what_is_no_state_dict_of_layers_is_refused_in_one_line(clip, tmp_path, state):
    torch.save(state, tmp_path / "head.pth")
    with pytest.raises(InputError, match=r"head\.pth: not "):
        load_columns([f"aesthetic:{tmp_path}/head.pth#{clip}"])


def test_weights_that_are_not_finite_are_refused(clip, tmp_path):
    head(tmp_path / "head.pth", {"": (1, WIDTH)}, weights=lambda *size: torch.full(size, float("nan")))
    with pytest.raises(InputError, match=r"head\.pth: .*not finite"):
        load_columns([f"aesthetic:{tmp_path}/head.pth#{clip}"])


def test_a_head_runs_no_code_of_its_file(clip, tmp_path):
    class Runs:
        def __reduce__(self):
            return (Image.new, ("RGB", (1, 1)))

    torch.save({"weight": Runs(), "bias": torch.zeros(1)}, tmp_path / "head.pth")
    with pytest.raises(InputError, match=r"head\.pth: not a state dict of linear layers"):
        load_columns([f"aesthetic:{tmp_path}/head.pth#{clip}"])


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("nan", "values that are not finite"), ("infinite offset", "values that are not finite"),
        ("long offset", "not linear layers that end in one number"), ("no offset", "not a state dict"),
        ("list", "not a state dict"), ("empty", "not a state dict"), ("cut", "not a state dict"), ("folder", "not a file"),
        ("pipe", "not a file"), ("code", "not a state dict"), ("flat", "not linear layers that end in one number"),
    ],
)  # fmt: skip
def test_a_head_that_is_damaged_or_none_is_one_line(tmp_path, kind, says):
    path, weight, bias = tmp_path / "head.pth", torch.ones(1, WIDTH), torch.zeros(1)
    state = {
        "nan": {"weight": weight * math.nan, "bias": bias}, "infinite offset": {"weight": weight, "bias": bias + math.inf},
        "long offset": {"weight": weight, "bias": torch.zeros(3)}, "no offset": {"weight": weight}, "list": [weight],
        "flat": {"weight": torch.ones(WIDTH), "bias": bias}, "code": {"weight": print, "bias": bias},
        "cut": {"weight": weight, "bias": bias},
    }  # fmt: skip
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "empty":
        path.touch()
    else:
        torch.save(state[kind], path)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=says) as error:
        load_columns([f"aesthetic:{path}"])
    assert "\n" not in str(error.value)
