"""Rows as data: each stands for what its label says, whatever the defaults are."""

import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mergequant import Options
from mergequant.ablation import paper
from mergequant.ablation.rows import FULL, Row, RowMaker, key_of
from mergequant.ablation.study import subject_of, with_samples
from mergequant.ablation.tables import CHOICES, Table, distinct, tables

WIDTHS = {"hidden": 4096, "queries": 4096, "intermediate": 11008}
BASE = Options(compensation_rank=8, split_by="step")


def made(base: Options = BASE, widths: dict[str, int] = WIDTHS) -> dict[str, Table]:
    return tables(base, widths)


def difference(one: Row, other: Row) -> dict[str, tuple[Any, Any]]:
    assert one.options is not None and other.options is not None
    ours = {**one.options.model_dump(), **asdict(one.baseline)}
    theirs = {**other.options.model_dump(), **asdict(other.baseline)}
    return {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}


def test_there_is_a_table_for_every_name() -> None:
    assert set(made()) == {*CHOICES, "figure1"}
    assert all(table.rows[0].key == FULL for table in made().values())


def test_a_key_is_a_row_and_a_row_a_key() -> None:
    rows = [row for table in made().values() for row in table.rows if row.options is not None]
    keys = {json.dumps(row.options_as_json): row.key for row in rows}
    assert len(keys) == len(set(keys.values())) == len({row.key for row in rows})
    assert all(row.key == key_of(row.options, row.baseline) for row in rows if row.options)


def test_full_precision_runs_first_and_each_row_once() -> None:
    rows = distinct(made().values())
    assert [row.key for row in rows].count(FULL) == 1 and rows[0].key == FULL
    shared = {row.key for row in made()["table1"].rows} & {row.key for row in made()["table4"].rows}
    assert len(shared) == 3  # full precision, and the whole method with and without rotation
    assert len(rows) == len({row.key for row in rows}) == 45


def test_each_step_of_outliertune_adds_what_it_says() -> None:
    rows = made()["outliertune"].rows[1:7]
    steps = [difference(a, b) for a, b in pairwise(rows)]
    assert steps[0] == {"norm_step": ("tensor", "smooth")}
    assert steps[1] == {"norm_step": ("smooth", "channel")}
    assert steps[2] == {"static_zero_points": (False, True), "middle": ("ends", "windows")}
    assert steps[3] == {"middle": ("windows", "ends"), "clipping": ("none", "channel")}
    assert {row.options.static_bits for row in rows if row.options} == {8}
    assert [row.baseline.exported for row in rows] == [False, False, True, False, True, True]


TENSOR = {"norm_step": ("tensor", "channel")}
STEPS: list[dict[str, tuple[Any, Any]]] = [
    {"tensor_mix": (True, False)},
    TENSOR,
    {"reconstruction": ("none", "prune"), "staggered": (False, True)},
    {"clipping": ("none", "adaptive")},
    {"compensation_rank": (0, 8)},
]


@pytest.mark.parametrize("start", [1, 7], ids=["rotation", "no rotation"])
def test_each_step_of_table_4_adds_one_thing(start: int) -> None:
    base = BASE.model_copy(update={"reconstruction": "prune", "staggered": True})
    rows = made(base)["table4"].rows[start : start + 6]
    assert [difference(a, b) for a, b in pairwise(rows)] == STEPS
    assert {row.options.rotation for row in rows if row.options} == {
        "online" if start == 1 else "none"
    }


def test_the_halves_of_table_4_differ_in_rotation_alone() -> None:
    rows = made()["table4"].rows[1:]
    assert len(rows) == 12
    for rotated, plain in zip(rows[:6], rows[6:], strict=True):
        assert difference(rotated, plain) == {"rotation": ("online", "none")}


def test_the_rows_of_table_7_differ_in_clipping_alone() -> None:
    _, none, channel, adaptive = made()["table7"].rows
    assert difference(none, channel) == {"clipping": ("none", "channel")}
    assert difference(channel, adaptive) == {"clipping": ("channel", "adaptive")}
    assert none.baseline.kept_weights and not none.baseline.exported


