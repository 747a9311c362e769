"""A real headless Chromium, as Debian's packages chromium and chromium-driver bring it; it may reach no network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

PROGRAMS = ("chromium", "chromedriver")

QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--host-resolver-rules=MAP * ~NOTFOUND")  # fmt: skip


def is_here() -> bool:
    """Whether both programs are installed."""
    return all(map(shutil.which, PROGRAMS))


@dataclass(frozen=True)
class Browser:
    """Opens files of this machine."""

    driver: Chrome

    def open(self, page: Path, width: int, *, height: int = 900, dark: bool = False) -> None:
        """In a viewport of `width` × `height` CSS pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._tell("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._tell("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(page.resolve().as_uri())

    def value(self, script: str) -> Any:
        """Of a JavaScript expression in the page."""
        return self.driver.execute_script(f"return {script}")

    def requests(self) -> list[str]:
        """The URLs that were asked for since the last call, data: apart."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if urlparse(url).scheme != "data"]

    def complaints(self) -> list[str]:
        """What was written to the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def _tell(self, command: str, values: dict[str, Any]) -> None:
        self.driver.execute_cdp_cmd(command, values)


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Its profile and everything else that it writes goes to `folder`."""
    # here: every run of pytest asks `is_here`, and few open a page
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = shutil.which(PROGRAMS[0]) or ""
    for argument in (*QUIET, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    # with both programs named, Selenium looks for neither on the network
    driver = Chrome(options, Service(shutil.which(PROGRAMS[1])))
    try:
        driver.get("about:blank")
        opened = Browser(driver)
        opened.requests(), opened.complaints()  # those of the page that it begins with
        yield opened
    finally:
        driver.quit()
