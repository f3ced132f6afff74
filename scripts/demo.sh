#!/usr/bin/env bash
# Sets everything up in .venv and runs the main job on MODEL, else on torchvision's MobileNetV2:
# patching it, comparing it with stock PyTorch and ONNX Runtime, timing it, classifying the IMAGEs.
# usage: bash scripts/demo.sh [MODEL [IMAGE...]] [--tf] [--labels FILE]
set -euo pipefail
start=$PWD
. "$(dirname "$0")/_setup.sh"
demo=$PWD/scripts/demo.py
cd "$start"  # files are named from where the user is
exec python "$demo" "$@"
