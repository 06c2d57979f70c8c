"""The config.json of a checkpoint, read strictly: every value has the type that is asked for."""

import dataclasses
import json
from typing import Any

from moejax.core.errors import InputError, check


@dataclasses.dataclass(frozen=True)
class Fields:
    """The values of a config.json. Names may have aliases: the first that is there counts."""

    values: dict[str, Any]

    def get(self, *names: str, default: Any = None) -> Any:
        """The value, or `default` where it is absent or null."""
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        return default

    def integer(self, *names: str, default: int | None = None) -> int:
        return self._typed(names, default, int)

    def flag(self, *names: str, default: bool | None = None) -> bool:
        return self._typed(names, default, bool)

    def number(self, *names: str, default: float | None = None) -> float:
        value = self.get(*names, default=default)
        return float(self._check(names, value, type(value) in (int, float), "a number"))

    def text(self, *names: str, default: str | None = None) -> str:
        return self._typed(names, default, str)

    def _typed(self, names, default, kind):
        value = self.get(*names, default=default)
        return self._check(names, value, type(value) is kind, f"of type {kind.__name__}")

    def _check(self, names, value, fits, what):
        check(value is not None, f"config.json lacks {' or '.join(names)}")
        check(fits, f"config.json: {names[0]}={json.dumps(value)} is not {what}")
        return value

    def want(self, name: str, *allowed: Any) -> None:
        """Raises `InputError` unless the value is absent, null or one of `allowed`."""
        value = self.values.get(name)
        if value is not None and value not in allowed:
            known = " or ".join(json.dumps(value) for value in allowed) or "null"
            raise InputError(
                f"config.json: {name}={json.dumps(value)} is not supported, only {known}"
            )

    def layer_types(self, known: tuple[str, ...], default: tuple[str, ...]) -> list[str]:
        """The kind of attention of every layer, all of them `known`; `default` repeats."""
        total = self.integer("num_hidden_layers")
        kinds = self.get("layer_types", default=[default[i % len(default)] for i in range(total)])
        wrong = [kind for kind in kinds if kind not in known]
        check(not wrong, f"config.json: layer_types has {wrong[:1]}, known are {', '.join(known)}")
        check(
            len(kinds) == total, f"config.json: {len(kinds)} layer_types for {total} hidden layers"
        )
        return kinds

    def activation(self) -> str:
        """The name of `hidden_act` here."""
        self.want("hidden_act", "silu", "swish")
        return "silu"
