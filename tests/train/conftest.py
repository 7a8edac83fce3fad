"""A tiny data set and a tiny run, made once; everything that trains in the tests trains this."""

import pytest
from tiny_run import tiny_table

from pinclip.data.synthetic import build
from pinclip.train.config import RunConfig


@pytest.fixture(scope="session")
def store_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "synthetic"
    build(folder, pins=80, seed=1)
    return folder


@pytest.fixture
def tiny(store_path, tmp_path):
    """`tiny(**{"train.steps": 3})` is a validated configuration over the tiny one."""

    def make(**changes) -> RunConfig:
        table = tiny_table(store_path, tmp_path / "run", changes)
        return RunConfig.parse(table)

    return make
