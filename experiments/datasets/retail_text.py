"""Readable text for the shouted abbreviations of a grocery catalog.

``PWDR/CRYSTL DRNK MX`` becomes "powder crystal drink mix": lower case, punctuation out, known
abbreviations spelled out, and what the register's 30 characters cut off to an open bracket or a
letter left out where that loses nothing.
"""

import re
from collections import Counter
from collections.abc import Iterable

_WORD = re.compile(r"[a-z0-9.%]*[a-z0-9%]")
_PACK = re.compile(r"(\d)(pk|ml|pc)\b")
_CUT_BRACKET = re.compile(r"\([^()]*$")
_CUT_LETTER = re.compile(r"^(.{26,})\W[A-Z]$")  # of 28 to 30 characters
_APOSTROPHE_S = re.compile(r"(?<=\w) s\b|'s\b")

_WORDS = """
appl appliances | bbq barbecue | bev beverage | beeralemalt beer ale malt | bg bags
bkd baked | bn beans | brd breaded
brds boards | brkfst breakfast | brst breast | btl bottle | btr butter | calc calculator
carb carbonated | catfd cat food | chix chicken | choc chocolate | chococlate chocolate | cke cake
cktls cocktails | ckys cookies | cleang cleaning | cnd canned | cndy candy | cntrl control
coco cocoa | coff coffee | conc concentrate | crbntd carbonated | crkr crackers | crmd creamed
crystl crystal | ctlrytblclthstthpksst cutlery tablecloths toothpicks straws
cv covers | dan danish | decaf decaffeinated | disposible disposable | dl deli
dnr dinner | dnrs dinners | dogfd dog food | dps dips | drnk drink | drnking drinking
drnkng drinking | drnks drinks | drp drops | drsng dressing | dsh dishes | fd food | fds foods
fem feminine | flav flavored | flourscent fluorescent | flvr flavored | flvrd flavored | frd fried
fre fresh | frz frozen | frzn frozen | gds goods | gm general merchandise
grnd ground | hallowen halloween | hbc health and beauty | hh household | holdiay holiday
hygn hygiene | incl including | indr indoor | iqf individually quick frozen
iws individually wrapped slices | jce juice | liq liquid | liqs liquids | lnchmt lunchmeat
lndry laundry | lozng lozenges | lrg large | mach machine | marin marinade
memorablilia memorabilia | mens men | mfg manufacturer | misc miscellaneous | mixs mixes
mlk milk | mlt multi | mneral mineral | mnr mineral | mnrl mineral | mult multi | mw microwave
mx mix | mxs mixes | nat natural | ndairy non dairy | nz new zealand | oth other | othe other
pac pack | persnl personal | pickld pickled | pk pack | pkg packaged | pkgd packaged
pkld pickled | plantr planter | plstc plastic | pnch punch | pnt peanut | pnut peanut
poinsetta poinsettia | ppk prepacked | prem premium | prep prepared | preportnd preportioned
prod produce | prpck prepacked | prslc presliced | pwdr powder | pwdrs powders | qsr quick service
refrgratd refrigerated | refrig refrigerated | reg regular | rts ready to serve
rw random weight | sal salad | sald salad | saucessalsapicantee sauces salsa picante
saus sausage | sce sauce | sect sections | sft soft
sgl single | sherbts sherbets | shldr shoulder | slc slice | sndwch sandwich | sngl single
snks snacks | snsl seasonal | sod soda | spec specialty | specilaty specialty | sply supplies
sprd spread | spt sport | srv serve | ss single serve | stk stick | suade suede | sup super
supp supplement | suppplies supplies | sv serve | sw sweet | sweetners sweeteners | swt sweet
syrp syrup | tiss tissue | tn tennessee | tort tortilla | trsh trash
vac vacuum | val value | veg vegetable | vend vending | whl whole | whlsm wholesome
worchester worcestershire | wt weight | wtr water | xpctrnt expectorant
"""

_SIZES = {
    "oz": "ounce",
    "lb": "pound",
    "ct": "count",
    "l": "liter",
    "ml": "milliliter",
    "gal": "gallon",
    "qt": "quart",
    "pt": "pint",
    "pk": "pack",
    "sq": "square",
    "ft": "foot",
    "in": "inch",
    "g": "gram",
    "dz": "dozen",
}


def _table(text: str) -> dict[str, str]:
    entries = (entry.strip() for line in text.strip().splitlines() for entry in line.split("|"))
    return dict(entry.split(" ", 1) for entry in entries if entry)


ABBREVIATIONS = _table(_WORDS)


def readable(name: str | None) -> str:
    """Return a department's, category's or type's name as lower-case words.

    An unfinished bracket at the end of a cut name is kept; see `query_texts`.
    """
    text = _APOSTROPHE_S.sub("s", (name or "").lower())
    text = _PACK.sub(r"\1 \2", text)
    return " ".join(ABBREVIATIONS.get(word, word) for word in _WORD.findall(text))


def query_texts(product_types: Iterable[str]) -> dict[str, str]:
    """Return the readable text of each product type.

    Names that were cut inside a bracket or to a letter lose it, ``SFT DRNK SNGL SRV BTL CARB (EX``
    is "soft drink single serve bottle carbonated", except where two types would then read the same.
    What still reads the same afterwards is one query.
    """
    types = sorted(set(product_types))
    short = {name: readable(_uncut(name)) or readable(name) for name in types}
    times = Counter(short.values())
    texts = {name: text if times[text] == 1 else readable(name) for name, text in short.items()}
    return {name: text or name.lower() for name, text in texts.items()}


def title(
    brand: str | None,
    type_text: str | None,
    category: str | None,
    size: str | None,
    manufacturer: int | None,
) -> str:
    """Return a product's title: brand, type, category, size and manufacturer, commas between.

    The category leaves out the words that the type has said ("cards everyday, greeting wrap"), and
    missing parts are left out.
    """
    parts = [
        _brand(brand),
        type_text or "",
        _unsaid(readable(category), type_text or ""),
        _size(size),
        "" if manufacturer is None else f"manufacturer {manufacturer}",
    ]
    return ", ".join(part for part in parts if part)


def tokens(text: str) -> list[str]:
    """Return the distinct words of ``text``, sorted: what the lexical match compares."""
    return sorted(set(_WORD.findall(text.lower())))


def _uncut(name: str) -> str:
    return _CUT_LETTER.sub(r"\1", _CUT_BRACKET.sub("", name))


def _brand(brand: str | None) -> str:
    if not brand:
        return ""
    return "private label" if brand.lower() == "private" else f"{brand.lower()} brand"


def _size(size: str | None) -> str:
    words = re.sub(r"(\d)([a-z])", r"\1 \2", (size or "").lower()).split()
    return " ".join(_SIZES.get(word, word) for word in words)


def _unsaid(text: str, said: str) -> str:
    """Return the words of ``text`` that are not in ``said``, singular or plural."""
    stems = {_stem(word) for word in said.split()}
    return " ".join(word for word in text.split() if _stem(word) not in stems)


def _stem(word: str) -> str:
    return word.removesuffix("s") if len(word) > 3 else word
