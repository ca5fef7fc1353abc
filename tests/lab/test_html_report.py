import base64
import hashlib
import html.parser
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import metainfluence as mi
from metainfluence.lab.data.places import Place
from metainfluence.lab.show import html_report

HOSTILE = "<script>window.hurt = 1</script>"
IMAGE = '"><img src=x onerror="window.hurt = 1">'
SOLVE = {
    "status": "CONVERGED",
    "num_matvecs": 12,
    "relative_residual": 1e-7,
    "min_curvature": 1e-3,
    "outer_gradient_norm": 2e-3,
    "inner_gradient_norm": 0.0,
    "damping": 1e-3,
}


def table_of(num_tasks=6, labels=None, **metadata):
    """Tasks of one support and two query examples, whose scores are no two alike."""
    count = 4 * num_tasks
    role = np.array(["task", "support", "query", "query"] * num_tasks, object)
    score = np.random.default_rng(0).normal(size=count)
    example = np.ma.MaskedArray(np.arange(count), role == "task")
    task = np.repeat(np.arange(num_tasks), 4)
    return mi.scoring.ScoreTable(task, role, example, score, labels or {}, {"solve": SOLVE, "skipped": [], **metadata})


class Seen(html.parser.HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.attributes, self.text = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def hostile():
    labels = {HOSTILE: np.array([IMAGE] * 24, object), "harm": np.array([HOSTILE, None] * 12, object)}
    run = {"command": f"</pre>{HOSTILE}", IMAGE: [HOSTILE]}
    return html_report.page(table_of(labels=labels, run=run, skipped=[[3, HOSTILE]]), title=f"</title>{HOSTILE}")


def test_text_from_a_file_is_no_markup(hostile):
    seen = Seen(hostile)
    assert seen.elements.count("script") == 1
    assert "img" not in seen.elements
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert HOSTILE in "".join(seen.text)


def test_the_page_allows_its_own_script_alone_and_loads_nothing(hostile):
    seen = Seen(hostile)
    (policy,) = [value for name, value in seen.attributes if name == "content" and "default-src" in value]
    script = hostile.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert not [name for name, _ in seen.attributes if name in ("src", "href", "style")]


def test_long_text_is_cut():
    page = html_report.page(table_of(labels={"note": np.array(["x" * 10_000] * 24, object)}), title="t")
    assert "x" * 201 not in page
    assert "x" * 200 in page


def test_rows_come_from_both_ends_of_each_ranking():
    table = table_of(num_tasks=20)
    shown = html_report.chosen(table, most=6)
    assert len(shown) == 3 * 6
    for role, total in (("task", 20), ("support", 20), ("query", 40)):
        own = shown[table.role[shown[:, 0]] == role]
        assert own[:, 1].tolist() == [1, 2, 3, total - 2, total - 1, total]
        everything = np.sort(table.score[table.role == role])
        assert table.score[own[:, 0]].tolist() == everything[[0, 1, 2, -3, -2, -1]].tolist()
    assert "Shown are 18 of 80 rows" in html_report.page(table, title="t", most=6)


def test_a_small_file_is_shown_whole():
    assert sorted(html_report.chosen(table_of(), most=100)[:, 0].tolist()) == list(range(24))


def test_the_distance_from_stationarity_says_to_what_it_is_relative():
    assert "presumed, not relative to ‖λ‖" in html_report.page(table_of(), title="t")
    assert "presumed, relative to ‖λ‖" in html_report.page(table_of(), title="t", meta_params=jnp.ones(2))


def test_diagnostics_name_what_dominates():
    table = table_of()
    page = html_report.page(table, title="t")
    assert "The solve converged." in page
    assert "λ is not stationary" in page
    failed = table_of(solve={**SOLVE, "status": "INDEFINITE", "min_curvature": -0.1})
    page = html_report.page(failed, title="t")
    assert "The solve failed: the curvature is not positive" in page
    assert "no bound holds" in page
    rounded = html_report.page(table_of(solve={**SOLVE, "status": "INDEFINITE", "min_curvature": 0.1}), title="t")
    assert "The solve failed: no curvature that was met is negative" in rounded


@pytest.mark.parametrize("solve", [None, {}, {**SOLVE, "status": "FINE"}, {**SOLVE, "damping": [1, 2]}, [1]])
def test_metadata_that_reports_on_no_solve(solve):
    with pytest.raises(ValueError, match="scores: expected a report on the solve"):
        html_report.page(table_of(solve=solve), title="t")


def gallery(images):
    task = mi.Task(jnp.asarray(images), jnp.asarray(images), None, jnp.array([True, False, True]))
    places = [Place(0), Place(0, "support", 1), Place(0, "query", 1)]
    return html_report.Gallery([task], lambda side: side, places.__getitem__)


def pixels(text):
    import io

    from PIL import Image

    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(part.partition('"')[0]))))
        for part in text.split("base64,")[1:]
    ]


