"""The dataset card: made from the Parquet alone, right numbers, pictures where they belong."""

import io
import re

import numpy as np
import pytest
from PIL import Image
from scoring.small_world import row, write_dataset

from facediffuser.cards.contact_sheet import SheetRow, Tile, contact_sheet, font, wrap
from facediffuser.cards.dataset_card import MAX_LINES, OTHERS, write_card
from facediffuser.cards.survey import EXTREMES, SHEET_COLUMNS, SHEET_ROWS, fetch_images, survey_dataset
from facediffuser.errors import InputError
from facediffuser.storage import open_store

RED, GREEN, BLUE = (Image.new("RGB", (64, 64), colour) for colour in ((220, 0, 0), (0, 160, 0), (0, 0, 220)))


def thirty_rows() -> list[dict]:
    rows = [
        row(number, GREEN, ip=number / 50, pc=0.2 + number / 400, subject_ids=[("ada", "bob")[number % 3 == 0]])
        for number in range(30)
    ]
    return [*rows, row(30, None), row(31, None)]


@pytest.fixture
def dataset(tmp_path):
    return open_store(write_dataset(tmp_path / "people", thirty_rows(), {"ada": RED, "bob": BLUE}))


def test_the_card_is_written_from_the_parquet_alone_and_twice_the_same(dataset):
    write_card(dataset)
    names = ["README.md", *(info.key for info in dataset.list("card/"))]
    first = {name: dataset.get(name) for name in names}
    assert {"card/contact_sheet.png", "card/score_histograms.png", "card/index.html"} <= set(names)
    write_card(dataset)
    assert {name: dataset.get(name) for name in names} == first


def test_the_readme_counts_rows_failures_and_means(dataset):
    write_card(dataset)
    text = dataset.get("README.md").decode()
    assert "| images | 30 |" in text and "| failed rows | 2 |" in text and "| subjects | 2 |" in text
    assert "2 × out of memory" in text and "where it happened" not in text
    mean = np.mean([number / 50 for number in range(30)])
    assert re.search(rf"\| \*\*face-diffuser\*\* \| 1 \| \*\*all\*\* \| 30 \| {mean:.3f} \(", text)


def test_the_readmes_front_matter_lets_datasets_load_the_folder(dataset, tmp_path):
    from datasets import load_dataset

    write_card(dataset)
    loaded = load_dataset(dataset.url, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.num_rows == 32 and loaded[0]["sample_id"] == "sample-00000"


def test_the_sheet_shows_the_references_and_the_images(dataset):
    write_card(dataset)
    pixels = np.asarray(Image.open(io.BytesIO(dataset.get("card/contact_sheet.png"))).convert("RGB")).reshape(-1, 3)
    shares = {tuple(colour): (pixels == colour).all(1).mean() for colour in ((220, 0, 0), (0, 160, 0), (0, 0, 220))}
    assert shares[(0, 160, 0)] > 0.3  # images
    assert shares[(220, 0, 0)] > 0.01 and shares[(0, 0, 220)] > 0.01  # a reference each


def test_the_page_holds_every_picture_and_asks_for_nothing_from_elsewhere(dataset):
    write_card(dataset)
    page = dataset.get("card/index.html").decode()
    sources = re.findall(r'src="([^"]{0,30})', page)
    assert len(sources) == 3 + 2 * EXTREMES and all(source.startswith("data:image/") for source in sources)
    assert page.count("<i class=ref") == 2 * EXTREMES and page.count("url(data:image/jpeg") == 2
    assert not re.search(r"""(?:href|src|url)\s*[=(]\s*["']?(?:https?:)?//""", page)


def test_names_and_prompts_cannot_break_the_page_or_the_table(tmp_path):
    evil = '<script>alert("x")</script>'
    rows = [row(number, GREEN, prompt=evil, category="a|b") for number in range(3)]
    store = open_store(write_dataset(tmp_path / "d", rows, {"ada": RED}))
    write_card(store)
    assert evil not in store.get("card/index.html").decode()
    assert "a\\|b" in store.get("README.md").decode()


def test_the_choice_of_images_does_not_depend_on_how_rows_lie_in_shards(tmp_path):
    rows = [
        row(number, GREEN, subject_ids=[f"person-{number % 9}"], prompt_id=f"p{number // 9}") for number in range(108)
    ]
    stores = [
        open_store(write_dataset(tmp_path / name, list(order), {}, shards))
        for name, order, shards in (("one", rows, 1), ("four", reversed(rows), 4))
    ]
    chosen = [
        [[located.values["sample_id"] for located in line] for line in survey_dataset(store).sheet] for store in stores
    ]
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == SHEET_ROWS and all(len(line) == SHEET_COLUMNS for line in chosen[0])


def test_best_and_worst_are_by_ip_and_carry_their_own_images(tmp_path):
    shades = [Image.new("RGB", (8, 8), (number * 8, 0, 0)) for number in range(30)]
    rows = [row(number, shades[number], ip=(number * 7 % 30) / 30) for number in range(30)]
    store = open_store(write_dataset(tmp_path / "d", rows, {}, shards=3))
    survey = survey_dataset(store)
    best = [located.values["ip"] for located in survey.best]
    assert best == pytest.approx([number / 30 for number in range(29, 19, -1)])
    assert [located.values["ip"] for located in survey.worst] == pytest.approx([number / 30 for number in range(10)])
    images = fetch_images(store, survey.best)
    for located in survey.best:
        number = int(located.values["sample_id"].removeprefix("sample-"))
        assert Image.open(io.BytesIO(images[located.values["sample_id"]])).getpixel((0, 0)) == (number * 8, 0, 0)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 19, 20, 25])
