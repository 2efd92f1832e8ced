"""Charts: thinning of long curves, positions of values, labels of axes."""

from __future__ import annotations

import xml.etree.ElementTree

import numpy as np
import pytest

from hbp_titan.report.charts import Chart, thinned, ticks


def _lines(chart: Chart) -> list[xml.etree.ElementTree.Element]:
    return xml.etree.ElementTree.fromstring(chart.svg()).findall("polyline")


def test_thinning_keeps_extremes_of_each_bucket_and_both_ends() -> None:
    x = np.arange(12.0)
    y = np.array([5, 1, 9, 4, 2, 2, 7, 3, 8, 0, 6, 6], float)
    assert thinned(x, y, (0, 12), 3) == [(0, 5), (1, 1), (2, 9), (4, 2), (6, 7), (8, 8), (9, 0), (11, 6)]
    # Few points are kept, without those that are not finite.
    assert thinned(np.array([1.0, 2, 3]), np.array([4.0, np.nan, 6]), (1, 3), 300) == [(1, 4), (3, 6)]


def test_curve_of_a_million_points_shows_its_spike_in_30_kilobytes() -> None:
    y = np.sin(np.arange(1_000_000) / 1000)
    y[543_210] = 4.0
    chart = Chart("t", "x", "y", (0, 1e6), (-1, 5))
    chart.curve(np.arange(1_000_000.0), y, 0, "wave")
    text = chart.svg()
    assert len(text) < 30_000
    (line,) = _lines(chart)
    values = list(map(float, line.attrib["data-y"].split()))
    assert values.count(4.0) == 1
    assert float(line.attrib["data-x"].split()[values.index(4.0)]) == 543210


def test_name_is_escaped_in_its_attribute() -> None:
    chart = Chart("t", "x", "y", (0, 2), (0, 2))
    chart.curve(np.array([0.0, 1.0]), np.array([0.0, 1.0]), 0, '"/><script>x</script>')
    (line,) = _lines(chart)
    assert line.attrib["data-name"] == '"/><script>x</script>'


def test_logarithmic_axis_spaces_powers_evenly() -> None:
    chart = Chart("t", "x", "y", (0, 1), (0.1, 10), y_log=True)
    for value in (0.1, 1.0, 10.0, 0.0):
        chart.dot(0, value, 0)
    low, middle, high, below = (
        float(dot.attrib["cy"]) for dot in xml.etree.ElementTree.fromstring(chart.svg()).findall("circle")
    )
    assert middle - low == pytest.approx(high - middle, abs=0.1)
    assert below == low


def test_tick_labels_differ_and_ticks_are_round() -> None:
    chart = Chart("t", "x", "y", (10_000, 10_040), (7.1011, 7.1039))
    texts = [text.text for text in xml.etree.ElementTree.fromstring(chart.svg()).findall("text")]
    assert len(set(texts)) == len(texts)
    assert "10,010" in texts
    assert "7.1025" in texts
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0, 1_500) == [200 * i for i in range(8)]


def test_swatch_of_a_legend_is_nearest_to_its_own_name() -> None:
    chart = Chart("t", "x", "y", (0, 1), (0, 1))
    for color, name in enumerate(("stopped and resumed", "1M", "ill")):
        chart.name(name, color)
    root = xml.etree.ElementTree.fromstring(chart.svg())
    swatches = sorted(float(rect.attrib["x"]) for rect in root.findall("rect"))
    begins = sorted(float(text.attrib["x"]) for text in root.findall("text") if text.text in dict(chart.names))
    assert [begin - swatch for begin, swatch in zip(begins, swatches, strict=True)] == [14, 14, 14]
    # "1M" is 6.5 + 10 pixels wide, "ill" three times 4; 14 pixels lie between entries.
    assert swatches[2] - begins[1] == 17 + 14
    assert 520 - 14 - begins[2] == 12
