"""A seeded generator of a shop's daily catalogue and of ratings that depend on what its items say."""

import csv
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import parse_ds
from pipeline.errors import UserError
from schemas.catalogue import Reason

T = TypeVar("T")
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MESSY_ROWS: Final[Mapping[str, int]] = {
    Reason.NULL_ID.value: 3,
    Reason.EMPTY_TEXT.value: 3,
    Reason.OLDER_DUPLICATE.value: 4,
    Reason.UNDECODABLE.value: 2,
}
"""Rows of every day's file that a pipeline must quarantine, by reason."""

MIN_ITEMS: Final = 10
EDITED, ADDED, REMOVED = 0.01, 0.004, 0.006  # of ``items``, from one day to the next

INTERACTIONS_END: Final = datetime(2026, 11, 1, tzinfo=UTC)
INTERACTIONS_DAYS: Final = 365
MEAN_INTERACTIONS, FEWEST_INTERACTIONS, MOST_INTERACTIONS = 40, 5, 400

INTERACTIONS: Final = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("rating", pa.float32(), nullable=False),
        pa.field("timestamp", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)
"""Who rated what, when; sorted by time."""


class Item(NamedTuple):
    """One row of the catalogue; the fields are the columns of the file, in order."""

    item_id: str
    title: str
    brand: str
    category: str
    description: str
    updated_at: str


class Kind(NamedTuple):
    """Articles that are alike: what they are called, made of and sized by, and what is said of them."""

    nouns: tuple[str, ...]
    materials: tuple[str, ...]
    sizes: tuple[str, ...]
    features: tuple[str, ...]


class Department(NamedTuple):
    """A top-level category: its kinds, and what is said of all of them."""

    features: tuple[str, ...]
    kinds: dict[str, Kind]


class Traits(NamedTuple):
    """The words that fill an item's sentences."""

    noun: str
    adj: str
    material: str
    colour: str
    size: str
    use: str
    town: str
    number: int


class Dice:
    """Seeded draws, made in blocks: a scalar draw from numpy costs twenty times as much."""

    def __init__(self, *key: int) -> None:
        self._rng = np.random.default_rng(key)
        self._draws: list[float] = []

    def uniform(self) -> float:
        """A number in [0, 1)."""
        if not self._draws:
            self._draws = self._rng.random(4096).tolist()
        return self._draws.pop()

    def below(self, stop: int) -> int:
        """An integer in [0, stop)."""
        return int(self.uniform() * stop)

    def pick(self, options: Sequence[T]) -> T:
        """One of the options, each as likely as the others."""
        return options[self.below(len(options))]

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """``count`` different options (all of them where there are fewer), in random order."""
        pool = list(options)
        for position in range(min(count, len(pool))):
            other = position + self.below(len(pool) - position)
            pool[position], pool[other] = pool[other], pool[position]
        return pool[:count]


# --- the shop's words -------------------------------------------------------------------------------------

STYLES: Final[dict[str, tuple[str, ...]]] = {
    "minimalist": ("minimalist", "pared-back", "understated", "clean-lined"),
    "rustic": ("rustic", "farmhouse", "rough-hewn", "country-style"),
    "vintage": ("vintage", "retro", "mid-century", "old-school"),
    "sporty": ("sporty", "athletic", "aerodynamic", "high-energy"),
    "playful": ("playful", "whimsical", "cheerful", "quirky"),
    "luxurious": ("luxurious", "opulent", "refined", "sumptuous"),
    "industrial": ("industrial", "workshop-style", "utilitarian", "heavy-duty"),
    "sustainable": ("sustainable", "eco-friendly", "organic", "plastic-free"),
}

STYLE_SENTENCES: Final[dict[str, tuple[str, ...]]] = {
    "minimalist": (
        "No logo, no ornament, nothing to distract: {adj} from edge to edge.",
        "Calm shapes and a single {colour} tone keep it quiet in any room.",
    ),
    "rustic": (
        "Every piece shows the marks of the hand that made it, and that is the point.",
        "Think log fires, muddy boots and a {adj} table that has seen a few winters.",
    ),
    "vintage": (
        "Drawn after a 1962 original that our buyer found in a flea market in {town}.",
        "It looks as though your grandmother had kept it in the attic, in perfect order.",
    ),
    "sporty": (
        "Built for speed, sweat and second wind; the {adj} cut moves when you do.",
        "Tested over 1,000 km by our own club runners, who never go easy on anything.",
    ),
    "playful": (
        "A {adj} wink in {colour} that makes grown-ups smile and children grab.",
        "Because ordinary days deserve something a little silly.",
    ),
    "luxurious": (
        "Finished by hand, boxed in linen paper and delivered with a numbered card.",
        "The kind of {adj} detail that is noticed by those who know.",
    ),
    "industrial": (
        "Visible rivets, honest steel and a {adj} finish borrowed from old factories.",
        "Made to survive a workshop, a cellar and three house moves.",
    ),
    "sustainable": (
        "Certified materials, a {adj} supply chain and packaging that composts in 12 weeks.",
        "For every one sold we plant a tree; for every one returned, we repair it.",
    ),
}

