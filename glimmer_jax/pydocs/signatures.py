"""Facts of signatures: slots to fill, and pairs of claims with their details exchanged."""

import dataclasses
import re
from collections import defaultdict

from glimmer_jax.pydocs.corpus import Page, stable_hash

SLOTS_PER_PAGE = 3
# Of the slots with these answers only a part is asked, or guessing them would pay.
_THINNED = {"None": 0.3, "False": 0.5, "True": 0.6, "0": 0.6}

Claim = tuple[Page, str, int, bool]


@dataclasses.dataclass(frozen=True)
class Slot:
    """One fact of a signature: `relation` of the page has `value`; `kind` says what may be swapped."""

    kind: str
    relation: str
    value: str


def slots(page: Page) -> list[Slot]:
    """The slots asked of a page: at most `SLOTS_PER_PAGE`, chosen by hash."""
    found = [slot for slot in facts(page) if _asked(page, slot)]
    found.sort(key=lambda slot: stable_hash("slot", page.name, slot.relation))
    return found[:SLOTS_PER_PAGE]


def _asked(page: Page, slot: Slot) -> bool:
    share = _THINNED.get(slot.value, 1.0)
    return stable_hash("thin", page.name, slot.relation) / 2**63 < share


def facts(page: Page) -> list[Slot]:
    """What the signature in a page's first passage says: defaults, order of parameters."""
    shown = page.signature
    parameters = [
        (name, default)
        for name, default in page.documented.parameters
        if re.search(rf"[(* ]{re.escape(name)}[,)=]", shown)
    ]
    found = []
    for name, default in parameters:
        if default is not None and re.search(r"[A-Za-z0-9]", default):
            found.append(Slot(_type(default), f"default of {name}", default))
    if len(parameters) > 1:
        found.append(Slot("first", "first parameter", parameters[0][0]))
    for (name, _), (following, _) in zip(parameters, parameters[1:], strict=False):
        found.append(Slot("after", f"parameter after {name}", following))
    return found


def _type(default: str) -> str:
    if default in ("None", "True", "False"):
        return "constant"
    if re.fullmatch(r"-?[\d.]+(e-?\d+)?", default):
        return "number"
    return "string" if default[:1] in "'\"b" and default[-1] in "'\"" else "other"


def signature_pairs(pages: tuple[Page, ...]) -> list[list[Claim]]:
    """Four claims for each pair of facts of siblings: each value told of its own slot and the other.

    Siblings are functions of one class or module; a pair has one kind, two values, and each value is
    false of the other's slot.
    """
    groups: dict[tuple[str, str], list[tuple[Page, Slot]]] = defaultdict(list)
    for page in pages:
        home = page.name.rpartition(".")[0] or page.documented.module
        for slot in facts(page):
            groups[home, slot.kind].append((page, slot))
    pairs = []
    for members in groups.values():
        members.sort(key=lambda member: stable_hash("pair", member[0].name, member[1].relation))
        while members:
            left = members.pop()
            match = next((other for other in members if _may_swap(left, other)), None)
            if match is not None:
                members.remove(match)
                pairs.append(_claims(left, match))
    return pairs


def _may_swap(left: tuple[Page, Slot], right: tuple[Page, Slot]) -> bool:
    # Values that differ in case or punctuation alone are one to the metrics.
    return _bare(left[1].value) != _bare(right[1].value)


def _bare(value: str) -> str:
    return re.sub(r"\W", "", value.lower())


def _claims(left: tuple[Page, Slot], right: tuple[Page, Slot]) -> list[Claim]:
    return [
        (page, f"The {slot.relation} in {page.name} is {value.value}.", 0, value is slot)
        for page, slot in (left, right)
        for value in (left[1], right[1])
    ]
