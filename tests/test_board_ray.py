"""A board over Ray workers has the numbers of a local one."""

from __future__ import annotations

from secateur.search import app
from secateur.search.board.settings import board_settings
from tests.boards import SMALL, lines, measured_here


def test_workers_measure_what_one_process_does(ray_cluster, monkeypatch, tmp_path):
    settings = {**SMALL, "methods": ["wanda"], "sparsities": ["0.5"]}
    executor = {"kind": "ray", "address": ray_cluster, "workers": 2}
    app.bench(board_settings({**settings, "executor": executor}), tmp_path / "ray")
    measured_here(monkeypatch)
    app.bench(board_settings(settings), tmp_path / "local")
    found, wanted = (
        {line["candidate"]: line["values"] for line in lines(tmp_path / name)} for name in ("ray", "local")
    )
    assert list(wanted) == ["tiny | dense", *(f"tiny | wanda 0.5 | equal | seed {seed}" for seed in (0, 1))]
    assert {cell: (x["kl"], x["sparsity"]) for cell, x in found.items()} == {
        cell: (x["kl"], x["sparsity"]) for cell, x in wanted.items()
    }
    assert all(x["memory_bytes"] > 100e6 for x in found.values())
