"""The style sheet of every page: one column, light and dark, phone to paper, no outside font."""

from __future__ import annotations

_LIGHT = """
--page:#f4f6f8;--sheet:#ffffff;--ink:#17202b;--soft:#51606f;--rule:#dde3e9;--wash:#f4f7fa;
--shade:#17202b33;--accent:#1d4ed8;--study:#1d4ed8;--pooled:#0f766e;--pooled-dp:#0f766e;--local:#b45309;
--local-dp:#b45309;--promise:#b91c1c;--train:#1d4ed8;--sum:#d97706;--other:#94a3b8;
--in:#bcd3f5;--dropped:#b91c1c;--dropped-wash:#fde2e0;--aborted:#64748b;--aborted-wash:#e2e8f0;
--warn:#8a4b00;--warn-wash:#fff6e5;--warn-rule:#eec27a;--stop:#8f1414;--stop-wash:#fdeaea;
--stop-rule:#dc2626;
"""
_DARK = """
--page:#0e1217;--sheet:#161c24;--ink:#e5eaf0;--soft:#9fadbc;--rule:#2c3744;--wash:#1c242e;
--shade:#000000b0;--accent:#8ab4ff;--study:#7fb0ff;--pooled:#4fd1b8;--pooled-dp:#4fd1b8;--local:#f2b45c;
--local-dp:#f2b45c;--promise:#ff8a80;--train:#7fb0ff;--sum:#f2b45c;--other:#64748b;
--in:#2f4c78;--dropped:#ff8a80;--dropped-wash:#4a2226;--aborted:#94a3b8;--aborted-wash:#2b3542;
--warn:#f5cd8a;--warn-wash:#2c2415;--warn-rule:#7a5a1e;--stop:#ffb4ab;--stop-wash:#3a1a1c;
--stop-rule:#ff6b5e;
"""