PRICES: Final[dict[str, tuple[str, ...]]] = {
    "budget": ("affordable", "good value", "easy on the wallet"),
    "middle": ("fairly priced", "mid-range", "sensibly priced"),
    "premium": ("premium", "top of the range", "made to last a lifetime"),
}
PRICE_SENTENCES: Final = (
    "Frankly, {price}, and proud of it.",
    "In our test of nine rivals this was the {noun} that we would call {price}.",
    "Customers use few words for it: {price}.",
)

USES: Final[dict[str, tuple[str, ...]]] = {
    "travel": ("for travel", "for weekends away"),
    "gift": ("as a gift", "as a birthday present"),
    "family": ("for busy families", "for family homes"),
    "space": ("for small flats", "where space is tight"),
    "work": ("for professionals", "for long working days"),
    "beginner": ("for beginners", "for first-timers"),
    "outdoor": ("for life outdoors", "for garden and trail"),
    "home": ("for quiet evenings", "for slow Sundays"),
}
USE_SENTENCES: Final = (
    "We recommend it {use}.",
    "Chosen again and again {use}.",
    "Nothing else in our range works as well {use}.",
)

LEADS: Final = (
    "{Adj} {noun} in {colour} {material}, designed {use}.",
    "This {adj} {noun} is made of {material} and comes in {colour}.",
    "Our {adj} {noun} does one thing and does it well.",
    "Meet the {noun} that our customers in {town} keep coming back for.",
    "{Material}, {colour}, {size}: the {noun} that you were looking for.",
    "If you need only one {noun}, take this one.",
)

PHRASES: Final = (
    "{Adj} {noun}, {colour}.",
    "{Noun} in {material}",
    "{Adj} and {colour}, {use}",
    "{Material}, {colour}, {size}",
    "New in: {adj} {noun}",
    "{Noun} {use}",
)

GENERIC: Final = (
    "This listing is for {size}; other versions are listed separately.",
    "The {material} is sourced from a family business near {town}.",
    '"The best {noun} I have ever owned," writes a customer from {town}.',
    '"I was sceptical, but it has been in use every day since March," says a reader of our newsletter.',
    "The {colour} may look a little different on your screen, so please order a sample if it has to match.",
    "Advice on care is on the label, on our website and, by telephone, from Mrs Åkesson.",
    "Delivered in recycled cardboard, usually within two working days.",
    "We will still answer questions about it in ten years.",
    "You may send it back within 60 days, used or unused, no questions asked.",
    "A two-year guarantee covers material and workmanship.",
    "The instructions fit on one page, in English, Français, Español and Deutsch.",
    "Each batch is checked by two people before it leaves the workshop.",
    "The {noun} was designed in {town} and is assembled by a team of eleven.",
    "Pairs well with other pieces in {colour}, though it needs no company.",
    "We changed the {material} last year, after your letters: it now comes from another supplier.",
    "Several colours are available; the pictures show {colour}.",
    "It arrives ready to use.",
    "Most customers choose {size}, and few of them send it back.",
    "Our stylists call the look {adj}; we simply like it.",
    "Prototypes were tried for 14 months in homes, hotels and one very noisy kindergarten.",
    "Look at the back and the underside: they are finished with the same care as the front.",
    "Quote number {number} when you write to us about it.",
    "Please keep the leaflet: it lists the care symbols and the batch number.",
    "A small share of every sale goes to a school of crafts in {town}.",
    "What is in the parcel: the {noun}, a leaflet and a card that somebody here wrote by hand.",
    "If anything is not as it should be, write to us and we will put it right.",
    "The previous version won a design prize; this one fixes the three things that the jury did not notice.",
    "If nobody is at home, the parcel waits at a shop around the corner.",
    "Keep out of reach of children under three.",
    "Stock is limited, because the {material} takes five weeks to prepare.",
    "We photographed it next to a 1-litre bottle, so that you can judge how big it really is.",
    "The range started with a single {noun} in 2009 and has grown to forty pieces since.",
)

BULLETS: Final = (
    "Material: {material}",
    "Colour: {colour}",
    "Size: {size}",
    "Style: {adj}",
    "Article number: {number}",
)

EDIT_SENTENCES: Final = (
    "Now in {colour} as well.",
    "New from this week: a longer guarantee and a softer {colour} finish.",
    "Back in stock after many requests, with a sturdier closure.",
    "Revised edition: lighter, quieter and packed without plastic.",
    "Last pieces in {colour} before the model changes.",
)
EDIT_TITLES: Final = ("new edition", "improved model", "restocked", "limited run", "extended warranty")

COLOURS: Final = (
    "black", "white", "charcoal", "sand", "olive", "forest green", "navy", "sky blue", "terracotta",
    "mustard", "burgundy", "rosé", "lilac", "copper", "ivory", "teal", "crème", "graphite", "coral", "natural",
)  # fmt: skip
TOWNS: Final = (
    "Málaga", "Zürich", "Kraków", "Århus", "Leeds", "Lyon", "Porto", "Göteborg", "Turin", "Ghent", "Brno",
    "Cork",
)  # fmt: skip
MODELS: Final = (
    "Aurora", "Fern", "Nº 7", "Harbour", "Étoile", "Juniper", "Atlas", "Pebble", "Solstice", "Marlow", "Kite",
    "Onyx", "Willow", "Ember", "Tundra", "Cádiz", "Meridian", "Sparrow", "Delta", "Quartz",
)  # fmt: skip
BRANDS: Final = (
    "Tarnwick", "Oskelund", "Brindlemoor", "Velorí", "Quillhaven", "Pascoé & Fils", "Nordhåll", "Kestrane",
    "Almavía", "Lumenor", "Hexley & Rowe", "Tofta", "Moss+Ember", "Grünwerk", "Pellaro", "Stillford",
    "Ondine & Co.", "Casa Orvela", "Bramblecote", "Yonderly", "Ferrowick", "Sœur Mathilde", "Drift, Inc.",
    "Haldvik", "Marrowby", "Pico & Luz", "Ravensholt", "Tamsen", "Umbria Nove", "Wexcombe",
)  # fmt: skip
EMOJI: Final = ("✨", "🌿", "🎁", "🔥", "🚴‍♀️", "☕", "❤️", "🐾")

