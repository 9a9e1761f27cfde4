"""Target `jobset`: a GKE JobSet over one or more TPU slices, as a manifest.

A slice is a Job with one pod per host. The pods cannot work without each other, so the Job fails when one
ends, and the JobSet decides by the exit code: 2 is never retried, 42 always, any other code a few times.
GKE describes the job in the environment of the pods, where JAX reads it.
"""

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Sequence
from typing import Any

from glimmer_jax.preflight.chips import CHIPS
from launch import record
from launch.plans import (
    FINAL_SAVE,
    SubmitPlan,
    check_at_least,
    check_env,
    check_name,
    check_words,
    glimmer,
)

# TPU generation (`chips.CHIPS`) -> GKE's name.
GENERATIONS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
# Modes whose mesh spans all devices of the job.
MESHED = ("train", "eval", "infer")
CONTAINER = "glimmer"


@dataclasses.dataclass(frozen=True)
class JobSet:
    """The resources to request from GKE."""

    name: str
    image: str  # with glimmer_jax[tpu] and the gin files that the flags name
    tpu: str  # a key of GENERATIONS
    topology: str  # chips along each dimension of a slice: 4x4x8
    slices: int = 1
    spot: bool = False
    namespace: str = "default"
    service_account: str | None = None  # of Kubernetes; None: the namespace's default
    max_restarts: int = 3  # after exit codes other than 0, 2 and 42
    env: tuple[str, ...] = ()  # NAME=VALUE, for the containers

    def __post_init__(self):
        check_name(self.name)
        check_words(
            image=self.image, namespace=self.namespace, service_account=self.service_account
        )
        check_at_least(1, slices=self.slices)
        check_at_least(0, max_restarts=self.max_restarts)
        check_env(self.env)
        if self.tpu not in GENERATIONS:
            raise ValueError(f"--tpu must be one of {', '.join(GENERATIONS)}, got {self.tpu!r}.")
        dimensions = CHIPS[self.tpu].sides
        if not re.fullmatch(r"[1-9]\d*" + r"x[1-9]\d*" * (dimensions - 1), self.topology):
            raise ValueError(
                f"--topology of {self.tpu} must be {dimensions} numbers such as "
                f"{'x'.join('4' * dimensions)}, got {self.topology!r}."
            )
        if self.chips % self.chips_per_host:
            raise ValueError(
                f"--topology={self.topology} has {self.chips} chips, which hosts of "
                f"{self.chips_per_host} cannot form. Choose a multiple."
            )

    @property
    def chips(self) -> int:
        """Chips of one slice."""
        return math.prod(int(side) for side in self.topology.split("x"))

    @property
    def chips_per_host(self) -> int:
        """Chips of one host of a slice."""
        # Hosts have 1, 4 or 8 chips in two-dimensional generations, and 4 in the others.
        largest = 8 if CHIPS[self.tpu].sides == 2 else 4
        return self.chips if self.chips <= largest else 4


def plan(jobset: JobSet, flags: Sequence[str], annotations: dict[str, str]) -> SubmitPlan:
    """Creates the JobSet of the manifest; fails if the name is taken.

    Args:
      jobset: the machines.
      flags: of glimmer.
      annotations: identify the code; written into the manifest.
    """
    kubectl = ("kubectl", f"--namespace={jobset.namespace}")
    selector = f"--selector=jobset.sigs.k8s.io/jobset-name={jobset.name}"
    first = f"{selector},jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    return SubmitPlan(
        # `apply` would silently change a running JobSet.
        submit=(*kubectl, "create", "--filename=-"),
        stdin=json.dumps(manifest(jobset, flags, annotations), indent=2) + "\n",
        follow=(
            (*kubectl, "get", "jobset", jobset.name),
            (*kubectl, "logs", "--follow", first),
            (*kubectl, "delete", "jobset", jobset.name),
        ),
    )


def manifest(jobset: JobSet, flags: Sequence[str], annotations: dict[str, str]) -> dict[str, Any]:
    """The JobSet; arguments as those of `plan`."""
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": jobset.name,
            "namespace": jobset.namespace,
            "annotations": {
                # Each slice has its own node pool.
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool",
                **annotations,
            },
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": jobset.max_restarts,
                "rules": [
                    _rule("badInput", "FailJobSet", "failed with exit code 2 "),
                    _rule(
                        "startAgain",
                        "RestartJobSetAndIgnoreMaxRestarts",
                        "failed with exit code 42 ",
                        "has condition DisruptionTarget",
                    ),
                ],
            },
            "replicatedJobs": [
                {
                    "name": "slice",
                    "replicas": jobset.slices,
                    "template": {"spec": job_spec(jobset, flags)},
                }
            ],
        },
    }


def job_spec(jobset: JobSet, flags: Sequence[str]) -> dict[str, Any]:
    """The Job of a slice."""
    hosts = jobset.chips // jobset.chips_per_host
    selector = {
        "cloud.google.com/gke-tpu-accelerator": GENERATIONS[jobset.tpu],
        "cloud.google.com/gke-tpu-topology": jobset.topology,
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": FINAL_SAVE,
        "nodeSelector": selector,
        "containers": [
            {
                "name": CONTAINER,
                "image": jobset.image,
                "command": [_literal(part) for part in glimmer("python", flags)],
                "resources": {"limits": {"google.com/tpu": jobset.chips_per_host}},
            }
        ],
    }
    if jobset.env:
        pairs = (variable.partition("=") for variable in jobset.env)
        pod["containers"][0]["env"] = [
            {"name": name, "value": _literal(value)} for name, _, value in pairs
        ]
    if jobset.service_account is not None:
        pod["serviceAccountName"] = jobset.service_account
    if jobset.spot:
        spot = "cloud.google.com/gke-spot"
        selector[spot] = "true"
        pod["tolerations"] = [
            {"key": spot, "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        ]
    codes = {"containerName": CONTAINER, "operator": "In", "values": [2, 42]}
    disrupted = [{"type": "DisruptionTarget", "status": "True"}]
    return {
        "completionMode": "Indexed",
        "completions": hosts,
        "parallelism": hosts,
        "backoffLimit": 0,
        # Both reach the JobSet's rules, with the exit code in the message.
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": codes},
                {"action": "FailJob", "onPodConditions": disrupted},
            ]
        },
        "template": {"spec": pod},
    }


def check_slices(jobset: JobSet, flags: argparse.Namespace) -> None:
    """Rejects a mesh with another number of slices than requested.

    Args:
      jobset: the machines.
      flags: glimmer's, parsed.

    Raises:
      ValueError: names the flag to add.
    """
    given, wanted = record.bound(flags, "MESH_SLICE"), str(jobset.slices)
    if flags.run_mode in MESHED and (given or "1").strip() != wanted:
        raise ValueError(
            f"--slices={wanted} needs a mesh of as many slices, got "
            f"MESH_SLICE={given or 'nothing'} on the command line. Add --gin.MESH_SLICE={wanted}."
        )


def _literal(text: str) -> str:
    """Kubernetes expands $(NAME) unless the dollar sign is doubled."""
    return text.replace("$(", "$$(")


def _rule(name: str, action: str, *patterns: str) -> dict[str, Any]:
    return {
        "name": name,
        "action": action,
        "onJobFailureReasons": ["PodFailurePolicy"],
        "onJobFailureMessagePatterns": list(patterns),
    }
