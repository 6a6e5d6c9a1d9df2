"""The report pages in a real browser: nothing fails, nothing collides, on a phone and a desk, in light and in dark."""

import json
import os
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest
import report_example

from verify import pages_html, pages_index

REPORTS = Path(__file__).parents[1] / "reports"
WIDTHS = (390, 1280)
DARK = {"light": 1, "dark": 0}

# Measures every page, each in a frame of its own width; the answer ends up in the document's text.
HARNESS = """<!DOCTYPE html><meta charset=utf-8><body>FRAMES<script>
const box = e => e.getBoundingClientRect()
const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2 &&
  Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3
function parts(colour) { return colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255) }
function luminance(colour) {
  const [r, g, b] = parts(colour).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  return 0.2126 * r + 0.7152 * g + 0.0722 * b }
function contrast(a, b) {
  const [dark, light] = [luminance(a), luminance(b)].sort((p, q) => p - q)
  return (light + 0.05) / (dark + 0.05) }
function measure(frame) {
  const view = frame.contentWindow, page = view.document, collisions = []
  const css = e => view.getComputedStyle(e)
  for (const svg of page.querySelectorAll('svg.plot')) {
    const texts = [...svg.querySelectorAll('text')], edge = box(svg)
    texts.forEach((t, i) => {
      if (box(t).left < edge.left - 1 || box(t).right > edge.right + 1) collisions.push(t.textContent + ' | edge')
      for (const u of texts.slice(i + 1))
        if (meet(box(t), box(u))) collisions.push(t.textContent + ' | ' + u.textContent)
    })
  }
  const paper = css(page.body).backgroundColor, figure = page.querySelector('figure')
  const card = figure ? css(figure).backgroundColor : paper
  const contrasts = [contrast(css(page.body).color, paper)]
  for (const t of page.querySelectorAll('svg.plot .label')) contrasts.push(contrast(css(t).fill, card))
  for (const t of page.querySelectorAll('.verdict')) contrasts.push(contrast(css(t).color, paper))
  const floors = [...page.querySelectorAll('svg path.floor')]
  return {width: view.innerWidth, overflow: page.documentElement.scrollWidth - view.innerWidth,
    pictures: page.querySelectorAll('svg').length, rows: page.querySelectorAll('tbody tr').length,
    maths: page.querySelectorAll('math').length, requests: view.performance.getEntriesByType('resource').length,
    collisions, paper, contrast: Math.min(...contrasts),
    floors: floors.map(p => contrast(css(p).fill, card)),
    smallest: Math.min(...[...page.querySelectorAll('svg.plot text')].map(t => box(t).height))}
}
function sorted(frame) {
  const page = frame.contentWindow.document, header = page.querySelectorAll('.index th[data-sort] button')
  const names = () => [...page.querySelectorAll('.index tbody tr')].map(r => r.cells[0].textContent)
  const seen = []
  for (const button of header) { button.click(); seen.push(names()); button.click(); seen.push(names()) }
  header[0]?.click()
  return {orders: seen, names: names()}
}
onload = () => setTimeout(() => {
  const found = {}
  for (const frame of document.querySelectorAll('iframe'))
    found[frame.name] = {...measure(frame), ...(frame.name.startsWith('index') ? sorted(frame) : {})}
  document.body.innerHTML = '<pre id=result></pre>'
  document.getElementById('result').textContent = JSON.stringify(found)
}, 500)
</script>"""


def chromium():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None and os.environ.get("CI") == "true":
        pytest.fail("no chromium here, and this check must not be left out: install the package chromium")
    if found is None:
        pytest.skip("no chromium here: install the package chromium to open the pages in it")
    return found


@pytest.fixture(scope="module")
def pages():
    """Pages made from the data of one activation and its index, and all that are committed, training runs' too."""
    data = report_example.example()
    made = {"made": pages_html.page(data), "index_made": pages_index.page([data, {**data, "activation": "another"}])}
    committed = {path.stem: path.read_text(encoding="utf-8") for path in sorted(REPORTS.glob("*.html"))}
    runs = {f"training_{path.stem}": path.read_text(encoding="utf-8") for path in (REPORTS / "training").glob("*.html")}
    return {**made, **committed, **runs}


