"""The life of machines against a stand-in for the TPU API, by Google's client and by gcloud."""

import dataclasses
import pathlib
import shutil
import sys

import pytest

pytest.importorskip("google.cloud.tpu_v2")

from google.cloud import tpu_v2, tpu_v2alpha1

from launch import lifecycle, tpu
from launch.processes import Interrupts
from tests.launch import tpu_api
from tests.launch.machines_test import FLAGS, go

HERE = pathlib.Path(__file__).parent
GCLOUD = shutil.which("gcloud")
NEEDS_GCLOUD = pytest.mark.skipif(GCLOUD is None, reason="gcloud is not installed")
# gcloud itself takes a second for each of a life's dozen commands.
CLIENT, REAL = "client", pytest.param("gcloud", marks=[NEEDS_GCLOUD, pytest.mark.slow])
SLICE = tpu.Tpu("run1", "z", "v5p-8", "v2-alpha-tpuv5", spot=True)
PARENT = "projects/p/locations/z"
# Preempts the machines of the first life.
LOST = (
    'cd "$GCLOUD_STUB"; [ -e lost ] && exit 0; touch lost; echo {} > state.new;'
    " mv state.new state; exit 255"
)
ONE_LIFE = {
    "tpu_vm": ["CreateNode", "GetNode", "DeleteNode"],
    "queued_resource": ["CreateQueuedResource", "GetQueuedResource", "DeleteQueuedResource"],
}
STATE = {"tpu_vm": "READY", "queued_resource": "ACTIVE"}

# What the launcher makes of every state of the API: ready, on the way, or gone.
NODE = {
    "READY": "ready",
    "CREATING": "waiting",
    "STARTING": "waiting",
    "RESTARTING": "waiting",
    "REIMAGING": "waiting",
    "REPAIRING": "waiting",
    "UNHIDING": "waiting",
    "DELETING": "gone",
    "STOPPING": "gone",
    "STOPPED": "gone",  # stopped by a user
    "PREEMPTED": "gone",
    "TERMINATED": "gone",
    "HIDING": "gone",
    "HIDDEN": "gone",
    "UNKNOWN": "gone",  # after a repair that failed
}
QUEUED = {
    "ACTIVE": "ready",
    "CREATING": "waiting",
    "ACCEPTED": "waiting",
    "WAITING_FOR_RESOURCES": "waiting",
    "PROVISIONING": "waiting",
    "FAILED": "gone",
    "DELETING": "gone",
    "SUSPENDING": "gone",
    "SUSPENDED": "gone",
}


@pytest.fixture
def api(gcloud, monkeypatch):
    (gcloud / "lives" / "0").touch()
    (gcloud / "worker").mkdir()
    monkeypatch.setenv("CLOUDSDK_CORE_PROJECT", "p")
    return tpu_api.Api(gcloud)


@pytest.fixture
def through(api, gcloud, monkeypatch, request):
    """Puts a gcloud on PATH that asks `api`; the parameter says which."""
    script = gcloud / "bin" / "gcloud"
    if request.param == "client":
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE}/tpu_client.py "$@"\n')
        with tpu_api.grpc_door(api) as address:
            monkeypatch.setenv("TPU_API", address)
            yield request.param
    else:
        workers = f'case "$4" in scp | ssh) exec sh {HERE}/gcloud_stub "$@" ;; esac'
        script.write_text(f'#!/bin/sh\n{workers}\nexec {GCLOUD} "$@"\n')
        monkeypatch.setenv("CLOUDSDK_CONFIG", str(gcloud / "config"))
        monkeypatch.setenv("CLOUDSDK_AUTH_DISABLE_CREDENTIALS", "true")
        monkeypatch.setenv("CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK", "true")
        with tpu_api.rest_door(api) as url:
            monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU", url)
            yield request.param


def creations(api):
    return [one for one in api.requests if type(one).__name__.startswith("Create")]


def empty(api):
    return not api.nodes and not api.queued


def lives(api):
    """What was asked, without repeated questions for the state."""
    asked = api.asked
    return [one for one, before in zip(asked, [None, *asked], strict=False) if one != before]


both_doors = pytest.mark.parametrize("through", [CLIENT, REAL], indirect=True)
by_client = pytest.mark.parametrize("through", [CLIENT], indirect=True)


@pytest.mark.parametrize(
    ("make", "wanted", "enums"),
    [
        (tpu.tpu_vm, NODE, [tpu_v2.Node.State, tpu_v2alpha1.Node.State]),
        (
            tpu.queued_resource,
            QUEUED,
            [tpu_v2.QueuedResourceState.State, tpu_v2alpha1.QueuedResourceState.State],
        ),
    ],
)
def test_every_state_of_the_api_is_ready_waiting_or_gone(make, wanted, enums):
    plan = make(SLICE, FLAGS, "code.tar.gz")
    assert plan.ready == next(name for name, means in wanted.items() if means == "ready")
    assert set(plan.waiting) == {name for name, means in wanted.items() if means == "waiting"}
    for enum in enums:
        # An unset state is printed as an empty line, and queried again.
        assert {state.name for state in enum} == {*wanted, "STATE_UNSPECIFIED"}


@both_doors
def test_a_node_is_created_used_and_deleted(api, through, gcloud):
    assert go("tpu_vm", "--spot") == 0
    assert lives(api) == ["GetNode", *ONE_LIFE["tpu_vm"]]
    [made] = creations(api)
    assert (made.parent, made.node_id) == (PARENT, "run1")
    assert (made.node.accelerator_type, made.node.runtime_version) == ("v5p-8", "v2-alpha-tpuv5")
    assert made.node.scheduling_config.spot
    assert (gcloud / "seen").read_text().splitlines()[-len(FLAGS) :] == FLAGS
    assert empty(api)


