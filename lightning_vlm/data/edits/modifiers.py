"""Colours, other adjectives and relations: what may be exchanged for what, and where."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lightning_vlm.data.edits.grammar import lines, words

# --- colours ----------------------------------------------------------------------------------------------------------

# Colour → those that are too near to stand for a wrong one.
COLOURS = {
    colour: words(near)
    for colour, near in {
        "white": "gray silver yellow",
        "black": "gray brown blue",
        "red": "orange pink brown purple",
        "blue": "purple gray green black",
        "green": "yellow blue",
        "yellow": "orange green white gold",
        "orange": "red yellow brown pink",
        "pink": "red purple orange",
        "purple": "blue pink red",
        "brown": "black orange red yellow gray",
        "gray": "white black silver blue brown",
        "grey": "gray white black silver blue brown",
        "silver": "gray white",
        "gold": "yellow brown orange",
        "golden": "yellow brown orange",
        "tan": "brown white yellow orange",
        "beige": "brown white yellow",
        "blonde": "yellow white brown",
        "blond": "yellow white brown",
        "maroon": "red brown purple",
        "teal": "blue green",
        "turquoise": "blue green",
    }.items()
}
NEW_COLOURS = ("white", "black", "red", "blue", "green", "yellow", "orange", "pink", "purple", "brown", "gray")
# With these a colour word is a name, or no colour.
NOT_COLOURED = words(
    "board boards beans bean salad pepper peppers onion onions sauce juice house light lights sox bull jay jays olives "
    "olive top tops cream wine hot dirt slice slices peel tree soda carrot carrots velvet tea berries berry "
    "cheese cross photo photos photograph picture image shot view"
)
# A noun → the colours it is commonly seen in.
COLOURS_OF = {
    noun: tuple(colours.split())
    for nouns, colours in (
        (
            "cat cats kitten kittens dog dogs puppy puppies horse horses pony cow cows bull cattle sheep goat goats "
            "rabbit bear bears bird birds duck ducks fur",
            "white black brown gray",
        ),
        ("hair haired beard mustache", "black blonde gray red"),
        (
            "grass field fields lawn pasture trees leaves grassy forest foliage hillside hills hill",
            "green brown yellow",
        ),
        ("sky skies", "blue gray orange"),
        ("water ocean sea lake", "blue brown green gray"),
        ("banana bananas", "yellow green brown"),
        ("apple apples", "red green yellow"),
        ("snow", ""),
    )
    for noun in nouns.split()
}

# --- attributes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Adjective:
    """What stands in place of an adjective.

    Attributes:
        new: the choices. before: one of these must follow (any, if empty). unlike: none of these may.
    """

    new: tuple[str, ...]
    before: frozenset[str]
    unlike: frozenset[str]


_PEOPLE = (
    "man woman lady guy gentleman boy girl child kid toddler baby person men women ladies guys gentlemen boys girls "
    "children kids toddlers people persons couple male female males females adult adults player players"
)
PERSONS = words(_PEOPLE)
_STREETS = "street streets road roads sidewalk city beach market park parking lot highway intersection runway"
_ROOMS = "room rooms kitchen bathroom bedroom office living restaurant train bus subway station airport restroom desk"
_FURNITURE = (
    "table tables bench benches chair chairs desk shelf shelves box boxes crate crates spoon spoons door doors fence "
    "gate frame pole post bridge floor floors board boards tray stand cabinet cabinets sign statue dresser bowl stool "
    "counter structure railing cutting picnic park coffee platform deck dock ramp wall walls headboard"
)
_CLOTH = (
    "shirt dress tie ties umbrella umbrellas blanket couch sofa curtain curtains tablecloth cloth pillow pillows "
    "wallpaper jacket suit skirt bedspread comforter towel shorts hat scarf pajamas sweater bed chair"
)
_COLOURED = " ".join(COLOURS)
# OLD: NEW [@ one of these follows] [! none of these follows]; indented lines go on
_ADJECTIVES = f"""
large big huge giant enormous massive gigantic: small, tiny ! ben bird amount mouth
small tiny miniature: large, huge ! amount
little: large, big @ bird birds dog dogs cat table house boat car train plane truck bear kite kitten plate bowl room
tall: short
short: tall @ {_PEOPLE} building buildings tree trees giraffe tower fence grass
short: long @ hair haired dress sleeve sleeved train sleeves pants skirt board
long: short @ hair haired table train bench hallway dress board boat sleeve sleeved couch desk sleeves tail skirt line
narrow: wide
wide: narrow ! open eyed
thick: thin
thin: thick
high: low @ shelf wall fence wave waves ceiling chair
steep: gentle, flat
old: young @ {_PEOPLE}
old: new, brand-new ! fashioned fashion time style school {_PEOPLE}
new: old ! york years year zealand england
young: old, elderly @ man woman lady men women couple people person guy adult male female gentleman
elderly: young
older: younger
younger: older
modern: old-fashioned, antique
antique vintage old-fashioned: modern
empty: crowded @ {_STREETS} {_ROOMS} bench benches
empty: full @ plate plates bowl bowls glass bottle cup box fridge refrigerator shelf shelves case suitcase
busy crowded: deserted, empty @ {_STREETS} {_ROOMS}
cluttered messy: tidy, neat
tidy neat: messy, cluttered
clean: dirty
dirty: clean
wet: dry ! suit
dry: wet
open opened: closed @ door doors window windows laptop refrigerator fridge umbrella umbrellas book suitcase box oven
  toilet mouth drawer cabinet lid laptops seat lap