@pytest.fixture(scope="module", params=DARK)
def opened(request, pages, tmp_path_factory):
    """What the browser measured, by page and width, what it complained of, and the colour scheme."""
    folder = tmp_path_factory.mktemp(request.param)
    frames = "".join(
        f'<iframe name="{name}-{width}" width="{width}" height="900" style="border:0" srcdoc="{escape(text)}"></iframe>'
        for name, text in pages.items()
        for width in WIDTHS
    )
    harness = folder / "harness.html"
    harness.write_text(HARNESS.replace("FRAMES", frames), encoding="utf-8")
    page, complaints = dumped(harness, folder / "user", request.param)
    result = re.search(r'<pre id="result">(.*?)</pre>', page, re.DOTALL)
    assert result, page[-2000:]
    return json.loads(unescape(result[1])), complaints, request.param


def dumped(page, user, scheme):
    """The page's document once its scripts have run, and the lines that the browser's console got."""
    command = [
        chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", f"--user-data-dir={user}",
        "--window-size=1400,1000", f"--blink-settings=preferredColorScheme={DARK[scheme]}",
        "--enable-logging=stderr", "--virtual-time-budget=60000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_a_missing_browser_fails_where_nobody_looks_and_is_told_elsewhere(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="install the package chromium"):
        chromium()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="install the package chromium"):
        chromium()


def test_a_complaint_of_the_browser_would_be_seen(tmp_path):
    page = tmp_path / "broken.html"
    page.write_text("<!DOCTYPE html><title>broken</title><script>nothing()</script>")
    (complaint,) = dumped(page, tmp_path / "user", "light")[1]
    assert "nothing is not defined" in complaint


def test_the_browser_complains_of_nothing(opened):
    assert opened[1] == []


def test_pages_show_pictures_tables_and_formulas(opened):
    for name, seen in opened[0].items():
        assert seen["pictures"] >= 2 or name.startswith("training_index"), name
        assert seen["rows"] >= 2, name
        if not name.startswith(("index", "training_")):
            assert seen["maths"] >= 1, name


def test_pages_fetch_nothing(opened):
    assert {name: seen["requests"] for name, seen in opened[0].items() if seen["requests"]} == {}


def test_pages_are_as_wide_as_the_screen_and_no_wider(opened):
    for name, seen in opened[0].items():
        # A scroll bar at the side may take up to 20 pixels.
        assert name.endswith(f"-{WIDTHS[0]}") == (seen["width"] <= WIDTHS[0])
        assert seen["overflow"] <= 20, name


def test_no_text_of_a_picture_covers_another_or_is_cut_off(opened):
    assert {name: seen["collisions"] for name, seen in opened[0].items() if seen["collisions"]} == {}


def test_text_stands_out_from_its_ground(opened):
    # The accessibility guidelines (WCAG 2.2, 1.4.3) ask for 4.5.
    assert {name: seen["contrast"] for name, seen in opened[0].items() if seen["contrast"] < 4.5} == {}


def test_the_floor_stands_out_from_its_ground(opened):
    for name, seen in opened[0].items():
        if not name.startswith(("index", "training_")):
            assert seen["floors"], name
            assert min(seen["floors"]) > 1.3, name


def test_text_in_pictures_can_be_read_on_a_phone(opened):
    # 11 px text has boxes about 13 px high; at 8 px they are 9.5 px.
    for name, seen in opened[0].items():
        if not name.startswith(("index", "training_index")):
            assert seen["smallest"] > 9.5, name


def test_dark_is_dark(opened):
    dark = opened[2] == "dark"
    for name, seen in opened[0].items():
        red = int(re.findall(r"\d+", seen["paper"])[0])
        assert (red < 64) == dark, name


def test_the_index_sorts_by_every_column_and_loses_no_row(opened):
    for name, seen in opened[0].items():
        if name.startswith("index"):
            assert all(sorted(order) == sorted(seen["names"]) for order in seen["orders"])
            assert seen["orders"][0] == sorted(seen["names"], key=str.lower) or seen["orders"][0] == sorted(
                seen["names"]
            )
            assert seen["orders"][1] == seen["orders"][0][::-1]
