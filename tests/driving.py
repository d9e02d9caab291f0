"""How the browser's tests drive a page, in Playwright's terms."""

from urllib.parse import urlsplit

PATIENCE = 120  # seconds: only a hang takes longer, or many compilations on a busy machine


def explorer(page, kind):
    """An explorer in a notebook, scrolled to."""
    root = page.locator(f".grokkit-explorer.grokkit-{kind}")
    root.scroll_into_view_if_needed()
    return root


def type_into(field, text):
    """As a reader does: all replaced key by key, and the field left."""
    field.click()
    field.press("ControlOrMeta+a")
    field.press_sequentially(text)
    field.press("Tab")


def drag(page, handle, start, end):
    """Drag from one share of an element's width to another."""
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + start * box["width"], y)
    page.mouse.down()
    page.mouse.move(box["x"] + (start + end) / 2 * box["width"], y, steps=4)
    page.mouse.move(box["x"] + end * box["width"], y, steps=4)
    page.mouse.up()


def numbers(locator, name):
    """A data attribute of every element that matches, as numbers."""
    return [float(v) for v in locator.evaluate_all(f"all => all.map(e => e.dataset.{name})")]


def words(locator):
    """The text of every element that matches."""
    return locator.evaluate_all("all => all.map(e => e.textContent)")


class Watched:
    """A page whose errors and requests are kept."""

    def __init__(self, context) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page = context.new_page()
        self.page.set_default_timeout(PATIENCE * 1000)
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.errors.append(f"uncaught: {error}"))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("websocket", lambda socket: self.requests.append(socket.url))

    def _on_console(self, message) -> None:
        if message.type == "error":
            self.errors.append(f"{message.text} ({message.location.get('url')})")

    def external(self) -> list[str]:
        """Requests to any machine but this one."""
        local = ("127.0.0.1", None)  # none: data and blob addresses, and files
        return [url for url in self.requests if urlsplit(url).hostname not in local]

    def check(self) -> None:
        """No error, and nothing asked of another machine, since the last check."""
        errors, self.errors = self.errors, []
        assert errors == []
        assert self.requests, "the page's requests were not seen"
        assert self.external() == []
