"""Timelines as pictures: every cell is there, says what it is, and nothing runs over the edge."""

import re
from collections import Counter
from xml.etree import ElementTree

import pytest

from mpilm.parallel.pipeline.draw import COLORS, svg, text
from mpilm.parallel.pipeline.lower import lower
from mpilm.parallel.pipeline.schedules import SCHEDULES, schedule
from mpilm.parallel.pipeline.simulate import simulate

SECONDS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
SVG = "{http://www.w3.org/2000/svg}"


def timeline(name="1f1b", p=3, v=1, m=3, costs=SECONDS, weights=None):
    programs = [lower(actions, p * v) for actions in schedule(name, p, v, m)]
    return simulate(programs, lambda kind, stage: costs.get(kind, 0.0) * (weights[stage] if weights else 1.0))


def test_the_drawing():
    assert (
        text(timeline())
        == """\
       |0 s           |5 s           |10 s
rank 0 F0-F1-F2-............B0====...B1====...B2====
rank 1 ...F0-F1-......B0====F2-B1====...B2====
rank 2 ......F0-B0====F1-B1====F2-B2====

F forward; B backward; . waiting
step 15 s; bubble 40.0%; most microbatches alive, rank by rank: 3 2 1"""
    )


def test_the_drawing_of_halves():
    assert (
        text(timeline("zero-bubble", 2, 1, 2, {**SECONDS, "REDUCE": 1.0}), unit="")
        == """\
       |0             |5
rank 0 F0-F1-...I0~W0+I1~W1+R##
rank 1 ...F0-I0~F1-I1~W0+W1+R##

F forward; I backward, gradient of the input; W backward, gradient of the weights; R sum over the data axis; . waiting
step 8; bubble 12.5%; most microbatches alive, rank by rank: 2 2"""
    )


def test_chunks_have_letters():
    drawing = text(timeline("interleaved", 2, 2, 2))
    assert "rank 0 F0aF1aF0bF1b" in drawing
    assert "a to b the chunks of a rank" in drawing
    assert "most microbatches alive (each in one of 2 chunks), rank by rank: 4 3" in drawing


def cells(drawing, rank):
    """The labels in a rank's rows, whichever panel they are in."""
    rows = [line for line in drawing.splitlines() if line.startswith(f"rank {rank} ")]
    return Counter(re.findall(r"[FBIW]\d+[a-z]?", " ".join(row.removeprefix(f"rank {rank} ") for row in rows)))


@pytest.mark.parametrize("width", [40, 80, 97, 120, 200, 300])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_cell_is_drawn_once_within_the_width(name, width):
    v = 2 if name == "interleaved" else 1
    p, m = (8, 16) if width >= 200 else (4, 4)
    drawn = timeline(name, p, v, m)
    drawing = text(drawn, width)
    legend = drawing.splitlines()[-2:]
    assert all(len(line) <= width for line in drawing.splitlines() if line not in legend)
    if "left out" in drawing:
        return
    kinds = "FIW" if name == "zero-bubble" else "FB"
    for rank in range(p):
        chunks = "ab" if v == 2 else [""]
        assert cells(drawing, rank) == {f"{kind}{i}{chunk}": 1 for kind in kinds for i in range(m) for chunk in chunks}


def test_labels_are_never_cut_in_two():
    """Uneven stages put cells across the end of a panel, and cells too short for a label keep their letter."""
    drawn = timeline("1f1b", 3, 1, 12, weights=[1.0, 1.13, 0.3])
    drawing = text(drawn, 90)
    for rank in range(3):
        assert set(cells(drawing, rank)) <= {f"{kind}{i}" for kind in "FB" for i in range(12)}
        assert set(cells(drawing, rank).values()) == {1}
    assert len(cells(drawing, 0)) > 20
    assert re.search(r"rank 2 .*F[^0-9]", drawing)


def test_of_a_long_step_the_middle_is_left_out():
    drawing = text(timeline("1f1b", 4, 1, 200), 100)
    assert re.search(r"^\.\.\. \d+(\.\d+)? to \d+(\.\d+)? s left out \.\.\.$", drawing, re.M)
    assert len(drawing.splitlines()) < 32
    assert "F0-" in drawing
    assert "B199" in drawing


def test_a_step_of_no_time_can_be_drawn():
    drawn = timeline(costs={"F": 0.0, "B": 0.0})
    assert "step 0 s; bubble 0.0%" in text(drawn)
    ElementTree.fromstring(svg(drawn))


@pytest.mark.parametrize(("name", "v", "kinds"), [("1f1b", 1, "FB"), ("zero-bubble", 1, "FIW"), ("interleaved", 2, "FB")])
def test_svg(name, v, kinds):
    p, m = 4, 8
    drawn = timeline(name, p, v, m)
    image = svg(drawn)
    root = ElementTree.fromstring(image)
    groups = root.findall(f"{SVG}g")
    assert len(groups) == len(kinds) * p * v * m
    titles = [group.findtext(f"{SVG}title") for group in groups]
    assert titles[0] == "0F0: forward, 0 to 1 s"
    assert len(set(titles)) == len(titles)
    assert Counter(group.findtext(f"{SVG}text")[0] for group in groups) == dict.fromkeys(kinds, p * v * m)
    assert len({group.find(f"{SVG}rect").get("fill") for group in groups}) == len(kinds) * v  # a shade for each chunk
    assert "prefers-color-scheme: dark" in image
    assert re.findall(r"https?://[^\"]*|url\(|<script|<image", image) == ["http://www.w3.org/2000/svg"]  # self-contained
    assert "Pipeline schedule of 4 ranks" in root.findtext(f"{SVG}title")
    width = float(root.get("width"))
    assert all(float(r.get("x")) + float(r.get("width")) <= width for r in root.iter(f"{SVG}rect") if r.get("x"))


def test_a_long_step_stays_an_image_one_can_open():
    root = ElementTree.fromstring(svg(timeline("1f1b", 2, 1, 1000)))
    assert float(root.get("width")) < 4200


def test_colours_differ():
    assert len(set(COLORS.values())) == len(COLORS)
