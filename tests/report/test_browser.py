"""The page in Chromium: no error, no request, nothing wider than the window, and its scripts at work."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from tests.report.test_attributed import attribution
from tests.report.test_inverses import ERRORS, RESIDUALS, TIMINGS
from tests.report.test_reviewed import found_of
from tests.report.test_reviewed import records as suspicious

from allmend.report.attributed import write_attributed
from allmend.report.inverses import write_inverses
from allmend.report.page import write_report
from allmend.report.reviewed import write_reviewed

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
SIZES = [(1280, 900), (375, 800)]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Debian's chromium")]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    yield driver
    driver.quit()


def resize(browser: webdriver.Chrome, width: int, height: int) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def requests(browser: webdriver.Chrome) -> set[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}


def test_is_silent_and_fits_in_both_themes_and_sizes(browser: webdriver.Chrome, run: Path) -> None:
    page = write_report(run).as_uri()
    browser.get("about:blank")
    requests(browser)  # those of the browser's own first page
    colours = set()
    for scheme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        for width, height in SIZES:
            resize(browser, width, height)
            browser.get(page)
            browser.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
            assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
            colours.add(browser.execute_script("return getComputedStyle(document.documentElement).backgroundColor"))
    assert len(colours) == 2
    assert browser.get_log("browser") == []
    assert {url for url in requests(browser) if not url.startswith("data:")} == {page}


def test_toggle_turns_the_theme(browser: webdriver.Chrome, run: Path) -> None:
    browser.get(write_report(run).as_uri())
    colour = "return getComputedStyle(document.documentElement).backgroundColor"
    before = browser.execute_script(colour)
    browser.find_element(By.ID, "theme").click()
    assert browser.execute_script(colour) != before
    browser.find_element(By.ID, "theme").click()
    assert browser.execute_script(colour) == before


def test_everything_unfolds_and_folds_at_once(browser: webdriver.Chrome, run: Path) -> None:
    browser.get(write_report(run).as_uri())
    button, count = browser.find_element(By.ID, "unfold"), "return document.querySelectorAll('details{}').length"
    every = browser.execute_script(count.format(""))
    assert every > 5
    for words, opened in (("Fold all", every), ("Unfold all", 0)):
        button.click()
        assert browser.execute_script(count.format("[open]")) == opened
        WebDriverWait(browser, 5).until(lambda _, words=words: button.text == words)


def test_the_questions_are_answered_on_the_first_screen(browser: webdriver.Chrome, run: Path) -> None:
    resize(browser, 1280, 900)
    browser.get(write_report(run).as_uri())
    cards = browser.find_elements(By.CSS_SELECTOR, "#summary .findings li")
    assert {"Did it help?", "Whom did it help?", "What left each member?", "What did it cost?"} <= {
        card.find_element(By.TAG_NAME, "h3").text for card in cards
    }
    assert all(card.location["y"] < 900 for card in cards)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_measures_unfold_and_verdicts_do_not_lean_on_colour(
    browser: webdriver.Chrome, run: Path, width: int, height: int
) -> None:
    resize(browser, width, height)
    browser.get(write_report(run).as_uri())
    measure = browser.find_element(By.CSS_SELECTOR, "#memorisation details.measure")
    assert "fedavg, 10 copies" in measure.text
    assert not measure.find_element(By.TAG_NAME, "table").is_displayed()
    measure.find_element(By.TAG_NAME, "summary").send_keys(Keys.ENTER)
    assert measure.find_element(By.TAG_NAME, "table").is_displayed()
    said = {badge.text for badge in browser.find_elements(By.CSS_SELECTOR, "#memorisation .answers .verdict")}
    assert said == {"▲ memorised", "○ nothing came out"}


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_legend_hides_and_shows_a_series(browser: webdriver.Chrome, run: Path, width: int, height: int) -> None:
    resize(browser, width, height)
    browser.get(write_report(run).as_uri())
    figure = browser.find_element(By.CSS_SELECTOR, "#learning figure")
    key = figure.find_element(By.CSS_SELECTOR, ".legend button")
    series = figure.find_elements(By.CSS_SELECTOR, f'.series[data-series="{key.get_attribute("data-series")}"]')
    assert len(series) == 2  # one in each arm's chart
    assert all(s.is_displayed() for s in series)
    key.send_keys(Keys.ENTER)
    assert key.get_attribute("aria-pressed") == "false"
    assert not any(s.is_displayed() for s in series)
    key.send_keys(Keys.SPACE)
    assert all(s.is_displayed() for s in series)


def test_tooltip_by_pointer_and_by_keys(browser: webdriver.Chrome, run: Path) -> None:
    resize(browser, *SIZES[0])
    browser.get(write_report(run).as_uri())
    tip = browser.find_element(By.ID, "tip")
    assert not tip.is_displayed()
    point = browser.find_element(By.CSS_SELECTOR, "#utility .pt .m")
    browser.execute_script("arguments[0].scrollIntoView({ block: 'center' })", point)
    ActionChains(browser).pause(0.3).move_to_element(point).perform()
    assert tip.is_displayed()
    assert "base model on pooled" in tip.text
    assert "95 % interval" in tip.text.replace("\u202f", " ")
    first = browser.find_element(By.CSS_SELECTOR, "#memorisation .pt")
    browser.execute_script("arguments[0].focus({ preventScroll: true })", first)
    said = tip.text
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT).perform()
    assert tip.is_displayed()
    assert tip.text != said
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert not tip.is_displayed()


def test_a_cell_is_pointed_at_wherever_the_pointer_is_in_it(browser: webdriver.Chrome, tmp_path: Path) -> None:
    resize(browser, *SIZES[0])
    page = write_attributed(tmp_path / "page.html", attribution(targets=("a", "b")))
    browser.get(page.as_uri())
    cells = browser.find_elements(By.CSS_SELECTOR, "#clients .pt .cell")
    tip = browser.find_element(By.ID, "tip")
    browser.execute_script("arguments[0].scrollIntoView({ block: 'center' })", cells[0])
    for cell, words in zip(cells, ("east for a", "east for b", "north for a", "north for b"), strict=True):
        for side in (-1, 1):  # far from its middle, nearer to that of the next row
            aside = int(side * (cell.size["width"] / 2 - 3))
            ActionChains(browser).pause(0.2).move_to_element_with_offset(cell, aside, 0).perform()
            assert tip.text.startswith(words)


def test_other_pages_are_silent_and_fit(browser: webdriver.Chrome, tmp_path: Path) -> None:
    some = suspicious(60)
    pages = [
        write_attributed(tmp_path / "attributed.html", attribution(targets=("a", "a long name of a target"))),
        write_reviewed(tmp_path / "list.html", some, found_of(some), verdict="Nothing.", facts=[], settings=[]),
        write_inverses(
            tmp_path / "inverses.html",
            residuals=RESIDUALS,
            errors=ERRORS,
            without_steps={"none": 0.5},
            timings=TIMINGS,
            verdict="Nothing.",
            about_steps=[],
            about_times="",
            facts=[],
        ),
    ]
    for page in pages:
        for width, height in SIZES:
            resize(browser, width, height)
            browser.get(page.as_uri())
            browser.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
            assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.get_log("browser") == []


def test_a_trace_says_where_on_it_one_is(browser: webdriver.Chrome, tmp_path: Path) -> None:
    resize(browser, *SIZES[0])
    some = suspicious(60)
    page = write_reviewed(tmp_path / "list.html", some, found_of(some), verdict="Nothing.", facts=[], settings=[])
    browser.get(page.as_uri())
    chart = browser.find_element(By.CSS_SELECTOR, "#found svg.chart")
    ActionChains(browser).pause(0.3).move_to_element(chart).perform()
    tip = browser.find_element(By.ID, "tip").text
    assert re.fullmatch(r"(influence|loss|chance), [\d.]+ % of records reviewed\n[\d.]+ % of the wrong ones found", tip)


def test_tables_sort_by_value(browser: webdriver.Chrome, run: Path) -> None:
    browser.get(write_report(run).as_uri())
    head = browser.find_element(By.XPATH, "//section[@id='data']//th[contains(., 'Training records')]")
    head.find_element(By.TAG_NAME, "button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    rows = browser.find_elements(By.CSS_SELECTOR, "#data tbody tr")
    values = [float(row.find_elements(By.TAG_NAME, "td")[0].get_attribute("data-v") or "nan") for row in rows]
    assert values == sorted(values)


def test_is_whole_without_scripts(browser: webdriver.Chrome, run: Path) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    browser.get(write_report(run).as_uri())
    assert len(browser.find_elements(By.CSS_SELECTOR, "svg.chart .pt title")) > 40
    assert not browser.find_element(By.ID, "theme").is_displayed()
    assert browser.find_element(By.CSS_SELECTOR, "#utility .legend button").is_displayed()
