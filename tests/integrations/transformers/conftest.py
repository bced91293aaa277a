"""Models and processors, loaded through the Auto classes."""

import pytest

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[transformers]'")

from keye_kernels.small import SMALL  # noqa: E402
from tests.helpers.auto_model import load  # noqa: E402
from tests.helpers.golden import golden  # noqa: E402
from tests.helpers.tiny import save_checkpoint, tiny_model  # noqa: E402

transformers.utils.logging.disable_progress_bar()


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
