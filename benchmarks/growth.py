"""How time and memory of the two engines grow with the number of samples; `find.py --growth`.

Pooled values are drawn in shards of 1,000 samples and given to the statistics as a capture would give them.
The clock runs only while a statistic adds or finishes. Every point is a process of its own; its memory is the
peak of what it holds beyond the interpreter, its libraries and one shard.
"""

import math
import multiprocessing
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from machine import CLOCKS, others_share, peak_bytes, record
from torch import Tensor

from safeglasses.files import atomic_write_text, write_json
from safeglasses.find.histogram import Histogram, edges_of
from safeglasses.find.ranks import Ranks
from safeglasses.find.statistic import HALF_A, TOXIC, Samples

NEURONS = 8192
SHARD = 1000
SIZES = (1_000, 3_000, 10_000, 30_000, 100_000)
ENGINES = ("exact", "histogram")


@dataclass(frozen=True)
class Point:
    """One engine on so many samples."""

    engine: str
    samples: int
    seconds: float
    peak_bytes: int
    """Beyond the interpreter, its libraries and one shard."""


def shard_of(number: int) -> tuple[Tensor, Samples]:
    """One pool of bfloat16 values, half of the samples toxic."""
    generator = torch.Generator().manual_seed(number)
    toxic = torch.rand(SHARD, generator=generator) < 0.5
    half = torch.randint(2, (SHARD,), generator=generator) + HALF_A
    gap = torch.linspace(-0.5, 0.5, NEURONS)[:, None]
    values = torch.randn(NEURONS, SHARD, generator=generator).add_(gap * toxic).bfloat16()
    groups = torch.where(toxic, TOXIC, half).to(torch.int8)
    return values[None], Samples(groups[None], torch.arange(SHARD) + SHARD * number)


def measure(answer: Connection, engine: str, samples: int, threads: int, clock_name: str) -> None:
    """Feed one engine and send the point back."""
    torch.set_num_threads(threads)
    clock = CLOCKS[clock_name]
    first, who = shard_of(0)
    make_ready(first, who)
    before, seconds = peak_bytes(), 0.0
    start = clock()
    statistic = Ranks() if engine == "exact" else Histogram(edges_of(first, who))
    seconds += clock() - start
    for number in range(samples // SHARD):
        values, who = shard_of(number)
        start = clock()
        statistic.add(values, who)
        seconds += clock() - start
    start = clock()
    statistic.finish()
    seconds += clock() - start
    answer.send(Point(engine, samples, seconds, peak_bytes() - before))


def make_ready(values: Tensor, who: Samples) -> None:
    """Load what is loaded at first use, on a few neurons."""
    for statistic in (Ranks(), Histogram(edges_of(values[:, :64], who))):
        statistic.add(values[:, :64], who)
        statistic.finish()


def points(threads: int, clock: str) -> list[Point]:
    """All of them, each in a fresh process."""
    context, found = multiprocessing.get_context("spawn"), []
    print(f"{NEURONS:,} neurons, bfloat16, {threads} thread(s), {clock} clock")
    print(f"{'engine':12}{'samples':>9}{'seconds':>9}{'peak, MB':>10}")
    for engine in ENGINES:
        for samples in SIZES:
            here, there = context.Pipe()
            child = context.Process(target=measure, args=(there, engine, samples, threads, clock))
            child.start()
            there.close()
            point: Point = here.recv()
            child.join()
            print(f"{engine:12}{samples:9,}{point.seconds:9.2f}{point.peak_bytes / 1e6:10.0f}", flush=True)
            found.append(point)
    return found


def main(out: Path | None, plot: Path | None, clock: str) -> None:
    """Measure, write the figures and draw them."""
    share = others_share()
    found = points(torch.get_num_threads(), clock)
    if out is not None:
        head = record("growth", ["numpy"], neurons=NEURONS, shard=SHARD, dtype="bfloat16", bins=256, clock=clock)
        write_json(out, {**head, "others_share_of_cpu": share(), "points": [asdict(point) for point in found]})
    if plot is not None:
        atomic_write_text(plot, drawing(found))


STYLE = """
text { font: 13px system-ui, sans-serif; fill: #444 } .grid { stroke: #8884 } .title { font-weight: 600 }
.exact { stroke: #c2571a; fill: #c2571a } .histogram { stroke: #1f77a8; fill: #1f77a8 }
path.exact, path.histogram { fill: none; stroke-width: 2 } text.exact, text.histogram { stroke: none }
@media (prefers-color-scheme: dark) { text { fill: #ccc } }
"""
WIDE, HIGH, LEFT, TOP = 330, 220, 56, 34


def drawing(found: Sequence[Point]) -> str:
    """Two panels as SVG, both axes logarithmic: seconds and peak memory over samples."""
    seconds = {e: [(p.samples, p.seconds) for p in found if p.engine == e] for e in ENGINES}
    memory = {e: [(p.samples, p.peak_bytes / 1e6) for p in found if p.engine == e] for e in ENGINES}
    body = panel(0, "seconds", seconds) + panel(WIDE + LEFT + 40, "peak memory, MB", memory)
    width, height = 2 * (WIDE + LEFT) + 120, HIGH + TOP + 44
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">\n'
        f"<title>Time and memory of the exact and the histogram engine over samples</title>\n"
        f"<style>{STYLE}</style>\n{body}</svg>\n"
    )


def panel(x: int, title: str, lines: dict[str, list[tuple[int, float]]]) -> str:
    """One panel whose frame begins at `x`."""
    values = [value for line in lines.values() for _, value in line]
    low, high = (_power(min(values), up=False), _power(max(values), up=True))
    first, last = _power(min(SIZES), up=False), _power(max(SIZES), up=True)

    def across(samples: float) -> float:
        return x + LEFT + WIDE * (math.log10(samples) - first) / (last - first)

    def up(value: float) -> float:
        return TOP + HIGH * (1 - (math.log10(value) - low) / (high - low))

    parts = [f'<text class="title" x="{x + LEFT}" y="18">{title}</text>']
    for power in range(low, high + 1):
        y = up(10.0**power)
        parts.append(f'<line class="grid" x1="{x + LEFT}" x2="{x + LEFT + WIDE}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{x + LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:,g}</text>')
    for power in range(first, last + 1):
        at = across(10.0**power)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{TOP + HIGH}"/>')
        parts.append(f'<text x="{at:.1f}" y="{TOP + HIGH + 18}" text-anchor="middle">{10**power:,}</text>')
    parts.append(f'<text x="{x + LEFT + WIDE / 2:.0f}" y="{TOP + HIGH + 36}" text-anchor="middle">samples</text>')
    for engine, line in lines.items():
        places = [(across(samples), up(value)) for samples, value in line]
        parts.append(f'<path class="{engine}" d="M{" L".join(f"{a:.1f} {b:.1f}" for a, b in places)}"/>')
        parts += [f'<circle class="{engine}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in places]
        (a, b), above = places[0], line[0][1] == max(each[0][1] for each in lines.values())
        parts.append(f'<text class="{engine}" x="{a + 8:.1f}" y="{b + (-14 if above else 18):.1f}">{engine}</text>')
    return "\n".join(parts) + "\n"


def _power(value: float, *, up: bool) -> int:
    return (math.ceil if up else math.floor)(math.log10(value))
