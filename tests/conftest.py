"""Common settings and fixtures: at most two CPU threads, no network, and a tiny model with random weights.

`make test` runs the tests in two processes (pytest-xdist). Each then has one thread, and one of them has all tests of the page.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Another program on the machine can make any example slow, so a time limit fails by chance.
hypothesis.settings.register_profile("project", deadline=None)
hypothesis.settings.load_profile("project")
# A shell starts its background jobs with SIGINT ignored, and so would be the signals of the tests that interrupt a training.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
PAGE_TESTS = ("test_app", "test_page_load")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each file to one process, and all tests that open the page to the same one.

    Two browsers and servers at once are too slow for their time limits.
    """
    from xdist.scheduler import LoadScopeScheduling

    class PageInOneProcess(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope_of(nodeid)

    return PageInOneProcess(config, log)


def scope_of(nodeid: str) -> str:
    """Return the name of the tests that one process gets together with this one."""
    file = nodeid.partition("::")[0].rpartition("/")[2]
    return "page" if file.startswith(PAGE_TESTS) else file


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread of torch: thousands of tiny products wait for each other's threads on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a PatchEBT with random weights and an energy that is easy to descend."""
    import torch

    from ebt_vision.models.patch_ebt import PatchEBT, PatchEBTConfig

    torch.manual_seed(0)
    config = PatchEBTConfig(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, init_step_size=0.05)
    model = PatchEBT(config)
    torch.nn.init.normal_(model.head.weight, std=0.002)
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-ebt"
    model.save_pretrained(folder)
    return folder
