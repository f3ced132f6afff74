"""Finding the layers that must be patched for two models to disagree."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from torch_mbv2 import modules
from torch_mbv2.comparison.layers import pieces
from torch_mbv2.patch import patch

_MOST_CULPRITS = 8


def bisect(
    stock: nn.Module, level: str, judge: Callable[[nn.Module], list[dict[str, Any]]]
) -> dict[str, Any]:
    """Which layers must be patched for `judge` to find differences over tolerance.

    Returns what `finding` does: a sentence, the layers to blame, and how they differ.

    stock: of which all layers patched together are over tolerance. level: as of `patch`.
    judge: the rows of differences of a model, each with "agrees".
    """
    units = _units(patch(stock, level=level), stock)
    tested: dict[frozenset[str], tuple[list[dict[str, Any]], dict[str, frozenset[str]]]] = {}

    def test(names: Iterable[str]) -> tuple[list[dict[str, Any]], dict[str, frozenset[str]]]:
        """With just these modules patched: the rows, and the layers that come of it."""
        allowed = frozenset(names)
        if allowed not in tested:
            model = patch(stock, level=level, filter_fn=lambda name, _: name in allowed)
            tested[allowed] = judge(model), _units(model, stock)
        return tested[allowed]

    def fails(names: Iterable[str]) -> bool:
        return not all(row["agrees"] for row in test(names)[0])

    def names_of(layers: Iterable[str]) -> frozenset[str]:
        return frozenset().union(*(units[layer] for layer in layers))

    def result(
        found: str, names: Iterable[str], culprits: Sequence[str] = (), along: Sequence[str] = ()
    ) -> dict[str, Any]:
        return finding(found, culprits, along, len(tested), test(names)[0])

    if fails([]):
        return result("stock PyTorch is over tolerance itself: no patched layer is to blame", [])
    if not fails(names_of(units)):
        return result("the layers agree when each is chosen by its name", names_of(units))
    needed = _needed(list(units), lambda layers: fails(names_of(layers)))
    if needed is None:
        many = f"more than {_MOST_CULPRITS} layers"
        return result(f"no single layer is to blame: it takes {many} together", names_of(units))
    names = names_of(needed)
    # What is needed for a layer may bring others along, such as the mean in the same forward. To
    # blame are those that fail with less or, if none does, those that are nowhere where all agree.
    parts = [names_of(n for n in needed if n != name) for name in needed]
    parts += [part for part in test(names)[1].values() if part < names]
    names = next(filter(fails, parts), names)
    innocent = {layer for part in parts if not fails(part) for layer in test(part)[1]}
    layers = sorted(test(names)[1])
    culprits = [layer for layer in layers if layer not in innocent]
    culprits = culprits or [layer for layer in layers if layer in needed] or layers
    along = [layer for layer in layers if layer not in culprits]
    if len(culprits) == 1:
        return result(f"{culprits[0]} breaks agreement on its own", names, culprits, along)
    listed = ", ".join(culprits)
    found = f"no single layer is to blame: it takes {listed} together"
    return result(found, names, culprits, along)


def finding(
    found: str,
    culprits: Sequence[str] = (),
    along: Sequence[str] = (),
    patchings: int = 0,
    rows: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """What was found, as plain data; `cli.compare` says what the entries are."""
    return {
        "found": found,
        "culprits": list(culprits),
        "along": list(along),
        "patchings": patchings,
        "differences": list(rows),
    }


def _units(patched: nn.Module, stock: nn.Module) -> dict[str, frozenset[str]]:
    """The patched layers, and the names that a filter_fn must let pass for each."""
    known = dict(stock.named_modules())
    units = {}
    for piece in pieces(patched, stock):
        names = set(piece.members)
        # A member may be a module with the layers inside.
        names.update(n for n in known if n.startswith(tuple(f"{m}." for m in piece.members)))
        owner = _rewritten(piece.name, patched.get_submodule(piece.name), known)
        if owner is not None:  # others, further inside, may be copied into its forward
            names.update(n for n in known if _holds(owner, n) and any(_holds(n, m) for m in names))
            names.add(owner)
        units[piece.name] = frozenset(names)
    return units


def _rewritten(name: str, layer: nn.Module, known: Mapping[str, nn.Module]) -> str | None:
    """The module of stock's, `known` by name, whose forward is rewritten for a patched layer, if
    one is."""
    parents = ["", *itertools.accumulate(name.split(".")[:-1], "{}.{}".format)]
    if name not in known:  # a call of it is new there
        return parents[-1]
    # A block in the place of its first layer: the graph around may have lost an add or a mean.
    if not isinstance(layer, modules.FusedInvertedResidual | modules.FusedConvPool):
        return None
    graphs = [parent for parent in parents if isinstance(known.get(parent), fx.GraphModule)]
    return graphs[-1] if graphs else None


def _holds(outer: str, name: str) -> bool:
    return not outer or name.startswith(f"{outer}.")


def _needed(
    units: Sequence[str], fails: Callable[[Sequence[str]], bool], most: int = _MOST_CULPRITS
) -> list[str] | None:
    """Some of `units` that fail together, none of which can be left out; None if that takes more
    than `most`.

    Of the shortest failing beginning of the list the last unit is needed; with that one there, the
    same is asked of those before it. That is log2(len(units)) tests for each unit found, and right
    where more units fail if fewer do.
    """
    found: list[str] = []
    rest = list(units)
    while not fails(found):
        if len(found) == most:
            return None
        passing, failing = 0, len(rest)
        while failing - passing > 1:
            middle = (passing + failing) // 2
            if fails([*found, *rest[:middle]]):
                failing = middle
            else:
                passing = middle
        found.append(rest[failing - 1])
        rest = rest[: failing - 1]
    return found
