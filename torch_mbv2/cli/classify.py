"""`classify`: what a model sees in some images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_mbv2.cli import images, models, output
from torch_mbv2.errors import Error
from torch_mbv2.patch import patch

HELP = "classify images with a patched (or the stock) model"
EXAMPLE = "classify model.onnx cat.jpg dog.jpg --labels labels.txt --top 3"

_BATCH = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL IMAGE... and how to run, preprocess and show."""
    models.add_arguments(parser)
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files")
    parser.add_argument(
        "--dtype",
        choices=tuple(models.DTYPES),
        default="float32",
        help="of the weights and activations; default: float32",
    )
    parser.add_argument("--stock", action="store_true", help="do not patch: stock PyTorch layers")
    parser.add_argument("--labels", metavar="FILE", help="names of the classes, one a line")
    parser.add_argument(
        "--top",
        type=models.positive,
        default=5,
        metavar="K",
        help="classes to show an image; default: 5",
    )
    images.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the likeliest classes of each image.

    `--json` writes {"schema": 1, "verb", "model", "weights", "patched", "device", "dtype",
    "preprocessing": {"size", "mean", "std", "crop"}, "images": [{"path", "top": [{"class",
    "label", "probability"}]}]}; `label` is null without labels.
    """
    device = models.device(args.device)
    labels: Sequence[str] | None = None if args.labels is None else read_labels(args.labels)
    model = models.load(args.model, args.size)
    preprocessing = images.from_args(args, model.info, model.size)
    module = model.to(device, models.DTYPES[args.dtype])
    if not args.stock:
        module = patch(module, inplace=True)
    labels = labels or model.info.labels
    batch = model.batch or min(_BATCH, len(args.images))
    rows = []
    with output.progress("classifying", len(args.images)) as advance:
        for start in range(0, len(args.images), batch):
            paths = args.images[start : start + batch]
            loaded = torch.stack([preprocessing.load(path) for path in paths])
            pixels = model.inputs(loaded, models.DTYPES[args.dtype]).to(device)
            found = probabilities(models.scores(module, pixels, model.batch)).cpu()
            if labels is not None and len(labels) != found.shape[1]:
                raise Error(
                    f"{args.labels or args.model}: {len(labels)} labels, but the model has "
                    f"{found.shape[1]} classes"
                )
            for path, row in zip(paths, found, strict=True):
                if not row.isfinite().all():
                    raise Error(
                        f"{path}: the model's scores are not finite in {args.dtype}; try another "
                        "--dtype"
                    )
                rows.append({"path": path, "top": _top(row, args.top, labels)})
                advance(Path(path).name)
    result = {
        "schema": 1,
        "verb": "classify",
        "model": args.model,
        "weights": model.info.weights,
        "patched": not args.stock,
        "device": str(device),
        "dtype": args.dtype,
        "preprocessing": vars(preprocessing),
        "images": rows,
    }
    output.emit(args.json, result, lambda: _print(rows))
    if not model.info.pretrained:
        output.note(f"the weights are {model.info.weights}: these classes mean nothing")
    return 0


def _print(rows: Sequence[dict[str, Any]]) -> None:
    output.print_table(
        ("image", "probability", "class", "label"),
        [
            (row["path"], f"{entry['probability']:.4f}", str(entry["class"]), entry["label"] or "")
            for row in rows
            for entry in row["top"]
        ],
        numbers=("probability", "class"),
    )


def read_labels(path: str) -> list[str]:
    """The lines of a UTF-8 file, without empty ones at its end. Raises Error for other files."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError:
        raise Error(f"{path}: labels must be text in UTF-8, one a line") from None
    if not lines:
        raise Error(f"{path}: there are no labels in this file")
    return [line.strip() for line in lines]


def probabilities(scores: Tensor) -> Tensor:
    """The softmax of (N, classes) scores in float32, or the scores if they are probabilities."""
    scores = scores.float()
    sums = (scores.sum(1) - 1).abs()
    # Rounding to 8 bits, bfloat16's, moves a sum of probabilities by at most 2^-8 of it.
    if bool((scores >= 0).all()) and bool((sums <= 2**-7).all()):
        return scores
    return scores.softmax(1)


def _top(row: Tensor, count: int, labels: Sequence[str] | None) -> list[dict[str, object]]:
    best = row.topk(min(count, len(row)))
    return [
        {
            "class": index,
            "label": None if labels is None else labels[index],
            "probability": value,
        }
        for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
