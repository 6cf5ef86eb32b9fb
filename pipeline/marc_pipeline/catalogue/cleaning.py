"""Cleaning of catalogue fields: markup, entities, odd spaces, boilerplate and repeated sentences.

The rules decide by a closed list of HTML elements what is markup, so that ``a<b`` and ``I <heart> NY`` keep all
words.
An HTML parser drops both, and the parser of the standard library changes with patch releases of Python: the same
catalogue would then get other texts, and every vector would be computed again. A change of any rule here must increase
:data:`marc_schemas.catalogue.CLEANING_RULES`.
"""

import html
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from marc_pipeline.catalogue.template import TemplateField, join_fields, template_fields
from marc_pipeline.config import CatalogueSettings

# Elements inside a word or a line; every other element separates words.
INLINE = (
    "a abbr acronym b bdi bdo big cite code data del dfn em font i ins kbd label mark nobr q s samp small span strike "
    "strong sub sup time tt u var wbr"
)
BLOCKS = (
    "address applet area article aside audio base basefont blockquote body br button canvas caption center col "
    "colgroup dd details dialog dir div dl dt embed fieldset figcaption figure footer form frame frameset h1 h2 h3 h4 "
    "h5 h6 head header hgroup hr html iframe img input legend li link main map menu meta nav noframes noscript object "
    "ol optgroup option output p param picture pre progress section select source summary table tbody td textarea "
    "tfoot th thead title tr track ul video"
)
NAMES = "|".join(sorted(f"{INLINE} {BLOCKS} script style svg xml".split(), reverse=True))
# An attribute without a value counts only by its name: "<a and b>" is no tag.
FLAGS = (
    "allowfullscreen|async|autoplay|checked|compact|controls|defer|disabled|hidden|loop|multiple|muted|nowrap|noshade"
)
QUOTED = r"""(?:[^<>"']|"[^"<]*"|'[^'<]*')"""
MARKUP = re.compile(
    rf"""
    <!--.*?(?:--!?>|\Z)                                  # a comment, with the style sheet in it
    | <(script|style|svg|xml)\b[^<>]*(?<!/)>.*?(?:</\1\s*>|\Z)
    | <!\[CDATA\[ | \]\]>                                # the text in a CDATA section is kept
    | <!doctype\b[^<>]*> | <!\[(?:if|endif)\b[^<>]*> | <\?xml\b[^<>]*>
    | </(?P<end>{NAMES})(?:\s[^<>]*)?>
    | <(?P<start>{NAMES})(?:\s*/?|(?:\s+(?:{FLAGS}))+\s*/?|\s(?=[^<>]*=)(?:{QUOTED}*+|[^<>]*))>
    | </?[a-z]\w{{0,9}}:[a-z]\w*(?:\s[^<>]*)?/?>         # an element with a namespace, as of Word
    | <(?:{NAMES})\s+[\w:-]+\s*=\s*["'][^<>]*\Z          # a tag in which a text was cut off
    | </?(?:{NAMES.replace("|a|", "|").replace("|b|", "|").replace("|i|", "|").replace("|p|", "|")})\s*\Z
    """,
    re.IGNORECASE | re.DOTALL | re.VERBOSE,
)
INLINE_NAMES = frozenset(INLINE.split())
ENTITY = re.compile(r"&(?:#\d{1,7}|#x[0-9a-f]{1,6}|[a-z][a-z0-9]{1,31});|&(?:nbsp|amp|lt|gt|quot)(?![a-z0-9;=])", re.I)
# Feeds that lost the first "&" of "&amp;quot;".
BROKEN = re.compile(r"(?<![&;])amp;\s?(?=(?:quot|lt|gt|apos|nbsp|reg|trade|deg|copy|#\d{1,7});)", re.IGNORECASE)
ZERO_WIDTH = "\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff"
# Joiners have a meaning between letters of some scripts and inside emoji, but not beside ASCII characters.
INVISIBLE = re.compile(f"[{ZERO_WIDTH}]|(?<![^\\x00-\\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\\x00-\\x7f])")
# Without rare control characters, for which Spark would have to search every text.
SPACES = re.compile("[ \t\n\r\x85\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
ODD_CHARACTERS = r"[\x85\u00a0\u00ad\u061c\u1680\u180e\u2000-\u200f\u2028-\u202f\u205f-\u2069\u3000\ufeff]"
"""Pattern of Java and Python for characters beyond ASCII that cleaning may replace."""
UNCLEANED = "\x1f"
"""First character of a text that is not cleaned yet; the fields follow as a JSON array."""
SUSPICIOUS = r"[<&;\]\t\n\r\x1f]"
"""Pattern of Java for ASCII fields that cleaning may change by itself, besides fields with two spaces.

A single class of characters takes a tenth of the time of alternatives.
"""
SENTENCE_END = r"(?<![.!?])[.!?]++(?:\s+|$)"
"""Pattern of Java and Python."""
SENTENCE = re.compile(rf"(?P<words>.*?)(?P<end>{SENTENCE_END}|$)", re.DOTALL)
# A text that is nested deeper is an attack, and each pass takes time.
PASSES = 8
# Shorter sentences are often abbreviations, such as the "Vol." of "Vol. 1. Vol. 2."
REPEATED_WORDS = 3


def text_cleaner(catalogue: CatalogueSettings) -> Callable[[str], str]:
    """Return a picklable function from a text that is marked with :data:`UNCLEANED` to the text of the item."""
    return partial(_cleaned_text, tuple(template_fields(catalogue.template)), catalogue.boilerplate)


def _cleaned_text(template: Sequence[TemplateField], boilerplate: Sequence[str], marked: str) -> str:
    return join_fields(template, clean_fields(json.loads(marked[len(UNCLEANED) :]), boilerplate))


def clean_fields(fields: Sequence[str], boilerplate: Sequence[str] = ()) -> list[str]:
    """Return the fields of one item without markup, boilerplate phrases and repeated sentences; "" where none is left.

    A sentence is repeated if it occurred before in this or an earlier field, letter case aside, and either has
    three words or is a whole earlier field.
    """
    seen: set[str] = set()
    whole: list[str] = []
    found = []
    for field in fields:
        text = clean_field(field, boilerplate)
        text = _without_repetitions(_without_start(text, whole), seen, whole)
        if text:
            whole.append(text)
        found.append(text)
    return found


def clean_field(text: str, boilerplate: Sequence[str] = ()) -> str:
    """Return a text without markup, entities, odd spaces and boilerplate phrases. Cleaning it again changes nothing."""
    for _ in range(PASSES):
        # Shops escape markup more than once, so that unescaping may reveal tags and entities.
        before = text
        text = SPACES.sub(" ", INVISIBLE.sub("", _unescaped(MARKUP.sub(_gap, text)))).strip(" ")
        if text == before:
            break
    for phrase in boilerplate:
        if phrase in text:
            text = SPACES.sub(" ", text.replace(phrase, " ")).strip(" ")
    return text


def common_sentences(texts: Sequence[str], share: float) -> list[tuple[str, int]]:
    """Return sentences in more than ``share`` of the texts, and in at least two, with their number of texts."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update({words + end.rstrip() for words, end in _sentences(text) if _is_long(words)})
    least = max(1.0, share * len(texts))
    return [(sentence, count) for sentence, count in counts.most_common() if count > least]


def _gap(markup: re.Match[str]) -> str:
    name = markup["start"] or markup["end"]
    return "" if name and name.lower() in INLINE_NAMES else " "


def _unescaped(text: str) -> str:
    text = BROKEN.sub("&", text)
    return ENTITY.sub(lambda entity: html.unescape(entity[0]), text)


def _without_start(text: str, whole: Sequence[str]) -> str:
    """The text without an earlier field that it starts with, if a sentence ends there."""
    for field in whole:
        if text[: len(field)].lower() == field.lower():
            rest = text[len(field) :]
            ends = not rest or (field[-1] in ".!?" and rest[0] == " ")
            if ends:
                return rest.lstrip()
            if match := re.match(SENTENCE_END, rest):
                return rest[match.end() :]
    return text


def _without_repetitions(text: str, seen: set[str], whole: Sequence[str]) -> str:
    """The text without sentences of ``seen`` or ``whole``; ``seen`` gains its sentences."""
    fields = {field.rstrip(".!?").lower() for field in whole} - {""}
    kept, repeated = [], False
    for words, end in _sentences(text):
        key = words.lower()
        if key in fields or (key in seen and _is_long(key)):
            repeated = True
            continue
        seen.add(key)
        kept.append(words + end)
    return "".join(kept).strip() if repeated else text


def _sentences(text: str) -> Iterator[tuple[str, str]]:
    """Words and end of each sentence; together they are the text."""
    return ((match["words"], match["end"]) for match in SENTENCE.finditer(text) if match[0])


def _is_long(words: str) -> bool:
    return len(words.split()) >= REPEATED_WORDS
