"""Wheel and source archive as a package index gets them, and the wheel in a folder of its own."""

import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IGNORED = ("runs", "build", "dist", "experiments")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel and source archive, from a copy of the files that git knows."""
    place = tmp_path_factory.mktemp("dist")
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False
    ).stdout.decode()
    if not names:
        pytest.skip(
            "Expected a git checkout, got none: the files of a distribution are those that git knows."
        )
    for name in names.split("\0"):
        if name and not name.startswith((*IGNORED, "tests/")) and (ROOT / name).is_file():
            (place / "from" / name).parent.mkdir(parents=True, exist_ok=True)
            (place / "from" / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", place, place / "from"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=place)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,), (archive,) = place.glob("*.whl"), place.glob("*.tar.gz")
    return wheel, archive


@pytest.fixture(scope="module")
def metadata(built):
    with zipfile.ZipFile(built[0]) as wheel:
        (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
        return message_from_string(wheel.read(name).decode("utf-8"))


def test_the_metadata_has_addresses_and_authors(metadata):
    addresses = dict(line.split(", ", 1) for line in metadata.get_all("Project-URL"))
    assert set(addresses) == {"Repository", "Documentation", "Changelog", "Issues"}
    assert all(address.startswith(addresses["Repository"]) for address in addresses.values())
    assert metadata["Author"] == "The Secateur maintainers"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"


def test_links_and_pictures_work_on_a_package_index(metadata):
    text = metadata.get_payload()
    assert metadata["Description-Content-Type"].startswith("text/markdown")
    assert text.startswith("# Secateur")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 5
    assert [link for link in links if not re.match(r"https?://|#", link)] == []
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert pictures
    for link in links:  # of ours each leads to a file that there is
        inside = re.search(r"/(?:blob|raw)/main/([^#]+)", link)
        assert inside is None or (ROOT / inside[1]).exists(), link
    assert all("/raw/main/" in picture for picture in pictures)


def test_the_wheel_holds_examples_and_templates_and_no_tests(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = wheel.namelist()
    for name in ("examples/quickstart.yaml", "examples/plugin/pyproject.toml", "search/py.typed"):
        assert f"secateur/{name}" in names
    assert {Path(n).suffix for n in names if n.startswith("secateur/search/show/templates/")} >= {
        ".html",
        ".css",
        ".js",
    }
    assert not [n for n in names if n.startswith("tests") or "/tests/" in n]


def test_the_source_archive_is_enough_to_build_from(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "setup.py", "README.md", "CHANGELOG.md", "LICENSE", "docs/index.md"} <= names
    assert {"examples/quickstart.yaml", "constraints.txt", "scripts/env"} <= names


def test_the_wheel_runs_from_a_folder_of_its_own(built, tmp_path):
    """Third parties come from here; ours from the wheel alone, in another directory than the repository."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        tmp_path / "at",
        built[0],
    ]
    subprocess.run(pip, check=True, capture_output=True)
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(tmp_path / 'at')!r})\n"
        "name = lambda finder: getattr(finder, '__name__', '') + type(finder).__module__\n"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in name(finder).lower()]\n"
        "from secateur.search import cli\n"
        "from importlib.resources import files\n"
        "print(cli.__file__)\n"
        "print((files('secateur.examples') / 'quickstart.yaml').is_file())\n"
        "sys.argv = ['secateur', 'list', 'metrics']\n"
        "cli.main()\n"
    )
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={"PATH": ""}, check=False
    )
    assert done.returncode == 0, done.stderr
    place, examples, *metrics = done.stdout.splitlines()
    assert place.startswith(str(tmp_path / "at"))
    assert examples == "True"
    assert any(line.startswith("wanda") for line in metrics)
