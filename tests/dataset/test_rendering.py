"""What users wrote is text in README.md, the page and the artifacts: no markup, no HTML, no link, no cell of its own."""

import html
import re

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image
from scoring.small_world import row, write_dataset

from facediffuser.cards.dataset_card import write_card
from facediffuser.cards.rendering import render
from facediffuser.markup import Markdown, code_span, escape_markdown, link, markdown_table
from facediffuser.storage import open_store

EVIL = [
    "<script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "![x](javascript:alert(1))",
    "<javascript:alert(1)>",
    "[x]: javascript:alert(1)",
    "a\n\n# b\n\n- c",
    "a\r\n| b |",
    "a|b",
    "a\\|b",
    "**a** _b_ `c` ~~d~~ $e$",
    "&lt;b&gt; &#60;",
    "`<b>`",
    "_$\\frac$",
    "\x00\x1b[1m\x85",
    "\\[x](javascript:1)",
    "a\u2028# b",
    '"><img src=x onerror=alert(1)>',
]
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def shown(markdown: str) -> list[str]:
    """The texts of a table's body cells, which must hold nothing but text."""
    tokens = PARSER.parse(markdown)
    kinds = {token.type.rsplit("_", 1)[0] for token in tokens if token.type != "inline"}
    assert kinds <= {"table", "thead", "tbody", "tr", "th", "td"}, kinds
    cells = [token for token in tokens if token.type == "inline"]
    for cell in cells:
        assert {child.type for child in cell.children} <= {"text", "text_special"}, cell.children
    return ["".join(child.content for child in cell.children) for cell in cells]


@pytest.mark.parametrize("text", EVIL)
def test_a_cell_shows_the_text_and_nothing_else(text):
    line = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", text).strip()
    assert shown(markdown_table(["name", "value"], [[text, 1]])) == ["name", "value", line, "1"]


@given(st.text(alphabet=st.sampled_from("ab \\`*_[]()<>|~$&#!:;{}\n\"'-+=1."), max_size=30))
def test_no_text_is_markup_in_a_cell(text):
    cells = shown(markdown_table(["name", "value"], [[f"x{text}x", "end"]]))
    assert [cell.split() for cell in cells] == [["name"], ["value"], f"x{text}x".split(), ["end"]]


@given(st.text(alphabet=st.sampled_from("ab `<|\\\n"), min_size=1, max_size=20).filter(str.strip))
def test_a_code_span_shows_its_text(text):
    [paragraph] = [token for token in PARSER.parse(f"x{code_span(f'a{text}a')}x") if token.type == "inline"]
    assert [child.type for child in paragraph.children] == ["text", "code_inline", "text"]
    assert paragraph.children[1].content == f"a{re.sub(chr(10) + '+', ' ', text)}a"


def test_markdown_is_not_escaped_twice():
    assert escape_markdown(escape_markdown("a|b")) == "a\\|b" and escape_markdown(Markdown("**a**")) == "**a**"
    assert escape_markdown("image_encoder") == "image_encoder"


@pytest.mark.parametrize("text", EVIL)
def test_a_link_leads_to_its_url_and_shows_its_text(text):
    page = PARSER.render(link(text, "http://s3/out/a (1)/card.html"))
    assert page.count("<a ") == 1 and 'href="http://s3/out/a%20%281%29/card.html"' in page


@pytest.mark.parametrize("text", EVIL)
def test_artifacts_hold_no_html_and_no_link(text):
    artifacts = [
        render(
            "dataset_scores.md.j2",
            output=text,
            links=text,
            lines=[(text, text)],
            table=markdown_table(["method"], [[text]]),
        ),
        render("prepared_photographs.md.j2", output=text, lines=[(f"rejected: {text}", "1")]),
        render("dataset_repair.md.j2", output=text, found=[text, f"b {text}"], left=[]),
    ]
    for artifact in artifacts:
        page = PARSER.render(artifact)
        assert not re.search(r"<(script|a|img|b|h\d|em|strong|s)\b", page), page


def test_a_template_that_lacks_a_value_is_an_error():
    with pytest.raises(jinja2.UndefinedError):
        render("dataset_scores.md.j2", output="here")


def test_ids_categories_prompts_and_errors_are_text_in_the_readme_and_the_page(tmp_path):
    green = Image.new("RGB", (8, 8), "green")
    rows = []
    for number, text in enumerate(EVIL):
        names = {"subject_ids": [text], "prompt": text, "category": text, "method": text}
        rows += [row(2 * number, green, **names), row(2 * number + 1, None, **names | {"error": f"x {text}"})]
    store = open_store(write_dataset(tmp_path / "d", rows, dict.fromkeys(EVIL, green), shards=1))
    write_card(store)
    readme = PARSER.render(store.get("README.md").decode().split("---\n", 2)[2])
    tags = set(re.findall(r"<(\w+)", readme))
    assert tags <= set("h1 h2 p img table thead tbody tr th td strong pre code ul li".split())
    assert readme.count("<img") == 3 and "javascript:" not in "".join(re.findall(r'(?:src|href)="([^"]*)', readme))
    page = store.get("card/index.html").decode()
    assert "<script" not in page and "<img src=x" not in page and not re.search(r"<(a|b)[ >](?!class)", page)
    assert html.escape(EVIL[0], quote=False) in page and html.escape(EVIL[1]) in page
