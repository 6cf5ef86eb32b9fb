"""The example shop's catalogue: one seeded CSV file a day, with rows that a pipeline must quarantine."""

import csv
import re
from collections.abc import Mapping
from datetime import date, timedelta
from pathlib import Path
from typing import Final

from marc_pipeline.config import parse_ds
from marc_pipeline.errors import UserError
from marc_pipeline.example.article import Dice, Item, invent
from marc_pipeline.example.vocabulary import vocabulary
from marc_pipeline.storage import Storage
from marc_schemas.catalogue import Reason

MESSY_ROWS: Final[Mapping[str, int]] = {
    Reason.NULL_ID.value: 3,
    Reason.EMPTY_TEXT.value: 3,
    Reason.OLDER_DUPLICATE.value: 4,
    Reason.UNDECODABLE.value: 2,
}
"""Rows in every day's file that a pipeline must quarantine, by reason."""

MIN_ITEMS: Final = 10
EDITED, ADDED, REMOVED = 0.01, 0.004, 0.006  # shares of ``items``, from one day to the next


def write_catalogue(folder: Path, *, ds: str, items: int = 2000, seed: int = 7) -> Path:
    """Write one day's catalogue as ``folder/{ds}.csv``; an existing file is kept.

    The first day of a folder is the base catalogue. A later day copies the newest earlier day, with 1 % of ``items``
    edited (in the title or the description), 0.4 % added and 0.6 % removed. The other rows stay byte for byte the
    same. Every day also holds the rows of ``MESSY_ROWS``.

    Args:
        folder: created if it is missing.
        ds: the day, ``YYYY-MM-DD``.
        items: good items of the base catalogue, at least 10; give later days the same number.
        seed: the same seed, days and number give the same bytes.

    Raises:
        UserError: ``ds`` is not a date, ``items`` is too small, or another program wrote the earlier file.
    """
    day = date.fromisoformat(parse_ds(ds))
    if items < MIN_ITEMS:
        raise UserError(f"{items} items are too few for an example catalogue; ask for {MIN_ITEMS} or more")
    path = folder / f"{ds}.csv"
    if path.exists():
        return path
    earlier = _newest_before(folder, ds)
    if earlier is None:
        good = _base_items(Dice(seed), day=day, count=items)
    else:
        good = _next_day(read_good_items(earlier), day=day, items=items, seed=seed)
    dice = Dice(seed, day.toordinal(), 1)
    rows = _mixed(good, _messy_rows(good, day=day, dice=dice), dice)
    storage = Storage()
    with storage.staged(str(path)) as staged:
        _write_rows(staged, rows)
        storage.publish(staged, str(path))
    return path


def read_good_items(path: Path) -> list[Item]:
    """The items of a generated catalogue without its messy rows, in the order of the file.

    Raises:
        UserError: the file has other columns than ``write_catalogue`` writes.
    """
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file)
        header = tuple(next(reader, ()))
        if header != Item._fields:
            raise UserError(
                f"{path} has the columns {','.join(header)}, not {','.join(Item._fields)}: use another folder"
            )
        rows = [Item._make(row) for row in reader if len(row) == len(header)]
    usable = [item for item in rows if _usable(item)]
    newest: dict[str, str] = {}
    for item in usable:
        newest[item.item_id] = max(item.updated_at, newest.get(item.item_id, ""))
    return [item for item in usable if item.updated_at == newest[item.item_id]]


def _write_rows(path: Path, rows: list[Item]) -> None:
    """Write a CSV file with a header, quoted where necessary."""
    # surrogateescape writes the lone surrogates of the undecodable rows as the raw bytes they stand for.
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Item._fields)
        writer.writerows(rows)


def _usable(item: Item) -> bool:
    """Whether a row has an id, some text, and bytes that are UTF-8."""
    text = item.title + item.brand + item.category + item.description
    try:
        (item.item_id + text).encode()
    except UnicodeEncodeError:
        return False
    return bool(item.item_id.strip() and text.strip())