@pytest.mark.parametrize("alike", [False, True])
def test_no_image_is_among_the_best_and_the_worst(tmp_path, count, alike):
    rows = [row(number, GREEN, ip=0.5 if alike else number / 50, pc=0.5) for number in range(count)]
    survey = survey_dataset(open_store(write_dataset(tmp_path / "d", [*rows, row(count, None)], {})))
    best, worst = ([located.values["sample_id"] for located in found] for found in (survey.best, survey.worst))
    assert not set(best) & set(worst) and len(set(best + worst)) == min(count, 2 * EXTREMES)
    assert len(best) - len(worst) in (0, 1) and min(best, default="") >= max(worst, default="")


def test_the_sheet_says_which_rows_it_leaves_out(dataset, tmp_path):
    write_card(dataset)
    line = "Contact sheet, shown: 6 images; not shown: 24 further images, 2 failed rows."
    assert line in dataset.get("README.md").decode() and line in dataset.get("card/index.html").decode()
    every = open_store(write_dataset(tmp_path / "every", [row(0, GREEN)], {"ada": RED}))
    write_card(every)
    assert "Contact sheet, every image is shown." in every.get("README.md").decode()
    assert "Lowest IP" not in every.get("card/index.html").decode()  # one image is the best
    plain, noted = (contact_sheet([SheetRow([("ada", RED)], [Tile(GREEN, "p")])], "t", "r", note) for note in ("", "n"))
    assert noted.height > plain.height


def test_the_card_says_how_many_rows_the_shards_hold(tmp_path):
    for name, shards, said in (("one", 1, "7"), ("two", 2, "3 to 4")):
        store = open_store(write_dataset(tmp_path / name, [row(number, GREEN) for number in range(7)], {}, shards))
        write_card(store)
        assert f"| rows of a shard | {said} |" in store.get("README.md").decode()


def test_a_dataset_whose_every_row_failed_still_gets_a_card(tmp_path):
    store = open_store(write_dataset(tmp_path / "d", [row(0, None), row(1, None)], {}))
    write_card(store)
    assert "| images | 0 |" in store.get("README.md").decode()


def test_small_categories_are_taken_together_in_the_plots(tmp_path):
    rows = [row(number, GREEN, category=f"c{number % 12:02d}") for number in range(60)]
    survey = survey_dataset(open_store(write_dataset(tmp_path / "d", rows, {})))
    groups = survey.sample.groups(MAX_LINES, OTHERS)
    assert len(groups) == 8 and len(groups["others"].ip) == groups["others"].count == 25
    assert sum(len(scores.ip) for scores in groups.values()) == 60


def test_what_is_no_dataset_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"no data/\*\.parquet there; give the URL that `generate` wrote to"):
        write_card(open_store(tmp_path))
    assert not any(tmp_path.iterdir())


def test_a_long_prompt_ends_in_an_ellipsis_and_every_line_fits():
    lines = wrap("an extraordinarily long prompt " * 10, font(13), 200, 3)
    assert len(lines) == 3 and lines[-1].endswith("…")
    assert all(font(13).getlength(line) <= 200 for line in lines)


def test_four_subjects_fit_in_one_row():
    subjects = [(name, RED) for name in ("ada", "bob", "eve", "dan")]
    row_of_four = SheetRow(subjects, [Tile(GREEN, "four people", "", 0.5, 0.2)])
    sheet = contact_sheet([row_of_four, row_of_four], "two rows")
    assert sheet.height < 800
