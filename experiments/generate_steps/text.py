"""Text to tokens and back: the checkpoint's tokenizer and chat template, or plain bytes.

A chat template is a jinja2 program of the checkpoint. It runs in jinja2's sandbox, which gives it
the messages and nothing of Python: no attribute that starts with an underscore, no import, no file.
"""

import dataclasses
import json
import pathlib
from typing import Any

from moejax.core.errors import InputError, check
from moejax.interop.hf.tensors import read_json

BYTES = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """A tokenizer and what ends a text; without a tokenizer a token is a byte."""

    tokenizer: Any = None
    stop: frozenset[int] = frozenset()
    template: str | None = None
    special: dict[str, str] = dataclasses.field(default_factory=dict)

    def encode(self, text: str, *, chat: bool = False) -> list[int]:
        """The tokens of a prompt; with `chat` of one user's message in the template."""
        text = self.chat(text) if chat else text
        if self.tokenizer is None:
            return list(text.encode())
        return self.tokenizer.encode(text, add_special_tokens=not chat).ids

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens; half a character at the end is a replacement mark."""
        if self.tokenizer is None:
            return bytes(t for t in tokens if t < BYTES).decode("utf-8", errors="replace")
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def chat(self, message: str) -> str:
        """The prompt that the template makes of one user's message."""
        if self.template is None:
            raise InputError("--chat: the checkpoint has no chat template")
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(reason: str) -> None:
            raise InputError(f"--chat: the template refuses: {reason}")

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        messages = [{"role": "user", "content": message}]
        try:
            return environment.from_string(self.template).render(
                messages=messages,
                add_generation_prompt=True,
                raise_exception=refuse,
                **self.special,
            )
        except TemplateError as error:
            raise InputError(f"--chat: the template does not render: {error}") from error


def read_text(folder: pathlib.Path, vocab_size: int) -> Text:
    """The tokenizer of a model folder; bytes for a model of 256 tokens without one."""
    tokenizer = None
    if (folder / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises no class of its own
            raise InputError(f"{folder / 'tokenizer.json'} is no tokenizer: {error}") from error
    else:
        check(
            vocab_size == BYTES,
            f"{folder} has no tokenizer.json, and its {vocab_size} tokens are not bytes",
        )
    config = _optional(folder / "tokenizer_config.json")
    known = [name for name in ("bos_token", "eos_token") if config.get(name)]
    return Text(
        tokenizer=tokenizer,
        stop=_stop_tokens(folder),
        template=_template(folder, config),
        special={name: _content(config[name]) for name in known},
    )


def _optional(path: pathlib.Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _content(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def _template(folder: pathlib.Path, config: dict[str, Any]) -> str | None:
    """The file where there is one, else the config's, of which `default` counts."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text()
    template = config.get("chat_template")
    if isinstance(template, list):
        known = [one for one in template if isinstance(one, dict)]
        named = {one.get("name"): one.get("template") for one in known}
        template = named.get("default")
    check(
        template is None or isinstance(template, str),
        f"{folder / 'tokenizer_config.json'}: chat_template {json.dumps(template)[:60]} is no text",
    )
    return template


def _stop_tokens(folder: pathlib.Path) -> frozenset[int]:
    """`eos_token_id` of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        ids = _optional(folder / name).get("eos_token_id")
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            good = all(type(token) is int for token in ids)
            check(good, f"{folder / name}: eos_token_id {json.dumps(ids)[:60]} are no tokens")
            return frozenset(ids)
    return frozenset()


def pad(prompts: list[list[int]], *, vocab_size: int) -> tuple[list[list[int]], list[list[bool]]]:
    """Prompts of equal length, padded on the right, and True where they are not padding."""
    longest = max(len(prompt) for prompt in prompts)
    for i, prompt in enumerate(prompts):
        check(len(prompt) > 0, f"a prompt without tokens: number {i + 1} of {len(prompts)}")
        check(max(prompt) < vocab_size, f"token {max(prompt)} of a prompt exceeds {vocab_size}")
    tokens = [prompt + [0] * (longest - len(prompt)) for prompt in prompts]
    mask = [[i < len(prompt) for i in range(longest)] for prompt in prompts]
    return tokens, mask
