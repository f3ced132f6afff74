#!/usr/bin/env bash
# Sets everything up in .venv and runs the checks of check.sh and the tests. Arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/_setup.sh"
bash scripts/check.sh
say "pytest (tests marked cuda are skipped where there is no GPU)"
# Two at a time, a file each, which share the cores; on a GPU, where tests take times, one.
if nvidia-smi > /dev/null 2>&1; then
  workers=0
else
  workers=2
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((($(nproc) + 1) / 2))}"
fi
exec python -m pytest -n $workers --dist loadfile "$@"
