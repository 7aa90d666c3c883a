"""Three journeys as people take them, by the commands alone, on a small random Qwen2 and on `tiny`."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from secateur.pruners.models.loading import EMBEDDED
from secateur.search.study.state import read_state

SCRIPTS = Path(__file__).parent / "journeys"


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    """A random Qwen2 of four blocks, with the tokenizer of `tiny`."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED["tiny"]().location)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    directory = tmp_path_factory.mktemp("qwen2")
    Qwen2ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def taken(name: str, *arguments: object) -> str:
    """Output of a script on a pseudo-terminal, where progress is live; it must end well."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        ["bash", str(SCRIPTS / name), *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "PATH": path, "COLUMNS": "160", "TERM": "xterm"},
    ) as process:
        os.close(theirs)
        pieces = []
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            pieces.append(piece)
        process.wait(timeout=300)
    os.close(ours)
    text = b"".join(pieces).decode().replace("\r\n", "\n")
    assert process.returncode == 0, text[-3000:]
    found = re.search(r"first useful result after (\d+) s", text)
    assert found is not None, text[-3000:]
    print(f"{name}: first useful result after {found[1]} s")  # noqa: T201  # read with `pytest -s`
    return text


def test_an_engineer_makes_a_model_smaller_and_faster(qwen2, tmp_path):
    text = taken("smaller_on_a_cpu.sh", qwen2, tmp_path)
    assert "the default recipe: equal blocks for hf-stock" in text
    assert "Qwen2ForCausalLM" in text
    removed = re.search(r"([\d.]+)% of the blocks' parameters, ([\d.]+)% of the whole model's", text)
    assert 30 <= float(removed[2]) < 36 < float(removed[1])
    stored = sum(path.stat().st_size for path in (tmp_path / "smaller").glob("*.safetensors"))
    assert stored < 0.72 * sum(path.stat().st_size for path in qwen2.glob("*.safetensors"))
    assert json.loads((tmp_path / "smaller" / "config.json").read_text())["model_type"] == "qwen2"
    assert len(re.findall(r"\d+x \([\d.]+ to [\d.]+\)", text)) == 4  # prefill and decode of both


def test_a_researcher_compares_a_metric_of_her_own_over_seeds(tmp_path):
    text = taken("metric_and_seeds.sh", "tiny", tmp_path)
    for seed in range(3):
        assert read_state(tmp_path / "runs" / f"mine-seed{seed}").state == "finished"
    table = text[text.rindex("\\begin{") :] if "\\begin{" in text else ""
    assert "\\end{tabular}" in table
    for sparsity in ("0.3", "0.5", "0.7"):
        assert sparsity in table


def test_an_engineer_stops_a_search_on_ray_and_starts_it_again(tmp_path):
    pytest.importorskip("ray")
    import optuna

    text = taken("stop_and_restart.sh", "tiny", tmp_path)
    assert "stopped with status 3" in text
    states = re.findall(r"^ *state +(.*)$", text, re.MULTILINE)
    assert states == ["stopped: stopped", "finished: its budget is used up"]
    lines = (tmp_path / "run" / "measurements.jsonl").read_text().splitlines()
    keys = [(row["candidate"], row["fidelity"]) for row in map(json.loads, lines)]
    assert len(set(map(str, keys))) == len(keys)  # nothing twice
    storage = f"sqlite:///{tmp_path / 'mirror.db'}"
    (name,) = optuna.study.get_all_study_names(storage)
    mirrored = optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)
    searched = [key for key in keys if "search" in str(key[1])]
    assert len(mirrored) == len(searched)
