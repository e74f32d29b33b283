"""An exported page in headless Chromium, with a recorded file as its microphone; for tests and benchmarks.

The runtime is taken from node_modules of the project, or from the folder that SPKD_ONNXRUNTIME_WEB names.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
RUNTIME = Path(os.environ.get("SPKD_ONNXRUNTIME_WEB", Path(__file__).parents[1] / "node_modules" / "onnxruntime-web"))
HOPELESS = 60_000  # ms after which a page will not answer any more


@dataclass
class Page:
    """The page in a browser.

    Attributes:
        tab: the page of playwright.
        origin: address of the server.
        elsewhere: addresses of requests to other places.
        errors: what the page wrote to the console as errors.
    """

    tab: Any
    origin: str
    elsewhere: list[str]
    errors: list[str]

    def open(self) -> None:
        """Load the page and the model."""
        self.tab.goto(self.origin)
        self.tab.wait_for_selector("main:not([hidden]), #state.bad")

    def name(self, person: str) -> None:
        self.tab.fill("#name", person)

    def enrol(self, person: str, files: Sequence[Path]) -> str:
        """Enrol a person from three files. Returns the message."""
        self.name(person)
        self.tab.set_input_files("#enrol-files", [str(path) for path in files])
        return self.message()

    def enrol_by_microphone(self, person: str) -> str:
        """Enrol a person from three recordings. Returns the message."""
        self.name(person)
        for number in range(3):
            self.tab.get_by_role("button", name=f"Record {number + 1} of 3").click()
            if number < 2:
                self.tab.wait_for_selector(f"#takes li:nth-child({number + 1}).done, #enrol-message.bad")
        return self.message()

    def message(self) -> str:
        """The end of an enrolment: that the person is enrolled, or what is wrong."""
        return self.tab.wait_for_selector("#enrol-message.bad, #enrol-message:text('enrolled')").inner_text()

    def verify(self, file: Path | None) -> str:
        """Result for a file; None: for the microphone."""
        if file is None:
            self.tab.click("#verify-record")
        else:
            self.tab.set_input_files("#verify-file", str(file))
        return self.tab.wait_for_selector("#result:not([hidden]), #verify-message.bad").inner_text()

    def verify_of(self, person: str, file: Path) -> str:
        """Result for a file and a person who is chosen first."""
        self.tab.get_by_role("radio", name=person).check()
        return self.verify(file)

    def voice(self, person: str) -> dict[str, Any]:
        """What the browser keeps of a person."""
        return json.loads(self.tab.evaluate("name => localStorage.getItem(`spkd.voice.${name}`)", person))

    def embeddings(self, waves: Sequence[np.ndarray]) -> tuple[np.ndarray, list[float]]:
        """Embeddings (N, D) of waveforms (16 kHz) by the page's own module, and the time of each (ms)."""
        found, times = [], list[float]()
        for wave in waves:
            script = """async (values) => {
                globalThis.loaded ??= (await import("./model.js")).load();
                const { embed } = await globalThis.loaded;
                const wave = Float32Array.from(values);
                const start = performance.now();
                const embedding = await embed(wave);
                return [Array.from(embedding), performance.now() - start];
            }"""
            embedding, milliseconds = self.tab.evaluate(script, wave.tolist())
            found.append(embedding)
            times.append(milliseconds)
        return np.array(found), times


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Address of a static server of a folder."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://localhost:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def browser(microphone: Path | None = None, **context: Any) -> Iterator[Any]:
    """A context of headless Chromium.

    Args:
        microphone: recording that its microphone repeats; None: it has none.
        context: of playwright's `new_context`: viewport, color_scheme, ...
    """
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox"]  # in a container, root may open no other
    if microphone is not None:
        arguments += ["--use-fake-device-for-media-stream", f"--use-file-for-fake-audio-capture={microphone}"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        granted = ["microphone"] if microphone is not None else []
        made = chromium.new_context(permissions=granted, **context)
        made.set_default_timeout(HOPELESS)
        yield made
        chromium.close()


def page_of(context: Any, origin: str) -> Page:
    """The page of a server in a context, not yet loaded."""
    tab = context.new_page()
    page = Page(tab, origin, [], [])
    tab.on("request", lambda request: page.elsewhere.append(request.url) if origin not in request.url else None)
    tab.on("console", lambda line: page.errors.append(line.text) if line.type == "error" else None)
    tab.on("pageerror", lambda error: page.errors.append(str(error)))
    tab.on("dialog", lambda dialog: dialog.accept())
    return page


def loaded_in(page: Page) -> float:
    """Seconds from nothing to a page that can be used."""
    start = time.perf_counter()
    page.open()
    return time.perf_counter() - start