# One word a line would make this table four times as long.
# fmt: off
DEPARTMENTS: Final[dict[str, Department]] = {
    "Kitchen & Dining": Department(
        (
            "Safe in the dishwasher, on every shelf.",
            "The shape has not changed since 1954, because nobody could improve it.",
        ),
        {
            "Knives": Kind(
                ("bread knife", "chef's knife", "paring knife"),
                ("stainless steel", "Damascus steel", "carbon steel"), ("9 cm", "18 cm", "24 cm"),
                ("Holds its edge for a year of daily onions.",
                 "The handle sits in the hand, large or small, left or right."),
            ),
            "Coffee & Tea": Kind(
                ("pour-over coffee maker", "teapot", "espresso cup"),
                ("stoneware", "borosilicate glass", "porcelain"), ("0.1 l", "0.6 l", "1.2 l"),
                ("The spout pours without a drip, even when full.",
                 "Keeps warm for the second cup, and nearly for the third."),
            ),
            "Cookware": Kind(
                ("frying pan", "stockpot", "casserole"), ("cast iron", "enamelled steel", "copper"),
                ("20 cm", "24 cm", "28 cm"),
                ("Works on gas, ceramic and induction hobs.",
                 "The handle stays cool while the sauce does not."),
            ),
            "Tableware": Kind(
                ("dinner plate", "salad bowl", "serving board"), ("stoneware", "oak", "bone china"),
                ("26 cm", "32 cm", "set of 4"),
                ("Stacks neatly and does not scratch what is below.",
                 "No two glazes run in quite the same way."),
            ),
        },
    ),
    "Furniture": Department(
        ("Assembles in fifteen minutes with the hex key supplied.", "Felt pads protect parquet and tiles."),
        {
            "Chairs": Kind(
                ("dining chair", "armchair", "bar stool"), ("solid oak", "bouclé", "powder-coated steel"),
                ("45 cm seat", "65 cm seat", "75 cm seat"),
                ("Carries up to 120 kg without a creak.",
                 "The backrest gives a little, as a good listener does."),
            ),
            "Tables": Kind(
                ("coffee table", "dining table", "side table"), ("walnut veneer", "solid oak", "travertine"),
                ("80 × 40 cm", "160 × 90 cm", "Ø 45 cm"),
                ("Oiled twice, so that red wine stays a story.", "The legs unscrew for the next move."),
            ),
            "Storage": Kind(
                ("bookcase", "sideboard", "shoe cabinet"), ("pine", "rattan", "lacquered steel"),
                ("80 cm wide", "120 cm wide", "180 cm wide"),
                ("Shelves can be moved in steps of 3 cm.",
                 "A back panel with cable holes, cut where one needs them."),
            ),
            "Beds": Kind(
                ("bed frame", "daybed", "upholstered headboard"), ("solid beech", "velvet", "recycled oak"),
                ("90 × 200 cm", "140 × 200 cm", "160 × 200 cm"),
                ("The slats are sprung and the joints are dowelled, not stapled.",
                 "High enough for a drawer, low enough for a child."),
            ),
        },
    ),
    "Clothing": Department(
        ("The model is 1.78 m tall and wears a size M.", "Seams are taped and buttons are sewn on by hand."),
        {
            "Jackets": Kind(
                ("rain jacket", "quilted jacket", "denim jacket"),
                ("waxed cotton", "recycled polyester", "brushed denim"), ("S", "M", "L"),
                ("Two hidden pockets, one of them with a zip.",
                 "Keeps out wind and showers; in a cloudburst, run."),
            ),
            "Knitwear": Kind(
                ("jumper", "cardigan", "roll-neck"), ("merino wool", "cashmere", "lambswool"),
                ("XS", "M", "XL"),
                ("Wash by hand at 30 °C; dry flat.", "Knitted in one piece, without side seams."),
            ),
            "Shirts": Kind(
                ("shirt", "T-shirt", "blouse"), ("linen", "cotton poplin", "Tencel"), ("S", "L", "XXL"),
                ("Cut a little long, so that it stays put when you cycle.",
                 "Needs no iron if it is hung up wet."),
            ),
            "Dresses": Kind(
                ("midi dress", "wrap dress", "pinafore"), ("corduroy", "viscose crêpe", "washed linen"),
                ("XS", "S", "M"),
                ("Pockets. Real ones.", "Falls just below the knee and turns well on a dance floor."),
            ),
        },
    ),
    "Shoes": Department(
        ("The insole comes out and can be washed.", "Between sizes? Take the larger one."),
        {
            "Trainers": Kind(
                ("running shoe", "court trainer", "slip-on trainer"), ("engineered mesh", "canvas", "suede"),
                ("EU 37", "EU 41", "EU 44"),
                ("A 6 mm drop and a wide toe box keep feet happy.", "Foam that still rebounds after 700 km."),
            ),
            "Boots": Kind(
                ("ankle boot", "hiking boot", "wellington boot"),
                ("full-grain leather", "natural rubber", "nubuck"), ("EU 38", "EU 40", "EU 43"),
                ("Grips on wet cobbles and dry granite.", "Can be resoled twice by any cobbler."),
            ),
            "Sandals": Kind(
                ("sandal", "clog", "espadrille"), ("cork", "vegetable-tanned leather", "jute"),
                ("EU 36", "EU 39", "EU 42"),
                ("The footbed takes on the shape of your foot within a week.",
                 "Three buckles, so that it fits narrow feet as well."),
            ),
            "Formal": Kind(
                ("Oxford shoe", "loafer", "ballet flat"), ("calf leather", "patent leather", "suede"),
                ("EU 38", "EU 41", "EU 45"),
                ("Break them in for an hour a day during the first week.",
                 "Goodyear-welted, as the cobbler in the next street will be glad to see."),
            ),
        },
    ),
    "Electronics": Department(
        (
            "Updates install overnight and never in the middle of a call.",
            "No account needed, and no cloud behind it.",
        ),
        {
            "Audio": Kind(
                ("wireless headset", "portable speaker", "record player"),
                ("anodised aluminium", "walnut", "recycled plastic"), ("compact", "full size", "stereo pair"),
                ("Up to 30 hours on one charge; ten minutes on the cable give three more.",
                 "Pairs with two devices at once over Bluetooth 5.3."),
            ),
            "Computing": Kind(
                ("laptop sleeve", "mechanical keyboard", "docking station"),
                ("felt", "anodised aluminium", "bamboo"), ('13"', '15"', '17"'),
                ("Fits under an aeroplane seat and on a café table.",
                 "Works with Linux, macOS and Windows, without drivers."),
            ),
            "Photography": Kind(
                ("instant camera", "tripod", "camera strap"),
                ("carbon fibre", "matte polycarbonate", "waxed canvas"), ("compact", "150 cm", "full size"),
                ("Sets up in four seconds, which is how long a fox stays.",
                 "Holds 5 kg, so the big lens may come along."),
            ),
            "Smart home": Kind(
                ("motion sensor", "smart plug", "video doorbell"),
                ("matte polycarbonate", "tempered glass", "brushed steel"),
                ("single", "twin pack", "set of 4"),
                ("Speaks Matter, Zigbee and plain English.",
                 "Latency stays under 40 ms: the light is there before you are."),
            ),
        },
    ),
    "Sports & Fitness": Department(
        (
            "A training plan for six weeks is printed on the inside of the box.",
            "Used by two national teams, who paid for theirs.",
        ),
        {
            "Yoga": Kind(
                ("yoga mat", "yoga bolster", "yoga block"),
                ("natural rubber", "cork", "buckwheat and cotton"), ("4 mm", "6 mm", "extra long"),
                ("Keeps its grip when hands and floor are wet.",
                 "Rolls up to the size of a water bottle, nearly."),
            ),
            "Cycling": Kind(
                ("cycling helmet", "pannier bag", "track pump"),
                ("EPS foam", "ripstop nylon", "brushed aluminium"), ("small", "medium", "20 l"),
                ("Reflective on all sides, visible from 150 m.",
                 "Goes on and comes off with one click, even in gloves."),
            ),
            "Strength": Kind(
                ("kettlebell", "resistance band", "weight plate"), ("cast iron", "natural latex", "vinyl"),
                ("8 kg", "12 kg", "16 kg"),
                ("The flat base does not roll, and the floor is grateful.",
                 "Weighed to within 50 g, each of them."),
            ),
            "Swimming": Kind(
                ("swim goggle", "swim cap", "dry bag"), ("silicone", "neoprene", "welded nylon"),
                ("junior", "adult", "15 l"),
                ("Does not fog up, not even in the sauna that is called Lane 4.",
                 "Chlorine and salt leave no marks on it."),
            ),
        },
    ),
    "Garden": Department(
        ("Frost-proof down to −15 °C.", "Bees found it within the hour."),
        {
            "Tools": Kind(
                ("hand trowel", "pruning saw", "garden fork"),
                ("forged steel", "ash wood", "galvanised steel"), ("30 cm", "90 cm", "120 cm"),
                ("The handle comes from managed forests and can be replaced.",
                 "Cuts on the pull, so that the blade stays straight."),
            ),
            "Pots": Kind(
                ("planter", "hanging basket", "raised bed"), ("terracotta", "corten steel", "coir"),
                ("Ø 20 cm", "Ø 40 cm", "80 l"),
                ("Drainage holes are pre-drilled; a saucer is included.",
                 "Thick walls keep roots cool in August."),
            ),
            "Seeds": Kind(
                ("wildflower seed kit", "tomato seed kit", "herb starter kit"),
                ("recycled card", "coir", "peat-free compost"), ("pack of 3", "pack of 5", "10 m²"),
                ("Sow from March to June, water sparingly, and wait.",
                 "Heirloom varieties, open-pollinated, with a map of who grew them."),
            ),
            "Patio": Kind(
                ("fire bowl", "parasol", "hammock"), ("corten steel", "teak", "cotton canvas"),
                ("Ø 60 cm", "2 m", "3 m"),
                ("Folds flat and spends the winter behind a cupboard.",
                 "Stands firm in a breeze; close it in a storm."),
            ),
        },
    ),
    "Toys & Games": Department(
        ("Tested to EN 71; colours do not run when chewed.", "All pieces fit back into the box, really."),
        {
            "Wooden toys": Kind(
                ("train set", "stacking tower", "shape sorter"), ("beech wood", "lime wood", "birch plywood"),
                ("12 pieces", "24 pieces", "40 pieces"),
                ("Trains the eye, the hand and a certain amount of patience.",
                 "Compatible with the tracks that are already under your sofa."),
            ),
            "Board games": Kind(
                ("strategy board game", "card game", "memory game"),
                ("recycled card", "linen-finish card", "beech wood"),
                ("2 players", "2–4 players", "3–6 players"),
                ("A round takes twenty minutes, the arguments afterwards take longer.",
                 "Rules are learned in five minutes and mastered in five years."),
            ),
            "Puzzles": Kind(
                ("landscape puzzle", "floor puzzle", "map puzzle"),
                ("recycled card", "birch plywood", "cork"), ("48 pieces", "500 pieces", "1,000 pieces"),
                ("Every piece has a shape of its own, and none is missing.",
                 "The picture was painted for us by a retired ship's cook."),
            ),
            "Soft toys": Kind(
                ("plush fox", "rag doll", "hand puppet"), ("organic cotton", "felt", "alpaca wool"),
                ("20 cm", "35 cm", "50 cm"),
                ("Survives the washing machine, once a week for years.",
                 "Eyes are embroidered, so there is nothing to swallow."),
            ),
        },
    ),
    "Beauty & Care": Department(
        (
            "Dermatologically tested on sensitive skin, never on animals.",
            "Free from silicones, parabens and micro-plastics.",
        ),
        {
            "Skin": Kind(
                ("day cream", "face oil", "clay mask"), ("shea butter", "argan oil", "white clay"),
                ("30 ml", "50 ml", "100 ml"),
                ("One pea-sized amount is enough for face and neck.",
                 "Leaves no shine, no film and no traces on collars."),
            ),
            "Hair": Kind(
                ("solid shampoo", "hair mask", "leave-in conditioner"),
                ("coconut oil", "oat milk", "nettle extract"), ("60 g", "150 ml", "250 ml"),
                ("Lasts for about eighty washes.", "For curls that have opinions of their own."),
            ),
            "Bath": Kind(
                ("bath salt", "body scrub", "bar soap"), ("sea salt", "olive oil", "lavender"),
                ("100 g", "250 g", "1 kg"),
                ("Turns the water milky and the evening quiet.",
                 "Smells of crème brûlée at first, then of cedar."),
            ),
            "Fragrance": Kind(
                ("eau de parfum", "scented candle", "room spray"),
                ("cedar and amber", "rosewater", "beeswax and fig"), ("10 ml", "50 ml", "200 g"),
                ("Head note: bergamot; heart: iris; base: smoke.",
                 "Stays for eight hours without entering the room before you."),
            ),
        },
    ),
    "Pets": Department(
        (
            "Even our most determined terrier gave up after a month.",
            "A vet in Brno helped us with the shape.",
        ),
        {
            "Dogs": Kind(
                ("dog lead", "dog bed", "chew toy"),
                ("vegetable-tanned leather", "orthopaedic foam", "hemp rope"), ("small", "medium", "large"),
                ("Stitched with sailmaker's thread, for dogs that pull.",
                 "Gentle on puppy teeth and on the nerves of neighbours."),
            ),
            "Cats": Kind(
                ("scratching post", "cat tunnel", "cat cave"), ("sisal", "wool felt", "seagrass"),
                ("60 cm", "90 cm", "120 cm"),
                ("Purring not included, but likely.", "Does not wobble, which cats never forgive."),
            ),
            "Small animals": Kind(
                ("rabbit hutch", "hamster wheel", "hay rack"),
                ("untreated pine", "cork", "powder-coated wire"), ("dwarf breeds", "medium", "two storeys"),
                ("Silent bearings, because hamsters start at midnight.",
                 "The tray slides out for cleaning, without an escape."),
            ),
            "Feeding": Kind(
                ("slow-feeder bowl", "treat jar", "water fountain"),
                ("ceramic", "stainless steel", "bamboo fibre"), ("0.5 l", "1 l", "2 l"),
                ("The weighted base does not slide across the kitchen floor.",
                 "Makes a hasty eater take four minutes instead of one."),
            ),
        },
    ),
    "Books & Stationery": Department(
        ("Printed with soy inks two hours from our office.", "Wrapped in tissue paper on request."),
        {
            "Notebooks": Kind(
                ("dotted notebook", "weekly planner", "sketchbook"),
                ("120 g paper", "stone paper", "cotton paper"), ("A6", "A5", "A4"),
                ("Opens flat on the table and stays there.",
                 "Ink does not bleed through, not even from a broad nib."),
            ),
            "Pens": Kind(
                ("fountain pen", "brush pen", "mechanical pencil"),
                ("brass", "turned resin", "anodised aluminium"), ("fine", "medium", "broad"),
                ("Balanced for long letters and short signatures.",
                 "Starts at once, after a month in a drawer as well."),
            ),
            "Cookbooks": Kind(
                ("baking cookbook", "vegetarian cookbook", "street-food cookbook"),
                ("coated paper", "recycled paper", "washable paper"), ("160 pages", "240 pages", "320 pages"),
                ("Ninety recipes, each tried at least five times.",
                 "Every ingredient can be found in an ordinary supermarket."),
            ),
            "Fiction": Kind(
                ("crime novel", "short-story collection", "historical novel"),
                ("recycled paper", "cotton paper", "thin bible paper"),
                ("192 pages", "320 pages", "560 pages"),
                ("The last chapter is best read with the lights on.",
                 "Translated for the first time, with an afterword and a map."),
            ),
        },
    ),
    "Lighting": Department(
        (
            "Dims from candlelight to noon without a flicker.",
            "Bulb included; it can be changed, which is rarer than it should be.",
        ),
        {
            "Desk lamps": Kind(
                ("desk lamp", "clamp lamp", "reading light"), ("brass", "spun aluminium", "concrete"),
                ("E14", "E27", "5 W"),
                ("The switch sits on the cable, where the hand expects it.",
                 "The arm stays where you leave it."),
            ),
            "Pendants": Kind(
                ("pendant lamp", "cluster pendant", "paper lantern"), ("opal glass", "rice paper", "linen"),
                ("Ø 25 cm", "Ø 40 cm", "Ø 60 cm"),
                ("Throws a warm circle on the table and leaves faces in peace.",
                 "The cable is 3 m long and covered in cotton."),
            ),
            "Outdoor": Kind(
                ("solar lantern", "path light", "string light"),
                ("galvanised steel", "frosted glass", "bamboo"), ("single", "set of 4", "10 m"),
                ("Charges in six hours of sun and glows for ten.",
                 "Rated IP65: rain, dust and the neighbour's sprinkler do no harm."),
            ),
            "Bulbs": Kind(
                ("filament bulb", "globe bulb", "colour-changing bulb"),
                ("clear glass", "smoked glass", "frosted glass"), ("E14", "E27", "B22"),
                ("2,700 K, 806 lumen and a colour rendering index above 95.",
                 "Lives for 25,000 hours, which is nine years of evenings."),
            ),
        },
    ),
}
# fmt: on


