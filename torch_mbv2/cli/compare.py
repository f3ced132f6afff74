"""`compare`: whether a patched model gives the answers of stock PyTorch and of ONNX Runtime, and
if not, which layer is to blame.

By default an output agrees with stock's if its error against float64, on the same rounded weights
and images, is at most `testing.allowed_ratio` times stock's own, with its batch norms as they are
or folded, whichever is the larger, and no element is over the tolerance that
`comparison.differences` derives from the dtype. Against ONNX Runtime, which runs the file in its
own dtype, the tolerance of the coarser of the two alone decides; layer by layer, that of the dtype.
With `--rtol` or `--atol` just these do. An output without a finite element never agrees. The exit
status is 1 if any output, or any layer that is fed what stock's was fed, does not agree.

`--json` writes

    {"schema": 1, "verb": "compare", "command", "model", "weights", "pretrained", "device", "dtype",
     "level", "input": the shape of all images together, "images": [paths] or null for noise,
     "report": {"summary", "note"},
     "agree": whether the exit status is 0,
     "rivals": [{"against": "stock" | "onnxruntime", "output": its place in what the model returns,
         "shape", "top1": images whose top-1 is the rival's, or null where no row is one score a
         class, "error_ratio": the relative L2 error against float64 as a multiple of stock's, or
         null where that does not count, **differences}],
     "layers": null without --layers, else
        {"first_isolated", "first_accumulated": the first layer over tolerance, or null,
         "rows": [{"layer", "call": 0 or, of a layer called again, 1, ..., "kind", "kernel": null
             for a module that stays stock, "skipped": null or why no point of stock compares,
             "accumulated": differences when both models are fed the same images, or null,
             "isolated": differences when the layer is fed what stock's was fed, or null}]},
     "bisect": null without --bisect, else
        {"against": null where all agree, "found": the sentence that is printed,
         "culprits": [layers], "along": [layers that cannot but be patched with them], "patchings",
         "differences": [those of each output with just these layers patched]}}

with differences being

    {"max_abs", "mean_abs", "relative_l2": ||a - b|| / ||b||, "cosine": of the elements that are
     finite on both sides, "nan", "inf": [of a, of b], "elements", "over": those over tolerance,
     "rtol", "atol", "agrees"}
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from torch_mbv2 import testing
from torch_mbv2.cli import images as preprocessing
from torch_mbv2.cli import models, output
from torch_mbv2.comparison.bisect import bisect, finding
from torch_mbv2.comparison.differences import Tolerance, count_layers, differences
from torch_mbv2.comparison.layers import compare_layers
from torch_mbv2.errors import Error, ModelError, UnavailableError
from torch_mbv2.measure.conditions import exact_settings
from torch_mbv2.patch import LEVELS, fold_norms, patch, report

HELP = "compare a patched model with stock PyTorch and ONNX Runtime, layer by layer if asked"
EXAMPLE = "compare model.onnx --dtype float16 --layers --bisect"

STOCK, ONNX_RUNTIME = "stock", "onnxruntime"

_BATCH = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, what to compare it with, on what, and how closely."""
    models.add_arguments(parser)
    parser.add_argument(
        "--against",
        type=_rivals,
        metavar="R,...",
        help=f"of {STOCK}, {ONNX_RUNTIME}; default: {STOCK}, and {ONNX_RUNTIME} where MODEL is an "
        "ONNX file that is not quantised and onnxruntime is installed",
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(models.DTYPES),
        default="float32",
        help="of the weights and activations, but for ONNX Runtime, which runs the file as it is; "
        "default: float32",
    )
    parser.add_argument(
        "--level", choices=LEVELS, default="network", help="of the patching; default: network"
    )
    parser.add_argument(
        "--batch", type=models.positive, metavar="N", help=f"images of noise; default: {_BATCH}"
    )
    parser.add_argument(
        "--images", nargs="+", metavar="IMAGE", help="image files, instead of noise"
    )
    parser.add_argument(
        "--layers", action="store_true", help="compare each layer with stock's too, on one batch"
    )
    parser.add_argument(
        "--bisect",
        action="store_true",
        help="where the answers differ, find the layers that must be patched for that",
    )
    for name in ("rtol", "atol"):
        parser.add_argument(
            f"--{name}",
            type=_tolerance,
            metavar="X",
            help="an element may be off by atol + rtol * |rival's|; give one, and the other is 0; "
            "default: from the dtype, the layers and the RMS of the rival's",
        )
    preprocessing.add_arguments(parser)


