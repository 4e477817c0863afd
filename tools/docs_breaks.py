"""Where a name may break in the site of the documentation: a hook of mkdocs, named in mkdocs.yml."""

import re

_INLINE_CODE = re.compile(r"(?<=<code>)[^<\n]+(?=</code>)")
_JOINT = re.compile(r"(?<=[._/:=])(?=\w)")


def on_page_content(html: str, **_: object) -> str:
    """Let inline code break behind a dot, underscore, slash, colon or equals sign; blocks of code stay.

    >>> on_page_content("<td><code>loss.beta_pi</code></td>")
    '<td><code>loss.<wbr>beta_<wbr>pi</code></td>'
    """
    return _INLINE_CODE.sub(lambda code: _JOINT.sub("<wbr>", code.group()), html)