# --- the catalogue ----------------------------------------------------------------------------------------


def write_catalogue(folder: Path, *, ds: str, items: int = 5000, seed: int = 7) -> Path:
    """Write one day's catalogue as ``folder/{ds}.csv``; a file that exists is left alone.

    The first day of a folder is the base catalogue. A later day is the newest earlier one with 1 % of
    ``items`` edited (in the title or the description), 0.4 % added and 0.6 % removed; the rest stays byte for
    byte. Every day holds the rows of ``MESSY_ROWS`` besides the good ones.

    Args:
        folder: made where it is missing.
        ds: the day, ``YYYY-MM-DD``.
        items: good items of the base catalogue, at least 10; give later days the same number.
        seed: the same seed, days and number give the same bytes.

    Raises:
        UserError: ``ds`` is no date, ``items`` is too small, or an earlier file is none of this generator's.
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
    folder.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as temporary:
        _write_rows(temporary, rows)
    return path


def read_good_items(path: Path) -> list[Item]:
    """The items of a generated catalogue without its messy rows, in the order of the file.

    Raises:
        UserError: the columns are not those that ``write_catalogue`` writes.
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
    """A CSV file with a header, quoted where it must be."""
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


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name that becomes ``path`` when the body succeeds and vanishes when it does not."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)  # noqa: PTH105 - the one call that says: atomically, over what is there
    finally:
        temporary.unlink(missing_ok=True)


