#!/usr/bin/env bash
# All tests, from nothing: a virtual environment with everything, then pytest.
#
#   ./tests/run.sh             all of them
#   ./tests/run.sh -k mask     what pytest takes
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=quickstart/venv.sh
. quickstart/venv.sh
set_up_venv requirements.txt requirements-dev.txt
python -m pytest "$@"
