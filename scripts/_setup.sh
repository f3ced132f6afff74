# Sourced by demo.sh and test.sh: makes .venv if it is missing and installs torch_mbv2 into it, from
# this checkout, with its kernels where a CUDA toolkit is found. Leaves it activated, in the checkout.
# PYTHON names the interpreter that .venv is made with.
say() { printf '\n== %s\n' "$*"; }

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -x .venv/bin/python ]; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "torch_mbv2 needs Python 3.10 or newer: the variable PYTHON can name one" >&2
    exit 1
  }
  say "making .venv with $("${PYTHON:-python3}" --version)"
  "${PYTHON:-python3}" -m venv .venv
fi
. .venv/bin/activate
python -c 'import pip' 2>/dev/null || python -m ensurepip > /dev/null

# Install again only when something that decides the installation changed.
nvcc=${CUDA_HOME:-/usr/local/cuda}/bin/nvcc
stamp=$(
  find pyproject.toml setup.py csrc -type f | sort | xargs cksum
  ls "$nvcc" 2>/dev/null || echo "no toolkit"
  echo "${TORCH_MBV2_CUDA-} ${TORCH_MBV2_WERROR-} ${TORCH_CUDA_ARCH_LIST-}"
)
record=torch_mbv2/_build_info.json  # older than the stamp, unless something else was built meanwhile
if [ "$(cat .venv/stamp 2>/dev/null)" != "$stamp" ] || [ ! -e $record ] || [ $record -nt .venv/stamp ]
then
  # -qq: errors only.
  say "installing torch and torchvision (a few minutes the first time)"
  python -m pip install -qq "torch>=2.10" torchvision ninja "setuptools>=77" wheel
  say "installing torch_mbv2 and what its tests need, building its kernels if there is a CUDA toolkit"
  python -m pip install -qq --no-build-isolation --editable ".[test]"
  printf '%s' "$stamp" > .venv/stamp
fi
# Not through torch_mbv2 itself, whose import takes seconds.
python - <<'END'
import json
info = json.load(open("torch_mbv2/_build_info.json"))
if info["built"]:
    print(f"torch_mbv2 with CUDA kernels for {info['archs']}, built with CUDA {info['cuda']}")
else:
    print(f"torch_mbv2 without CUDA kernels, CPU only: {info['reason']}")
END
