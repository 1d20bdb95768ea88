"""Part `forms` on a small linear: every form is exact, and its table shows what it costs."""

import pytest

from benchmarks.common.shapes import Linear
from benchmarks.cpu.linear import forms
from benchmarks.cpu.linear.measure import Plan

PLAN = Plan("cpu-fp32", ("tiny",), (1, 3), 2, 2**16)


@pytest.mark.parametrize("dynamic", [False, True])
def test_each_form_is_measured_and_the_references(dynamic: bool) -> None:
    rows = forms.measure_forms(PLAN, "a down", Linear("down", 64, 256, dynamic))
    assert [row["m"] for row in rows] == [1, 3]
    for row in rows:
        assert set(row["subjects"]) == set(forms.FORMS)
        for name, result in row["subjects"].items():
            if name == "zero points of tokens" and not dynamic:
                assert "static inputs" in result["refused"]
            else:
                assert len(result["seconds"]) == 2, (name, result)


def test_a_wrong_result_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(self: forms.FormedLinear, result: object) -> None:
        self._exact = self._exact + 1
        right(self, result)

    right = forms.FormedLinear.check
    monkeypatch.setattr(forms.FormedLinear, "check", check)
    (row, _) = forms.measure_forms(PLAN, "a down", Linear("down", 64, 256, True))
    assert all("not the reference's" in result["failed"] for result in row["subjects"].values())


def test_the_table_has_each_forms_time_over_the_plain_ones() -> None:
    subjects = {
        forms.PLAIN: {"seconds": [1.0, 2.0]},
        "4 segments": {"seconds": [1.1, 2.2]},
        "3-bit weights": {"refused": "no such kernel"},
    }
    row = {"title": "a down", "n": 64, "k": 256, "m": 8, "dynamic": True, "subjects": subjects}
    text = forms.table("a-kernel", [row])
    assert "| 8 | 4 segments | 1 | 1.10 | 1.10 | 1.10 |" in text
    assert "| a down 64x256 | 8 | 1.00 | 1.10 | - |" in text
    assert "- REFUSED 3-bit weights, a down: no such kernel" in text
