"""What the base's tokenizer makes of some texts in a process like the api's, without torch, as JSON.

Run as `python torch_free.py FOLDER...`; `results` is the same for the process that imports it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from onebase_edge.errors import InvalidRequestError
from onebase_server.inference.tokenization import BaseTokenizer, TemplateInput, leave_torch_out

TEXTS = (
    "", " ", "The capital of France is", "  two  spaces\n\tand a tab ", "naïve 🎉 漢字 2024 1234567",
    "<s>[INST] hi [/INST]</s>", "<|im_start|>user\nhi<|im_end|>", "don't  <extra>x <extra> y", "<0x0A>\n\n",
)  # fmt: skip
CHAT = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi 🎉 <extra>"})


def results(folder: str) -> dict[str, Any]:
    """Ids, texts, the chat, and what each token stands for."""
    tokenizer = BaseTokenizer(folder)
    ids = [tokenizer.encode(text) for text in TEXTS]
    try:
        chat = tokenizer.encode_chat(TemplateInput(CHAT))
    except InvalidRequestError as error:
        chat = [error.code]
    size = len(tokenizer._tokenizer)
    tokens = [[tokenizer.token_text(one), tokenizer.text_bytes(one).hex()] for one in range(size + 2)]
    return {
        "class": type(tokenizer._tokenizer).__name__,
        "ids": ids,
        "texts": [tokenizer.decode(one) for one in ids],
        "chat": chat,
        "tokens": tokens if size < 5000 else tokens[:100] + tokens[-100:],
        "special": sorted(tokenizer.special),
    }


if __name__ == "__main__":
    leave_torch_out()
    found = {folder: results(folder) for folder in sys.argv[1:]}
    sys.stdout.write(json.dumps({"torch": sys.modules["torch"] is not None, "found": found}))
