"""The page at `/`: what is served, and what a browser makes of it."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.browsers import chromium
from tests.server.conftest import NAME, Opener, Process, serving, slowly
from tests.server.test_serve import MODEL, PICTURE, wait_until

KINDS = {"/": "text/html", "/page.css": "text/css", "/page.js": "text/javascript"}
QUESTION = "How many hamburgers are there?"
FILE = """
const [name, kind, data] = arguments;
const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
const dataTransfer = new DataTransfer();
dataTransfer.items.add(new File([bytes], name, { type: kind }));
const options = { bubbles: true, cancelable: true };
"""
DROP = FILE + 'document.body.dispatchEvent(new DragEvent("drop", { ...options, dataTransfer }));'
"""A file dropped on the page, as the browser tells it."""
PASTE = (
    FILE
    + """
return document.activeElement.dispatchEvent(new ClipboardEvent("paste", { ...options, clipboardData: dataTransfer }));
"""
)
"""A file pasted where the cursor is; false where the page took it."""
PASTE_TEXT = """
options.clipboardData.setData("text/plain", "a");
return document.activeElement.dispatchEvent(new ClipboardEvent("paste", options));
"""
CLEAR_AND_DIM = """
const canvas = document.getElementById("overlay");
const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
let clear = 0;
for (let place = 3; place < data.length; place += 4) clear += data[place] === 0;
return [clear / (data.length / 4), canvas.width];
"""
STOP_AT_THE_FIRST_WORD = """
const done = arguments[0], answers = document.getElementById("answers");
new MutationObserver((_changes, watching) => {
  if (!answers.textContent.includes("stopped") && !answers.querySelector(".text")?.textContent) return;
  document.getElementById("stop").click();
  watching.disconnect();
  done();
}).observe(answers, { childList: true, subtree: true, characterData: true });
document.getElementById("ask").click();
"""


def test_its_files_are_served_and_nothing_beside_them(inside: Opener) -> None:
    server = inside()
    for path, kind in KINDS.items():
        response = server.get(path)
        assert (response.status_code, response.headers["Content-Type"]) == (200, f"{kind}; charset=utf-8")
        policy = dict(part.split(" ", 1) for part in response.headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert server.post({}, path=path).status_code == 405
    for path in ("/page", "/page.html", "/index.html", "/page/page.js", "/page.py", "/../app.py", "/favicon.ico"):
        assert server.get(path).status_code == 404
    assert not KINDS.keys() & server.get("/openapi.json").json()["paths"].keys()


def test_it_names_no_other_place_and_writes_no_html(inside: Opener) -> None:
    server = inside()
    for path in KINDS:
        text = server.get(path).text
        assert not re.search(r"(https?|wss?|ftp):|//\w+\.|url\(|@import", text)
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\son\w+=|style=", text)
        assert not re.search(r"localStorage|sessionStorage|cookie|indexedDB", text)


def test_only_reading_it_needs_no_key(inside: Opener) -> None:
    server = inside(key="a key", hosts=["localhost"])
    for path in KINDS:
        assert server.get(path).status_code == 200
        assert server.post({}, path=path).status_code == 401
        assert server.get(path, headers={"Host": "elsewhere.example"}).status_code == 403


class Browser:
    """A page in headless Chromium."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def open(self, process: Process, width: int = 1200, height: int = 900) -> None:
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        # A script that came before the page would still find the page of the test before, and be lost with it.
        self.driver.get("about:blank")
        self.driver.get(process.url)
        self.wait(lambda: self.texts("#model option") or any(self.texts("#key-form label")))

    def find(self, css: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def texts(self, css: str) -> list[str]:
        return [each.text for each in self.driver.find_elements(By.CSS_SELECTOR, css)]

    def wait(self, condition: Callable[[], object]) -> None:
        def holds() -> bool:
            try:
                return bool(condition())
            except StaleElementReferenceException:  # the page drew it anew while it was looked at
                return False

        try:
            wait_until(holds)
        except AssertionError:
            pytest.fail(f"waited in vain; the page says {self.texts('body')}, its console {self.complaints()}")

    def is_done(self) -> bool:
        return self.texts("article") != [] and not self.driver.find_elements(By.CSS_SELECTOR, '[aria-busy="true"]')

    def origins(self) -> set[str]:
        """Of all requests since this was called last."""
        found = set()
        for entry in self.driver.get_log("performance"):  # type: ignore[no-untyped-call]
            told = json.loads(entry["message"])["message"]
            if told["method"] == "Network.requestWillBeSent":
                url = urlsplit(told["params"]["request"]["url"])
                found.add(url.scheme if url.scheme == "data" else f"{url.scheme}://{url.netloc}")
        return found

    def complaints(self) -> list[str]:
        """What the browser's console says, violations of the policy included."""
        return [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module", name="chromium")
def chromium_of_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with chromium(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@pytest.fixture
def browser(chromium: Chrome) -> Browser:
    page = Browser(chromium)
    page.origins(), page.complaints()  # of the test before
    return page


@pytest.fixture(scope="module")
def both() -> Iterator[Process]:
    """The bundled model, with its dense variant."""
    with serving("--variant", "dense", "--parallel", "1") as process:
        yield process


def test_a_picture_is_asked_about_dense_and_skipped(browser: Browser, both: Process) -> None:
    browser.open(both)
    browser.find("#file").send_keys(str(PICTURE))
    browser.wait(lambda: "patches that were retained" in browser.find("#picture-note").text)
    kept, full = map(int, re.findall(r"\d+", browser.find("#picture-note").text)[:2])
    share, width = browser.driver.execute_script(CLEAR_AND_DIM)
    assert 0.05 < share < 0.95  # some is clear, and some is not
    assert width == browser.find("#picture").size["width"] > 100

    browser.find("#question").send_keys(QUESTION + Keys.ENTER)
    browser.wait(browser.is_done)
    assert browser.texts("h3") == [QUESTION]
    assert browser.texts("h4") == [MODEL, f"{MODEL}:dense"]
    assert all(browser.texts("article .text"))
    assert browser.texts('[data-fact="visual"]') == [f"{kept} of {full}", f"{full} of {full}"]
    assert all(re.fullmatch(r"\d+ ms", each) for each in browser.texts('[data-fact="first"]'))
    assert browser.find(".difference").text
    assert browser.find("#problem").text == ""

    # A second question goes behind the first, and computes what is new.
    rows = list(map(int, browser.texts('[data-fact="rows"]')))
    browser.find("#question").send_keys("And what is left?" + Keys.ENTER)
    browser.wait(lambda: len(browser.texts(".turn")) == 2 and browser.is_done())
    cached = browser.texts('.turn:last-child [data-fact="cached"]')
    assert [int(each) >= before for each, before in zip(cached, rows, strict=True)] == [True, True]
    assert browser.texts("h3") == [QUESTION, "And what is left?"]
    assert browser.texts('.turn:last-child [data-fact="visual"]') == [f"{kept} of {full}", f"{full} of {full}"]

    browser.find("#mark").send_keys(" ")
    assert not browser.find("#overlay").is_displayed()
    assert browser.origins() == {both.url, "data"}
    assert browser.complaints() == []


def test_the_answer_is_the_one_that_the_server_gives(browser: Browser, both: Process) -> None:
    browser.open(both)
    # Its name and its question are HTML, and stay text.
    data = base64.b64encode(PICTURE.read_bytes()).decode()
    browser.driver.execute_script(DROP, "<b>a</b>.png", "image/png", data)
    browser.wait(lambda: browser.find("#overlay").is_displayed())
    browser.find("#compare").click()
    browser.find("#question").send_keys(QUESTION)
    browser.find("#ask").click()
    browser.wait(browser.is_done)
    script = """
    const [model, url, question, done] = arguments;
    const content = [{ type: "image_url", image_url: { url } }, { type: "text", text: question }];
    const body = JSON.stringify({ model, messages: [{ role: "user", content }] });
    fetch("v1/chat/completions", { method: "POST", headers: { "Content-Type": "application/json" }, body })
      .then((response) => response.json()).then((told) => done(told.choices[0].message.content));
    """
    url = f"data:image/png;base64,{data}"
    said = browser.driver.execute_async_script(script, MODEL, url, QUESTION)
    assert browser.texts("article .text") == [said.strip()]
    assert browser.find("#picture").get_attribute("alt") == "The picture: <b>a</b>.png"


def test_a_pasted_picture_begins_a_conversation_and_so_does_the_button(browser: Browser, both: Process) -> None:
    browser.open(both)
    browser.find("#compare").click()
    data = base64.b64encode(PICTURE.read_bytes()).decode()
    browser.find("#question").send_keys("What")
    assert browser.driver.execute_script(PASTE, "image.png", "image/png", data) is False
    browser.wait(lambda: "patches that were retained" in browser.find("#picture-note").text)
    # Text is for the field.
    text = "const options = { bubbles: true, cancelable: true, clipboardData: new DataTransfer() };" + PASTE_TEXT
    assert browser.driver.execute_script(text) is True
    assert not browser.find("#new").is_enabled()
    browser.find("#question").send_keys(" is this?" + Keys.ENTER)
    browser.wait(browser.is_done)
    first = browser.find(".text").text
    assert browser.find("#question").get_attribute("value") == ""
    browser.find("#new").click()
    assert browser.texts(".turn") == []
    assert browser.driver.switch_to.active_element.get_attribute("id") == "question"
    # The picture is still there, and nothing that was said.
    browser.find("#question").send_keys("What is this?" + Keys.ENTER)
    browser.wait(browser.is_done)
    assert browser.texts(".text") == [first]
    assert "of" in browser.find('[data-fact="visual"]').text
    browser.driver.execute_script(DROP, "again.png", "image/png", data)
    browser.wait(lambda: browser.texts(".turn") == [])


def test_a_question_that_fails_is_not_lost(browser: Browser, both: Process) -> None:
    browser.open(both)
    long = "how many? " * 400
    browser.driver.execute_script("document.getElementById('question').value = arguments[0]", long)
    browser.find("#question").send_keys(Keys.ENTER)
    browser.wait(lambda: browser.is_done() and browser.find("#problem").is_displayed())
    assert browser.find("#question").get_attribute("value") == long.strip()
    browser.find("#question").clear()
    browser.find("#question").send_keys("What is this?" + Keys.ENTER)
    browser.wait(lambda: len(browser.texts(".turn")) == 2 and browser.is_done())
    assert not browser.find("#problem").is_displayed()  # what failed is not sent again


def test_it_fits_a_telephone_and_tells_what_is_wrong(browser: Browser, both: Process) -> None:
    browser.open(both, width=360, height=740)
    data = base64.b64encode(b"no picture at all").decode()
    browser.driver.execute_script(DROP, "a.txt", "text/plain", data)
    browser.wait(lambda: browser.find("#problem").text == "a.txt is not a picture.")
    browser.driver.execute_script(DROP, "a.png", "image/png", data)
    browser.wait(lambda: "picture" in browser.find("#problem").text.replace("a.txt is not a picture.", ""))
    browser.find("#file").send_keys(str(PICTURE))
    browser.find("#question").send_keys(QUESTION + Keys.ENTER)
    browser.wait(browser.is_done)
    wider = "const all = document.documentElement; return [all.scrollWidth - all.clientWidth, window.innerWidth]"
    assert browser.driver.execute_script(wider) == [0, 360]


def test_its_policy_keeps_it_from_asking_elsewhere(browser: Browser, both: Process) -> None:
    browser.open(both)
    script = """
    const done = arguments[0];
    document.addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
    fetch("http://127.0.0.1:9/").catch(() => {});
    """
    assert browser.driver.execute_async_script(script) == "connect-src"


def test_it_asks_for_the_key_and_stopping_frees_the_slot(browser: Browser, endless: Path) -> None:
    with serving(endless, "--parallel", "1", first=slowly(0.05), SVCLI_API_KEY="a-key") as process:
        browser.open(process)
        browser.wait(lambda: browser.find("#key-form").is_displayed())
        assert "a key is needed" in browser.find("#problem").text
        browser.find("#key").send_keys("another" + Keys.ENTER)
        browser.wait(lambda: browser.find("#key").get_attribute("value") == "")
        browser.find("#key").send_keys("a-key" + Keys.ENTER)
        browser.wait(lambda: not browser.find("#key-form").is_displayed())
        browser.find("#question").send_keys("What is this?")
        browser.driver.execute_async_script(STOP_AT_THE_FIRST_WORD)
        browser.wait(browser.is_done)
        assert browser.texts('[data-fact="answer"]') == ["stopped"]
        assert browser.texts("h4") == [NAME]
        assert browser.find("#problem").text == ""
        assert process.end() == 0
    assert any("/v1/chat/completions 499" in line for line in process.lines), process.lines
