"""Where the configured dropout does nothing, in words for the plan's table.

Dropout acts on what is multiplied by `lora_A`. A lookup multiplies nothing, a weight formed in full has no branch
left, and a function with a derivative rule of its own has none by that rule.
"""

from __future__ import annotations

from lora_jax.sites import Site
from lora_jax.weights.probe import Drop, Record


class InertDropoutWarning(UserWarning):
    """The configuration asks for dropout, and no adapted weight of the model has a use that it could act on."""


def has_dropout(record: Record, site: Site) -> bool:
    """Whether any use of the parameter drops elements of its input when a key is given."""
    return any(_reaches(drop, site) for drop in record.drops)


def dropout_note(record: Record, site: Site, formed: bool) -> str:
    """What the table says about dropout at this site; empty where every use has it."""
    looked_up = any(use.op == "embedding" for stopped in (False, True) for use in record.all_uses(stopped))
    places = [
        *(["it is looked up"] if looked_up else []),
        *(["it is formed in full"] if formed else []),
        *(["a function with its own derivative uses it"] if record.ruled else []),
    ]
    if not has_dropout(record, site):
        return f"dropout has no effect: {' and '.join(places or ['no use multiplies by lora_A'])}"
    return f"no dropout where {' and where '.join(places)}" if places else ""


def _reaches(drop: Drop, site: Site) -> bool:
    """Whether a use keeps its branch under the site's roles, which another use may have decided."""
    letters: dict[int, set[str]] = {}
    for atom, letter in zip(site.atoms, site.roles, strict=True):
        letters.setdefault(atom.axis, set()).add(letter)
    # Picked along an axis that only one factor has, rows are data; a convolution needs its own in and out.
    stacked = all(letters[axis] == {"l"} for axis in drop.picked)
    own = drop.op != "conv" or all(letter == "l" or letters[atom.axis] == {letter} for atom, letter in drop.roles)
    return stacked and own
