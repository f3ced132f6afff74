"""`patch`, `unpatch` and `report`.

How a model is patched. The forward of each module that is written by a user or a model zoo is
traced by torch.fx, one module at a time (plain Sequentials are looked through, other modules are
opaque), so that the order of calls is known and not guessed from names. Handlers then match
patterns on that small graph: a convolution with its padding, batch norm and activation, a linear
layer, a pooling, a residual add. A match swaps modules in place: the first gets the fused module,
the others a `Folded` identity. So the model keeps its class, its attributes and its names. Only
where a pattern contains a function call (`x + self.conv(x)`, `x.mean([2, 3])`) the forward of that
one module is replaced by the code of its rewritten graph. Whatever is not matched exactly stays as
it was, with a reason.

How blocks are fused, at level "block" and beyond. The graphs now call our own layers, so a second
round can match chains of these: an inverted residual, the stem with the block after it, the last
convolution with the pooling. A fused block shares the parameters of its layers and is a new child
of the module whose forward holds the chain and now calls the block instead. The layers stay where
they are, so that a part of the model that is called on its own still does what it did. A chain may
cross into a module with a forward of its own, which is then copied into the outer one. Only in a
Sequential, whose children are its forward, and in a GraphModule, which loses on a copy what it does
not call, the block stands in the place of its first layer, and the others become `Folded`.

How chains become one call, at level "network". Where the forward of a module, with those of modules
inside it copied into it, is a chain of our layers, a second forward calls `ops.network` instead
(chains.py). It is taken unless somebody watches the layers: hooks, a profiler, a tracer. Nothing is
added to the tree, but for a GraphModule, whose graph calls a network in the place of the first
layer.
"""

from __future__ import annotations

import copy
import functools
import importlib
import itertools
import math
import operator
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeGuard

import torch
import torch.nn.functional as F
from torch import fx, nn

from . import _extension, chains, flops, modules, ops
from .errors import Error
from .mobilenet import SamePad2d
from .modules import Swapped
from .weights import fold

FilterFn = Callable[[str, nn.Module], bool]

LEVELS = ("op", "block", "network")
#: The levels at which every layer and every fused block is a call of its own.
LAYER_LEVELS = ("op", "block")
#: The attribute under which a module that stays stock says why, and a module whose forward has
#: function calls that stay stock lists them.
_REASON = "torch_mbv2_reason"
_CALLS = "torch_mbv2_calls"
#: The attributes, not modules, of a module whose forward takes chains of layers in one call:
#: whether it may (chains.Guard), and the calls (of chains.Network), numbered.
_GUARD = "torch_mbv2_guard"
_NETWORK = "torch_mbv2_network_"
#: Stock modules that a kernel exists for; `strict` insists on these.
_SUPPORTED = (nn.Conv2d, nn.Linear, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.BatchNorm2d)
#: The functions that do the same; `report` lists the calls that stay stock.
_FUNCTIONS = (F.conv2d, F.linear, F.avg_pool2d, F.adaptive_avg_pool2d, torch.conv2d)


# ---------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Row:
    """One layer of a report.

    Attributes:
        name: its qualified name in the model.
        kind: what the layer is, such as "depthwise" or "Softmax".
        detail: its sizes, as far as the layer itself tells them.
        kernel: the kernel that takes it ("folded" where another layer does its work), or None.
        reason: why it stays stock or, where it might be part of a fused block, why it is not;
            None where there is nothing to tell.
        supported: whether a kernel exists for layers of this kind.
    """

    name: str
    kind: str
    detail: str
    kernel: str | None
    reason: str | None
    supported: bool = True


@dataclass(frozen=True)
class Report:
    """What `patch` did to a model, or would do; printing it gives a table.

    Attributes:
        rows: one for each layer, in the order of `named_modules`.
        note: None where the CUDA kernels can run, else why they cannot.
        networks: the chains that run in one call: the name of the module whose forward calls it,
            and the number of layers. (What a part of such a chain does that is called on its own,
            is not listed.)
    """

    rows: list[Row]
    note: str | None = None
    networks: list[tuple[str, int]] = field(default_factory=list)

    @property
    def patched(self) -> list[Row]:
        """The rows that a kernel takes."""
        return [row for row in self.rows if row.kernel not in (None, "folded")]

    @property
    def stock(self) -> list[Row]:
        """The rows that stay stock."""
        return [row for row in self.rows if row.kernel is None]

    def summary(self) -> str:
        """One line: how many layers run on which kernels, and how many stay stock."""
        counts = Counter(k for row in self.patched for k in (row.kernel or "").split(" + "))
        kernels = ", ".join(f"{n} {kernel}" for kernel, n in counts.most_common())
        folded = sum(row.kernel == "folded" for row in self.rows)
        parts = [
            f"{_layers(len(self.patched))} on torch_mbv2 kernels" + f" ({kernels})" * bool(kernels)
        ]
        parts.append(f"{folded} folded into them")
        parts.append(f"{len(self.stock)} stock")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data: {"summary", "note", "networks", "rows": [{...}]}."""
        return {
            "summary": self.summary(),
            "note": self.note,
            "networks": self.networks,
            "rows": [asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        header = ("layer", "kind", "sizes", "kernel", "why")
        table = [header] + [
            (row.name, row.kind, row.detail, row.kernel or "stock", row.reason or "")
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        lines.append(self.summary())
        for name, count in self.networks:
            lines.append(f"{name or 'the model'} runs {_layers(count)} in one call")
        if self.note is not None:
            lines.append(f"kernels run as stock PyTorch operators here: {self.note}")
        return "\n".join(lines)


def _layers(count: int) -> str:
    return f"{count} layer" + "s" * (count != 1)


# ------------------------------------------------------------------------- rewritten forwards


@dataclass(frozen=True)
class _Code:
    """A forward as source, with the names that it uses."""

    source: str
    names: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, graph: fx.Graph) -> _Code:
        code = graph.python_code("self")
        return cls(code.src, tuple(sorted(code.globals.items(), key=lambda item: item[0])))

    def compile(self, owner: type[nn.Module]) -> Callable[..., Any]:
        namespace = dict(self.names)
        name = f"<torch_mbv2 forward of {owner.__qualname__}>"
        exec(compile(self.source, name, "exec"), namespace)
        forward: Callable[..., Any] = namespace["forward"]
        return forward

    def __reduce__(self) -> Any:
        # Modules cannot be pickled; their names can.
        portable = tuple(
            (key, ("module", value.__name__) if isinstance(value, types.ModuleType) else value)
            for key, value in self.names
        )
        return _restore_code, (self.source, portable)


def _restore_code(source: str, portable: tuple[tuple[str, Any], ...]) -> _Code:
    names = tuple(
        (key, importlib.import_module(value[1]) if isinstance(value, tuple) else value)
        for key, value in portable
    )
    return _Code(source, names)


#: What a class with another forward is made from: the model's own class, and the code that runs
#: layer by layer, if that is not the class's own, and the one with networks, if there is any.
_Origin = tuple[type[nn.Module], _Code | None, _Code | None]


class _RewrittenForward:
    """Mixin of a model's own class with another forward: layer by layer the code of an fx graph, or
    the class's own, and, where `_GUARD` lets it, one in which chains of layers are one call."""

    _origin: _Origin

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restore_rewritten, type(self)._origin, self.__dict__


