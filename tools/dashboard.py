"""The dashboard of infra/monitoring as a picture, of what a Prometheus holds: for those who have no Grafana at hand.

    python -m tools.dashboard http://127.0.0.1:9090 --output dashboard.png [--minutes 15] [--window 1m]

`--window` takes the place of the dashboard's own 15 minutes over which rates are taken, for a short run.
"""

import argparse
import json
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, num2date
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec

DASHBOARD = Path(__file__).resolve().parent.parent / "infra" / "monitoring" / "dashboard.json"
STEPS = 200
COLUMNS = 24  # of Grafana's grid
INCHES = 15.0, 1.05  # width of the picture, height of a row of the grid's four
SECONDS_A_DAY = 86_400

Series = list[tuple[str, list[tuple[float, float]]]]


def series_of(prometheus: str, expression: str, legend: str, minutes: float, end: float) -> Series:
    """Return the series of an expression: the legend filled in, and (time in seconds, value) of each point.

    Args:
        prometheus: URL of the server.
        expression: PromQL.
        legend: Grafana's, with `{{label}}` in it.
        minutes: how far back from the end.
        end: seconds since 1970.
    """
    begin = end - 60 * minutes
    query = {"query": expression, "start": begin, "end": end, "step": max(1, round(60 * minutes / STEPS))}
    url = f"{prometheus.rstrip('/')}/api/v1/query_range?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        found = json.load(answer)["data"]["result"]
    named: Series = []
    for one in found:
        name = legend
        for label, value in one["metric"].items():
            name = name.replace(f"{{{{{label}}}}}", value)
        named.append((name, [(when, float(value)) for when, value in one["values"]]))
    return named


def draw(prometheus: str, output: Path, minutes: float = 15, window: str = "15m", dashboard: Path = DASHBOARD) -> int:
    """Draw the panels of a dashboard where they stand; return how many of them have data.

    Args:
        prometheus: URL of the server.
        output: the PNG that is written.
        minutes: how far back from now.
        window: over which rates are taken, in PromQL's words.
        dashboard: Grafana's JSON.
    """
    panels = json.loads(dashboard.read_text())["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = Figure(figsize=(INCHES[0], INCHES[1] * rows / 4), layout="constrained")
    grid, end, drawn = GridSpec(rows, COLUMNS, figure), time.time(), 0
    for panel in panels:
        place = panel["gridPos"]
        axes = figure.add_subplot(grid[place["y"] : place["y"] + place["h"], place["x"] : place["x"] + place["w"]])
        axes.set_title(panel["title"], loc="left", fontsize=10)
        found: Series = []
        for target in panel["targets"]:
            expression = target["expr"].replace("$stage", ".*").replace("[15m]", f"[{window}]")
            found += series_of(prometheus, expression, target.get("legendFormat", ""), minutes, end)
        drawn += bool(found)
        unit = panel.get("fieldConfig", {}).get("defaults", {}).get("unit", "none")
        if not found:
            axes.text(0.5, 0.5, "no data", ha="center", va="center", color="grey", transform=axes.transAxes)
            axes.set_axis_off()
        elif panel["type"] == "timeseries":
            _lines(axes, found, unit, end - 60 * minutes, end)
        else:
            _numbers(axes, found, unit)
    figure.savefig(output, dpi=80)
    return drawn


def _lines(axes: Axes, found: Series, unit: str, begin: float, end: float) -> None:
    colors = colormaps["tab10"].colors  # type: ignore[attr-defined]
    for number, (name, points) in enumerate(found):
        times = [when / SECONDS_A_DAY for when, _ in points]
        axes.plot(times, [value for _, value in points], label=name, color=colors[number % len(colors)], linewidth=1.2)
    locator = AutoDateLocator()
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator, show_offset=False))
    axes.set_xlim(num2date(begin / SECONDS_A_DAY), num2date(end / SECONDS_A_DAY))  # type: ignore[arg-type]
    axes.set_ylim(0, 1.05 if unit == "percentunit" else None)
    axes.tick_params(labelsize=8)
    if unit == "percentunit":
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    elif unit != "none":
        axes.set_ylabel(unit, fontsize=8)
    axes.legend(fontsize=7, loc="lower left")
    axes.grid(alpha=0.3)


def _numbers(axes: Axes, found: Series, unit: str) -> None:
    shown = []
    for name, points in found:
        value = points[-1][1]
        text = f"{value:.0%}" if unit == "percentunit" else f"{value:,.2f}{'' if unit == 'none' else f' {unit}'}"
        shown.append(f"{text}\n{name}")
    axes.text(0.5, 0.5, "\n".join(shown), ha="center", va="center", fontsize=18, transform=axes.transAxes)
    axes.set_axis_off()


def main(words: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prometheus", help="URL of the Prometheus server")
    parser.add_argument("--output", type=Path, required=True, help="the PNG")
    parser.add_argument("--minutes", type=float, default=15, help="how far back from now")
    parser.add_argument("--window", default="15m", help="over which rates are taken")
    given = parser.parse_args(words)
    try:
        drawn = draw(given.prometheus, given.output, given.minutes, given.window)
    except OSError as error:
        print(f"{given.prometheus}: {error}; give the URL of a Prometheus server", file=sys.stderr)
        return 2
    print(f"{given.output}: {drawn} panels with data")
    return 0


if __name__ == "__main__":
    sys.exit(main())