def _base_items(dice: Dice, *, day: date, count: int) -> list[Item]:
    """The first day's good items, each last updated some time in the year before."""
    return [
        _item(dice, item_id=f"p{n:05d}", updated_at=(day - timedelta(days=1 + dice.below(364))).isoformat())
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
    # The day is part of an added id: it cannot be one that was removed on any day before.
    ids = (f"p{day:%y%m%d}-{n:03d}" for n in range(1, added + 1))
    return kept + [_item(dice, item_id=item_id, updated_at=day.isoformat()) for item_id in ids]


def _edited(item: Item, *, day: date, dice: Dice) -> Item:
    """The item with words added to its title or its description, as of that day."""
    addition = dice.pick(EDIT_TITLES)
    if dice.uniform() < 0.4 and addition not in item.title:
        return item._replace(title=f"{item.title} ({addition})", updated_at=day.isoformat())
    sentence = dice.pick(EDIT_SENTENCES).format(colour=dice.pick(COLOURS))
    # In front, so that a model that truncates long texts sees the difference as well.
    return item._replace(description=f"{sentence} {item.description}", updated_at=day.isoformat())


def _messy_rows(good: list[Item], *, day: date, dice: Dice) -> list[Item]:
    """The rows that a pipeline must quarantine, as many of each kind as ``MESSY_ROWS`` says."""
    today = day.isoformat()
    rows = [_item(dice, item_id="", updated_at=today) for _ in range(MESSY_ROWS[Reason.NULL_ID])]
    for n in range(MESSY_ROWS[Reason.EMPTY_TEXT]):
        blank = " " * n
        rows.append(Item(f"draft-{n + 1}", blank, "", blank, "", today))
    for item in dice.sample(good, MESSY_ROWS[Reason.OLDER_DUPLICATE]):
        earlier = date.fromisoformat(item.updated_at) - timedelta(days=30 + dice.below(300))
        stale = f"Previous season's listing. {item.description}"
        rows.append(item._replace(description=stale, updated_at=earlier.isoformat()))
    for n in range(MESSY_ROWS[Reason.UNDECODABLE]):
        latin = "Crème légère, façon pâtisserie".encode("latin-1").decode("utf-8", "surrogateescape")
        item = _item(dice, item_id=f"import-{n + 1}", updated_at=today)
        rows.append(item._replace(description=f"{latin}. {item.description}"))
    return rows


def _mixed(good: list[Item], messy: list[Item], dice: Dice) -> list[Item]:
    """All rows, the messy ones at random places among the good ones, which keep their order."""
    rows = list(good)
    for row in messy:
        rows.insert(dice.below(len(rows) + 1), row)
    return rows


# --- one item ---------------------------------------------------------------------------------------------


def _item(dice: Dice, *, item_id: str, updated_at: str) -> Item:
    """An invented article of the shop."""
    # The smaller of two draws: the first departments are the bigger ones.
    name = tuple(DEPARTMENTS)[min(dice.below(len(DEPARTMENTS)), dice.below(len(DEPARTMENTS) + 4))]
    department = DEPARTMENTS[name]
    kind_name = dice.pick(tuple(department.kinds))
    kind = department.kinds[kind_name]
    style = dice.pick(tuple(STYLES))
    traits = Traits(
        noun=dice.pick(kind.nouns),
        adj=dice.pick(STYLES[style]),
        material=dice.pick(kind.materials),
        colour=dice.pick(COLOURS),
        size=dice.pick(kind.sizes),
        use=dice.pick(USES[dice.pick(tuple(USES))]),
        town=dice.pick(TOWNS),
        number=1000 + dice.below(9000),
    )
    brand = "" if dice.uniform() < 0.08 else dice.pick(BRANDS)
    title = _title(traits, brand=brand, dice=dice)
    description = _description(traits, style=style, features=kind.features + department.features, dice=dice)
    return Item(item_id, title, brand, f"{name} > {kind_name}", description, updated_at)


def _title(traits: Traits, *, brand: str, dice: Dice) -> str:
    """A title as shops write them; it always names the style and the kind."""
    patterns = (
        "{adj} {noun} in {colour} {material}",
        "{adj} {material} {noun}, {size}",
        '{adj} {noun} "{model}", {colour}',
        "{model} {number} – {adj} {noun}, {colour}, {size}",
        "{brand} {adj} {noun}, {colour}",
        "{noun}: {adj}, {material}, {size}",
    )
    fields = {"model": dice.pick(MODELS), "brand": brand, **traits._asdict()}
    title = _capitalised(dice.pick(patterns).format_map(fields).strip())
    return f"{title} {dice.pick(EMOJI)}" if dice.uniform() < 0.01 else title


def _description(traits: Traits, *, style: str, features: tuple[str, ...], dice: Dice) -> str:
    """One short phrase, a few sentences or, seldom, several hundred words."""
    fields = traits._asdict() | {
        "Adj": _capitalised(traits.adj),
        "Noun": _capitalised(traits.noun),
        "Material": _capitalised(traits.material),
        "price": dice.pick(PRICES[dice.pick(tuple(PRICES))]),
    }
    length = dice.uniform()
    if length < 0.10:
        return dice.pick(PHRASES).format_map(fields)
    told = [dice.pick(STYLE_SENTENCES[style]), dice.pick(PRICE_SENTENCES), dice.pick(USE_SENTENCES)]
    # What tells items apart comes first; the padding that every shop shares fills up the long texts.
    specific = dice.sample(told + dice.sample(features, 3), 6)
    lead = dice.pick(LEADS)
    if length < 0.82:
        sentences = [lead, *specific[: dice.below(3)]]
    elif length < 0.95:
        sentences = [lead, *specific, *dice.sample(GENERIC, dice.below(5))]
    else:
        sentences = [lead, *specific, *dice.sample(GENERIC, 4 + dice.below(len(GENERIC) - 3))]
    written = [sentence.format_map(fields) for sentence in sentences]
    text = " ".join(written) if length < 0.95 else _article(written, [b.format_map(fields) for b in BULLETS])
    return f"{text} {dice.pick(EMOJI)}" if dice.uniform() < 0.04 else text


def _article(sentences: list[str], bullets: list[str]) -> str:
    """A long description: paragraphs of four sentences with a list after the first."""
    rest = iter(sentences)
    paragraphs = []
    while paragraph := " ".join(islice(rest, 4)):
        paragraphs.append(paragraph)
    facts = "\n".join(f"- {bullet}" for bullet in bullets)
    return "\n\n".join([paragraphs[0], facts, *paragraphs[1:]])


def _capitalised(text: str) -> str:
    """The text with its first letter, and no other, made a capital."""
    return text[:1].upper() + text[1:]


# --- interactions -----------------------------------------------------------------------------------------


def write_interactions(path: Path, catalogue: Path, *, users: int = 600, seed: int = 7) -> Path:
    """Write the ratings of invented users as Parquet (``INTERACTIONS``); a file that exists is left alone.

    A user likes or dislikes categories, styles, prices and uses that the texts of the items name; the quality
    of the item and chance do the rest. A user rates an item at most once, about 40 items on average and never
    more than half of the catalogue. Popularity has a long tail; at least one item in twelve is never rated.

    Args:
        path: file to write.
        catalogue: a file that ``write_catalogue`` wrote.
        users: number of users, at least 1.
        seed: the same seed, users and catalogue give the same bytes.

    Raises:
        UserError: there is no such catalogue, or no users are asked for.
    """
    if path.exists():
        return path
    if users < 1:
        raise UserError(f"{users} users rate nothing; ask for 1 or more")
    if not catalogue.is_file():
        raise UserError(f"no catalogue at {catalogue}; write it first with write_catalogue")
    table = _interactions(read_good_items(catalogue), users=users, seed=seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    return path


def _interactions(items: list[Item], *, users: int, seed: int) -> pa.Table:
    """All ratings in order of time."""
    rng = np.random.default_rng((seed, users))
    attributes = _attributes(items)
    quality = rng.normal(0.0, 0.35, len(items))
    popularity = _log_popularity(rng, len(items))
    counts = _counts(rng, users, limit=int(np.isfinite(popularity).sum()) // 2)
    chosen, ratings = [], []
    for count in counts.tolist():
        liking = _liking(rng, attributes)
        # Gumbel noise and the largest keys: a weighted draw without replacement. Taste nudges what one tries.
        keys = popularity + 0.5 * liking + rng.gumbel(size=len(items))
        rated = np.argsort(-keys, kind="stable")[:count]
        opinion = 3.4 + liking[rated] + quality[rated] + rng.normal(0.0, 0.6, count)
        chosen.append(rated)
        ratings.append(np.clip(np.round(opinion * 2) / 2, 0.5, 5.0))
    user, item, rating = np.repeat(np.arange(users), counts), np.concatenate(chosen), np.concatenate(ratings)
    seconds = rng.integers(0, INTERACTIONS_DAYS * 86_400, user.size)
    order = np.lexsort((item, user, seconds))
    start = np.datetime64((INTERACTIONS_END - timedelta(days=INTERACTIONS_DAYS)).replace(tzinfo=None), "us")
    columns = [
        pa.array([f"u{n + 1:05d}" for n in user[order].tolist()], pa.string()),
        pa.array([items[n].item_id for n in item[order].tolist()], pa.string()),
        pa.array(rating[order].astype(np.float32)),
        pa.array(start + seconds[order].astype("timedelta64[s]"), pa.timestamp("us", tz="UTC")),
    ]
    return pa.table(columns, schema=INTERACTIONS)


def _log_popularity(rng: np.random.Generator, count: int) -> Floats:
    """Logarithm of how often each item is met: Zipf's law in random order, never for one item in twelve."""
    popularity = -0.8 * np.log1p(rng.permutation(count).astype(np.float64))
    popularity[rng.permutation(count)[: count // 12]] = -np.inf
    return popularity


def _counts(rng: np.random.Generator, users: int, *, limit: int) -> Ints:
    """Ratings per user: log-normal around the mean, at most ``limit``."""
    sigma = 0.8
    counts = rng.lognormal(np.log(MEAN_INTERACTIONS) - sigma**2 / 2, sigma, users).round().astype(np.int64)
    return np.minimum(np.clip(counts, FEWEST_INTERACTIONS, MOST_INTERACTIONS), limit)


def _liking(rng: np.random.Generator, attributes: list[tuple[Ints, float]]) -> Floats:
    """What one user thinks of every item: a taste for each value of each attribute, added up."""
    total = np.zeros(len(attributes[0][0]))
    for codes, spread in attributes:
        total += rng.normal(0.0, spread, int(codes.max()) + 1)[codes]
    return total


def _attributes(items: list[Item]) -> list[tuple[Ints, float]]:
    """Per attribute the value of every item, as its text tells it, and how much tastes differ over it."""
    texts = [f"{item.title} {item.description}".lower() for item in items]
    return [
        (_codes([item.category.partition(" > ")[0] for item in items]), 0.65),
        (_codes([item.category for item in items]), 0.35),
        (_codes([_named(text, STYLES) for text in texts]), 0.55),
        (_codes([_named(text, PRICES) for text in texts]), 0.25),
        (_codes([_named(text, USES) for text in texts]), 0.25),
    ]


def _named(text: str, vocabulary: Mapping[str, tuple[str, ...]]) -> str:
    """The value that the text names first; empty where it names none."""
    found = [(text.find(word), value) for value, words in vocabulary.items() for word in words if word in text]
    return min(found, default=(0, ""))[1]


def _codes(values: list[str]) -> Ints:
    """Each value as a number from 0, in alphabetical order."""
    return np.unique(np.array(values), return_inverse=True)[1].astype(np.int64)
