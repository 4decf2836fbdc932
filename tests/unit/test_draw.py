"""Drawings of timelines: every cell appears, is labelled, and stays within the picture."""

import re
from collections import Counter
from xml.etree import ElementTree

import pytest

from mpilm.parallel.pipeline.schedules import SCHEDULES, lower, schedule
from mpilm.planner.draw import ACTION_COLORS, draw_svg, draw_text
from mpilm.planner.simulate import simulate

SECONDS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
SVG = "{http://www.w3.org/2000/svg}"


def timeline(name="1f1b", p=3, v=1, m=3, costs=SECONDS, weights=None):
    programs = [lower(actions, p * v) for actions in schedule(name, p, v, m)]
    return simulate(programs, lambda kind, stage: costs.get(kind, 0.0) * (weights[stage] if weights else 1.0))


def cells(drawing, rank):
    """Count the labels in a rank's lanes over all panels."""
    lanes = [line.removeprefix(f"rank {rank} ") for line in drawing.splitlines() if line.startswith(f"rank {rank} ")]
    return Counter(re.findall(r"[FBIW]\d+[a-z]?", " ".join(lanes)))


def test_draw_text_1f1b_as_expected():
    assert (
        draw_text(timeline())
        == """\
       |0 s           |5 s           |10 s
rank 0 F0-F1-F2-............B0====...B1====...B2====
rank 1 ...F0-F1-......B0====F2-B1====...B2====
rank 2 ......F0-B0====F1-B1====F2-B2====

F forward; B backward; . waiting
step 15 s; bubble 40.0%; most microbatches in flight, rank by rank: 3 2 1"""
    )


def test_draw_text_zero_bubble_without_unit_as_expected():
    assert (
        draw_text(timeline("zero-bubble", 2, 1, 2, {**SECONDS, "REDUCE": 1.0}), unit="")
        == """\
       |0             |5
rank 0 F0-F1-...I0~W0+I1~W1+R##
rank 1 ...F0-I0~F1-I1~W0+W1+R##

F forward; I input gradient; W weight gradient; R gradient reduction; . waiting
step 8; bubble 12.5%; most microbatches in flight, rank by rank: 2 2"""
    )


def test_draw_text_interleaved_labels_chunks_with_letters():
    drawing = draw_text(timeline("interleaved", 2, 2, 2))
    assert "rank 0 F0aF1aF0bF1b" in drawing
    assert "most microbatches in flight, over chunks a to b, rank by rank: 4 3" in drawing


@pytest.mark.parametrize("width", [40, 97, 120, 200, 300])
@pytest.mark.parametrize("name", SCHEDULES)
def test_draw_text_any_width_draws_every_cell_once(name, width):
    v = 2 if name == "interleaved" else 1
    p, m = (8, 16) if width >= 200 else (4, 4)
    drawing = draw_text(timeline(name, p, v, m), width)
    assert all(len(line) <= width for line in drawing.splitlines()[:-2])  # all but the legend
    if "omitted" in drawing:
        return
    kinds = "FIW" if name == "zero-bubble" else "FB"
    for rank in range(p):
        chunks = "ab" if v == 2 else [""]
        assert cells(drawing, rank) == {f"{kind}{i}{chunk}": 1 for kind in kinds for i in range(m) for chunk in chunks}


def test_draw_text_uneven_stages_never_cuts_labels():
    """Cells cross the ends of panels, and cells too short for a label keep their letter."""
    drawing = draw_text(timeline("1f1b", 3, 1, 12, weights=[1.0, 1.13, 0.3]), 90)
    for rank in range(3):
        assert set(cells(drawing, rank)) <= {f"{kind}{i}" for kind in "FB" for i in range(12)}
        assert set(cells(drawing, rank).values()) == {1}
    assert len(cells(drawing, 0)) > 20
    assert re.search(r"rank 2 .*F[^0-9]", drawing)


def test_draw_text_long_step_omits_the_middle():
    drawing = draw_text(timeline("1f1b", 4, 1, 200), 100)
    assert re.search(r"^\.\.\. \d+(\.\d+)? to \d+(\.\d+)? s omitted \.\.\.$", drawing, re.M)
    assert len(drawing.splitlines()) < 32
    assert "F0-" in drawing
    assert "B199" in drawing


def test_draw_step_of_no_time_succeeds():
    instant = timeline(costs={"F": 0.0, "B": 0.0})
    assert "step 0 s; bubble 0.0%" in draw_text(instant)
    ElementTree.fromstring(draw_svg(instant))


@pytest.mark.parametrize(("name", "v", "kinds"), [("1f1b", 1, "FB"), ("zero-bubble", 1, "FIW"), ("interleaved", 2, "FB")])
def test_draw_svg_has_a_labelled_cell_for_each_action(name, v, kinds):
    p, m = 4, 8
    image = draw_svg(timeline(name, p, v, m))
    root = ElementTree.fromstring(image)
    groups = root.findall(f"{SVG}g")
    assert len(groups) == len(kinds) * p * v * m
    tooltips = [group.findtext(f"{SVG}title") for group in groups]
    assert tooltips[0] == "0F0: forward, 0 to 1 s"
    assert len(set(tooltips)) == len(tooltips)
    assert Counter(group.findtext(f"{SVG}text")[0] for group in groups) == dict.fromkeys(kinds, p * v * m)
    assert len({group.find(f"{SVG}rect").get("fill") for group in groups}) == len(kinds) * v  # a shade for each chunk
    assert "prefers-color-scheme: dark" in image
    assert re.findall(r"https?://[^\"]*|url\(|<script|<image", image) == ["http://www.w3.org/2000/svg"]  # self-contained
    assert "Pipeline schedule of 4 ranks" in root.findtext(f"{SVG}title")
    width = float(root.get("width"))
    assert all(float(rect.get("x")) + float(rect.get("width")) <= width for rect in root.iter(f"{SVG}rect"))


def test_draw_svg_long_step_limits_the_width():
    root = ElementTree.fromstring(draw_svg(timeline("1f1b", 2, 1, 1000)))
    assert float(root.get("width")) < 4200


def test_action_colors_are_distinct():
    assert len(set(ACTION_COLORS.values())) == len(ACTION_COLORS)
