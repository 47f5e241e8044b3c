"""The page in a real browser: it shows strangers' text as text, keeps to its policy, and follows the swarm by itself."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, async_playwright, expect

from bootstrap.store import StatusStore
from bootstrap.summary import swarm_status
from bootstrap.web import CONTENT_SECURITY_POLICY, serve_web
from tests.bootstrap.samples import NOW_S, busy_store, document_of, manifest, note, record, staged_document

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path (Debian: apt-get install chromium)"),
]

ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
]
DESKTOP = {"width": 1180, "height": 1100}
PHONE = {"width": 390, "height": 844}


@pytest_asyncio.fixture
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        chromium = await playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*ARGS, "--disable-sync"], headless=True
        )
        yield chromium
        await chromium.close()


@asynccontextmanager
async def opened(
    browser: Browser,
    get_document: Callable[[], dict[str, Any]],
    *,
    viewport: dict[str, int] = DESKTOP,
    dark: bool = False,
) -> AsyncIterator[Page]:
    """The page of a fresh server, drawn once. On leaving, nothing may have been complained about in its console."""
    complaints: list[str] = []
    requests: list[str] = []
    async with serve_web("127.0.0.1", 0, get_document, event_interval_s=0.1) as url:
        page = await browser.new_page(
            viewport={"width": viewport["width"], "height": viewport["height"]},
            color_scheme="dark" if dark else "light",
        )
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        response = await page.goto(url)
        assert response is not None
        assert response.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
        await expect(page.locator("#link")).to_have_text("live")
        yield page
        assert all(request.startswith(url) for request in requests)
        await page.close()
    assert complaints == []


async def _shoot(page: Page, name: str) -> None:
    """Keep a picture for the eye, in the folder the caller of the tests names."""
    folder = os.environ.get("LLM_NODE_SCREENSHOTS")
    if folder:
        await page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


async def _overflow(page: Page) -> int:
    return int(await page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


async def test_markup_in_a_name_is_shown_as_text(browser: Browser) -> None:
    name = "<img src=x onerror=document.x=1>"
    document = document_of(record(1, name=name, recent=[note(7, 2)]), record(2, name="<b>bold</b>", sent_at_s=0.0))
    async with opened(browser, lambda: document) as page:
        await expect(page.locator("#peers .name").get_by_text(name, exact=True)).to_be_visible()
        await expect(page.locator("#exchanges .name").get_by_text(name, exact=True)).to_be_visible()
        await expect(page.locator("#warnings")).to_contain_text("<b>bold</b>")
        assert await page.locator("main img, main b").count() == 0
        assert await page.evaluate("document.x") is None


async def test_the_policy_stops_inline_script_and_foreign_addresses(browser: Browser) -> None:
    document = document_of()
    async with serve_web("127.0.0.1", 0, lambda: document, event_interval_s=0.1) as url:
        page = await browser.new_page()
        await page.goto(url)
        blocked = """() => new Promise((done) => {
            addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
            const script = document.createElement("script");
            script.textContent = "document.x = 1";
            document.body.append(script);
        })"""
        assert await page.evaluate(blocked) == "script-src-elem"
        assert await page.evaluate("document.x") is None
        assert await page.evaluate("fetch('http://203.0.113.9/').catch(() => 'refused')") == "refused"
        await page.close()


@pytest.mark.parametrize(("viewport", "dark"), [(DESKTOP, False), (PHONE, True)])
async def test_the_stages_of_a_pipeline_are_shown(browser: Browser, viewport: dict[str, int], dark: bool) -> None:
    async with opened(browser, staged_document, viewport=viewport, dark=dark) as page:
        stages = page.locator("#stages li")
        await expect(stages).to_have_count(6)
        await expect(stages.nth(1)).to_contain_text("2 peers")
        await expect(stages.nth(3)).to_contain_text("1 peer")
        await expect(stages.nth(4).locator(".pill")).to_have_attribute("data-state", "lost")
        await expect(page.locator("#warnings")).to_contain_text("Nobody holds stage 4")
        await expect(page.locator("#peers .id").first).to_contain_text("stage")
        assert await _overflow(page) == 0
        await _shoot(page, f"stages-{viewport['width']}")
    async with opened(browser, document_of, viewport=viewport, dark=dark) as page:
        await expect(page.locator("#stages")).to_be_hidden()


async def test_it_follows_the_swarm_without_reloading(browser: Browser) -> None:
    with StatusStore(":memory:") as store:
        store.observe([record(1, round=1, val_loss=6.0, val_round=0)], now_s=NOW_S)
        async with opened(browser, lambda: swarm_status(store, manifest(), now_s=NOW_S)) as page:
            await page.evaluate("window.mark = 'same page'")
            await expect(page.locator("#val-loss")).to_have_text("6.000")
            await expect(page.locator("#peers tbody tr")).to_have_count(1)
            await expect(page.locator("#exchanges-empty")).to_contain_text("trains alone")
            store.observe([record(2, round=2, name="second")], now_s=NOW_S)
            new = record(1, sequence=2, round=2, val_loss=3.0, val_round=1, recent=[note(1, 2)])
            store.observe([new], now_s=NOW_S)
            await expect(page.locator("#val-loss")).to_have_text("3.000")
            await expect(page.locator("#val-loss-note")).to_have_text("round 1 · 50 % below the start")
            await expect(page.locator("#peers tbody tr")).to_have_count(2)
            await expect(page.locator("#exchanges li")).to_have_count(1)
            await expect(page).to_have_title("3.000 · stdlib-1m")
            store.observe([record(2, sequence=2, round=2, state="leaving")], now_s=NOW_S)
            await expect(page.locator("#peers .pill").nth(1)).to_have_text("leaving")
            await expect(page.locator("#num-peers")).to_have_text("1")
            assert await page.evaluate("window.mark") == "same page"


async def test_it_says_when_the_node_is_gone(browser: Browser) -> None:
    async with serve_web("127.0.0.1", 0, document_of, event_interval_s=0.1) as url:
        page = await browser.new_page()
        await page.goto(url)
        await expect(page.locator("#link")).to_have_text("live")
    await expect(page.locator("#link")).to_have_text("not connected, retrying")
    await page.close()


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
async def test_a_busy_swarm(browser: Browser, viewport: dict[str, int], dark: bool) -> None:
    with busy_store() as store:
        document = swarm_status(store, manifest(), now_s=NOW_S)
    async with opened(browser, lambda: document, viewport=viewport, dark=dark) as page:
        await expect(page.locator("#chart canvas")).to_be_visible()
        await expect(page.locator("#peers tbody tr")).to_have_count(5)
        await expect(page.locator("#speed")).to_have_text("8,880 tok/s")
        await expect(page.locator("#chart .u-value").first).to_have_text("24")
        assert await _overflow(page) == 0
        background = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(17, 21, 27)") is dark
        await _shoot(page, f"busy-{viewport['width']}-{'dark' if dark else 'light'}")


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("case", ["empty", "one", "liars"])
async def test_unusual_swarms_look_right(browser: Browser, viewport: dict[str, int], case: str) -> None:
    lone = record(
        1, name="", round=1, train_loss=None, step=3, val_loss=6.94, val_round=0, exchanges_ok=0, exchanges_failed=0
    )
    wild = [
        record(i, name="W" * 32, tokens=2**62, tokens_per_s=1e12, train_loss=1e6, sent_bytes=2**62, step=2**60)
        for i in (1, 2)
    ]
    document = {"empty": document_of(), "one": document_of(lone), "liars": document_of(*wild)}[case]
    async with opened(browser, lambda: document, viewport=viewport) as page:
        await expect(page.locator("#run-name")).to_have_text("stdlib-1m")
        assert await page.locator("#peers").is_visible() is (case != "empty")
        assert await page.locator("#peers-empty").is_visible() is (case == "empty")
        assert await page.locator("#chart").is_visible() is (case == "one")
        assert await page.locator("#chart-empty").is_visible() is (case != "one")
        assert not await page.get_by_text("NaN").count()
        assert not await page.get_by_text("undefined").count()
        assert await _overflow(page) == 0
        await _shoot(page, f"{case}-{viewport['width']}")
