"""/v1/embeddings: one vector for each text."""

import asyncio
import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from starlette.types import Send

from cramjax.errors import DataError
from cramjax.serve.embed import tokens_to_embed
from cramjax.serve.embedder import TextToEmbed
from cramjax.serve.http.answering import Answering, last_words, send_whole
from cramjax.serve.http.fields import RequestError
from cramjax.serve.http.served import Served
from cramjax.serve.http.tables import embedding_table


class Embedding(Answering):
    """The route, as an ASGI application."""

    async def answer(self, values: Mapping[str, Any], send: Send) -> None:
        """Embed what a body holds."""
        service = self.service
        asked, rows = await asyncio.to_thread(read, values, service.served)
        vectors: list[np.ndarray] = [np.zeros(0)] * len(rows)
        with service.worker.places(len(rows), "input"):
            service.metrics.prompts([len(row) for row in rows])
            answers = service.worker.submit([TextToEmbed(tuple(row)) for row in rows])
            try:
                async with asyncio.timeout(service.config.request_seconds):
                    while (came := await answers.next()) is not None:
                        index, embedded = came
                        if embedded.vector is None:
                            raise RequestError("this server is about to end: ask another.", status=503, code="draining")
                        vectors[index] = embedded.vector
            except TimeoutError:
                raise self.too_late() from None
            finally:
                answers.close()
        as_text = asked["encoding_format"] == "base64"
        data = [
            {"object": "embedding", "index": index, "embedding": _base64(vector) if as_text else vector.tolist()}
            for index, vector in enumerate(vectors)
        ]
        tokens = sum(map(len, rows))
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        async with last_words():
            await send_whole(send, {"object": "list", "data": data, "model": service.served.name, "usage": usage})


def read(values: Mapping[str, Any], served: Served) -> tuple[dict[str, Any], list[list[int]]]:
    """The fields of a body, and the ids of its texts.

    Raises:
        RequestError: a field is wrong, or a text is too long.
    """
    asked = embedding_table(served.vocab_size).read(values)
    served.require_name(asked["model"])
    if served.makes != "embeddings":
        raise RequestError("this model continues text, and has no embeddings: use /v1/completions.", "model",
                           code="unsupported")  # fmt: skip
    if asked["dimensions"] not in (None, served.model.config.width):
        raise RequestError(f"dimensions must be {served.model.config.width}, this model's.", "dimensions")
    given = asked["input"]
    texts = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    try:
        return asked, tokens_to_embed(served.model, texts, cut=asked["truncate_prompt_tokens"] is not None)
    except DataError as error:
        raise RequestError(str(error), "input", code="context_length_exceeded") from None


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
