"""`weights`: a model's convolutions and linear layers as files that other programs read.

`export` folds the batch norms into the convolutions and writes the weight and the bias of every
layer, zeros where it has none, in the model's own dtype. Layers are numbered by kind in the order
in which they run; one that runs several times counts once. The names are the same in every format:

    conv/0.w  (Cout, Cin / groups, kH, kW)    conv/0.b  (Cout,)    conv/1.w ...
    gemm/0.w  (out, in)                       gemm/0.b  (out,)     ...

    text         one file a tensor, DIR/conv/0.w ..., one decimal number a line in C order, with as
                 many digits as read back exactly
    npz          DIR/weights.npz, of numpy
    safetensors  DIR/weights.safetensors

bfloat16, which numpy lacks, is float32 of the same values in text and npz. DIR/weights.json says
what the tensors are:

    {"format": "torch_mbv2 weights", "version": 1,
     "tensors": [{"name", "shape", "dtype", "module": qualified name in the model,
                  "parameter": "weight" | "bias"}]}

`check` compares such a folder with the model, bit for bit (any NaN equals any other). It takes the
shapes from the model, so text needs no weights.json; where there is one it has to agree.

`--json` writes

    {"schema": 1, "verb": "weights", "action": "export" | "check", "model",
     "weights": where they come from, "pretrained", "directory", "format",
     "left_out": names of the parameters and floating-point buffers that belong to no convolution or
         linear layer that ran, and so are not in the files,
     "tensors": [one for each tensor: {"name", "shape", "dtype", "module", "parameter"}]}

and for `check` also "equal", and in each of the tensors

     "status": "equal" | "differs" | "missing" | "extra" | "wrong shape" | "unreadable",
     "differ": how many values differ, null where they cannot be compared,
     "max_abs": the largest difference, null where that is not finite, or as above,
     "detail": what is wrong if `status` does not say it all, or ""

where what is in the folder only, "extra", and an unusable weights.json have null for the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torch_mbv2.cli import models, output
from torch_mbv2.errors import Error, ModelError, UnavailableError
from torch_mbv2.patch import fold_norms

HELP = "export a model's weights as plain files, or check such files against the model"
EXAMPLE = "weights export model.onnx weights/"

_INDEX = "weights.json"
_INDEX_FORMAT = {"format": "torch_mbv2 weights", "version": 1}
_OURS = re.compile(r"(conv|gemm)(/\d+\.[wb])?|weights\.(json|npz|safetensors)")

# Digits that tell any two numbers of a dtype apart.
_DIGITS = {torch.float16: 5, torch.bfloat16: 9, torch.float32: 9, torch.float64: 17}

# Files far beyond what was written are not read: they could fill the memory.
_BYTES_PER_LINE = 64
_LARGEST_INDEX = 2**24
_NPY_HEADER = 2**12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """export|check MODEL DIR and the format."""
    parser.add_argument("action", choices=("export", "check"), help="write DIR, or compare with it")
    models.add_model(parser)
    parser.add_argument("directory", metavar="DIR", help="the folder of the weights")
    parser.add_argument(
        "--format",
        choices=tuple(_FORMATS),
        help="of the weights; default: text, for check what is in DIR",
    )
    parser.add_argument(
        "--force", action="store_true", help="export: replace an earlier export in DIR"
    )


def run(args: argparse.Namespace) -> int:
    """Export or check; 1 if a check found a difference.

    `--json` writes what this file's docstring describes.
    """
    export = args.action == "export"
    if args.force and not export:
        raise Error("--force: check writes nothing that could be replaced")
    # As the folder changes its name, a link to it must not change instead.
    directory = Path(args.directory).resolve()
    if export:
        _check_target(directory, args.directory, args.force)
    elif not directory.is_dir():
        raise Error(f"{args.directory}: no such folder")
    form = args.format or ("text" if export else _find_format(directory, args.directory))
    model = models.load(args.model)
    tensors, left_out = _tensors(model, args.model)
    result: dict[str, Any] = {
        "schema": 1,
        "verb": "weights",
        "action": args.action,
        "model": args.model,
        "weights": model.info.weights,
        "pretrained": model.info.pretrained,
        "directory": args.directory,
        "format": form,
        "left_out": left_out,
    }
    if export:
        _export(directory, args.directory, form, tensors)
        result["tensors"] = [tensor.describe() for tensor in tensors]
        output.emit(args.json, result, lambda: _print_export(result))
    else:
        result["tensors"] = _check(directory, form, tensors)
        result["equal"] = all(row["status"] == "equal" for row in result["tensors"])
        output.emit(args.json, result, lambda: _print_check(result))
    if left_out:
        output.note(
            f"{len(left_out)} tensors are of no convolution or linear layer that runs, and not in "
            f"the files: {left_out[0]}" + ", ..." * (len(left_out) > 1)
        )
    if not model.info.pretrained:
        output.note(f"the weights are {model.info.weights}")
    return 0 if export or result["equal"] else 1


# --------------------------------------------------------------------------------------- tensors


@dataclass(frozen=True, eq=False)
class _Tensor:
    """A weight or bias to write or to compare with, on the CPU, and what the files call it."""

    name: str
    module: str
    parameter: str
    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": str(self.values.dtype).removeprefix("torch."),
            "module": self.module,
            "parameter": self.parameter,
        }

    def to_numpy(self) -> np.ndarray:
        values = self.values
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def _tensors(model: models.ImageModel, spec: str) -> tuple[list[_Tensor], list[str]]:
    """The weight and bias of every convolution and linear layer in the order in which they run,
    and the names of all other parameters and floating-point buffers."""
    folded = fold_norms(model.module)
    ran: dict[nn.Conv2d | nn.Linear, None] = {}  # a set that keeps the order
    for layer in folded.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_pre_hook(lambda *_, layer=layer: ran.setdefault(layer))
    stored = dict((*folded.named_parameters(), *folded.named_buffers()))
    stored = {name: tensor for name, tensor in stored.items() if tensor.is_floating_point()}
    dtype = next((tensor.dtype for tensor in stored.values()), torch.float32)
    models.scores(folded, model.noise(model.batch or 1, dtype))
    if not ran:
        raise ModelError(f"{spec}: the model runs no convolution or linear layer to export")
    names = {module: name for name, module in folded.named_modules()}
    counts = {"conv": 0, "gemm": 0}
    tensors = []
    for module in ran:
        kind = "conv" if isinstance(module, nn.Conv2d) else "gemm"
        weight = module.weight.detach()
        bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach()
        for suffix, parameter, values in (("w", "weight", weight), ("b", "bias", bias)):
            name = f"{kind}/{counts[kind]}.{suffix}"
            # A clone, as safetensors takes no two tensors that share their memory.
            values = values.clone(memory_format=torch.contiguous_format)
            tensors.append(_Tensor(name, names[module], parameter, values))
        counts[kind] += 1
    used = {id(parameter) for module in ran for parameter in (module.weight, module.bias)}
    return tensors, [name for name, tensor in stored.items() if id(tensor) not in used]


# ---------------------------------------------------------------------------------------- export


def _check_target(directory: Path, shown: str, force: bool) -> None:
    """Raise Error now if the export would overwrite anything that it must not."""
    if not directory.parent.is_dir():
        raise Error(f"{shown}: there is no directory {directory.parent}")
    if not directory.exists():
        return
    if not directory.is_dir():
        raise Error(f"{shown}: is not a directory")
    if directory == Path.cwd():
        raise Error(f"{shown}: an export makes its folder anew, so give another than the current")
    inside = sorted(_walk(directory))
    if inside and not force:
        raise Error(f"{shown}: is not empty; give another folder, or --force to replace an export")
    for name in inside:
        if not _OURS.fullmatch(name) or (directory / name).is_symlink():
            raise Error(f"{shown}: holds {name!a}, which no export wrote; give another folder")


def _walk(directory: Path) -> Iterator[str]:
    """The paths of everything inside, relative to `directory`; links are not followed."""
    for folder, folders, files in os.walk(directory):
        for name in (*folders, *files):
            yield Path(folder, name).relative_to(directory).as_posix()


def _export(directory: Path, shown: str, form: str, tensors: Sequence[_Tensor]) -> None:
    """Make `directory` anew. It gets its name when it is complete, so it never holds half of it."""
    try:
        # Next to it, as only what is on the same file system can be renamed.
        with tempfile.TemporaryDirectory(
            prefix=f".{directory.name}.", dir=directory.parent
        ) as work:
            new, old = Path(work, "new"), Path(work, "old")
            new.mkdir()
            _FORMATS[form].write(new, tensors)
            index = {**_INDEX_FORMAT, "tensors": [tensor.describe() for tensor in tensors]}
            (new / _INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
            if directory.exists():
                directory.rename(old)
            try:
                new.rename(directory)
            except BaseException:
                if old.exists():
                    old.rename(directory)
                raise
    except OSError as error:
        raise Error(f"{shown}: cannot be written: {error.strerror or error}") from error


# ----------------------------------------------------------------------------------------- check


class _Fault(Exception):
    """What the folder holds for a tensor cannot be compared with it; the message says why."""

    def __init__(self, status: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status


def _find_format(directory: Path, shown: str) -> str:
    binary = [name for name in ("npz", "safetensors") if (directory / f"weights.{name}").exists()]
    text = ["text"] if any((directory / kind).is_dir() for kind in ("conv", "gemm")) else []
    found = [*text, *binary] or ["text"]
    if len(found) > 1:
        raise Error(f"{shown}: holds weights as {' and '.join(found)}; choose one by --format")
    return found[0]


def _check(directory: Path, form: str, tensors: Sequence[_Tensor]) -> list[dict[str, Any]]:
    """A row for each tensor, and for what else is in the folder."""
    rows = []
    shapes: dict[str, Any] = {}
    try:
        shapes = _index_shapes(directory / _INDEX)
    except _Fault as fault:
        rows.append(_foreign(_INDEX, fault.status, str(fault)))
    with _FORMATS[form].open(directory) as (names, read):
        for tensor in tensors:
            row = {**tensor.describe(), "differ": None, "max_abs": None, "detail": ""}
            try:
                if tensor.name not in names:
                    raise _Fault("missing", "")
                _require_shape(shapes.get(tensor.name, tensor.shape), tensor.shape, _INDEX)
                row |= _difference(read(tensor), tensor.values.double())
            except _Fault as fault:
                row |= {"status": fault.status, "detail": str(fault)}
            rows.append(row)
        extra = sorted(names - {tensor.name for tensor in tensors})
    return rows + [_foreign(name, "extra", "") for name in extra]


def _foreign(name: str, status: str, detail: str) -> dict[str, Any]:
    """The row of what is no tensor of the model."""
    nothing = dict.fromkeys(("shape", "dtype", "module", "parameter", "differ", "max_abs"))
    return {"name": name, **nothing, "status": status, "detail": detail}


def _index_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes that weights.json states, none without such a file. Raises _Fault."""
    if not path.exists():
        return {}
    try:
        index = json.loads(_read_file(path, path.name, _LARGEST_INDEX))
        if {key: index[key] for key in _INDEX_FORMAT} != _INDEX_FORMAT:
            raise ValueError(f"must start with {json.dumps(_INDEX_FORMAT)}")
        return {entry["name"]: tuple(entry["shape"]) for entry in index["tensors"]}
    except (LookupError, RecursionError, TypeError, ValueError) as error:
        raise _Fault("unreadable", f"not an index of weights: {error}") from None


