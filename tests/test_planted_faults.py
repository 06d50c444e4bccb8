"""The planted faults can be planted: `make test-faults` takes too long to run with every change."""

from tests.planted_faults import FAULTS, ROOT


def test_every_fault_has_one_place_in_the_source_and_a_file_of_tests() -> None:
    for fault in FAULTS:
        assert (ROOT / fault.file).read_text().count(fault.old) == 1, fault.name
        assert (ROOT / "tests" / fault.tests).is_file(), fault.name