@pytest.mark.parametrize("tail", [(), (1,), (3,)])
def test_pictures_are_those_of_the_row(tail):
    images = np.arange(3 * 4).reshape(3, 2, 2, *[1] * len(tail)) / 11 * np.ones(tail)
    levels = np.round(images * 255).astype(int)
    levels = levels[..., 0] if tail == (1,) else levels
    pictures = gallery(images)
    np.testing.assert_array_equal(pixels(pictures.pictures(1)), levels[[1]])
    # Padding is no example.
    np.testing.assert_array_equal(pixels(pictures.pictures(2)), levels[[2]])
    np.testing.assert_array_equal(pixels(pictures.pictures(0)), levels[[0, 2]])


def test_images_that_are_none():
    with pytest.raises(ValueError, match=r"images: expected \[n, H, W\]"):
        gallery(np.zeros((3, 2))).pictures(0)


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no chromium with its chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,900"):
        options.add_argument(option)
    driven = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield driven
    driven.quit()


def opened(browser, page, folder):
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    browser.get(path.as_uri())
    return path


def column(browser, number):
    rows = "#ranking tbody tr:not([hidden])"
    return browser.execute_script(
        f"return [...document.querySelectorAll('{rows}')].map(row => row.cells[{number}].textContent)"
    )


def test_a_click_on_a_heading_sorts(browser, tmp_path):
    table = table_of(labels={"word": np.array(["b", "a", None, "c"] * 6, object)})
    opened(browser, html_report.page(table, title="t"), tmp_path)
    headings = browser.find_elements("css selector", "#ranking th button")
    assert [heading.text for heading in headings] == ["rank", "role", "task", "example", "score", "word"]
    expected = [f"{score:+.3e}" for score in np.sort(table.score)]
    assert column(browser, 4) != expected
    headings[4].click()
    assert column(browser, 4) == expected
    headings[4].click()
    assert column(browser, 4) == expected[::-1]
    assert headings[4].find_element("xpath", "..").get_attribute("aria-sort") == "descending"
    # Numbers go by their value, and what is missing is last in either order.
    numbers = [str(k) for k in range(24) if k % 4]
    headings[3].click()
    assert column(browser, 3) == [*numbers, *["–"] * 6]
    headings[3].click()
    assert column(browser, 3) == [*numbers[::-1], *["–"] * 6]
    headings[5].click()
    assert column(browser, 5) == [*"aaaaaabbbbbbcccccc", *["–"] * 6]


def test_rows_are_filtered_by_text(browser, tmp_path):
    opened(browser, html_report.page(table_of(), title="t"), tmp_path)
    field = browser.find_element("id", "filter")
    count = browser.find_element("id", "count")
    assert count.text == "24 of 24 rows"
    field.send_keys("QUERY")
    assert column(browser, 1) == ["query"] * 12
    assert count.text == "12 of 24 rows"
    picture = tmp_path / "page.png"
    assert browser.save_screenshot(str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_nothing_from_a_file_runs(browser, hostile, tmp_path):
    opened(browser, hostile, tmp_path)
    assert browser.execute_script("return window.hurt") is None
    assert browser.find_elements("css selector", "#ranking tbody tr")
    # What escaping might miss, the page's policy stops.
    opened(browser, hostile.replace("<h1>", f"{HOSTILE}<h1>"), tmp_path)
    assert browser.execute_script("return window.hurt") is None
