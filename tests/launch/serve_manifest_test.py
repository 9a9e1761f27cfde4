"""The manifest and image of the server: what Kubernetes takes, and what the server listens to."""

import pathlib

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2] / "launch" / "serve"
DOCUMENTS = list(yaml.safe_load_all((ROOT / "kubernetes.yaml").read_text()))
CONTAINER = DOCUMENTS[0]["spec"]["template"]["spec"]["containers"][0]


def test_kubernetes_takes_every_document():
    validate = pytest.importorskip("kubernetes_validate").validate
    for document in DOCUMENTS:
        validate(document, "1.33", strict=True)


def test_probes_use_paths_that_the_server_has():
    assert CONTAINER["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert CONTAINER["startupProbe"]["httpGet"]["path"] == "/readyz"
    assert CONTAINER["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert f"--gin.PORT={CONTAINER['ports'][0]['containerPort']}" in CONTAINER["args"]


def test_a_stop_has_time_to_drain():
    gin = (ROOT.parents[1] / "gin" / "runs" / "serve.gin").read_text()
    drain = float(gin.split("DRAIN_SECONDS = ")[1].split()[0])
    assert DOCUMENTS[0]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > drain


def test_the_image_serves_on_the_port_that_it_exposes():
    text = (ROOT / "Dockerfile").read_text()
    assert "EXPOSE 8000" in text and "--gin.PORT=8000" in text and "--run_mode=serve" in text
    assert "HEALTHCHECK" in text and "/readyz" in text and "USER glimmer" in text
