#!/usr/bin/env bash
# Parity, sanitizers, times and profile of the kernels on one NVIDIA GPU, in under 10 minutes:
#   bench/gpu_session.sh              results in $OUT, or in bench/results
#   bench/gpu_session.sh --dry-run    the same in miniature on a CPU, in a few minutes
#   bench/gpu_session.sh --plan       a session in two calls, 330 s and 400 s: --call 1, --call 2
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
if [[ -z ${PYTHON:-} && -x .venv/bin/python ]]; then python=.venv/bin/python; fi
exec "$python" -m tests.gpu.session "$@"
