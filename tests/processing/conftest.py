"""Processors of both editions with a byte tokenizer, and a local HTTP server."""

import pytest

from keye_kernels.editions import EDITIONS
from keye_kernels.processing import KeyeProcessor
from tests.helpers.http_answers import http_server
from tests.helpers.small_tokenizer import write_processor_files


@pytest.fixture(scope="session")
def processors(tmp_path_factory):
    """The processor of each edition, by its name."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {edition: KeyeProcessor.from_pretrained(write_processor_files(folder / edition, edition)) for edition in EDITIONS}


@pytest.fixture(params=EDITIONS)
def processor(request, processors):
    return processors[request.param]


@pytest.fixture
def preview(processors):
    return processors["preview"]


@pytest.fixture
def v1_5(processors):
    return processors["1.5"]


@pytest.fixture
def server():
    with http_server() as http:
        yield http