@functools.cache
def _rewritten_class(origin: _Origin) -> type[nn.Module]:
    base, layers, networks = origin
    by_layer = base.forward if layers is None else layers.compile(base)
    forward = by_layer
    if networks is not None:
        by_network = networks.compile(base)

        @functools.wraps(by_layer)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            guard = self.__dict__.get(_GUARD)
            run = by_network if guard is not None and guard(self) else by_layer
            return run(self, *args, **kwargs)

    body = {
        "forward": forward,
        "_origin": origin,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (_RewrittenForward, base), body)


def _restore_rewritten(
    base: type[nn.Module], layers: _Code | None, networks: _Code | None
) -> nn.Module:
    cls = _rewritten_class((base, layers, networks))
    return cls.__new__(cls)


def _set_forward(
    module: nn.Module, layers: fx.Graph | None, networks: fx.Graph | None = None
) -> None:
    """Let `module` run the graph `layers` instead of its forward and, where it may, `networks`."""
    if isinstance(module, fx.GraphModule):
        assert layers is not None
        # A GraphModule survives copying and pickling only with what its graph calls, so one of
        # those modules carries the stock graph.
        stock_graph = copy.deepcopy(module.graph)
        module.graph = layers
        next(_swapped_in(module)).__dict__["stock_graph"] = stock_graph
        return
    by_layer, by_network = (
        None if graph is None else _Code.of(graph) for graph in (layers, networks)
    )
    module.__class__ = _rewritten_class((type(module), by_layer, by_network))


def _reset_forward(module: nn.Module) -> None:
    origin = type(module)._origin if isinstance(module, _RewrittenForward) else None
    if origin is not None:
        module.__class__ = origin[0]
        for name in [name for name in vars(module) if name == _GUARD or name.startswith(_NETWORK)]:
            delattr(module, name)
    elif isinstance(module, fx.GraphModule):
        for swapped in _swapped_in(module):
            if "stock_graph" in swapped.__dict__:
                module.graph = swapped.__dict__.pop("stock_graph")
                return


def _swapped_in(module: fx.GraphModule) -> Iterator[Swapped]:
    for node in module.graph.nodes:
        called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(called, Swapped):
            yield called


# --------------------------------------------------------------------------------------- tracing


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _is_plain_sequential(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and not _has_hooks(module)
    )


def _is_torch_leaf(module: nn.Module) -> bool:
    """A stock layer, or ours: never traced into."""
    return isinstance(module, Swapped) or (
        type(module).__module__.startswith(("torch.nn.", "torch.ao."))
        and not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    )


def _node(argument: fx.node.Argument) -> fx.Node:
    """An argument that is the value of a call, or of a placeholder."""
    assert isinstance(argument, fx.Node)
    return argument


