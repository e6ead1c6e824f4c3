"""Settings that a model was built from: fixed, and beside them what Hugging Face's libraries read and set."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, asdict, dataclass, field, fields
from typing import Any

# What these libraries read of every config, and what it is here.
DEFAULTS: dict[str, object] = {
    "is_encoder_decoder": False,
    "name_or_path": "",
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
}


@dataclass(unsafe_hash=True)
class Settings:
    """The base of a config. Its fields are fixed, except those with `hash=False`, which no computation reads.

    transformers' Trainer and sentence-transformers set attributes of a model's config, such as `use_cache`. These go
    to `others`, which are not compared.

    Attributes:
        others: keys of config.json that are not fields. A save keeps them, and `config.id2label` reads one of them.
    """

    others: dict[str, Any] = field(default_factory=dict, compare=False, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "others", dict(self.others))  # a host changes those of one model, not of a preset

    def __setattr__(self, name: str, value: object) -> None:
        own = {each.name: each for each in fields(self)}
        if name in own:
            free = name not in vars(self) or own[name].hash is False
        else:
            free = not hasattr(type(self), name) and (name in self.others or name not in self.to_dict())
        if not free:
            raise FrozenInstanceError(
                f"{type(self).__name__}.{name} is fixed, because a model was built from it: load the model with "
                f"from_pretrained(..., {name}={value!r:.80}), or make another config with dataclasses.replace"
            )
        if name in own:
            object.__setattr__(self, name, value)
        else:
            self.others[name] = value

    def __getattr__(self, name: str) -> object:
        """A key of config.json that is not a field."""
        if not name.startswith("__"):  # copies and pickles ask for these while there are no fields yet
            for known in (vars(self).get("others", {}), self.to_dict(), DEFAULTS):
                if name in known:
                    return known[name]
        raise AttributeError(f"{type(self).__name__} has no setting {name!r}")

    def to_dict(self) -> dict[str, Any]:
        content = asdict(self)
        return content.pop("others") | content

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    def get_text_config(self, decoder: bool = False) -> Settings:
        """This config: transformers asks every model for the config of its text part."""
        return self
