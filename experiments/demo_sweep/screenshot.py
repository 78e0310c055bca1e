"""Pictures of a sweep's report.html in headless Chromium: the whole page, light and dark, wide and narrow.

    python experiments/demo_sweep/screenshot.py DIR/report.html [--out FOLDER]

Needs `pip install playwright` in any environment, and a Chromium: a `chromium` or `google-chrome` on PATH, else the one
that `playwright install chromium` fetches. Fails if the page logs an error or asks for anything over the network.
"""

import argparse
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

PICTURES = {"report": (1280, "light"), "report-dark": (1280, "dark"), "report-narrow": (420, "light")}


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", type=Path, help="default: where the page is")
    args = parser.parse_args()
    out = args.out or args.page.parent
    out.mkdir(parents=True, exist_ok=True)
    problems: list[str] = []
    installed = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        for name, (width, scheme) in PICTURES.items():
            context = browser.new_context(
                viewport={"width": width, "height": 900}, color_scheme=scheme, device_scale_factor=1.5
            )
            page = context.new_page()
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else problems.append(r.url))
            page.goto(args.page.absolute().as_uri())
            page.wait_for_selector("html[data-ready=true]")
            overflow = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            if overflow > 0:
                problems.append(f"{name}: the page is {overflow} px wider than its window")
            page.screenshot(path=out / f"{name}.png", full_page=True)
            print(out / f"{name}.png")
            context.close()
        browser.close()
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
