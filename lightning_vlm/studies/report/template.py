"""The page's HTML as a Jinja template: its parts from top to bottom. Everything is escaped but our own drawings."""

from __future__ import annotations

_MACROS = """
{%- macro badge(verdict) -%}
<span class="badge {{ tone(verdict) }}">{{ verdict }}</span>
{%- endmacro -%}

{%- macro missing(lines) -%}
{% if lines %}<div class="alert"><strong>Not shown:</strong>
{% if lines|length == 1 %}{{ lines[0] }}{% else %}<ul>{% for line in lines %}<li>{{ line }}</li>{% endfor %}</ul>
{% endif %}</div>
{% endif %}
{%- endmacro -%}

{%- macro region(label) -%}
<div class="scroll" tabindex="0" role="region" aria-label="{{ label }}">{{ caller() }}</div>
{%- endmacro -%}

{%- macro key(look) -%}{{ swatch(look)|safe }}{%- endmacro -%}

{%- macro endpoint(e) -%}
<p class="quiet">{{ e.about }}</p>
{{ missing([e.missing] if e.missing else []) }}
{% if e.groups %}
{% set titled = e.groups|length > 1 or e.groups[0].title %}
{% call region("Arms: " ~ e.name) %}
<table>
<caption><span>{{ e.name }}: means of the arms with their 95 % intervals; small dots are seeds</span></caption>
<thead><tr><th scope="col">arm</th><th scope="col" class="n">mean{{ e.of_scores }}</th>
<th scope="col" class="n">95 % interval</th><th scope="col">mean, interval, seeds</th>
<th scope="col" class="n">seeds</th><th scope="col" class="n">sd of seeds{{ e.of_differences }}</th>
<th scope="col">interval over</th></tr></thead>
{% for group in e.groups %}
<tbody>
{% if titled %}<tr><th class="rowgroup" scope="rowgroup" colspan="7">{{ group.title }}</th></tr>{% endif %}
{% for arm in group.arms %}
<tr><th scope="row">{{ arm.name }}</th><td class="n">{{ arm.mean }}</td><td class="n">{{ arm.interval }}</td>
<td class="mk">{{ arm.mark|safe }}</td><td class="n">{{ arm.seeds }}</td><td class="n">{{ arm.spread }}</td>
<td>{{ arm.over }}</td></tr>
{% endfor %}
</tbody>
{% endfor %}
<tfoot><tr class="axisrow"><td colspan="3"></td><td class="mk">{{ e.arm_axis|safe }}</td><td colspan="3"></td></tr>
</tfoot>
</table>
{% endcall %}
{% if e.groups|selectattr("pairs")|list %}
<p class="quiet">Differences between arms{{ e.of_differences }}; bars are 95 % intervals</p>
{% for group in e.groups if group.pairs %}
{% if titled %}<p class="rowgroup">{{ group.title }}</p>{% endif %}
<ul class="pairs">
{% for pair in group.pairs if pair.main %}
<li><span>{{ badge(pair.verdict) }}</span><span>{{ pair.short }}</span>{{ pair.mark|safe }}</li>
{% endfor %}
<li class="axisrow" aria-hidden="true"><span></span><span></span>{{ e.pair_axis|safe }}</li>
</ul>
{% set rest = group.pairs|rejectattr("main")|list %}
{% if rest %}<details class="print"><summary>{{ rest|length }} more pairs, none of them told apart
{{- " (" ~ group.title ~ ")" if group.title }}</summary><ul class="pairs">
{% for pair in rest %}
<li><span>{{ badge(pair.verdict) }}</span><span>{{ pair.short }}</span>{{ pair.mark|safe }}</li>
{% endfor %}
</ul></details>
{% endif %}
{% endfor %}
<details class="print"><summary>Tests in full: {{ e.name }}</summary>
{% call region("Tests: " ~ e.name) %}
<table class="plain">
<caption><span>{{ e.name }}: tests; p is Holm-adjusted over the pairs tested</span></caption>
<thead><tr><th scope="col">pair</th><th scope="col" class="n">difference{{ e.of_differences }}</th>
<th scope="col">95 % interval</th><th scope="col" class="n">p</th><th scope="col">test</th>
<th scope="col">needed</th></tr></thead>
{% for group in e.groups if group.pairs %}
<tbody>
{% if titled %}<tr><th class="rowgroup" scope="rowgroup" colspan="6">{{ group.title }}</th></tr>{% endif %}
{% for pair in group.pairs %}
<tr><th scope="row">{{ pair.a }} − {{ pair.b }}</th><td class="n">{{ pair.difference }}</td>
<td class="n">{{ pair.interval }}</td><td class="n">{{ pair.p }}</td><td>{{ pair.test }}</td>
<td>{{ pair.needed }}</td></tr>
{% endfor %}
</tbody>
{% endfor %}
</table>
{% endcall %}
<ul>{% for group in e.groups %}{% for pair in group.pairs %}<li>{{ pair.sentence }}</li>{% endfor %}{% endfor %}</ul>
</details>
{% endif %}
{% endif %}
{%- endmacro -%}

{%- macro figures(list, section) -%}
{% for f in list %}
{% if f.title != section %}<h3>{{ f.title }}</h3>
{% endif %}
{% if f.about %}<p class="quiet">{{ f.about }}</p>
{% endif %}
{{ missing(f.missing) }}
<div class="charts">
{% for chart in f.charts %}
<figure>
<figcaption>{{ chart.title or f.title }}{% if chart.note %}<span class="sub">{{ chart.note }}</span>{% endif %}
</figcaption>
{{ chart.svg|safe }}
<ul class="legend">{% for drawing, name in chart.legend %}<li>{{ drawing|safe }}{{ name }}</li>{% endfor %}</ul>
<details><summary>Numbers{{ ": " ~ chart.title if chart.title }}</summary>
{% call region("Numbers: " ~ f.title ~ " " ~ chart.title) %}
<table><caption><span>{{ f.title }}{{ ", " ~ chart.title if chart.title }}: mean [95 % interval over seeds]
{%- if chart.thinned %}; {{ chart.thinned }} rows between these are in report.json{% endif %}</span></caption>
<thead><tr>{% for head in chart.heads %}<th scope="col">{{ head }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in chart.rows %}
<tr><th scope="row">{{ row[0] }}</th>{% for cell in row[1:] %}<td class="n">{{ cell }}</td>{% endfor %}</tr>
{%- endfor %}</tbody></table>
{% endcall %}
</details>
</figure>
{% endfor %}
</div>
{% endfor %}
{%- endmacro -%}

{%- macro settings(heads, rows) -%}
{% call region("Settings in which arms differ") %}
<table class="plain">
<caption><span>Keys of the resolved configurations that are not the same in all arms</span></caption>
<thead><tr><th scope="col">key</th>{% for label in heads %}<th scope="col">{{ label }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}
<tr><th scope="row">{{ row[0] }}</th>{% for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table>
{% endcall %}
{%- endmacro -%}

{%- macro unfinished(list) -%}
{% call region("Runs that are not finished") %}
<table><caption><span>Runs without results</span></caption>
<thead><tr><th scope="col">run</th><th scope="col">state</th><th scope="col">exit</th></tr></thead>
<tbody>{% for u in list %}
<tr><th scope="row">{{ u.name }}</th><td>{{ badge(u.state) }}</td><td>{{ u.exit or "–" }}</td></tr>{% endfor %}
</tbody></table>
{% endcall %}
{%- endmacro -%}

{%- macro cost_cells(c) -%}
<td class="n">{{ c.runs }}{% if c.unfinished %} ({{ c.unfinished }} not done){% endif %}</td>
<td class="n">{{ duration(c.seconds) }}</td><td class="n">{{ duration(c.cpu_seconds) }}</td>
<td class="n">{{ number(c.steps) }}</td><td class="n">{{ number(c.tokens) }}</td>
<td class="n">{{ number(c.peak_gib) }}</td>
{%- endmacro -%}

{%- macro cost_heads() -%}
<th scope="col" class="n">runs</th><th scope="col" class="n">time</th><th scope="col" class="n">CPU time</th>
<th scope="col" class="n">steps</th><th scope="col" class="n">tokens</th>
<th scope="col" class="n">peak memory, GiB</th>
{%- endmacro -%}
"""

