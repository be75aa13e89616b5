"Markdown of notebooks: formulas as MathML, code names and files as links."
import re

from latex2mathml.converter import convert

PARTS = re.compile(r"(?P<block>```.*?```)|`(?P<code>[^`\n]+)`|\$\$(?P<shown>.+?)\$\$|(?<![\\$\w])\$(?P<inline>[^$\n]+?)\$", re.S)
LINK = re.compile(r"(?P<bang>!?)\[(?P<text>[^\]\n]*)\]\((?P<target>[^)\s]+)\)")


def formula(latex, display):
    "MathML, which browsers draw by themselves. ValueError for a command that it has no form for."
    plain = re.sub(r"\\[bB]ig(?=\\Vert|\\\|)", "", latex).replace(r"\arg\max", r"\operatorname{argmax}")
    made = " ".join(convert(plain.strip(), display=display).split("\n"))
    if "\\" in re.sub("<[^>]*>|&[^;]*;", "", made): raise ValueError(f"no MathML for {latex!r}")
    return made.replace("*", "&#42;").replace("_", "&#95;").replace("|", "&#124;")


def rich(text, names, link):
    "`text` with its formulas drawn; `name` is a link where `names` knows it; link(target) gives a link's new target, None for none."
    def part(match):
        kind, value = match.lastgroup, match[match.lastgroup]
        if kind == "block": return value
        if kind == "code": return f"[`{value}`]({names[value]})" if value in names else match[0]
        return formula(value, "block" if kind == "shown" else "inline")
    def relink(match):
        target = match["target"]
        if re.match("[a-z]+:|#", target): return match[0]
        new = link(target)
        return match["text"] if new is None else f"{match['bang']}[{match['text']}]({new})"
    pieces = re.split(r"(```.*?```|`[^`\n]+`|\$\$.+?\$\$)", text, flags=re.S)
    return PARTS.sub(part, "".join(LINK.sub(relink, p) if i % 2 == 0 else p for i, p in enumerate(pieces)))
