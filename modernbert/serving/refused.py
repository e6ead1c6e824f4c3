"""A request that gets an error, in the form that the clients of its route read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

RERANK = ("/v1/rerank", "/v2/rerank", "/v1/multi-vector")
PAGE = "/"


@dataclass
class Refused(Exception):
    """Why a request has no answer.

    Attributes:
        status: of HTTP. message: what was wrong, and what to do. param: the field of the request. code: as of OpenAI.
        headers: of the response.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


def error_body(path: str, refused: Refused) -> dict[str, object] | str:
    """The error as JSON for the clients of a route, or as text for the page.

    The clients of Cohere show `message`, those of Jina `detail`, and those of OpenAI an object.
    """
    if path == PAGE:
        return refused.message
    if path in RERANK:
        return {"message": refused.message, "detail": refused.message}
    kind = "invalid_request_error" if refused.status < 500 and refused.status != 429 else "server_error"
    error = {
        "message": refused.message,
        "type": "rate_limit_error" if refused.status == 429 else kind,
        "param": refused.param,
        "code": refused.code,
    }
    return {"error": error}
