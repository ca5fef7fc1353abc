import base64
import hashlib
import html.parser
import io
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import metainfluence as mi
from metainfluence.lab.commands import report
from metainfluence.lab.data.places import Place
from metainfluence.lab.show import html_report
from metainfluence.lab.show.gallery import LARGEST, Shown, gallery
from metainfluence.lab.show.page_data import Measured, ranked

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
EXAMPLES = {"support": 1, "query": 2}


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


def data_of(page):
    """What the page hands to its script."""
    text = page.partition('<pre id="data" hidden>')[2].partition("</pre>")[0]
    return json.loads(html.unescape(text))


def floats(packed):
    return np.frombuffer(base64.b64decode(packed), "<f4")


@pytest.fixture
def hostile():
    labels = {
        HOSTILE: np.array([IMAGE] * 24, object),
        "harm": np.array([HOSTILE, None] * 12, object),
        "label": np.array([IMAGE, HOSTILE] * 12, object),
        "__proto__": np.array([HOSTILE, "constructor"] * 12, object),
    }
    run = {"command": f"</pre>{HOSTILE}", IMAGE: [HOSTILE], "training": {"data": {"dataset": HOSTILE}}}
    table = table_of(labels=labels, run=run, skipped=[[3, HOSTILE]])
    task = np.array([f"{HOSTILE}{k // 4}" for k in range(24)], object)
    table = mi.scoring.ScoreTable(task, table.role, table.example, table.score, table.labels, table.metadata)
    measured = Measured("task", 2, -1.0, f"</pre>{HOSTILE}")
    return html_report.page(table, example=lambda row: Shown(text=f"</pre>{HOSTILE}{IMAGE}{row}"), measured=measured)


def test_text_from_a_file_is_no_markup(hostile):
    seen = Seen(hostile)
    assert seen.elements.count("script") == 1
    assert seen.elements.count("pre") == 2
    assert "img" not in seen.elements
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert HOSTILE in "".join(seen.text)
    assert data_of(hostile)["measured"]["after"] == f"</pre>{HOSTILE}"


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


def test_the_title_says_what_it_is_about():
    assert "<title>Which of 6 tasks help, and which harm</title>" in html_report.page(table_of())
    run = {"training": {"data": {"dataset": "omniglot"}}}
    assert "<h1>Which of 6 omniglot tasks help, and which harm</h1>" in html_report.page(table_of(run=run))


def test_all_tasks_are_there_in_the_order_of_their_scores():
    table = table_of(num_tasks=20, labels={"harm": np.repeat(np.array(["clean", "bad"] * 10, object), 4)})
    data = data_of(html_report.page(table, most=6))
    own = table.role == "task"
    order = np.argsort(table.score[own])
    assert data["tasks"]["ids"] == [str(k) for k in order]
    np.testing.assert_allclose(floats(data["tasks"]["scores"]), np.sort(table.score[own]), rtol=1e-6)
    (harm,) = data["tasks"]["columns"]
    assert [harm["values"][code] for code in harm["codes"]] == ["bad" if k % 2 else "clean" for k in order]
    assert sorted(data["shown"]) == [0, 1, 2, 17, 18, 19]
    for role, told in zip(("task", "support", "query"), data["roles"], strict=True):
        scores = np.sort(table.score[table.role == role])
        assert (told["name"], told["count"], told["harmful"]) == (role, len(scores), np.sum(scores < 0))
        np.testing.assert_allclose(floats(told["worst"]), scores, rtol=1e-6)
        assert sum(told["counts"]) == len(scores)
        # No bin holds both harm and help.
        below = np.asarray(told["edges"][1:]) < 1e-9
        assert np.sum(np.asarray(told["counts"])[below]) == np.sum(scores < 0)


