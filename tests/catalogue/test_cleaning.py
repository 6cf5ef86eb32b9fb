"""Cleaning removes markup and repetitions, keeps every word, and leaves plain texts to Spark."""

import json
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marc_command import Marc
from marc_pipeline.catalogue.cleaning import clean_field, clean_fields, common_sentences
from marc_pipeline.catalogue.rows import sample_cleaned
from marc_pipeline.catalogue.source import find_source
from marc_pipeline.catalogue.template import join_fields, template_fields
from marc_schemas.catalogue import Reason
from marc_schemas.identity import content_hash
from planning import DS, STORAGE, catalogue_settings, plan_day, read, settings_at, texts, write_jsonl, write_parquet

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

KEPT = [
    "5 < 6 & 7 > 3", "a<b", "R&D", "<3", "I <heart> NY", "if x <a and b> y", "pen&notebook",
    "uses <2W). The",
    "a <- b -> c",
    "<me@shop.com> <http://shop.com>", "AT&T &unknown; 3&4;", "👩\u200d👩\u200d👧", "Vol. 1. Vol. 2.", "x<y>z", "a\vb",
]  # fmt: skip
MARKUP = {
    "<p>Red&nbsp;mug</p><p>5 &lt; 6</p>": "Red mug 5 < 6",
    "H<sub>2</sub>O <b>bo</b>ld": "H2O bold",
    "<ul><li>one</li><li class=x>two</li></ul>": "one two",
    "one<br/>two<BR />three": "one two three",
    "before<!-- .a{color:red} -->after": "before after",
    "before <!-- .a{color:red}": "before",
    "<style type='text/css'>.a{b:c}</style>z<script>if(a<b){}</script>": "z",
    "<![CDATA[hi <i>x</i>]]>": "hi x",
    "<!DOCTYPE html><?xml version='1.0'?><html><body>x</body></html>": "x",
    '<a href="x?a=1&b=2" title=\'a > b\'>link</a>': "link",
    "<o:p></o:p>word": "word",
    "<img src=x hidden>k": "k",
    'cut <a href="http://x': "cut",
    "cut <br": "cut",
    "&lt;p&gt;escaped&lt;/p&gt;": "escaped",
    "a &amp;amp; b &amp;#39;c&amp;#39; &#x26;": "a & b 'c' &",
    "&amp;amp;lt;em&amp;amp;gt;twice": "twice",
    '5amp;quot; x 7 1/2amp; quot;': '5" x 7 1/2"',
    "a\u200bb\u00a0c\ufeff\u3000d\n\n e\u200dx": "ab c d ex",
    "<div>&nbsp;</div><!-- x -->\u200b": "",
}  # fmt: skip


def test_text_without_markup_keeps_every_character() -> None:
    assert [clean_field(text) for text in KEPT] == KEPT


@pytest.mark.parametrize("text", MARKUP)
def test_markup_leaves_the_text_that_a_browser_shows(text: str) -> None:
    assert clean_field(text) == MARKUP[text]
    assert clean_field(MARKUP[text]) == MARKUP[text]


PIECES = [
    "<",
    ">",
    "&",
    ";",
    "amp;",
    "lt;",
    "b",
    "p",
    "/",
    "!--",
    "-->",
    " ",
    "\u00a0",
    "\u200b",
    "x",
    "é",
    "=",
    '"',
    "<b>",
    ".",
]


@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_cleaning_a_cleaned_text_changes_nothing(text: str) -> None:
    assert clean_field(clean_field(text)) == clean_field(text)