def _difference(values: Tensor, expected: Tensor) -> dict[str, Any]:
    """How two float64 tensors of one shape differ; -0 is not 0, but any NaN is any other."""
    same = values.view(torch.int64) == expected.view(torch.int64)
    differ = ~(same | (values.isnan() & expected.isnan()))
    count = int(differ.sum())
    largest = float((values - expected)[differ].abs().max()) if count else 0.0
    return {"status": "differs" if count else "equal", "differ": count, "max_abs": largest}


def _require_shape(found: Sequence[int], expected: Sequence[int], where: str) -> None:
    if tuple(found) != tuple(expected):
        raise _Fault("wrong shape", f"{where} has {tuple(found)}, the model {tuple(expected)}")


def _read_file(path: Path, name: str, most: int) -> bytes:
    """The bytes of a regular file of at most `most`. Raises _Fault for others."""
    if not path.is_file():  # reading a pipe could wait for ever
        raise _Fault("unreadable", f"{name} is not a file")
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise _Fault("unreadable", f"{name} has more than {most} bytes")
    return data


# --------------------------------------------------------------------------------------- formats

_Reader = Callable[[_Tensor], Tensor]
"""Reads the tensor of the same name as a given one in float64, in its shape. Raises _Fault."""


@dataclass(frozen=True)
class _Format:
    """How tensors are written into a folder, and how to get their names and a reader of one."""

    write: Callable[[Path, Sequence[_Tensor]], None]
    open: Callable[[Path], AbstractContextManager[tuple[set[str], _Reader]]]


