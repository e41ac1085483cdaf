"""What a client is told, in the form of OpenAI's errors."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A request that gets no answer.

    Attributes:
        status: HTTP status.
        message: what was wrong, and what to do.
        code: OpenAI's code, such as ``"context_length_exceeded"``.
        param: the field of the request that is meant.
        headers: further headers of the reply.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    def content(self) -> dict[str, Any]:
        """The reply's body."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be understood, or asks for what there is not: status 400."""
    return ApiError(400, message, code=code or "invalid_value", param=param)
