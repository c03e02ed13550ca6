#!/usr/bin/env python3
"""Checks what is shipped for containers and Kubernetes with the real tools: Helm renders and lints the chart, the API's
schemas are compared with what came out, hadolint reads the Dockerfile.

Run by scripts/check-deploy.sh, which installs the tools. With --write, deploy/kubernetes is made anew from the chart.
"""

import json
import pathlib
import subprocess
import sys

import helm_python
import jsonschema
import kubernetes_validate
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
CHART = ROOT / "deploy/helm/backfilld"
JOB = ROOT / "deploy/jobs/messages_auth_user_id"
PLAIN = ROOT / "deploy/kubernetes"
# The oldest that Chart.yaml allows, and newer ones; the schemas are those of the API's own repository.
VERSIONS = ["1.31", "1.34", "1.37"]
# Kinds of the Prometheus Operator: the API's schemas do not know them.
FOREIGN = {"ServiceMonitor", "PrometheusRule"}

BASE = {
    "job": {"files": {f: (JOB / f).read_text() for f in ["job.toml", "add_message.sql"]}},
    "database": {
        "url": "postgresql://backfilld@db.example.com/app?sslmode=verify-full",
        "passwordSecret": {"name": "backfilld", "key": "password"},
    },
}
EVERYTHING = {
    "database": {**BASE["database"], "caConfigMap": {"name": "database-ca", "key": "ca.crt"}, "dedicatedLogin": True},
    "settings": {"LEASE__TTL": "30s", "DATABASE__POOL_SIZE": 6},
    "image": {"repository": "registry.example.com/backfilld", "digest": "sha256:" + "0" * 64},
    "imagePullSecrets": [{"name": "registry"}],
    "networkPolicy": {
        "databaseCidrs": ["10.0.0.0/8", "fd00::/8"],
        "scrapeFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
    },
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "prometheusRule": {"enabled": True},
    "dashboard": {"enabled": True},
    "podAnnotations": {"example.com/note": "1"},
    "podLabels": {"team": "data"},
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [{"key": "dedicated", "operator": "Exists"}],
}
CASES = {
    "deployment": BASE,
    "job": {**BASE, "mode": "job"},
    "everything": {**BASE, **EVERYTHING},
    "existing": {**BASE, "job": {"existingConfigMap": "mine"}, "replicas": 1, "networkPolicy": {"enabled": False}},
}
# What the schema has to refuse, each with a word of its message.
WRONG = [
    ({}, "job"),
    ({**BASE, "mode": "daemonset"}, "mode"),
    ({**BASE, "replicas": 0}, "replicas"),
    ({**BASE, "replica": 2}, "replica"),
    ({**BASE, "database": {**BASE["database"], "url": "postgresql://u:secret@h/d"}}, "url"),
    ({**BASE, "database": {**BASE["database"], "passwordSecret": {"name": "", "key": "password"}}}, "passwordSecret"),
    ({**BASE, "job": {"files": {"add_message.sql": "select 1"}}}, "job"),
    ({**BASE, "settings": {"DATABASE__PASSWORD": "x"}}, "PASSWORD"),
]


def fail(message):
    sys.exit(f"check-deploy: {message}")


def render(values):
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(chart.merge_values(values))
        files = chart.render(values, name="backfilld", namespace="default")
    out = []
    for name in sorted(files):
        if name.endswith(".yaml"):
            out += [d for d in yaml.safe_load_all(files[name]) if d]
    return files, out


def pod(documents):
    return next(d for d in documents if d["kind"] in ("Deployment", "Job"))["spec"]["template"]["spec"]


def check_restricted(case, spec):
    """The API's `restricted` Pod Security Standard, of which a cluster would tell only when the pod is created."""
    context, container = spec["securityContext"], spec["containers"][0]
    inner = container["securityContext"]
    right = (
        context["runAsNonRoot"] is True
        and context["seccompProfile"]["type"] == "RuntimeDefault"
        and inner["allowPrivilegeEscalation"] is False
        and inner["readOnlyRootFilesystem"] is True
        and inner["capabilities"] == {"drop": ["ALL"]}
        and spec["automountServiceAccountToken"] is False
        and not any(spec.get(k) for k in ("hostNetwork", "hostPID", "hostIPC"))
    )
    if not right:
        fail(f"{case}: the pod is not restricted")
    names = [e["name"] for e in container["env"]]
    if any("PASSWORD" in n and not n.endswith("PASSWORD_FILE") for n in names) or len(names) != len(set(names)):
        fail(f"{case}: environment {names}")
    mounted = {m["name"] for m in container["volumeMounts"]}
    if mounted != {v["name"] for v in spec["volumes"]}:
        fail(f"{case}: mounts and volumes differ")


