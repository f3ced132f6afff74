#!/usr/bin/env bash
# Sets everything up in .venv and runs the checks of check.sh and the tests. Arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/_setup.sh"
bash scripts/check.sh
say "pytest (tests marked cuda are skipped where there is no GPU)"
exec python -m pytest "$@"
