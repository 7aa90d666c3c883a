"""Finds the packages: TOML can't both find packages in a folder and put `secateur.` before their names."""

from setuptools import find_packages, setup

ROOMS = ("search", "spaces", "pruners", "evaluators")

setup(
    packages=[
        f"secateur.{name}"
        for room in ROOMS
        for name in (room, *(f"{room}.{sub}" for sub in find_packages(room)))
    ],
    package_dir={f"secateur.{room}": room for room in ROOMS},
)