def _rivals(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in (STOCK, ONNX_RUNTIME):
            raise argparse.ArgumentTypeError(f"must be of {STOCK}, {ONNX_RUNTIME}, got {name!r}")
    return list(dict.fromkeys(names))


def _tolerance(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number from 0 up, got {text!r}")
    return number


def run(args: argparse.Namespace) -> int:
    """Print how far the patched model is from its rivals; 1 if that is over tolerance.

    `--json` writes what this file's docstring describes.
    """
    device, dtype = models.device(args.device), models.DTYPES[args.dtype]
    if args.images is not None and args.batch is not None:
        raise Error("--batch counts images of noise: give it, or --images")
    if args.images is None and (args.tf or args.mean or args.std or args.crop):
        raise Error("--tf, --mean, --std and --crop are for --images: noise is taken as it is")
    rivals = _available(args.against, args.model)
    model = models.load(args.model, args.size)
    if model.info.notes and args.against is None:  # ONNX Runtime computes something else
        rivals = [STOCK]
    images = _images(args, model)
    tolerance = _tolerance_of(args)
    # Where all is one call, there are no layers to look at; in blocks they run the same kernels.
    layer_level = "block" if args.level == "network" else args.level
    with exact_settings():
        stock, images = model.to(device, dtype), images.to(device)
        patched = patch(stock, level=args.level)
        answers = outputs(patched, images, model.batch)
        expected = {rival: _answers(rival, args.model, stock, images, model) for rival in rivals}
        depth = count_layers(stock)
        errors = None if tolerance.given else _StockErrors.of(stock, images, model.batch)
        file = next((p.dtype for p in model.module.parameters()), None)
        tolerances = {STOCK: tolerance, ONNX_RUNTIME: _coarser(tolerance, file)}
        rows = [
            {"against": rival, **row}
            for rival in rivals
            for row in _end_to_end(
                answers, expected[rival], tolerances[rival], depth, rival, errors
            )
        ]
        layers = None
        if args.layers:
            batch = model.batch or len(images)
            by_layer = patch(stock, level=layer_level) if layer_level != args.level else patched
            layers = compare_layers(stock, by_layer, models.fill(images[:batch], batch), tolerance)
        wrong = next((row["against"] for row in rows if not row["agrees"]), None)
        found = None
        if args.bisect and wrong is None:
            found = finding("the answers agree: there is nothing to be found")
        elif args.bisect and wrong is not None:

            def judge(candidate: nn.Module) -> list[dict[str, Any]]:
                answers = outputs(candidate, images, model.batch)
                return list(
                    _end_to_end(answers, expected[wrong], tolerances[wrong], depth, wrong, errors)
                )

            found = bisect(stock, layer_level, judge)
    summary = report(patched)
    result = {
        "schema": 1,
        "verb": "compare",
        "command": args.command,
        "model": args.model,
        "weights": model.info.weights,
        "pretrained": model.info.pretrained,
        "device": device.type,
        "dtype": args.dtype,
        "level": args.level,
        "input": list(images.shape),
        "images": args.images,
        "report": {"summary": summary.summary(), "note": summary.note},
        "agree": wrong is None and (layers is None or layers["first_isolated"] is None),
        "rivals": rows,
        "layers": layers,
        "bisect": None if found is None else {"against": wrong, **found},
    }
    output.emit(args.json, result, lambda: _print(result))
    if not model.info.pretrained:
        output.note(f"the weights are {model.info.weights}: top-1 means nothing")
    return 0 if result["agree"] else 1


def _same_top1(found: Tensor, expected: Tensor) -> int:
    """In how many rows, (N, classes), the largest is the same; none of those with a NaN."""
    sound = ~(found.isnan().any(1).cpu() | expected.isnan().any(1).cpu())
    return int((sound & (found.argmax(1).cpu() == expected.argmax(1).cpu())).sum())


def _coarser(tolerance: Tolerance, file: torch.dtype | None) -> Tolerance:
    """The tolerance against what ONNX Runtime computes in the file's own dtype."""
    if file not in testing.BOUNDS:
        return tolerance
    dtype = max(tolerance.dtype, file, key=testing.unit_roundoff)
    return Tolerance(dtype, tolerance.given)


def _tolerance_of(args: argparse.Namespace) -> Tolerance:
    given = None
    if args.rtol is not None or args.atol is not None:
        given = (args.rtol or 0.0, args.atol or 0.0)
    return Tolerance(models.DTYPES[args.dtype], given)


def _available(asked: Sequence[str] | None, spec: str) -> Sequence[str]:
    """The rivals that are asked for, else all that there are. Raises Error where one is not."""
    is_file = spec.partition(":")[0] not in ("torchvision", "timm")
    installed = importlib.util.find_spec("onnxruntime") is not None
    if asked is None:
        return [STOCK, ONNX_RUNTIME] if is_file and installed else [STOCK]
    if ONNX_RUNTIME in asked and not is_file:
        raise Error(
            f"--against {ONNX_RUNTIME}: {spec} is no ONNX file; export it to one, or compare "
            f"--against {STOCK}"
        )
    if ONNX_RUNTIME in asked and not installed:
        raise UnavailableError(
            f"--against {ONNX_RUNTIME}: it is not installed: pip install 'torch-mbv2[onnx]', or "
            f"compare --against {STOCK}"
        )
    return asked


# ---------------------------------------------------------------------------------------- inputs


def _images(args: argparse.Namespace, model: models.ImageModel) -> Tensor:
    dtype = models.DTYPES[args.dtype]
    if args.images is None:
        return model.noise(args.batch or _BATCH, dtype)
    load = preprocessing.from_args(args, model.info, model.size).load
    return model.inputs(torch.stack([load(path) for path in args.images]), dtype)


def outputs(module: nn.Module, images: Tensor, batch: int | None = None) -> dict[str, Tensor]:
    """The tensors that `module(images)` returns, by their place: "", "[0]", "['out']", ...

    images: (N, ...); run in pieces of `batch`, the last one filled up, if the model takes no other.

    Raises ModelError for a model that cannot be run on them or returns anything but floats.
    """
    size = batch or len(images)
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for piece in images.split(size):
        leaves, _ = tree_flatten_with_path(models.call(module, models.fill(piece, size)))
        for path, leaf in leaves:
            place = keystr(path)
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                kind = str(leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__)
                kind = kind.removeprefix("torch.")
                raise ModelError(f"the model's output{place} must be a tensor of floats, is {kind}")
            whole = leaf.dim() > 0 and len(leaf) == size
            if not whole and len(images) != size:
                raise ModelError(
                    f"the model's output{place} of shape {tuple(leaf.shape)} is not one for each "
                    f"image: compare it on {size} images at once"
                )
            parts[place].append(leaf[: len(piece)] if whole else leaf)
    return {place: torch.cat(p) if p[0].dim() else p[0] for place, p in parts.items()}


@dataclass(frozen=True)
class _StockErrors:
    """What stock's errors are found from, by the outputs' places.

    Attributes:
        exact: the outputs in float64 of the same weights and images, already rounded.
        folded: those of the stock model with its batch norms folded, which rounds weights again.
    """

    exact: dict[str, Tensor]
    folded: dict[str, Tensor]

    @classmethod
    def of(cls, stock: nn.Module, images: Tensor, batch: int | None) -> _StockErrors | None:
        """None of a model that cannot be run in float64, such as one with casts inside."""
        wide = images.double() if images.is_floating_point() else images
        try:
            exact = outputs(copy.deepcopy(stock).double(), wide, batch)
        except ModelError:
            return None
        return cls(exact, outputs(fold_norms(stock), images, batch))

    def ratio(self, place: str, found: Tensor, stock: Tensor) -> float:
        """The error of `found` as a multiple of stock's, in the form that has the larger one."""
        forms = (stock, self.folded[place])
        return min(testing.error_ratio(found, form, self.exact[place]) for form in forms)


def _answers(
    rival: str, spec: str, stock: nn.Module, images: Tensor, model: models.ImageModel
) -> dict[str, Tensor]:
    if rival == STOCK:
        return outputs(stock, images, model.batch)
    runtime = models.OnnxRuntime(spec)
    return outputs(runtime, images, runtime.batch)


def _end_to_end(
    answers: dict[str, Tensor],
    expected: dict[str, Tensor],
    tolerance: Tolerance,
    depth: int,
    rival: str,
    errors: _StockErrors | None,
) -> Iterator[dict[str, Any]]:
    """A row for each output; `errors` are to judge by against stock.

    Outputs correspond by their order: their places may have other names, such as those of a
    dictionary and of a list.
    """
    shapes = [[tuple(t.shape) for t in side.values()] for side in (answers, expected)]
    if shapes[0] != shapes[1]:
        mine, theirs = (", ".join(map(str, side)) or "none" for side in shapes)
        raise ModelError(
            f"the outputs do not correspond: {mine} of the patched model, {theirs} of {rival}"
        )
    for (place, found), wanted in zip(answers.items(), expected.values(), strict=True):
        classes = found.dim() == 2 and found.shape[1] > 1
        row = differences(found, wanted, *tolerance.bounds(wanted, depth))
        ratio = None
        if rival == STOCK and errors is not None:
            ratio = errors.ratio(place, found, wanted)
            allowed = testing.allowed_ratio(row["elements"])
            row["agrees"] &= ratio <= allowed or row["nan"][1] + row["inf"][1] > 0
        yield {
            "output": place,
            "shape": list(found.shape),
            "top1": _same_top1(found, wanted) if classes else None,
            "error_ratio": ratio,
            **row,
        }


# ---------------------------------------------------------------------------------------- output

_FIGURES: dict[str, Callable[[dict[str, Any]], str]] = {
    "max abs": lambda found: f"{found['max_abs']:.1e}",
    "mean abs": lambda found: f"{found['mean_abs']:.1e}",
    "rel. L2": lambda found: f"{found['relative_l2']:.1e}",
    "cosine": lambda found: f"{found['cosine']:.6f}",
    "NaN": lambda found: "/".join(map(str, found["nan"])),
    "Inf": lambda found: "/".join(map(str, found["inf"])),
    "atol": lambda found: f"{found['atol']:.1e}",
    "over": lambda found: f"{found['over']}/{found['elements']}",
    "agrees": lambda found: "yes" if found["agrees"] else "NO",
}
_NUMBERS = [*_FIGURES][:-1]


def _figures(found: dict[str, Any]) -> list[str]:
    return [show(found) for show in _FIGURES.values()]


def _print(result: dict[str, Any]) -> None:
    summary = result["report"]
    kind = "noise" if result["images"] is None else "image files"
    print(f"{result['model']}, {result['weights']}, on {kind} of shape {tuple(result['input'])}")
    print(f"patched in {result['dtype']} on {result['device']}, level {result['level']}: ", end="")
    print(summary["summary"] + f"; {summary['note']}" * bool(summary["note"]))
    print(f"NaN, Inf: of the patched model / of the rival; {_rule(result)}")
    print()
    columns = ["against", "output", "top-1", "of stock's error", *_FIGURES]
    output.print_table(
        columns,
        [
            [
                row["against"],
                f"{row['output']} {tuple(row['shape'])}".lstrip(),
                "" if row["top1"] is None else f"{row['top1']}/{row['shape'][0]}",
                "" if row["error_ratio"] is None else f"{row['error_ratio']:.2f}",
                *_figures(row),
            ]
            for row in result["rivals"]
        ],
        numbers=["top-1", "of stock's error", *_NUMBERS],
    )
    if result["layers"] is not None:
        _print_layers(result["layers"])
    if result["bisect"] is not None:
        _print_bisect(result["bisect"])


def _rule(result: dict[str, Any]) -> str:
    rtol = result["rivals"][0]["rtol"]
    return f"over: |patched - rival| > atol + {rtol:.1e} |rival|"


def _print_layers(layers: dict[str, Any]) -> None:
    for how, fed in (
        ("isolated", "each layer fed what stock's was fed"),
        ("accumulated", "both models fed the same images"),
    ):
        print(f"\nlayers against stock, {how}: {fed}")
        compared = [row for row in layers["rows"] if row[how] is not None]
        output.print_table(
            ["layer", "kind", *_FIGURES],
            [[_layer(row), row["kind"], *_figures(row[how])] for row in compared],
            numbers=_NUMBERS,
        )
    print()
    for row in layers["rows"]:
        if row["skipped"] is not None:
            print(f"not compared: {_layer(row)} ({row['kind']}): {row['skipped']}")
    for how in ("isolated", "accumulated"):
        print(f"first layer over tolerance, {how}: {layers[f'first_{how}'] or 'none'}")


def _layer(row: dict[str, Any]) -> str:
    return str(row["layer"]) + (f" (call {row['call'] + 1})" if row["call"] else "")


def _print_bisect(found: dict[str, Any]) -> None:
    print(f"\nbisect: {found['found']}")
    if not found["differences"]:
        return
    if found["along"]:
        print(f"patched along with it: {', '.join(found['along'])}")
    print(
        f"against {found['against']} with just these patched, after {found['patchings']} patchings:"
    )
    output.print_table(
        ["output", *_FIGURES],
        [[row["output"] or "output", *_figures(row)] for row in found["differences"]],
        numbers=_NUMBERS,
    )
