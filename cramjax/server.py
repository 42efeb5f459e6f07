"""What a server is, as a configuration. Imports no jax."""

from dataclasses import dataclass, field
from typing import Literal

from cramjax.ranges import Count, Natural, NotNegative, Positive
from cramjax.serving import EngineConfig


@dataclass(frozen=True)
class ServeConfig:
    """Where a model is served, to whom, and how much is taken on."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0: all of this machine's."""
    port: Natural = 8000
    """Port to listen at; 0: any that is free."""
    api_key: str | None = None
    """What clients must give as `Authorization: Bearer KEY`, on every route but /health (browsers ask for it as a
    password). Default: $CRAMJAX_API_KEY; without either, everybody is served."""
    name: str | None = None
    """What the model is called by clients. Default: the name of its directory."""
    chat_template: str = "auto"
    """`auto` (the model's own), `plain` (each turn after its speaker's name), or the path of a Jinja template."""
    tool_calls: Literal["auto", "hermes", "llama3", "mistral"] = "auto"
    """How the model writes calls of tools: `auto` is as its chat template says; `hermes` (and Qwen's) is JSON between
    <tool_call> marks, `llama3` an answer that is {"name": …, "parameters": …}, `mistral` a list after [TOOL_CALLS]."""
    weights: Literal["auto", "float32", "bfloat16", "int8", "int4", "w8a8", "w4a8"] = "auto"
    """How weights are held: `auto` is the precision that the model computes in; int8 and int4 round them to codes with
    a scale for 64 inputs; w8a8 and w4a8 round activations to 8 bits too, on CPUs, which is faster for several rows."""
    queue: Natural = 64
    """Requests that may wait while the engine's slots are taken; more get 503 at once. Each choice of `n` is one."""
    queue_tokens: Count = 65536
    """Tokens of prompts that may wait; past them, 503 at once."""
    body_bytes: Count = 4_000_000
    """Most bytes of a request's body; more get 413."""
    body_seconds: Positive = 30.0
    """Seconds in which a body must have come; else 408. So many has the head of a request too."""
    connections: Count = 512
    """Connections that are served at once; more get 503, and past twice as many are closed without a word."""
    request_seconds: Positive = 600.0
    """Seconds after which an answer that is not done ends with an error."""
    drain_seconds: NotNegative = 30.0
    """Seconds that answers in progress get to end after SIGTERM; 0 ends them at once."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """What the engine may take, and how it works."""