closed: open
lush: dry, barren ! {_COLOURED} garden
dirt: paved @ road roads path street trail lot
paved: dirt, muddy
muddy: dry, clean
grassy: snowy, sandy, rocky @ field hill hillside area plain meadow slope fields park ground pasture lawn knoll bank
  yard
snowy snow-covered: grassy, sandy @ field hill hillside slope mountain area road ground street slopes path bank
  mountainside landscape trail track
sandy: grassy, snowy, rocky
rocky: grassy, sandy, snowy
sunny: rainy, stormy
cloudy overcast: sunny, clear
clear: cloudy, stormy @ sky skies day blue
rainy: sunny
calm: rough, choppy @ water waters ocean sea lake waves
dark: bright @ room street area sky kitchen bathroom night living
colorful colourful: plain, dull
bright brightly: dull @ orange red yellow green blue pink colored lit sunny light colors purple
smiling: frowning, crying
happy: sad, angry
sad: happy
sleeping: awake @ cat dog cats dogs man woman baby child bear
ripe: unripe
unripe: ripe
fresh: rotten, moldy @ fruit fruits vegetables vegetable bananas produce apples oranges carrots broccoli
raw uncooked: cooked
cooked: raw @ pizza food meat chicken broccoli vegetables meal dish
sliced: whole @ pizza cake apple apples banana bananas oranges bread carrots tomatoes fruit sandwich
whole: sliced @ pizza cake pie
blurry: sharp, crisp
outdoor: indoor
indoor: outdoor
public: private @ restroom bathroom toilet transportation bus area
male: female
female: male
fat: thin, skinny
heavy: light @ traffic snow rain
stuffed: wooden, plastic @ animal animals bear bears toy
wooden wood: metal, plastic, stone, glass @ {_FURNITURE}
metal steel iron: wooden, plastic, glass @ {_FURNITURE} train pan rack container bowl object
plastic: wooden, metal, glass @ {_FURNITURE} container bag cup bottle containers plate fork bottles cups plates toy
glass: wooden, plastic, metal @ table tables door doors vase vases bowl case shelf plate jar cup container bottle
  bottles desk