_PAGE = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",sans-serif}
main{max-width:60rem;margin:2rem auto;padding:2.5rem 3rem 3rem;background:var(--sheet);
border:1px solid var(--rule);border-radius:10px}
h1{font-size:1.9rem;line-height:1.2;margin:.2rem 0 .6rem;letter-spacing:-.01em;
overflow-wrap:anywhere}
h2{font-size:1.25rem;line-height:1.3;margin:2.8rem 0 .7rem;padding-top:1.1rem;
border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:1.8rem 0 .5rem}
p,ul{margin:.6rem 0;max-width:44rem}
li{margin:.45rem 0}
a{color:var(--accent)}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
.eyebrow{margin:0;color:var(--soft);font-size:.85rem;letter-spacing:.05em;
text-transform:uppercase}
.meta,.note,figcaption{color:var(--soft);font-size:.88rem}
.meta{margin:.2rem 0 0}
.lead{font-size:1.08rem;line-height:1.55;margin:1.1rem 0}
nav{margin:1.1rem 0 0;font-size:.88rem}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:.15rem 1.1rem;padding:0;margin:0;
max-width:none}
nav li{margin:0}
.tiles{display:grid;grid-template-columns:repeat(4,1fr);gap:1px;background:var(--rule);
border:1px solid var(--rule);border-radius:8px;overflow:hidden;margin:1.4rem 0}
.tile{background:var(--sheet);padding:.9rem 1rem}
.tile dt{color:var(--soft);font-size:.82rem}
.tile dd{margin:0}
.tile .big{font-size:1.55rem;line-height:1.25;font-weight:600;font-variant-numeric:tabular-nums}
.tile .small{color:var(--soft);font-size:.82rem;line-height:1.4}
.banner{margin:1.2rem 0;padding:.8rem 1rem;border:2px solid var(--stop-rule);border-radius:8px;
background:var(--stop-wash);color:var(--stop)}
.banner strong{display:block;font-size:1.1rem;letter-spacing:.02em}
.warnings{margin:1.2rem 0;padding:.7rem 1rem;border:1px solid var(--warn-rule);
border-left-width:5px;border-radius:6px;background:var(--warn-wash);color:var(--warn)}
.warnings h2{font-size:1rem;margin:0;padding:0;border:0}
.warnings ul{margin:.3rem 0 0;padding-left:1.2rem;max-width:none}
.warnings li{margin:.2rem 0}
.scroll{overflow-x:auto;margin:.8rem 0}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
.tabled{margin:1.2rem 0 .8rem}
.tabled figcaption{margin:0 0 .3rem;max-width:none}
.tabled .scroll{margin:0}
.tabled .scroll{background:linear-gradient(to right,var(--sheet) 30%,transparent) left/2rem 100%,
linear-gradient(to left,var(--sheet) 30%,transparent) right/2rem 100%,
linear-gradient(to right,var(--shade),transparent) left/.8rem 100%,
linear-gradient(to left,var(--shade),transparent) right/.8rem 100%;
background-repeat:no-repeat;background-attachment:local,local,scroll,scroll}
th,td{padding:.38rem .7rem;border-bottom:1px solid var(--rule);text-align:left;
vertical-align:top}
th:first-child,td:first-child{padding-left:.2rem}
thead th{font-weight:600;color:var(--soft);font-size:.82rem;line-height:1.3;
vertical-align:bottom;border-bottom:1px solid var(--soft)}
.dense{font-size:.84rem}
.dense th,.dense td{padding:.36rem .42rem}
.dense thead th{font-size:.78rem}
thead th.n{white-space:normal}
tbody th{font-weight:500;min-width:8.5rem;max-width:20rem;overflow-wrap:anywhere}
tbody th.n{min-width:0}
.n{text-align:right;white-space:nowrap}
tr.strong th,tr.strong td{font-weight:650}
tr.quiet th,tr.quiet td{color:var(--soft)}
tbody tr:last-child th,tbody tr:last-child td{border-bottom-color:var(--soft)}
.facts{display:grid;grid-template-columns:max-content 1fr;margin:.8rem 0;font-size:.92rem}
.facts dt,.facts dd{padding:.36rem 0;border-bottom:1px solid var(--rule)}
.facts dt{color:var(--soft);padding-right:1.5rem}
.facts dd{margin:0;overflow-wrap:anywhere}
code{font:.86em/1.5 ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace}
figure{margin:1.1rem 0}
figcaption{margin:.3rem 0 0;max-width:44rem}
.multiples{display:grid;grid-template-columns:repeat(3,1fr);gap:1.1rem 1.4rem;margin:1.2rem 0}
.multiples figure{margin:0}
h4{margin:0 0 .3rem;font-size:.88rem;font-weight:600}
.halves{display:grid;grid-template-columns:1fr 1fr;gap:1.2rem 2.2rem;margin:1.1rem 0}
.halves figure{margin:0}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;list-style:none;padding:0;
margin:.5rem 0 0;font-size:.86rem;color:var(--soft);max-width:none}
.legend li{margin:0;display:flex;align-items:center;gap:.45rem}
.narrow{display:none}
details{margin:.9rem 0}
summary{cursor:pointer;color:var(--accent);font-size:.92rem}
footer{margin-top:2.6rem;padding-top:.9rem;border-top:1px solid var(--rule);color:var(--soft);
font-size:.85rem}
"""

_CHARTS = """
.chart{display:block;width:100%;height:auto;overflow:visible}
.scroll .chart{width:auto;max-width:none}
.chart text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",
sans-serif;fill:var(--soft);font-variant-numeric:tabular-nums}
.chart .label,.chart .figure{fill:var(--ink)}
.chart .end{text-anchor:end}
.chart .middle{text-anchor:middle}
.grid{stroke:var(--rule);stroke-width:1}
.axis{stroke:var(--soft);stroke-width:1}
.curve,.level,.hook{fill:none;stroke:currentColor}
.curve{stroke-width:2;stroke-linejoin:round}
.level{stroke-width:1.6;stroke-dasharray:7 4}
.hook{stroke-width:1;opacity:.6}
.tip{fill:transparent;stroke:none}
.area{fill:currentColor;opacity:.12;stroke:none}
.dot{fill:currentColor}
.chart .name{fill:currentColor}
.study{color:var(--study)}
.pooled{color:var(--pooled)}
.pooled_dp{color:var(--pooled-dp);stroke-dasharray:2 3}
.local{color:var(--local)}
.local_dp{color:var(--local-dp);stroke-dasharray:2 3}
.promise{color:var(--promise);stroke-dasharray:none}
.name,.hook,.dot,.curve,.bar{stroke-dasharray:none}
.swatch .study{stroke-dasharray:none;stroke-width:2}
.track{fill:var(--wash);stroke:var(--rule)}
.bar{fill:currentColor}
.bar.pooled_dp,.bar.local_dp{opacity:.6}
.bar.over{color:var(--stop-rule)}
.promise-mark{stroke:var(--promise);stroke-width:2}
.train{fill:var(--train)}
.sum{fill:var(--sum)}
.other{fill:var(--other)}
.cell-in{fill:var(--in)}
.cell-dropped{fill:var(--dropped-wash);stroke:var(--dropped)}
.cell-aborted{fill:var(--aborted-wash);stroke:var(--aborted)}
.cell-absent{fill:none;stroke:var(--rule)}
.mark-dropped{stroke:var(--dropped);stroke-width:1.6;fill:none}
.mark-aborted{stroke:var(--aborted);stroke-width:1.4;fill:none}
"""

_PHONE = """
@media (max-width:44rem){
body{font-size:15px}
main{margin:0;padding:1.3rem 1.1rem 2rem;border:0;border-radius:0}
h1{font-size:1.5rem}
h2{margin-top:2.1rem}
.tiles{grid-template-columns:1fr 1fr}
.multiples,.halves{grid-template-columns:1fr}
.multiples figure{max-width:340px}
.wide{display:none}
.narrow{display:block}
.legend.narrow{display:flex}
.facts{grid-template-columns:1fr}
.facts dt{border:0;padding:.5rem 0 0}
.facts dd{padding-top:0}
th,td{padding:.36rem .5rem}
}
"""

_PAPER = """
@page{margin:16mm 15mm}
@media print{
body{background:none;font-size:10pt}
main{max-width:none;margin:0;padding:0;border:0}
nav,summary{display:none}
h1,h2,h3,h4{break-after:avoid}
figure,tr,.tiles,.banner,.warnings,.multiples figure{break-inside:avoid}
.scroll{overflow:visible}
.tabled .scroll{background:none}
.tabled{break-inside:auto}
.scroll .chart{width:100%;max-width:100%}
details::details-content{content-visibility:visible;block-size:auto}
a{color:inherit;text-decoration:none}
svg *,.tile,.banner,.warnings{print-color-adjust:exact;-webkit-print-color-adjust:exact}
table{font-size:8.5pt}
.dense{font-size:7pt}
.dense th,.dense td{padding:.25rem .22rem}
.dense thead th{font-size:6.5pt}
tbody th{min-width:0}
}
"""

STYLE = (
    f":root{{color-scheme:light dark;{_LIGHT}}}"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
    f"{_PAGE}{_CHARTS}{_PHONE}{_PAPER}"
).replace("\n", "")
