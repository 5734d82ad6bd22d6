import pytest
from checkpoint_files import write_folder, write_sharded


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path):
    return write_sharded(tmp_path / "sharded")