_TOP = """
<header>
<p class="kicker">Study {{ r.name }}</p>
<h1>{{ r.question }}</h1>
{% for part in c.about %}<p>{{ part }}</p>
{% endfor %}
<p class="quiet wide">{% if c.size %}Axes: {{ c.size }}; {% endif %}{{ r.stages|length }} runs of stages:
{% for state, count in c.states.items() %}{{ count }} {{ state }}{{ ", " if not loop.last }}{% endfor %}
{%- if c.when %}; {{ c.when }}{% endif %}</p>
<nav aria-label="Parts of this report"><ul>
{% for ident, title in parts %}<li><a href="#{{ ident }}">{{ title }}</a></li>
{% endfor %}</ul></nav>
</header>
"""

_ANSWER = """
{% if c.unfinished %}
<section id="unfinished" class="alarm" aria-labelledby="h-unfinished">
<h2 id="h-unfinished">Not finished: {{ c.unfinished|length }} of {{ r.stages|length }} runs of stages</h2>
<p>{% for state, count in c.states.items() if state != "done" %}{{ count }} {{ badge(state) }}
{% endfor %}</p>
<p>What follows is of the others. Run the study again to go on.</p>
{% set broken = c.unfinished|rejectattr("state", "in", ["waiting", "running"])|list %}
{% set waiting = c.unfinished|selectattr("state", "in", ["waiting", "running"])|list %}
{% if broken %}{{ unfinished(broken) }}{% endif %}
{% if waiting %}<details {{ "open" if waiting|length <= 10 }}>
<summary>Waiting or running: {{ waiting|length }}</summary>
{{ unfinished(waiting) }}
</details>{% endif %}
{% for u in c.unfinished if u.log %}
<details class="print" {{ "open" if loop.length <= 3 }}><summary>End of the log of {{ u.name }}</summary>
<pre class="block">{{ u.log }}</pre></details>
{% endfor %}
</section>
{% endif %}
{% if c.endpoints %}
<section id="answer" class="answer" aria-labelledby="h-answer">
<h2 id="h-answer">Answer: {{ c.endpoints[0].name }}</h2>
{% for group in c.endpoints[0].groups if group.answer %}
<p class="lead">{% if group.title %}<span class="quiet">{{ group.title }}:</span> {% endif %}{{ group.answer }}</p>
{% endfor %}
{{ endpoint(c.endpoints[0]) }}
</section>
{% endif %}
{% if c.claims %}
<section id="claims" aria-labelledby="h-claims">
<h2 id="h-claims">Claims of the sources</h2>
<ul class="claims">
{% for claim in c.claims %}
<li><q>{{ claim.says }}</q>{% if claim.source %} <span class="quiet">({{ claim.source }})</span>{% endif %}
<div class="quiet">judged by: {{ claim.endpoint }}</div>
<ul>{% for group, verdict, sentence in claim.judged %}
<li>{{ badge(verdict) }} {% if group %}<strong>{{ group }}</strong>: {% endif %}{{ sentence }}</li>{% endfor %}</ul>
</li>
{% endfor %}
</ul>
</section>
{% endif %}
<section id="budgets" aria-labelledby="h-budgets">
<h2 id="h-budgets">Budgets</h2>
{% if c.unequal %}<p class="alert"><strong>Not equal:</strong> the arms did not spend the same in
{{ c.unequal|join(", ") }}; differences between them may come from there.</p>{% endif %}
{% if r.budget_note %}<p>{{ r.budget_note }}</p>{% endif %}
{% if c.budget %}
{% call region("Budgets") %}
<table><caption><span>What each arm spent, as measured</span></caption>
<thead><tr><th scope="col">arm</th><th scope="col">stage</th><th scope="col">spent per run</th><th scope="col">unit</th>
<th scope="col">over arms</th></tr></thead>
<tbody>{% for b in c.budget %}
<tr><th scope="row">{{ b.label }}</th><td>{{ b.stage }}</td><td>{{ b.values }}</td><td>{{ b.unit }}</td>
<td>{{ badge("equal" if b.equal else "not equal") }}</td></tr>{% endfor %}
</tbody></table>
{% endcall %}
{% else %}<p>The study declares no budget: nothing was held equal, nothing was checked. Costs are below.</p>{% endif %}
</section>
{% if c.endpoints|length > 1 %}
<section id="endpoints" aria-labelledby="h-endpoints">
<h2 id="h-endpoints">Other endpoints</h2>
{% for e in c.endpoints[1:] %}
<h3>{{ e.name }}</h3>
{% for group in e.groups if group.answer %}
<p>{% if group.title %}<span class="quiet">{{ group.title }}:</span> {% endif %}{{ group.answer }}</p>
{% endfor %}
{{ endpoint(e) }}
{% endfor %}
</section>
{% endif %}
"""

