"""The page on which people talk to the model: one file, which asks nobody else for anything."""

import base64
import functools
import hashlib
import pathlib
import re

from starlette.responses import HTMLResponse


@functools.cache
def _page() -> tuple[str, str]:
    """The page, and its content security policy: its own script and style run, nothing else does."""
    text = (pathlib.Path(__file__).parent / 'page.html').read_text(encoding='utf-8')
    allowed = {}
    for kind in ('script', 'style'):
        (content,) = re.findall(f'<{kind}>(.*?)</{kind}>', text, re.DOTALL)
        allowed[kind] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{allowed['script']}'; style-src 'sha256-{allowed['style']}'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def page() -> HTMLResponse:
    """To be sent to a browser."""
    text, policy = _page()
    headers = {
        'Content-Security-Policy': policy,
        'X-Content-Type-Options': 'nosniff',
        'Referrer-Policy': 'no-referrer',
        'Cache-Control': 'no-cache',
    }
    return HTMLResponse(text, headers=headers)
