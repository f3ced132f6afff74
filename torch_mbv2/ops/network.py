"""A chain of our ops in one call."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._checks import check_float, dtype_name, fail, refuse_grad, shape_of
from ._define import SCHEMAS, register

SCHEMA = "network(Tensor input, Tensor weights, str program) -> Tensor"
_OP = "network"
#: Of a piece of the weights, in bytes: what a GPU reads at once, and more.
_ALIGNMENT = 256
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


# -------------------------------------------------------------------------------------- programs


@dataclass(frozen=True)
class Value:
    """A value of a program: that of the input (0) or of a step (from 1)."""

    index: int


@dataclass(frozen=True)
class Weight:
    """A tensor in a program's weights: its first byte, dtype and shape. One of four dimensions lies
    in memory as channels_last."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        shape = "x".join(str(size) for size in self.shape)
        return f"@{self.offset}:{dtype_name(self.dtype)}:{shape}"

    @property
    def bytes(self) -> int:
        """How many of the weights are its."""
        return math.prod(self.shape) * self.dtype.itemsize

    def lies_in(self, count: int) -> bool:
        """Whether weights of so many bytes may hold it."""
        return self.offset % 16 == 0 and self.offset + self.bytes <= count

    def of(self, weights: Tensor) -> Tensor:
        """The tensor, a view of the `weights`."""
        flat = weights.narrow(0, self.offset, self.bytes).view(self.dtype)
        if len(self.shape) != 4:
            return flat.view(self.shape)
        n, c, h, w = self.shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Step:
    """One call of an op: its arguments in the order of its schema."""

    op: str
    arguments: tuple[Any, ...]


class Program:
    """Writes the program and the weights of a network, step by step.

    The text has a line for each step, the op and its arguments, separated by spaces: `%0` is the
    input, `%1` the value of the first step, `@256:float16:32x1x3x3` a tensor in the weights, `-`
    None, `1,1` a list. `flatten %n` makes (N, C) of (N, C, 1, 1), `unflatten %n` the opposite. The
    network's value is that of the last step.
    """

    def __init__(self) -> None:
        self.input = Value(0)
        self._lines: list[str] = []
        self._tensors: list[Tensor] = []
        self._words: dict[int, str] = {}
        self._bytes = 0

    def add(self, op: str, *arguments: Any) -> Value:
        """One more step. A tensor among the arguments becomes a weight."""
        self._lines.append(" ".join([op, *map(self._word, arguments)]))
        return Value(len(self._lines))

    @property
    def text(self) -> str:
        """The program."""
        return "\n".join(self._lines)

    def weights(self) -> Tensor:
        """The tensors that the text names, all on one device: uint8, (L,), there."""
        devices = {tensor.device for tensor in self._tensors}
        if len(devices) > 1:
            raise fail(_OP, f"weights must be on one device, got {sorted(map(str, devices))}")
        device = devices.pop() if devices else torch.device("cpu")
        packed = torch.zeros(self._bytes, dtype=torch.uint8, device=device)
        offset = 0
        for tensor in self._tensors:
            flat = _in_order(tensor).view(torch.uint8)
            packed[offset : offset + len(flat)] = flat
            offset += _aligned(len(flat))
        return packed

    def _word(self, argument: Any) -> str:
        if argument is None:
            return "-"
        if isinstance(argument, Value):
            return f"%{argument.index}"
        if isinstance(argument, Tensor):
            return self._weight(argument)
        if isinstance(argument, bool):
            return str(int(argument))
        if isinstance(argument, Sequence):
            return ",".join(str(int(item)) for item in argument)
        return repr(float(argument) if isinstance(argument, float) else int(argument))

    def _weight(self, tensor: Tensor) -> str:
        word = self._words.get(id(tensor))
        if word is None:
            word = str(Weight(self._bytes, tensor.dtype, tuple(tensor.shape)))
            self._words[id(tensor)] = word
            self._tensors.append(tensor)
            self._bytes += _aligned(tensor.numel() * tensor.element_size())
        return word


def _in_order(tensor: Tensor) -> Tensor:
    """The elements, (L,), in the order of memory: of four dimensions, channels last."""
    tensor = tensor.detach()
    if tensor.dim() == 4:
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.contiguous().view(-1)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


