"""What every request passes: a number of its own, the key, and what becomes of errors."""

import base64
import binascii
import hmac
import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cramjax.serve.http.fields import RequestError

_LOG = logging.getLogger("cramjax.serve")
_RETRY_SECONDS = "1"

_OPEN = ("/health", "/ping")
"""Routes that need no key."""
MISTAKE = RequestError("the server made a mistake.", status=500)


class Gate:
    """ASGI middleware around all routes."""

    def __init__(self, app: ASGIApp, api_key: str | None):
        """Let through who has the key (None: everybody)."""
        self._app, self._key = app, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, has_begun = Headers(scope=scope), False
        given = headers.get("x-request-id", "")
        number = given if re.fullmatch(r"[\x21-\x7e]{1,128}", given) else uuid.uuid4().hex

        async def numbered(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                MutableHeaders(scope=message)["x-request-id"] = number
            await send(message)

        try:
            if scope["path"] not in _OPEN and not self._lets_in(headers):
                raise RequestError(
                    "this server wants its API key: send `Authorization: Bearer KEY`.",
                    status=401,
                    code="invalid_api_key",
                )
            await self._app(scope, receive, numbered)
        except RequestError as error:
            await error_response(error, asks=scope["path"] == "/")(scope, receive, numbered)
        except Exception:
            _LOG.exception("request %s failed", number)
            if not has_begun:
                await error_response(MISTAKE)(scope, receive, numbered)

    def _lets_in(self, headers: Headers) -> bool:
        if self._key is None:
            return True
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "basic":  # what browsers send: a name, and the key as password
            try:
                given = base64.b64decode(given, validate=True).decode("utf-8", "replace").partition(":")[2]
            except (binascii.Error, ValueError):
                return False
        elif kind.lower() != "bearer":
            return False
        return hmac.compare_digest(given.strip().encode("utf-8", "replace"), self._key.encode("utf-8"))


def error_response(error: RequestError, asks: bool = False) -> Response:
    """The answer that says what is wrong; `asks`: let a browser ask for the key."""
    headers: dict[str, str] = {}
    if error.status == 503:
        headers["retry-after"] = _RETRY_SECONDS
    if error.status == 401:
        headers["www-authenticate"] = 'Basic realm="cramjax"' if asks else "Bearer"
    if error.status in (408, 413):
        headers["connection"] = "close"  # the rest of the body is not read
    return JSONResponse(error.body(), error.status, headers)
