"""No single operation of a chat template takes much time or memory, whatever leads it there."""

from __future__ import annotations

import resource
import time
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_fd.models import template_sandbox
from mlx_fd.models.chat_template import DEFAULT_DATE, ChatTemplate, fitted
from mlx_fd.models.template_bounds import BoundedEnvironment, TooLarge
from support import tiny

# Each reads n, 10, so that nothing of it is done when it is compiled.
_LARGE = {
    "a power": "{{ 9 ** (9 ** n) }}",
    "a power of powers": "{% set b = 9 ** (n * 99) %}{{ b ** (n * 99) }}",
    "a product of numbers": "{% set b = 2 ** (n * 6000) %}{{ b * b * b }}",
    "a repeated text": "{{ 'x' * (n ** 9) }}",
    "a text that repeats": "{{ (n ** 9) * 'x' }}",
    "a repeated list": "{{ [1] * (n ** 9) }}",
    "a sum that doubles": "{% set s = namespace(t='x') %}{% for _ in range(n * 4) %}"
    "{% set s.t = s.t + s.t %}{% endfor %}",
    "a text that doubles": "{% set s = namespace(t='x') %}{% for _ in range(n * 4) %}"
    "{% set s.t = s.t ~ s.t %}{% endfor %}",
    "a list that doubles": "{% set s = namespace(t=['x']) %}{% for _ in range(n * 4) %}"
    "{% set s.t = [s.t, s.t] %}{% endfor %}{{ s.t }}",
    "a tuple that doubles": "{% set s = namespace(t=('x',)) %}{% for _ in range(n * 4) %}"
    "{% set s.t = (s.t, s.t) %}{% endfor %}{{ s.t | string | length }}",
    "a dict that doubles": "{% set s = namespace(t={}) %}{% for _ in range(n * 4) %}"
    "{% set s.t = {'a': s.t, 'b': s.t} %}{% endfor %}{{ s.t }}",
    "a block": "{% set t = 'x' * (n ** 5) %}{% set u %}"
    "{% for _ in range(n * 99) %}{{ t }}{% endfor %}{% endset %}",
    "a text of one's own width": "{{ 'x'.ljust(n ** 9) }}",
    "zeros": "{{ 'x'.zfill(n ** 9) }}",
    "bytes": "{{ n.to_bytes(n ** 9, 'big') }}",
    "tabs": "{{ ('\t' * (n ** 5)).expandtabs(n ** 5) }}",
    "a middle": "{{ 'x' | center(n ** 9) }}",
    "an indent": "{{ ('x\n' * (n ** 5)) | indent(n ** 5) }}",
    "an indent of text": "{{ ('x\n' * (n ** 5)) | indent('x' * (n ** 4)) }}",
    "a wrap": "{{ ('x ' * (n ** 5)) | wordwrap(1, wrapstring='x' * (n ** 4)) }}",
    "a batch": "{{ [1] | batch(n ** 9, 'x') | list }}",
    "a slice": "{{ [1] | slice(n ** 9) | list }}",
    "digits": "{{ 1.5 | round(n ** 9, 'floor') }}",
    "JSON": "{{ [[1]] | tojson(indent=n ** 9) }}",
    "a field": "{{ '%999999999d' % n }}",
    "a field of a width": "{{ '%*d' % (n ** 9, n) }}",
    "a field of the filter": "{{ '%.999999999f' | format(n) }}",
    "a field in braces": "{{ '{:>999999999}'.format(n) }}",
    "a field in braces of a width": "{{ '{:{w}}'.format(n, w=n ** 9) }}",
    "a field in braces of a map": "{{ '{n:{w}}'.format_map({'n': n, 'w': n ** 9}) }}",
    "many fields": "{{ ('%(a)s' * (n ** 5)) % {'a': 'x' * (n ** 4)} }}",
    "replaced": "{{ ('x' * (n ** 5)) | replace('x', 'y' * (n ** 4)) }}",
    "replaced by a method": "{{ ('x' * (n ** 5)).replace('', 'y' * (n ** 4)) }}",
    "joined": "{{ range(99999) | join('x' * (n ** 4)) }}",
    "joined by a method": "{{ ('x' * (n ** 4)).join(['a'] * (n ** 5)) }}",
    "joined as they come": "{{ ([1] * (n ** 5)) | map('center', n ** 4) | join }}",
    "a list of what comes": "{{ ([1] * (n ** 5)) | map('center', n ** 4) | list | length }}",
    "paragraphs": "{{ lipsum(n ** 5) }}",
    "a table": "{{ 'x'.translate({120: 'y'}) }}",
}
_USUAL = (
    "{{ 'a' ~ n ~ 'b' ~ [1, 'c'] ~ none }}{{ 2 ** n + 7 % 3 * n }}{{ 2 ** -1 }}{{ 'ab' * 3 }}",
    "{{ messages | map(attribute='content') | join('\n') | indent(4) }}",
    "{{ [1, 2] | tojson(indent=2) }}{{ (n, 1) in [(10, 1)] }}{{ 'x' if n > 3 else 'y' }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ (1, 2)[0] }}",
    "{% for key, value in {'a': 1, 'b': [n]}.items() %}{{ key }}{{ value }}{% endfor %}",
    "{{ '%s is %05.1f' % ('x', n) }}{{ '%d %%' | format(n) }}{{ '{{{}}}: {:>5}'.format(1, 'x') }}",
    "{{ 'x' | center(9) }}{{ 'x'.ljust(5) }}{{ ', '.join(['a', 'b']) }}{{ 3.14159 | round(2) }}",
    "{{ [1, 2, 3] | batch(2, 0) | list }}{{ messages | join('; ', attribute='role') }}",
    "{% macro m(x, y=2) %}{{ x }}-{{ y }}{% endmacro %}{{ m(1) + m(2, y=n) }}",
    "{{ messages[0].content.replace('a', 'bb').split('b')[-1].strip() | upper | trim | title }}",
    "{% set ns = namespace(a=[]) %}{% set ns.a = ns.a + [n] %}{{ ns.a }}",
)
_GIVEN: dict[str, Any] = {
    "n": 10,
    "messages": [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": "a\nb"}],
}


@pytest.mark.parametrize("name", _LARGE)
def test_what_is_large_is_refused_before_it_is_made(name: str) -> None:
    template = BoundedEnvironment().from_string(_LARGE[name])
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Exception) as refused:
        template.render(_GIVEN)
    left_out = name in ("paragraphs", "a table")
    assert isinstance(refused.value, TooLarge) != left_out, refused.value
    assert time.monotonic() - begin < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