_CURVES = """
{% for ident, title, list in charts if list %}
<section id="{{ ident }}" aria-labelledby="h-{{ ident }}">
<h2 id="h-{{ ident }}">{{ title }}</h2>
{{ figures(list, title) }}
</section>
{% endfor %}
{% if c.samples %}
<section id="samples" aria-labelledby="h-samples">
<h2 id="h-samples">Sample outputs</h2>
<p class="quiet">The first problems of the evaluation, not chosen; of each arm the first answer of its first seed
({{ c.samples.about }}).</p>
{{ missing(c.samples.missing) }}
{% for s in c.samples.samples %}
<article class="sample">
<div>
<h3>{{ s.id }}</h3>
{% if s.title %}<p class="quiet">{{ s.title }}</p>
{% endif %}
{% for picture in s.pictures if picture %}<img src="{{ picture }}" alt="Picture {{ loop.index }} of {{ s.id }}">
{% else %}<p class="quiet">no picture</p>{% endfor %}
<dl><dt>prompt</dt><dd><pre>{{ s.prompt }}</pre></dd><dt>gold</dt><dd><pre>{{ s.gold }}</pre></dd></dl>
</div>
<ul class="outputs">
{% for a in s.answers %}
<li class="output {{ a.kind }}">
<h4>{{ key(a.look) }}<span>{{ a.label }}</span></h4>
{{ badge(a.verdict) }}
<pre>{{ a.output or "(empty)" }}</pre>
<div class="quiet">{{ a.details }}</div>
</li>
{% endfor %}
</ul>
</article>
{% endfor %}
</section>
{% endif %}
"""

