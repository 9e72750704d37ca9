"""The report's look: one style sheet, light and dark, narrow and printed; and the few lines of script.

Colours are variables. Arms have eight, told apart also by dashes and markers; each has a contrast of 3 or more to the
page in both themes, texts have 4.5 or more (`tests/test_study_report.py` computes it).
"""

from __future__ import annotations

LIGHT = {
    "bg": "#f7f8f9",
    "panel": "#ffffff",
    "text": "#1b2126",
    "muted": "#566069",
    "line": "#d5dbe0",
    "grid": "#e5e9ec",
    "accent": "#0b57a4",
    "good": "#17692f",
    "good-bg": "#e3f4e7",
    "bad": "#a3241b",
    "bad-bg": "#fdeae8",
    "vague": "#5b646d",
    "vague-bg": "#eceff1",
    "warn": "#7a4d00",
    "warn-bg": "#fdf1d8",
    "s0": "#0072b2",
    "s1": "#cc4e00",
    "s2": "#007a5a",
    "s3": "#a3408a",
    "s4": "#8a6d00",
    "s5": "#3d4650",
    "s6": "#2b8fd0",
    "s7": "#b5254f",
}
DARK = {
    "bg": "#14181b",
    "panel": "#1c2125",
    "text": "#e7eaec",
    "muted": "#a7b0b8",
    "line": "#39424a",
    "grid": "#2b3238",
    "accent": "#7dbbff",
    "good": "#7ddc95",
    "good-bg": "#17351f",
    "bad": "#ff9d94",
    "bad-bg": "#431d1a",
    "vague": "#aab3bb",
    "vague-bg": "#2b3238",
    "warn": "#f2c45e",
    "warn-bg": "#3b2e10",
    "s0": "#56b4e9",
    "s1": "#f5874a",
    "s2": "#2cc79a",
    "s3": "#e391cb",
    "s4": "#e3bf3a",
    "s5": "#cfd6dc",
    "s6": "#8f9dff",
    "s7": "#f27297",
}


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())


_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-padding-top:1rem}
body{margin:0;background:var(--bg);color:var(--text);overflow-wrap:break-word;
 font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",sans-serif}
main,header,footer{max-width:72rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:2.5rem}
h1{font-size:clamp(1.6rem,1.2rem + 2vw,2.3rem);line-height:1.2;margin:.2rem 0 1rem;text-wrap:balance}
h2{font-size:1.35rem;line-height:1.3;margin:0 0 .75rem}
h3{font-size:1.08rem;margin:1.5rem 0 .5rem}
h4{font-size:1rem;margin:1rem 0 .35rem}
p{margin:.5rem 0;max-width:46rem}
a{color:var(--accent)}
a:focus-visible,summary:focus-visible,.scroll:focus-visible{
 outline:3px solid var(--accent);outline-offset:2px;border-radius:3px}
.kicker,.quiet,caption,figcaption .sub{color:var(--muted)}
.kicker{margin:0;font-size:.9rem}
.quiet{font-size:.9rem}
.skip{position:absolute;left:-999rem}
.skip:focus{left:1rem;top:.5rem;background:var(--panel);padding:.4rem .8rem;z-index:1}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;padding:.7rem 0;margin:1.2rem 0 0;
 border-block:1px solid var(--line);font-size:.93rem}
section{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:1.25rem 1.4rem;margin:1.25rem 0}
section.answer{border-left:6px solid var(--accent)}
section.alarm{border-left:6px solid var(--bad)}
.lead{font-size:1.12rem;font-weight:600;max-width:54rem}
.alert{background:var(--bad-bg);color:var(--bad);border-radius:6px;padding:.55rem .8rem;margin:.6rem 0;max-width:none}
.alert ul{margin:.2rem 0;padding-left:1.2rem}
.wide{max-width:none}
.scroll{overflow-x:auto;margin:.6rem 0 1rem;background:
 linear-gradient(to right,var(--panel) 40%,transparent) 0 0/40px 100% no-repeat local,
 linear-gradient(to left,var(--panel) 40%,transparent) 100% 0/40px 100% no-repeat local,
 linear-gradient(to right,var(--line),transparent) 0 0/14px 100% no-repeat scroll,
 linear-gradient(to left,var(--line),transparent) 100% 0/14px 100% no-repeat scroll}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.93rem}