def check_chart():
    for case, values in CASES.items():
        report = helm_python.lint(CHART, values, strict=True)
        bad = [m for m in report["messages"] if m["severity"] >= 2]
        if bad or report["errors"]:
            fail(f"helm lint, {case}: {bad} {report['errors']}")
        _, documents = render(values)
        kinds = sorted(d["kind"] for d in documents)
        for document in documents:
            if document["kind"] in FOREIGN:
                continue
            for version in VERSIONS:
                try:
                    kubernetes_validate.validate(document, version, strict=True)
                except jsonschema.ValidationError as e:
                    fail(f"{case}: {document['kind']} on {version}: {e.message} at {list(e.absolute_path)}")
        check_restricted(case, pod(documents))
        print(f"chart, {case}: {', '.join(kinds)}")
    _, documents = render(CASES["everything"])
    rules = next(d for d in documents if d["kind"] == "PrometheusRule")
    if rules["spec"] != yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text()):
        fail("the chart's rules are not deploy/prometheus/rules.yml")
    board = next(d for d in documents if d["metadata"]["name"].endswith("-dashboard"))["data"]["backfilld.json"]
    if json.loads(board) != json.loads((ROOT / "grafana/dashboards/backfilld.json").read_text()):
        fail("the chart's dashboard is not grafana/dashboards/backfilld.json")
    _, documents = render(BASE)
    files = next(d for d in documents if d["kind"] == "ConfigMap")["data"]
    for name, text in BASE["job"]["files"].items():
        if files[name].strip() != text.strip():
            fail(f"the chart changes {name}")
    for values, word in WRONG:
        try:
            render(values)
        except helm_python.HelmValuesError as e:
            if word not in str(e):
                fail(f"{word!r} is not in the message: {e}")
        else:
            fail(f"these values are not refused: {values}")


def plain(write):
    head = "# Made from deploy/helm/backfilld by scripts/check-deploy.sh --write. Needs a Secret:\n"
    head += "#   kubectl create secret generic backfilld --from-file=password=./password\n"
    head += "# and a ConfigMap with the job's files:\n"
    head += "#   kubectl create configmap backfilld-job --from-file=deploy/jobs/messages_auth_user_id\n"
    for name in ("deployment", "job"):
        files, _ = render({**CASES[name], "job": {"existingConfigMap": "backfilld-job"}})
        texts = [files[f].strip() for f in sorted(files) if f.endswith(".yaml") and files[f].strip()]
        text = head + "---\n" + "\n---\n".join(texts) + "\n"
        path = PLAIN / f"{name}.yaml"
        if write:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            fail(f"{path.relative_to(ROOT)} is stale; run scripts/check-deploy.sh --write")


def check_dockerfile():
    tool = pathlib.Path(sys.executable).parent / "hadolint"
    ran = subprocess.run([tool, ROOT / "deploy/container/Dockerfile"], capture_output=True, text=True, check=False)
    if ran.returncode:
        fail(f"hadolint: {ran.stdout}{ran.stderr}")
    print("hadolint: nothing to say")


def check_compose():
    text = yaml.safe_load((ROOT / "deploy/container/compose.yaml").read_text())
    for name, service in text["services"].items():
        for need in service.get("depends_on", {}):
            if need not in text["services"]:
                fail(f"compose.yaml: {name} depends on {need}, which is not there")
        for secret in service.get("secrets", []):
            if secret not in text["secrets"]:
                fail(f"compose.yaml: {name}: secret {secret} is not there")
    print(f"compose.yaml: {', '.join(text['services'])}")


if __name__ == "__main__":
    write = "--write" in sys.argv
    plain(write)
    check_chart()
    check_dockerfile()
    check_compose()
