"""Things: COCO's 80 categories and what else its captions name, in groups whose members stand in for each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from lightning_vlm.data.edits.grammar import lines, words

_IRREGULAR = {
    "man": "men", "woman": "women", "child": "children", "person": "people", "sheep": "sheep", "knife": "knives",
    "shelf": "shelves", "calf": "calves", "goose": "geese", "scarf": "scarves", "gentleman": "gentlemen",
    "mouse": "mice", "fireman": "firemen", "policeman": "policemen", "bison": "bison",
}  # fmt: skip
# One group to a line, concepts by `;`, their words by `,`. `~` is only recognised, never exchanged; `>` is only swapped
# in. A group that begins with `*` holds masses, without article and plural; with `@` places, which are not counted.
# After `!` stands what forbids the exchange: a word right before the noun, a preposition before its article, `-word`
# anywhere in the caption, and `&` for nouns in a list of what is there ("with …", "and …"), which other things of the
# group may be too, unmentioned.
_GROUPS = """
man, guy, gentleman, ~male, ~boy, ~father, ~dad, ~he, ~husband; woman, lady, ~female, ~girl, ~mother, ~mom, ~she,
  ~wife
boy, ~man, ~guy, ~male, ~he; girl, ~woman, ~lady, ~female, ~she
child, kid, toddler; > adult, ~man, ~woman, ~lady, ~guy, ~person, ~mother, ~father, ~boy, ~girl
mother, mom, ~woman, ~lady; father, dad, ~man, ~guy
person; > dog, ~puppy; > horse ! -skateboard -table -attempts -holding -wearing -riding -playing -skiing -talking -using
  -reading -cooking -preparing -posing -driving -surfing -surf -snowboarding &
skier; snowboarder, ~snow boarder, ~boarder; > sledder, ~sled
surfer; > kayaker, ~kayak, ~paddle, ~paddling; > swimmer, ~swimming
skateboarder; > cyclist, ~bike, ~bicycle; > roller skater
batter, baseball player; > cricketer; > goalkeeper
pitcher; catcher; umpire
tennis player; > golfer; > fencer; > goalkeeper
policeman, cop, police officer, ~police; firefighter, fireman; soldier
dog, puppy, ~hound; cat, kitten, ~kitty; > rabbit, ~bunny ! hot prairie corn chili sausage
horse, pony; cow, bull, ox, ~cattle, ~calf; sheep, lamb; > donkey ! rocking
elephant; giraffe; zebra; > rhinoceros, ~rhino
bear, ~bears, ~cub; > lion; > wolf; > tiger ! teddy polar panda grizzly gummy stuffed
bird, ~parrot, ~pigeon, ~seagull, ~duck, ~goose, ~owl, ~eagle, ~hawk, ~crow; > squirrel; > butterfly ! big
duck, ~goose, ~swan, ~bird; > frog; > turtle
seagull, gull, ~bird; > crow; > butterfly
pigeon, ~bird; > squirrel
train, ~locomotive, ~engine, ~trolley, ~tram; bus; truck ! fire pick up pickup dump tow food garbage to double decker
  steam school tour model toy subway freight commuter passenger &
car, ~sedan, ~suv, ~vehicle, ~taxi, ~cab; van, ~minivan; > tractor ! train cable rail street box trolley subway police
  passenger railroad dining &
motorcycle, motorbike, ~motor bike, ~motor cycle, ~moped, ~scooter, ~bike, ~dirt bike; bicycle, ~bike, ~cyclist,
  ~cycle
bike, ~bicycle, ~motorcycle; > scooter, ~moped; > skateboard ! motor dirt mountain
airplane, plane, jet, airliner, aircraft, aeroplane; helicopter ! sea water
boat, sailboat, ~ship, ~canoe, ~kayak, ~ferry, ~vessel, ~yacht; > seaplane, ~plane, ~airplane; > iceberg ! gravy
fire truck, firetruck, ~fire engine; ambulance; police car
stroller; > wheelchair
chair, ~seat, ~recliner, ~armchair, ~stool; bench; couch, sofa, ~loveseat, ~futon, ~love seat; bed ! in wheel high
  dental arm flower single double twin two bunk hospital lawn park dining office desk beach dog &
@ table, desk, counter, countertop, ~dining table, ~coffee table, ~picnic table; > shelf; > windowsill, ~sill ! kitchen
  dining coffee picnic office computer end side bedside pool ping pong at around buffet bathroom night dressing &
