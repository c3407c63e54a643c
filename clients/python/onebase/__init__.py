"""The OneBase SDK: ask one base model, and any adapter on it.

>>> from onebase import Client
>>> with Client() as client:  # doctest: +SKIP
...     print(client.chat("What is the capital of France?").text)
Paris.
"""

from ._async_client import AsyncClient
from ._client import Client
from ._config import Timeout
from ._streaming import AsyncStream, Stream
from ._version import sdk_version
from .errors import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    ConflictError,
    InternalServerError,
    InvalidResponseError,
    NotFoundError,
    OneBaseError,
    PayloadTooLargeError,
    RateLimitError,
    ServerUnavailableError,
    StreamError,
    UnprocessableError,
)
from .types import (
    Adapter,
    AdapterSpec,
    AdapterWeight,
    Choice,
    Generation,
    Health,
    Logprobs,
    Message,
    Messages,
    Model,
    Piece,
    SamplingFields,
    ServerVersion,
    Timing,
    Usage,
)

__version__ = sdk_version()

__all__ = [
    "APIConnectionError",
    "APIStatusError",
    "APITimeoutError",
    "Adapter",
    "AdapterSpec",
    "AdapterWeight",
    "AsyncClient",
    "AsyncStream",
    "AuthenticationError",
    "BadRequestError",
    "Choice",
    "Client",
    "ConflictError",
    "Generation",
    "Health",
    "InternalServerError",
    "InvalidResponseError",
    "Logprobs",
    "Message",
    "Messages",
    "Model",
    "NotFoundError",
    "OneBaseError",
    "PayloadTooLargeError",
    "Piece",
    "RateLimitError",
    "SamplingFields",
    "ServerUnavailableError",
    "ServerVersion",
    "Stream",
    "StreamError",
    "Timeout",
    "Timing",
    "UnprocessableError",
    "Usage",
    "__version__",
]