class _LocalTracer(fx.Tracer):
    """Traces one module's own forward; only plain Sequentials are looked through."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not _is_plain_sequential(m)


@dataclass
class _Scope:
    """One traced module while it is patched."""

    root: nn.Module
    name: str
    graph: fx.Graph
    #: how often each module object is called or registered in the whole model
    calls: Counter[int]
    filter_fn: FilterFn
    reasons: dict[int, str]
    #: all scopes of the model, by the identity of their root
    scopes: dict[int, _Scope] = field(default_factory=dict)
    #: the layers, of any scope, whose work a fused block does
    absorbed: list[Swapped] = field(default_factory=list)
    #: nodes whose value is an image or feature vector that one of our kernels made
    produced: set[fx.Node] = field(default_factory=set)
    #: names of the modules added to the root for calls in its rewritten forward
    added: set[str] = field(default_factory=set)
    rewritten: bool = False

    @property
    def fixed(self) -> bool:
        """Whether a rewritten forward cannot leave out or add children of the root."""
        return isinstance(self.root, fx.GraphModule | nn.Sequential)

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that `node` calls, if it calls one."""
        if node.op != "call_module":
            return None
        return self.root.get_submodule(str(node.target))

    def full_name(self, node: fx.Node) -> str:
        return self.qualified(str(node.target))

    def qualified(self, name: str) -> str:
        return f"{self.name}.{name}" if self.name else name

    def idle(self, node: fx.Node) -> bool:
        """Whether `node` hands its first input on as it is."""
        module = self.module(node)
        if module is None or _has_hooks(module) or not node.args:
            return False
        return type(module) is nn.Identity or (
            isinstance(module, modules.Folded) and module.rest is None
        )

    def takes(self, node: fx.Node) -> str | None:
        """None if the module that `node` calls may be changed, else why not."""
        module = self.module(node)
        assert module is not None
        return _untouchable(module, self.full_name(node), self.filter_fn) or self.reasons.get(
            id(module)
        )

    def next(self, node: fx.Node) -> fx.Node | None:
        """The only user of `node`'s value, looking through identities."""
        while len(node.users) == 1:
            (user,) = node.users
            if not self.idle(user):
                return user
            node = user
        return None

    def previous(self, node: fx.Node) -> fx.Node | None:
        """What makes the first input of `node`, if nothing else uses it, through identities."""
        source = node.args[0] if node.args else None
        while isinstance(source, fx.Node) and len(source.users) == 1:
            if not self.idle(source):
                return source
            source = source.args[0] if source.args else None
        return None

    def made_by(self, node: fx.Node) -> fx.Node:
        """What makes the value of `node`, through identities."""
        while self.idle(node):
            node = _node(node.args[0])
        return node

    def replace(self, node: fx.Node, new: nn.Module) -> None:
        """Put `new` in the place of what `node` calls: by a swap of the module where that is called
        just here, else by a rewritten forward."""
        module = self.module(node)
        if module is not None and self.calls[id(module)] == 1:
            _set_submodule(self.root, str(node.target), new)
            self.calls[id(new)] = 1
            return
        node.op, node.target = "call_module", self.add(new)

    def add(self, new: nn.Module) -> str:
        """Make `new` a child of the root for the rewritten forward to call; its name."""
        if isinstance(new, Swapped):
            new.__dict__["stock"] = None  # nothing was replaced: `unpatch` just deletes it
        prefix = f"torch_mbv2_{new.kind if isinstance(new, Swapped) else 'layer'}"
        count = 0
        while hasattr(self.root, f"{prefix}_{count}"):
            count += 1
        name = f"{prefix}_{count}"
        self.root.add_module(name, new)
        self.calls[id(new)] = 1
        self.added.add(name)
        self.rewritten = True
        return name

    def drop(self, node: fx.Node, into: str, rest: nn.Module | None = None) -> None:
        """Take `node`, whose work went `into` another module, out of the dataflow."""
        module = self.module(node)
        if module is not None and self.calls[id(module)] == 1:
            self.replace(node, modules.Folded(module, into, rest))
            return
        self.erase(node, node.args[0])

    def erase(self, node: fx.Node, value: Any) -> None:
        """Take the call `node` out of the forward; `value` stands for what it made."""
        node.replace_all_uses_with(value)
        self.graph.erase_node(node)
        self.rewritten = True

    def fuse(self, chain: Sequence[fx.Node], block: Swapped) -> None:
        """Let `block` do the work of `chain`: calls of layers, each on the value of the one before
        and, where it is a residual add, on the input of the first."""
        if self.fixed:
            self._fuse_in_place(chain, block)
            return
        first, last = chain[0], chain[-1]
        name = self.add(block)
        with self.graph.inserting_after(last):
            call = self.graph.call_module(name, (first.args[0],))
        last.replace_all_uses_with(call)
        for node in chain:
            self._absorb(node, self.qualified(name))
        for node in reversed(self.graph.nodes):
            if not node.users and (node in chain or self.idle(node)):
                self.graph.erase_node(node)
        for node in chain:
            if node.target in self.added:
                self._forget(str(node.target))

    def _absorb(self, node: fx.Node, into: str) -> None:
        module, name = self.module(node), self.full_name(node)
        assert isinstance(module, Swapped)
        self.absorbed.append(module)
        module.absorbed_by = name
        for layer in self.absorbed:  # those that a block in the chain had absorbed go along
            if layer.absorbed_by == name:
                layer.absorbed_by = into

    def _forget(self, name: str) -> None:
        """Delete a module that was added for a call which is no more."""
        self.added.discard(name)
        delattr(self.root, name)

    def _fuse_in_place(self, chain: Sequence[fx.Node], block: Swapped) -> None:
        first, *others = chain
        layer = self.module(first)
        assert isinstance(layer, Swapped)
        block.__dict__["stock"] = layer.stock
        _set_submodule(self.root, str(first.target), block)
        self.calls[id(block)] = 1
        into = self.full_name(first)
        # What was folded into a layer of a network is still that layer's.
        moves = not isinstance(block, chains.Network)
        names = {self.full_name(node) for node in others} if moves else set()
        for node in self.graph.nodes:
            module = self.module(node)
            if isinstance(module, modules.Folded) and module.into in names:
                module.into = into
        for node in others:
            # Those done before are idle now, so it is the block that makes the value of this one.
            value = next(operand for operand in node.args if self.made_by(_node(operand)) is first)
            if node.target in self.added:
                self.erase(node, value)
                self._forget(str(node.target))
                continue
            module = self.module(node)
            stock = module.stock if isinstance(module, Swapped) else module
            assert stock is not None  # a module without one was added to the root: erased above
            _set_submodule(self.root, str(node.target), modules.Folded(stock, into))
            if node.args != (value,):
                node.args = (value,)
                self.rewritten = True

    def peek(self, node: fx.Node | None) -> nn.Module | None:
        """The module that `node` calls. Of one with a forward of its own, the first layer that this
        calls, if the forward can be copied into the root's or, where that is fixed, is this layer
        alone, so that the module can be left out."""
        module = self.module(node) if node is not None else None
        inner = self.scopes.get(id(module))
        if node is None or inner is None:
            return module
        layer = inner.entry()
        if layer is None or inner.fixed or self.calls[id(module)] != 1:
            return None
        if len(node.args) != 1 or node.kwargs:
            return None
        if self.fixed and any(user.op != "output" for user in layer.users):
            return None
        if _untouchable(inner.root, inner.name, self.filter_fn) is not None:
            return None
        return inner.module(layer)

    def entry(self) -> fx.Node | None:
        """The call that alone takes the forward's only used argument."""
        used = [node for node in self.graph.nodes if node.op == "placeholder" and node.users]
        follower = self.next(used[0]) if len(used) == 1 else None
        return follower if follower is not None and follower.op == "call_module" else None

    def enter(self, node: fx.Node) -> fx.Node:
        """The call of what `peek` shows, in this graph, after copying the forward that holds it."""
        inner = self.scopes.get(id(self.module(node)))
        if inner is None or self.fixed:
            return node
        layer = inner.entry()
        assert layer is not None
        value, copies = inner.copy_before(node)
        self.erase(node, value)
        return copies[layer]

    def copy_before(self, node: fx.Node) -> tuple[Any, dict[fx.Node, fx.Node]]:
        """Copy this scope's forward to before `node`, the call of its root in another graph: what
        the forward returns there, and the copy of each call."""
        arguments = [argument for argument in self.graph.nodes if argument.op == "placeholder"]
        copies: dict[fx.Node, Any] = dict.fromkeys(arguments, node.args[0])
        with node.graph.inserting_before(node):
            value = node.graph.graph_copy(self.graph, copies)
        for argument in arguments:
            del copies[argument]
        for original, copied in copies.items():
            if original.op in ("call_module", "get_attr"):
                copied.target = f"{node.target}.{original.target}"
        return value, copies


def _set_submodule(root: nn.Module, target: str, new: nn.Module) -> None:
    parent, _, child = target.rpartition(".")
    setattr(root.get_submodule(parent), child, new)


def _untouchable(module: nn.Module, name: str, filter_fn: FilterFn) -> str | None:
    """Why a module must stay as it is, whatever surrounds it; None if it need not."""
    if _has_hooks(module):
        return "it has hooks, which a fused kernel would not call"
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    floats = [t for t in tensors if t.is_floating_point() or t.is_complex()]
    for t in floats:
        if t.dtype not in ops.DTYPES:
            return f"dtype {str(t.dtype).removeprefix('torch.')} has no kernel"
        if t.device.type == "cuda" and not _extension.is_available():
            return f"the CUDA kernels cannot run: {_extension.why_not_available()}"
    if not filter_fn(name, module):
        return "filter_fn left it out"
    return None


# -------------------------------------------------------------------------------------- handlers

Handler = Callable[[_Scope, fx.Node], bool]
_HANDLERS: list[Handler] = []


def _handler(function: Handler) -> Handler:
    """Register a pattern: called on every node in order; it returns whether it took the node."""
    _HANDLERS.append(function)
    return function


def _calls(node: fx.Node, functions: tuple[Any, ...], methods: tuple[str, ...] = ()) -> bool:
    return (node.op == "call_function" and node.target in functions) or (
        node.op == "call_method" and node.target in methods
    )


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _take_activation(
    scope: _Scope, node: fx.Node, into: str
) -> tuple[fx.Node, float | None, float | None]:
    """Fold the activation that follows `node`, if it is a clamp: the node whose value is now made,
    and the bounds."""
    follower = scope.next(node)
    if follower is None:
        return node, None, None
    bounds = None
    module = scope.module(follower)
    if module is not None:
        bounds = _bounds_of(module) if scope.takes(follower) is None else None
    elif _calls(follower, (F.relu, torch.relu, torch.relu_, F.relu_), ("relu", "relu_")):
        bounds = (0.0, None)
    elif _calls(follower, (F.relu6,)):
        bounds = (0.0, 6.0)
    elif _calls(follower, (F.hardtanh,)):
        bounds = (
            _argument(follower, 1, "min_val", -1.0),
            _argument(follower, 2, "max_val", 1.0),
        )
    elif _calls(follower, (torch.clamp, torch.clip), ("clamp", "clamp_", "clip", "clip_")):
        bounds = (_argument(follower, 1, "min", None), _argument(follower, 2, "max", None))
    if bounds is None or any(isinstance(b, fx.Node) for b in bounds):
        return node, None, None
    low, high = (None if b is None else float(b) for b in bounds)
    if low is not None and high is not None and not low <= high:
        return node, None, None
    if any(b is not None and math.isnan(b) for b in (low, high)):
        return node, None, None
    source = _node(follower.args[0])
    scope.drop(follower, into)
    return (follower if follower.op == "call_module" else source), low, high


