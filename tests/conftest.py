"""What all tests share: one thread, a cache of their own, a seed, and float64 for those that ask for it."""

import os

import pytest
import torch

#: Their tests share what takes long to make. A worker begins at the front of its list, and others take from the end of
#: it what it has left: at the front, such tests stay together.
FIRST = ("test_tensorboard_browser.py", "test_sweep_killed.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in FIRST)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory):
    """Nothing is read from or left in the user's cache, nor signed by the user's key; what one test or worker computes,
    the others find."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFRAMEWORK_CACHE", str(folder))
        patch.setenv("MLFRAMEWORK_KEY", str(folder.with_name("key")))
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def float64():
    """Everything that is made within the test is made in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
