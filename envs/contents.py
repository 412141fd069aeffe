"""What a file must hold, said by its types or by an example, and where what was found is otherwise.

A file can be whole, with checksums that are right, and still hold anything. Whoever reads one asks here first, so that
what follows need not doubt each value."""

import reprlib
from typing import Any

import torch

COUNT = range(2**63)  # a whole number, 0 or more
ARGUMENTS = {str: int | float | bool | str}  # of an environment

SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 60
SHORT.maxlevel = 3
NAMES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


def shown(value: Any) -> str:
    """A value in one short line."""
    text = f"a tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else SHORT.repr(value)
    return " ".join(text.split())


def misfit(found: Any, wanted: Any, where: str = "") -> str:
    """In what `found` is not as wanted, such as "its best.step is 'x', not a whole number"; "" if in nothing.

    wanted: a type, or a union of types; of them float takes any number that is one in 64 bits, int what fits in 64 bits
    and neither takes True, a torch.Tensor is a dense one. Or range(n), a number in it. Or (this, that), one of them. Or
    [this], a list of such. Or {name: this}, a dict that has these names, and perhaps others; a name that ends with a
    question mark may be missing; {str: this} says something of every value.
    """
    if isinstance(wanted, tuple):
        complaints = [misfit(found, one, where) for one in wanted]
        return complaints[-1] if all(complaints) else ""
    if isinstance(wanted, list):
        below = enumerate(found) if isinstance(found, list | tuple) else None
        parts = [(wanted[0], f"{where}[{i}]", x) for i, x in below] if below is not None else None
    elif isinstance(wanted, dict):
        parts = pairs(found, wanted, where) if isinstance(found, dict) else None
    else:
        return "" if is_one(found, wanted) else f"its {where} is {shown(found)}, not {named(wanted)}"
    if parts is None:
        return f"its {where} is {shown(found)}, not {named(type(wanted))}" if where else "it holds something else"
    return next((wrong for one, name, x in parts if (wrong := part_misfit(x, one, name))), "")


MISSING = object()


def part_misfit(found: Any, wanted: Any, where: str) -> str:
    return f"it has no {where}" if found is MISSING else misfit(found, wanted, where)


def pairs(found: dict, wanted: dict, where: str) -> list[tuple[Any, str, Any]]:
    """What is wanted of each part of a dict, its place and the part."""

    def place(name: Any) -> str:
        text = name if isinstance(name, str) and name.isprintable() and len(name) < 60 else shown(name)
        return f"{where}.{text}" if where else text

    parts = []
    for name, one in wanted.items():
        if isinstance(name, type):
            parts += [(name, f"{where} name", key) for key in found if not isinstance(key, name)]
            parts += [(one, place(key), x) for key, x in found.items()]
        elif name.removesuffix("?") in found or not name.endswith("?"):
            parts.append((one, place(name.removesuffix("?")), found.get(name.removesuffix("?"), MISSING)))
    return parts


def is_one(x: Any, wanted: Any) -> bool:
    """Whether a value is of a type, or in a range."""
    if isinstance(wanted, range):
        return isinstance(x, int) and not isinstance(x, bool) and x in wanted
    if not isinstance(wanted, type) and hasattr(wanted, "__args__"):
        return any(is_one(x, one) for one in wanted.__args__)
    if wanted is float:
        return isinstance(x, int | float) and not isinstance(x, bool) and (isinstance(x, float) or abs(x) < 2**63)
    if wanted is int:
        return isinstance(x, int) and not isinstance(x, bool) and abs(x) < 2**63
    if wanted is torch.Tensor:
        return isinstance(x, torch.Tensor) and x.layout == torch.strided and not x.is_quantized
    return isinstance(x, wanted)


def named(wanted: Any) -> str:
    """What is wanted, in words."""
    if isinstance(wanted, range):
        return "a whole number, 0 or more"
    if hasattr(wanted, "__args__"):
        return " or ".join(named(one) for one in wanted.__args__)
    return "nothing" if wanted is type(None) else NAMES.get(wanted, f"a {getattr(wanted, '__name__', wanted)}".lower())


def unlike(found: Any, example: Any, where: str) -> str:
    """In what `found` is not like an example: other names, lengths, shapes or types of values; "" if in nothing.

    Numbers may differ; text, True, False and None may not."""
    if isinstance(example, torch.Tensor):
        if not is_one(found, torch.Tensor):
            return f"its {where} is {shown(found)}, not a tensor"
        theirs, ours = ((tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in (found, example))
        return "" if theirs == ours else f"its {where} is {theirs[1]} {theirs[0]}, not {ours[1]} {ours[0]}"
    if isinstance(example, dict | list | tuple):
        return unlike_inside(found, example, where)
    if isinstance(example, bool | str | None):
        same = type(found) is type(example) and found == example
        return "" if same else f"its {where} is {shown(found)}, not {shown(example)}"
    kinds = int if isinstance(example, int) else int | float
    number = isinstance(found, kinds) and not isinstance(found, bool)
    return "" if number else f"its {where} is {shown(found)}, not {named(type(example))}"


def unlike_inside(found: Any, example: dict | list | tuple, where: str) -> str:
    """The same of the parts of a dict, list or tuple."""
    if not isinstance(found, dict if isinstance(example, dict) else list | tuple):
        return f"its {where} is {shown(found)}, not {named(type(example))}"
    theirs, ours = (x if isinstance(x, dict) else dict(enumerate(x)) for x in (found, example))
    if missing := [name for name in ours if name not in theirs]:
        return f"its {where} has no {missing[0]}"
    if more := [name for name in theirs if name not in ours]:
        return f"its {where} has {shown(more[0])}, which does not belong there"
    return next((wrong for name in ours if (wrong := unlike(theirs[name], ours[name], f"{where}.{name}"))), "")
