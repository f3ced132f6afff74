#!/usr/bin/env bash
# The checks that run nothing: the linter, both formatters and the types. test.sh and pre-commit call
# this. usage: bash scripts/check.sh [ruff|format|mypy|clang-format]...; default: all of them
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH  # the versions that pyproject.toml pins

check() {
  case $1 in
    ruff) ruff check . ;;
    format) ruff format --check . ;;
    mypy) mypy torch_mbv2 ;;
    clang-format)
      find csrc scripts tests -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' |
        xargs clang-format --dry-run -Werror ;;
    *) echo "check.sh: no check is called $1" >&2; exit 2 ;;
  esac
}

[ $# != 0 ] || set -- ruff format mypy clang-format
for name; do
  printf '\n== %s\n' "$name"
  check "$name"
done
