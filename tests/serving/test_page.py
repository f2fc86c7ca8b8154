"""The page for people in a real headless browser, in front of the real service."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome here")

ROOT = Path(__file__).parents[2]
WITHIN_MS = 10_000
MINUS = "\N{MINUS SIGN}"
KEY = "a key for tests"

Json = dict[str, Any]


@contextmanager
def started(exported: Path, purchases: Path, key: str | None) -> Iterator["subprocess.Popen[str]"]:
    """Start the service on a free port; its first line of output will tell the address."""
    environment = {k: v for k, v in os.environ.items() if k != "RANKER_API_KEY"}
    if key is not None:
        environment["RANKER_API_KEY"] = key
    store = f"parquet:{purchases}?now=2024-02-01T00:00:00"
    command = [sys.executable, "-m", "serving.serve_cli", "--bundle", str(exported)]
    command += ["--port", "0", "--workers", "1", "--store", store, "--deadline-ms", "10000"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def addresses(tiny_exported: Path, tiny_dataset: Path) -> Iterator[list[str]]:
    """Two services: one for everybody, and one that asks for `KEY`."""
    purchases = tiny_dataset / "purchases.parquet"
    with (
        started(tiny_exported, purchases, None) as for_all,
        started(tiny_exported, purchases, KEY) as with_key,
    ):
        yield [address_of(process) for process in (for_all, with_key)]


def address_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    ready = re.search(r"http://\S+", process.stdout.readline())
    assert ready is not None, "the service did not start"
    return ready[0]


@pytest.fixture(scope="module")
def url(addresses: list[str]) -> str:
    return addresses[0]


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=BROWSER, args=arguments)
        yield launched
        launched.close()


@pytest.fixture
def page(browser: "sync_api.Browser", url: str) -> Iterator["sync_api.Page"]:
    """The page, loaded, with an example chosen; a script's error fails the test."""
    errors: list[str] = []
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.set_default_timeout(WITHIN_MS)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda m: errors.append(m.text) if "Refused to" in m.text else None)
    opened.goto(url)
    opened.wait_for_selector("#example option:nth-child(2)", state="attached")
    yield opened
    opened.close()
    assert errors == []


def rank(page: "sync_api.Page") -> tuple[Json, Json, Json]:
    """Press "Rank"; returns the request that was sent, its answer and its explanation."""
    with (
        page.expect_response("**/v1/rank") as ranked,
        page.expect_response("**/v1/explain") as explained,
    ):
        page.click("#rank")
    request = json.loads(ranked.value.request.post_data)
    sync_api.expect(page.get_by_text("being worked out")).to_have_count(0)
    return request, ranked.value.json(), explained.value.json()


def rows(page: "sync_api.Page") -> list[tuple[str, float]]:
    """Return product id and probability of each candidate, as they stand on the page."""
    found = page.eval_on_selector_all(
        "#ranked > li", "all => all.map(i => [i.dataset.product, Number(i.dataset.probability)])"
    )
    return [(product, probability) for product, probability in found]


@needs_browser
def test_types_a_user_and_a_query_and_sees_the_services_ranking(
    page: "sync_api.Page", url: str
) -> None:
    queries = page.eval_on_selector_all("#queries option", "all => all.map(o => o.value)")
    assert len(queries) > 1
    page.fill("#user", "12")
    page.fill("#query", queries[1])
    page.locator("#query").press("Tab")  # a known query brings its candidates
    request, answer, _ = rank(page)
    assert request["user_id"] == 12
    assert request["query"] == queries[1]
    again = httpx.post(f"{url}/v1/rank", json=request).json()
    assert again["probabilities"] == answer["probabilities"]
    products = [str(product) for product in request["candidates"]["product_id"]]
    order = again["order"]
    assert len(order) > 2
    assert rows(page) == [(products[i], again["probabilities"][i]) for i in order]
    numbers = page.locator(".share").all_inner_texts()
    shown = [float(number.rstrip("%")) / 100 for number in numbers]
    assert shown == pytest.approx([again["probabilities"][i] for i in order], rel=5e-3)
    status = page.inner_text("#status")
    assert status.startswith(f"{len(order)} candidates in ")
    assert status.endswith(f"by model {answer['model'][:12]}.")
    example = next(
        e
        for e in httpx.get(f"{url}/v1/examples").json()["examples"]
        if e["request"]["query"] == queries[1]
    )
    titles = page.locator(".title").all_inner_texts()
    assert titles == [example["titles"][i] for i in order]
    bought = len(request["history"])
    assert page.inner_text("#bought-title") == f"History: {bought} purchases, as listed"


