"""The report: one file, whatever a store holds; drawn and measured in a real Chromium."""

import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.consumers.audits import HOSTILE, empty_audit, made_up_audit
from tests.consumers.browser import CHROMIUM, Browser, browser
from trajstore_audit.report import render_report
from trajstore_audit.report.plots import load_steps, nice_limit, share_bounds, share_steps, steps_svg
from trajstore_audit.report.sections import comparison
from trajstore_audit.thresholds import check_thresholds, parse_threshold

in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")

AUDITS = {
    "full": made_up_audit,
    "sampled": lambda: made_up_audit(sampled=True),
    "hostile": lambda: made_up_audit(hostile=True),
    "large": lambda: made_up_audit(layers=94, experts=512),
    "small": lambda: made_up_audit(layers=1, experts=2),
    "empty": empty_audit,
}

WIDTHS = (1280, 390)


class Tags(HTMLParser):
    """Every tag and its attributes, and whether what was opened is closed in order."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"


@pytest.mark.parametrize("name", AUDITS)
def test_the_page_is_well_formed_and_fetches_nothing(name):
    page = render_report(AUDITS[name]())
    tags = Tags(page)
    assert tags.open == []
    assert {tag for tag, _ in tags.found} & {"script", "img", "link", "iframe", "object", "form"} == set()
    for _, attributes in tags.found:
        assert not any(key.startswith("on") for key in attributes), attributes
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith(("#", "https://", "http://joschu.net/"))
    assert not re.search(r"@import|url\(", page)


def test_what_a_sample_may_have_missed_does_not_hide_the_other_bars():
    """A layer without drift among others of some percent: its interval is told, and is no whisker."""
    audit = made_up_audit(sampled=True)
    first = audit.segments.layers[0].counts
    first.differing, first.spread.cd, first.spread.dd, first.trajectories = 0, 0.0, 0.0, 5
    assert audit.interval(first).high > 0.5
    layers = comparison(audit, "segments", audit.segments).layers
    assert layers.heads[1] == "0 to 20 %"
    (_, drawn, texts), (_, other, _), *_ = layers.rows
    assert ("whisker" in drawn, "whisker" in other) == (False, True)
    assert texts[1].startswith("0\N{EN DASH}")


@pytest.mark.parametrize("name", AUDITS)
def test_every_link_inside_the_page_leads_somewhere(name):
    tags = Tags(render_report(AUDITS[name]()))
    targets = {attributes.get("id") for _, attributes in tags.found}
    wanted = {attributes["href"][1:] for tag, attributes in tags.found if tag == "a" and attributes["href"][0] == "#"}
    assert wanted <= targets


def test_what_a_store_says_is_text():
    page = render_report(made_up_audit(hostile=True))
    assert HOSTILE not in page
    assert "<script>document" not in page
    assert "&lt;script&gt;document.x=1&lt;/script&gt;" in page
    assert "{{7*7}}" in page
    assert "\x1b" not in page


def test_the_password_of_a_place_is_not_in_the_page():
    page = render_report(made_up_audit())
    assert "redis://host:6379/0?run=exp1" in page
    assert "geheim" not in page


def test_the_page_tells_which_thresholds_failed():
    audit = made_up_audit()
    texts = ("router_disagreement>0.01", "findings>9")
    page = render_report(audit, outcomes=check_thresholds([parse_threshold(text) for text in texts], audit))
    assert re.search(r'class="failed"><b>fails</b> <code>router_disagreement&gt;0.01', page)
    assert re.search(r'class="passed"><b>passes</b> <code>findings&gt;9', page)


def test_an_empty_audit_says_so():
    page = render_report(empty_audit())
    assert "Nothing to compare: no rows were recorded twice." in page
    assert "<svg" not in page


def test_a_real_models_page_is_small_enough_to_send():
    assert len(render_report(made_up_audit(layers=94, experts=512)).encode()) < 3_000_000
    assert len(render_report(made_up_audit()).encode()) < 600_000


def test_colours_of_shares_tell_none_from_little_and_nothing_compared():
    shares = np.array([[0.0, 1e-9, 0.01, 0.2, np.nan, 0.5]])
    assert share_steps(shares, 0.2).tolist() == [[0, 1, 3, 9, -1, 9]]
    bounds = share_bounds(0.2)
    for step, bound in enumerate(bounds, 1):
        assert share_steps(np.array([[bound]]), 0.2).tolist() == [[step]]
        assert share_steps(np.array([[bound * 1.001]]), 0.2).tolist() == [[min(step + 1, 9)]]


def test_colours_of_loads_are_multiples_of_the_mean():
    ratios = [0.0, 0.01, 0.125, 0.25, 0.5, 0.57, 0.62, 0.7, 0.9, 1.0, 1.1, 1.4, 2.0, 4.0, 8.0, 99.0, np.nan]
    assert load_steps(np.array([ratios])).tolist() == [[0, 1, 1, 2, 3, 3, 4, 4, 5, 5, 5, 6, 7, 8, 9, 9, -1]]


@pytest.mark.parametrize(
    ("value", "limit"), [(0.03, 0.05), (0.05, 0.05), (0.11, 0.2), (0.7, 1.0), (1.0, 1.0), (3e-7, 5e-7), (0.0, 1.0)]
)
def test_an_axis_ends_at_a_round_number(value, limit):
    assert nice_limit(value) == pytest.approx(limit)


def test_neighbours_of_one_colour_are_one_shape_and_none_is_lost():
    steps = np.random.default_rng(0).integers(-1, 4, (20, 30)).astype(np.int8)
    drawn = np.full(steps.shape, -1, np.int8)
    for step, path in re.findall(r'class="b(\d)" d="([^"]*)"', steps_svg(steps, "b", alt="loads")):
        for start, row, count in re.findall(r"M(\d+) (\d+)h(\d+)v1H\1z", path):
            drawn[int(row), int(start) : int(start) + int(count)] = int(step)
    np.testing.assert_array_equal(drawn, steps)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def opened(chromium: Browser, folder: Path, name: str, **options) -> None:
    page = folder / f"{name}.html"
    page.write_text(render_report(AUDITS[name](), made=1.7e9), encoding="utf-8")
    chromium.open(page, **options)


@in_chromium
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", AUDITS)
def test_nothing_overflows_nothing_is_fetched_and_nothing_runs(chromium, tmp_path, name, width):
    opened(chromium, tmp_path, name, width=width)
    scroll, client = chromium.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert scroll <= client == width
    outside = chromium.evaluate(
        "[...document.querySelectorAll('body *')].filter(one => !one.closest('.scroll, svg'))"
        ".filter(one => one.getBoundingClientRect().right > innerWidth + 1).map(one => one.outerHTML.slice(0, 80))"
    )
    assert outside == []
    assert chromium.evaluate("document.x === undefined")
    assert chromium.errors == []
    assert {url.split("/")[-1] for url in chromium.requests} <= {f"{one}.html" for one in AUDITS}


def boxes_of(chromium: Browser, selector: str) -> list[tuple[int, int, int, int]]:
    """Left, top, right and bottom of what can be seen, in pixels of the whole page."""
    found = chromium.evaluate(
        f"[...document.querySelectorAll('{selector}')].filter(one => one.checkVisibility()).map(one => "
        "(box => [box.left + scrollX, box.top + scrollY, box.right + scrollX, box.bottom + scrollY])"
        "(one.getBoundingClientRect()))"
    )
    return [tuple(map(round, box)) for box in found]


def colours_of(chromium: Browser, family: str, count: int) -> np.ndarray:
    """What the legend shows for each step, `[count, 3]`."""
    said = chromium.evaluate(
        f"[...Array({count}).keys()].map(step => "
        f"getComputedStyle(document.querySelector('.legend .{family}' + step)).backgroundColor)"
    )
    return np.array([[int(part) for part in re.findall(r"\d+", one)] for one in said])


@in_chromium
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_cell_of_a_heatmap_has_the_colour_that_the_legend_gives_it(chromium, tmp_path, width, scheme):
    audit = AUDITS["sampled"]()
    opened(chromium, tmp_path, "sampled", width=width, scheme=scheme)
    picture = chromium.picture(tmp_path / "page.png")
    height, wide = picture.shape[:2]
    assert struct.unpack(">II", (tmp_path / "page.png").read_bytes()[16:24]) == (wide, height)
    expected = []
    for drift in (audit.segments, audit.observations):
        shares = drift.positions.shares
        expected.append(("r", 10, share_steps(shares, nice_limit(float(np.nanmax(shares))))))
        load = drift.load.second
        expected.append(("b", 10, load_steps(load / load.mean(axis=1, keepdims=True))))
    for (family, count, steps), (left, top, right, bottom) in zip(
        expected, boxes_of(chromium, "svg.heat"), strict=True
    ):
        rows, columns = steps.shape
        y = top + (np.arange(rows) + 0.5) * (bottom - top) / rows
        x = left + (np.arange(columns) + 0.5) * (right - left) / columns
        drawn = picture[y.astype(int)][:, x.astype(int)]
        right_colour = (drawn == colours_of(chromium, family, count)[steps]).all(axis=2)[steps >= 0]
        # Where a cell is narrower than two pixels, the middle of some lies on their neighbour's.
        assert right_colour.mean() > (0.97 if (right - left) / columns >= 3 else 0.7)
        assert len(np.unique(steps[steps >= 0])) >= 5


@in_chromium
@pytest.mark.parametrize("width", WIDTHS)
def test_bars_are_as_long_as_their_shares(chromium, tmp_path, width):
    opened(chromium, tmp_path, "full", width=width)
    picture = chromium.picture().astype(int)
    fill = chromium.evaluate("getComputedStyle(document.querySelector('.bar')).fill")
    ink = np.array([int(part) for part in re.findall(r"\d+", fill)])
    drift = AUDITS["full"]().segments
    for selector, shares in (
        ("#segments .columns figure:first-child svg", [gap.counts.share for gap in drift.version_gaps]),
        ("#segments .measure svg", [one.share for one in drift.worst[:5]]),
    ):
        limit = nice_limit(max(shares))
        for share, (left, top, right, bottom) in zip(shares, boxes_of(chromium, selector), strict=True):
            line = picture[(top + bottom) // 2, left:right]
            length = int((np.abs(line - ink).sum(axis=1) < 30).sum())
            assert length == pytest.approx(share / limit * (right - left), abs=1.5)


@in_chromium
def test_text_is_legible_against_its_ground(chromium, tmp_path):
    """WCAG 2's contrast of at least 4.5 for every text of the page, in both schemes."""
    contrast = """(() => {
      const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
        .map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
        return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
      const ground = one => { for (; one; one = one.parentElement) {
        const c = getComputedStyle(one).backgroundColor; if (!/, 0\\)$/.test(c)) return c; }
        return 'rgb(255,255,255)'; };
      const texts = [...document.querySelectorAll('body *')].filter(one => !one.closest('svg') &&
        [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim()));
      return texts.map(one => { const a = light(getComputedStyle(one).color), b = light(ground(one));
        return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), one.outerHTML.slice(0, 80)]; })
        .filter(([ratio]) => ratio < 4.5).slice(0, 5);
    })()"""
    for scheme in ("light", "dark"):
        opened(chromium, tmp_path, "full", width=1280, scheme=scheme)
        assert chromium.evaluate(contrast) == []