def test_examples_belong_to_their_tasks():
    table = table_of(num_tasks=5)
    data = data_of(html_report.page(table, example=lambda row: Shown(text=f"row {row}")))
    for side, found in data["examples"].items():
        for k, rank in enumerate(found["task"]):
            row = int(found["text"][k].removeprefix("row "))
            assert table.role[row] == side
            assert str(table.task[row]) == data["tasks"]["ids"][rank]
            assert found["ids"][k] == str(table.example[row])
            assert floats(found["scores"])[k] == np.float32(table.score[row])


def test_many_tasks_fit_in_three_megabytes(rng):
    """Pictures of noise, the largest there are."""
    num_tasks, per_task = 10_000, 16
    role = np.tile(np.array(["task", *["support"] * 5, *["query"] * 10], object), num_tasks)
    count = len(role)
    table = mi.scoring.ScoreTable(
        np.repeat(np.array([f"a task of number {k}" for k in range(num_tasks)], object), per_task),
        role,
        np.ma.MaskedArray(np.arange(count), role == "task"),
        rng.standard_t(2, size=count),
        {"label": np.array([f"class {k % 64}" for k in range(count)], object)},
        {"solve": SOLVE, "skipped": []},
    )
    made = []

    def example(row):
        made.append(row)
        images = np.random.default_rng(row).random((1, 84, 84, 3))
        return gallery([mi.Task(images, images)], lambda row: Place(0, "query", 0), images=lambda side: side)(row)

    page = html_report.page(table, most=400, example=example)
    assert len(page.encode()) < 3e6
    data = data_of(page)
    assert len(data["tasks"]["ids"]) == num_tasks
    assert len(data["pictures"]) == len(made) == len(set(made)) > 100
    # All tasks that are shown have their examples listed, with or without a picture.
    listed = data["examples"]["query"]["task"]
    assert all(listed.count(task) == 10 for task in data["shown"][:20])


def test_a_file_without_examples_or_tasks():
    whole = table_of()
    for kept in (whole.role == "task", whole.role == "query", whole.role == "none"):
        part = [column[kept] for column in (whole.task, whole.role, whole.example, whole.score)]
        data = data_of(html_report.page(mi.scoring.ScoreTable(*part, {}, whole.metadata)))
        assert sum(role["count"] for role in data["roles"]) == np.sum(kept)
        assert set(data["examples"]["query"]["task"]) <= {-1}


@pytest.mark.parametrize(
    ("changes", "said", "judged"),
    [
        ({"outer_gradient_norm": 1e-6}, "believe it", "good"),
        ({}, "believe the order rather than the numbers: λ that is not trained to the end", "bad"),
        ({"status": "MAX_STEPS"}, "do not believe it: the solve failed", "bad"),
        ({"min_curvature": -1.0}, "do not believe the numbers: λ is no minimum", "bad"),
    ],
)
def test_the_verdict_is_one_sentence_that_says_what_to_believe(changes, said, judged):
    page = html_report.page(table := table_of(solve={**SOLVE, **changes}))
    line = page.partition('<p id="verdict" class="')[2].partition("</p>")[0]
    assert line.startswith(f'{judged}">')
    assert said in line
    assert line.count(". ") == 0
    harmful = table.score[(table.role == "task") & (table.score < 0)]
    assert f"{len(harmful)} of 6 tasks harm" in line
    assert html_report.signed(harmful.sum()) in line


def test_cures_are_options_where_a_command_made_the_file():
    damped = {**SOLVE, "status": "MAX_STEPS", "relative_residual": 0.5}
    assert "raise --max-steps, --damping or --tol" in html_report.page(table_of(solve=damped, run={"score": {}}))
    assert "allow more steps, raise the damping, loosen tol" in html_report.page(table_of(solve=damped))
    unmoving = html_report.page(table_of(run={"training": {}}))
    assert "more --training.num-steps of metainfluence train" in unmoving
    assert "num_newton_steps" not in unmoving


