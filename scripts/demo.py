"""The main job from end to end, as `demo.sh` runs it: a model goes to ONNX and back, is patched,
compared with stock PyTorch and ONNX Runtime, timed against stock, and classifies images.

The exit status is 0, 1 if the models do not agree, or 2 for input that cannot be used.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

import torch_mbv2
from torch_mbv2 import cli
from torch_mbv2.cli import models
from torch_mbv2.cli.models import ImageModel

EXPORTS = Path(__file__).resolve().parents[1] / "build" / "demo"
BATCH = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit status. argv: by default that of the process."""
    parser = argparse.ArgumentParser(prog="demo.sh", description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default="torchvision:mobilenet_v2",
        help="an ONNX file, torchvision:NAME or timm:NAME; default: torchvision:mobilenet_v2",
    )
    parser.add_argument("images", metavar="IMAGE", nargs="*", help="images to classify")
    parser.add_argument("--tf", action="store_true", help="scale pixels to [-1, 1], as TensorFlow")
    parser.add_argument("--labels", metavar="FILE", help="names of the classes, one a line")
    args = parser.parse_args(argv)
    try:
        return _demo(args)
    except KeyboardInterrupt:
        return 130
    except (torch_mbv2.Error, OSError) as error:
        print(f"demo.sh: error: {error}", file=sys.stderr)
        return 2


def _demo(args: argparse.Namespace) -> int:
    _say(f"loading {args.model}")
    stock = models.load(args.model)
    print(f"weights: {stock.info.weights}")
    path = Path(args.model)
    if args.model.startswith(("torchvision:", "timm:")):
        EXPORTS.mkdir(parents=True, exist_ok=True)
        path = Path(os.path.relpath(EXPORTS / f"{stock.info.name}.onnx"))
        _say(f"exporting it to {path} and loading that back")
        _export(stock, path)
        loaded = models.load(str(path))
        print(f"{type(stock.module).__name__} -> {path} -> {type(loaded.module).__name__}")
    else:
        loaded = stock
        print(f"{path} -> {type(loaded.module).__name__}")

    device = models.device("auto")
    _say(f"patching it, on {torch.cuda.get_device_name() if device.type == 'cuda' else 'the CPU'}")
    patched = torch_mbv2.patch(loaded.to(device, torch.float32))
    report = torch_mbv2.report(patched)
    print(report.summary())
    for row in report.stock:
        print(f"stock: {row.name} ({row.kind}): {row.reason}")
    if report.note:
        print(f"kernels run as stock PyTorch operators here: {report.note}")

    _say("comparing patched, stock and ONNX Runtime in float32")
    images = ["--images", *args.images] if args.images else ["--batch", str(stock.batch or BATCH)]
    tf = ["--tf"] * (args.tf and bool(args.images))
    status = cli.main(["compare", str(path), *images, *tf])
    if status:
        return status

    _say("timing it against stock PyTorch and ONNX Runtime, in turns")
    batches = ["1,8", "1,32,256"][device.type == "cuda"] if stock.batch is None else stock.batch
    rivals = "eager,channels_last,cudagraph,onnxruntime"  # torch.compile takes a while
    quick = ["--rivals", rivals, "--rounds", "10"]
    status = cli.main(["bench", str(path), "--batches", str(batches), *quick])

    if args.images and not status:
        _say("classifying with the patched model")
        flags = ["--tf"] * args.tf + (["--labels", args.labels] if args.labels else [])
        status = cli.main(["classify", args.model, *args.images, "--top", "3", *flags])
    return status


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _export(model: ImageModel, path: Path) -> None:
    """By the legacy exporter, whose files need nothing besides the package `onnx`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.to(torch.device("cpu"), torch.float32),
            (torch.zeros(1, 3, *model.size),),
            str(path),
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
            dynamo=False,
        )


if __name__ == "__main__":
    sys.exit(main())