@functools.lru_cache(maxsize=256)
def parse(program: str) -> tuple[Step, ...]:
    """The steps of a program's text."""
    lines = program.rstrip("\n")
    if not lines:
        raise fail(_OP, "the program has no step")
    return tuple(_parse_step(i, line) for i, line in enumerate(lines.split("\n"), 1))


def _source(steps: Sequence[Step], index: int) -> int:
    """The value that a value is a view of; 0 also stands for the weights."""
    while index > 0 and steps[index - 1].op in _VIEWS:
        (argument,) = steps[index - 1].arguments
        index = argument.index if isinstance(argument, Value) else 0
    return index


def _parse_step(number: int, line: str) -> Step:
    op, *words = line.split(" ")

    def refuse(why: str) -> RuntimeError:
        return fail(_OP, f"step {number} of the program, {op}: {why}")

    if op in _VIEWS:
        types = ["Tensor"]
    elif op in SCHEMAS and op != _OP:
        schema = getattr(torch.ops.torch_mbv2, op).default._schema
        types = [str(argument.type) for argument in schema.arguments]
    else:
        raise refuse("there is no such op")
    if len(words) < len(types):
        raise refuse("an argument is missing")
    if len(words) > len(types):
        raise refuse("there are more arguments than it takes")
    arguments = [
        _parse(word, kind, number, refuse) for word, kind in zip(words, types, strict=True)
    ]
    return Step(op, tuple(arguments))


def _int(word: str) -> int:
    """As C++'s from_chars reads it: digits alone, of 64 bits."""
    value = int(word) if re.fullmatch(r"-?[0-9]+", word) else None
    if value is None or not -(2**63) <= value < 2**63:
        raise ValueError(word)
    return value