@both_doors
def test_a_queued_resource_is_waited_for_used_and_deleted(api, through, gcloud):
    api.lives = [["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]]
    assert go("queued_resource", "--spot") == 0
    assert lives(api) == ["GetQueuedResource", *ONE_LIFE["queued_resource"]]
    assert api.asked.count("GetQueuedResource") == 5
    [made] = creations(api)
    assert (made.parent, made.queued_resource_id) == (PARENT, "run1")
    [spec] = made.queued_resource.tpu.node_spec
    assert (spec.parent, spec.node_id) == (PARENT, "run1")
    assert (spec.node.accelerator_type, spec.node.runtime_version) == ("v5p-8", "v2-alpha-tpuv5")
    assert "spot" in made.queued_resource and api.requests[-1].force
    assert (gcloud / "seen").read_text().splitlines()[-len(FLAGS) :] == FLAGS
    assert empty(api)


@by_client
@pytest.mark.parametrize(
    ("target", "state"),
    [
        ("tpu_vm", "PREEMPTED"),
        ("queued_resource", "SUSPENDED"),
        # The queue hears of it later.
        ("queued_resource", "ACTIVE ACTIVE ACTIVE SUSPENDING"),
    ],
)
def test_preempted_machines_are_recreated(api, through, monkeypatch, target, state):
    monkeypatch.setenv("JOB", LOST.format(state))
    assert go(target) == 0
    create, look, delete = ONE_LIFE[target]
    assert lives(api) == [look, create, look, delete, create, look, delete]
    assert empty(api)


@by_client
def test_a_request_suspended_in_the_queue_is_repeated(api, through):
    api.lives = [["ACCEPTED", "SUSPENDED"], ["WAITING_FOR_RESOURCES", "SUSPENDING"], ["ACTIVE"]]
    assert go("queued_resource") == 0
    assert lives(api) == ["GetQueuedResource", *ONE_LIFE["queued_resource"] * 3]
    assert empty(api)


@both_doors
def test_a_request_failed_in_the_queue_is_explained_not_repeated(api, through, capfd):
    api.lives = [["ACCEPTED", "FAILED"]]
    assert go("queued_resource") == 2
    assert lives(api) == ["GetQueuedResource", *ONE_LIFE["queued_resource"]]
    assert empty(api)
    said = capfd.readouterr().out
    assert said.count(tpu_api.QUOTA) == 1
    assert "launch: run1 is FAILED before it was ever ready: check quota, --zone" in said


@by_client
@pytest.mark.parametrize("forced", [True, False])
def test_only_force_deletes_a_queued_resource_that_has_nodes(api, through, capfd, forced):
    plan = tpu.queued_resource(SLICE, FLAGS, "code.tar.gz")
    plan = dataclasses.replace(plan, ship=(), run=("true",))
    if not forced:
        delete = tuple(part for part in plan.delete if part != "--force")
        plan = dataclasses.replace(plan, delete=delete)
    with Interrupts() as interrupts:
        assert lifecycle.run_plan(plan, interrupts, poll=0.01) == (0 if forced else 1)
    assert empty(api) == forced
    assert ("FAILED_PRECONDITION" in capfd.readouterr().err) != forced


@both_doors
def test_where_the_name_is_not_known_to_be_free_nothing_is_made(api, through, capfd):
    api.nodes[f"{PARENT}/nodes/run1"] = tpu_v2.Node(state=tpu_v2.Node.State.READY)
    assert go("tpu_vm") == 2
    assert "run1 exists, in state READY" in capfd.readouterr().err
    api.refusal = tpu_api.Refused("PERMISSION_DENIED", "Permission denied on 'locations/z'")
    assert go("tpu_vm") == 2
    said = capfd.readouterr().err
    assert "cannot determine whether run1 exists: ERROR: (gcloud.compute.tpus.tpu-vm" in said
    assert "PERMISSION_DENIED: Permission denied on 'locations/z'" in said
    assert api.asked == ["GetNode"] * 2 and len(api.nodes) == 1


@both_doors
@pytest.mark.parametrize("target", ONE_LIFE)
def test_machines_created_by_another_launcher_meanwhile_are_kept(
    api, through, monkeypatch, capfd, target
):
    method, look, _ = ONE_LIFE[target]
    create = getattr(api, method)

    def second(request):
        create(request)  # the other's
        return create(request)

    monkeypatch.setattr(api, method, second)
    assert go(target) == 2
    said = capfd.readouterr().err
    assert f"create) ALREADY_EXISTS: Resource '{PARENT}/" in said
    assert f"run1 exists, in state {STATE[target]}. Choose another --name" in said
    assert lives(api) == [look, method, look]
    assert not empty(api)


@both_doors
@pytest.mark.parametrize("target", ONE_LIFE)
def test_machines_that_are_gone_already_are_deleted(api, through, monkeypatch, capfd, target):
    method = ONE_LIFE[target][-1]
    delete = getattr(api, method)

    def late(request):
        api.nodes.clear()
        api.queued.clear()
        return delete(request)

    monkeypatch.setattr(api, method, late)
    assert go(target) == 0
    assert api.asked.count(method) == 1
    said = capfd.readouterr()
    assert "delete) NOT_FOUND: Resource" in said.err
    assert "could not delete" not in said.out