def test_the_scores_are_there_where_no_script_runs():
    table = table_of(num_tasks=60, labels={"harm": np.array(["flipped", "x", "x", "x"] * 60, object)})
    page = html_report.page(table)
    shown = page.partition("<noscript>")[2].partition("</noscript>")[0]
    ranks = ranked(table, "task")
    scores = table.score[ranks]
    rows = [row.partition("</td>")[0] for row in shown.split("<tr><td>")[2:]]
    assert rows == [str(table.task[row]) for row in (*ranks[:10], *ranks[-10:])]
    assert f"{html_report.signed(scores[0])}</td><td>flipped" in shown
    role = data_of(page)["roles"][0]
    (drawn,) = (word for word in html.unescape(shown).split() if "█" in word)
    heights = ["·▁▂▃▄▅▆▇█".index(bar) for bar in drawn.removesuffix("</p><div")]
    assert [height > 0 for height in heights] == [count > 0 for count in role["counts"]]
    assert heights[int(np.argmax(role["counts"]))] == 8
    assert "60 tasks from" in shown


def test_a_run_that_is_not_smooth_is_no_good_news():
    advice = "take a smaller learning rate. " * 6
    measured = {"score": 0.6, "verdict": "between", "advice": advice}
    estimator = "segments: the run is not smooth (0.6): its derivative is exact, and tells little"
    page = html_report.page(
        table_of(solve={**SOLVE, "outer_gradient_norm": 1e-6}, smoothness=measured, estimator=estimator)
    )
    line = page.partition('<p id="verdict" class="')[2].partition("</p>")[0]
    assert line.startswith('bad">')
    assert "the run does not answer the data smoothly" in line
    # Both in full.
    assert f"{estimator}. Smoothness: {advice}" in page


@pytest.mark.parametrize(
    ("value", "bound"), [(0.0136, 0.02), (0.02, 0.02), (0.0961, 0.1), (1e-9, 1e-9), (3.2e-7, 4e-7)]
)
def test_a_bound_is_rounded_up(value, bound):
    assert html_report.rounded_up(value) == bound


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


def placed(data, **options):
    task = mi.Task(jnp.asarray(data), jnp.asarray(data), None, jnp.array([True, False, True]))
    places = [Place(0), Place(0, "support", 1), Place(0, "query", 1), Place(0, "query", 2)]
    return gallery([task], places.__getitem__, **options)


def pixels(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2]))))


@pytest.mark.parametrize("tail", [(), (1,), (3,)])
def test_pictures_are_those_of_the_row(tail):
    images = np.arange(3 * 4).reshape(3, 2, 2, *[1] * len(tail)) / 11 * np.ones(tail)
    levels = np.round(images * 255).astype(int)
    levels = levels[..., 0] if tail == (1,) else levels
    example = placed(images, images=lambda side: side)
    np.testing.assert_array_equal(pixels(example(1).picture), levels[1])
    # Padding is no example.
    np.testing.assert_array_equal(pixels(example(2).picture), levels[2])
    assert example(0) == Shown()
    with pytest.raises(ValueError, match="expected 2 query examples in task 0, got more"):
        example(3)