def _newest_before(folder: Path, ds: str) -> Path | None:
    """The latest ``YYYY-MM-DD.csv`` of the folder before a day."""
    days = [path for path in folder.glob("*.csv") if re.fullmatch(r"\d{4}-\d\d-\d\d", path.stem) and path.stem < ds]
    return max(days, default=None)


def _base_items(dice: Dice, *, day: date, count: int) -> list[Item]:
    """The first day's good items, each last updated some time in the year before."""
    return [
        invent(dice, item_id=f"p{n:05d}", updated_at=(day - timedelta(days=1 + dice.below(364))).isoformat())
        for n in range(1, count + 1)
    ]


def _next_day(before: list[Item], *, day: date, items: int, seed: int) -> list[Item]:
    """The good items of a later day: some edited, some removed, some added at the end."""
    edited, added, removed = (max(1, round(share * items)) for share in (EDITED, ADDED, REMOVED))
    if len(before) < edited + removed:
        raise UserError(
            f"the earlier day has {len(before)} items, too few to edit {edited} and remove {removed}; "
            f"pass the same number of items for every day"
        )
    dice = Dice(seed, day.toordinal())
    touched = dice.sample(range(len(before)), edited + removed)
    to_edit, to_remove = set(touched[:edited]), set(touched[edited:])
    kept = [
        _edited(item, day=day, dice=dice) if position in to_edit else item
        for position, item in enumerate(before)
        if position not in to_remove
    ]
    # An added id contains the day, so it never repeats an id that was removed earlier.
    ids = (f"p{day:%y%m%d}-{n:03d}" for n in range(1, added + 1))
    return kept + [invent(dice, item_id=item_id, updated_at=day.isoformat()) for item_id in ids]


def _edited(item: Item, *, day: date, dice: Dice) -> Item:
    """The item with words added to its title or its description, as of that day."""
    words = vocabulary()
    addition = dice.pick(words.edit_titles)
    if dice.uniform() < 0.4 and addition not in item.title:
        return item._replace(title=f"{item.title} ({addition})", updated_at=day.isoformat())
    sentence = dice.pick(words.edit_sentences).format(colour=dice.pick(words.colours))
    # The sentence comes first, so that a model that truncates long texts sees it too.
    return item._replace(description=f"{sentence} {item.description}", updated_at=day.isoformat())


def _messy_rows(good: list[Item], *, day: date, dice: Dice) -> list[Item]:
    """The rows that a pipeline must quarantine, in the numbers of ``MESSY_ROWS``."""
    today = day.isoformat()
    rows = [invent(dice, item_id="", updated_at=today) for _ in range(MESSY_ROWS[Reason.NULL_ID])]
    for n in range(MESSY_ROWS[Reason.EMPTY_TEXT]):
        blank = " " * n
        rows.append(Item(f"draft-{n + 1}", blank, "", blank, "", today))
    for item in dice.sample(good, MESSY_ROWS[Reason.OLDER_DUPLICATE]):
        earlier = date.fromisoformat(item.updated_at) - timedelta(days=30 + dice.below(300))
        stale = f"Previous season's listing. {item.description}"
        rows.append(item._replace(description=stale, updated_at=earlier.isoformat()))
    for n in range(MESSY_ROWS[Reason.UNDECODABLE]):
        latin = "Crème légère, façon pâtisserie".encode("latin-1").decode("utf-8", "surrogateescape")
        item = invent(dice, item_id=f"import-{n + 1}", updated_at=today)
        rows.append(item._replace(description=f"{latin}. {item.description}"))
    return rows


def _mixed(good: list[Item], messy: list[Item], dice: Dice) -> list[Item]:
    """All rows, the messy ones at random places among the good ones, which keep their order."""
    rows = list(good)
    for row in messy:
        rows.insert(dice.below(len(rows) + 1), row)
    return rows
