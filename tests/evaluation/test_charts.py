from __future__ import annotations

from xml.etree import ElementTree

from vilau.evaluation.charts import Panel, svg


def test_a_chart_is_an_svg_whose_points_lie_inside_its_panels() -> None:
    """Well-formed, names escaped, every line drawn within the picture; an empty panel and NaN do no harm."""
    lines = {"a<b": [(10.0, 1.0), (20.0, 3.0)], "c": [(20.0, 2.0), (30.0, float("nan"))]}
    text = svg([("row & one", [Panel("up", lines, 0.5), Panel("empty", {"c": []})])], "steps")
    root = ElementTree.fromstring(text)
    size = float(root.attrib["width"]), float(root.attrib["height"])
    drawn = list(root.iter("{http://www.w3.org/2000/svg}polyline"))
    assert len(drawn) == 2 and "a&lt;b" in text
    for line in drawn:
        for point in line.attrib["points"].split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= size[0] and 0 <= y <= size[1]