caption{caption-side:top;text-align:left;font-size:.9rem;padding:0 0 .35rem}
caption span{display:block;position:sticky;left:0;width:fit-content;max-width:min(100%,calc(100vw - 3.6rem))}
th,td{padding:.38rem .8rem .38rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
tr>:last-child{padding-right:0}
thead th{font-size:.85rem;color:var(--muted);font-weight:600;vertical-align:bottom;border-bottom-width:2px}
tbody th{font-weight:600;min-width:8rem}
tbody th.rowgroup{padding-top:.9rem;color:var(--muted);font-size:.88rem;font-weight:600}
tfoot td,tfoot th{border-bottom:0;padding-top:.3rem;font-weight:600}
.axisrow td{padding-top:0}
td.n,th.n{text-align:right;white-space:nowrap}
.pairs{list-style:none;padding:0;margin:0 0 .8rem;font-size:.93rem}
.pairs li{display:grid;grid-template-columns:10.25rem minmax(0,1fr) 17rem;gap:.2rem 1rem;align-items:center;
 padding:.35rem 0;border-top:1px solid var(--line);break-inside:avoid}
.pairs li.axisrow{padding-top:0}
p.rowgroup{margin:.9rem 0 .3rem;color:var(--muted);font-size:.88rem;font-weight:600}
td.mk{width:17rem;min-width:13rem;padding-block:.2rem;vertical-align:middle}
table.plain td{min-width:5rem;max-width:24rem}
table.plain th[scope=row]{max-width:20rem;overflow-wrap:anywhere}
.badge{display:inline-block;font-size:.82rem;font-weight:600;line-height:1.3;padding:.1rem .5rem;border-radius:99px;
 white-space:nowrap;background:var(--vague-bg);color:var(--vague)}
.badge.good{background:var(--good-bg);color:var(--good)}
.badge.bad{background:var(--bad-bg);color:var(--bad)}
.badge.info{color:var(--accent)}
.badge.warn{background:var(--warn-bg);color:var(--warn)}
.claims,.verdicts{list-style:none;padding:0;margin:.5rem 0}
.claims>li{border-top:1px solid var(--line);padding:.7rem 0}
.claims>li:first-child{border-top:0}
.claims q{font-weight:600}
.claims ul{list-style:none;padding:0;margin:.35rem 0 0}
.claims ul li{margin:.3rem 0}
.charts{display:grid;
 grid-template-columns:repeat(auto-fill,minmax(min(100%,27rem),1fr));gap:0 1.75rem;margin-top:.5rem}
.charts figure{display:grid;grid-template-rows:subgrid;grid-row:span 4;margin-bottom:1rem;align-content:start}
.charts figcaption{align-self:end}
figure{margin:0;min-width:0;break-inside:avoid}
figcaption{font-weight:600;margin:.2rem 0 .3rem}
figcaption .sub{font-weight:400;font-size:.9rem;display:block}
svg{display:block}
svg.chart{width:100%;height:auto;max-width:40rem}
svg.mark{width:100%;max-width:16.25rem;height:auto}
svg.swatch{display:inline-block;vertical-align:middle;flex:none}
svg text{fill:var(--muted);font-family:inherit}
.tick{font-size:13.5px}
.label{font-size:14px}
.mark .tick{font-size:12.5px}
.grid{stroke:var(--grid);fill:none}
.axis{stroke:var(--muted);fill:none}
.zero{stroke:var(--text);fill:none;stroke-width:1.4}
.s0{color:var(--s0)}.s1{color:var(--s1)}.s2{color:var(--s2)}.s3{color:var(--s3)}
.s4{color:var(--s4)}.s5{color:var(--s5)}.s6{color:var(--s6)}.s7{color:var(--s7)}
.found{color:var(--accent)}.vague{color:var(--vague)}
.band{fill:currentColor;opacity:.14}
.thin{fill:none;stroke:currentColor;stroke-width:1;opacity:.4}
.line{fill:none;stroke:currentColor;stroke-width:2.4;stroke-linejoin:round}
.bar{fill:none;stroke:currentColor;stroke-width:2}
.m{fill:currentColor;stroke:var(--panel);stroke-width:1.2}
.mh{fill:var(--panel);stroke:currentColor;stroke-width:1.8}
.mx{fill:none;stroke:currentColor;stroke-width:2.4}
.seed{fill:var(--panel);stroke:currentColor;stroke-width:1.3;opacity:.75}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.15rem 1.1rem;padding:0;margin:.2rem 0 .4rem;font-size:.9rem}
.legend li{display:flex;gap:.4rem;align-items:center}
details{margin:.5rem 0}
summary{cursor:pointer;color:var(--accent);font-size:.93rem}
pre{font:.85rem/1.45 ui-monospace,"Cascadia Mono","DejaVu Sans Mono","Liberation Mono",monospace;white-space:pre-wrap;
 overflow-wrap:anywhere;margin:.3rem 0;unicode-bidi:isolate}