def _held(module: nn.Module, name: str) -> Any:
    """An attribute of a module whose class is not imported here."""
    return getattr(module, name)


def _bounds_of(module: nn.Module) -> tuple[float | None, float | None] | None:
    if type(module).__name__ == "OnnxClip":
        low, high = _held(module, "min_val"), _held(module, "max_val")
        return (None if low is None else float(low), None if high is None else float(high))
    return modules.bounds_of(module)


def _split_norm(module: nn.Module) -> tuple[nn.BatchNorm2d, nn.Module | None] | None:
    """The batch norm in `module` and what it does after it, if it is one in eval mode."""
    rest: nn.Module | None = None
    if type(module) is not nn.BatchNorm2d:
        # timm's batch norm with its activation inside: norm, dropout (idle), activation.
        if type(module).__name__ != "BatchNormAct2d" or not isinstance(module, nn.BatchNorm2d):
            return None
        if type(module.drop) is not nn.Identity:
            return None
        act = module.get_submodule("act")
        rest = None if type(act) is nn.Identity else act
    if module.running_mean is None or module.running_var is None or module.training:
        return None
    return module, rest


@_handler
def _conv(scope: _Scope, node: fx.Node) -> bool:
    conv = scope.module(node)
    if conv is None or not _is_conv(conv):
        return False
    reason = scope.takes(node) or _conv_reason(conv)
    if reason is not None:
        scope.reasons[id(conv)] = reason
        return True
    name = scope.full_name(node)
    if scope.calls[id(conv)] > 1:
        # Called in several places: the swap serves them all, with nothing fused to it.
        fused = modules.FusedConv2d.from_stock(conv, same=_is_same_conv(conv))
        _set_submodule(scope.root, str(node.target), fused)
        scope.produced.add(node)
        return True
    extra: _Padding = "same" if _is_same_conv(conv) else _take_padding(scope, node, name)
    end, norm, low, high = node, None, None, None
    follower = scope.next(node)
    module = scope.module(follower) if follower is not None else None
    parts = _split_norm(module) if module is not None else None
    rest = None
    if (
        follower is not None
        and parts is not None
        and scope.takes(follower) is None
        and scope.calls[id(module)] == 1
    ):
        norm, rest = parts
        bounds = None if rest is None else _bounds_of(rest)
        if bounds is not None:
            (low, high), rest = bounds, None
            scope.drop(follower, name)
        else:
            scope.drop(follower, name, rest)
        end = follower
    if rest is None and low is None and high is None:
        end, low, high = _take_activation(scope, end, name)
    sides = (0, 0, 0, 0) if isinstance(extra, str) else extra
    fused = modules.FusedConv2d.from_stock(conv, norm, sides, extra == "same", low, high)
    scope.replace(node, fused)
    scope.produced.update((node, end))
    return True


def _is_same_conv(module: nn.Module) -> bool:
    """timm's Conv2d that pads as TensorFlow's SAME, from the input's size."""
    return type(module).__name__ == "Conv2dSame" and type(module).__module__.startswith("timm.")