def test_large_pictures_are_made_small():
    example = placed(np.ones((3, 200, 100, 3)), images=lambda side: side)
    assert pixels(example(1).picture).shape == (LARGEST, LARGEST // 2, 3)


def test_data_that_are_no_images_are_told_in_words():
    data = np.array([[0.5, 2.0], [1.0, -3.25], [0.25, 1e-9]])
    assert placed(data)(1) == Shown(text="1 -3.25")
    assert placed(data)(2) == Shown(text="0.25 1e-09")
    assert placed(np.ones((3, 50)))(1) == Shown()
    assert placed(data, text=lambda side: ["a", "b", "c"])(2) == Shown(text="c")
    with pytest.raises(ValueError, match="text: expected a string for each of 3 support examples, got 2"):
        placed(data, text=lambda side: ["a", "b"])(1)


def test_images_that_are_none():
    with pytest.raises(ValueError, match=r"images: expected \[n, H, W\]"):
        placed(np.zeros((3, 2)), images=lambda side: side)(1)


@pytest.mark.parametrize("kind", [np.uint8, np.float32, jnp.bfloat16, bool])
def test_pictures_have_the_brightness_of_the_images(kind):
    levels = np.array([0, 255], np.uint8) if kind is bool else np.array([0, 64, 255], np.uint8)
    images = np.tile(levels, (3, 2, 1))
    given = images if kind is np.uint8 else np.asarray(images / 255).astype(kind)
    np.testing.assert_allclose(pixels(placed(given, images=lambda side: side)(1).picture), images[1], atol=1)


@pytest.mark.parametrize(("low", "high"), [(0, 255), (-2.1, 2.6), (0, 1.5)])
def test_images_of_another_range_are_refused(low, high):
    images = np.linspace(low, high, 12).reshape(3, 2, 2)
    with pytest.raises(
        ValueError, match=f"images: expected values from 0 to 1, or uint8, got some from {low} to {high}"
    ):
        placed(images, images=lambda side: side)(1)


def written(folder, table, **changes):
    worst = [str(table.task[row]) for row in ranked(table, "task")[:2]]
    change = {"removed": worst, "role": "task", "target before": 1.0, "target after": 0.75}
    change |= {"meta_params": "these", "edited": "those", **changes}
    (folder / "edited.json").write_text(json.dumps(change))


def test_what_was_measured_is_that_of_these_scores(tmp_path):
    table = table_of(run={"meta_params": "these"})
    assert report.measured(tmp_path, table) is None
    written(tmp_path, table)
    assert report.measured(tmp_path, table) == Measured("task", 2, -0.25)
    number = {"mean": 0.5, "half_width": 0.125}
    found = {"metric": "accuracy", "test_tasks": 7, "before": number, "after": number, "after - before": number}
    (tmp_path / "evaluation.json").write_text(json.dumps({**found, "edited": "those"}))
    assert report.measured(tmp_path, table).after == "Accuracy on 7 test tasks: 0.5000 → 0.5000 (+0.5000 ± 0.1250)."
    (tmp_path / "evaluation.json").write_text(json.dumps({**found, "edited": "an earlier edit"}))
    assert report.measured(tmp_path, table).after == ""
    written(tmp_path, table, removed=["0", "1", "2"])
    assert report.measured(tmp_path, table) is None
    written(tmp_path, table, meta_params="others")
    assert report.measured(tmp_path, table) is None
    written(tmp_path, table, **{"target after": float("nan")})
    with pytest.raises(ValueError, match="target after: expected a finite number, got nan"):
        report.measured(tmp_path, table)


@pytest.fixture(scope="module")
def driven():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no chromium with its chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(option)
    driven = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield driven
    driven.quit()


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["desk", "phone"])
def browser(driven, request):
    width, height = request.param
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driven.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    driven.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    return driven


def opened(browser, page, folder):
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    browser.get(path.as_uri())
    told = [line["message"] for line in browser.get_log("browser")]
    assert not told


def texts(browser, selector, within=None):
    return [each.text for each in (within or browser).find_elements("css selector", selector)]


def column(browser, number):
    return texts(browser, f"#ranking tbody td:nth-child({number + 1})")


def as_shown(numbers):
    return [html_report.signed(float(np.float32(number))) for number in numbers]


FLIPPED = np.ma.MaskedArray([False, False, True, False] * 6, [True, False, False, False] * 6)
LABELS = {
    "label": np.array(["cat, dog", "cat", "dog", "cat"] * 6, object),
    "harm": np.array(["flipped labels"] * 4 + ["clean"] * 20, object),
    "label_flipped": FLIPPED,
}