pre.block{background:var(--bg);border:1px solid var(--line);border-radius:6px;padding:.7rem .9rem}
.sample{border-top:1px solid var(--line);padding:1rem 0;display:grid;
 grid-template-columns:minmax(9rem,13rem) 1fr;gap:1.25rem}
.sample>*{min-width:0}
.sample h3{margin:0 0 .4rem;font-size:.95rem;overflow-wrap:anywhere}
.sample img{max-width:100%;min-width:6rem;height:auto;border:1px solid var(--line);border-radius:4px;
 background:#fff;image-rendering:auto;display:block;margin-bottom:.4rem}
.outputs{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,14rem),1fr));gap:.8rem;margin:0;padding:0;
 list-style:none;align-content:start}
.output{border:1px solid var(--line);border-left:4px solid var(--vague);border-radius:6px;padding:.5rem .7rem;
 break-inside:avoid;min-width:0}
.output.right{border-left-color:var(--good)}
.output.wrong{border-left-color:var(--bad)}
.output h4{margin:0 0 .3rem;font-size:.9rem;display:flex;gap:.5rem;align-items:center}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;font-size:.93rem}
dt{color:var(--muted)}
dd{margin:0;min-width:0;overflow-wrap:anywhere}
footer{padding-block:1rem 3rem;color:var(--muted);font-size:.9rem}
@media screen and (min-width:641px){table.plain th[scope=row]{min-width:12rem}}
@media (max-width:640px){
 main,header,footer{padding-inline:.8rem}
 section{padding:1rem .9rem;border-radius:8px}
 .sample{grid-template-columns:1fr;gap:.6rem}
 .sample img{max-width:12rem}
 dl{grid-template-columns:1fr}
 dd{margin-bottom:.4rem}
 .tick{font-size:15.5px}.label{font-size:15.5px}
 tbody th[scope=row]{min-width:6.5rem;max-width:9rem;position:sticky;left:0;background:var(--panel)}
 .pairs li{grid-template-columns:minmax(0,1fr)}
 svg.mark{max-width:17rem}
}
@media print{
 @page{margin:13mm}
 html{font-size:9.5pt}
 body{background:#fff;print-color-adjust:exact;-webkit-print-color-adjust:exact}
 main,header,footer{max-width:none;padding:0}
 nav,.skip{display:none}
 section{border:0;border-top:1px solid var(--line);border-radius:0;padding:.6rem 0;margin:.6rem 0;background:none}
 section.answer,section.alarm{padding-left:.9rem}
 h2,h3,h4,caption,.rowgroup,section>.quiet,.lead{break-after:avoid}
 thead{break-after:avoid}
 tr,.sample,figure,.claims>li,.quiet,.lead{break-inside:avoid}
 .scroll{overflow:visible;background:none}
 table.plain td,table.plain th{overflow-wrap:anywhere;min-width:0}
 .pairs li{grid-template-columns:10rem minmax(0,1fr) 16rem}
 .charts{display:block}
 .charts figure{display:inline-block;vertical-align:top;width:48%;margin-right:1.5%}
 details:not(.print):not([open]){display:none}
 details.print::details-content{content-visibility:visible;block-size:auto}
}
"""

CSS = (
    f":root{{color-scheme:light;{_variables(LIGHT)}}}\n"
    f"@media screen and (prefers-color-scheme:dark){{:root{{color-scheme:dark;{_variables(DARK)}}}}}"
    f"{_RULES}"
)

# The page is whole without it: opens what is folded, and belongs on paper, while it is printed.
SCRIPT = (
    'addEventListener("beforeprint",()=>document.querySelectorAll("details.print:not([open])").forEach(d=>{'
    'd.open=true;d.dataset.folded=""}));'
    'addEventListener("afterprint",()=>document.querySelectorAll("details[data-folded]").forEach(d=>{'
    "d.open=false;delete d.dataset.folded}))"
)