def _write_text(directory: Path, tensors: Sequence[_Tensor]) -> None:
    with output.progress("writing", len(tensors)) as advance:
        for tensor in tensors:
            path = directory / tensor.name
            path.parent.mkdir(exist_ok=True)
            rows = tensor.to_numpy().reshape(len(tensor.values), -1)
            np.savetxt(path, rows, fmt=f"%.{_DIGITS[tensor.values.dtype]}g", delimiter="\n")
            advance(tensor.name)


@contextmanager
def _open_text(directory: Path) -> Iterator[tuple[set[str], _Reader]]:
    def read(tensor: _Tensor) -> Tensor:
        count = tensor.values.numel()
        data = _read_file(directory / tensor.name, tensor.name, _BYTES_PER_LINE * (count + 1))
        values = torch.from_numpy(_parse(data, tensor.name))
        if len(values) != count:
            detail = f"{tensor.name} has {len(values)} values, {tensor.shape} are {count}"
            raise _Fault("wrong shape", detail)
        # Decimal numbers stand for those of the model's dtype that are next to them.
        return values.reshape(tensor.shape).to(tensor.values.dtype).double()

    folders = [directory / kind for kind in ("conv", "gemm")]
    yield {f"{f.name}/{p.name}" for f in folders if f.is_dir() for p in f.iterdir()}, read


