"check.py FOLDER: exit 1, with what is wrong, unless every link leads somewhere, every picture is described and nothing comes from outside."
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    "`ids`, `links` (attribute, target) and `undescribed` pictures of a page."
    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.undescribed = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids |= {given[key] for key in ("id", "name") if given.get(key)}
        self.links += [(tag, given[key]) for key in ("href", "src") if given.get(key)]
        if tag == "img" and (not given.get("alt") or "No description" in given["alt"]): self.undescribed.append(given.get("src", "")[:80])


def faults(folder):
    "One line for each fault of the site in `folder`."
    folder = folder.resolve()
    pages = {path: Page(path.read_text()) for path in folder.rglob("*.html")}
    for path, page in pages.items():
        where = path.relative_to(folder)
        yield from (f"{where}: picture without description: {src}" for src in page.undescribed)
        for tag, target in page.links:
            parts = urlsplit(target)
            if parts.scheme == "data": continue
            if parts.scheme or parts.netloc:
                if tag != "a": yield f"{where}: <{tag}> from outside: {target}"
                continue
            base = folder if parts.path.startswith("/") else path.parent
            file = (base/unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            file = file/"index.html" if file.is_dir() else file
            if not file.exists(): yield f"{where}: no such file: {target}"
            elif parts.fragment and file in pages and unquote(parts.fragment) not in pages[file].ids:
                yield f"{where}: no such place: {target}"
    for path in folder.rglob("*.css"):
        yield from (f"{path.relative_to(folder)}: from outside: {url}" for url in re.findall(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')]+)", path.read_text()))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = sorted(set(faults(folder)))
    if found: sys.exit("\n".join(found[:200]) + f"\n{len(found)} faults")
    print(f"{len([*folder.rglob('*.html')])} pages: every link leads somewhere, every picture is described, nothing comes from outside")
