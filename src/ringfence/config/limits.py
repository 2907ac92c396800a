"""Settings of what a fleet may ask of models: rates per lane, and budgets."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, SecretStr, StringConstraints, field_validator, model_validator

from ringfence.config.base import Frozen

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
_Amount = Annotated[float, Field(gt=0, le=1e12)]


class RateSettings(Frozen):
    """What a provider grants the organisation in a window, for some of its models together.

    Attributes:
        provider: by its name in `providers`.
        models: beginnings of their names; `*` is every model. The rate with the longest one that
            fits a model is its rate.
        requests, input_tokens, output_tokens: in a window; what is not set is learned from the
            provider's answers. Input counts as the API counts it: what a cache held does not.
        tenant_requests, tenant_input_tokens, tenant_output_tokens: of each tenant, at most.
        window_seconds: 60, as providers count; a simulator may count faster.
    """

    provider: Name = "anthropic"
    models: list[str] = Field(default_factory=lambda: ["*"])
    requests: _Amount | None = None
    input_tokens: _Amount | None = None
    output_tokens: _Amount | None = None
    tenant_requests: _Amount | None = None
    tenant_input_tokens: _Amount | None = None
    tenant_output_tokens: _Amount | None = None
    window_seconds: float = Field(default=60.0, gt=0, le=3600)


class BudgetSettings(Frozen):
    """What may be spent in a day or a month, of UTC.

    Attributes:
        tenant: `*` gives each tenant one of its own; a name that tenant alone; none is of all
            together.
        usd, tokens: either or both; tokens of all kinds are summed.
        alert: share of it at which an event says so.
    """

    tenant: str | None = "*"
    period: Literal["day", "month"] = "day"
    usd: _Amount | None = None
    tokens: _Amount | None = None
    alert: float = Field(default=0.8, gt=0, le=1)

    @model_validator(mode="after")
    def _something(self) -> BudgetSettings:
        if self.usd is None and self.tokens is None:
            raise ValueError("set usd, tokens or both")
        return self


class LimitSettings(Frozen):
    """Limits that all workers of a store share. They are in force when any rate or budget is set.

    Attributes:
        organisation: whose limits they are, in a store that serves several.
        store: postgresql://… or redis[s]://…; by default a file of the state directory, for the
            workers of one host. A platform whose `database` is set needs one.
        rates, budgets: by names of the operator's.
        weights: of tenants that share unequally; 1 is every other's.
        burst: share of a limit that can be taken at once.
        fill: share of a limit that comes back in a window. With `burst` + `fill` <= 1 no window
            sees more than the limit, wherever it begins.
        batch_share: what runs of low priority get while others wait, so that none starves.
        hold_seconds: how long a request is held open; a run that would wait longer gives its
            sandbox back and waits in the queue. Clients give up after 300 seconds of silence.
    """

    organisation: Name = "default"
    store: SecretStr | None = None
    rates: dict[Name, RateSettings] = Field(default_factory=dict)
    budgets: dict[Name, BudgetSettings] = Field(default_factory=dict)
    weights: dict[str, Annotated[float, Field(gt=0, le=1e6)]] = Field(default_factory=dict)
    burst: float = Field(default=0.04, gt=0, le=1)
    fill: float = Field(default=0.96, gt=0, le=1)
    batch_share: float = Field(default=0.05, gt=0, lt=1)
    hold_seconds: float = Field(default=240.0, ge=0, le=280)

    @field_validator("store")
    @classmethod
    def _store(cls, value: SecretStr | None) -> SecretStr | None:
        kinds = ("postgresql://", "redis://", "rediss://")
        if value is not None and not value.get_secret_value().startswith(kinds):
            raise ValueError("write postgresql://… or redis[s]://…")
        return value

    @property
    def on(self) -> bool:
        """Whether anything is limited."""
        return bool(self.rates or self.budgets)
