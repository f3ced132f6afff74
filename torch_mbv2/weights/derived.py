"""When what is derived from parameters has to be made anew."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import nn

_VERSION = operator.attrgetter("_version")


class Sources:
    """The parameters of layers, as they are now."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.every = [layer._parameters for layer in layers]
        self.sizes = [len(parameters) for parameters in self.every]
        held = [(parameters, *item) for parameters in self.every for item in parameters.items()]
        self.holders = [holder for holder, _, _ in held]
        self.names = [name for _, name, _ in held]
        self.tensors = [tensor for _, _, tensor in held]
        # Those made in inference mode count no versions.
        self.counting = [t for t in self.tensors if t is not None and not t.is_inference()]
        self.versions = [tensor._version for tensor in self.counting]

    def are_as_they_were(self) -> bool:
        """Whether none was added, replaced or changed in place. (Changes through `.data`, and of
        parameters that were made in inference mode, do not show.)"""
        return (
            list(map(len, self.every)) == self.sizes
            and all(map(operator.is_, map(dict.get, self.holders, self.names), self.tensors))
            and list(map(_VERSION, self.counting)) == self.versions
        )