def _is_conv(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    return type(module) is nn.Conv2d or _is_same_conv(module)


def _conv_reason(conv: nn.Conv2d) -> str | None:
    if conv.padding_mode != "zeros":
        return f"padding_mode {conv.padding_mode!r} has no kernel"
    return None


#: The sides as in F.pad, or "same".
_Padding = tuple[int, ...] | Literal["same"]


def _take_padding(scope: _Scope, node: fx.Node, into: str) -> _Padding:
    """Fold the zero padding before a convolution."""
    none = (0, 0, 0, 0)
    source = scope.previous(node)
    if source is None:
        return none
    module = scope.module(source)
    if module is not None:
        if scope.takes(source) is not None or scope.calls[id(module)] != 1:
            return none
        sides = _pad_of(module, scope.module(node))
    elif _calls(source, (F.pad,)) and not isinstance(_argument(source, 1, "pad", None), fx.Node):
        pad = list(_argument(source, 1, "pad", ()))
        constant = _argument(source, 2, "mode", "constant") == "constant"
        zero = _argument(source, 3, "value", None) in (None, 0)
        whole = all(isinstance(p, int) and p >= 0 for p in pad) and len(pad) in (2, 4)
        sides = tuple([*pad, 0, 0][:4]) if constant and zero and whole else None
    else:
        sides = None
    if sides is None:
        return none
    scope.drop(source, into)
    return sides


def _pad_of(module: nn.Module, conv: nn.Module | None) -> _Padding | None:
    if type(module).__name__ == "OnnxPadStatic":
        pads = list(_held(module, "pads"))  # as F.pad wants them, innermost first
        zero = module.mode == "constant" and float(_held(module, "constant_value")) == 0.0
        whole = len(pads) >= 4 and not any(pads[4:]) and min(pads) >= 0
        return tuple(pads[:4]) if zero and whole else None
    if type(module) is SamePad2d:
        assert isinstance(conv, nn.Conv2d)
        kernel, stride = module.kernel_size, module.stride
        fits = conv.kernel_size == (kernel, kernel) and conv.stride == (stride, stride)
        plain = conv.dilation == (1, 1) and modules.conv_padding(conv) == (0, 0, 0, 0)
        return "same" if fits and plain else None
    return modules.pad_of(module)


@_handler
def _linear(scope: _Scope, node: fx.Node) -> bool:
    linear = scope.module(node)
    if linear is None or type(linear) is not nn.Linear:
        return False
    reason = scope.takes(node)
    if reason is not None:
        scope.reasons[id(linear)] = reason
        return True
    if scope.calls[id(linear)] > 1:
        _set_submodule(scope.root, str(node.target), modules.FusedLinear.from_stock(linear))
        return True
    end, low, high = _take_activation(scope, node, scope.full_name(node))
    scope.replace(node, modules.FusedLinear.from_stock(linear, low, high))
    scope.produced.update((node, end))
    return True


@_handler
def _pool(scope: _Scope, node: fx.Node) -> bool:
    module = scope.module(node)
    if module is None:
        return False
    if type(module) is nn.AvgPool2d:
        new: nn.Module = modules.AvgPool2d.from_stock(module)
    elif type(module) is nn.AdaptiveAvgPool2d and not modules.adaptive_to_one(module.output_size):
        scope.reasons[id(module)] = (
            f"adaptive pooling to {module.output_size} has no kernel (only to 1 x 1)"
        )
        return True
    elif type(module) is nn.AdaptiveAvgPool2d or type(module).__name__ in (
        "OnnxGlobalAveragePool",
        "OnnxGlobalAveragePoolWithKnownInputShape",
    ):
        new = modules.GlobalAvgPool2d.from_stock(module)
    else:
        return False
    reason = scope.takes(node)
    if reason is not None:
        scope.reasons[id(module)] = reason
        return True
    scope.replace(node, new)
    scope.produced.add(node)
    return True


@_handler
def _dropout(scope: _Scope, node: fx.Node) -> bool:
    module = scope.module(node)
    if module is None or type(module) not in (nn.Dropout, nn.Dropout2d):
        return False
    if scope.takes(node) is None and scope.calls[id(module)] == 1:
        scope.replace(node, modules.Folded(module, ""))
    return True


@_handler
def _pool_function(scope: _Scope, node: fx.Node) -> bool:
    if _calls(node, (F.adaptive_avg_pool2d,)):
        if not modules.adaptive_to_one(_argument(node, 1, "output_size", None)):
            return False
        new: Swapped = modules.GlobalAvgPool2d(None, keepdim=True)
    elif _calls(node, (F.avg_pool2d,)):
        options = [
            _argument(node, i + 1, name, default)
            for i, (name, default) in enumerate(
                [
                    ("kernel_size", None),
                    ("stride", None),
                    ("padding", 0),
                    ("ceil_mode", False),
                    ("count_include_pad", True),
                    ("divisor_override", None),
                ]
            )
        ]
        if any(isinstance(option, fx.Node) for option in options):
            return False
        new = modules.AvgPool2d(None, *options)
    elif _calls(node, (torch.mean,), ("mean",)):
        return _mean(scope, node)
    else:
        return False
    return _replace_call(scope, node, new)


def _mean(scope: _Scope, node: fx.Node) -> bool:
    """`x.mean((2, 3))`, in any order and sign of the dimensions, or `x.mean(3).mean(2)`."""
    dims = _argument(node, 1, "dim", None)
    keepdim = bool(_argument(node, 2, "keepdim", False))
    if node.kwargs.get("dtype") is not None or isinstance(dims, fx.Node):
        return False
    if isinstance(dims, list | tuple):
        if sorted(dims) in ([2, 3], [-2, -1]):
            return _replace_call(scope, node, modules.GlobalAvgPool2d(None, keepdim, dims))
        return False
    after = scope.next(node)
    if dims not in (3, -1) or keepdim or after is None:
        return False
    if not _calls(after, (torch.mean,), ("mean",)) or _argument(after, 1, "dim", None) not in (
        2,
        -1,
    ):
        return False
    if _argument(after, 2, "keepdim", False) or after.kwargs.get("dtype") is not None:
        return False
    after.replace_all_uses_with(node)
    scope.graph.erase_node(after)
    return _replace_call(scope, node, modules.GlobalAvgPool2d(None, False, (-2, -1)))


def _replace_call(scope: _Scope, node: fx.Node, new: Swapped) -> bool:
    """Put a module in the place of a function call on a value that one of our kernels may make."""
    if not scope.filter_fn(scope.name, scope.root):
        return False
    source = node.args[0] if node.args else node.kwargs.get("input")
    node.args, node.kwargs = (source,), {}
    scope.replace(node, new)
    scope.produced.add(node)
    return True


@_handler
def _add(scope: _Scope, node: fx.Node) -> bool:
    module = scope.module(node)
    if module is not None:
        if type(module).__name__ != "OnnxBinaryMathOperation" or not _onnx_adds(module):
            return False
        reason = scope.takes(node)
        if reason is not None:
            scope.reasons[id(module)] = reason
            return True
    elif not _calls(node, (operator.add, operator.iadd, torch.add), ("add", "add_")):
        return False
    operands = [x for x in node.args if isinstance(x, fx.Node)]
    if len(node.args) != 2 or len(operands) != 2 or node.kwargs:
        return False
    if not any(_through_identities(scope, x) in scope.produced for x in operands):
        return False
    in_place = node.target is operator.iadd or node.target == "add_"
    if in_place and len(operands[0].users) != 1:
        return False
    if module is None and not scope.filter_fn(scope.name, scope.root):
        return False
    name = scope.full_name(node) if module is not None else f"{scope.name}.{node.name}"
    end, low, high = _take_activation(scope, node, name)
    scope.replace(node, modules.Add(module, low, high))
    scope.produced.update((node, end))
    return True


def _onnx_adds(module: nn.Module) -> bool:
    return module.math_op_function in (torch.add, operator.add)


def _through_identities(scope: _Scope, node: fx.Node) -> fx.Node:
    while node.op == "call_module" and isinstance(scope.module(node), nn.Identity | modules.Folded):
        if node in scope.produced:
            return node
        node = _node(node.args[0])
    return node


# ---------------------------------------------------------------------------------------- blocks


def _fuse_blocks(scope: _Scope) -> None:
    """Fuse the chains of layers in one scope that have a kernel together."""
    if not scope.fixed and not scope.filter_fn(scope.name, scope.root):
        _leave_alone(scope, f"filter_fn left {scope.name or 'the model'} out")
        return
    for fuse in (_fuse_inverted_residual, _fuse_stem_block, _fuse_conv_pool):
        for node in list(scope.graph.nodes):
            if not node._erased:
                fuse(scope, node)
    _leave_alone(scope, "no 1 x 1 convolution that is used only here comes right before it")
    if scope.rewritten and not scope.fixed:
        for node in list(scope.graph.nodes):
            if scope.idle(node):
                scope.erase(node, node.args[0])


def _leave_alone(scope: _Scope, why: str) -> None:
    """Say of the layers that blocks are made around why none is."""
    for node in scope.graph.nodes:
        module = scope.module(node)
        center = isinstance(module, modules.GlobalAvgPool2d) or _is_depthwise(module)
        if center and isinstance(module, Swapped) and module.alone is None:
            module.alone = why


def _is_depthwise(module: nn.Module | None) -> TypeGuard[modules.FusedConv2d]:
    return isinstance(module, modules.FusedConv2d) and module.kind == "depthwise"


def _convolution(scope: _Scope, node: fx.Node | None) -> modules.FusedConv2d | None:
    """The convolution that `node`, and no other call, calls on a positional argument."""
    module = scope.module(node) if node is not None and node.args else None
    if isinstance(module, modules.FusedConv2d) and scope.calls[id(module)] == 1:
        return module
    return None


def _pointwise(scope: _Scope, node: fx.Node | None) -> modules.FusedConv2d | None:
    """The same, if it is a 1 x 1 convolution of every pixel."""
    conv = _convolution(scope, node)
    if conv is None or conv.kind != "pointwise":
        return None
    return conv if conv.stride == (1, 1) and conv.padding == (0, 0, 0, 0) else None


def _activation_of(module: Any) -> tuple[float | None, float | None]:
    return module.act_min, module.act_max


def _fuse_inverted_residual(scope: _Scope, node: fx.Node) -> None:
    """[1 x 1 convolution,] depthwise convolution, 1 x 1 convolution [+ the input]."""
    depthwise = scope.module(node)
    if not _is_depthwise(depthwise):
        return
    before, after = scope.previous(node), scope.next(node)
    expand, project = _pointwise(scope, before), _pointwise(scope, after)
    if _convolution(scope, node) is None:
        depthwise.alone = "it is called in several places"
    elif depthwise.dilation != (1, 1):
        depthwise.alone = f"a fused block has no dilation {depthwise.dilation}"
    elif after is None or project is None:
        depthwise.alone = "no 1 x 1 convolution that is used only here comes right after it"
    elif _activation_of(project) != (None, None):
        depthwise.alone = "the 1 x 1 convolution after it has an activation"
    elif expand is not None and _activation_of(expand) != _activation_of(depthwise):
        depthwise.alone = "the 1 x 1 convolution before it has another activation"
    else:
        chain = [node, after] if before is None or expand is None else [before, node, after]
        add = _residual_add(scope, chain)
        scope.fuse(
            chain if add is None else [*chain, add],
            modules.FusedInvertedResidual.from_stock(expand, depthwise, project, add is not None),
        )


def _residual_add(scope: _Scope, chain: Sequence[fx.Node]) -> fx.Node | None:
    """The call that adds the input of `chain` to its value, if nothing else uses the value."""
    add = scope.next(chain[-1])
    module = scope.module(add) if add is not None else None
    if add is None or not isinstance(module, modules.Add) or scope.calls[id(module)] != 1:
        return None
    operands = {scope.made_by(_node(operand)) for operand in add.args}
    source = scope.made_by(_node(chain[0].args[0]))
    if _activation_of(module) != (None, None) or operands != {source, chain[-1]}:
        return None
    first, depthwise, project = (scope.module(chain[i]) for i in (0, -2, -1))
    assert isinstance(first, modules.FusedConv2d)
    assert isinstance(depthwise, modules.FusedConv2d)
    assert isinstance(project, modules.FusedConv2d)
    keeps_size = depthwise.stride == (1, 1)
    if depthwise.padding is not None:
        left, right, top, bottom = depthwise.padding
        keeps_size &= depthwise.kernel_size == (top + bottom + 1, left + right + 1)
    return add if keeps_size and first.in_channels == project.out_channels else None


def _fuse_stem_block(scope: _Scope, node: fx.Node) -> None:
    """A dense convolution and an inverted residual of stride 1 without expansion."""
    stem, after = _convolution(scope, node), scope.next(node)
    block = scope.peek(after)
    if stem is None or after is None:
        return
    if not isinstance(block, modules.FusedInvertedResidual) or block.expand_weight is not None:
        return
    if stem.groups != 1 or stem.dilation != (1, 1):
        stem.alone = "a fused stem has one group and no dilation"
    elif block.stride != (1, 1) or block.residual:
        stem.alone = "the block after it has a stride or a residual"
    elif _activation_of(stem) != _activation_of(block):
        stem.alone = "the block after it has another activation"
    else:
        scope.fuse([node, scope.enter(after)], modules.FusedStemBlock.from_stock(stem, block))


def _fuse_conv_pool(scope: _Scope, node: fx.Node) -> None:
    """A 1 x 1 convolution and the mean of its value over height and width."""
    conv, after = _pointwise(scope, node), scope.next(node)
    pool = scope.peek(after)
    if conv is None or after is None or not isinstance(pool, modules.GlobalAvgPool2d):
        return
    if scope.calls[id(pool)] == 1:
        scope.fuse([node, scope.enter(after)], modules.FusedConvPool.from_stock(conv, pool))


# ---------------------------------------------------------------------------------------- chains


def _link_chains(scope: _Scope) -> fx.Graph | None:
    """Put the chains of layers in a scope into networks: the graph of a forward that calls these,
    or None if there is no chain or the scope's own graph calls them."""
    if not scope.filter_fn(scope.name, scope.root):
        return None
    if isinstance(scope.root, fx.GraphModule):
        for chain in _find_chains(scope, scope.graph):
            called = [node for node in chain.nodes if not scope.idle(node)]
            if all(scope.calls[id(scope.module(node))] == 1 for node in called):
                scope.fuse(called, chains.Network(chain.links, owned=True))
        return None
    graph = _flat_graph(scope)
    found = _find_chains(scope, graph)
    if not found:
        return None
    paths: set[str] = set()
    # The last first: one may take what the one before it makes.
    for number, chain in reversed(list(enumerate(found))):
        paths.update(str(node.target) for node in chain.nodes if node.op == "call_module")
        name = f"{_NETWORK}{number}"
        # A method, not a module: it is no part of the tree, and tracers see the layers.
        scope.root.__dict__[name] = chains.Network(chain.links).forward
        last = chain.nodes[-1]
        with graph.inserting_after(last):
            call = graph.call_module(name, (chain.source,))
        last.replace_all_uses_with(call)
        for node in reversed(chain.nodes):
            graph.erase_node(node)
    scope.root.__dict__[_GUARD] = chains.Guard(scope.root, sorted(paths))
    return graph


def _find_chains(scope: _Scope, graph: fx.Graph) -> list[chains.Chain]:
    def layer_of(node: fx.Node) -> Swapped | str | None:
        module = scope.module(node)
        if isinstance(module, Swapped):
            return module if module.op is not None else None
        whole = not isinstance(scope.root, fx.GraphModule) and _flattens(node, module)
        return chains.FLATTEN if whole else None

    return chains.find_chains(graph, layer_of, scope.idle, scope.full_name)


def _flattens(node: fx.Node, module: nn.Module | None) -> bool:
    """`torch.flatten(x, 1)`, `x.flatten(1)` or nn.Flatten(), without hooks."""
    if module is not None:
        whole = type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
        return whole and not _has_hooks(module)
    if not _calls(node, (torch.flatten,), ("flatten",)):
        return False
    return (_argument(node, 1, "start_dim", 0), _argument(node, 2, "end_dim", -1)) == (1, -1)


def _flat_graph(scope: _Scope) -> fx.Graph:
    """A copy of the scope's graph in which modules with a forward of their own are replaced by what
    they call, as far as that is traced."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(scope.graph, {}))
    waiting = list(graph.nodes)
    while waiting:
        node = waiting.pop(0)
        inner = scope.scopes.get(id(scope.module(node)))
        if inner is None or len(node.args) != 1 or node.kwargs or inner is scope:
            continue
        if _untouchable(inner.root, inner.name, scope.filter_fn) is not None:
            continue
        arguments = [a for a in inner.graph.nodes if a.op == "placeholder"]
        if any(argument.users for argument in arguments[1:]):
            continue
        value, copies = inner.copy_before(node)
        waiting.extend(copies.values())
        node.replace_all_uses_with(value)
        graph.erase_node(node)
    return graph


# ------------------------------------------------------------------------------------------- api


def _require_module(verb: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise Error(f"torch_mbv2.{verb}: model must be a torch.nn.Module, got {model!r}")


def _all(name: str, module: nn.Module) -> bool:
    return True


def _count_calls(model: nn.Module, graphs: list[fx.Graph], roots: list[nn.Module]) -> Counter[int]:
    """How often each module is called in the traced forwards, or, if more, registered."""
    called: Counter[int] = Counter()
    for graph, root in zip(graphs, roots, strict=True):
        for node in graph.nodes:
            if node.op == "call_module":
                called[id(root.get_submodule(str(node.target)))] += 1
    registered = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    return Counter({key: max(called[key], registered[key]) for key in registered})


def _trace_all(
    model: nn.Module, reasons: dict[int, str]
) -> Iterator[tuple[str, nn.Module, fx.Graph]]:
    """Trace every module that is not a layer of PyTorch's own, outermost first."""
    covered: set[int] = set()
    for name, module in list(model.named_modules()):
        if _is_torch_leaf(module) or _is_same_conv(module) or id(module) in covered:
            continue
        try:
            graph = _LocalTracer().trace(module)
        except Exception as error:  # user code may raise anything when called with proxies
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            reasons[id(module)] = f"torch.fx cannot trace its forward: {line}"
            continue
        for node in graph.nodes:
            if node.op == "call_module":
                path = str(node.target).split(".")
                for i in range(1, len(path)):
                    inner = module.get_submodule(".".join(path[:i]))
                    if _is_plain_sequential(inner):
                        covered.add(id(inner))
            elif node.op == "get_attr":
                owner, _, attribute = str(node.target).rpartition(".")
                if owner:
                    reasons[id(module.get_submodule(owner))] = (
                        f"its {attribute} is read directly by {name or 'the model'}.forward"
                    )
        yield name, module, graph


def patch(
    model: nn.Module,
    *,
    level: str = "network",
    filter_fn: FilterFn | None = None,
    strict: bool = False,
    inplace: bool = False,
) -> nn.Module:
    """The same model, with its layers on torch_mbv2 kernels.

    Convolutions with the padding, batch norm and activation around them, linear layers, average
    pooling (also as a mean over height and width) and residual adds are swapped; dropout is idle.
    Everything else, and everything that does not match exactly, stays stock; `report` says why.
    Equivalent: `model(x)` in eval mode.

    Args:
        model: in eval mode; float32, float16 or bfloat16; on any device.
        level: "op" swaps layer by layer; "block" also fuses inverted residuals, the stem with the
            block after it, and the last convolution with the pooling; "network" also runs chains of
            these, as a rule the whole forward, in one call. (Values that a forward branches on are
            then those of now.)
        filter_fn: `filter_fn(qualified_name, module)` returns whether a module may be swapped, or,
            for one with layers inside, whether its forward may be rewritten.
        strict: raise if a layer for whose kind a kernel exists would stay stock.
        inplace: change `model` itself instead of a copy.

    Returns:
        The patched model: of the same class, with the same attribute names. Patching it again is
        the same as patching the stock model with the new arguments.

    Raises:
        Error: `model` is no module or in training mode, `level` is unknown, or `strict` is not met.
    """
    _require_module("patch", model)
    if level not in LEVELS:
        raise Error(f"torch_mbv2.patch: level must be one of {LEVELS}, got {level!r}")
    training = next((name for name, m in model.named_modules() if m.training), None)
    if training is not None:
        where = f"{training!r} is" if training else "the model is"
        raise Error(
            f"torch_mbv2.patch: {where} in training mode; call model.eval() first "
            "(the kernels are for inference only)"
        )
    if _is_torch_leaf(model) and inplace:
        raise Error(
            f"torch_mbv2.patch: a bare {type(model).__name__} cannot become another module in "
            "place; use the returned one (inplace=False)"
        )
    if _is_torch_leaf(model):
        box: nn.Module = nn.Sequential(model).train(model.training)
        box = patch(box, level=level, filter_fn=filter_fn, strict=strict)
        return box.get_submodule("0")
    if not inplace or strict:
        patched = unpatch(model)  # always a copy
        _patch(patched, level, filter_fn or _all)
        left = [row for row in _rows(patched) if row.kernel is None and row.supported]
        if strict and left:
            listed = "; ".join(f"{row.name}: {row.reason}" for row in left[:5])
            more = f"; and {len(left) - 5} more" if len(left) > 5 else ""
            raise Error(
                f"torch_mbv2.patch: strict=True, but {_layers(len(left))} would stay stock "
                f"({listed}{more})"
            )
        if not inplace:
            return patched
    _unpatch(model)
    _patch(model, level, filter_fn or _all)
    return model


def _patch(model: nn.Module, level: str, filter_fn: FilterFn) -> None:
    flops.register(load=True)
    reasons: dict[int, str] = {}
    traced = list(_trace_all(model, reasons))
    calls = _count_calls(model, [g for _, _, g in traced], [m for _, m, _ in traced])
    scopes: dict[int, _Scope] = {}
    absorbed: list[Swapped] = []
    for name, module, graph in traced:
        scope = _Scope(module, name, graph, calls, filter_fn, reasons, scopes, absorbed)
        scopes[id(module)] = scope
        for node in list(graph.nodes):
            if not node._erased:
                _ = any(handle(scope, node) for handle in _HANDLERS)
        left = [_call_name(node) for node in graph.nodes if _calls(node, _FUNCTIONS)]
        if left:
            module.__dict__[_CALLS] = left
    if level != "op":
        for scope in reversed(scopes.values()):  # a module after those inside it
            _fuse_blocks(scope)
    for scope in reversed(scopes.values()):
        networks = _link_chains(scope) if level == "network" else None
        if scope.rewritten or networks is not None:
            scope.graph.lint()
            _set_forward(scope.root, scope.graph if scope.rewritten else None, networks)
    for layer in _swap_untraced(model, filter_fn, reasons):
        if level != "op" and _is_depthwise(layer):
            layer.alone = "torch.fx cannot trace the forward that calls it"
    for name, module in model.named_modules():
        if isinstance(module, Swapped):
            continue
        reason = reasons.get(id(module)) or _why_stock(module, name, filter_fn)
        if reason is not None:
            module.__dict__[_REASON] = reason


def _call_name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def _swap_untraced(
    model: nn.Module, filter_fn: FilterFn, reasons: dict[int, str]
) -> Iterator[Swapped]:
    """Swap, one by one, the layers in modules whose forward could not be traced."""
    for name, module in list(model.named_modules()):
        if id(module) in reasons or type(module) not in (nn.Conv2d, nn.Linear, nn.AvgPool2d):
            continue
        if any(isinstance(parent, Swapped) for parent in _parents(model, name)):
            continue
        reason = _untouchable(module, name, filter_fn)
        if reason is None and type(module) is nn.Conv2d:
            reason = _conv_reason(module)
        if reason is not None:
            reasons[id(module)] = reason
            continue
        swaps: dict[type[nn.Module], Callable[[Any], Swapped]] = {
            nn.Conv2d: modules.FusedConv2d.from_stock,
            nn.Linear: modules.FusedLinear.from_stock,
            nn.AvgPool2d: modules.AvgPool2d.from_stock,
        }
        new = swaps[type(module)](module)
        _set_submodule(model, name, new)
        yield new


def _parents(model: nn.Module, name: str) -> Iterator[nn.Module]:
    path = name.split(".")
    for i in range(1, len(path)):
        yield model.get_submodule(".".join(path[:i]))


def _why_stock(module: nn.Module, name: str, filter_fn: FilterFn) -> str | None:
    """The reason for a layer that no handler took; None for mere containers."""
    if any(True for _ in module.children()) or type(module) is nn.Identity:
        return None
    base = next((cls for cls in _SUPPORTED if isinstance(module, cls)), None)
    if not _is_torch_leaf(module) and base is None:
        tensors = next(itertools.chain(module.parameters(), module.buffers()), None)
        return "no kernel for it" if tensors is not None else None
    general = _untouchable(module, name, filter_fn)
    if general is not None:
        return general
    if type(module) is nn.BatchNorm2d:
        return "no convolution that is used only here comes right before it"
    if modules.bounds_of(module) is not None:
        return "no layer with a kernel that is used only here comes right before it"
    if base is not None and type(module) is not base:
        return f"a subclass of {base.__name__} may do something else"
    return f"no kernel for {type(module).__name__}"


def fold_norms(model: nn.Module) -> nn.Module:
    """A copy of `model` of stock layers only, with the batch norms folded into the convolutions:
    the fair baseline to time against. Equivalent: `model(x)` in eval mode.
    """
    model = unpatch(model)
    traced = list(_trace_all(model, {}))
    calls = _count_calls(model, [g for _, _, g in traced], [m for _, m, _ in traced])
    for name, root, graph in traced:
        scope = _Scope(root, name, graph, calls, _all, {})
        for node in graph.nodes:
            conv, follower = scope.module(node), scope.next(node)
            norm = scope.module(follower) if follower is not None else None
            parts = _split_norm(norm) if norm is not None else None
            if follower is None or conv is None or parts is None or not _is_conv(conv):
                continue
            if calls[id(conv)] != 1 or calls[id(norm)] != 1:
                continue
            weight, bias = fold.fold_batch_norm(conv.weight, conv.bias, parts[0])
            conv.weight = nn.Parameter(weight, requires_grad=False)
            conv.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
            _set_submodule(root, str(follower.target), parts[1] or nn.Identity())
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """A copy of `model` with the stock layers back in their places: bit-identical outputs.

    What was done to the patched model (`.to()`, `.half()`) is done to the stock layers too. A model
    that is not patched is just copied.
    """
    _require_module("unpatch", model)
    box = nn.Sequential(copy.deepcopy(model))  # `model` itself may be a swapped layer
    _unpatch(box)
    return box[0]


def _unpatch(model: nn.Module) -> None:
    for module in list(model.modules()):
        _reset_forward(module)
        for mark in (_REASON, _CALLS):
            module.__dict__.pop(mark, None)
        for name, child in list(module.named_children()):
            if isinstance(child, Swapped):
                if child.stock is None:
                    delattr(module, name)
                else:
                    setattr(module, name, child.stock)
                    _unpatch(child.stock)  # a whole module that a fused block stood for


def report(model: nn.Module) -> Report:
    """What `patch` did to `model` or, if it is not patched, would do at the default level.

    Returns:
        One row for each layer: its name, kind and sizes, and the kernel that takes it or the reason
        why it stays stock. `str()` of it is a table.
    """
    _require_module("report", model)
    if not any(isinstance(m, Swapped) or _REASON in m.__dict__ for m in model.modules()):
        if any(m.training for m in model.modules()):
            model = copy.deepcopy(model).eval()
        model = patch(model)
    networks = [(name, len(network.layers_in_order())) for name, network in _networks(model)]
    return Report(list(_rows(model)), _extension.why_not_available(), networks)


def _networks(model: nn.Module) -> Iterator[tuple[str, chains.Network]]:
    """The chains that run in one call when the whole model runs, by the name of the module whose
    forward calls them."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        networks = [
            value.__self__ for key, value in vars(module).items() if key.startswith(_NETWORK)
        ]
        if isinstance(module, chains.Network):
            networks.append(module)
        for network in networks:
            layers = {id(layer) for layer in network.layers_in_order()}
            if not layers <= inside:
                yield name, network
            inside |= layers


def _rows(model: nn.Module) -> Iterator[Row]:
    inside: set[int] = set()
    # A network stands in the place of its first layer, and identities in the places of the others.
    layers = {
        link.name: link.layer
        for m in model.modules()
        if isinstance(m, chains.Network)
        for link in m.links
    }
    places = {name for name, _ in model.named_modules()} if layers else set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        if isinstance(module, Swapped):
            inside.update(id(m) for m in module.modules())
            yield _row(name, layers.get(name) or module)
            if isinstance(module, chains.Network):
                for link in module.links:  # for calls, which have no place among the modules
                    if link.layer is not None and link.name not in places:
                        yield _row(link.name, link.layer)
            if isinstance(module, modules.Folded) and module.rest is not None:
                kind = type(module.rest).__name__
                yield Row(f"{name}.rest", kind, "", None, f"no kernel for {kind}", False)
            continue
        reason = module.__dict__.get(_REASON)
        if reason is None:
            for call in module.__dict__.get(_CALLS, ()):
                why = "a function call of this form has no kernel"
                yield Row(name, call, "", None, why, False)
        else:
            leaf = not any(True for _ in module.children())
            supported = leaf and isinstance(module, _SUPPORTED)
            yield Row(name, type(module).__name__, _detail(module), None, reason, supported)


def _row(name: str, module: Swapped) -> Row:
    if module.absorbed_by is not None:
        return Row(name, module.kind, f"into {module.absorbed_by}", "folded", None)
    reason = module.alone
    if reason is None and module.op is not None:
        reason = module.plan().reason
    return Row(name, module.kind, _detail(module), module.kernel, reason)


def _detail(module: nn.Module) -> str:
    if isinstance(module, modules.FusedConv2d | nn.Conv2d):
        groups = "" if module.groups == 1 else f" g{module.groups}"
        window = _window(module.kernel_size, module.stride)
        return f"{module.in_channels} -> {module.out_channels}, {window}{groups}"
    if isinstance(module, modules.FusedInvertedResidual):
        hidden = "" if module.expand_weight is None else f"{module.hidden_channels} -> "
        window = _window(module.kernel_size, module.stride)
        residual = ", residual" * module.residual
        return f"{module.in_channels} -> {hidden}{module.out_channels}, {window}{residual}"
    if isinstance(module, modules.FusedStemBlock):
        channels = f"{module.in_channels} -> {module.hidden_channels} -> {module.out_channels}"
        stem = _window(module.stem_kernel_size, module.stem_stride)
        return f"{channels}, {stem}, {_window(module.kernel_size, (1, 1))}"
    if isinstance(module, modules.FusedConvPool):
        return f"{module.in_channels} -> {module.out_channels}"
    if isinstance(module, modules.FusedLinear | nn.Linear):
        return f"{module.in_features} -> {module.out_features}"
    if isinstance(module, modules.Folded):
        return f"into {module.into}" if module.into else "idle in eval mode"
    return ""


def _window(kernel_size: Sequence[int], stride: Sequence[int]) -> str:
    kernel = "x".join(str(k) for k in kernel_size)
    return kernel if set(stride) == {1} else f"{kernel} s{stride[0]}"
