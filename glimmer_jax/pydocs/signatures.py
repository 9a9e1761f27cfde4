"""Facts of signatures: slots to fill, and pairs of claims with exchanged details."""

import dataclasses
import re
from collections import defaultdict

from glimmer_jax.pydocs.corpus import Page, stable_hash

SLOTS_PER_PAGE = 3
# Share of the slots with these common answers that are used; otherwise guessing them would pay off.
_SHARES = {"None": 0.3, "False": 0.5, "True": 0.6, "0": 0.6}

# Words of a default that are constants, not names.
CONSTANTS = ("None", "True", "False")
_RELATION = r"default of |first parameter|parameter after "
# Odd groups are fixed wording, even groups are names and values.
_CLAIM = re.compile(rf"(The (?:{_RELATION}))(\S*)( in )(\S+)( is )(.*)(\.)", re.DOTALL)
_SLOT = re.compile(rf"()(\S+)( \[SEP\] (?:{_RELATION}))(\S*)()")

Claim = tuple[Page, str, int, bool]


@dataclasses.dataclass(frozen=True)
class Slot:
    """One fact of a signature: `relation` has `value`. Values of the same `kind` can be swapped."""

    kind: str
    relation: str
    value: str


def slots(page: Page) -> list[Slot]:
    """The slots of a page that become questions: at most `SLOTS_PER_PAGE`, chosen by hash."""
    chosen = [slot for slot in facts(page) if _is_used(page, slot)]
    chosen.sort(key=lambda slot: stable_hash("slot", page.name, slot.relation))
    return chosen[:SLOTS_PER_PAGE]


def _is_used(page: Page, slot: Slot) -> bool:
    share = _SHARES.get(slot.value, 1.0)
    return stable_hash("thin", page.name, slot.relation) / 2**63 < share


def facts(page: Page) -> list[Slot]:
    """Facts of the signature in a page's first passage: defaults and the order of parameters."""
    shown = page.signature
    parameters = [
        (name, default)
        for name, default in page.documented.parameters
        if re.search(rf"[(* ]{re.escape(name)}[,)=]", shown)
    ]
    result = []
    for name, default in parameters:
        if default is not None and re.search(r"[A-Za-z0-9]", default):
            result.append(Slot(_type(default), f"default of {name}", default))
    if len(parameters) > 1:
        result.append(Slot("first", "first parameter", parameters[0][0]))
    for (name, _), (following, _) in zip(parameters, parameters[1:], strict=False):
        result.append(Slot("after", f"parameter after {name}", following))
    return result


def signature_in(text: str) -> str:
    """The signature at the start of a passage's text; "" if there is none.

    `f(a=(), *, b=')') Does it.` -> `f(a=(), *, b=')')`
    """
    head = re.match(r"\w+\(", text)
    if head is None:
        return ""
    depth, quote, escaped = 1, "", False
    for end, character in enumerate(text[head.end() :], start=head.end() + 1):
        if quote:
            quote = "" if character == quote and not escaped else quote
            escaped = character == "\\" and not escaped
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "([{") - (character in ")]}")
            if not depth:
                return text[:end]
    return ""


def shown_parameters(signature: str) -> list[tuple[str, str | None]]:
    """(name, default or None) of the parameters without a star in a signature's text, in order.

    `f(a, *args, b=None, ...)` -> `[("a", None), ("b", "None")]`; empty for text of another form.
    """
    inside = re.fullmatch(r"[^()]*\((.*)\)", signature, re.DOTALL)
    parameters = []
    # Defaults contain no spaces (`pydocs.objects`), so ", " only separates parameters.
    for text in inside[1].split(", ") if inside else ():
        name, equals, default = text.partition("=")
        if name.isidentifier():
            parameters.append((name, default if equals else None))
    return parameters


def parse_claim(claim: str) -> tuple[str, str, str] | None:
    """(relation, page, value) of a claim on a signature; None for one on a docstring.

    `The default of indent in json.dumps is None.` -> `("default of indent", "json.dumps", "None")`
    """
    match = _CLAIM.fullmatch(claim)
    if match is None:
        return None
    return match[1].removeprefix("The ") + match[2], match[4], match[6]


def wording(question: str) -> list[str]:
    """Splits a slot or claim on a signature into pieces: fixed wording and names or values alternate.

    `json.dumps [SEP] default of indent` -> `["", "json.dumps", " [SEP] default of ", "indent",
    ""]`; a question of another form gives `["", question]`.
    """
    match = _SLOT.fullmatch(question) or _CLAIM.fullmatch(question)
    return ["", question] if match is None else list(match.groups())


def value_of(relation: str, parameters: list[tuple[str, str | None]]) -> str | None:
    """The value of a relation of `facts` in a signature; None if the signature does not have it."""
    names = [name for name, _ in parameters]
    if relation == "first parameter":
        return names[0] if names else None
    kind, _, name = relation.rpartition(" ")
    if name not in names:
        return None
    place = names.index(name)
    if kind == "default of":
        return parameters[place][1]
    return names[place + 1] if place + 1 < len(names) else None


def _type(default: str) -> str:
    if default in CONSTANTS:
        return "constant"
    if re.fullmatch(r"-?[\d.]+(e-?\d+)?", default):
        return "number"
    return "string" if default[:1] in "'\"b" and default[-1] in "'\"" else "other"


def signature_pairs(pages: tuple[Page, ...]) -> list[list[Claim]]:
    """Four claims for each pair of facts of siblings: each value with its own slot and with the other.

    Siblings are functions of one class or module. The two facts of a pair have the same kind and
    different values, so each value is false for the other's slot.
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
    # Values that differ only in case or punctuation are equal to the metrics.
    return _bare(left[1].value) != _bare(right[1].value)


def _bare(value: str) -> str:
    return re.sub(r"\W", "", value.lower())


def _claims(left: tuple[Page, Slot], right: tuple[Page, Slot]) -> list[Claim]:
    return [
        (page, f"The {slot.relation} in {page.name} is {value.value}.", 0, value is slot)
        for page, slot in (left, right)
        for value in (left[1], right[1])
    ]