stone brick: wooden, metal @ {_FURNITURE} building buildings house tower oven wall walls archway fireplace church
concrete cement: wooden, metal @ {_FURNITURE} bench wall ramp block steps slab
paper: plastic, glass, metal @ plate plates cup cups bag bags bowl tray
marble granite: wooden, plastic @ counter counters countertop countertops floor statue table
leather: cloth, plastic @ couch sofa chair chairs seat seats jacket bag suitcase recliner
striped: plaid, floral, spotted ! animal animals
plaid checkered checked: striped, floral
floral flowered: striped, plaid @ {_CLOTH}
spotted: striped
round circular: square, triangular @ table mirror plate window clock clocks rug tray sign pizza pan sink tables
  mirrors plates object
square rectangular: round, oval @ table mirror plate window clock tray sign pizza pan rug plates windows object box
  dish
double: single @ decker
passenger: freight, cargo @ train trains jet airplane plane
"""


def _adjectives() -> dict[str, list[Adjective]]:
    table: dict[str, list[Adjective]] = {}
    for line in lines(_ADJECTIVES):
        old, _, rest = line.partition(":")
        rest, _, unlike = rest.partition("!")
        new, _, before = rest.partition("@")
        rule = Adjective(tuple(n.strip() for n in new.split(",")), words(before), words(unlike))
        for word in old.split():
            table.setdefault(word, []).append(rule)
    return table


ADJECTIVES = _adjectives()
# What says the same as an adjective that is swapped in.
SIGNS = {
    new: tuple(signs.split())
    for new, signs in {
        "small": "little miniature", "tiny": "little small", "large": "big huge giant", "huge": "large big giant",
        "big": "large huge giant", "grassy": "grass", "snowy": "snow", "sandy": "sand beach", "rocky": "rock rocks",
        "rainy": "rain raining umbrella umbrellas wet", "stormy": "rain clouds", "sunny": "sun sunlight",
        "clear": "sunny", "cloudy": "clouds", "crowded": "people busy crowd", "full": "filled", "elderly": "old older",
        "old": "older elderly antique vintage aged", "young": "younger boy girl little", "wooden": "wood",
        "metal": "steel iron metallic silver", "stone": "brick rock concrete marble", "messy": "cluttered mess",
        "cluttered": "messy clutter", "dirty": "muddy mud dirt", "wet": "rain water rainy", "open": "opened",
        "closed": "shut", "single": "one", "striped": "stripes stripe", "dry": "brown dead", "round": "circular circle",
        "floral": "flowers flowered", "plaid": "checkered", "female": "woman women girl", "male": "man men boy",
        "cooked": "baked fried grilled", "whole": "entire", "short": "small low", "tall": "high big",
        "sliced": "slices",
        "bright": "lit sunny", "freight": "cargo", "cargo": "freight", "modern": "new", "dirt": "muddy gravel",
        "muddy": "mud dirt", "private": "home", "outdoor": "outside outdoors", "indoor": "inside indoors",
        "deserted": "empty", "empty": "deserted", "plastic": "toy", "awake": "eyes",
    }.items()
}  # fmt: skip

Pattern = tuple[re.Pattern[str], tuple[str, ...]]


def _patterns(*rules: tuple[str, str]) -> tuple[Pattern, ...]:
    """(what is exchanged, as group `x` or whole; choices)."""
    made = ((p if "(?P<x>" in p else f"(?P<x>{p})", new) for p, new in rules)
    return tuple((re.compile(rf"\b{p}\b", re.IGNORECASE), tuple(new.split(", "))) for p, new in made)


PHRASES = _patterns(
    (r"(?P<x>black (?:and|&) white)(?= (?:photo|photograph|picture|image|shot|view|scene)s?\b)", "color"),
    (r"(?P<x>indoors)", "outdoors"),
    (r"(?P<x>outdoors)", "indoors"),
    (r"at night", "at noon"),
    (r"(?:during|in) the day", "at night"),
    (r"(?P<x>old fashioned)", "modern"),
    (r"(?P<x>double-decker)", "single-decker"),
)

# --- relations --------------------------------------------------------------------------------------------------------

# What must follow, what a noun phrase begins with, and nouns by what one can do with them.
_DET = r"(?=\s(?:an?|the|some|his|her|its|their|this|that|another|one|two|three|several|each|each other|him|them|it)\b)"
_SOME = r"(?:an?|the|his|her|its|their|some)\s(?:(?!of\b|in\b|on\b|with\b|and\b|that\b|holding\b)[\w-]+\s){0,2}"
_BELOW = r"(?:table|desk|bench|chair|couch|sofa|bed|shelf|counter|stool|rack|blanket|rug|towel|truck|roof)"
_MOUNT = r"(?:horse|horses|elephant|elephants|motorcycle|motorcycles|bike|bicycle|skateboard|surfboard|scooter|camel)"
_HOLDERS = (
    r"(?:bowl|box|basket|vase|suitcase|sink|bathtub|tub|toilet|crate|drawer|cage|car|truck|boat|bucket|tent|pen|oven)"
)
_SLOPES = r"(?:hills?|slopes?|mountains?|stairs|ramps?|hillside|mountainside|staircase|steps|stairway)"
RELATIONS = _patterns(
    ("in front of", "behind"),
    (rf"behind{_DET}", "in front of"),
    (r"in back of", "in front of"),
    ("on top of", "underneath, next to"),
    (rf"atop{_DET}", "underneath, next to"),
    (rf"(?P<x>on|onto)\s(?={_SOME}{_BELOW}\b)", "under, next to, behind"),
    (rf"(?P<x>on|onto)\s(?={_SOME}{_MOUNT}\b)", "next to, behind, in front of"),
    (rf"(?P<x>on)\s(?={_SOME}(?:plate|tray|platter|pan)\b)", "next to, under"),
    (rf"(?:underneath|beneath|under){_DET}", "on top of, above"),
    (rf"above{_DET}", "below"),
    (rf"below{_DET}", "above"),
    (rf"(?:next to|beside|alongside|adjacent to){_DET}", "far away from"),
    (rf"(?:near|close to){_DET}", "far away from"),
    (rf"inside of{_DET}|inside{_DET}", "outside"),
    (rf"outside of{_DET}|outside{_DET}", "inside"),
    (rf"(?P<x>in)\s(?={_SOME}{_HOLDERS}\b)", "next to, behind"),
    (rf"(?:looking|walking|going|coming|getting|sticking|pouring|jumping|reaching)\s(?P<x>into){_DET}", "out of"),
    (
        rf"(?:looking|walking|coming|leaning|sticking|hanging|getting|jumping|looks|peering)\s(?P<x>out of){_DET}",
        "into",
    ),
    (rf"(?:fl(?:y|ies|ying|own|ew)|jump\w*|hang\w*|hover\w*|leap\w*|soar\w*)\s(?P<x>over){_DET}", "under"),
    (rf"towards?{_DET}", "away from"),
    (rf"away from{_DET}", "toward"),
    (rf"(?P<x>down)(?=\s(?:[\w-]+\s){{0,4}}{_SLOPES}\b)", "up"),
    (rf"(?P<x>up)(?=\s(?:[\w-]+\s){{0,3}}{_SLOPES}\b)", "down"),
    (r"(?:the|his|her|its)\s(?P<x>left)(?=\s(?:side|hand|of|arm|foot|corner|lane|end|edge)\b|\s?[.,]|$)", "right"),
    (r"(?:the|his|her|its)\s(?P<x>right)(?=\s(?:side|hand|of|arm|foot|corner|lane|end|edge)\b|\s?[.,]|$)", "left"),
    (r"(?:in|into)\sthe\s(?P<x>background)", "foreground"),
    (r"in\sthe\s(?P<x>foreground)", "background"),
    (r"(?:on|at|near)\sthe\s(?P<x>top)(?=\sof)", "bottom"),
    (r"(?:on|at|near)\sthe\s(?P<x>bottom)(?=\sof)", "top"),
)