@pytest.fixture(scope="module")
def table():
    return table_of(labels=LABELS, run={"training": {"data": {"dataset": "pets"}}})


@pytest.fixture(scope="module")
def pictures(table):
    measured = Measured("task", 1, -0.125, "Accuracy on 7 test tasks: 0.5 → 0.6.")

    def example(row):
        images = np.full((1, 8, 8), row / 24)
        return gallery([mi.Task(images, images)], lambda row: Place(0, "query", 0), images=lambda side: side)(row)

    return html_report.page(table, example=example, measured=measured)


def test_a_click_leads_from_a_task_to_its_examples(browser, pictures, table, tmp_path):
    opened(browser, pictures, tmp_path)
    worst = ranked(table, "task")[0]
    cards = browser.find_elements("css selector", "#harmful .card")
    assert cards[0].text.splitlines()[0] == f"Task {table.task[worst]}"
    detail = browser.find_element("id", "detail")
    assert not detail.is_displayed()
    cards[0].click()
    assert detail.is_displayed()
    own = table.task == table.task[worst]
    for side, place in zip(EXAMPLES, detail.find_elements("css selector", ".side"), strict=True):
        rows = np.flatnonzero(own & (table.role == side))
        rows = rows[np.argsort(table.score[rows])]
        assert texts(browser, ".item .score", place) == as_shown(table.score[rows])
        assert texts(browser, ".item b", place) == [LABELS["label"][row] for row in rows]
        alternatives = [image.get_attribute("alt") for image in place.find_elements("css selector", "img")]
        assert alternatives == [f"{side} example {row}, labelled {LABELS['label'][row]}" for row in rows]
        loaded = "return [...arguments[0].querySelectorAll('img')].every((image) => image.naturalWidth === 8)"
        assert browser.execute_script(loaded, place)
        wrong = ["wrong" in item.get_attribute("class") for item in place.find_elements("css selector", ".item")]
        assert wrong == [bool(FLIPPED[row]) for row in rows]
    browser.find_element("id", "close").click()
    assert not detail.is_displayed()
    # From the list of all tasks as well.
    browser.find_elements("css selector", "#ranking .go")[-1].click()
    assert detail.is_displayed()
    assert f"Task {table.task[ranked(table, 'task')[-1]]}" in detail.text


# The elements' left, top, right and bottom edges, by one call; those that are not displayed have none.
EDGES = """return [...document.querySelectorAll(arguments[0])].filter((each) => each.offsetParent).map((each) => {
  const box = each.getBoundingClientRect(); return [box.left, box.top, box.right, box.bottom]; })"""


def edges(browser, selector):
    return np.array(browser.execute_script(EDGES, selector), float).reshape(-1, 4)


@pytest.fixture(scope="module")
def wordy():
    """Labels and columns that are long, as those of real data."""
    classes = [f"n{k:08}" for k in range(5)]
    labels = {
        "label": np.array([", ".join(classes), classes[0], classes[1], "a class of a long name"] * 200, object),
        "harm": np.array(["flipped labels"] * 400 + ["clean"] * 400, object),
        "label_flipped": np.ma.MaskedArray([False, True, False, False] * 200, [True, False, False, False] * 200),
        "where_it_was_taken": np.array(["a place of a long name"] * 800, object),
    }
    return table_of(num_tasks=200, labels=labels, run={"training": {"data": {"dataset": "pets"}}})


@pytest.fixture(scope="module")
def wordy_page(wordy):
    images = np.zeros((1, 8, 8))
    example = gallery([mi.Task(images, images)], lambda row: Place(0, "query", 0), images=lambda side: side)
    measured = Measured("task", 1, -0.125, "Accuracy on 200 test tasks: 0.5000 → 0.5125 (+0.0125 ± 0.0025).")
    return html_report.page(wordy, example=example, measured=measured)