def test_table_5_has_3_bits_in_both_forms() -> None:
    _, *rows = made()["table5"].rows
    forms = [
        (x.weight_bits, x.asymmetric, x.group_size, x.activations)
        for x in (row.options for row in rows)
        if x is not None
    ]
    assert forms == [
        (3, True, None, "dynamic"),
        (3, False, 128, "dynamic"),
        (3, True, None, "static"),
        (3, False, 128, "static"),
    ]


@pytest.mark.parametrize(("width", "group"), [(4096, 128), (128, 64), (64, 32), (40, 32)])
def test_groups_are_smaller_in_a_narrow_model(width: int, group: int) -> None:
    rows = made(widths={**WIDTHS, "hidden": width})["table5"].rows
    assert rows[2].options is not None and rows[2].options.group_size == group
    assert str(group) in rows[2].label


def test_figure_1_compares_calibrations_of_activations_alone() -> None:
    _, *rows = made()["figure1"].rows
    for row in rows:
        assert row.options is not None
        assert (row.options.weights, row.options.clipping) == ("gptq", "none")
        assert (row.options.rotation == "online") == ("rotation" in row.label)


def test_rows_do_not_depend_on_the_methods_own_fields_of_the_base() -> None:
    odd = {
        "activations": "dynamic",
        "rotation": "offline",
        "static_bits": 8,
        "dynamic_bits": 8,
        "weights": "rtn",
        "weight_bits": 8,
        "group_size": 64,
        "head_bits": 16 if BASE.head_bits == 8 else 8,
        "asymmetric": True,
        "clipping": "channel",
    }
    base = Options.model_validate({**BASE.model_dump(), **odd})
    assert distinct(made(base).values()) == distinct(made().values())
    rows = distinct(made(base).values())
    assert {row.options.head_bits for row in rows if row.options is not None} == {16}


def test_what_rows_have_in_common_comes_from_the_base() -> None:
    given = {"gptq_samples": 3, "seed": 7, "device": "cpu", "weight_search": "minmax"}
    base = BASE.model_copy(update=given)
    for row in distinct(made(base).values())[1:]:
        assert row.options is not None
        assert row.options.model_dump(include=set(given)) == given


def test_rows_of_a_rotation_are_reconstructed_as_was_decided() -> None:
    shape = {"reconstruction": "pad", "alpha": 1.5, "max_extra_channels": 0.25}
    by_name = tables(BASE, WIDTHS, {"online": shape, "none": {"reconstruction": "none"}})
    online, none = by_name["table4"].rows[4:7], by_name["table4"].rows[10:]
    for row in online:
        assert row.options is not None
        assert row.options.model_dump(include=set(shape)) == shape
    assert difference(none[0], by_name["table4"].rows[9]) == {}  # no more than QSM
    assert none[0].key == by_name["table4"].rows[9].key
    assert by_name["table1"].rows[5].key == key_of(RowMaker(BASE, {}).whole_options("offline"))


def test_without_compensation_its_line_is_left_out() -> None:
    base = BASE.model_copy(update={"compensation_rank": 0})
    labels = [row.label for row in made(base)["table4"].rows]
    assert len(labels) == 11 and not [x for x in labels if "compensation" in x]


def test_every_method_that_a_row_names_is_in_the_paper() -> None:
    for table in made().values():
        model = paper.shown_model(table.name, None)
        for row in table.rows:
            if row.paper and model:
                assert paper.figures(table.name, model, row.paper) is not None, row


def test_all_rows_have_the_windows_that_the_whole_method_would_take(
    llama: Path, text: Path
) -> None:
    subject = subject_of(llama, [text])
    base = Options(statistics_samples=2, sequence_length=32, compensation_rank=2)
    widest = 172  # of down
    assert with_samples(base, subject).gptq_samples == -(-21 * widest // 32)
    given = base.model_copy(update={"gptq_samples": 3})
    assert with_samples(given, subject) == given
