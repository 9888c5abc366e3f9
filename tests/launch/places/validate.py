"""Validates files of launch/ against the schemas of what reads them, in the environment of make_environment.sh.

python tests/launch/places/validate.py    # in the checkout; prints a line for each file
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import yaml
from kubeflow_trainer_api import models

LAUNCH = Path(__file__).parents[3] / "launch"
KUBERNETES = "1.31"


def main() -> None:
    """Validate all files; an exception names what is wrong."""
    hadolint = Path(sys.executable).with_name("hadolint")
    dockerfile = LAUNCH / "container" / "Dockerfile"
    subprocess.run([hadolint, "--failure-threshold", "style", dockerfile], check=True)
    print("Dockerfile: hadolint")
    for document in yaml.safe_load_all((LAUNCH / "kubernetes" / "job.yaml").read_text()):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        print(f"job.yaml: {document['kind']} of Kubernetes {KUBERNETES}")
    content = yaml.safe_load((LAUNCH / "kubernetes" / "trainjob.yaml").read_text())
    job = models.TrainerV1alpha1TrainJob.from_dict(content)
    assert job is not None
    if unknown := difference(content, job.to_dict()):
        raise SystemExit(f"trainjob.yaml: unknown fields {unknown}")
    print("trainjob.yaml: TrainJob of Kubeflow's API")
    import sky

    task = sky.Task.from_yaml(str(LAUNCH / "sky.yaml"))  # validates by SkyPilot's schema
    print(f"sky.yaml: task of SkyPilot {sky.__version__}, {task.num_nodes} machine")


def difference(given: object, read: object, path: str = "") -> list[str]:
    """Return the places of what was given and not read: a model ignores fields that it does not know."""
    if isinstance(given, dict) and isinstance(read, dict):
        lost = [f"{path}.{name}" for name in given if name not in read]
        both = [name for name in given if name in read]
        return lost + [place for name in both for place in difference(given[name], read[name], f"{path}.{name}")]
    if isinstance(given, list) and isinstance(read, list):
        pairs = enumerate(zip(given, read, strict=True))
        return [place for index, (one, other) in pairs for place in difference(one, other, f"{path}[{index}]")]
    return []


if __name__ == "__main__":
    main()
