"""The style sheet of all pages: light and dark, phone and desk, colours that colour-blind readers can tell apart.

Must not know what a page says.
"""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--soft:#59626d;--line:#d9dee4;--card:#f6f8fa;
--p0:#c2410c;--p1:#0b63c5;--p2:#007a5c;--p3:#9b3f8f;--ours:#0b63c5;--native:#7a6a00;--floor:#f3c9a8;--floor-ink:#a3480a;
--good:#0b5cad;--some:#8a5a00;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e6e9ed;--soft:#9aa5b1;--line:#333a42;--card:#1c2127;
--p0:#ff9d5c;--p1:#6cb6ff;--p2:#4fd1a5;--p3:#e29ad8;--ours:#6cb6ff;--native:#e3cf57;--floor:#5b3a20;--floor-ink:#ffb27d;
--good:#7cc0ff;--some:#f0c35b;--bad:#ff8b80}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;padding:1.2rem 1rem 3rem;max-width:78rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:1.7rem;line-height:1.2;margin:.2rem 0}
h2{font-size:1.2rem;margin:2.2rem 0 .5rem;padding-top:.6rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.2rem 0 .3rem}
p{margin:.4rem 0;max-width:46rem}
a{color:var(--good)}
.soft,figcaption{color:var(--soft);font-size:.88rem}
math{font-size:1.2rem;margin:.5rem 0}mtd{text-align:left;padding:.25rem 0}
mtable.cases{border-left:1.5px solid;border-radius:.5em 0 0 .5em;padding-left:.5em;margin-left:.2em}
.cases mtd+mtd{padding-left:1.5em}
.formula{overflow-x:auto;padding:.2rem 0}
code,.mono{font:.86em/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.wide{overflow-x:auto;margin:.5rem 0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .65rem;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap;vertical-align:top}
th{font-weight:600;color:var(--soft)}
td.n,th.n{text-align:right}
td.wrap{white-space:normal;min-width:16rem}
.grid-of{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr));gap:1rem}
.tables{grid-template-columns:repeat(auto-fit,minmax(min(100%,29rem),1fr))}.tables>div{min-width:0}
figure{margin:0;padding:.6rem .6rem .5rem;background:var(--card);border-radius:.5rem;min-width:0;max-width:40rem}
figure b{font-size:.95rem}
pre{margin:.4rem 0;padding:.6rem .8rem;background:var(--card);border-radius:.4rem;overflow-x:auto}
details{margin:.4rem 0}summary{cursor:pointer}
.whole{white-space:nowrap}
.verdict{font-weight:600;white-space:nowrap}
.exhausted,.proved{color:var(--good)}.sampled,.unproved{color:var(--some)}.failed{color:var(--bad)}
svg.plot{display:block;width:100%;height:auto}
svg text{font:11px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;fill:var(--soft)}
svg .label{fill:var(--ink);paint-order:stroke;stroke:var(--card);stroke-width:3px;stroke-linejoin:round}
svg path{fill:none;stroke:var(--soft);stroke-width:1}
svg .grid{stroke:var(--line);stroke-width:.5}svg .axis{stroke:var(--soft);stroke-width:.8}
svg .zero{stroke:var(--soft);stroke-width:.7}svg .landmark{stroke:var(--ink);stroke-width:.8;stroke-dasharray:1 3}
svg .leader{stroke:var(--soft);stroke-width:.7}
svg .curve{stroke-width:2.2}svg .slope{stroke-width:1.4;stroke-dasharray:5 3}
svg .hull{stroke-width:7;stroke-opacity:.45}
svg path.p0{stroke:var(--p0)}svg path.p1{stroke:var(--p1)}svg path.p2{stroke:var(--p2)}svg path.p3{stroke:var(--p3)}
svg text.p0{fill:var(--p0)}svg text.p1{fill:var(--p1)}svg text.p2{fill:var(--p2)}svg text.p3{fill:var(--p3)}
svg path.floor{fill:var(--floor);stroke:none}svg .floor-edge{stroke:var(--floor-ink);stroke-width:.9}
svg path.ours{stroke:var(--ours);stroke-width:1.6}
svg path.native{stroke:var(--native);stroke-width:1.3;stroke-dasharray:4 2.5}
svg text.ours{fill:var(--ours)}svg text.native{fill:var(--native)}svg text.floor-ink{fill:var(--floor-ink)}
svg circle{fill:var(--ink)}svg circle.worst{fill:var(--ours);stroke:var(--card);stroke-width:1.5}
svg circle.decoded{fill:var(--card);stroke:var(--ink);stroke-width:1.1}
svg circle.lost{fill:none;stroke:var(--bad);stroke-width:1.4}svg text.lost{fill:var(--bad)}
svg.thumb{display:block;width:64px;height:34px}svg.thumb .curve{stroke-width:1.8}
.index th button{font:inherit;color:inherit;background:none;border:0;padding:0;cursor:pointer}
.index th[aria-sort=ascending] button:after{content:" ▲"}.index th[aria-sort=descending] button:after{content:" ▼"}
.index table{font-size:.85rem;border-collapse:separate;border-spacing:0}
.index th,.index td{padding:.25rem .38rem;vertical-align:middle}
.index td.wrap{min-width:9rem;max-width:14rem}
.index td:first-child,.index th:first-child{position:sticky;left:0;background:var(--paper);z-index:1}
@media(max-width:30rem){body{padding:.8rem .7rem 2rem}th,td{padding:.25rem .45rem}figure{padding:.4rem .2rem}}
"""
