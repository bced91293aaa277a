"""Models and processors, loaded through the Auto classes."""

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install -e '.[transformers]'"
)

import keye_kernels.auto  # noqa: E402, F401
from keye_kernels.small import SMALL  # noqa: E402
from tests.helpers.golden import golden  # noqa: E402
from tests.helpers.tiny import save_checkpoint, tiny_model  # noqa: E402

transformers.utils.logging.disable_progress_bar()


def load(path, **options):
    """A float32 model from an Auto class."""
    return transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, **options)


@pytest.fixture(scope="session")
def preview():
    return load(golden("preview"))


@pytest.fixture(scope="session")
def v1_5():
    return load(golden("v1_5"))


@pytest.fixture(scope="session")
def small():
    return load(SMALL), transformers.AutoProcessor.from_pretrained(SMALL)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return save_checkpoint(tiny_model(), tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny(tiny_folder):
    return load(tiny_folder)
