"""A gcloud for tests that asks through Google's own client of the TPU API: argv -> its requests.

It takes the flags that launch/tpu.py gives, and no others; $TPU_API is the address of the server.
What goes to the workers (scp and ssh) is left to gcloud_stub.
"""

import argparse
import os
import pathlib
import sys

import grpc
from google.api_core import exceptions
from google.api_core.future import polling
from google.cloud import tpu_v2
from google.cloud.tpu_v2.services.tpu.transports import TpuGrpcTransport

FLAGS = {
    ("tpu-vm", "create"): ("--accelerator-type", "--version"),
    ("queued-resources", "create"): ("--accelerator-type", "--node-id", "--runtime-version"),
}


def parse(group, verb, rest):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("name")
    parser.add_argument("--zone", required=True)
    parser.add_argument("--project", default=os.environ["CLOUDSDK_CORE_PROJECT"])
    parser.add_argument("--quiet", action="store_true")
    for flag in FLAGS.get((group, verb), ()):
        parser.add_argument(flag, required=True)
    if verb == "create":
        parser.add_argument("--spot", action="store_true")
    if verb == "describe":
        parser.add_argument("--format")
    if (group, verb) == ("queued-resources", "delete"):
        parser.add_argument("--force", action="store_true")
    return parser.parse_args(rest)


def node(args, version):
    scheduling = tpu_v2.SchedulingConfig(spot=True) if args.spot else None
    return tpu_v2.Node(
        accelerator_type=args.accelerator_type,
        runtime_version=version,
        scheduling_config=scheduling,
    )


def ask(client, group, verb, args):
    """The client's answer to one command."""
    parent = f"projects/{args.project}/locations/{args.zone}"
    kind = {"tpu-vm": "nodes", "queued-resources": "queuedResources"}[group]
    name = f"{parent}/{kind}/{args.name}"
    match group, verb:
        case "tpu-vm", "describe":
            return client.get_node(name=name)
        case "tpu-vm", "create":
            made = node(args, args.version)
            return client.create_node(parent=parent, node=made, node_id=args.name)
        case "tpu-vm", "delete":
            return client.delete_node(name=name)
        case "queued-resources", "describe":
            return client.get_queued_resource(name=name)
        case "queued-resources", "create":
            # The queue's tier is the one that counts; the node has none of its own.
            spot, args.spot = args.spot, False
            spec = tpu_v2.QueuedResource.Tpu.NodeSpec(
                parent=parent, node_id=args.node_id, node=node(args, args.runtime_version)
            )
            queued = tpu_v2.QueuedResource(tpu=tpu_v2.QueuedResource.Tpu(node_spec=[spec]))
            if spot:
                queued.spot = tpu_v2.QueuedResource.Spot()
            return client.create_queued_resource(
                parent=parent, queued_resource=queued, queued_resource_id=args.name
            )
        case "queued-resources", "delete":
            request = tpu_v2.DeleteQueuedResourceRequest(name=name, force=args.force)
            return client.delete_queued_resource(request=request)
    raise NotImplementedError(f"{group} {verb}")


def value(message, text):
    """`value(state.state)`: a field of a message, as its JSON has it; nothing if it is not set."""
    found = type(message).to_dict(
        message, use_integers_for_enums=False, always_print_fields_with_no_presence=False
    )
    for field in text.removeprefix("value(").removesuffix(")").split("."):
        found = found.get(field, {})
    return found or ""


def main(argv):
    _, _, group, verb, *rest = argv
    if verb in ("scp", "ssh"):
        stub = str(pathlib.Path(__file__).with_name("gcloud_stub"))
        os.execvp("sh", ["sh", stub, *argv])
    args = parse(group, verb, rest)
    channel = grpc.insecure_channel(os.environ["TPU_API"])
    client = tpu_v2.TpuClient(transport=TpuGrpcTransport(channel=channel))
    try:
        answer = ask(client, group, verb, args)
        if verb == "describe":
            print(value(answer, args.format) if args.format else answer)
        else:
            answer.result(polling=polling.DEFAULT_POLLING.with_delay(initial=0.02))
    except exceptions.GoogleAPICallError as error:
        said = f"{error.grpc_status_code.name}: {error.message}"
        sys.exit(f"ERROR: (gcloud.compute.tpus.{group}.{verb}) {said}")


if __name__ == "__main__":
    main(sys.argv[1:])