oven, stove, microwave, ~range, ~stovetop; > washing machine, ~washer; > fireplace ! toaster brick pizza
refrigerator, fridge, ~freezer; > washing machine, ~washer; > vending machine; > bookcase, ~bookshelf
dishwasher; > fireplace
toilet, ~urinal, ~commode, ~seat; > washing machine, ~washer; > fireplace; > bookcase ! public
sink; > washing machine, ~washer; > fireplace; > dishwasher ! hot
bathtub, tub, bath tub, ~bath; > washing machine, ~washer; > fireplace; > bookcase ! hot
shower; > fireplace; > bookcase ! to
laptop, laptop computer, ~computer, ~notebook, ~macbook; > typewriter; > tablet, ~ipad; > cash register
computer, desktop computer, ~laptop, ~monitor, ~notebook, ~macbook; > typewriter; > sewing machine
television, tv, ~monitor, ~screen; > radio; > fish tank; > fireplace ! watching screen
computer monitor, monitor, ~screen, ~tv, ~television, ~computer; > fish tank
keyboard, ~piano; > typewriter; > tablet ! to the
cell phone, cellphone, phone, smartphone, smart phone, ~telephone, ~iphone, ~device; remote control, remote,
  ~controller, ~wii; > flashlight ! on -talking -text -texting -conversation game pay wii
video game; > board game; > card game
plate, ~dish, ~platter, ~saucer, ~tray; > napkin; > cutting board ! license home name hot & in
bowl, ~dish; basket; > box; > bucket ! toilet dog &
cup, mug, ~glass; bottle; > can; > jug ! coffee tea paper & of
glass, ~wine glass, ~cup, ~drink; > mug; > jug ! magnifying wine stained of the &
fork, spoon; > spatula; > toothbrush ! with plastic
knife; > spatula; > paintbrush ! with plastic
toothbrush; > comb; > paintbrush; > lollipop
vase, ~pot, ~jar, ~pitcher; basket; > bucket
umbrella, ~parasol; > flag; > balloon ! beach under
kite, ~parachute, ~parasail; > balloon; > flag
skateboard, skate board; surfboard, surf board; snowboard, snow board
frisbee, frisbees, ~disc, ~disk; ball, ~football, ~tennis ball, ~baseball; > stick ! tennis soccer base basket beach
  foot bowling cricket exercise golf disco volley yarn
tennis ball; > shuttlecock; > basketball
soccer ball; > basketball; > volleyball
tennis racket, tennis racquet, racket, racquet, ~rackets; baseball bat, bat, ~bats; > golf club; > hockey stick ! at
  to
baseball glove, glove, mitt, baseball mitt, catcher's mitt; > bucket; > lacrosse stick ! oven
fire hydrant, hydrant; parking meter, ~meter; > mailbox; > trash can, ~garbage can
traffic light, stoplight, stop light, traffic signal, ~light, ~lights, ~signal; stop sign; > billboard
street sign, ~sign, ~signs; > mailbox; > lamp post, ~lamp, ~light
clock tower; > lighthouse; > windmill
clock; > bell; > flag, ~flags ! alarm o'clock
teddy bear, ~stuffed animal, ~stuffed animals, ~bear, ~toy, ~toys; > doll; > robot; > toy car
suitcase, ~luggage, ~bag, ~case; backpack, ~bag; purse, handbag, ~bag; > cardboard box, ~box, ~boxes
hat, cap; helmet; > headscarf, ~scarf; > wig ! hard baseball chef's santa cowboy straw top
tie, necktie, ~bow tie, ~ties; > scarf; > medal ! bow to neck
suit, ~tie, ~jacket; uniform; > bathrobe; dress, ~gown ! wet swim bathing baseball to bright
shirt, ~t-shirt, ~tee, ~jersey, ~blouse; > jacket; > sweater, ~hoodie; > raincoat ! t dress tee suit life
jacket, coat, sweater; > bathrobe; > dress ! dress suit life
@ door, ~doorway, ~doors; window, ~windows; > painting, ~picture ! garage oven car shower sliding train refrigerator
  screen &