def _float(word: str) -> float:
    if re.fullmatch(r"-?(inf|infinity|nan)", word, re.IGNORECASE):
        return float(word)
    match = re.fullmatch(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", word, re.IGNORECASE)
    value = float(word) if match else math.nan
    # Out of a double's range: infinite, or 0 where it is not.
    if match is None or math.isinf(value) or (value == 0 and re.search("[1-9]", match[1])):
        raise ValueError(word)
    return value


def _parse(word: str, kind: str, number: int, refuse: Callable[[str], RuntimeError]) -> Any:
    def parsed(read: Callable[[str], Any], part: str) -> Any:
        try:
            return read(part)
        except ValueError:
            raise refuse(f"a number was expected, got '{part}'") from None

    if kind.startswith("Optional[") and word == "-":
        return None
    kind = kind.removeprefix("Optional[").removesuffix("]") if "Optional" in kind else kind
    if kind == "List[int]":
        return [parsed(_int, part) for part in word.split(",")]
    if kind == "bool":
        return parsed(_int, word) != 0
    if kind == "int":
        return parsed(_int, word)
    if kind == "float":
        return parsed(_float, word)
    if word.startswith("%"):
        index = parsed(_int, word[1:])
        if not 0 <= index < number:
            raise refuse(f"there is no value {word} before it")
        return Value(index)
    if not word.startswith("@"):
        raise refuse(f"a value (%0) or a weight (@0:float32:8x8) was expected, got '{word}'")
    match = re.fullmatch(r"@(\d+):(float32|float16|bfloat16):(\d+(?:x\d+){0,3})", word)
    if match is None:
        raise refuse(f"a weight must be @byte:dtype:shape, got '{word}'")
    offset, dtype, shape = match.groups()
    return Weight(int(offset), _DTYPES[dtype], tuple(int(size) for size in shape.split("x")))


# ------------------------------------------------------------------------------------------- op


Visit = Callable[[str, Sequence[Any], Tensor], None]


def _run(input: Tensor, weights: Tensor, program: str) -> Tensor:
    """The steps one by one, through the dispatcher: on the CPU, or without data."""
    check_float(_OP, input)
    if weights.dtype != torch.uint8 or weights.dim() != 1 or not weights.is_contiguous():
        raise fail(
            _OP,
            "weights must be uint8 of shape (L,), contiguous, got "
            f"{dtype_name(weights.dtype)} of {shape_of(weights)}",
        )
    if weights.device != input.device:
        raise fail(
            _OP, f"weights must be on the device of input, {input.device}, got {weights.device}"
        )
    for number, step in enumerate(parse(program), 1):
        for argument in step.arguments:
            if isinstance(argument, Weight) and not argument.lies_in(len(weights)):
                raise fail(
                    _OP,
                    f"step {number} of the program, {step.op}: '{argument}' must start at a "
                    f"multiple of 16 bytes and lie inside the {len(weights)} bytes of weights",
                )
    return run_steps(input, program, lambda weight: weight.of(weights))


def run_steps(
    input: Tensor, program: str, tensor_of: Callable[[Weight], Tensor], visit: Visit | None = None
) -> Tensor:
    """The value of a program.

    Args:
        input: of the program.
        program: its text.
        tensor_of: gives the tensor for a weight.
        visit: called after every op, with its name, its arguments and what it made.
    """
    steps = parse(program)
    last_use = {
        argument.index: number
        for number, step in enumerate(steps, 1)
        for argument in step.arguments
        if isinstance(argument, Value)
    }
    values: dict[int, Tensor] = {0: input}

    def resolve(argument: Any) -> Any:
        if isinstance(argument, Value):
            return values[argument.index]
        return tensor_of(argument) if isinstance(argument, Weight) else argument

    for number, step in enumerate(steps, 1):
        arguments = [resolve(argument) for argument in step.arguments]
        if step.op in _VIEWS:
            values[number] = _VIEWS[step.op](number, *arguments)
        else:
            values[number] = getattr(torch.ops.torch_mbv2, step.op).default(*arguments)
            if visit is not None:
                visit(step.op, arguments, values[number])
        for index in [i for i in values if last_use.get(i, number) <= number and i != number]:
            del values[index]
    if _source(steps, len(steps)) == 0:
        raise fail(_OP, "the program hands on its input")
    return values[len(steps)]


def _flatten(number: int, x: Tensor) -> Tensor:
    if x.dim() != 2 and (x.dim() != 4 or tuple(x.shape[2:]) != (1, 1)):
        raise fail(
            _OP,
            f"step {number} of the program, flatten: flatten takes (N, C, 1, 1) or (N, C), "
            f"got {shape_of(x)}",
        )
    return x.reshape(x.shape[:2])


def _unflatten(number: int, x: Tensor) -> Tensor:
    if x.dim() != 2:
        raise fail(
            _OP,
            f"step {number} of the program, unflatten: unflatten takes (N, C), got {shape_of(x)}",
        )
    n, c = x.shape
    return x.as_strided((n, c, 1, 1), (c, 1, c, c))


_VIEWS: dict[str, Callable[[int, Tensor], Tensor]] = {"flatten": _flatten, "unflatten": _unflatten}


raw = register(SCHEMA, fake=_run, implementation=_run)


def network(input: Tensor, weights: Tensor, program: str) -> Tensor:
    """A chain of the other ops in one call: one way through the dispatcher, one piece of memory for
    all that its steps hand on, every launch in C++.

    Equivalent: the ops of the program, one after the other. On CUDA, a small batch of a shape that
    was seen before on the stream replays a CUDA graph, so that its launches cost next to nothing;
    `replays()` tells what is kept for that, `forget_replays()` gives it back.

    Args:
        input: what the first step takes, float32, float16 or bfloat16.
        weights: (L,) of uint8, on the device of `input`: what `Program.weights` makes.
        program: the steps, see `Program`.

    Returns:
        The value of the last step, in the layout of its op.

    Raises:
        RuntimeError: the program is none, one of its steps refuses its arguments, or an argument
            requires grad in grad mode.
    """
    refuse_grad(_OP, input)
    return raw(input, weights, program)


def replays() -> tuple[int, int]:
    """How many CUDA graphs are kept for networks, and the bytes of device memory that they use."""
    if not hasattr(torch.ops.torch_mbv2, "replays"):
        return (0, 0)
    graphs, scratch = torch.ops.torch_mbv2.replays()
    return int(graphs), int(scratch)


def forget_replays() -> None:
    """Give back the CUDA graphs that are kept for networks, and their memory."""
    if hasattr(torch.ops.torch_mbv2, "forget_replays"):
        torch.ops.torch_mbv2.forget_replays()
