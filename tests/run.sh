#!/usr/bin/env bash
# All tests, from nothing: a virtual environment with everything, then pytest.
#
#   ./tests/run.sh             all of them
#   ./tests/run.sh -k mask     what pytest takes; TEST_PROCESSES=0 for one process
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=quickstart/venv.sh
. quickstart/venv.sh
set_up_venv requirements.txt requirements-dev.txt
# Two processes of one thread each: threads of several processes in contention are slower than one.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python -m pytest -n "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder "$@"
