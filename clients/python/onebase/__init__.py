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
from .adapter_types import (
    Activation,
    Adapter,
    AdapterSource,
    AdapterVersion,
    ModuleReport,
    Progress,
    ProgressCallback,
    ProofReport,
    VersionFailure,
    VersionReport,
)
from .errors import (
    AdapterRejectedError,
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
    PermissionDeniedError,
    RateLimitError,
    ServerUnavailableError,
    StorageFullError,
    StreamError,
    UnprocessableError,
)
from .types import (
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
    "Activation",
    "Adapter",
    "AdapterRejectedError",
    "AdapterSource",
    "AdapterSpec",
    "AdapterVersion",
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
    "ModuleReport",
    "NotFoundError",
    "OneBaseError",
    "PayloadTooLargeError",
    "PermissionDeniedError",
    "Piece",
    "Progress",
    "ProgressCallback",
    "ProofReport",
    "RateLimitError",
    "SamplingFields",
    "ServerUnavailableError",
    "ServerVersion",
    "StorageFullError",
    "Stream",
    "StreamError",
    "Timeout",
    "Timing",
    "UnprocessableError",
    "Usage",
    "VersionFailure",
    "VersionReport",
    "__version__",
]
