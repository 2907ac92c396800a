"""What a run's caller is told of a call to the model, which egress saw. PURE."""

from __future__ import annotations

from ringfence.agent.messages import ModelAnswered, ModelAsked
from ringfence.channel.messages import ModelCalled
from ringfence.model import Usage


def model_message(message: ModelCalled) -> ModelAsked | ModelAnswered:
    """That it was asked; once the call is over, what it came to."""
    if not message.over:
        return ModelAsked(request_id=message.request_id)
    usage = Usage(
        input_tokens=message.input_tokens,
        output_tokens=message.output_tokens,
        cache_creation_input_tokens=message.cache_creation_input_tokens,
        cache_read_input_tokens=message.cache_read_input_tokens,
        requests=1,
        cost_usd=message.cost_usd,
    )
    return ModelAnswered(request_id=message.request_id, status=message.status, usage=usage)
