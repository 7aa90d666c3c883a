"""The cluster guide: its settings load, its links lead somewhere, its launch files are what Ray and KubeRay read."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from secateur.search.executors.cluster.settings import RaySettings
from secateur.search.settings.settings import settings_from

DOCS = Path(__file__).parents[1] / "docs"
GUIDE = (DOCS / "how-to" / "cluster.md").read_text()
FILES = DOCS / "cluster"
SNIPPETS = re.findall(r"^```yaml\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)


def kuberay() -> dict[str, dict]:
    """The documents of the file by kind."""
    return {
        document["kind"]: document for document in yaml.safe_load_all((FILES / "kuberay.yaml").read_text())
    }


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_settings_of_the_guide_are_settings(snippet):
    settings = settings_from(yaml.safe_load(snippet))
    assert isinstance(settings.executor, RaySettings)


def test_links_of_the_guide_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", GUIDE) if "://" not in link]
    assert len(links) >= 5
    written = {"../reference/keys.md"}  # when the site is built
    assert [link for link in links if not (DOCS / "how-to" / link).exists() and link not in written] == []


def test_the_guide_leaves_no_setting_out():
    named = set(RaySettings.model_fields) - {"kind", "address"}
    assert [name for name in named if not re.search(rf"\b{name}\b", GUIDE)] == []
    assert "`address: null`" in GUIDE


def test_ray_up_takes_its_file():
    pytest.importorskip("ray")
    pytest.importorskip("jsonschema")
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(yaml.safe_load((FILES / "ray-cluster.yaml").read_text()))
    validate_config(prepared)
    assert prepared["provider"]["type"] == "local"
    assert prepared["max_workers"] == len(prepared["provider"]["worker_ips"])
    for commands in (prepared["head_start_ray_commands"], prepared["worker_start_ray_commands"]):
        assert "ray start" in commands[-1]
        assert "RAY_AUTH_MODE=token" in commands[-1]
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in prepared["head_start_ray_commands"][-1]


def test_kuberay_documents_have_the_shape_of_their_kinds():
    documents = kuberay()
    assert {kind: document["apiVersion"] for kind, document in documents.items()} == {
        "ConfigMap": "v1",
        "PersistentVolumeClaim": "v1",
        "RayJob": "ray.io/v1",
    }
    cluster = documents["RayJob"]["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert container["resources"]["limits"] == container["resources"]["requests"]
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert len({group["template"]["spec"]["containers"][0]["image"] for group in groups}) == 1
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_a_kubernetes_job_searches_what_its_settings_say_where_it_is_kept():
    documents = kuberay()
    job, settings = documents["RayJob"]["spec"], documents["ConfigMap"]
    loaded = settings_from(yaml.safe_load(settings["data"]["search.yaml"]))
    head = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    mounts = {mount["name"]: mount["mountPath"] for mount in head["containers"][0]["volumeMounts"]}
    assert (
        job["entrypoint"] == f"secateur search {mounts['settings']}/search.yaml --run {mounts['runs']}/mine"
    )
    by_name = {volume["name"]: volume for volume in head["volumes"]}
    claim = documents["PersistentVolumeClaim"]["metadata"]["name"]
    assert by_name["runs"]["persistentVolumeClaim"]["claimName"] == claim
    assert by_name["settings"]["configMap"]["name"] == settings["metadata"]["name"]
    [workers] = job["rayClusterSpec"]["workerGroupSpecs"]
    cpus = int(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert loaded.executor.workers * loaded.executor.cpus_per_worker <= workers["replicas"] * cpus


def test_the_versions_of_ray_agree():
    pinned = re.search(
        r"^ray(?:\[\w+\])?==(\S+)", (DOCS.parent / "constraints.txt").read_text(), re.MULTILINE
    )
    assert pinned is not None
    assert kuberay()["RayJob"]["spec"]["rayClusterSpec"]["rayVersion"] == pinned[1]
    assert f"rayproject/ray:{pinned[1]}-py311" in (FILES / "kuberay.yaml").read_text()


STUBS = {
    "scontrol": 'printf "node1\\nnode2\\n"',
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "hostname": "echo 10.0.0.1 10.0.0.2",
    "ray": 'echo "$RAY_AUTH_MODE ${#RAY_AUTH_TOKEN} $*"',
}


@pytest.fixture
def slurm(tmp_path):
    """Runs the batch script where Slurm and Ray only say what they were asked."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in STUBS.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    (commands / "activate").touch()

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        path = f"{commands}:{Path(shutil.which('python') or '').parent}:/usr/bin:/bin"
        of_slurm = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}
        environment = {"PATH": path, "SECATEUR_ENV": str(tmp_path), "SLURM_CPUS_PER_TASK": "8", **of_slurm}
        script = ["bash", str(FILES / "slurm.sh"), *arguments]
        return subprocess.run(script, env=environment, capture_output=True, text=True, check=False)

    return run


def test_slurm_starts_one_ray_and_one_search(slurm):
    done = slurm("a b.yaml", "runs/mine")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "token 64 symmetric-run --address 10.0.0.1:23456 --min-nodes 2 --num-cpus 8 --temp-dir /tmp/ray-123456 -- "
        "secateur search a b.yaml --run runs/mine -o executor.kind=ray -o executor.address=10.0.0.1:23456"
    ]


def test_slurm_without_a_run_says_how_it_is_used(slurm):
    done = slurm("settings.yaml")
    assert done.returncode != 0
    assert "Usage: sbatch slurm.sh SETTINGS.yaml RUN" in done.stderr


def test_slurm_queues_a_stopped_search_again_and_asks_for_no_gpus(slurm, tmp_path):
    script = (FILES / "slurm.sh").read_text()
    directives = re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE)
    assert {"--requeue", "--signal=B:USR1@300"} <= set(directives)
    assert not [line for line in directives if "gpu" in line]
    (tmp_path / "run").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(
        '#!/bin/bash\necho "$*" >>"$SECATEUR_ENV/asked"\nprintf "node1\\nnode2\\n"\n'
    )
    for state, asked in (("finished", []), ("stopped", ["requeue 123456"])):
        (tmp_path / "run" / "state.json").write_text(f'{{"state": "{state}", "reason": ""}}')
        (tmp_path / "asked").unlink(missing_ok=True)
        assert slurm("settings.yaml", str(tmp_path / "run")).returncode == 0
        assert (tmp_path / "asked").read_text().splitlines() == ["show hostnames node[1-2]", *asked]
