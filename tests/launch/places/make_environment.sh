#!/usr/bin/env bash
# Make a virtual environment with the schemas of Kubernetes, Kubeflow and SkyPilot: make_environment.sh FOLDER
# Never textgen's own environment: SkyPilot and textgen disagree on versions.
set -euo pipefail
folder=${1:?usage: make_environment.sh FOLDER}
here=$(cd "$(dirname "$0")" && pwd)
test -x "$folder/bin/python" || "${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
