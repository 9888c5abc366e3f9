#!/usr/bin/env bash
# Make a virtual environment with clients of the server: make_environment.sh FOLDER [PACKAGE...]
# By default all of requirements.txt. Never textgen's own environment: clients and textgen disagree on versions.
set -euo pipefail
folder=${1:?usage: make_environment.sh FOLDER [PACKAGE...]}
shift
here=$(cd "$(dirname "$0")" && pwd)
[ $# -gt 0 ] || set -- -r "$here/requirements.txt"
test -x "$folder/bin/python" || "${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check -c "$here/constraints.txt" "$@"
