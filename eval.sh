#!/usr/bin/env bash
# Has the model forgotten anything? Runs lm-evaluation-harness on the base model and on the tuned
# one, and prints both side by side: see llama_squad/forgetting.py, or ./eval.sh --help.
#
# PYTHON=... names the Python that has lm_eval (default: python).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}

fail() {
    echo "eval.sh: error: $1" >&2
    exit 2
}

command -v "$python" >/dev/null || fail "no $python here: set PYTHON to the one that has lm_eval"
case " $* " in *" --help "* | *" -h "*) ;; *)
    "$python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("lm_eval"))' ||
        fail "lm_eval is not installed for $python: $python -m pip install -r $root/requirements-eval.txt"
esac
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m llama_squad.forgetting "$@"