def test_support_and_query_stand_side_by_side_on_the_first_screen(browser, wordy_page, tmp_path):
    opened(browser, wordy_page, tmp_path)
    width, height = browser.execute_script("return [innerWidth, innerHeight]")
    card = "#harmful .card:first-child"
    support, query = edges(browser, f"{card} .side")
    assert support[1] == query[1]
    assert support[2] <= query[0]
    assert len(edges(browser, f"{card} img")) == 3
    # Each picture with its label below, and the harm that the task does above.
    for selector, count in ((".item", 3), (".item b", 3), (".head .score.bad", 1)):
        found = edges(browser, f"{card} {selector}")
        assert len(found) == count
        assert np.all((found >= 0) & (found <= [width, height, width, height]))
    histogram = browser.find_element("id", "histogram").rect
    assert histogram["y"] + histogram["height"] < height / 2
    # The slider is below on a phone, and beside the histogram on a desk.
    assert (browser.find_element("id", "worst").rect["y"] > support[3]) == (width < 500)


def test_no_column_is_off_the_screen(browser, wordy_page, tmp_path):
    opened(browser, wordy_page, tmp_path)
    width = browser.execute_script("return innerWidth")
    for role in ("task", "support", "query"):
        choose(browser, role)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert edges(browser, "#ranking td, #ranking th")[:, 2].max() <= width
        rows = browser.execute_script("return document.querySelector('#ranking tbody').innerText")
        assert "flipped labels" in rows
        assert "a place of a long name" in rows


def test_a_label_beside_a_long_text_is_whole(browser, tmp_path):
    text = "a sentence that goes on for longer than the narrow place that it has on a phone, and on"
    table = table_of(num_tasks=2, labels={"label": np.array(["x 0.31"] * 8, object)})
    opened(browser, html_report.page(table, example=lambda row: Shown(text=text)), tmp_path)
    found = edges(browser, ".card .item b")
    assert len(found) == 6
    assert np.all(found[:, 3] - found[:, 1] < 20)


def test_few_rows_come_first_and_then_the_reasons_of_the_verdict(browser, wordy_page, tmp_path):
    opened(browser, wordy_page, tmp_path)
    titles = browser.execute_script("return [...document.querySelectorAll('section h2')].map((each) => each.innerText)")
    places = edges(browser, "section h2")[:, 1]
    assert titles == ["Most harmful tasks", "Most helpful tasks", "All tasks", "Can it be believed"]
    assert list(places) == sorted(places)
    assert len(column(browser, 0)) == 10
    assert places[-1] - places[-2] < 2 * browser.execute_script("return innerHeight")


def test_the_histogram_has_a_scale(browser, wordy_page, tmp_path):
    opened(browser, wordy_page, tmp_path)
    counts = data_of(wordy_page)["roles"][0]["counts"]
    bars, heights, (most, middle) = browser.execute_script(
        "const bars = [...document.querySelectorAll('.bar')], most = document.querySelector('.most');"
        "const place = (each) => each.getBoundingClientRect();"
        "return [bars.map((each) => each.textContent), bars.map((each) => [place(each).left, place(each).height]),"
        "[most.textContent, place(most).left + place(most).width / 2]]"
    )
    assert [int(bar.split()[0]) for bar in bars] == [count for count in counts if count]
    assert most == str(max(counts))
    left = max(heights, key=lambda each: each[1])[0]
    assert abs(middle - left) < 20