_END = """
<section id="costs" aria-labelledby="h-costs">
<h2 id="h-costs">Costs</h2>
{% call region("Costs of arms") %}
<table>
<caption><span>Each arm with all that it uses, all seeds; what arms share counts in full for each</span></caption>
<thead><tr><th scope="col">arm</th>{{ cost_heads() }}</tr></thead>
<tbody>{% for cost in c.arm_costs %}
<tr><th scope="row">{{ cost.label }}</th>{{ cost_cells(cost) }}</tr>{% endfor %}
</tbody>
<tfoot><tr><th scope="row">whole study, everything once</th>{{ cost_cells(c.total_cost) }}</tr></tfoot>
</table>
{% endcall %}
<details class="print"><summary>Per stage</summary>
{% call region("Costs of stages") %}
<table><caption><span>Costs per stage and arm, summed over seeds (memory: the largest)</span></caption>
<thead><tr><th scope="col">stage</th><th scope="col">arm</th>{{ cost_heads() }}</tr></thead>
<tbody>{% for cost in c.stage_costs %}
<tr><th scope="row">{{ cost.what }}</th><td>{{ cost.label }}</td>{{ cost_cells(cost) }}</tr>{% endfor %}
</tbody></table>
{% endcall %}
</details>
<details><summary>Every run of a stage</summary>
{% call region("Runs of stages") %}
<table class="plain"><caption><span>Runs of stages, in the order of the study</span></caption>
<thead><tr><th scope="col">run</th><th scope="col">state</th><th scope="col" class="n">time</th>
<th scope="col" class="n">CPU time</th><th scope="col" class="n">steps</th><th scope="col" class="n">tokens</th>
<th scope="col" class="n">GiB</th><th scope="col" class="n">threads</th></tr></thead>
<tbody>{% for row in r.stages %}
<tr><th scope="row">{{ row.name }}</th><td>{{ badge(row.state) }}</td>
<td class="n">{{ duration(measured(row, "seconds")) }}</td>
<td class="n">{{ duration(measured(row, "cpu_seconds")) }}</td>
<td class="n">{{ number(measured(row, "steps")) }}</td><td class="n">{{ number(measured(row, "tokens")) }}</td>
<td class="n">{{ number(measured(row, "peak_gib")) }}</td><td class="n">{{ number(measured(row, "threads")) }}</td></tr>
{%- endfor %}</tbody></table>
{% endcall %}
</details>
</section>
<section id="settings" aria-labelledby="h-settings">
<h2 id="h-settings">Settings in which arms differ</h2>
{% if c.differences[1] %}
{{ settings(c.differences[0], c.differences[1][:12]) }}
{% if c.differences[1][12:] %}<details><summary>{{ c.differences[1]|length - 12 }} more settings</summary>
{{ settings(c.differences[0], c.differences[1][12:]) }}
</details>{% endif %}
{% else %}<p>None.</p>{% endif %}
</section>
<section id="made" aria-labelledby="h-made">
<h2 id="h-made">How it was made</h2>
{% if c.notes %}
<h3>How to read the numbers</h3>
<ul>{% for note in c.notes %}<li>{{ note }}</li>{% endfor %}</ul>
{% endif %}
<h3>Environment</h3>
{% if c.environment %}
{% call region("Environment") %}
<table class="plain"><caption><span>Where the runs ran</span></caption>
<thead><tr><th scope="col">what</th><th scope="col">value</th></tr></thead>
<tbody>{% for key, value in c.environment.items() %}
<tr><th scope="row">{{ key }}</th><td>{{ value }}</td></tr>{% endfor %}
</tbody></table>
{% endcall %}
{% else %}<p>No run has left an environment.json.</p>{% endif %}
<h3>The study file</h3>
<details class="print"><summary>{{ r.file.name }}</summary><pre class="block">{{ yaml }}</pre></details>
</section>
"""

PAGE = f"""{_MACROS}<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{{{{ r.question }}}} – {{{{ r.name }}}}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{{{{ policy }}}}">
<style>{{{{ css|safe }}}}</style>
</head>
<body>
<a class="skip" href="#content">To the content</a>
{_TOP}
<main id="content">
{_ANSWER}{_CURVES}{_END}
</main>
<footer><p>Made by <code>lightning-vlm study report {{{{ r.file.name }}}}</code>. The same numbers are in report.md,
report.json, endpoints.csv, pairs.csv and stages.csv beside this page.</p></footer>
<script>{{{{ script|safe }}}}</script>
</body>
</html>
"""
