# Sourced by demo.sh and test.sh: makes .venv if it is missing and installs torch_mbv2 into it, from
# this checkout, with what the kernels need where a CUDA toolkit is found. Leaves it activated.
say() { printf '\n== %s\n' "$*"; }

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -x .venv/bin/python ]; then
  say "making .venv"
  "${PYTHON:-python3}" -m venv .venv
fi
. .venv/bin/activate

# Install again only when something that decides the installation changed.
stamp=$(cat pyproject.toml setup.py csrc/* | cksum; printf '%s' "${TORCH_CUDA_ARCH_LIST-} ${TORCH_MBV2_CUDA-}")
if [ "$(cat .venv/stamp 2>/dev/null)" != "$stamp" ]; then
  say "installing torch and torchvision (a few minutes the first time)"
  python -m pip install --quiet --upgrade torch torchvision ninja "setuptools>=77" wheel
  say "installing torch_mbv2, with its kernels where a CUDA toolkit is found"
  python -m pip install --no-build-isolation --editable ".[test]" --quiet
  printf '%s' "$stamp" > .venv/stamp
fi