mirror; > painting, ~picture; > poster ! rear side view rearview the
@ fence; wall; > hedge, ~bush, ~bushes ! brick stone &
@ tree; > statue; > flagpole, ~flag, ~pole ! christmas palm family &
@ building, ~house, ~tower, ~church, ~skyscraper; > statue; > tent, ~tents; > barn &
bush; > rock; > haystack
@ kitchen; bathroom, restroom, ~rest room; bedroom, ~bed; living room; office, ~desk; > garage; > classroom
@ dining room, ~dining; > laundry room; > garage
@ hotel room; > classroom; > garage
@ restaurant, ~cafe, ~diner, ~bar; > library; > hospital
@ store, shop, ~market, ~mall, ~bakery; > library; > hospital; > church
@ street, road, highway, ~freeway, ~lane, ~intersection, ~traffic; > beach, ~shore, ~ocean, ~sand; > pier ! in city
  dirt paved main rail middle
@ sidewalk; > beach, ~sand, ~shore; > pier
@ beach, ~shore, ~ocean, ~sand, ~seashore; > sidewalk; > pier; > street
@ field, meadow, pasture, ~grass; > forest, ~woods, ~wooded; > parking lot, ~lot, ~parking; > desert ! on baseball
  tennis soccer ball football play base sports magnetic playing onto
@ park, ~playground; > desert; > swamp ! skate ball amusement ski trailer to car
@ ocean, sea; lake; river, ~stream
@ forest, ~woods, ~wooded; > desert; > parking lot, ~lot
@ city, town; > desert; > forest ! to
@ zoo; > circus; > desert
@ airport; > harbor, ~dock; > car dealership
@ train station, station; > airport; > harbor ! fire gas police subway bus
@ runway, tarmac; > lawn, ~grass; > beach
@ parking lot; > meadow, ~field, ~grass; > swamp
@ skate park; > parking lot, ~lot; > driveway
@ tennis court, court; > beach; > lawn, ~grass
@ baseball field; > beach; > parking lot, ~lot
@ hill, hillside, ~slope, ~mountain; > beach; > pier ! up
pizza, ~pizzas; hamburger, burger, cheeseburger; hot dog, hotdog, ~hotdogs; sandwich, ~sub, ~bun; salad, ~salads; taco
  ! of
cake, ~cupcake, ~cupcakes; pie; > loaf of bread, ~bread ! birthday wedding of cup layer pan
donut, doughnut, ~pastry, ~pastries; cookie; muffin; > bagel
banana; apple; > pear; > lemon; > peach ! of &
carrot; potato; mushroom; tomato; > onion ! &
bridge; > tunnel; > pier
statue; > fountain; > lamp post, ~lamp, ~light
lamp, ~light; > fan; > plant
book; > magazine; > newspaper
candle; > flower; > balloon
fireplace; > piano; > bathtub, ~tub
wedding cake, birthday cake, ~cake, ~cakes; > wedding gift, ~gift, ~gifts; > pie
flower, ~rose, ~roses; > feather; > balloon
wave; > waterfall ! to
rock; > snowbank, ~snow; > bush, ~bushes
toy; > tool; > book
basket; > bucket; > suitcase
box; > basket; > bucket
blanket, towel; > newspaper; > raincoat ! beach
pillow; > book; > balloon
* broccoli, ~salad; cauliflower; spinach; > cabbage
* rice; pasta; > couscous
* coffee, ~latte; tea; milk
* wine; beer ! white red
* snow, ~snowy, ~snow-covered; sand, ~sandy, ~beach; > mud, ~muddy ! of
* grass, ~grassy, ~lawn; snow, ~snowy; sand, ~sandy, ~beach; > mud, ~muddy
* water, ~ocean, ~lake, ~river, ~pond, ~pool; > sand, ~beach, ~sandy; > snow, ~snowy; > grass, ~grassy ! of with body
  the's ski bottled open
