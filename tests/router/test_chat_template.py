"""Templates render byte for byte what transformers renders."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from support.tiny_model import CHATML, byte_level_tokenizer, write_model_folder
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from baton.common.clock import ManualClock
from baton.common.errors import InvalidRequest, ModelError
from baton.router.chat_template import ChatTemplate, load_chat_template

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
NOW_S = 1_750_000_000.0

HEADERS = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header|>system<|end_header|>\\n\\n' }}
{{- 'Today: ' + strftime_now('%d %b %Y') + '\\n\\n' + system + '<|eot|>' }}
{%- for message in messages %}
    {{- '<|start_header|>' + message.role + '<|end_header|>\\n\\n' + message.content | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header|>assistant<|end_header|>\\n\\n' }}
{%- endif %}
"""  # noqa: E501
TOOLS_AND_THINKING = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{%- elif messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, seen=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if not ns.seen and message.role == 'user' %}
        {%- set ns.seen = true %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content and loop.index0 < ns.last %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}
"""
INSTRUCT = """\
{%- set loop_messages = messages[1:] if messages[0].role == 'system' else messages %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user and assistant.') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {%- if loop.last and messages[0].role == 'system' %}
            {{- '[INST] ' + messages[0].content + '\\n\\n' + message.content + ' [/INST]' }}
        {%- else %}
            {{- '[INST] ' + message.content + ' [/INST]' }}
        {%- endif %}
    {%- else %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}
"""
BLOCKS = """\
{% for message in messages %}
    {% if message.role == "system" %}
        {% continue %}
    {% endif %}
    {% if loop.index > 5 %}{% break %}{% endif %}
<turn>{{ message.role }}
{% generation %}
{{ message.content }}
{% endgeneration %}
</turn>
{% endfor %}
{% if add_generation_prompt %}
<turn>assistant
{% endif %}
"""
JSON_LINES = """\
{% set shape = dict(kind='chat', size=messages|length) %}
{{ shape | tojson }}
{{ messages | tojson(indent=2) }}
{% for message in messages %}{{ message | tojson(sort_keys=true) }}
{% endfor %}
{{ messages | map(attribute='role') | join(',') }}{{ dict.fromkeys(['a', 'b']) | tojson }}
"""
MACROS = """\
{% macro turn(role, text) -%}
<{{ role | upper }}>{{ text }}</{{ role | upper }}>
{%- endmacro %}
{%- for message in messages %}
{{ turn(message.role, message.content | replace("'", '"')) }}
{%- if message.name is defined %} by {{ message.name }}{% endif %}
{%- endfor %}
{{ eos_token if not add_generation_prompt }}
"""
TEMPLATES = {
    "chatml": CHATML,
    "headers": HEADERS,
    "thinking": TOOLS_AND_THINKING,
    "instruct": INSTRUCT,
    "blocks": BLOCKS,
    "json": JSON_LINES,
    "macros": MACROS,
}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hi <b>there</b> & 'you'"}],
    "system": [
        {"role": "system", "content": "  Be kind.\n"},
        {"role": "user", "content": "Grüße, 世界 🌶\n\n"},
    ],
    "turns": [
        {"role": "user", "content": "a", "name": "Ann"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
        {"role": "user", "content": "c {{ 1 + 1 }}", "tool_calls": None},
    ],
}


@pytest.fixture(scope="module")
def oracle() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer(), **SPECIAL)


@pytest.fixture
def fixed_now(monkeypatch: pytest.MonkeyPatch) -> None:
    class FixedDatetime(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.fromtimestamp(NOW_S)

    monkeypatch.setattr(chat_template_utils, "datetime", FixedDatetime)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_equals_transformers(
    name: str,
    chat: str,
    add_generation_prompt: bool,
    oracle: PreTrainedTokenizerFast,
    fixed_now: None,
) -> None:
    expected = oracle.apply_chat_template(
        CHATS[chat],
        chat_template=TEMPLATES[name],
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    template = ChatTemplate(TEMPLATES[name], SPECIAL, ManualClock(NOW_S))
    assert template.render(CHATS[chat], add_generation_prompt=add_generation_prompt) == expected


def render(source: str, messages: list[dict[str, Any]]) -> str:
    return ChatTemplate(source, SPECIAL, ManualClock()).render(messages)


def test_the_templates_own_refusal_is_told() -> None:
    with pytest.raises(InvalidRequest, match="Roles must alternate") as caught:
        render(INSTRUCT, [{"role": "assistant", "content": "x"}])
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no ' + messages[0].content) }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[7].content }}",
        "{{ messages[0].content.format_map() }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].__class__.__mro__ }}",
        "{% set ns = namespace() %}{% set ns._private = 1 %}",
        "{{ namespace(__class__=1) }}",
    ],
)
def test_failures_never_quote_a_message(source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render(source, [{"role": "user", "content": "canary"}])
    assert "canary" not in caught.value.message


def write_jinja(folder: Path) -> None:
    write_model_folder(folder, template="from config")
    (folder / "chat_template.jinja").write_text("from file")


def write_named(folder: Path) -> None:
    entries = [
        {"name": "tool_use", "template": "for tools"},
        {"name": "default", "template": "by name"},
    ]
    write_model_folder(folder, template=entries)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (write_jinja, "from file"),
        (write_named, "by name"),
        (lambda folder: write_model_folder(folder, template="from config"), "from config"),
    ],
)
def test_where_the_template_is_found(
    write: Callable[[Path], None], expected: str, tmp_path: Path
) -> None:
    write(tmp_path)
    template = load_chat_template(tmp_path, SPECIAL, ManualClock())
    assert template is not None
    assert template.render([{"role": "user", "content": ""}]) == expected


def test_without_a_template_there_is_none(tmp_path: Path) -> None:
    write_model_folder(tmp_path, template=None)
    assert load_chat_template(tmp_path, SPECIAL, ManualClock()) is None


def test_a_broken_template_is_the_models_fault(tmp_path: Path) -> None:
    write_model_folder(tmp_path, template="{% for %}")
    with pytest.raises(ModelError, match="template is broken"):
        load_chat_template(tmp_path, SPECIAL, ManualClock())