@needs_browser
def test_reasons_largest_first_in_both_measures(page: "sync_api.Page") -> None:
    _, answer, explanation = rank(page)
    best = answer["order"][0]
    for measure in ("over_mean", "contributions"):
        page.check(f"input[name=measure][value={measure}]")
        first = page.locator("#ranked > li").first
        amounts = first.locator(".amount").all_text_contents()
        values = sorted(explanation[measure][best], key=abs, reverse=True)
        expected = [value for value in values if abs(value) >= 0.005]
        assert len(expected) > 1
        numbers = [float(text.replace(MINUS, "-")) for text in amounts]
        assert numbers == pytest.approx(expected, abs=0.0051)
        sides = first.locator(".reasons li").evaluate_all("all => all.map(i => i.className)")
        assert sides == ["for" if value > 0 else "against" for value in expected]
        largest = explanation["groups"][
            max(range(len(values)), key=lambda g: abs(explanation[measure][best][g]))
        ]
        assert first.locator(".name").first.inner_text().startswith(largest.replace("_", " "))


@needs_browser
def test_history_by_user_id(page: "sync_api.Page") -> None:
    page.check("input[name=source][value=store]")
    assert not page.is_visible("#history")
    page.fill("#user", "1")
    request, _, explanation = rank(page)
    assert "history" not in request
    bought = explanation["history"]["product_ids"]
    assert len(bought) > 1
    assert page.inner_text("#bought-title") == f"History: {len(bought)} purchases of user 1"
    page.click("#bought-title")
    ages = page.locator("#bought-list li").all_inner_texts()
    assert len(ages) == len(bought)
    days = explanation["history"]["age_days"][-1]
    assert ages[-1].endswith(f", {days} days ago")

    page.fill("#user", "987654321")
    rank(page)
    assert page.inner_text("#bought-title").startswith("No purchases of user 987654321 are known")

    page.fill("#user", "")
    page.click("#rank")
    problem = page.locator("#problem")
    assert problem.inner_text() == "Type the user id whose purchases are to be looked up."
    assert page.evaluate("document.activeElement.id") == "user"
    assert not page.is_visible("#result")


@needs_browser
def test_what_the_service_refuses_is_told_in_its_words(page: "sync_api.Page") -> None:
    page.click("#context > summary")
    page.fill("[data-feature=hour]", "noon")
    with page.expect_response("**/v1/rank") as refused:
        page.click("#rank")
    assert refused.value.status == 422
    problem = page.get_by_role("alert")
    sync_api.expect(problem).to_have_text(refused.value.json()["error"]["message"])
    assert "hour" in problem.inner_text()
    page.fill("[data-feature=hour]", "12")
    rank(page)
    assert not page.is_visible("#problem")
    page.fill("#candidates", "1000, 12x")
    page.click("#rank")
    assert problem.inner_text() == "Candidates: “12x” is not a whole number."
    assert page.get_attribute("#candidates", "aria-invalid") == "true"


