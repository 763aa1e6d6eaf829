# Sourced by the scripts that promise to set everything up: makes .venv in the repository's root,
# installs the requirement files named in "$@" unless that was done before, and activates it.
# PYTHON names another interpreter.

find_python() {
  local candidate candidates=(python3.11 python3.12 python3.13 python3)
  [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "Python 3.11, 3.12 or 3.13 is needed and was not found; name one with PYTHON=/path/to/python3" >&2
  return 1
}

set_up_venv() {
  local stamp wanted python
  # shellcheck disable=SC2155
  wanted="$(cat "$@" | cksum)"
  stamp=".venv/.installed-$(printf '%s' "$*" | tr -c 'a-zA-Z0-9' '-')"
  # what makes one was stopped where a part is missing: to make it again mends it
  if [ ! -f .venv/bin/activate ] || ! .venv/bin/python -m pip --version > /dev/null 2>&1; then
    python="$(find_python)" || return 1
    echo "Making a virtual environment in .venv with $("$python" --version)"
    "$python" -m venv .venv || {
      echo "The virtual environment could not be made (on Debian: apt-get install python3-venv)" >&2
      return 1
    }
  fi
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing $* (once; this takes a few minutes)"
    local file requirements=()
    for file in "$@"; do requirements+=(-r "$file"); done
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "${requirements[@]}" 2> >(grep -v '^WARNING: Location' >&2) || return 1
    printf '%s' "$wanted" > "$stamp"
  fi
  # shellcheck disable=SC1091
  . .venv/bin/activate
}