* bread; > cheese
* luggage, ~suitcases, ~suitcase, ~bags, ~bag; > furniture, ~chair, ~couch
* baseball; soccer; basketball; volleyball ! a the of -bat -racket -racquet
* tennis; badminton; golf; cricket ! a the of -racket -racquet -rackets
* skiing, ~skis, ~ski, ~skier; snowboarding, ~snowboard
* skateboarding; > roller-skating
* surfing; > kayaking, ~kayak; > swimming
* frisbee; > catch; > football ! a the with of
* fruit; > candy; > bread
* meat; > fish; > tofu
"""


@dataclass(frozen=True, slots=True)
class Form:
    """A word in both numbers; a mass has no plural."""

    singular: str
    plural: str = ""


@dataclass(frozen=True, slots=True)
class Concept:
    """A thing with its words.

    Attributes:
        forms: of its words, the one that is swapped in first. source: whether it can be exchanged itself.
        extra: words that mention it but are never exchanged.
    """

    forms: tuple[Form, ...]
    source: bool
    extra: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Noun:
    """A noun found in a caption.

    Attributes:
        length: in tokens. number: `one`, `many` or `mass`. form, concept: which it is.
        siblings: what it can be exchanged for. sexed: whether pronouns elsewhere follow it.
        place: whether it is where things are. stops: what forbids an exchange.
    """

    length: int
    number: str
    form: Form
    concept: Concept
    siblings: tuple[tuple[Form, Concept], ...]
    sexed: bool
    place: bool
    stops: frozenset[str]

    def refused(self, tokens: Sequence[str], start: int) -> bool:
        """Whether what stands before it at `start`, or anywhere in the caption, forbids the exchange."""
        first = start  # of the noun phrase
        while first and tokens[first - 1] not in _PREPOSITIONS and start - first < _PHRASE:
            first -= 1
        before = tokens[first - 1] if first else ""
        listed = "&" in self.stops and before in _LISTS
        near = {before, *tokens[max(0, start - 1) : start]}
        return listed or bool(self.stops & near) or any(f"-{token}" in self.stops for token in tokens)


def plural(word: str) -> str:
    """The plural of a noun, its last word inflected: `stop sign` → `stop signs`."""
    head, _, last = word.rpartition(" ")
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif last.endswith(("s", "x", "ch", "sh")) or last in ("potato", "tomato"):
        last += "es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return f"{head} {last}".strip()


def _read_groups() -> Iterator[tuple[str, list[Concept], frozenset[str]]]:
    for line in lines(_GROUPS):
        body, _, stops = line.partition("!")
        sort = body[0] if body[0] in "*@" else ""
        concepts = []
        for entry in body.lstrip("*@ ").split(";"):
            names = [name.strip() for name in entry.split(",")]
            source = not names[0].startswith(">")
            names[0] = names[0].lstrip("> ")
            forms = [Form(n, "" if sort == "*" else plural(n)) for n in names if not n.startswith("~")]
            concepts.append(Concept(tuple(forms), source, tuple(n[1:] for n in names if n.startswith("~"))))
        yield sort, concepts, words(stops)


@cache
def _nouns() -> dict[tuple[str, ...], Noun]:
    """Noun phrase in tokens → what it is; a phrase of several groups belongs to the first."""
    table: dict[tuple[str, ...], Noun] = {}
    for sort, concepts, stops in _read_groups():
        for concept in concepts:
            siblings = tuple((other.forms[0], other) for other in concepts if other is not concept)
            for form in concept.forms if concept.source else ():
                sexed = form.singular in _SEXED
                for number, phrase in (("mass" if sort == "*" else "one", form.singular), ("many", form.plural)):
                    if key := tuple(phrase.split()):
                        noun = Noun(len(key), number, form, concept, siblings, sexed, sort == "@", stops)
                        table.setdefault(key, noun)
    return table


_SEXED = words("man guy gentleman woman lady boy girl mother mom father dad")
_LONGEST, _PHRASE = 3, 4  # tokens of a noun; words between a preposition and its noun
_PREPOSITIONS = words(
    "in at on around under onto up with and , has have of containing including featuring by to into near from "
    "beside behind over above below through across along down next inside outside for that while as atop beneath"
)
_LISTS = words("with and , has have of containing including featuring")


def match(tokens: Sequence[str], index: int) -> Noun | None:
    """The longest noun that begins at a token, or None."""
    for length in range(_LONGEST, 0, -1):
        noun = _nouns().get(tuple(tokens[index : index + length]))
        if noun is not None:
            return noun
    return None


@cache
def mentions_of(concept: Concept) -> tuple[str, ...]:
    """Everything that mentions a thing, in both numbers."""
    singular = [*(form.singular for form in concept.forms), *concept.extra]
    return tuple(dict.fromkeys([*singular, *(plural(word) for word in singular)]))


# Words before any noun with which it names something else.
COMPOUNDS = words("teddy fire traffic stop parking cell remote")
PLURALS = frozenset(key[0] for key, noun in _nouns().items() if noun.number == "many" and len(key) == 1)
PLURALS |= words("people animals players sheep")
