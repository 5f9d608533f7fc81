#!/usr/bin/env bash
# What a machine lacks that has JAX for CUDA, flax, optax and orbax, as wheels.
#
#     benchmarks/gpu_wheels.sh wheels              for Python 3.12 on x86-64 Linux
#     PYTHON_VERSION=3.13 benchmarks/gpu_wheels.sh wheels
#
# There, beside the repository, without a network:
#     python3 -m pip install --no-index --no-deps --target site wheels/*.whl
#     PYTHONPATH=site:. python3 benchmarks/gpu.py
set -euo pipefail
folder="${1:?a folder for the wheels}"
platforms=()
for glibc in 28 24 17; do
    platforms+=(--platform "manylinux_2_${glibc}_x86_64")
done
python3 -m pip download --quiet --no-deps --only-binary=:all: --dest "$folder" \
    --python-version "${PYTHON_VERSION:-3.12}" --implementation cp \
    "${platforms[@]}" --platform manylinux2014_x86_64 \
    "ml_collections>=1.1" "grain>=0.2.18,<0.3" array_record portpicker simplejson packaging \
    "tensorboardX>=2.6"
ls "$folder"
