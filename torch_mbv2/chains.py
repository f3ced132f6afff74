"""Chains of our layers as one call: `ops.network` in the place of a forward's many calls.

`patch` finds in the graph of a forward the longest runs of our layers, each fed by those before it,
and puts a `Network` in the place of each. On a CUDA device a network is one op; everywhere else,
and whenever somebody looks at the layers one by one (hooks, the profiler, torch.compile), its
layers run as they are.
"""

from __future__ import annotations

import functools
import itertools
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import modules, ops
from .errors import is_out_of_memory
from .modules import Swapped
from .weights.derived import Sources

_NETWORK = torch.ops.torch_mbv2.network.default
#: Of sizes of images for which a network keeps something.
_MOST_KEPT = 64
#: Held while a network makes its weights: memory that one thread replaced might be used again while
#: a kernel that another thread launched still reads it.
_MAKING = threading.RLock()


def _kind_of(input: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(input.shape), input.dtype


@dataclass(frozen=True)
class Link:
    """One layer of a chain.

    Attributes:
        name: the layer's qualified name in the model.
        layer: what runs, or None for `flatten(1)` of a pooled map.
        inputs: which values it takes: 0 is the chain's input, n the value of the n-th link.
    """

    name: str
    layer: Swapped | None
    inputs: tuple[int, ...]


class Network(Swapped):
    """A chain of our layers. Equivalent: the layers, one after the other.

    Args:
        links: at least one.
        stock: the module in whose place it stands, if any.
        owned: whether the layers are children of the network (and not of other modules).
    """

    kind = "network"
    links: tuple[Link, ...]
    #: of what it owns; the layers of others are guarded by the forward that calls it
    guard: Guard | None
    #: the weights of its layers as the op reads them, if they were ever needed
    memory: Tensor | None
    #: the parameters that they were made of, or None where they must be made anew
    sources: Sources | None
    #: the programs, by the size of the images, or None where that does not matter
    programs: dict[tuple[int, ...] | None, str]
    #: what the op refused, and the layers may take: sizes and dtypes of inputs
    refused: set[tuple[tuple[int, ...], torch.dtype]]

    def __init__(
        self, links: Sequence[Link], stock: nn.Module | None = None, owned: bool = False
    ) -> None:
        super().__init__(stock)
        self.__dict__.update(links=tuple(links), guard=None, **self._nothing_made())
        if owned:
            self.layers = nn.ModuleList(self.layers_in_order())
            paths = [f"layers.{i}" for i in range(len(self.layers))]
            self.__dict__["guard"] = Guard(self, paths)
        self._tell_layers()

    @staticmethod
    def _nothing_made() -> dict[str, Any]:
        return {"memory": None, "sources": None, "programs": {}, "refused": set()}

    def _tell_layers(self) -> None:
        for layer in self.layers_in_order():
            layer.networks.append(self)

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes its own weights when it first needs them.
        return {**super().__getstate__(), **self._nothing_made()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tell_layers()

    def forget(self) -> None:
        """Let the next call make the weights anew, from the layers."""
        self.__dict__["sources"] = None

    def forward(self, input: Tensor) -> Tensor:
        if not self._is_one_call(input) or (self.guard is not None and not self.guard(self)):
            return self.run_layers(input)
        size = tuple(input.shape[1:]) if self._sizes_matter else None
        if self._is_stale():
            with _MAKING:
                if self._is_stale():  # else another thread was first
                    self._make(input)
        program = self.programs.get(size) or self._write(input, size)
        if self.sources is None or self.memory is None or self.memory.device != input.device:
            return self.run_layers(input)
        if self.refused and _kind_of(input) in self.refused:
            return self.run_layers(input)
        try:
            out: Tensor = _NETWORK(input, self.memory, program)
            return out
        except RuntimeError as error:
            # Layers take some inputs that ops refuse, or say themselves what is wrong.
            if not is_out_of_memory(error):
                if len(self.refused) >= _MOST_KEPT:
                    self.refused.clear()
                self.refused.add(_kind_of(input))
            return self.run_layers(input)

    def layers_in_order(self) -> list[Swapped]:
        """Its layers."""
        return [link.layer for link in self.links if link.layer is not None]

    def run_layers(self, input: Tensor) -> Tensor:
        """The same, layer by layer."""
        values = [input]
        for link in self.links:
            arguments = [values[i] for i in link.inputs]
            values.append(arguments[0].flatten(1) if link.layer is None else link.layer(*arguments))
        return values[-1]

    def _is_one_call(self, input: Any) -> bool:
        return (
            type(input) in (Tensor, nn.Parameter)
            and input.is_cuda
            and input.dim() == 4
            and input.dtype in ops.DTYPES
            and not (input.requires_grad and torch.is_grad_enabled())
        )

    def _is_stale(self) -> bool:
        sources = self.sources
        return sources is None or not sources.are_as_they_were()

    @functools.cached_property
    def _sizes_matter(self) -> bool:
        return any(layer.pads_same for layer in self.layers_in_order())

    def _make(self, input: Tensor) -> None:
        """Make the weights, unless a CUDA graph that is being captured would own them."""
        self.programs.clear()
        self.refused.clear()
        self.forget()
        if torch.cuda.is_current_stream_capturing():
            return
        sources = Sources(self.layers_in_order())
        with torch.inference_mode(False), torch.no_grad():
            weights = self.program(input).weights()
            # In the same place where that is possible: graphs that users captured read there.
            old = self.memory
            if old is not None and (old.shape, old.device) == (weights.shape, weights.device):
                weights = old.copy_(weights)
            if weights.is_cuda:
                # Other streams and threads may read them from now on.
                torch.cuda.current_stream(weights.device).synchronize()
        self.__dict__.update(memory=weights, sources=sources)

    def _write(self, input: Tensor, size: tuple[int, ...] | None) -> str:
        """The program for images of the size of `input`, which is kept."""
        if len(self.programs) >= _MOST_KEPT:
            self.programs.clear()
        text = self.programs[size] = self.program(input).text
        return text

    def program(self, input: Tensor) -> ops.Program:
        """The chain as `ops.network` takes it, for images of the size of `input`."""
        program = ops.Program()
        values = [program.input]
        # What a layer that pads as TensorFlow's SAME looks at: its input, without data.
        inputs = (
            [input.new_empty((1, *input.shape[1:]), device="meta")] if self._sizes_matter else []
        )
        for link in self.links:
            sources = [values[i] for i in link.inputs]
            if link.layer is None:
                values.append(program.add("flatten", *sources))
                inputs.extend(inputs[i].flatten(1) for i in link.inputs if inputs)
                continue
            op = link.layer.op
            assert op is not None
            metas = [inputs[i] for i in link.inputs if inputs]
            arguments = link.layer.arguments(metas[0] if metas else None)
            values.append(program.add(op, *sources, *arguments))
            if metas:
                inputs.append(_without_data(op, *metas, *arguments))
            if isinstance(link.layer, modules.FusedConvPool) and link.layer.keepdim:
                values[-1] = program.add("unflatten", values[-1])
        return program


def _without_data(op: str, *arguments: Any) -> Tensor:
    """The shape of what `op` makes, as a tensor on the meta device."""
    metas = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]
    out: Tensor = getattr(torch.ops.torch_mbv2, op).default(*metas)
    return out


# ------------------------------------------------------------------------------------- in a forward


class Guard:
    """Whether a forward may take its networks: nobody watches or has changed the modules that they
    pass over, and none of these is in training mode.

    Args:
        root: the module whose forward it is.
        paths: of the modules that the networks pass over, from the root.
    """

    def __init__(self, root: nn.Module, paths: Sequence[str]) -> None:
        prefixes = sorted({prefix for full in paths for prefix in _prefixes(full)})
        self.children = [root.get_submodule(path) for path in prefixes]
        self.names = [path.rpartition(".")[2] for path in prefixes]
        parents = [root.get_submodule(path.rpartition(".")[0]) for path in prefixes]
        self.parents = [parent._modules for parent in parents]
        #: all that hold modules, once each: the root's first
        self.holders = list({id(m): m._modules for m in (root, *parents)}.values())
        self.sizes = [len(holder) for holder in self.holders]
        self.hooks = [
            hooks
            for child in self.children
            for hooks in (child._forward_hooks, child._forward_pre_hooks)
        ]

    def __call__(self, root: nn.Module) -> bool:
        """A few microseconds, as it is asked for every call."""
        return not (
            torch.compiler.is_compiling()
            or torch._C._autograd._profiler_enabled()
            or torch._C._get_tracing_state() is not None
            or _MODULES._global_forward_hooks
            or _MODULES._global_forward_pre_hooks
            or root._modules is not self.holders[0]  # a shallow copy, as DataParallel makes them
            or any(self.hooks)
            or any(map(_TRAINING, self.children))
            or any(map(operator.contains, map(vars, self.children), _FORWARD))
            or list(map(len, self.holders)) != self.sizes
            or not all(map(operator.is_, map(dict.get, self.parents, self.names), self.children))
        )


#: Where hooks of all modules are.
_MODULES = nn.modules.module
_TRAINING = operator.attrgetter("training")
#: A forward that was set on the object.
_FORWARD = itertools.repeat("forward")


def _prefixes(path: str) -> Iterator[str]:
    """`a`, `a.b` and `a.b.c` of `a.b.c`."""
    parts = path.split(".")
    for i in range(1, len(parts) + 1):
        yield ".".join(parts[:i])


@dataclass(frozen=True)
class Chain:
    """A run of layers in a graph.

    Attributes:
        nodes: their calls, with the identities between them, in order.
        source: what makes the input of the first.
        links: the layers.
    """

    nodes: tuple[fx.Node, ...]
    source: fx.Node
    links: tuple[Link, ...]


#: What `find_chains` calls a `flatten(1)` in the place of a layer.
FLATTEN = "flatten"


def find_chains(
    graph: fx.Graph,
    layer_of: Callable[[fx.Node], Swapped | str | None],
    idle: Callable[[fx.Node], bool],
    name_of: Callable[[fx.Node], str],
) -> list[Chain]:
    """The longest runs of layers in `graph`, two or more, each of which takes only values of those
    before it and the run's one input, and of which nothing but the last value is used elsewhere.

    Args:
        graph: of a forward.
        layer_of: the layer of ours that a node calls, or FLATTEN, if it may be part of a chain.
        idle: whether a node hands on its first input as it is.
        name_of: the qualified name of what a node calls.
    """
    chains: list[Chain] = []
    run: _Run | None = None
    for node in graph.nodes:
        if run is not None and node.args and idle(node) and node.args[0] in run.values:
            run.values[node] = run.values[node.args[0]]
            run.nodes.append(node)
            continue
        if node.op in ("placeholder", "get_attr"):
            continue
        layer = layer_of(node)
        if layer is None or not node.args or node.kwargs:
            # Whatever it does, what comes after it stays after it.
            chains.extend(_closed(run))
            run = None
            continue
        operands = node.args[:1] if layer == FLATTEN else node.args
        if run is None or not run.has(operands) or (layer == FLATTEN and not run.pools(node)):
            chains.extend(_closed(run))
            run = None
            if layer == FLATTEN or set(operands) != {operands[0]}:
                continue
            run = _Run(operands[0], {operands[0]: 0}, [], [])
        name = "" if isinstance(layer, str) else name_of(node)
        inputs = tuple(run.values[operand] for operand in operands)
        run.links.append(Link(name, None if isinstance(layer, str) else layer, inputs))
        run.nodes.append(node)
        run.values[node] = len(run.links)
    chains.extend(_closed(run))
    return chains


@dataclass
class _Run:
    """A chain while it grows."""

    source: fx.Node
    values: dict[fx.Node, int]
    nodes: list[fx.Node]
    links: list[Link]

    def has(self, operands: Sequence[Any]) -> bool:
        return all(isinstance(x, fx.Node) and x in self.values for x in operands)

    def pools(self, flatten: fx.Node) -> bool:
        """Whether what `flatten` takes is one pixel, of an image of any size."""
        source = flatten.args[0]
        assert isinstance(source, fx.Node)
        index = self.values[source]
        layer = self.links[index - 1].layer if index > 0 else None
        return isinstance(layer, modules.FusedConvPool | modules.GlobalAvgPool2d)


def _closed(run: _Run | None) -> Iterator[Chain]:
    """The longest part of a run, from its start, that hands on only its last value."""
    if run is None:
        return
    for count in range(len(run.links), 1, -1):
        last = next(node for node in run.nodes if run.values[node] == count)
        nodes = run.nodes[: run.nodes.index(last) + 1]
        inside = set(nodes)
        layers = sum(link.layer is not None for link in run.links[:count])
        if layers > 1 and all(set(node.users) <= inside for node in nodes[:-1]):
            yield Chain(tuple(nodes), run.source, tuple(run.links[:count]))
            return
