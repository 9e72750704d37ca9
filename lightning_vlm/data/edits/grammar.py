"""Small words: what ends a noun phrase, what must agree with it, what counts."""

from __future__ import annotations


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


def lines(text: str) -> list[str]:
    """The lines of a list; indented ones go on."""
    return text.strip().replace("\n  ", " ").splitlines()


# What a noun phrase begins with, and what never belongs to one.
DETERMINERS = words(
    "a an the this that his her its their my our your one another each every no some any two three four five six "
    "seven eight nine ten several many few 2 3 4 5 6 7 8 9 10"
)
SINGULAR_ARTICLES = words("a an one another each every this")
PLURAL_ARTICLES = DETERMINERS - SINGULAR_ARTICLES - words("the that his her its their my our your no any")
PRONOUNS = words("his her hers he she him himself herself it its itself it's he's she's")
LINKING = words("is are was were being looks appears painted colored coloured")
FUNCTION = DETERMINERS | PRONOUNS
FUNCTION |= words(
    "of in on at with and or to from for by near next beside besides behind above below under underneath beneath "
    "over inside outside into onto through across along alongside around against between among amongst amid "
    "during as while up down off out away toward towards past atop together about not being be been but nor both "
    "all where when then there here after before like without within via upon alone outdoors indoors which who "
    "whom whose what how why if than because is are was were am has have had having do does did can could will "
    "would may might must should so too also very just only it them they us we you i me themselves someone "
    "something everyone nearby facing side is's ahead apart again still overhead"
)
# Verbs that follow a noun, or one in the plural; words that look like verbs but follow a noun in a compound.
VERBS = words(
    "sits stands lies lays rides holds walks runs plays looks eats drinks flies jumps swings hits throws catches "
    "takes makes has gets goes comes drives pulls carries wears sleeps rests waits watches poses smiles talks "
    "skates surfs skis grazes swims hangs leans performs shows features contains includes travels moves passes "
    "stops turns cuts prepares cooks serves feeds enjoys reads uses works tries attempts reaches points kneels "
    "bends crosses kicks brushes licks chases crouches perches floats fills laying lying sat stood lit cut seen "
    "shown held taken eaten laid set hung worn stuck built made full ready open upside lined topped parked loaded "
    "looking going"
)
PLURAL_VERBS = words(
    "sit stand lie lay ride hold walk run play look eat fly jump graze rest wait watch pose travel swim hang lean "
    "perch gather cross"
)
NO_VERBS = words(
    "bed red shed sled seed weed need building ceiling painting railing clothing wedding evening morning awning "
    "crossing racing riding string ring king wing thing bedding serving setting landing parking walking boarding "
    "feed training clearing covering pudding dressing frosting icing topping stuffing skiing surfing washing"
)
# Verbs by which a sentence says that its subject is one; what those of `AGREE` become.
SINGULAR_VERBS = words(
    "is has was does it's that's sits stands lies lays rides holds walks runs plays looks eats drinks flies jumps "
    "hits throws catches takes makes gets goes comes drives pulls carries wears sleeps rests waits watches poses "
    "smiles talks skates surfs skis grazes swims hangs leans performs shows features contains includes travels "
    "moves passes stops turns cuts prepares cooks serves feeds enjoys reads uses works tries attempts reaches "
    "points kneels bends crosses kicks brushes licks chases crouches perches floats fills blows bites carves "
    "leads herds climbs paddles peers stares gazes sniffs lifts puts rolls heads glides rounds rows speaks dances "
    "cleans washes displays leaves"
)
AGREE = {"is": "are", "was": "were", "has": "have"}
# What a thing follows that there may as well be two of.
BEFORE_OBJECT = words(
    "with and holding near beside behind to by watching eating feeding carrying has have pulling petting holds "
    "flying cutting chasing walking eats carries making preparing contains including"
)
AFTER_OBJECT = words(
    "on in at near next beside behind under underneath beneath above over inside outside into onto through across "
    "along around against between down up during while with together outdoors indoors and"
)
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
NO_COUNT = FUNCTION | words("way year years tone toned")
# Words for a number: of two, of more than the one that is named, of some.
PAIRS = ("couple", "pair", "two", "2", "both", "twin", "double")
MANY = ("several", "many", "group", "bunch", "herd", "flock", "crowd", "row", "rows", "lots", "people", *PAIRS)
GROUPS = words("group herd flock crowd pack")
NO_PAIR = words("skis scissors glasses sunglasses shoes boots pants jeans shorts")