@needs_browser
def test_a_history_that_was_typed(page: "sync_api.Page") -> None:
    page.fill("#history", "1007:0 1000:1")
    request, _, _ = rank(page)
    assert request["history"] == [1007, 1000]
    assert request["history_age_days"] == [0, 1]
    page.click("#bought-title")
    ages = [text.partition(", ")[2] for text in page.locator("#bought-list li").all_inner_texts()]
    assert ages == ["in the last 24 hours", "1 day ago"]
    page.fill("#history", "1007")
    request, _, _ = rank(page)
    assert request["history"] == [1007]
    assert "history_age_days" not in request
    for typed, sentence in (
        ("1007:1 1000", "Purchase history: give days for all purchases or for none."),
        ("1007:1:2", "Purchase history: “1:2” is not a whole number."),
        ("1007:", "Purchase history: “” is not a whole number."),
    ):
        page.fill("#history", typed)
        page.click("#rank")
        assert page.inner_text("#problem") == sentence


@needs_browser
def test_nothing_to_rank_and_no_service(page: "sync_api.Page") -> None:
    page.fill("#candidates", "")
    rank(page)
    assert page.inner_text("#status").startswith("No candidates, so nothing to rank")
    assert rows(page) == []
    page.context.set_offline(True)
    page.click("#rank")
    sync_api.expect(page.locator("#problem")).to_contain_text("The service cannot be reached")


@needs_browser
def test_ids_of_64_bits_and_texts_that_look_like_markup(page: "sync_api.Page") -> None:
    ids = [2**63 - 1, -(2**63), 2**53 + 1, 1000]
    page.fill("#candidates", " ".join(map(str, ids)))
    page.click("#context > summary")
    page.fill("[data-feature=query_type]", "<img src=x>")
    page.fill("#query", "<b>milk</b>")
    request, _, explanation = rank(page)
    page.check("input[name=measure][value=contributions]")
    assert request["candidates"]["product_id"] == ids
    assert {product for product, _ in rows(page)} == set(map(str, ids))
    place = explanation["groups"].index("query_type")
    assert explanation["values"][0][place] == "<img src=x>"
    assert page.locator("main img, main b").count() == 0


@needs_browser
def test_a_long_ranking_is_shown_bit_by_bit(page: "sync_api.Page") -> None:
    page.fill("#candidates", " ".join(str(1000 + 7 * i) for i in range(60)))
    rank(page)
    assert len(rows(page)) == 25
    assert page.inner_text("#more") == "Show all 60"
    page.click("#more")
    assert len(rows(page)) == 60
    assert not page.is_visible("#more")


@needs_browser
def test_with_the_keyboard_alone(page: "sync_api.Page") -> None:
    page.locator("#user").focus()
    with page.expect_response("**/v1/explain"):
        page.keyboard.press("Enter")
    second = page.locator("#ranked > li:nth-child(2) > details")
    second.locator("> summary").focus()
    page.keyboard.press("Enter")
    sync_api.expect(second).to_have_attribute("open", "")
    unnamed = page.eval_on_selector_all(
        "input, select, textarea",
        "all => all.filter(f => !f.labels.length && !f.ariaLabel).map(f => f.id)",
    )
    assert unnamed == []


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_fits_the_width(browser: "sync_api.Browser", url: str, width: int) -> None:
    for scheme, dark in (("light", False), ("dark", True)):
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.goto(url)
        page.wait_for_selector("#example option:nth-child(2)", state="attached")
        rank(page)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 300) == dark
        page.close()


@needs_browser
def test_asks_for_the_key_of_a_service_that_has_one(
    browser: "sync_api.Browser", addresses: list[str]
) -> None:
    page = browser.new_page()
    page.goto(addresses[1])
    problem = page.locator("#problem")
    sync_api.expect(problem).to_have_text("Type the API key first.")
    page.fill("#key", "another")
    page.click("#rank")
    sync_api.expect(problem).to_have_text("The API key is not the right one.")
    page.fill("#key", KEY)
    _, answer, _ = rank(page)
    assert len(rows(page)) == len(answer["order"])
    page.close()


def test_files_of_the_page(url: str) -> None:
    for path in ("/", "/page.css", "/page.js", "/page_service.js", "/page_view.js"):
        answer = httpx.get(url + path)
        assert answer.status_code == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        again = httpx.get(url + path, headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert httpx.head(url + path).status_code == 200
        assert re.findall(r"(?:src|href)=\"(?:https?:)?//|@import|url\(", answer.text) == []
