"""Person phrases in a caption ("a young woman", "two men"), with their places in characters.

A small grammar of English noun phrases: determiner or number, adjectives, person noun. It knows what captions of
people say, and prefers a short phrase to a wrong long one.
"""

import re
from dataclasses import dataclass

SINGULAR = frozenset(
    """man woman boy girl person child kid baby toddler infant teen teenager adult guy lady gentleman gentlewoman lad
    gal dude fellow human someone somebody father mother dad mom mum grandfather grandmother grandpa grandma son
    daughter brother sister husband wife uncle aunt nephew niece bride groom boyfriend girlfriend friend twin actor
    actress singer musician guitarist drummer dancer artist painter photographer writer player athlete runner swimmer
    skier surfer skateboarder snowboarder cyclist biker rider wrestler boxer golfer footballer batter pitcher catcher
    goalkeeper soldier officer policeman policewoman fireman firefighter sailor pilot astronaut doctor nurse surgeon
    dentist scientist teacher student pupil professor chef cook waiter waitress barista bartender farmer worker
    businessman businesswoman politician president king queen prince princess monk nun priest bishop judge lawyer
    reporter journalist clown cowboy cowgirl hiker climber fisherman tourist passenger customer shopper spectator
    pedestrian couple""".split()
)
IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "people": "person", "ladies": "lady", "babies": "baby",
    "gentlemen": "gentleman", "gentlewomen": "gentlewoman", "policemen": "policeman", "policewomen": "policewoman",
    "firemen": "fireman", "fishermen": "fisherman", "businessmen": "businessman", "businesswomen": "businesswoman",
    "wives": "wife", "folks": "person", "kids": "kid",
}  # fmt: skip
PLURAL = frozenset(IRREGULAR) | frozenset(
    f"{word}es" if word.endswith(("s", "x", "ch")) else f"{word}s"
    for word in SINGULAR
    if not word.endswith(("man", "body", "one", "baby", "lady", "child", "wife"))
)
DETERMINERS = frozenset(
    """a an the this that these those another some any each every his her its their our my your one two three four
    five six seven eight nine ten eleven twelve several many few both various couple group crowd pair trio""".split()
)
MANY = frozenset("two three four five six seven eight nine ten eleven twelve several many few both various".split())
MODIFIERS = frozenset(
    """young old older elderly middle aged little small big large tall short thin slim slender fat heavy chubby stocky
    beautiful pretty handsome attractive cute lovely gorgeous adorable smiling laughing grinning frowning crying
    happy sad angry serious surprised calm bearded bald balding blonde blond brunette redheaded ginger haired eyed
    skinned freckled tanned tattooed shirtless muscular pregnant well dressed masked hooded veiled newborn male female
    teenage adult black white asian african american caucasian indian chinese japanese korean european hispanic latin
    latino latina arab middle-aged dark light fair pale brown red blue green gray grey yellow pink purple orange
    curly long short-haired famous unknown other single same different very professional young-looking lone first
    second third last foreign local native royal rich poor sleepy tired cheerful friendly""".split()
)
MODIFIER_ENDINGS = ("-haired", "-eyed", "-skinned", "-year-old", "-aged", "-looking", "-dressed", "-faced", "-old")
# Words that can never stand inside a noun phrase: an unknown word that is none of them may be an adjective.
BREAKS = frozenset(
    """of in on at by with without near next to from for into onto over under behind beside between through during
    before after above below around across along against as like and or but while when where who whom whose which
    is are was were be been being has have had do does did will would can could should may might must not no
    i you he she it we they him them there here then than so if because wears holds sits stands walks looks smiles
    plays rides eats drinks reads takes poses wearing holding sitting standing walking looking playing riding eating
    drinking reading taking posing talking kissing hugging helping watching showing making using""".split()
)
# A person noun before one of these is no person: "baby elephant", "boy band", "doll" and the like.
NO_PERSON_AFTER = frozenset(
    """elephant bird bear cow goat sheep giraffe zebra cat dog horse duck animal carriage stroller shower bottle food
    crib seat band scout hat clothes shoes cave statue doll mannequin figurine""".split()
)
WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*|[^\w\s]")