def test_the_slider_takes_the_worst_away(browser, pictures, table, tmp_path):
    opened(browser, pictures, tmp_path)
    scores = np.sort(table.score[table.role == "task"])
    slider, predicted, count = (browser.find_element("id", name) for name in ("worst", "predicted", "count"))
    # It begins at what was measured.
    assert count.text == "1 of 6 tasks"
    assert "Measured without the worst 1: −1.25e−1. Accuracy on 7 test tasks: 0.5 → 0.6." in texts(browser, "#measured")
    assert len(browser.find_elements("css selector", "#curve .dot")) == 1
    dark = len(browser.find_elements("css selector", "#histogram .taken"))
    for wanted in (2, 3):
        slider.send_keys("\ue014")  # the arrow to the right
        assert count.text == f"{wanted} of 6 tasks"
        assert html_report.signed(scores.astype(np.float32)[:wanted].sum(dtype=float)) in predicted.text
    assert len(browser.find_elements("css selector", "#histogram .taken")) > dark
    harmful = int(np.sum(scores < 0))
    assert f"{harmful} harm, {6 - harmful} help" in browser.find_element("id", "flagged").text
    choose(browser, "support")
    assert count.text.endswith("of 6 support examples")
    assert texts(browser, "#measured") == [""]


def choose(browser, role):
    browser.find_element("css selector", f"#role option[value={role}]").click()


def background(browser):
    return browser.execute_script("return getComputedStyle(document.body).backgroundColor")


def test_dark_and_light(browser, pictures, tmp_path):
    seen = {}
    for scheme in ("light", "dark"):
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        opened(browser, pictures, tmp_path)
        seen[scheme] = background(browser)
    assert seen["light"] != seen["dark"]
    toggle = browser.find_element("id", "theme")
    toggle.click()
    assert background(browser) == seen["light"]
    toggle.click()
    assert background(browser) == seen["dark"]


def test_a_click_on_a_heading_sorts(browser, tmp_path):
    table = table_of(labels={"word": np.array(["a", "b", "b", None] * 6, object)})
    opened(browser, html_report.page(table, title="t"), tmp_path)
    choose(browser, "query")

    def click(k):
        browser.find_elements("css selector", "#ranking th button")[k].click()

    headings = [text.split(" ")[0] for text in texts(browser, "#ranking th button")]
    assert headings == ["rank", "example", "score", "task", "word"]
    expected = as_shown(np.sort(table.score[table.role == "query"]))
    click(2)
    assert column(browser, 2) == expected
    click(2)
    assert column(browser, 2) == expected[::-1]
    assert browser.find_elements("css selector", "#ranking th")[2].get_attribute("aria-sort") == "descending"
    # Numbers go by their value, and what is missing is last in either order.
    numbers = [str(k) for k in range(24) if k % 4 > 1]
    click(1)
    assert column(browser, 1) == numbers
    click(1)
    assert column(browser, 1) == numbers[::-1]
    for _ in range(2):
        click(4)
        assert column(browser, 4) == ["b"] * 6 + ["–"] * 6


def test_rows_are_filtered_by_text_and_made_as_they_are_asked_for(browser, tmp_path):
    opened(browser, html_report.page(table_of(num_tasks=200), title="t"), tmp_path)
    count, more = browser.find_element("id", "rows"), browser.find_element("css selector", "#more button")
    assert count.text == "200 of 200 rows"
    assert len(column(browser, 0)) == 10
    more.click()
    assert len(column(browser, 0)) == 70
    browser.find_element("id", "filter").send_keys("199")
    assert "199" in column(browser, 1)
    assert count.text == f"{len(column(browser, 0))} of 200 rows"
    assert not more.is_displayed()


def test_nothing_from_a_file_runs(browser, hostile, tmp_path):
    opened(browser, hostile, tmp_path)
    browser.find_element("css selector", ".card").click()
    assert HOSTILE in browser.find_element("id", "detail").text
    browser.find_element("id", "close").click()
    for role in ("support", "query"):
        choose(browser, role)
    assert browser.execute_script("return window.hurt") is None
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.find_elements("css selector", "#ranking tbody tr")
    # What escaping might miss, the page's policy stops.
    path = tmp_path / "page.html"
    path.write_text(hostile.replace("<h1>", f"{HOSTILE}<h1>"), encoding="utf-8")
    browser.get(path.as_uri())
    assert browser.execute_script("return window.hurt") is None
    browser.get_log("browser")
