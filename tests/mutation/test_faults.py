"""The list of faults fits the source. `python -m tests.mutation` plants them, which takes too long for each run of the tests."""

import pytest

from .fault import ROOT, all_faults

FAULTS = all_faults()


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{index}-{fault.file}" for index, fault in enumerate(FAULTS)])
def test_fault_can_be_planted(fault):
    assert fault.source().count(fault.old) == 1, fault.old
    assert fault.old != fault.new
    compile(fault.source().replace(fault.old, fault.new), fault.file, "exec")
    for argument in fault.tests.split():
        if argument.startswith("tests/"):
            assert (ROOT / argument.split("::")[0]).exists(), argument