@dataclass(frozen=True)
class Phrase:
    """A person phrase: caption[start:end] == text. `plural`: it names several people ("two men")."""

    text: str
    start: int
    end: int
    plural: bool = False


@dataclass(frozen=True)
class _Word:
    text: str
    start: int
    end: int


def find_person_phrases(caption: str) -> list[Phrase]:
    """Return the person phrases of a caption from left to right; offsets are in characters, the end exclusive.

    A possessive ends before its apostrophe ("a man's face": "a man"). A plural is one phrase ("two men"); a later step
    ties it to one segment only.
    """
    words = [_Word(match[0].lower(), match.start(), match.end()) for match in WORD.finditer(caption)]
    phrases = []
    taken = -1
    for index, word in enumerate(words):
        if not _is_head(words, index):
            continue
        first = _first_word(words, index, taken)
        start = words[first].start
        plural = word.text in PLURAL or words[first].text in MANY or word.text == "couple"
        phrases.append(Phrase(caption[start : word.end], start, word.end, plural))
        taken = index
    return phrases


def phrase_ending_at(caption: str, end: int) -> Phrase:
    """Return the noun phrase that ends at a place of the caption; the last word alone when it is no person noun.

    Args:
        caption: the caption.
        end: where the phrase ends, in characters, exclusive.

    Raises:
        ValueError: the place is outside of the caption or inside of a word.
    """
    if not 0 < end <= len(caption):
        raise ValueError(f"subject end {end} is not within the caption's {len(caption)} characters")
    words = [_Word(match[0].lower(), match.start(), match.end()) for match in WORD.finditer(caption)]
    index = next((index for index, word in enumerate(words) if word.end == end), None)
    if index is None:
        raise ValueError(f"subject end {end} is not the end of a word of the caption")
    first = _first_word(words, index, -1)
    start = words[first].start
    return Phrase(caption[start:end], start, end, words[index].text in PLURAL or words[first].text in MANY)


def _is_person(text: str) -> bool:
    return text in SINGULAR or text in PLURAL


def _is_head(words: list[_Word], index: int) -> bool:
    if not _is_person(words[index].text):
        return False
    following = words[index + 1].text if index + 1 < len(words) else ""
    after_of = words[index].text in ("couple",) and following == "of"
    return not (following in NO_PERSON_AFTER or _is_person(following) or after_of)


def _first_word(words: list[_Word], head: int, taken: int) -> int:
    """The index of the first word of the noun phrase with this head; words up to `taken` are another phrase's."""
    first = index = head
    unknown = False
    while (index := index - 1) > taken:
        text = words[index].text
        if text in DETERMINERS or text.isdigit():
            return _with_group(words, index, taken)
        if text in MODIFIERS or text.endswith(MODIFIER_ENDINGS) or _is_person(text):
            first = index if not unknown else first
        elif text in (",", "and") and _joins_modifiers(words, index):
            continue
        elif text in BREAKS or not text[0].isalnum():
            return _of_group(words, index, first, taken)
        elif unknown or words[index - 1 if index else 0].text not in DETERMINERS:
            return first
        else:
            unknown = True  # "a homeless man": one word that is not in the list, right after the determiner
    return first


def _joins_modifiers(words: list[_Word], index: int) -> bool:
    neighbours = words[index - 1 : index] + words[index + 1 : index + 2]
    return len(neighbours) == 2 and all(word.text in MODIFIERS for word in neighbours)


def _with_group(words: list[_Word], first: int, taken: int) -> int:
    # "the two men": determiners stand before numbers.
    while first - 1 > taken and words[first - 1].text in DETERMINERS:
        first -= 1
    return first


def _of_group(words: list[_Word], index: int, first: int, taken: int) -> int:
    """Extend to "a group of people": the words before `of`, when they count people."""
    counting = index - 1 > taken and words[index].text == "of" and words[index - 1].text in (
        "couple", "group", "crowd", "pair", "trio"
    )  # fmt: skip
    return _with_group(words, index - 1, taken) if counting else first
