"""Where a name may break in the site of the documentation: a hook of mkdocs, named in mkdocs.yml."""

import re

_CODE = re.compile(r"<code>.*?</code>", re.DOTALL)
_INLINE_CODE = re.compile(r"(?<=<code>)[^<\n]+(?=</code>)")
_TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
_FLAG = re.compile(r"(?<=[\s>(])--[a-zA-Z][a-zA-Z0-9-]*")
_JOINT = re.compile(r"(?<=[._/:=])(?=\w)")
_LONG_IN_A_CELL = re.compile(r"\S{14,}")
_LONGER_THAN_A_LINE = re.compile(r"\S{38,}")  # of a phone


def on_page_content(html: str, **_: object) -> str:
    """Keep every flag in one piece, and let long names, in tables above all, break behind one of ``. _ / : =``.

    >>> on_page_content("<table><td><code>train.keep_best=eval_loss</code></td></table>")
    '<table><td><code>train.<wbr>keep_<wbr>best=<wbr>eval_<wbr>loss</code></td></table>'
    >>> on_page_content("<code>fpo kl --keep-ids 1</code>")
    '<code>fpo kl <span class="flag">--keep-ids</span> 1</code>'
    """
    html = _TABLE.sub(lambda table: _breakable(table.group(), _LONG_IN_A_CELL), html)
    html = _breakable(html, _LONGER_THAN_A_LINE)
    return _CODE.sub(lambda code: _FLAG.sub(r'<span class="flag">\g<0></span>', code.group()), html)


def _breakable(html: str, long: re.Pattern[str]) -> str:
    def joints(name: re.Match[str]) -> str:
        return _JOINT.sub("<wbr>", name.group())

    return _INLINE_CODE.sub(lambda code: long.sub(joints, code.group()), html)