@pytest.mark.parametrize(
    "unit", ["<", "<b ", '<p x="', "<!--", "&amp;", "amp;", ". ", "...", "<a<", "&lt;", "<style>", "  <b"]
)
def test_cleaning_time_is_linear_in_the_length(unit: str) -> None:
    # Quadratic rules would take hours; the test's own time limit ends them.
    assert len(clean_fields([unit * (400_000 // len(unit)), unit])) == 2


REPEATED = [
    (["Red mug", "ACME", "Red mug. Dishwasher safe."], ["Red mug", "ACME", "Dishwasher safe."]),
    (["Avery 1.5 in. Binder", "", "AVERY 1.5 in. Binder. It holds."], ["Avery 1.5 in. Binder", "", "It holds."]),
    (["A", "One fine day. Two fine days! One fine day."], ["A", "One fine day. Two fine days!"]),
    (["Weezer", "weezer"], ["Weezer", ""]),
    (["Red mug", "Red mug is made of clay. Red mugs. No red mug"], None),
    (["5 in. wide", "No. 1. No. 2. In. In."], None),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "expected"), REPEATED)
def test_a_repeated_sentence_is_kept_once(fields: list[str], expected: list[str] | None) -> None:
    assert clean_fields(fields) == (expected or fields)


TEMPLATES = {
    "{a}. {b}. {c}": {"a": "1", "b": "2", "c": "3", "ab": "1. 2", "ac": "1. 3", "bc": "2. 3", "abc": "1. 2. 3"},
    "Title: {a}. By: {b} end": {"a": "Title: 1", "b": "By: 2 end", "ab": "Title: 1. By: 2 end"},
    "{a} ({b}). {c}": {"ac": "1. 3", "ab": "1 (2)", "bc": "(2). 3", "abc": "1 (2). 3"},
    "{a}, {b} pages. {c}": {"ac": "1. 3", "abc": "1, 2 pages. 3", "bc": "2 pages. 3"},
    "{a}'s {b} by {c}": {"a": "1's", "b": "2", "ac": "1's by 3", "abc": "1's 2 by 3"},
    "{{{a}}} - {b}\n{c}": {"a": "{1}", "ab": "{1} - 2", "ac": "{1}\n3"},
}
NUMBERS = {"a": "1", "b": "2", "c": "3"}


@pytest.mark.spark
@pytest.mark.parametrize("template", TEMPLATES)
def test_an_empty_field_takes_its_literal_text_with_it(spark: "SparkSession", tmp_path: Path, template: str) -> None:
    fields = template_fields(template)
    cases = TEMPLATES[template]
    for present, text in cases.items():
        assert join_fields(fields, [NUMBERS[f.column] if f.column in present else "" for f in fields]) == text
    rows = [{"item_id": p, **{n: NUMBERS[n] if n in p else [" ", None][n == "a"] for n in NUMBERS}} for p in cases]
    assert texts(read(spark, write_jsonl(tmp_path / "c.jsonl", rows), template=template, clean=True)) == cases


WORDS = [
    "Red mug", "red mug.", "Blue. Cup!", "a one b. A one b. c", " x\t", "", "a  b", "R&D", "<b>c</b>", "x&amp;y",
    "e\u00a0f", "5amp;quot;", "two\nlines", "\x1fg", "Ünï", "buy now ok", ".",
]  # fmt: skip


@pytest.mark.spark
def test_spark_and_python_agree_on_every_row(spark: "SparkSession", tmp_path: Path) -> None:
    rows = list(product(WORDS, WORDS, WORDS))
    template, phrases = "{a}. {b} ({c})", ["buy now"]
    path = tmp_path / "c.parquet"
    write_parquet(
        path,
        {
            "item_id": [str(n) for n in range(len(rows))],
            **dict(zip("abc", map(pa.array, zip(*rows, strict=True)), strict=True)),
        },
    )
    found = read(spark, path, template=template, clean=True, boilerplate=phrases)
    for row in found:
        expected = join_fields(template_fields(template), clean_fields(rows[int(row["item_id"])], phrases))
        assert (row["text"], row["reason"]) == (expected, None if expected else Reason.EMPTY_TEXT)
        assert expected or row["row"], "a quarantined row keeps its record"


@pytest.mark.spark
def test_only_markup_is_quarantined_and_the_sample_shows_changed_texts_first(
    spark: "SparkSession", tmp_path: Path
) -> None:
    titles = {"plain": "Red mug", "tags": "<p>Blue &amp; green</p>", "nothing": "<p>&nbsp;</p>", "blank": " "}
    path = write_jsonl(tmp_path / "c.jsonl", [{"item_id": i, "title": t} for i, t in titles.items()])
    rows = {row["item_id"]: row for row in read(spark, path, clean=True)}
    assert {i: (row["text"], row["reason"]) for i, row in rows.items()} == {
        "plain": ("Red mug", None), "tags": ("Blue & green", None),
        "nothing": ("", Reason.EMPTY_TEXT), "blank": ("", Reason.EMPTY_TEXT),
    }  # fmt: skip
    assert json.loads(rows["nothing"]["row"]) == {"item_id": "nothing", "fields": [titles["nothing"]]}
    wanted = catalogue_settings(path, clean=True)
    source = find_source(wanted, str(path), ds=DS, storage=STORAGE)
    sample = [(s.item_id, s.before, s.after) for s in sample_cleaned(spark, source, wanted, storage=STORAGE, limit=9)]
    assert sorted(sample[:2]) == [("nothing", titles["nothing"], ""), ("tags", titles["tags"], "Blue & green")]
    assert sample[2:] == [("plain", "Red mug", "Red mug")]


@pytest.mark.spark
def test_a_plan_has_the_cleaned_texts_and_quarantines_empty_ones(spark: "SparkSession", tmp_path: Path) -> None:
    titles = [
        ("a", "<b>Red</b> mug", 1),
        ("b", "Plain", 1),
        ("c", "old text", 1),
        ("c", "<br>", 2),
        ("d", "<p> </p>", 1),
    ]
    path = write_jsonl(tmp_path / "c.jsonl", [{"item_id": i, "title": t, "at": at} for i, t, at in titles])
    wanted = settings_at(tmp_path, path, clean=True, updated_at_column="at")
    planned = plan_day(spark, wanted)
    assert planned.texts == {"a": "Red mug", "b": "Plain", "c": "old text"}, "an empty newer row does not count"
    assert all(item["content_hash"] == content_hash(item["text"]) for item in planned.items.values())
    assert planned.reasons == {Reason.EMPTY_TEXT: 2} == planned.plan.quarantined
    found = {(row["item_id"], row["source"], row["row"]) for row in planned.quarantine}
    assert found == {
        (i, "c.jsonl", json.dumps({"item_id": i, "fields": [t]})) for i, t in [("c", "<br>"), ("d", "<p> </p>")]
    }
    assert planned.plan.template == "{title} {clean:1}"


def test_cleaning_settings_are_part_of_the_identity() -> None:
    changes: list[dict[str, Any]] = [
        {"clean": False}, {"clean": True},
        *({"clean": True, "boilerplate": [phrase]} for phrase in ("x y", "z")),
    ]  # fmt: skip
    renderings = [catalogue_settings("x", **change).rendering for change in changes]
    assert renderings[0] == "{title}", "records from before cleaning have the bare template"
    assert len(set(renderings)) == len(changes)
    for rendering in renderings[1:]:
        with pytest.raises(ValueError, match="plain column names"):
            catalogue_settings("x", template=rendering)
    assert catalogue_settings("x", clean=True, boilerplate=[" x \n y"]).boilerplate == ("x y",)
    for bad in ({"clean": True, "boilerplate": [" "]}, {"clean": False, "boilerplate": ["x"]}):
        with pytest.raises(ValueError, match="boilerplate"):
            catalogue_settings("x", **bad)


@pytest.mark.spark
@pytest.mark.usefixtures("spark")
def test_plan_shows_a_sample_and_candidates_for_boilerplate(tmp_path: Path) -> None:
    titles = [f"Mug {n}. Ships in two days." if n % 2 else f"Cup <b>{n}</b>" for n in range(8)]
    path = write_jsonl(tmp_path / "c.jsonl", [{"item_id": str(n), "title": t} for n, t in enumerate(titles)])
    settings_at(tmp_path, path)
    catalogue = f"catalogue: {{{{uri: {path}, template: '{{{{title}}}}'}}}}"
    marc = Marc(tmp_path, f"root: {{root}}/data\n{catalogue}\nbuckets: 4\n")
    found = marc.json("plan", "--ds", DS, "--sample", "5")
    assert [(row["before"], row["after"]) for row in found["sample"][:4]] == [
        (row["before"], f"Cup {row['item_id']}") for row in found["sample"][:4]
    ]
    assert found["sample"][4]["before"] == found["sample"][4]["after"] == titles[int(found["sample"][4]["item_id"])]
    assert (found["sampled_texts"], found["boilerplate"]) == (8, [["Ships in two days.", 4]])
    shown = marc.call("plan", "--ds", DS, "--sample", "5").stdout
    assert all(text in shown for text in ("Cup <b>0</b>", "unchanged", "candidate for catalogue.boilerplate"))
    assert "sample" not in marc.json("plan", "--ds", DS)


def test_boilerplate_candidates_stand_in_more_than_the_share_of_texts() -> None:
    shipped = "Ships in two days."
    found = common_sentences(
        [f"Item {n}. {shipped} {shipped}" if n < 3 else f"Item {n}. Nice." for n in range(10)], 0.2
    )
    assert found == [(shipped, 3)]
    assert common_sentences([shipped], 0.2) == common_sentences([shipped] * 2 + ["x"] * 8, 0.2) == []


def test_real_texts_keep_their_words_and_lose_their_markup(office: list[dict[str, str]]) -> None:
    changed = 0
    for row in office:
        text = row["description"]
        cleaned = clean_field(text)
        assert not any(
            mark in cleaned for mark in ("<!--", "<sup>", "&rdquo;", "&reg;", "amp;quot;", "font-weight:bold")
        )
        if not any(mark in text for mark in "<&;"):
            assert cleaned.split() == text.split()
        changed += cleaned != text.strip()
    assert 100 < changed < len(office) / 2