def _parse(data: bytes, name: str) -> np.ndarray:
    """The numbers of a text, one a line, in float64. Raises _Fault that names the line."""
    lines = data.decode("ascii", "replace").split("\n")
    if not data.strip():
        return np.empty(0)
    try:
        values = np.loadtxt(lines, dtype=np.float64, comments=None, ndmin=2)
        if values.shape[1] == 1:
            return values[:, 0]
    except ValueError:
        pass
    # numpy's messages count rows from 0 or from 1, and leave empty lines out.
    faults = (n for n, line in enumerate(lines, 1) if line.strip() and not _is_number(line))
    number = next(faults, 1)
    text = lines[number - 1].strip()[:20]
    raise _Fault("unreadable", f"{name}:{number}: not one number: {text!a}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text


def _write_npz(directory: Path, tensors: Sequence[_Tensor]) -> None:
    # Of no one type for mypy: among these keywords could be allow_pickle.
    arrays: dict[str, Any] = {tensor.name: tensor.to_numpy() for tensor in tensors}
    np.savez(directory / "weights.npz", **arrays)


@contextmanager
def _open_npz(directory: Path) -> Iterator[tuple[set[str], _Reader]]:
    path = directory / "weights.npz"

    def read(tensor: _Tensor) -> Tensor:
        try:
            entry = archive.getinfo(f"{tensor.name}.npy")
            if entry.file_size > 8 * tensor.values.numel() + _NPY_HEADER:
                detail = f"{path.name}: {entry.file_size} bytes are too many for {tensor.shape}"
                raise _Fault("wrong shape", detail)
            with archive.open(entry) as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
        except _Fault:
            raise
        except Exception as error:  # damaged archives raise errors of zip, zlib, numpy, Python ...
            raise _Fault("unreadable", f"{path.name}: {type(error).__name__}: {error}") from None
        if array.dtype.kind != "f":
            raise _Fault("unreadable", f"{path.name}: {array.dtype} is not compared")
        _require_shape(array.shape, tensor.shape, path.name)
        return torch.from_numpy(array.astype(np.float64))

    try:
        archive = zipfile.ZipFile(_require_file(path))
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise Error(f"{path}: not an npz archive, or a damaged one: {error}") from None
    with archive:
        yield {name.removesuffix(".npy") for name in archive.namelist()}, read


def _write_safetensors(directory: Path, tensors: Sequence[_Tensor]) -> None:
    safetensors = _import_safetensors()
    values = {tensor.name: tensor.values for tensor in tensors}
    try:
        safetensors.torch.save_file(values, directory / "weights.safetensors")
    except safetensors.SafetensorError as error:  # also for a full disk
        raise OSError(str(error)) from error


@contextmanager
def _open_safetensors(directory: Path) -> Iterator[tuple[set[str], _Reader]]:
    safetensors = _import_safetensors()
    path = directory / "weights.safetensors"

    def read(tensor: _Tensor) -> Tensor:
        found = archive.get_slice(tensor.name)
        if found.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            raise _Fault("unreadable", f"{path.name}: {found.get_dtype()} is not compared")
        _require_shape(found.get_shape(), tensor.shape, path.name)
        values: Tensor = archive.get_tensor(tensor.name)
        return values.double()

    try:
        archive = safetensors.safe_open(_require_file(path), framework="pt")
    except safetensors.SafetensorError as error:
        raise Error(f"{path}: not a safetensors file, or a damaged one: {error}") from None
    with archive:
        yield set(archive.keys()), read


def _import_safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "safetensors":
            raise
        raise UnavailableError(
            "--format safetensors needs the package safetensors: pip install safetensors"
        ) from None
    return safetensors


def _require_file(path: Path) -> Path:
    if not path.is_file():
        raise Error(f"{path}: no such file")
    return path


_FORMATS = {
    "text": _Format(_write_text, _open_text),
    "safetensors": _Format(_write_safetensors, _open_safetensors),
    "npz": _Format(_write_npz, _open_npz),
}


# ---------------------------------------------------------------------------------------- output


def _print_export(result: dict[str, Any]) -> None:
    output.print_table(
        ("tensor", "shape", "dtype", "layer"),
        [
            (row["name"], _text(row["shape"]), row["dtype"], _printable(row["module"]))
            for row in result["tensors"]
        ],
    )
    print(f"\n{len(result['tensors'])} tensors as {result['format']} in {result['directory']}")


def _print_check(result: dict[str, Any]) -> None:
    output.print_table(
        ("tensor", "shape", "layer", "status", "differ", "largest", "detail"),
        [
            (
                _printable(row["name"]),
                _text(row["shape"]),
                _printable(row["module"] or ""),
                row["status"],
                _text(row["differ"]),
                "" if row["max_abs"] is None else f"{row['max_abs']:.3g}",
                _printable(row["detail"]),
            )
            for row in result["tensors"]
        ],
        numbers=("differ", "largest"),
    )
    wrong = sum(row["status"] != "equal" for row in result["tensors"])
    print(f"\n{len(result['tensors']) - wrong} tensors are equal, {wrong} are not")


def _text(value: int | Sequence[int] | None) -> str:
    if isinstance(value, list):
        return "x".join(map(str, value))
    return "" if value is None else str(value)


def _printable(name: str) -> str:
    """A name out of a file without what would control a terminal."""
    return name if name.isprintable() else ascii(name)