@pytest.mark.parametrize("source", _USUAL)
def test_what_templates_do_is_what_jinja_does(source: str) -> None:
    extensions = ["jinja2.ext.loopcontrols"]
    plain = ImmutableSandboxedEnvironment(extensions=extensions).from_string(source)
    ours = BoundedEnvironment(extensions=extensions).from_string(source)
    assert ours.render(_GIVEN) == plain.render(_GIVEN)


def test_a_long_conversation_is_not_too_large() -> None:
    """300 000 characters, through whatever templates do with them."""
    messages = [{"role": "user", "content": "Tom has 3 apples.\n" * 500} for _ in range(33)]
    source = (
        "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t + m.role ~ ':' "
        "~ m.content | trim | replace('\n', '\n ') + '\n' %}{% endfor %}"
        "{{ ns.t | indent(2) }}{{ messages | tojson }}"
    )
    assert len(BoundedEnvironment().from_string(source).render(messages=messages)) > 600_000


@pytest.mark.parametrize("bad", ["{{ 'x' * (900000000 + n) }}", "{{ 9 ** (9 ** (7 + n)) }}"])
def test_what_is_said_leads_no_template_beyond_its_limits(bad: str) -> None:
    """It was tried with other texts."""
    source = (
        "{% if 'apples' in messages[0].content %}{% set n = messages | length %}"
        + bad
        + "{% endif %}"
        + tiny.CHAT_TEMPLATE
    )
    template = fitted(ChatTemplate(source=source))
    begin = time.monotonic()
    with pytest.raises(template_sandbox.TooMuch, match="more time or memory than any template"):
        template.render(["Tom has 3 apples."])
    assert time.monotonic() - begin < 1
    assert template_sandbox.render("{{ 1 }}", {}, DEFAULT_DATE, "it") == "1"