@in_chromium
def test_paper_is_white_and_shows_what_a_click_would_but_for_the_widest_tables(chromium, tmp_path):
    opened(chromium, tmp_path, "full", width=794, scheme="dark", media="print")
    picture = chromium.picture()
    assert picture[2, 2].tolist() == [255, 255, 255]
    heights = "[...document.querySelectorAll('details{} > :last-child')].map(one => one.getBoundingClientRect().height)"
    shown, hidden = chromium.evaluate(heights.format(".paper")), chromium.evaluate(heights.format(":not(.paper)"))
    assert len(shown) > 2
    assert all(height > 10 for height in shown)
    assert set(hidden) == {0}  # too wide for any paper


@in_chromium
def test_every_plot_has_words_for_those_who_cannot_see_it(chromium, tmp_path):
    opened(chromium, tmp_path, "full", width=1280)
    silent = (
        "[...document.querySelectorAll('svg')].filter(one => !(one.getAttribute('aria-label') || "
        "(one.getAttribute('aria-hidden') === 'true' && one.closest('tr, .axes, .measure')))).length"
    )
    assert chromium.evaluate(silent) == 0
    with_table = (
        "[...document.querySelectorAll('figure.plot')].every(one => one.querySelector('table') || "
        "one.nextElementSibling.querySelector('table'))"
    )
    assert chromium.evaluate(with_table)
